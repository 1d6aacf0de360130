// Search in your own notes: at once by your words, again when the student has written, and again when somebody has
// read what that finds: an encoder, or at a click the student, for which it is work.

import MiniSearch from "minisearch";
import { ExpandedQuery, Student, embeddingReader, gate, queries, wllama, wordsOf } from "qe-edge";
import { Wllama } from "@wllama/wllama";

import { SAMPLES, TEXTS } from "./texts.js";

const MODEL = "student.gguf"; // beside this page
const WASM = { default: "./node_modules/@wllama/wllama/esm/wasm/wllama.wasm" };
const BUDGET = 24; // tokens: the first ones bring the most
const PAUSE = 300; // ms without a key, after which the student is asked
const JOIN = { rule: "mass", value: 0.7 };
const FOUND = 10; // shown
const CHIPS = 12;
const PASSAGES = 4; // that the student reads: one takes a second or more

const at = (id) => document.getElementById(id);
let language = navigator.language.startsWith("zh") ? "zh" : "en";
let text = TEXTS[language];
let index = newIndex();
let student = null;
let encoder = null;
let itself = null; // the student as reader
let expanded = null; // of the query that is shown
let without = new Set(); // words that were clicked away
let asking = new AbortController();
let said = () => "";

function newIndex() {
  return new MiniSearch({ fields: ["text"], storeFields: ["file", "text"], tokenize: (t) => wordsOf(t), processTerm: (t) => t });
}

// Words on the page

function say(what = said) {
  said = what;
  at("state").textContent = what();
}

function translate() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text[element.dataset.text];
  at("query").placeholder = at("query").ariaLabel = text.ask;
  at("chips").ariaLabel = at("chips").title = text.chips;
  document.title = text.title;
  counted();
  say();
}

function counted() {
  at("count").textContent = index.documentCount ? text.count(index.documentCount) : "";
  at("empty").hidden = index.documentCount > 0;
}

at("language").onclick = () => {
  language = language === "en" ? "zh" : "en";
  text = TEXTS[language];
  translate();
};

// Notes

/** A Markdown heading belongs to the paragraph below it, without its marks. */
function withHeadings(content) {
  return content.replace(/^#{1,6} +(.*?)\s*\n\s*/gm, "$1 – ");
}

function take(notes) {
  const passages = notes.flatMap(([file, content]) =>
    withHeadings(content).split(/\n\s*\n/).filter((part) => part.trim()).map((part) => ({ file, text: part.trim() })),
  );
  index = newIndex();
  index.addAll(passages.map((passage, id) => ({ id, ...passage })));
  counted();
  ask();
}

async function readFiles(files) {
  const known = [...files].filter((file) => /\.(txt|md|markdown)$/i.test(file.name));
  take(await Promise.all(known.map(async (file) => [file.webkitRelativePath || file.name, await file.text()])));
}

async function* filesOf(entry) {
  if (entry.isFile) yield await new Promise((done, failed) => entry.file(done, failed));
  if (!entry.isDirectory) return;
  const reader = entry.createReader();
  for (;;) {
    const entries = await new Promise((done, failed) => reader.readEntries(done, failed)); // a hundred at a time
    if (!entries.length) return;
    for (const child of entries) yield* filesOf(child);
  }
}

at("folder").onchange = (event) => readFiles(event.target.files);
at("samples").onclick = () => take(SAMPLES);
document.ondragover = (event) => (event.preventDefault(), document.body.classList.add("dragging"));
document.ondragleave = () => document.body.classList.remove("dragging");
document.ondrop = async (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const files = [];
  for (const entry of entries) for await (const file of filesOf(entry)) files.push(file);
  await readFiles(files);
};

// Search

function find(words) {
  return index.search(...queries.miniSearch(words)).slice(0, FOUND);
}

function wordsLeft() {
  return new Map([...expanded.words()].filter(([word]) => !without.has(word)));
}

function show() {
  const words = wordsLeft();
  const asked = new Set(wordsOf(expanded.query));
  const added = [...words].filter(([word]) => !asked.has(word)).sort((a, b) => b[1] - a[1]);
  at("chips").replaceChildren(
    ...added.slice(0, CHIPS).map(([word]) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.textContent = word;
      chip.onclick = () => (without.add(word), show());
      return chip;
    }),
  );
  const found = find(words);
  at("results").replaceChildren(...found.map((hit) => entry(hit, words)));
  return found.length;
}

function entry(hit, words) {
  const item = document.createElement("li");
  const file = document.createElement("small");
  file.textContent = hit.file;
  item.append(file, ...marked(hit.text, words));
  return item;
}

