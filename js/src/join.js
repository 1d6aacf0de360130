// query + expansion -> weighted words, by a named rule. Weights are Maps: objects would sort "2023" first.

const LEAST = 0.01; // of the heaviest word's weight: engines without weights would count a lighter one

export const DEFAULT_JOIN = { rule: "mass", value: 0.7 };

/** How often each word occurs; a Map stays what it is. */
export function counts(words) {
  if (words instanceof Map) return words;
  const found = new Map();
  for (const word of words) found.set(word, (found.get(word) ?? 0) + 1);
  return found;
}

const total = (weights) => [...weights.values()].reduce((sum, weight) => sum + weight, 0);

/** What one occurrence of a word weighs in the query and in the expansion; lengths are in words. */
export function scales({ rule, value }, queryLength, expansionLength) {
  if (!queryLength || !expansionLength) return [1, 1];
  if (rule === "repeat") return [value, 1];
  if (rule === "adaptive")
    return [Math.max(1, Math.floor(Math.floor(expansionLength / queryLength) / value)), 1];
  return [1, (value * queryLength) / expansionLength];
}

/** Weights of a query's words with several expansions: `parts` are pairs of a join and words, or a Map. */
export function joined(query, parts) {
  const there = parts.map(([join, words]) => [join, counts(words)]).filter(([, weights]) => weights.size);
  const alone = there.length < 2;
  const weights = new Map();
  const scale = alone ? scales(there[0]?.[0] ?? DEFAULT_JOIN, query.length, there.length && total(there[0][1]))[0] : 1;
  for (const [word, count] of counts(query)) weights.set(word, scale * count);
  for (const [join, words] of there) {
    const [ofQuery, ofExpansion] = scales(join, query.length, total(words));
    for (const [word, count] of words)
      weights.set(word, (weights.get(word) ?? 0) + (alone ? ofExpansion : ofExpansion / ofQuery) * count);
  }
  return weights;
}

/** Passages' weights, whose sum is 1, by what each is worth. */
export function weigh(values, temperature) {
  const best = Math.max(...values);
  const weights = values.map((value) => Math.exp((value - best) / temperature));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

/** The heaviest words of weighed passages, heaviest first; `analyze` cuts a text into words. */
export function relevanceWords(passages, weights, most, analyze) {
  const mixture = new Map();
  passages.forEach((passage, i) => {
    const words = analyze(passage);
    for (const [word, count] of counts(words))
      mixture.set(word, (mixture.get(word) ?? 0) + (weights[i] * count) / words.length);
  });
  const heaviest = [...mixture].sort((a, b) => b[1] - a[1]).slice(0, most);
  return new Map(heaviest.filter(([, weight]) => weight > LEAST * heaviest[0][1]));
}
