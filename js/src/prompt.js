// A student's prompt: ChatML in pieces that are tokenized one by one, of which only ours are parsed for markup.

import { cleanQuery, cleanText, detectLanguage } from "./text.js";

const CHARACTERS = 16; // of a token, at most
const USUAL = 4; // of a token; a Chinese character counts as three, since a token seldom has two

/** The language whose text is used: the query's own if the student has one, else its first. */
export function languageOf(prompt, query) {
  const language = detectLanguage(query);
  return language in prompt.texts ? language : Object.keys(prompt.texts)[0];
}

/** The system's and the user's message of a query. */
export function messages(prompt, query) {
  const cleaned = cleanQuery(query);
  const text = prompt.texts[languageOf(prompt, cleaned)];
  const [before, after] = text.user.split("{query}");
  return { system: text.system, user: before + cleaned + after };
}

/** The prompt of a query as pieces `[text, special]`; the user's text is never parsed for special tokens. */
export function pieces(prompt, query) {
  const { system, user } = messages(prompt, query);
  return [...opening(system, user), ...closing(prompt)];
}

/** The prompt as one string. */
export function render(prompt, query) {
  return pieces(prompt, query)
    .map(([text]) => text)
    .join("");
}

/** Token ids of pieces, by `tokenize(text, special)`. */
export function encode(parts, tokenize) {
  return parts.flatMap(([text, special]) => [...tokenize(text, special)]);
}

/** The part of a passage that a student reads. */
export function beginning(feedback, passage) {
  const most = CHARACTERS * feedback.tokens;
  const head = [...passage].slice(0, 2 * most).join("");
  return [...cleanText(head)].slice(0, most).join("");
}

/** A prompt for each passage, and the query as the answer to them, as token ids. */
export function readingPrompts(spec, query, passages, tokenize) {
  const { feedback } = spec;
  const [start, end] = aroundPassage(spec, query).map((parts) => encode(parts, tokenize));
  const read = (passage) => encode(plain(beginning(feedback, passage)), tokenize).slice(0, feedback.tokens);
  return {
    prompts: passages.map((passage) => [...start, ...read(passage), ...end]),
    answer: encode(plain(cleanQuery(query)), tokenize),
  };
}

/** The same as texts, for an engine that shows no tokenizer: a passage is cut where its tokens usually end. */
export function readingTexts(spec, query, passages) {
  const { feedback } = spec;
  const [start, end] = aroundPassage(spec, query).map((parts) => parts.map(([text]) => text).join(""));
  return passages.map((passage) => start + usualTokens(beginning(feedback, passage), feedback.tokens) + end);
}

/** The pieces before and after a passage. */
function aroundPassage({ feedback, prompt }, query) {
  const text = feedback.texts[languageOf(prompt, query)] ?? Object.values(feedback.texts)[0];
  const [before, after] = text.user.split("{passage}");
  return [opening(text.system, before), closing(prompt, after)];
}

function usualTokens(text, tokens) {
  let left = USUAL * tokens;
  const kept = [...text].filter((character) => (left -= character < "\u2e80" ? 1 : USUAL - 1) >= 0);
  return kept.join("").replaceAll("<|", "< |"); // its "<|im_end|>" would be ours
}

function opening(system, user) {
  return [
    ["<|im_start|>", true],
    ...plain(`system\n${system}`),
    ["<|im_end|>", true],
    ...plain("\n"),
    ["<|im_start|>", true],
    ...plain(`user\n${user}`),
  ];
}

function closing(prompt, user = "") {
  const end = [...plain(user), ["<|im_end|>", true], ...plain("\n"), ["<|im_start|>", true]];
  end.push(...plain("assistant\n"));
  return prompt.answer_prefix ? [...end, [prompt.answer_prefix, true]] : end;
}

// Cut after each "<", so that no tokenizer can see a whole special token in it.
function plain(text) {
  return text
    .split(/(?<=<)/)
    .filter(Boolean)
    .map((part) => [part, false]);
}