/** The text, with the words that found it marked. */
function marked(content, words) {
  const parts = [];
  for (const piece of content.split(/([\p{L}\p{N}_]+)/u)) {
    if (/\p{Script=Han}/u.test(piece)) parts.push(...han(piece, words));
    else if (wordsOf(piece).some((word) => words.has(word))) parts.push(mark(piece));
    else parts.push(piece);
  }
  return parts;
}

/** Chinese has no blanks: two characters that were searched for are marked where they stand. */
function han(piece, words) {
  const characters = [...piece];
  const wanted = characters.map((_, i) => i + 1 < characters.length && words.has(characters.slice(i, i + 2).join("")));
  return characters.map((character, i) => (wanted[i] || wanted[i - 1] ? mark(character) : character));
}

function mark(content) {
  return Object.assign(document.createElement("mark"), { textContent: content });
}

let timer = 0;
function ask() {
  asking.abort();
  clearTimeout(timer);
  const query = at("query").value;
  at("chips").replaceChildren();
  at("results").replaceChildren();
  at("read").hidden = true;
  if (!query.trim() || !index.documentCount) return say(() => "");
  const start = performance.now();
  expanded = new ExpandedQuery(query, student?.spec.join ?? JOIN);
  without = new Set();
  const found = show();
  const took = (performance.now() - start).toFixed(0);
  say(() => (found ? text.plain(took) : text.nothing));
  if (student) timer = setTimeout(() => improve(query).catch(broken), PAUSE);
}

async function improve(query) {
  const start = performance.now();
  const { signal } = (asking = new AbortController());
  say(() => text.writing);
  const written = await student.expand(query, { signal });
  if (signal.aborted) return;
  better((ms) => text.written(ms), written, start);
  if (!written.text) return;
  if (encoder) return read(written, signal);
  at("read").hidden = false;
  at("read").onclick = () => read(written, signal).catch(broken);
}

function better(label, next, start) {
  expanded = next;
  show();
  const took = (performance.now() - start).toFixed(0);
  const languages = Object.keys(student.spec.prompt.texts);
  const unasked = gate.before(student.gate, next.query, { languages });
  say(() => (!next.fallback ? label(took) : unasked ? text.unasked : text.held));
}

/** What was written finds passages, which are read, and once more with their words. */
async function read(written, signal) {
  const start = performance.now();
  at("read").hidden = true;
  say(() => text.reading);
  student.reader = encoder ?? itself;
  const search = (next) => find(next.words()).map((hit) => hit.text);
  const worth = new Map();
  let found = written;
  for (let round = 0; round < 2 && !signal.aborted; round++)
    found = await student.feedback(written.query, search(found), { written, worth, signal });
  if (!signal.aborted) better((ms) => text.read(ms), found, start);
}

at("query").oninput = ask;

// Models

async function load(blob) {
  const instance = new Wllama(WASM, { suppressNativeLog: true, allowOffline: true });
  await instance.loadModel([blob], { n_ctx: 1024 });
  const engine = wllama(instance);
  itself = { read: engine.read, settings: { passages: PASSAGES } };
  student = await Student.load(blob, engine, { maxTokens: BUDGET });
  say(() => "");
  ask();
}

async function loadEncoder(blob) {
  const instance = new Wllama(WASM, { suppressNativeLog: true, allowOffline: true });
  await instance.loadModel([blob], { n_ctx: 512, embeddings: true });
  encoder = embeddingReader(async (texts) => {
    const { data } = await instance.createEmbedding({ input: texts });
    return data.map(({ embedding }) => unit(embedding));
  });
  ask();
}

function unit(vector) {
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}

async function download(url) {
  const answer = await fetch(url);
  if (!answer.ok) return null;
  const size = Number(answer.headers.get("Content-Length"));
  const parts = [];
  let received = 0;
  for await (const part of answer.body) {
    parts.push(part);
    received += part.length;
    if (size) say(() => text.loading(Math.floor((100 * received) / size)));
  }
  return new Blob(parts);
}

const broken = (error) => say(() => text.broken(error.message));
const chosen = (loader) => (event) => loader(event.target.files[0]).catch(broken);
at("model").onchange = chosen(load);
at("encoder").onchange = chosen(loadEncoder);

/** What keeps this page for the next time, without a network too; the first visit is loaded again under it. */
async function serviceWorker() {
  const workers = navigator.serviceWorker;
  if (!workers || workers.controller) return;
  const registration = await workers.register("worker.js");
  if (registration.active) return; // a reload that was to leave it out
  await new Promise((done) => workers.addEventListener("controllerchange", done, { once: true }));
  if (index.documentCount) return; // notes were chosen meanwhile, and would be lost
  location.reload();
  await new Promise(() => {});
}

translate();
try {
  await serviceWorker();
  const blob = await download(MODEL);
  if (blob) await load(blob);
  else say(() => text.noModel);
} catch (error) {
  broken(error);
}
