"""Effectiveness by ir_measures, with intervals that say how little a few dozen queries prove."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from qe_edge.errors import BadArgument
from qe_edge.retrieval.trec import Qrels, Run

RESAMPLES = 10_000
BATCH = 500  # resamples in memory at a time


class Interval(msgspec.Struct, frozen=True):
    """A mean and its 95 % percentile bootstrap interval over the queries."""

    mean: float
    low: float
    high: float


def parse_measure(measure: str) -> Any:
    """A measure of ir_measures by its name.

    Raises:
        BadArgument: it knows none of that name.
    """
    import ir_measures

    try:
        return ir_measures.parse_measure(measure)
    except (NameError, ValueError, SyntaxError):
        raise BadArgument(f"no measure {measure!r}; write it as ir_measures does, such as nDCG@10") from None


def check_measure(measure: str) -> str:
    """The measure's own spelling, once it is known that it can be computed of a ranking and graded judgments.

    Raises:
        BadArgument: it can't: some need another kind of judgments, or software that isn't there.
    """
    name = str(parse_measure(measure))
    try:
        evaluate({"q": {"a": 1}}, {"q": [("a", 1.0)]}, [name])
    except Exception as error:  # each of ir_measures' providers fails in its own way
        raise BadArgument(f"{measure} can't be computed here: {error}") from None
    return name


def depth(measures: Iterable[str]) -> int:
    """How many results the measures look at; those without a cutoff are given 1000."""
    return max(parse_measure(measure).params.get("cutoff", 1000) for measure in measures)


def evaluate(qrels: Qrels, run: Run, measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """measure -> its value for every judged query; a query that the run lacks counts 0.

    Same values as trec_eval on the written run file: linear gain, no cut of unjudged documents.
    """
    import ir_measures

    parsed = {measure: parse_measure(measure) for measure in measures}
    # By rank: trec_eval would order equal scores by document id, and holds scores in float32.
    scored = {
        query_id: {doc_id: -float(rank) for rank, (doc_id, _) in enumerate(ranking)}
        for query_id, ranking in run.items()
        if query_id in qrels
    }
    values = {measure: dict.fromkeys(qrels, 0.0) for measure in parsed.values()}
    for metric in ir_measures.iter_calc(list(values), qrels, scored):
        values[metric.measure][metric.query_id] = metric.value
    return {name: values[measure] for name, measure in parsed.items()}


def per_query(qrels: Qrels, run: Run, measure: str = "nDCG@10") -> dict[str, float]:
    """One measure's value for every judged query; see `evaluate`."""
    return evaluate(qrels, run, [measure])[measure]


def mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values()))) if values else 0.0


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean with its bootstrap interval. Of paired differences, this is the paired bootstrap."""
    return _bootstrap([np.asarray(values)], lambda x: x.mean(axis=-1), seed)


def randomization_test(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired differences: the share of random signs with one as far from 0.

    The paired randomization test that Smucker et al. (CIKM 2007) recommend for retrieval.
    """
    from scipy.stats import permutation_test

    if len(differences) < 2 or not np.any(differences):
        return 1.0
    return float(
        permutation_test(
            (np.asarray(differences),),
            lambda x, axis: x.mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=BATCH,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several comparisons, corrected by Holm's step-down procedure (1979)."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = least
    return corrected


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0
) -> Interval | None:
    """mean(numerator) / mean(denominator), queries resampled together; None where it means nothing.

    With a denominator that is near zero in some resamples (a teacher that hardly beats BM25), the
    ratio has no useful interval.
    """
    if mean_interval(denominator, seed=seed).low <= 0:
        return None
    samples = [np.asarray(numerator, float), np.asarray(denominator, float)]

    # A resample may still have drawn nothing but zeros: its ratio counts as infinite, also where it is 0 / 0.
    def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        of_means = x.mean(axis=-1) / y.mean(axis=-1)
        return np.where(np.isnan(of_means), np.inf, of_means)

    with np.errstate(divide="ignore", invalid="ignore"):
        found = _bootstrap(samples, ratio, seed)
    return found if np.isfinite([found.low, found.high]).all() else None


def _bootstrap(samples, statistic, seed: int) -> Interval:  # type: ignore[no-untyped-def]
    from scipy.stats import bootstrap

    value = float(statistic(*samples))
    if len(samples[0]) < 2 or all(np.ptp(sample) == 0 for sample in samples):
        return Interval(value, value, value)
    result = bootstrap(
        samples,
        lambda *x, axis: statistic(*x),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(value, float(low), float(high))
