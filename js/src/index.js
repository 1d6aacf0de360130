export { embeddingReader, endpoint, nodeLlama, wllama } from "./engines.js";
export { messages, pieces, readingPrompts, render } from "./prompt.js";
export { readSpec } from "./spec.js";
export { ExpandedQuery, Student } from "./student.js";
export { cleanQuery, countWords, detectLanguage, fold, wordsOf } from "./text.js";
export * as gate from "./gate.js";
export * as join from "./join.js";
export * as queries from "./queries.js";
