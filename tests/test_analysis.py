import pytest

from qe_edge.analysis import detect_language, get_analyzer
from qe_edge.errors import BadArgument


@pytest.mark.parametrize(
    ("analyzer", "text", "expected"),
    [
        ("english", "The Tides are caused by the Moon's gravity", ["tide", "caus", "moon", "graviti"]),
        ("english", "a I x", []),
        ("cjk", "潮汐是怎么形成的", ["潮汐", "汐是", "是怎", "怎么", "么形", "形成", "成的"]),
        ("cjk", "用 iPhone15 拍月亮", ["用", "iphone15", "拍月", "月亮"]),
        ("cjk", "𠀀𠀁。カメラ", ["𠀀𠀁", "カメ", "メラ"]),
        ("cjk", "，。！", []),
    ],
)
def test_terms(analyzer, text, expected):
    assert get_analyzer(analyzer)(text) == expected


def test_jieba_cuts_words():
    pytest.importorskip("jieba")
    assert get_analyzer("jieba")("潮汐形成的原因，") == ["潮汐", "形成", "的", "原因"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("what causes tides", "en"),
        ("潮汐是怎么形成的", "zh"),
        ("iPhone 怎么截屏", "zh"),
        ("", "en"),
        ("2023", "en"),
    ],
)
def test_language(text, language):
    assert detect_language(text) == language


def test_an_unknown_analyzer_lists_the_known_ones():
    with pytest.raises(BadArgument, match="english, cjk, jieba"):
        get_analyzer("german")
