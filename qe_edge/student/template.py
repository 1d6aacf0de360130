"""The student's prompt as a chat template: one user message, the query, becomes `PromptSpec`'s token ids.

Chat programs know no prompt of ours, but all of them render the template that a file carries. This one is
written in what Jinja's implementations share (Python's, llama.cpp's, and JavaScript's @huggingface/jinja):
none but Python's goes through a string's characters, and llama.cpp's counts bytes. So it counts by taking
known characters out and looking at the length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from qe_edge.records import Lang
from qe_edge.student.prompt import PromptSpec, PromptText

# Of lower-case text, what is no Han character in queries as people type them. What is left counts as Han.
_LATIN = "abcdefghijklmnopqrstuvwxyzßàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿāăąćčďđēėęěğīįıłńňōőœřśşšťūůűźżžșț"
_LATIN += "".join(map(chr, range(0x1EA1, 0x1EFA, 2))) + "ơư" + "".join(map(chr, range(0xFF41, 0xFF5B)))
# Some engines' `lower` knows ASCII alone.
_UPPER = "".join(letter.upper() for letter in _LATIN[26:] if len(letter.upper()) == 1)
_KANA = "".join(map(chr, [*range(0x3041, 0x3097), *range(0x30A1, 0x30FB), 0x30FC]))
_CYRILLIC = "".join(map(chr, range(0x410, 0x450))) + "ёЁіІїЇєЄґҐ"
_GREEK = "".join(map(chr, range(0x391, 0x3CF))).replace("\u03a2", "")
_MARKS = (
    " !\"#$%&'()*+,-./0123456789:;<=>?@[\\]^_`{|}~"
    "¡¢¤¦§¨©ª«¬®¯²³´¶¸¹º»¼½¾¿÷←↑→↓↔⇒≤≥≠≈∞√™℃℉№⁰⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉•‐‑"
    "\u3000、。〃「」『』【】〈〉《》〔〕・·，．：；！？（）［］｛｝～—–‘’“”…￥€£°×±％＋－＝／０１２３４５６７８９"
)


def chat_template(prompt: PromptSpec, added: Iterable[str] = ()) -> str:
    """A Jinja template for `tokenizer.chat_template`.

    A conversation without a system message, or with an empty one, is the student's: its system text stands
    first, and each message of the user is a query in the student's words. Otherwise it is plain ChatML.

    Queries come on one line, as `clean_query` has them, but for Unicode's form NFC and characters that
    can't be seen. Their language is told as `detect_language` does, by Latin, Han, kana, Cyrillic and Greek.
    Of the vocabulary's `added` tokens in a query, each is broken by a blank: a chat program would take it
    for markup, where `PromptSpec` has it as text.
    """
    languages = prompt.languages
    broken = [
        f"{{%- for token in {_list(sorted(added))} -%}}",
        "{%- set ns.text = ns.text.replace(token, token[0] + ' ' + token[1:]) -%}{%- endfor -%}",
    ]
    lines = [
        "{%- set own = messages[0].role == 'system' and (messages[0].content or '') | length > 0 -%}",
        "{%- set ns = namespace(text='', left='', latin=0, letters=0, language='', begun=false) -%}",
        "{%- for message in messages -%}",
        "{%- if message.content is string -%}{%- set ns.text = message.content -%}",
        "{%- else -%}{%- set ns.text = '' -%}",
        "{%- for part in message.content or [] -%}{%- if part.text is string -%}",
        "{%- set ns.text = ns.text + part.text -%}{%- endif -%}{%- endfor -%}{%- endif -%}",
        "{%- if message.role == 'system' and not own -%}",  # an empty one, which some programs add
        "{%- elif own or message.role != 'user' -%}",
        "{%- if message.role == 'user' -%}",
        *broken,
        "{%- endif -%}",
        "{{- '<|im_start|>' + message.role + '\\n' + ns.text + '<|im_end|>\\n' -}}",
        "{%- else -%}",
        "{%- for blank in ['\\n', '\\r', '\\t', '\u3000', '\u00a0'] -%}",
        "{%- set ns.text = ns.text.replace(blank, ' ') -%}{%- endfor -%}",
        "{%- for i in range(8) -%}{%- set ns.text = ns.text.replace('  ', ' ') -%}{%- endfor -%}",
        "{%- set ns.text = ns.text.strip() -%}",
        *_language(languages),
        *broken,
        *_texts(prompt),
        "{%- endif -%}{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        f"{{{{- {_quoted('<|im_start|>assistant' + chr(10) + prompt.answer_prefix)} -}}}}",
        "{%- endif -%}",
    ]
    return "\n".join(lines)


def _language(languages: tuple[Lang, ...]) -> list[str]:
    """Sets `ns.language` by the rule of `detect_language`; a prompt in one language needs none."""
    if len(languages) == 1:
        return []
    lines = [
        "{%- set ns.left = ns.text | lower -%}",
        "{%- set ns.latin = 0 -%}",
        "{%- set ns.letters = 0 -%}",
    ]
    for characters, counters in (
        (_LATIN + _UPPER, ("latin", "letters")),
        (_KANA + _CYRILLIC + _GREEK, ("letters",)),
        (_MARKS, ()),
    ):
        lines += [
            f"{{%- for c in {_list(characters)} -%}}{{%- set rest = ns.left.replace(c, '') -%}}",
            "{%- set found = ((ns.left | length) - (rest | length)) / (c | length) -%}",
            *(f"{{%- set ns.{counter} = ns.{counter} + found -%}}" for counter in counters),
            "{%- set ns.left = rest -%}{%- endfor -%}",
        ]
    return [
        *lines,
        "{%- set han = (ns.left | length) / ('中' | length) -%}",
        "{%- set ns.letters = ns.letters + han -%}",
        "{%- if 2 * (han + ns.latin) < ns.letters -%}{%- set ns.language = 'other' -%}",
        "{%- elif han > 0 and 5 * han >= ns.letters -%}{%- set ns.language = 'zh' -%}",
        "{%- else -%}{%- set ns.language = 'en' -%}{%- endif -%}",
    ]


def _texts(prompt: PromptSpec) -> list[str]:
    first, *others = prompt.languages
    lines: list[str] = []
    for language in others:
        lines += [f"{{%- if ns.language == '{language}' -%}}", *_text(prompt.texts[language]), "{%- else -%}"]
    return [*lines, *_text(prompt.texts[first]), *["{%- endif -%}"] * len(others)]


def _text(text: PromptText) -> list[str]:
    before, after = text.user.split("{query}")
    opening = f"<|im_start|>system\n{text.system}<|im_end|>\n"
    start, end = f"<|im_start|>user\n{before}", f"{after}<|im_end|>\n"
    return [
        f"{{%- if not ns.begun -%}}{{{{- {_quoted(opening)} -}}}}{{%- endif -%}}",
        "{%- set ns.begun = true -%}",
        f"{{{{- {_quoted(start)} + ns.text + {_quoted(end)} -}}}}",
    ]


def _list(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(_quoted, texts))}]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
