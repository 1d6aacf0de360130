// A student: gate, engine, gate, join. `write -> search -> read -> search`, each step optional.

import * as gates from "./gate.js";
import { joined, relevanceWords, weigh } from "./join.js";
import { beginning, messages, pieces } from "./prompt.js";
import * as queries from "./queries.js";
import { readSpec } from "./spec.js";
import { TooLong } from "./engines.js";
import { check, cleanQuery, cut, oneLine, wholeWords, wordsOf } from "./text.js";

const LATE = "the signal aborted";

/** A query with what was written for it, or found and read; `text` is "" where the plain query is searched. */
export class ExpandedQuery {
  constructor(query, join, { text = "", fallback = "", rejected = "", relevance = null } = {}) {
    Object.assign(this, { query, join, text, fallback, rejected, relevance });
  }

  /** Weighted words (a Map), for an engine with its own analyzer; `cjk` characters of Chinese make one. */
  words({ cjk = 2 } = {}) {
    let query = cut(this.query, { cjk });
    if (!query.length) query = cut(this.query, { cjk, all: true });
    const analyze = (text) => cut(text, { cjk, more: true });
    const parts = [[this.join, analyze(this.text)]];
    if (this.relevance) {
      const { passages, weights, terms, join } = this.relevance;
      parts.push([join, relevanceWords(passages, weights, terms, analyze)]);
    }
    return joined(query, parts);
  }

  /** For SQLite FTS5. It splits no Chinese: index `wordsOf(text).join(" ")`, or tokenize by `trigram`. */
  toFts5({ columns = [], trigram = false, phrases = true } = {}) {
    let words = this.words({ cjk: trigram ? 3 : 2 });
    if (trigram) words = new Map([...words].filter(([word]) => [...word].length >= 3));
    if (!phrases) words = queries.singleTokens(words, { trigram });
    return queries.fts5(words, { columns });
  }

  toElasticsearch(...fields) {
    return queries.elasticsearch(this.words(), fields.flat());
  }

  toMiniSearch() {
    return queries.miniSearch(this.words());
  }

  toFlexSearch(most) {
    return queries.flexSearch(this.words(), most);
  }

  toOrama() {
    return queries.orama(this.words());
  }

  toText() {
    return queries.text(this.words());
  }
}

/** A student on one of the engines, with the contract that its file carries. */
export class Student {
  /** `reader` weighs passages: see `nodeLlama` and `embeddingReader`. */
  constructor(spec, engine, { reader = null, gate = spec.gate, maxTokens = spec.prompt.max_tokens } = {}) {
    check(engine?.write, "an engine has write({ … }), such as nodeLlama(model, context.getSequence())");
    check(!reader || reader.read, "a reader has read(…), such as the engine itself or embeddingReader(embed)");
    check(Number.isInteger(maxTokens) && maxTokens > 0, `maxTokens must be a whole number from 1, not ${JSON.stringify(maxTokens)}`);
    Object.assign(this, { spec, engine, reader, gate, maxTokens });
  }

  /** `source` as `readSpec` takes it. */
  static async load(source, engine, options = {}) {
    return new Student(await readSpec(source, options), engine, options);
  }

  /**
   * The query with what the student writes for it. `scores` are the plain query's, best first, for a gate
   * that looks at them; an aborted `signal` stops the writing, and what there is by then counts.
   */
  async expand(query, { scores = [], signal } = {}) {
    const cleaned = cleanQuery(query);
    const { spec, gate } = this;
    const languages = Object.keys(spec.prompt.texts);
    const fallback = gates.before(gate, cleaned, { scores, languages });
    if (fallback) return new ExpandedQuery(query, spec.join, { fallback });
    const request = {
      messages: messages(spec.prompt, cleaned),
      pieces: pieces(spec.prompt, cleaned),
      end: spec.prompt.end,
      maxTokens: this.maxTokens,
      signal,
    };
    let text = "";
    try {
      if (!signal?.aborted) text = await this.engine.write(request);
    } catch (error) {
      if (!(error instanceof TooLong)) throw error;
      return new ExpandedQuery(query, spec.join, { fallback: error.message });
    }
    text = oneLine(signal?.aborted ? wholeWords(text) : text);
    let reason = gates.after(gate, query, text);
    if (signal?.aborted && !text) reason = `${LATE} before the first whole word`;
    else if (signal?.aborted && reason) reason = `${LATE}; so far, ${reason}`;
    return reason
      ? new ExpandedQuery(query, spec.join, { fallback: reason, rejected: text })
      : new ExpandedQuery(query, spec.join, { text });
  }

  /** The query with passages that a search found for it, each weighed by the reader; `written` counts too. */
  async feedback(query, passages, { scores = [], written = null, worth = new Map(), signal } = {}) {
    const plain = (fallback) => (written?.text ? written : new ExpandedQuery(query, this.spec.join, { fallback }));
    const texts = Array.isArray(passages) && passages.every((passage) => typeof passage === "string");
    check(texts, "passages must be an array of strings; a search returns the texts that it found, best first");
    const settings = { ...this.spec.feedback, ...this.reader?.settings };
    if (!this.reader) throw new Error("nobody reads: load the student with { reader }");
    const cleaned = cleanQuery(query);
    const languages = Object.keys(this.spec.prompt.texts);
    const reason = gates.before(this.gate, cleaned, { scores, languages });
    if (reason) return plain(reason);
    if (this.reader.knows && !(await this.reader.knows(cleaned))) return plain("the reader doesn't know the query's letters");
    const first = passages.slice(0, settings.passages);
    const heads = new Set(first.map((passage) => beginning(settings, passage)).filter(Boolean));
    if (!heads.size) return plain("there was no passage to read");
    const known = new Set(wordsOf(query));
    const fresh = new Set([...heads].flatMap((head) => cut(head, { more: true })).filter((word) => !known.has(word))).size;
    if (this.gate.min_new_words !== null && fresh < this.gate.min_new_words)
      return plain("the passages add nothing to the query");
    const unread = [...heads].filter((head) => !worth.has(head));
    const text = written?.text ?? "";
    const values = unread.length ? await this.reader.read(cleaned, text, unread, this.spec, signal) : [];
    values.forEach((value, i) => worth.set(unread[i], value)); // fewer if the signal aborted
    if (!worth.size) return plain(`${LATE} before the first passage was read`);
    const weights = weigh([...worth.values()], settings.temperature);
    const relevance = { passages: [...worth.keys()], weights, terms: settings.terms, join: settings.join };
    return new ExpandedQuery(query, this.spec.join, { text, relevance });
  }

  /**
   * Write, search, read, search: `search(expanded)` returns texts, best first. Without a reader, what was
   * written is all. The result is to be searched with.
   */
  async refine(query, search, { rounds = 2, scores = [], signal } = {}) {
    check(typeof search === "function", "search must be a function of the expanded query, which returns texts");
    check(Number.isInteger(rounds) && rounds > 0, `rounds must be a whole number from 1, not ${JSON.stringify(rounds)}`);
    const written = await this.expand(query, { scores, signal });
    if (!this.reader || (written.fallback && !written.rejected)) return written;
    let expanded = written;
    const worth = new Map();
    for (let round = 0; round < rounds && !signal?.aborted; round++) {
      const found = await search(expanded);
      expanded = await this.feedback(query, found, { scores, written, worth, signal });
      if (!expanded.relevance) break;
    }
    return expanded;
  }
}
