// Compiled, never run: index.d.ts fits what a program does with it.

import { ExpandedQuery, Spec, Student, embeddingReader, endpoint, join, readSpec, wordsOf } from "qe-edge";

async function app(search: (match: string) => string[]): Promise<Map<string, number>> {
  const spec: Spec = await readSpec(new URL("https://example.org/student.gguf"));
  const reader = embeddingReader(async (texts) => texts.map(() => new Float32Array(384)), { passages: 20 });
  const student = new Student(spec, endpoint("http://localhost:8080/v1"), { reader, maxTokens: 32 });
  const stop = AbortSignal.timeout(500);
  const expanded: ExpandedQuery = await student.expand("what causes tides", { scores: [3, 2], signal: stop });
  const found = search(expanded.toFts5({ columns: ["title"] }));
  const read = await student.feedback("what causes tides", found, { written: expanded });
  const refined = await student.refine("what causes tides", (query) => search(query.toFts5({ trigram: true })));
  const [query, options] = refined.toMiniSearch();
  const weights: number[] = join.weigh([1, 2], read.relevance?.terms ?? 1);
  console.log(query, options, wordsOf("潮汐"), weights, spec.prompt.texts.en?.user);
  return refined.words({ cjk: 3 });
}
void app;
