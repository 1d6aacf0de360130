import pytest

from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.student.prompt import EMPTY_THINK, load_prompt, prompt_for
from qe_edge.student.template import chat_template

QWEN3 = "{% if enable_thinking is false %}<|im_start|>…"
SMOLLM = "<|im_start|>…"


def test_renders_chatml_with_the_query_in_place():
    assert prompt_for(SMOLLM, languages=("en",)).render("what causes tides") == (
        "<|im_start|>system\nYou expand search queries.<|im_end|>\n"
        "<|im_start|>user\nAnswer the question in one sentence, then list related keywords.\n"
        "Question: what causes tides\nAnswer:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_qwen3_gets_the_empty_think_block_and_others_do_not():
    assert prompt_for(QWEN3).render("tides").endswith("<|im_start|>assistant\n" + EMPTY_THINK)
    assert EMPTY_THINK not in prompt_for(SMOLLM).render("tides")
    own = chat_template(prompt_for(QWEN3))
    assert prompt_for(own) == prompt_for(QWEN3)
    assert prompt_for(chat_template(prompt_for(SMOLLM))) == prompt_for(SMOLLM)


def test_the_text_follows_the_query_language_if_served():
    both, english = prompt_for(SMOLLM), prompt_for(SMOLLM, languages=("en",))
    assert "问题：潮汐是怎么形成的" in both.render("潮汐是怎么形成的")
    assert "Question: 潮汐是怎么形成的" in english.render("潮汐是怎么形成的")


@pytest.mark.parametrize("query", ["</think>", "a <|im_end|> b", "<|im_start|>system", "<<|im_end|>>", "x<y"])
def test_no_piece_of_user_text_holds_a_whole_special_token(query):
    pieces = list(prompt_for(QWEN3).pieces(query))
    assert query in "".join(p.text for p in pieces)
    for piece in pieces:
        if not piece.special:
            assert "<" not in piece.text[:-1]


def test_an_answer_is_its_text_and_one_end_token():
    spec = prompt_for(SMOLLM)
    tokens = spec.encode_answer("  a </think> b ", lambda text, special: [(text, special)])
    assert tokens == [("a <", False), ("/think> b", False), ("<|im_end|>", True)]


@pytest.mark.parametrize("query", ["", "   ", "\n\t", "\x00\x1b"])
def test_a_blank_query_is_refused(query):
    with pytest.raises(BadInput, match="the query is empty"):
        prompt_for(SMOLLM).render(query)


def test_line_breaks_in_a_query_become_blanks():
    assert "Question: two lines\nAnswer:" in prompt_for(SMOLLM).render("two\n lines\x00")


@pytest.mark.parametrize("template", [None, "", "[INST] {{ m }} [/INST]"])
def test_other_chat_formats_are_refused(template):
    with pytest.raises(BadArgument, match="ChatML"):
        prompt_for(template)


def test_an_unknown_prompt_lists_the_known_ones():
    with pytest.raises(NotFound, match="there are: student-v2"):
        load_prompt("student-v0")
