"""Passages: where a text is cut, what they are called, and that no word of it is lost."""

from hypothesis import given
from hypothesis import strategies as st

from qe_edge.documents.passages import Passage, split
from qe_edge.text import count_words


def cut(text: str, *, words: int = 10, markdown: bool = True) -> list[Passage]:
    lines = list(enumerate(text.split("\n"), 1))
    return list(split(lines, title="note", markdown=markdown, words=words))


def test_headings_and_paragraphs_are_where_a_text_is_cut():
    text = """\
# Bread
Dough rests twelve hours in the fridge, not three days.

It then rises in a warm place for one hour.
## Oven
Two hundred and forty degrees, with steam for ten minutes."""
    assert cut(text) == [
        Passage(1, "note › Bread", "Dough rests twelve hours in the fridge, not three days."),
        Passage(4, "note › Bread", "It then rises in a warm place for one hour."),
        Passage(5, "note › Bread › Oven", "Two hundred and forty degrees, with steam for ten minutes."),
    ]


def test_a_short_section_goes_on_into_the_next_one_with_its_heading():
    text = "# A\nOne two.\n# B\nThree four.\n# C\nFive six seven eight."
    assert cut(text, words=14) == [
        Passage(1, "note › A", "One two.\nB\nThree four.\nC\nFive six seven eight.")
    ]


def test_no_heading_stands_at_the_end_of_a_passage():
    text = "# A\nOne two three.\n## B\nFour five six seven eight nine ten eleven."
    first, second = cut(text)
    assert first == Passage(1, "note › A", "One two three.")
    assert second == Passage(3, "note › A › B", "Four five six seven eight nine ten eleven.")


def test_inside_a_paragraph_the_last_short_sentence_stands_in_both():
    text = "One two three four five six seven. Eight nine. Ten eleven twelve thirteen."
    assert [passage.text for passage in cut(text)] == [
        "One two three four five six seven. Eight nine.",
        "Eight nine. Ten eleven twelve thirteen.",
    ]


def test_what_is_left_at_the_end_goes_to_the_last_passage():
    text = "One two three four five six seven eight nine.\n\nTen."
    assert [passage.text for passage in cut(text, words=9)] == [text.replace("\n\n", "\n")]


def test_code_holds_no_headings_and_plain_text_neither():
    text = "# Setup\n```sh\n# install it\npip install x\n```"
    assert cut(text)[0].title == "note › Setup"
    assert cut("# no heading", markdown=False) == [Passage(1, "note", "# no heading")]


def test_chinese_is_cut_after_its_own_full_stops_without_blanks():
    text = "面团在冰箱里要醒十二个小时。三天以后就酸了。第二天取出来回温一小时再烤。"
    assert [passage.text for passage in cut(text, words=20)] == [
        "面团在冰箱里要醒十二个小时。三天以后就酸了。",
        "第二天取出来回温一小时再烤。",
    ]


def test_a_line_without_end_is_cut_between_words_and_a_word_without_end_anywhere():
    assert [passage.text for passage in cut("word " * 25, words=10)] == [
        "word " * 9 + "word",
        "word " * 9 + "word",
        "word " * 4 + "word",
    ]
    parts = cut("x" * 1000, words=10)
    assert max(len(part.text) for part in parts) <= 200 and "".join(part.text for part in parts) == "x" * 1000


@given(
    st.text(alphabet="ab。.!? \n#`你好-|", max_size=400),
    st.integers(3, 12),
    st.booleans(),
)
def test_no_character_is_lost_and_no_passage_too_long(text, words, markdown):
    passages = cut(text, words=words, markdown=markdown)
    found = "".join(passage.title.removeprefix("note") + passage.text for passage in passages)
    for character in "ab你好" if markdown else "ab。.!?#`你好-|":
        assert found.count(character) >= text.count(character)
    # Headings may be carried over, and what is left at the end is added.
    assert all(count_words(passage.text) <= 2 * words + 1 for passage in passages)
