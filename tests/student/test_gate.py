"""When a query is searched as it is."""

from __future__ import annotations

import pytest

from qe_edge.student.gate import OPEN, Gate


def test_what_needs_no_expansion() -> None:
    gate = Gate(max_words=5, clear_lead=0.5)
    assert gate.before("what causes the tides") == ""
    assert gate.before("what is it that causes the tides") == "the query has 7 words, over 5"
    assert gate.before("月球引力潮") == ""
    assert gate.before("月球的引力潮") == "the query has 6 words, over 5"
    assert gate.before("?! 🌊 --") == "the query has no words"
    assert gate.before("c++") == gate.before("42") == ""
    assert gate.before("tides", [10.0, 5.1]) == ""
    assert gate.before("tides", [10.0, 5.0]) == "the plain query's best result leads by 50%"
    assert gate.before("tides", [10.0]) == gate.before("tides", []) == ""
    assert gate.before("tides", [0.0, 0.0]) == ""
    assert gate.before("潮汐", languages=["en"]) == "the query is in zh, and the student writes en"
    assert gate.before("潮汐", languages=["en", "zh"]) == ""
    reason = "the query is neither in Latin nor in Chinese letters, and the student writes en and zh"
    for query in ("что вызывает приливы", "なぜ空は青いのですか", "하늘은 왜 파란가요", "لماذا السماء زرقاء"):
        assert gate.before(query, languages=["en", "zh"]) == reason
        assert OPEN.before(query, languages=["en"]) == ""


@pytest.mark.parametrize(
    ("query", "text", "reason"),
    [
        ("tides", "the moon pulls the sea", ""),
        ("tides", "", "the text is empty"),
        ("tides", "?! …", "the text is empty"),
        ("the Tides", "Tides, the tides.", "the text adds nothing to the query"),
        ("how do I stop a noisy pipe", "To stop", "the text adds nothing to the query"),
        ("tides", "moon " * 4, "the text repeats itself: 1 different words of 4"),
        ("tides", "moon " * 3, ""),
        ("tides", "潮汐是月球引力造成的", "the text is not in the query's language, en"),
        ("潮汐的成因", "the moon pulls the sea", "the text is not in the query's language, zh"),
        ("潮汐的成因", "月球的引力", ""),
        ("潮汐", "潮汐", "the text adds nothing to the query"),
        ("tides", "приливы и отливы", "the text is not in the query's language, en"),
        ("cafe\u0301 menu", "Ｃａｆé Me\u00adnu", "the text adds nothing to the query"),
    ],
)
def test_what_is_not_used(query: str, text: str, reason: str) -> None:
    assert Gate().after(query, text) == reason


def test_each_check_can_be_switched_off() -> None:
    assert OPEN.before("word " * 1000, [9.0, 1.0]) == OPEN.before("潮汐", languages=["en"]) == ""
    for query, text in (
        ("tides", ""),
        ("tides", "tides"),
        ("tides", "a a a a a a"),
        ("tides", "潮汐潮汐潮汐潮汐"),
    ):
        assert Gate().after(query, text)
        assert OPEN.after(query, text) == ""
    assert Gate(min_distinct=None).after("tides", "moon " * 9) == ""
    assert Gate(same_language=False).after("tides", "潮汐是月球引力") == ""
    assert Gate(min_new_words=None).after("tides", "tides") == ""
    assert Gate(max_words=None).before("word " * 1000) == ""
