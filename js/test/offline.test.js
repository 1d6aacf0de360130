// What needs no model: specs from anywhere, endpoints, the student's steps with engines of our own.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { test } from "node:test";

import { ExpandedQuery, Student, embeddingReader, endpoint, nodeLlama, queries, readSpec } from "../src/index.js";

const SPEC = {
  prompt: { id: "p", texts: { en: { system: "S", user: "Q: {query}" } }, max_tokens: 9, answer_prefix: "", end: "<|im_end|>" },
  join: { rule: "mass", value: 1 },
  base_model: "tiny",
  stage: "base",
  license: "",
  gate: { max_words: 256, clear_lead: null, min_new_words: 1, min_distinct: 0.3, same_language: true },
  feedback: { texts: {}, passages: 2, tokens: 64, temperature: 0.25, terms: 60, join: { rule: "mass", value: 3 } },
  schema_version: 2,
};

/** A GGUF's header with some keys of every kind before the spec's. */
function header(spec) {
  const parts = [];
  const u32 = (value) => parts.push(Buffer.from(Uint32Array.of(value).buffer));
  const u64 = (value) => parts.push(Buffer.from(BigUint64Array.of(BigInt(value)).buffer));
  const string = (text) => (u64(Buffer.byteLength(text)), parts.push(Buffer.from(text)));
  parts.push(Buffer.from("GGUF"));
  u32(3), u64(0), u64(4);
  string("general.name"), u32(8), string("a student");
  string("general.size"), u32(4), u32(7);
  string("tokens"), u32(9), u32(8), u64(30_000);
  for (let i = 0; i < 30_000; i++) string(`token number ${i}`); // more than is fetched at once
  string("qe_edge.spec"), u32(8), string(JSON.stringify(spec));
  return Buffer.concat(parts);
}

