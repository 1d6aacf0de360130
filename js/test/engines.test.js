// The real engines on a real student: tests/js/test_js.py says where it is, and what Python makes of the same.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";

import {
  Student,
  detectLanguage,
  embeddingReader,
  endpoint,
  nodeLlama,
  pieces,
  readSpec,
  render,
  wordsOf,
} from "../src/index.js";

const OPEN = { max_words: null, clear_lead: null, min_new_words: null, min_distinct: null, same_language: false };

const { gguf, encoder, expected, server } = JSON.parse(process.env.QE_EDGE_JS ?? "{}");
const skip = gguf ? false : "run by tests/js/test_js.py, which makes the student";
const python = skip ? {} : JSON.parse(readFileSync(expected, "utf8"));

let llama, model, context, engine;
before(async () => {
  if (skip) return;
  const { LlamaLogLevel, getLlama } = await import("node-llama-cpp");
  llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
  model = await llama.loadModel({ modelPath: gguf });
  context = await model.createContext({ contextSize: 1024, threads: 1 });
  engine = nodeLlama(model, context.getSequence());
});
after(() => llama?.dispose());

test("the file's header holds the spec", { skip }, async () => {
  assert.deepEqual(await readSpec(gguf), python.spec);
});

test("prompts have Python's token ids, hostile ones too", { skip }, async () => {
  for (const { query, ids } of python.prompts)
    assert.deepEqual(
      pieces(python.spec.prompt, query).flatMap(([text, special]) => model.tokenize(text, special)),
      ids,
    );
});

test("the file's own chat template makes the same prompt of the query alone", { skip }, async () => {
  const { Template } = await import("@huggingface/jinja");
  const template = new Template(model.fileInfo.metadata.tokenizer.chat_template);
  for (const { query, hostile } of python.prompts) {
    const prompt = template.render({ messages: [{ role: "user", content: query }], add_generation_prompt: true });
    if (!hostile) assert.equal(prompt, render(python.spec.prompt, query));
  }
});

test("it writes what Python has it write", { skip }, async () => {
  const student = await Student.load(gguf, engine, { maxTokens: python.budget });
  for (const { query, text } of python.texts) assert.equal((await student.expand(query)).text, text);
});

test("a query is written the same after itself, after a longer one and after one that was aborted", { skip }, async () => {
  const student = await Student.load(gguf, engine, { maxTokens: 8, gate: OPEN });
  const chain = ["what causes tides", "what causes tides", "tides", "causes tides", "tides"];
  await student.expand("what is rust", { signal: AbortSignal.timeout(50) });
  const found = [];
  for (const query of chain) found.push((await student.expand(query)).text);
  assert.ok(found.every(Boolean), found.join(" | "));
  assert.equal(found[0], found[1]);
  assert.equal(found[2], found[4]);
});

test("a passage is worth the same after a longer one of its words", { skip }, async () => {
  const longer = "A worn washer lets the faucet drip; replace it and tighten the nut.";
  const [, after] = await engine.read("tap drips", "", [longer, "A worn washer; replace it."], python.spec);
  const [alone] = await engine.read("tap drips", "", ["A worn washer; replace it."], python.spec);
  assert.ok(alone < -1 && Math.abs(alone - after) < 0.01, `${alone} and ${after}`);
});

