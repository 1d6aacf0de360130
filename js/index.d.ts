/** What travels with a student: see docs/format.md. */
export interface Spec {
  prompt: PromptSpec;
  join: Join;
  base_model: string;
  stage: string;
  license: string;
  gate: Gate;
  feedback: Feedback;
  schema_version: number;
}

export interface PromptSpec {
  id: string;
  texts: Partial<Record<Language, { system: string; user: string }>>;
  max_tokens: number;
  answer_prefix: string;
  end: string;
}

export type Language = "en" | "zh" | "other";

export interface Join {
  rule: "mass" | "repeat" | "adaptive";
  value: number;
}

/** Thresholds beyond which an expansion is not used; null switches one off. */
export interface Gate {
  max_words: number | null;
  clear_lead: number | null;
  min_new_words: number | null;
  min_distinct: number | null;
  same_language: boolean;
}

export interface Feedback {
  texts: Partial<Record<Language, { system: string; user: string }>>;
  passages: number;
  tokens: number;
  temperature: number;
  terms: number;
  join: Join;
}

/** A part of a prompt, and whether it is parsed for special tokens. */
export type Piece = [text: string, special: boolean];

export interface Request {
  messages: { system: string; user: string };
  pieces: Piece[];
  end: string;
  maxTokens: number;
  signal?: AbortSignal;
}

/** Who writes: your own, or one of those below. */
export interface Engine {
  write(request: Request): Promise<string>;
}

/** Who reads: says what each passage is worth, the larger, the more it says of the query. */
export interface Reader {
  settings?: Partial<Feedback>;
  /** Whether it can read such a query: an English encoder's passages for a Chinese one do harm. */
  knows?(query: string): boolean | Promise<boolean>;
  read(query: string, text: string, passages: string[], spec: Spec, signal?: AbortSignal): Promise<number[]>;
}

/** The spec of a student: `source` is a path (Node), a URL or a Blob of its GGUF, or qe_edge.json's content. */
export function readSpec(source: string | URL | Blob | Spec, options?: { fetch?: typeof fetch }): Promise<Spec>;

export interface Options {
  reader?: Reader | null;
  gate?: Gate;
  maxTokens?: number;
  fetch?: typeof fetch;
}

export class Student {
  constructor(spec: Spec, engine: Engine, options?: Options);
  static load(source: string | URL | Blob | Spec, engine: Engine, options?: Options): Promise<Student>;
  readonly spec: Spec;
  /** The query with what the student writes for it; the whole words that there are when `signal` aborts count. */
  expand(query: string, options?: { scores?: number[]; signal?: AbortSignal }): Promise<ExpandedQuery>;
  /** The query with passages that a search found for it, each weighed by the reader. */
  feedback(
    query: string,
    passages: string[],
    options?: { scores?: number[]; written?: ExpandedQuery | null; worth?: Map<string, number>; signal?: AbortSignal },
  ): Promise<ExpandedQuery>;
  /** Write, search, read, search: `search` returns texts, best first. The result is to be searched with. */
  refine(
    query: string,
    search: (expanded: ExpandedQuery) => string[] | Promise<string[]>,
    options?: { rounds?: number; scores?: number[]; signal?: AbortSignal },
  ): Promise<ExpandedQuery>;
}

export interface Relevance {
  passages: string[];
  weights: number[];
  terms: number;
  join: Join;
}

/** A query with its expansion; `text` is "" where the plain query is searched, and `fallback` says why. */
export class ExpandedQuery {
  constructor(query: string, join: Join, found?: Partial<Pick<ExpandedQuery, "text" | "fallback" | "rejected" | "relevance">>);
  readonly query: string;
  readonly join: Join;
  readonly text: string;
  readonly fallback: string;
  readonly rejected: string;
  readonly relevance: Relevance | null;
  words(options?: { cjk?: number }): Map<string, number>;
  /** A MATCH expression: bind it as a parameter, and order by rank. */
  toFts5(options?: { columns?: string[]; trigram?: boolean; phrases?: boolean }): string;
  toElasticsearch(...fields: string[]): Record<string, unknown>;
  /** Arguments of MiniSearch's `search`; index with `tokenize: wordsOf`. */
  toMiniSearch(): [query: string, options: Record<string, unknown>];
  /** Arguments of FlexSearch's `search`. */
  toFlexSearch(most?: number): [query: string, options: { suggest: true }];
  /** Parameters of Orama's `search`. */
  toOrama(): { term: string; threshold: number; limit?: number };
  toText(): string;
}

/** node-llama-cpp: a LlamaModel and a sequence of its context, which both writes and reads. */
export function nodeLlama(model: object, sequence: object): Engine & Reader;
/** wllama, with the student loaded, which both writes and reads. */
export function wllama(instance: object): Engine & Reader;
/** An OpenAI-compatible endpoint that serves the student, such as `http://localhost:8080/v1`. */
export function endpoint(url: string, options?: { model?: string; key?: string; fetch?: typeof fetch }): Engine;
/** An encoder as reader: `embed` gives vectors of length 1. */
export function embeddingReader(
  embed: (texts: string[]) => Promise<ArrayLike<number>[]> | ArrayLike<number>[],
  settings?: Partial<Feedback> & Pick<Reader, "knows">,
): Reader;

export function messages(prompt: PromptSpec, query: string): { system: string; user: string };
export function pieces(prompt: PromptSpec, query: string): Piece[];
export function render(prompt: PromptSpec, query: string): string;
export function readingPrompts(
  spec: Spec,
  query: string,
  passages: string[],
  tokenize: (text: string, special: boolean) => Iterable<number>,
): { prompts: number[][]; answer: number[] };
export function cleanQuery(query: string): string;
export function countWords(text: string): number;
export function detectLanguage(text: string): Language;
export function fold(text: string): string;
/** Folded words, and overlapping pieces of Chinese: index `wordsOf(text).join(" ")` in FTS5. */
export function wordsOf(text: string, cjk?: number): string[];

export namespace gate {
  function before(gate: Gate, query: string, options?: { scores?: number[]; languages?: string[] }): string;
  function after(gate: Gate, query: string, text: string): string;
}
export namespace queries {
  type Weights = Map<string, number>;
  function fts5(words: Weights, options?: { columns?: string[] }): string;
  function elasticsearch(words: Weights, fields: string[]): Record<string, unknown>;
  function miniSearch(words: Weights): [query: string, options: Record<string, unknown>];
  function flexSearch(words: Weights, most?: number): [query: string, options: { suggest: true }];
  function orama(words: Weights): { term: string; threshold: number };
  function text(words: Weights): string;
}
export namespace join {
  type Words = string[] | Map<string, number>;
  function joined(query: string[], parts: [Join, Words][]): Map<string, number>;
  function weigh(values: number[], temperature: number): number[];
}
