// What Python makes of a text, JavaScript makes of it too: tests/vectors/make.py wrote these.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { ExpandedQuery, cleanQuery, countWords, detectLanguage, fold, gate, pieces, queries, wordsOf } from "../src/index.js";
import { wholeWords } from "../src/text.js";

const read = (name) => JSON.parse(readFileSync(new URL(`../../tests/vectors/${name}.json`, import.meta.url), "utf8"));

const close = (a, b) => Math.abs(a - b) <= 1e-12 * Math.max(Math.abs(a), Math.abs(b));

function assertWeights(found, expected, message) {
  assert.deepEqual([...found.keys()], expected.map(([word]) => word), message);
  for (const [word, weight] of expected) assert.ok(close(found.get(word), weight), `${message}: ${word}`);
}

test("texts are folded, cut and told apart as in Python", () => {
  for (const entry of read("text")) {
    assert.equal(fold(entry.text), entry.fold);
    if (entry.clean) assert.equal(cleanQuery(entry.text), entry.clean);
    else assert.throws(() => cleanQuery(entry.text), /the query is empty/);
    assert.equal(detectLanguage(entry.text), entry.language, entry.text);
    assert.equal(countWords(entry.text), entry.count, entry.text);
    assert.deepEqual(wordsOf(entry.text), entry.words);
    assert.equal(wholeWords(entry.text), entry["whole words"]);
    assert.deepEqual(wordsOf(entry.text, 3), entry["pieces of three"]);
  }
});

test("prompts are the same pieces", () => {
  for (const { prompt, cases } of read("prompts"))
    for (const { query, pieces: expected } of cases) assert.deepEqual(pieces(prompt, query), expected);
});

test("the gate holds back the same, with the same words", () => {
  for (const { gate: thresholds, before, after } of read("gates")) {
    for (const { query, scores, languages, reason } of before)
      assert.equal(gate.before(thresholds, query, { scores, languages }), reason);
    for (const { query, text, reason } of after) assert.equal(gate.after(thresholds, query, text), reason);
  }
});

test("joins weigh the same words, and queries are the same", () => {
  for (const entry of read("expansions")) {
    const { weights, ...relevance } = entry.relevance.passages ? entry.relevance : {};
    const expanded = new ExpandedQuery(entry.query, entry.join, {
      text: entry.text,
      relevance: weights ? { ...relevance, weights } : null,
    });
    assertWeights(expanded.words(), entry.words, entry.query);
    assert.equal(expanded.toFts5(), entry.fts5);
    assert.equal(expanded.toFts5({ columns: ["title", 'a "b"'] }), entry.columns);
    assert.equal(expanded.toFts5({ trigram: true }), entry.trigram);
    assert.equal(expanded.toFts5({ phrases: false }), entry["no phrases"]);
    assert.equal(expanded.toText(), entry["text query"]);
    const rounded = (query) => JSON.stringify(query, (key, value) => (key === "boost" ? value.toPrecision(9) : value));
    assert.equal(rounded(expanded.toElasticsearch("title^2", "body")), rounded(entry.elasticsearch));
    assert.equal(rounded(expanded.toElasticsearch("body")), rounded(entry["one field"]));
  }
});

test("a word without weight is none", () => {
  assert.equal(queries.fts5(new Map([["tides", 0], ["moon", 1], ["sea", -1]])), '"moon"');
  assert.equal(queries.fts5(new Map([["tides", 0]])), '""');
});
