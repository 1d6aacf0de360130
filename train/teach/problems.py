"""Is a teacher's answer an expansion? What isn't never becomes training data unasked."""

from __future__ import annotations

import re

from qe_edge.records import Problem
from qe_edge.text import analyzer_for, detect_language, get_analyzer

# Only how an answer begins: "I'm sorry" and "as an AI" may well stand inside a passage.
_REFUSAL = re.compile(
    r"""\W*(
        (i['’]?m|i\ am)\ (very\ )?(sorry|unable|not\ able)
      | sorry,?\ (but\ )?i\b
      | (unfortunately,?\ )?i\ (can(no|['’])?t|can\ not|won['’]t|do\ not\ have|don['’]t\ have)
      | as\ an?\ (ai|artificial\ intelligence|language\ model)
      | (很?抱歉|对不起|不好意思|我(无法|不能|没有办法)|作为(一个|一名|一款)?\s*(ai|人工智能|语言模型))
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_THINK = re.compile(r"</?think(ing)?>", re.IGNORECASE)


def problem_of(query: str, text: str, finish_reason: str | None = None) -> Problem | None:
    """What is wrong with the text as an expansion of the query, or None.

    `finish_reason` is the endpoint's: `length` when the token budget cut the answer, `content_filter` when a
    filter took it, `unreadable` when no text could be found in it. An answer that adds no index term to its
    query's is a copy of it.
    """
    if finish_reason == "content_filter":
        return "refused"
    if finish_reason == "unreadable":
        return "unreadable"
    if _THINK.search(text):
        return "think block"
    if not text.strip():
        return "empty"
    if _REFUSAL.match(text):
        return "refused"
    lang = detect_language(query)
    if detect_language(text) != lang:
        return "wrong language"
    analyze = get_analyzer(analyzer_for(lang))
    if not set(analyze(text)) - set(analyze(query)):
        return "copy of the query"
    if finish_reason == "length":
        return "cut"
    return None
