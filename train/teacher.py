"""Who writes the candidates: an OpenAI-compatible endpoint, or a local model on our own backends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Literal, Protocol

import msgspec

from qe_edge.errors import BadInput, NotFound, QeEdgeError, require
from qe_edge.prompt import encode

# No request of this kind will be answered: wrong key, no credit, no such model.
_HOPELESS = {401, 402, 404}
# The endpoint is busy or broken; the same request may be answered later.
_PASSING = {408, 409, 425, 429}
# finish_reason in the words of several servers: vLLM, DeepSeek, Mistral, Gemini.
_ENDED = ("stop", "STOP", "eos", "end_turn", "stop_sequence")
_BROKEN_OFF = ("abort", "error", "insufficient_system_resource")


class Request(msgspec.Struct, frozen=True):
    """Everything that decides an answer. `extra` goes into the request's body as it is."""

    model: str
    system: str
    user: str
    temperature: float
    seed: int
    max_tokens: int
    extra: dict[str, Any] = {}

    @property
    def most_tokens(self) -> int:
        """The token budget of the answer, under whatever name the endpoint takes it."""
        limits = [self.extra.get(name, 0) for name in ("max_tokens", "max_completion_tokens")]
        return max(self.max_tokens, *(limit for limit in limits if isinstance(limit, int)))


class Answer(msgspec.Struct, frozen=True):
    """What came back; token counts are None where the endpoint gave none."""

    text: str
    finish_reason: Literal["stop", "length", "content_filter"]
    prompt_tokens: int | None
    completion_tokens: int | None


class Unanswered(Exception):
    """No usable answer this time. `throttled` says that the endpoint asked for fewer requests."""

    def __init__(self, why: str, *, throttled: bool = False, retry_after: float | None = None):
        super().__init__(why)
        self.throttled, self.retry_after = throttled, retry_after


class Unanswerable(Exception):
    """The endpoint refuses this very request (too long, filtered); asking again would change nothing."""


class Teacher(Protocol):
    """Answers requests. Raises Unanswered, Unanswerable, or a QeEdgeError when no request can succeed."""

    async def ask(self, request: Request) -> Answer: ...

    async def close(self) -> None: ...


class EndpointTeacher:
    """An OpenAI-compatible endpoint. Retrying is the caller's: it knows of all requests, not of one."""

    def __init__(self, url: str, *, api_key: str, timeout: float):
        openai = require("openai", "teach")
        self._url, self._timeout = url, timeout
        self._client = openai.AsyncOpenAI(base_url=url, api_key=api_key, max_retries=0, timeout=timeout)

    async def ask(self, request: Request) -> Answer:
        import openai

        body = {
            "temperature": request.temperature,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            **request.extra,
        }
        messages = [
            {"role": "system", "content": request.system},
            {"role": "user", "content": request.user},
        ]
        try:
            # The client's own time limit is for each read; an answer that trickles in would escape it.
            async with asyncio.timeout(self._timeout):
                completion = await self._client.chat.completions.create(
                    model=request.model,
                    messages=messages,
                    # null takes a field out, such as max_tokens where a model wants another name for it
                    extra_body={name: value for name, value in body.items() if value is not None},
                )
        except (TimeoutError, openai.APITimeoutError):
            raise Unanswered(f"no answer within {self._timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._refusal(error, request.model) from None
        except openai.APIConnectionError as error:
            raise Unanswered(f"connection failed: {error.__cause__ or error}") from None
        except (openai.OpenAIError, ValueError) as error:  # not JSON, or not in UTF-8
            raise Unanswered(f"not a valid answer: {error}") from None
        return _answer(completion)

    def _refusal(self, error: Any, model: str) -> Exception:
        """What an HTTP status means for us."""
        status, said = error.status_code, _message(error)
        if status in _HOPELESS or error.code == "insufficient_quota":
            kind = NotFound if status == 404 else QeEdgeError
            return kind(f"{self._url} answers {status} for the model {model!r}: {said}")
        if status in _PASSING or status >= 500:
            wait = _seconds(error.response.headers.get("retry-after"))
            return Unanswered(f"{status}: {said}", throttled=status == 429, retry_after=wait)
        return Unanswerable(f"{status}: {said}")

    async def close(self) -> None:
        await self._client.close()


def _answer(completion: Any) -> Answer:
    """The first choice of a chat completion; the client doesn't check what the server sent.

    Raises:
        Unanswered: the body was JSON, but no chat completion with text in it, or the server broke it off.
    """
    try:
        choice = completion.choices[0]
        text = choice.message.content
        refused = getattr(choice.message, "refusal", None)
        reason = choice.finish_reason or "stop"
    except (AttributeError, TypeError, IndexError):
        raise Unanswered("the answer holds no choice") from None
    if not isinstance(text, str | None):
        raise Unanswered("the answer's content is not text")
    if reason in _BROKEN_OFF:
        raise Unanswered(f"the endpoint broke the answer off ({reason})")
    finish: Literal["stop", "length", "content_filter"] = "length"  # also other words for no proper end
    if refused or reason == "content_filter":
        finish = "content_filter"
    elif reason in _ENDED:
        finish = "stop"
    usage = getattr(completion, "usage", None)
    return Answer(
        text=(text or "").encode("utf-8", "replace").decode(),  # JSON may hold half a surrogate pair
        finish_reason=finish,
        prompt_tokens=_count(getattr(usage, "prompt_tokens", None)),
        completion_tokens=_count(getattr(usage, "completion_tokens", None)),
    )


def _count(value: Any) -> int | None:
    """A number of tokens, however the server wrote it; None if it isn't one."""
    try:
        return int(value) if int(value) == float(value) and int(value) >= 0 else None
    except (TypeError, ValueError, OverflowError):
        return None


def _message(error: Any) -> str:
    body = error.body
    said = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(said or error.message).split())[:300]


def _seconds(header: str | None) -> float | None:
    """Retry-After, which is a number of seconds or a date (RFC 9110)."""
    import time
    from email.utils import parsedate_to_datetime

    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


class LocalTeacher:
    """A model on this machine, through the same backends that run students.

    One request at a time and without a time limit: the token budget ends it.
    """

    def __init__(self, model: str, *, max_tokens: int):
        from qe_edge.expander import Expander

        self._expander = Expander.load(model, budget_tokens=max_tokens)
        self._in_use = threading.Lock()

    async def ask(self, request: Request) -> Answer:
        return await asyncio.to_thread(self._ask, request)

    def _ask(self, request: Request) -> Answer:
        expander = self._expander
        pieces = expander.spec.prompt.chat(request.system, request.user)
        prompt = encode(pieces, expander.backend.tokenize)
        try:
            with self._in_use:
                # Every candidate of a query asks the same: only the last token is computed again.
                written = expander.complete(
                    prompt, prefix=len(prompt) - 1, temperature=request.temperature, seed=request.seed
                )
        except BadInput as error:
            raise Unanswerable(str(error)) from None
        cut = len(written.token_ids) == expander.budget_tokens
        return Answer(written.text, "length" if cut else "stop", len(prompt), len(written.token_ids))

    async def close(self) -> None:
        # A second Ctrl-C ends the session, but not the thread that is still writing.
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._in_use:
            self._expander.close()
