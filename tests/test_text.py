import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qe_edge.errors import BadArgument
from qe_edge.student.join import Join
from qe_edge.text import begun, count_words, detect_language, fold, get_analyzer, whole_words, words_of


def test_what_is_shown_of_a_text_says_that_there_is_more():
    assert begun("the moon\n pulls\tthe sea", 22) == "the moon pulls the sea"
    assert begun("the moon pulls the sea", 9) == "the moon…"
    assert begun("月球引力", 2) == "月球…"


@pytest.mark.parametrize(
    ("analyzer", "text", "expected"),
    [
        ("english", "The Tides are caused by the Moon's gravity", ["tide", "caus", "moon", "graviti"]),
        ("english", "a I x", []),
        (
            "english",
            "GPT模型 explains 潮汐的成因，中",
            ["gpt", "模型", "explain", "潮汐", "汐的", "的成", "成因", "中"],
        ),
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
        ("naïve Ｂａｙｅｓ 𝐛𝐨𝐥𝐝", "en"),
        ("what is α in statistics", "en"),
        ("新世紀エヴァ是什么", "zh"),
        ("почему небо голубое", "other"),
        ("なぜ空は青いのですか", "other"),
        ("ﾅｾﾞ", "other"),
        ("하늘은 왜 파란가요", "other"),
        ("لماذا السماء زرقاء", "other"),
        ("ทำไมท้องฟ้าเป็นสีฟ้า", "other"),
        ("Ελλάδα", "other"),
    ],
)
def test_language(text, language):
    assert detect_language(text) == language


def test_an_unknown_analyzer_lists_the_known_ones():
    with pytest.raises(BadArgument, match="english, cjk, jieba"):
        get_analyzer("german")


ALIKE = [
    ("brûlée", unicodedata.normalize("NFD", "brûlée"), "brûlée"),
    ("AI", "ＡＩ", "ai"),
    ("カタカナ", "ｶﾀｶﾅ", "カタカナ"),
    ("ガ行", "ｶﾞ行", "ガ行"),
    ("한국어", unicodedata.normalize("NFD", "한국어"), "한국어"),
    ("finance", "\ufb01nance", "finance"),
    ("cooperation", "co\u00adoper\u00adation", "cooperation"),
    ("tides", "\ufefft\u200bi\u200dd\u2060es", "tides"),
    ("葛城", "葛\U000e0100城", "葛城"),
    ("豈不", "\uf900不", "豈不"),
]


@pytest.mark.parametrize(("one", "other", "folded"), ALIKE)
def test_what_is_written_alike_matches_in_every_analyzer(one, other, folded):
    assert fold(one) == fold(other) == folded
    for analyze in (words_of, count_words, get_analyzer("english"), get_analyzer("cjk")):
        assert analyze(f"x1 {one} y1") == analyze(f"x1 {other} y1")
    jieba = pytest.importorskip("jieba") and get_analyzer("jieba")
    assert jieba(one) == jieba(other)


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        ("A sourdough star", "A sourdough "),
        ("A sourdough ", "A sourdough "),
        ("It ends.", "It ends."),
        ("a well-kno", "a "),
        ("the moon’s", "the "),
        ("潮汐由月", "潮汐由月"),
        ("维生素D", "维生素"),
        ("half", ""),
    ],
)
def test_a_text_that_was_cut_loses_what_may_be_half_a_word(cut, whole):
    assert whole_words(cut) == whole


@pytest.mark.parametrize(("one", "other", "_"), ALIKE)
def test_what_is_written_alike_is_found_either_way(one, other, _):
    from qe_edge.retrieval.index import Index

    for indexed, asked in ((one, other), (other, one)):
        index = Index.build([("a", f"the {indexed} here"), ("b", "elsewhere")], analyzer="cjk")
        assert index.search_text(asked, join=Join())[0][0] == "a"


@given(st.text())
def test_folding_is_final_and_blind_to_normal_forms(text):
    folded = fold(text)
    assert fold(folded) == folded
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert fold(unicodedata.normalize(form, text)) == folded


def test_every_format_character_is_dropped():
    seen = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == "Cf" and fold(c)]
    assert seen == []
    assert fold("a\ufe0fb\u034fc") == "abc"