test("a query that is too long is searched as it is", { skip }, async () => {
  const student = await Student.load(gguf, engine);
  const { text, fallback } = await student.expand("x".repeat(5000));
  assert.deepEqual([text, /^the query's prompt takes \d+ tokens, over 512$/.test(fallback)], ["", true]);
});

test("a served student writes the same", { skip: skip || (server ? false : "no server") }, async () => {
  const student = new Student(python.spec, endpoint(server), { maxTokens: python.budget });
  const { query, text } = python.texts[0]; // the other's tokens nearly tie, and this server computes otherwise
  assert.equal((await student.expand(query)).text, text);
});

test("an aborted signal ends the writing, and what there is counts", { skip }, async () => {
  const student = await Student.load(gguf, engine, { maxTokens: 64, gate: OPEN });
  const controller = new AbortController();
  const written = student.expand("what causes tides", { signal: controller.signal });
  setTimeout(() => controller.abort(), 300);
  const whole = await student.expand("what causes tides");
  assert.ok(whole.text.startsWith((await written).text));
  const late = await student.expand("what causes tides", { signal: AbortSignal.abort() });
  assert.deepEqual([late.text, late.fallback], ["", "the signal aborted before the first whole word"]);
});

test("it reads as Python does", { skip }, async () => {
  const student = await Student.load(gguf, engine, { reader: engine });
  const { query, passages, weights } = python.reading;
  const found = await student.feedback(query, passages);
  // In nats per token, beside the best passage: other kernels multiply quantized weights otherwise.
  const best = weights.indexOf(Math.max(...weights));
  const { temperature } = python.spec.feedback;
  const nats = (all) => all.map((weight) => temperature * Math.log(weight / all[best]));
  const [ours, theirs] = [nats(found.relevance.weights), nats(weights)];
  ours.forEach((value, i) => assert.ok(Math.abs(value - theirs[i]) < 0.2, `${ours} and ${theirs}`));
});

const NOTES = ["The moon's pull moves the sea.", "Yeast raises dough.", "潮汐由月球的引力引起。", "A tidy desk."];

test("search libraries find by it what the query alone doesn't", { skip }, async () => {
  const student = await Student.load(gguf, engine, { maxTokens: python.budget });
  const expanded = await student.expand("what causes tides");
  const { default: MiniSearch } = await import("minisearch");
  const mini = new MiniSearch({ fields: ["text"], tokenize: (text) => wordsOf(text) });
  mini.addAll(NOTES.map((text, id) => ({ id, text })));
  assert.equal(mini.search("what causes tides").length, 0);
  assert.equal(mini.search(...expanded.toMiniSearch())[0].id, 0);

  const { default: flexsearch } = await import("flexsearch");
  const flex = new flexsearch.Index({ encode: (text) => wordsOf(text) });
  NOTES.forEach((text, id) => flex.add(id, text));
  assert.equal(flex.search(...expanded.toFlexSearch())[0], 0);

  const { create, insert, search } = await import("@orama/orama");
  const orama = create({ schema: { text: "string" } });
  for (const text of NOTES) insert(orama, { text });
  assert.equal(search(orama, expanded.toOrama()).hits[0].document.text, NOTES[0]);
});

const readme = readFileSync(new URL("../README.md", import.meta.url), "utf8");
const [electron, embedding] = [...readme.matchAll(/```js\n(.*?)```/gs)].map((block) => block[1]);
const AsyncFunction = (async () => {}).constructor;

test("the README's Electron lines find it with FTS5", { skip }, async () => {
  const { DatabaseSync } = await import("node:sqlite"); // the same calls; better-sqlite3 must be compiled
  const lines = electron
    .replace(/^import Database from .*$/m, "")
    .replace(/^import .*node-llama-cpp.*$/m, "const { getLlama } = await import('node-llama-cpp');")
    .replace(/^import .*from "qe-edge";$/m, "")
    .replaceAll("student-Q4_K_M.gguf", gguf)
    .replaceAll("await getLlama()", "await getLlama({ gpu: false, build: 'never' })");
  const run = new AsyncFunction("Database", "Student", "nodeLlama", `${lines}\nreturn rows;`);
  const rows = await run(DatabaseSync, Student, nodeLlama);
  assert.equal(rows[0].body, "The moon's pull moves the sea.");
});

test("the README's encoder lines make a reader of English", { skip }, async () => {
  const lines = embedding.replaceAll("all-MiniLM-L6-v2-Q8_0.gguf", encoder);
  const run = new AsyncFunction("getLlama", "embeddingReader", "detectLanguage", `${lines}\nreturn reader;`);
  const reader = await run(async () => llama, embeddingReader, detectLanguage);
  const student = await Student.load(gguf, engine, { maxTokens: python.budget, reader });
  const { query, passages } = python.reading;
  const { weights } = (await student.feedback(query, passages)).relevance;
  assert.equal(weights.length, passages.length);
  weights.forEach((weight, i) => assert.ok(Math.abs(weight - python.encoded[i]) < 0.01, `${weights}`));
  assert.deepEqual([reader.knows(query), reader.knows("海水为什么涨落")], [true, false]);
});
