// A student's spec: from the header of its GGUF (a file, a Blob or a URL), or from qe_edge.json.

const KEY = "qe_edge.spec";
const VERSION = 2;
const STEP = 1 << 18; // bytes that are fetched at a time
const MOST = 1 << 26; // of a header
const SIZES = { 0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8 }; // bytes of a value by type
const STRING = 8;
const ARRAY = 9;

/**
 * The spec of a student. `source` is a path (Node), a URL, a Blob, or the parsed content of qe_edge.json.
 * Of a GGUF only the header's beginning is read, by range requests where it is a URL.
 */
export async function readSpec(source, { fetch = globalThis.fetch } = {}) {
  if (typeof source === "object" && !(source instanceof URL) && !(source instanceof Blob)) return checked(source);
  const name = source instanceof Blob ? (source.name ?? "the file") : source;
  if (/\.json$/.test(String(source))) {
    const read = await reader(source, fetch);
    return checked(JSON.parse(new TextDecoder().decode(await read(0, 1 << 16))));
  }
  const text = await headerText(await reader(source, fetch), KEY).catch((error) => {
    throw new Error(`${name}: ${error.cause?.message ?? error.message}`, { cause: error });
  });
  if (text === undefined) throw new Error(`${name} has no ${KEY}: it is no export of qe-edge; give its spec beside it (js/README.md)`);
  return checked(JSON.parse(text));
}

function checked(spec) {
  const version = spec?.schema_version;
  if (version === undefined) throw new Error("this is no student's spec, which has a schema_version");
  if (version !== VERSION) throw new Error(`the spec is of version ${version}, and this qe-edge reads version ${VERSION}`);
  return spec;
}

/** `(start, end) => bytes`, fewer of them where the source ends. */
async function reader(source, fetch) {
  if (source instanceof Blob)
    return async (start, end) => new Uint8Array(await source.slice(start, end).arrayBuffer());
  if (source instanceof URL ? source.protocol !== "file:" : /^https?:/.test(source))
    return async (start, end) => {
      const answer = await fetch(source, { headers: { Range: `bytes=${start}-${end - 1}` } });
      if (answer.status === 416) return new Uint8Array();
      if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
      if (answer.status === 206) return new Uint8Array(await answer.arrayBuffer());
      return firstBytes(answer.body, start, end); // a server without ranges sends all of it
    };
  const { open } = await import("node:fs/promises");
  return async (start, end) => {
    const file = await open(source);
    try {
      const { bytesRead, buffer } = await file.read(new Uint8Array(end - start), 0, end - start, start);
      return buffer.subarray(0, bytesRead);
    } finally {
      await file.close();
    }
  };
}

async function firstBytes(body, start, end) {
  const parts = [];
  let length = 0;
  for await (const part of body) {
    parts.push(part);
    if ((length += part.length) >= end) break; // which cancels the rest
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer()).subarray(start, end);
}

/** The text of a key in a GGUF's header (github.com/ggml-org/ggml/blob/master/docs/gguf.md). */
async function headerText(read, wanted) {
  let bytes = new Uint8Array();
  let view;
  let at = 0;
  const decoder = new TextDecoder();

  async function need(more) {
    while (at + more > bytes.length) {
      const next = bytes.length > MOST ? [] : await read(bytes.length, Math.max(bytes.length + STEP, at + more));
      if (!next.length) throw new Error("this is no whole GGUF file");
      const grown = new Uint8Array(bytes.length + next.length);
      grown.set(bytes);
      grown.set(next, bytes.length);
      bytes = grown;
      view = new DataView(bytes.buffer);
    }
  }
  async function integer(size) {
    await need(size);
    const value = size === 4 ? view.getUint32(at, true) : Number(view.getBigUint64(at, true));
    at += size;
    return value;
  }
  async function string() {
    const length = await integer(8);
    if (length > MOST) throw new Error("this is no whole GGUF file");
    await need(length);
    at += length;
    return decoder.decode(bytes.subarray(at - length, at));
  }
  async function skip(type) {
    if (type === STRING) return void (await string());
    if (type === ARRAY) {
      const of = await integer(4);
      const length = await integer(8);
      if (SIZES[of]) at += SIZES[of] * length;
      else for (let i = 0; i < length; i++) await skip(of);
      return;
    }
    if (!SIZES[type]) throw new Error("this is no whole GGUF file");
    at += SIZES[type];
  }

  await need(24);
  if (decoder.decode(bytes.subarray(0, 4)) !== "GGUF") throw new Error("this is no GGUF file");
  at = 16;
  const keys = await integer(8);
  for (let i = 0; i < keys; i++) {
    const key = await string();
    const type = await integer(4);
    if (key === wanted && type === STRING) return string();
    await skip(type);
  }
}
