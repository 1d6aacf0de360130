"""What the thresholds of a student's gate and of its early stop do, on judged queries that may be tuned on.

    python -m qe_edge.bench.programs.gate_thresholds MODEL.gguf --dataset DIR/beir/trec-dl19-20-pool@dl20

Each query is expanded once. Then every setting is tried on the same texts: how many expansions it holds
back, how many queries are helped and hurt against plain BM25, nDCG@10, and the tokens that were needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from qe_edge.console import progress
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.measures import mean, mean_interval, per_query
from qe_edge.retrieval.trec import Ranking
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.writer import dried
from qe_edge.student.gate import OPEN, Gate
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.work.folder import DEFAULT_WORKDIR

MAX_WORDS = (8, 16, 32, 64, 128)
CLEAR_LEAD, MIN_DISTINCT = (0.1, 0.2, 0.3, 0.4, 0.5), (0.3, 0.5, 0.6, 0.7, 0.8)
DRY = (8, 12, 16, 24, 32)


class Text(NamedTuple):
    """An expansion, its tokens, and what plain BM25 finds for its query."""

    query: str
    text: str
    token_ids: tuple[int, ...]
    plain: Ranking


Choose = Callable[[Text], tuple[str, int]]
"""The text that a setting uses, empty for none, and how many tokens it needs."""


def main(
    model: Annotated[str, typer.Argument(help="A student.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Never the one that is tested on.")],
    workdir: Annotated[Path, typer.Option(envvar="QE_EDGE_WORKDIR")] = Path(DEFAULT_WORKDIR),
) -> None:
    """Print a row for each setting."""
    data = load_dataset(dataset)
    index = Index.for_dataset(data, workdir / "index")
    with Expander.load(model, gate=OPEN) as expander:
        texts: dict[str, Text] = {}
        with progress(f"expanding with {model}", len(data.queries)) as advance:
            written = expander.expand_many(data.queries.values())
            for (query_id, query), expanded in zip(data.queries.items(), written, strict=True):
                plain = index.search_text(query, join=DEFAULT_JOIN, k=10)
                texts[query_id] = Text(query, expanded.text, expanded.token_ids, plain)
                advance()
        before = per_query(data.qrels, {query_id: text.plain for query_id, text in texts.items()})
        print(f"{Path(model).name} on {data}: plain BM25 {mean(before):.3f}\n")
        print("| setting | held back | helped | hurt | nDCG@10 | difference | tokens |")
        print("| :-- | --: | --: | --: | --: | --: | --: |")
        all_of_it: dict[str, float] = {}
        for name, choose in _settings(expander):
            chosen = {query_id: choose(text) for query_id, text in texts.items()}
            run = {
                query_id: index.search_text(texts[query_id].query, text, join=expander.spec.join, k=10)
                for query_id, (text, _) in chosen.items()
            }
            values = per_query(data.qrels, run)
            all_of_it = all_of_it or values
            change = mean_interval([values[query_id] - all_of_it[query_id] for query_id in values])
            held = sum(not text for text, _ in chosen.values())
            helped = sum(values[query_id] > before[query_id] for query_id in values)
            hurt = sum(values[query_id] < before[query_id] for query_id in values)
            tokens = sum(count for _, count in chosen.values()) / len(chosen)
            print(
                f"| {name} | {held} | {helped} | {hurt} | {mean(values):.3f} "
                f"| {change.mean:+z.3f} ({change.low:+z.3f} to {change.high:+z.3f}) | {tokens:.1f} |"
            )


def _settings(expander: Expander) -> Iterator[tuple[str, Choose]]:
    yield "everything is used", _gated(OPEN)
    yield "the student's gate", _gated(expander.gate if expander.gate != OPEN else expander.spec.gate)
    for words in MAX_WORDS:
        yield f"max_words {words}", _gated(Gate(words, None, None, None, False))
    for lead in CLEAR_LEAD:
        yield f"clear_lead {lead}", _gated(Gate(None, lead, None, None, False))
    for share in MIN_DISTINCT:
        yield f"min_distinct {share}", _gated(Gate(None, None, None, share, False))
    for tokens in DRY:
        yield f"stop_when_dry {tokens}", _stopped(expander, tokens)


def _gated(gate: Gate) -> Choose:
    def choose(text: Text) -> tuple[str, int]:
        if gate.before(text.query, [score for _, score in text.plain]):
            return "", 0
        return "" if gate.after(text.query, text.text) else text.text, len(text.token_ids)

    return choose


def _stopped(expander: Expander, most: int) -> Choose:
    detokenize = expander.backend.detokenize

    def choose(text: Text) -> tuple[str, int]:
        ends, tokens = dried(text.query, most, detokenize), list(text.token_ids)
        for count in range(1, len(tokens) + 1):
            if ends(tokens[:count]):
                return " ".join(detokenize(tokens[:count]).split()), count
        return text.text, len(tokens)

    return choose


if __name__ == "__main__":
    typer.run(main)
