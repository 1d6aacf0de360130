// Expands the queries of a file with a student: node speed.mjs STUDENT QUERIES THREADS TOKENS
// prints the seconds for all but the first. Run by bench/programs/js_speed.py.

import { readFileSync } from "node:fs";

const [gguf, file, threads, maxTokens] = process.argv.slice(2);
const { LlamaLogLevel, getLlama } = await import("node-llama-cpp");
const { Student, nodeLlama } = await import("../src/index.js");

const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: gguf });
const context = await model.createContext({ contextSize: 1024, threads: Number(threads) });
const student = await Student.load(gguf, nodeLlama(model, context.getSequence()), { maxTokens: Number(maxTokens) });
const [first, ...others] = JSON.parse(readFileSync(file, "utf8"));
await student.expand(first);
const start = performance.now();
for (const query of others) (await student.expand(query)).toFts5();
console.log((performance.now() - start) / 1000);
process.exit(0);
