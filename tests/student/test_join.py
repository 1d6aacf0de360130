import pytest

from qe_edge.errors import BadArgument
from qe_edge.student.join import Join

QUERY, EXPANSION = ["tide", "caus"], ["moon", "tide", "moon", "sun"]


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        ("repeat:5", {"tide": 6, "caus": 5, "moon": 2, "sun": 1}),
        ("mass:1", {"tide": 1.5, "caus": 1, "moon": 1, "sun": 0.5}),
        ("mass:2", {"tide": 2, "caus": 1, "moon": 2, "sun": 1}),
        ("adaptive:1", {"tide": 3, "caus": 2, "moon": 2, "sun": 1}),
        ("adaptive:5", {"tide": 2, "caus": 1, "moon": 2, "sun": 1}),
    ],
)
def test_weights(join, expected):
    assert Join.parse(join)(QUERY, EXPANSION) == pytest.approx(expected)


def test_mass_is_the_expansions_total_weight_relative_to_the_query():
    weights = Join("mass", 3)(["a", "b"], ["c"] * 7 + ["d"])
    assert weights["c"] + weights["d"] == pytest.approx(3 * 2)


@pytest.mark.parametrize("join", ["repeat:5", "mass:0.7", "adaptive:5"])
def test_without_an_expansion_it_is_the_plain_query(join):
    assert Join.parse(join)(["a", "b", "a"], []) == {"a": 2, "b": 1}


def test_a_query_without_terms_searches_the_expansion():
    assert Join("mass", 0.7)([], ["moon"]) == {"moon": 1}


def test_text_and_join_round_trip():
    assert str(Join.parse("mass:0.70")) == "mass:0.7"


@pytest.mark.parametrize("text", ["", "mass", "mass:", "mass:-1", "mass:0", "mass:nan", "mass:inf", "five:5"])
def test_an_unreadable_join_names_the_rules(text):
    with pytest.raises(BadArgument, match="repeat:N"):
        Join.parse(text)
