// Never worse than no expansion: when the plain query is searched instead of the expanded one.

import { MORE_STOP_WORDS } from "./stopwords.js";
import { countWords, detectLanguage, wordsOf } from "./text.js";

const given = (value) => value !== null && value !== undefined;

/** Why a query is not to be expanded; "" if it is. `scores` are those of the plain query, best first. */
export function before(gate, query, { scores = [], languages = [] } = {}) {
  const words = countWords(query);
  if (given(gate.max_words) && !words) return "the query has no words";
  const found = detectLanguage(query);
  if (gate.same_language && languages.length && !languages.includes(found)) {
    const where = found === "other" ? "neither in Latin nor in Chinese letters" : `in ${found}`;
    return `the query is ${where}, and the student writes ${languages.join(" and ")}`;
  }
  if (given(gate.max_words) && words > gate.max_words)
    return `the query has ${words} words, over ${gate.max_words}`;
  // FTS5's are below zero, the best one farthest.
  const [best, second] = scores.slice(0, 2).map(Math.abs);
  if (given(gate.clear_lead) && scores.length > 1 && best > 0) {
    const lead = (best - second) / best;
    if (lead >= gate.clear_lead) return `the plain query's best result leads by ${(100 * lead).toFixed(0)}%`;
  }
  return "";
}

/** Why an expansion must not be used; "" if it may. */
export function after(gate, query, text) {
  const words = wordsOf(text);
  if (gate.same_language && words.length && detectLanguage(text) !== detectLanguage(query))
    return `the text is not in the query's language, ${detectLanguage(query)}`;
  const known = new Set([...wordsOf(query), ...MORE_STOP_WORDS]);
  const distinct = new Set(words);
  const fresh = [...distinct].filter((word) => !known.has(word)).length;
  if (given(gate.min_new_words) && fresh < gate.min_new_words)
    return words.length ? "the text adds nothing to the query" : "the text is empty";
  if (given(gate.min_distinct) && distinct.size < gate.min_distinct * words.length)
    return `the text repeats itself: ${distinct.size} different words of ${words.length}`;
  return "";
}
