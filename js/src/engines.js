// Who writes and who reads. An engine has `write({messages, pieces, end, maxTokens, signal})`; a reader has
// `read(query, text, passages, spec, signal)`, what each passage is worth, and the `settings` that it changes.
// When the signal aborts, what there is by then counts.

import { encode, readingPrompts, readingTexts } from "./prompt.js";
import { check, cleanQuery } from "./text.js";

const LONGEST = 512; // tokens of a prompt

/** A query that is searched as it is. */
export class TooLong extends Error {}

/** node-llama-cpp: `model` is a LlamaModel, `sequence` one of its context's. One request at a time. */
export function nodeLlama(model, sequence) {
  check(model?.tokenize && sequence?.evaluate, "nodeLlama takes a model and a sequence: context.getSequence()");
  const tokenize = (text, special) => model.tokenize(text, special);
  let last = Promise.resolve();
  const alone = (work) => {
    const result = last.then(work);
    last = result.catch(() => {});
    return result;
  };
  // What a prompt shares with the last one from its beginning on. (With shifts, what comes later stays, too, as
  // it was computed after another query.)
  const keepBeginning = (prompt) => sequence.adaptStateToTokens(prompt.slice(0, -1), false);
  async function write({ pieces, end, maxTokens, signal }) {
    const prompt = encode(pieces, tokenize);
    if (prompt.length > LONGEST) throw new TooLong(`the query's prompt takes ${prompt.length} tokens, over ${LONGEST}`);
    const [stop] = tokenize(end, true);
    const written = [];
    await keepBeginning(prompt);
    const rest = prompt.slice(sequence.nextTokenIndex);
    for await (const token of sequence.evaluate(rest, { temperature: 0, yieldEogToken: true })) {
      if (token === stop || model.isEogToken(token)) break;
      written.push(token);
      if (written.length >= maxTokens || signal?.aborted) break;
    }
    return model.detokenize(written);
  }
  async function read(query, _text, passages, spec, signal) {
    const { prompts, answer } = readingPrompts(spec, query, passages, tokenize);
    const values = [];
    for (const prompt of prompts) {
      if (signal?.aborted) break;
      const all = [...prompt, ...answer];
      await keepBeginning(prompt);
      const start = sequence.nextTokenIndex;
      const generateNext = (next) => ({
        logits: { filter: { tokens: [next], includeTop: 1 } },
        totalLogitWeight: true,
        options: { temperature: 1, topK: 0, topP: 1, minP: 0 },
      });
      const input = all.slice(start, -1).map((token, i) => {
        const next = start + i + 1;
        return next < prompt.length ? token : [token, { generateNext: generateNext(all[next]) }];
      });
      const found = (await sequence.controlledEvaluate(input)).filter(Boolean);
      const likelihood = found.map(({ next }, i) => {
        const best = Math.max(...next.logits.values());
        return next.logits.get(answer[i]) - best - Math.log(next.totalLogitWeight);
      });
      values.push(likelihood.reduce((a, b) => a + b, 0) / answer.length);
    }
    return values;
  }
  return {
    write: (request) => alone(() => write(request)),
    /** The student itself as reader. */
    read: (...request) => alone(() => read(...request)),
  };
}

/** wllama (a browser): `instance` has the student loaded; its file's own chat template makes the prompt. */
export function wllama(instance) {
  return {
    async write({ messages, maxTokens, signal }) {
      let text = "";
      return untilAborted(signal, () => text, async () => {
        const settings = { temperature: 0, max_tokens: maxTokens, abortSignal: signal, stream: true };
        const answer = await instance.createChatCompletion({ messages: chat(messages), ...settings });
        for await (const { choices } of answer) text += choices[0]?.delta.content ?? "";
      });
    },
    /** The student itself as reader: a grammar lets it write the query alone, and it tells how likely that was. */
    async read(query, _text, passages, spec, signal) {
      const asked = cleanQuery(query);
      const forced = {
        grammar: `root ::= ${JSON.stringify(asked)}`,
        logit_bias: [[asked, 100]], // so that it is cut into its usual tokens; those told are without the bias
      };
      const settings = { temperature: 0, max_tokens: 4 * asked.length + 1, logprobs: 1, abortSignal: signal };
      const values = [];
      return untilAborted(signal, () => values, async () => {
        for (const prompt of readingTexts(spec, asked, passages)) {
          const { choices } = await instance.createCompletion({ prompt, ...forced, ...settings });
          const tokens = choices[0].logprobs.content.filter(({ bytes }) => bytes.length); // not its end
          values.push(tokens.reduce((sum, { logprob }) => sum + logprob, 0) / tokens.length);
        }
      });
    },
  };
}

/** An OpenAI-compatible endpoint that serves the student, such as llama-server: `http://localhost:8080/v1`. */
export function endpoint(url, { model = "student", key = "", fetch = globalThis.fetch } = {}) {
  check(/^https?:/.test(url), `an endpoint begins with http:// or https://, not ${JSON.stringify(url)}`);
  const where = `${url.replace(/\/$/, "")}/chat/completions`;
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  return {
    async write({ messages, maxTokens, signal }) {
      let text = "";
      return untilAborted(signal, () => text, async () => {
        // llama-cpp-python's server has a penalty of 1.1 by itself.
        const settings = { temperature: 0, repeat_penalty: 1, max_tokens: maxTokens };
        const body = JSON.stringify({ model, messages: chat(messages), ...settings });
        const answer = await fetch(where, { method: "POST", headers, body, signal }).catch((error) => {
          throw new Error(`${where}: ${error.cause?.message ?? error.message}; is the server running?`, { cause: error });
        });
        if (!answer.ok) throw new Error(`${where}: HTTP ${answer.status}: ${(await answer.text()).slice(0, 200)}${answer.status === 404 ? " (does the address end in /v1?)" : ""}`);
        text = (await answer.json()).choices[0].message.content ?? "";
      });
    },
  };
}

const chat = ({ system, user }) => [
  { role: "system", content: system },
  { role: "user", content: user },
];

/** What there is when `work` is done, or was aborted. */
async function untilAborted(signal, found, work) {
  try {
    await work();
  } catch (error) {
    if (!signal?.aborted) throw error;
  }
  return found();
}

/** An encoder as reader: `embed(texts)` gives vectors of length 1. The query's is the mean of query and text. `knows(query)` tells whether it has tokens for it at all: an English one has none for Chinese. */
export function embeddingReader(embed, { temperature = 0.05, tokens = 256, knows, ...settings } = {}) {
  check(typeof embed === "function", "embed must be a function of texts, which returns a vector for each");
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  return {
    settings: { temperature, tokens, ...settings },
    knows,
    async read(query, text, passages) {
      const texts = [query, ...(text ? [text] : []), ...passages];
      const [ofQuery, ...others] = await embed(texts);
      check(others.length === texts.length - 1, `embed must return ${texts.length} vectors, not ${others.length + 1}`);
      const wanted = text ? ofQuery.map((value, i) => value + others[0][i]) : [...ofQuery];
      const length = Math.sqrt(dot(wanted, wanted)) || 1;
      return others.slice(text ? 1 : 0).map((vector) => dot(wanted, vector) / length);
    },
  };
}
