// Weighted words -> queries of search engines. No operator that a user typed is left, so every query is valid.

const WORDS = 256; // the heaviest ones
const CLAUSES = 1024; // of a query in Lucene, at most
const REPEATS = 32; // of one word, where an engine has no weights

const quoted = (text) => `"${text.replaceAll('"', '""').replaceAll("\0", "")}"`;

// Half to even, as Python rounds.
function round(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return Math.round(value);
  return floor % 2 ? floor + 1 : floor;
}

function heaviest(given, fields = 1) {
  if (!(given instanceof Map)) throw new TypeError("words must be a Map of words and weights, as words() gives");
  if (fields > CLAUSES) throw new Error(`${fields} fields are too many: engines take ${CLAUSES} clauses at most`);
  const most = Math.min(WORDS, Math.floor(CLAUSES / fields));
  const words = new Map([...given].filter(([, weight]) => weight > 0)); // one without weight is none
  if (words.size <= most) return words;
  const kept = new Set([...words].sort((a, b) => b[1] - a[1]).slice(0, most).map(([word]) => word));
  return new Map([...words].filter(([word]) => kept.has(word)));
}

/** Each word as often as its weight says, for engines that count. */
export function repeated(words) {
  const kept = heaviest(words);
  if (!kept.size) return [];
  const weights = [...kept.values()];
  const unit = Math.max(Math.min(...weights), Math.max(...weights) / REPEATS);
  return [...kept].flatMap(([word, weight]) => Array(Math.max(1, round(weight / unit))).fill(word));
}

/** A MATCH expression of SQLite's FTS5: bind it as a parameter, and order by rank. */
export function fts5(words, { columns = [] } = {}) {
  const match = repeated(words).map(quoted).join(" OR ") || '""';
  const names = [columns].flat().filter(Boolean);
  return names.length ? `{${names.map(quoted).join(" ")}} : (${match})` : match;
}

/** Words that FTS5 takes for one token each, for a table without positions (`detail=none`), or by trigrams. */
export function singleTokens(words, { trigram = false } = {}) {
  const parts = new Map();
  for (const [word, weight] of words) {
    const characters = [...word];
    const found = trigram
      ? characters.slice(0, -2).map((_, i) => characters.slice(i, i + 3).join(""))
      : (word.match(/[\p{L}\p{N}]+/gu) ?? []);
    for (const part of found) parts.set(part, Math.max(weight, parts.get(part) ?? 0));
  }
  return parts;
}

/** The `query` of a search request to Elasticsearch or OpenSearch; fields may carry boosts: `title^2`. */
export function elasticsearch(words, fields) {
  if (!fields.length) throw new Error("name the fields to search, such as title^2 and body");
  const should = [...heaviest(words, fields.length)].map(([query, boost]) =>
    fields.length === 1 && !fields[0].includes("^")
      ? { match: { [fields[0]]: { query, boost } } }
      : { multi_match: { query, fields: [...fields], boost } },
  );
  return should.length ? { bool: { should, minimum_should_match: 1 } } : { match_none: {} };
}

/** `[query, options]` of MiniSearch's `search`, each word with its weight. Index with `tokenize: wordsOf`. */
export function miniSearch(words) {
  const kept = heaviest(words);
  const query = [...kept.keys()].join(" ");
  const tokenize = (text) => text.split(" ").filter(Boolean);
  return [query, { combineWith: "OR", tokenize, processTerm: (t) => t, boostTerm: (t) => kept.get(t) ?? 1 }];
}

/** `[query, options]` of FlexSearch's `search`, which knows no weights: any of the heaviest words. */
export function flexSearch(words, most = 12) {
  const kept = [...words].sort((a, b) => b[1] - a[1]).slice(0, most);
  return [kept.map(([word]) => word).join(" "), { suggest: true }];
}

/** Parameters of Orama's `search`, which weighs words by itself: any of them. */
export function orama(words) {
  const term = [...heaviest(words).keys()].join(" ");
  return { term, threshold: 1, ...(!term && { limit: 0 }) }; // without a word all would be found
}

/** Words in a row, heavier ones repeated, for any engine that takes a plain text. */
export function text(words) {
  return repeated(words).join(" ");
}
