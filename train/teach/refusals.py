"""What an endpoint's refusal means: for this request, for this moment, or for all that would follow.

Only what names the request itself marks a candidate as refused for good: a wrong mark is never asked again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from qe_edge.errors import NotFound, QeEdgeError

# The key, the account, the model or the path is wrong.
_HOPELESS = {401, 402, 403, 404, 405}
# The endpoint is busy or broken; the same request may be answered later.
_PASSING = {408, 409, 425, 429}
# Servers agree on no codes, so their words decide: those of OpenAI, Azure, OpenRouter, DeepSeek, DashScope,
# Zhipu, Gemini, Mistral, vLLM and llama.cpp are covered.
_OF_THE_REQUEST = re.compile(
    r"""content.?filter | content.{0,12}polic | usage.polic | responsible.?ai | safety | moderation
      | inappropriate | data.?inspection | content.exists.risk | 敏感 | 不安全 | 违规
      | \b(prompt|input|request|message|content|text)s?\b.{0,40}\b(flagged|filtered)
      | context.?(length|window|size) | maximum.(context|number.of.tokens) | (prompt|input).{0,20}too.long
      | too.many.(input.)?tokens | reduce.the.length | token.count.{0,20}exceeds | 长度""",
    re.VERBOSE | re.IGNORECASE,
)
_OF_THE_ACCOUNT = re.compile(
    r"""api.?key | credential | unauthori[sz]ed | permission | forbidden | billing | quota | credit | balance
      | payment | expired | subscription | \baccount | organi[sz]ation | 余额 | 欠费 | 密钥 | 配额""",
    re.VERBOSE | re.IGNORECASE,
)
_OF_THE_SETTINGS = re.compile(
    r"""parameter | argument | \bfields?\b | not.support | unsupported
      | unknown.{0,3}(name|field|key|arg|model|option) | unrecogni[sz]ed
      | not.(permitted|allowed) | forbidden | \bmust.(be|have|not) | (invalid|bad).{0,20}value
      | max_(completion_)?tokens | \bmodel\b.{0,60}\b(not.(found|exist)|exist) | no.such.model""",
    re.VERBOSE | re.IGNORECASE,
)
_PER_DAY = re.compile(r"per.?(day|week|month)|daily|weekly|monthly|\b[RT]PD\b|每[日天周月]", re.IGNORECASE)
_SOON = re.compile(r"per.?(min|sec)|\b[RT]PM\b|(try.again|retry).{0,12}\bin\b|retry.?after", re.IGNORECASE)


class Unanswered(Exception):
    """No usable answer this time: the endpoint asked for fewer requests (`throttled`), or was too `late`."""

    def __init__(
        self, why: str, *, throttled: bool = False, late: bool = False, retry_after: float | None = None
    ):
        super().__init__(why)
        self.throttled, self.late, self.retry_after = throttled, late, retry_after


class Unanswerable(Exception):
    """The endpoint refuses this very request (too long, filtered); asking again would change nothing."""


class Refused(Exception):
    """The endpoint refuses a request, in words that we don't know: others may be answered all the same."""


def what_it_means(
    status: int,
    said: Any,
    headers: Mapping[str, str],
    *,
    where: tuple[str, str],
    hide: Callable[[object], str],
) -> Exception:
    """The exception that an HTTP status and an error object stand for.

    An error object may also come with status 200; then its own code counts as the status. `where` is the
    endpoint's address and the model, and `hide` takes secrets out of the server's words.

    Returns:
        Unanswerable: it names this request.
        QeEdgeError: no request can succeed: the account, the key, the settings or the daily limit.
        Unanswered: it may succeed later.
        Refused: it won't, for a reason that isn't known.
    """
    words = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    words, shown = words[:4000], hide(" ".join(_message(said).split())[:300])
    if status == 200:
        known = any(kind.search(words) for kind in (_OF_THE_REQUEST, _OF_THE_ACCOUNT, _OF_THE_SETTINGS))
        status = _code(said) or (400 if known else 502)
    stop = f"{where[0]} answers {status} for the model {where[1]!r}: {shown}"
    if status == 404 and not where[0].rstrip("/").endswith("/v1"):
        stop += " (the address of most servers ends in /v1)"
    if status < 500 and status not in _PASSING and _OF_THE_REQUEST.search(words):
        return Unanswerable(f"{status}: {shown}")
    if status == 429 and _is_spent(words, headers):
        return QeEdgeError(stop)
    if status in _PASSING or status >= 500:
        wait = _seconds(headers.get("retry-after"))
        return Unanswered(f"{status}: {shown}", throttled=status == 429, retry_after=wait)
    if status in _HOPELESS or _OF_THE_ACCOUNT.search(words) or _OF_THE_SETTINGS.search(words):
        return (NotFound if status == 404 else QeEdgeError)(stop)
    return Refused(f"{status}: {shown}")


def _is_spent(words: str, headers: Mapping[str, str]) -> bool:
    """Whether "too many requests" means a day or an account, and not the next minute."""
    if "insufficient_quota" in words or _PER_DAY.search(words):
        return True
    # Services name quota and billing also where they ask to wait for a few seconds.
    return bool(_OF_THE_ACCOUNT.search(words)) and not (_SOON.search(words) or "retry-after" in headers)


def _code(said: Any) -> int | None:
    """An error object's code, where it is an HTTP status."""
    code = said.get("code", said.get("status")) if isinstance(said, dict) else None
    found = re.fullmatch(r"([45]\d\d)(\.0)?", str(code))  # a number may have been read as a float
    return int(found[1]) if found else None


def _message(said: Any) -> str:
    """The server's own words."""
    if isinstance(said, dict):
        inner = said.get("message") or said.get("detail") or said.get("error")
        return _message(inner) if inner else json.dumps(said, ensure_ascii=False)
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)


def _seconds(header: str | None) -> float | None:
    """Retry-After, which is a number of seconds or a date (RFC 9110)."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    # nan and inf are no waiting times
    return max(0.0, seconds) if seconds < 1e9 else None