async function served(content, ranges, use) {
  const asked = [];
  const server = createServer((request, response) => {
    const [, start, end] = /bytes=(\d+)-(\d+)/.exec(request.headers.range ?? "") ?? [];
    asked.push(request.headers.range);
    if (!ranges || start === undefined) return response.end(content);
    if (Number(start) >= content.length) return response.writeHead(416).end();
    response.writeHead(206).end(content.subarray(Number(start), Number(end) + 1));
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  try {
    await use(`http://127.0.0.1:${server.address().port}/student.gguf`);
  } finally {
    server.closeAllConnections();
    server.close();
  }
  return asked;
}

test("a spec is read from a Blob, from a URL with and without ranges, and from qe_edge.json's content", async () => {
  const file = header(SPEC);
  assert.deepEqual(await readSpec(new Blob([file])), SPEC);
  assert.deepEqual(await readSpec(SPEC), SPEC);
  const padded = Buffer.concat([file, Buffer.alloc(1 << 22)]); // weights, which nobody fetches
  const asked = await served(padded, true, async (url) => assert.deepEqual(await readSpec(url), SPEC));
  const last = Math.max(...asked.map((range) => Number(range.split("-")[1])));
  assert.ok(last < file.length + (1 << 18), "no more than the header");
  await served(padded, false, async (url) => assert.deepEqual(await readSpec(new URL(url)), SPEC));
});

test("what is no student is refused by name", async () => {
  const rejects = (source, message) => assert.rejects(readSpec(source), message);
  await rejects(new Blob(["no model at all, but long enough"]), /this is no GGUF file/);
  await rejects(new Blob([header(SPEC).subarray(0, 500)]), /this is no whole GGUF file/);
  await rejects({ ...SPEC, schema_version: 1 }, /of version 1, and this qe-edge reads version 2/);
  const other = header(SPEC);
  other.write("xx_edge.spec", other.indexOf("qe_edge.spec"));
  await rejects(new Blob([other]), /: the file has no qe_edge.spec: it is no export of qe-edge/);
});

const says = (text) => ({ asked: [], async write(request) { this.asked.push(request); return text; } });

test("the gate stands before and after the engine", async () => {
  const engine = says("The moon pulls\n the sea.");
  const student = new Student(SPEC, engine);
  const expanded = await student.expand(" what causes\ntides ");
  assert.equal(expanded.text, "The moon pulls the sea.");
  assert.deepEqual(engine.asked[0].messages, { system: "S", user: "Q: what causes tides" });
  assert.equal(engine.asked[0].maxTokens, 9);
  assert.match((await student.expand("潮汐")).fallback, /the query is in zh, and the student writes en/);
  assert.equal(engine.asked.length, 1);
  const same = await new Student(SPEC, says("Tides")).expand("tides");
  assert.deepEqual([same.text, same.rejected, same.fallback], ["", "Tides", "the text adds nothing to the query"]);
  assert.deepEqual([...same.words().keys()], ["tides"]);
  await assert.rejects(student.expand("  "), /the query is empty/);
});

test("refine searches by what was written, reads what that finds, once each, and searches again", async () => {
  const vectors = { tides: [1, 0], "moon and sea": [0, 1], "the moon": [0, 1], "a desk": [1, 0], bread: [-1, 0] };
  const embedded = [];
  const reader = embeddingReader((texts) => (embedded.push(...texts), texts.map((text) => vectors[text])));
  const student = new Student(SPEC, says("moon and sea"), { reader });
  const searches = [];
  const found = [["the moon", "a desk", "bread"], ["a desk", "bread"]];
  const refined = await student.refine("tides", (expanded) => (searches.push(expanded), found[searches.length - 1]));
  assert.deepEqual(searches.map((expanded) => expanded.relevance?.passages ?? []), [[], ["the moon", "a desk"]]);
  assert.deepEqual(refined.relevance.passages, ["the moon", "a desk", "bread"]);
  assert.equal(embedded.filter((text) => text === "a desk").length, 1);
  // Query and text together lie between both vectors: the moon and a desk are worth the same.
  const [moon, desk, bread] = refined.relevance.weights;
  assert.ok(Math.abs(moon - desk) < 1e-12 && bread < 1e-9);
  const english = embeddingReader(() => assert.fail("not asked"), { knows: (query) => !/tides/.test(query) });
  const unread = await new Student(SPEC, says("moon and sea"), { reader: english }).refine("tides", () => found[0]);
  assert.deepEqual([unread.text, unread.relevance], ["moon and sea", null]);
  const without = await new Student(SPEC, says("moon")).refine("tides", () => assert.fail("nobody reads"));
  assert.equal(without.text, "moon");
});

test("an endpoint gets both messages, and its errors are told", async () => {
  let body;
  const fetch = async (url, options) => {
    body = { url, ...JSON.parse(options.body) };
    return Response.json({ choices: [{ message: { content: "The moon." } }] });
  };
  const student = new Student(SPEC, endpoint("http://x/v1/", { fetch }));
  assert.equal((await student.expand("tides")).text, "The moon.");
  assert.equal(body.url, "http://x/v1/chat/completions");
  assert.deepEqual(body.messages.map((m) => m.content), ["S", "Q: tides"]);
  const slow = endpoint("http://x/v1", { fetch: (_, { signal }) => Promise.reject(signal.reason) });
  const late = await new Student(SPEC, slow).expand("tides", { signal: AbortSignal.abort() });
  assert.deepEqual([late.text, late.fallback], ["", "the signal aborted before the first whole word"]);
  for (const [written, kept] of [["The moon pu", "The moon"], ["Vol", ""], ["月球引", "月球引"]]) {
    const controller = new AbortController();
    const gate = { ...SPEC.gate, same_language: false };
    const write = async () => (controller.abort(), written);
    const cut = await new Student(SPEC, { write }, { gate }).expand("tides", { signal: controller.signal });
    assert.deepEqual([cut.text, cut.fallback], [kept, kept ? "" : "the signal aborted before the first whole word"]);
  }
  const broken = endpoint("http://x/v1", { fetch: async () => new Response("no model", { status: 503 }) });
  await assert.rejects(new Student(SPEC, broken).expand("tides"), /HTTP 503: no model/);
  const elsewhere = endpoint("http://x", { fetch: async () => new Response("", { status: 404 }) });
  await assert.rejects(new Student(SPEC, elsewhere).expand("tides"), /does the address end in \/v1\?/);
});

test("what is of the wrong kind is refused by name", async () => {
  const student = new Student(SPEC, says("moon"), { reader: embeddingReader((texts) => texts.map(() => [1, 0])) });
  const refused = (work, message) => assert.rejects(async () => work(), { name: "TypeError", message });
  await refused(() => student.expand(null), /a query must be a string, not null/);
  await refused(() => new Student(SPEC, {}), /an engine has write/);
  await refused(() => new Student(SPEC, says(""), { reader: "FILE.gguf" }), /a reader has read/);
  await refused(() => new Student(SPEC, says(""), { maxTokens: 0 }), /maxTokens must be a whole number from 1, not 0/);
  await refused(() => student.refine("tides", []), /search must be a function/);
  await refused(() => student.refine("tides", () => [], { rounds: 0 }), /rounds must be a whole number from 1, not 0/);
  await refused(() => student.refine("tides", () => [{ body: "moon" }]), /passages must be an array of strings/);
  await refused(() => queries.fts5(["tap", "drips"]), /words must be a Map/);
  await refused(() => new Student(SPEC, says(""), { maxTokens: "9" }), /from 1, not "9"/);
  await refused(() => nodeLlama({ tokenize() {} }, { getSequence() {} }), /takes a model and a sequence/);
  await refused(() => endpoint("localhost:8080/v1"), /begins with http:\/\/ or https:\/\/, not "localhost:8080\/v1"/);
  await refused(() => embeddingReader(), /embed must be a function/);
  const fewer = new Student(SPEC, says("moon"), { reader: embeddingReader(() => [[1, 0]]) });
  await refused(() => fewer.feedback("tides", ["the moon"]), /embed must return 2 vectors, not 1/);
  await assert.rejects(readSpec({}), /this is no student's spec/);
  await assert.rejects(readSpec("http://127.0.0.1:9/student.gguf"), /127\.0\.0\.1:9\/student\.gguf: /);
  await assert.rejects(new Student(SPEC, endpoint("http://127.0.0.1:9/v1")).expand("tides"), /is the server running\?/);
});

test("a query without any word finds nothing, and passages without a new one don't count", async () => {
  assert.deepEqual(new ExpandedQuery("?!", SPEC.join).toOrama(), { term: "", threshold: 1, limit: 0 });
  const student = new Student(SPEC, says(""), { reader: embeddingReader(() => assert.fail("not asked")) });
  const { fallback, relevance } = await student.feedback("tides", ["the of and", "Tides"]);
  assert.deepEqual([fallback, relevance], ["the passages add nothing to the query", null]);
  const fields = new ExpandedQuery("tides", SPEC.join);
  assert.deepEqual(fields.toElasticsearch(["a", "b"]), fields.toElasticsearch("a", "b"));
});
