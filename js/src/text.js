// Text -> folded words, and which language a text is in: qe_edge/text.py in JavaScript.

import { MORE_STOP_WORDS, STOP_WORDS } from "./stopwords.js";

// Ideographs (with extensions and the iteration mark), kana and Hangul.
const CJK = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{3ffff}\u3040-\u30ff\uac00-\ud7af";
const HAN = /[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{3ffff}]/gu;
const LATIN =
  /[a-z\u00df-\u00f6\u00f8-\u02af\u1d00-\u1d25\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff\uab30-\uab6f]/gu;
// Unicode's format characters, and the variation selectors and fillers that nothing is seen of either.
const UNSEEN = new RegExp(
  "[\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u180b-\u180f\u200b-\u200f" +
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\u{110bd}\u{110cd}" +
    "\u{13430}-\u{1343f}\u{1bca0}-\u{1bca3}\u{1d173}-\u{1d17a}\u{e0001}-\u{e0fff}]",
  "gu",
);
const LETTER = `(?:(?![${CJK}])[\\p{L}\\p{N}_])`;
const CJK_OR_WORD = new RegExp(`([${CJK}]+)|(${LETTER}+)`, "gu");
const LAST_WORD = new RegExp(`${LETTER}+([-'’]${LETTER}*)*$`, "u");
const WHITE = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u; // Python's

const count = (text, pattern) => text.match(pattern)?.length ?? 0;

/** What a text is compared as: Unicode form NFKC in lower case, without characters that nothing is seen of. */
export function fold(text) {
  return text.replace(UNSEEN, "").normalize("NFKC").toLowerCase().normalize("NFKC");
}

/** "other" when most letters are neither Latin nor Han, "zh" when at least a fifth are Han, else "en". */
export function detectLanguage(text) {
  const folded = fold(text);
  const letters = count(folded, /\p{L}/gu);
  const han = count(folded, HAN);
  if (2 * (han + count(folded, LATIN)) < letters) return "other";
  return letters && han / letters >= 0.2 ? "zh" : "en";
}

/** Words, every Han, kana or Hangul character counting as one. */
export function countWords(text) {
  let words = 0;
  for (const [, run] of fold(text).matchAll(CJK_OR_WORD)) words += run ? [...run].length : 1;
  return words;
}

/** Folded words as they stand, and overlapping pieces of `cjk` characters of Chinese: index these for FTS5. */
export function wordsOf(text, cjk = 2) {
  const terms = [];
  for (const [, run, word] of fold(text).matchAll(CJK_OR_WORD)) {
    if (word) terms.push(word);
    const characters = [...(run ?? "")];
    for (let i = 0; i < characters.length && i <= Math.max(0, characters.length - cjk); i++)
      terms.push(characters.slice(i, i + cjk).join(""));
  }
  return terms;
}

/** Words for a query, without function words: `more` of them for what was written than for what was asked. */
export function cut(text, { more = false, all = false, cjk = 2 } = {}) {
  const without = more ? MORE_STOP_WORDS : STOP_WORDS;
  return wordsOf(text, cjk).filter((word) => /[\p{L}\p{N}]/u.test(word) && (all || !without.has(word)));
}

export function check(fits, message) {
  if (!fits) throw new TypeError(message);
}

/** Without surrounding blanks, each run of white space one blank. */
export const oneLine = (text) => text.split(WHITE).filter(Boolean).join(" ");

/** A text that was cut anywhere, without its last word, which may be half of one; Chinese stays whole. */
export const wholeWords = (text) => text.replace(LAST_WORD, "");

/** A text on one line, without control characters, in Unicode form NFC. */
export function cleanText(text) {
  return oneLine(text.replace(/[\p{C}\p{Z}]/gu, " ")).normalize("NFC");
}

/** The query as a clean text; throws where nothing is left of it. */
export function cleanQuery(query) {
  if (typeof query !== "string") throw new TypeError(`a query must be a string, not ${query === null ? null : typeof query}`);
  const cleaned = cleanText(query);
  if (!cleaned) throw new Error("the query is empty; give at least one word");
  return cleaned;
}
