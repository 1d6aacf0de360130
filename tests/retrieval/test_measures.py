import warnings

import ir_measures
import numpy as np
import pytest

from qe_edge.errors import BadArgument
from qe_edge.retrieval.measures import (
    Interval,
    holm,
    mean,
    mean_interval,
    per_query,
    randomization_test,
    ratio_interval,
)
from qe_edge.retrieval.trec import write_run

QRELS = {"q1": {"a": 3, "b": 0, "c": 1}, "q2": {"a": 1}}


def test_ndcg_has_linear_gain_and_a_missing_query_counts_nothing():
    run = {"q1": [("b", 3.0), ("a", 2.0), ("c", 1.0)]}
    ideal = 3 + 1 / np.log2(3)
    assert per_query(QRELS, run) == pytest.approx({"q1": (3 / np.log2(3) + 1 / 2) / ideal, "q2": 0.0})


def test_other_measures_by_name():
    assert per_query(QRELS, {"q2": [("x", 2.0), ("a", 1.0)]}, "RR@10") == {"q1": 0.0, "q2": 0.5}
    with pytest.raises(BadArgument, match="no measure"):
        per_query(QRELS, {}, "nDCQ@10")


def test_mean():
    assert mean({"a": 1.0, "b": 0.0}) == 0.5
    assert mean({}) == 0.0


def test_the_interval_is_the_percentile_bootstrap_of_the_mean():
    values = np.random.default_rng(7).normal(0.1, 0.2, 50)
    resampled = np.random.default_rng(1).choice(values, (20_000, 50)).mean(axis=1)
    found = mean_interval(values)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.004)


def test_constant_and_single_values_have_no_width():
    assert mean_interval([0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    assert mean_interval([0.3]) == Interval(0.3, 0.3, 0.3)


def test_a_ratio_resamples_its_queries_together():
    teacher = [0.2, 0.4, 0.9, 0.6] * 10
    half = ratio_interval([value / 2 for value in teacher], teacher)
    assert half.mean == half.low == half.high == pytest.approx(0.5)


def test_a_ratio_to_nothing_has_no_interval():
    assert ratio_interval([0.1, 0.2], [0.1, -0.1]) is None


def test_a_ratio_bears_resamples_in_which_the_teacher_finds_nothing():
    few = [0.0] * 7 + [1.0] * 4  # seven in a thousand
    with warnings.catch_warnings(action="error"):
        assert ratio_interval(few, few) == Interval(1.0, 1.0, 1.0)
        quarter = ratio_interval([0.0] * 10 + [1.0], few)
        better = ratio_interval([1.0] * 11, few)  # infinite in those
    assert better.mean == 2.75 and better.high < 12
    assert (quarter.mean, quarter.low, quarter.high) == (0.25, 0.0, pytest.approx(1.0))


def test_a_randomization_test_counts_the_signs_that_reach_as_far():
    # Of the eight sign patterns of three equal differences, two have a mean as far from 0.
    assert randomization_test([0.1, 0.1, 0.1]) == pytest.approx(2 / 8)
    assert randomization_test([0.1, -0.1]) == 1.0
    assert randomization_test([0.0, 0.0, 0.0]) == 1.0
    assert randomization_test([0.2] * 30) < 0.001


def test_holm_steps_down():
    # The smallest times three, the next times two, the last once; never below one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_run_files_are_trecs(tmp_path):
    write_run(tmp_path / "x.trec", {"q1": [("d2", 1.5), ("d1", 1.25)]}, "bm25")
    assert (tmp_path / "x.trec").read_text() == "q1 Q0 d2 1 1.5 bm25\nq1 Q0 d1 2 1.25 bm25\n"


@pytest.mark.parametrize("score", [3.0, 300.0, 10.0000004])
def test_ties_in_a_run_file_keep_their_order_in_trec_eval(tmp_path, score):
    ranking = [("a", score), ("b", score), ("c", score - 1e-9)]
    write_run(tmp_path / "x.trec", {"q": ranking}, "x")
    loaded = list(ir_measures.read_trec_run(str(tmp_path / "x.trec")))
    for place, doc_id in enumerate("abc", 1):
        qrels = {"q": {doc_id: 1}}
        (found,) = ir_measures.iter_calc([ir_measures.RR], qrels, loaded)
        assert found.value == pytest.approx(1 / place)
        assert per_query(qrels, {"q": ranking}, "RR") == pytest.approx({"q": 1 / place})
