"""Who writes the candidates: an OpenAI-compatible endpoint, or a local model on our own backends."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal, Protocol

import msgspec

from qe_edge.errors import BadInput, require
from qe_edge.redact import Secrets
from qe_edge.student.prompt import PromptSpec, encode
from qe_edge.train.teach.address import Address
from qe_edge.train.teach.refusals import Unanswerable, Unanswered, what_it_means

# finish_reason in the words of several servers: vLLM, DeepSeek, Mistral, Gemini.
_ENDED = ("stop", "STOP", "eos", "end_turn", "stop_sequence")
LISTING = 5.0  # seconds for a list of models
_TEXTS = ("text", "output_text")  # the types of parts that hold the answer


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
    """What came back; token counts are None where the endpoint gave none.

    `unreadable` is an answer that came and may have been paid for, but holds no text where one belongs.
    """

    text: str
    finish_reason: Literal["stop", "length", "content_filter", "unreadable"]
    prompt_tokens: int | None
    completion_tokens: int | None


class Teacher(Protocol):
    """Answers requests. Raises Unanswered, Unanswerable, or a QeEdgeError when no request can succeed."""

    async def models(self) -> list[str]:
        """The models that it lists; empty where it lists none."""
        ...

    async def ask(self, request: Request) -> Answer: ...

    async def close(self) -> None: ...


class EndpointTeacher:
    """An OpenAI-compatible endpoint. Retrying is the caller's: it knows of all requests, not of one.

    Raises:
        BadArgument: the address, the key or the proxy that the environment names can't be used.
    """

    def __init__(self, url: str, *, api_key: str, timeout: float):
        openai = require("openai", "teach")
        address = Address.parse(url)
        self._url, self._timeout = address.base, timeout
        self._secrets = Secrets(api_key, address.password, *address.query.values())
        self._client = openai.AsyncOpenAI(
            base_url=address.base,
            default_query=address.query,
            api_key=api_key,
            http_client=address.client(),
            max_retries=0,
            timeout=timeout,
        )

    async def models(self) -> list[str]:
        import openai

        try:
            async with asyncio.timeout(min(self._timeout, LISTING)):
                response = await self._client.models.with_raw_response.list()
            return [str(model["id"]) for model in json.loads(response.http_response.content)["data"]]
        except (TimeoutError, openai.OpenAIError, ValueError, KeyError, TypeError):
            return []  # few servers have to; whether one works is seen when it is asked

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
                response = await self._client.chat.completions.with_raw_response.create(
                    model=request.model,
                    messages=messages,
                    # null takes a field out, such as max_tokens where a model wants another name for it
                    extra_body={name: value for name, value in body.items() if value is not None},
                )
        except (TimeoutError, openai.APITimeoutError):
            raise Unanswered(f"no answer within {self._timeout:g} s (--timeout)", late=True) from None
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.body, error.response, request) from None
        except openai.APIConnectionError as error:
            why = self._secrets.hide(error.__cause__ or error)
            raise Unanswered(f"no connection to {self._url}: {why}; is the server running?") from None
        try:
            content = _decode(response.http_response.content)
        except ValueError as error:  # not JSON, or not in UTF-8
            raise Unanswered(f"not a valid answer: {error}") from None
        if isinstance(content, dict) and content.get("error") and not content.get("choices"):
            raise self._refusal(200, content["error"], response.http_response, request)
        return read_answer(content)

    def _refusal(self, status: int, said: Any, response: Any, request: Request) -> Exception:
        said = response.text if said is None else said
        where = self._url, request.model
        return what_it_means(status, said, response.headers, where=where, hide=self._secrets.hide)

    async def close(self) -> None:
        await self._client.close()


def read_answer(content: Any) -> Answer:
    """The first choice of a chat completion, from the JSON value of its body.

    Whatever the value is, it is an answer, which was counted and paid for: it is never asked for again.
    """
    usage = content.get("usage") if isinstance(content, dict) else None
    counts = usage if isinstance(usage, dict) else {}
    text, finish = _first_choice(content)
    return Answer(
        text=text.encode("utf-8", "replace").decode(),  # JSON may hold half a surrogate pair
        finish_reason=finish,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _first_choice(content: Any) -> tuple[str, Literal["stop", "length", "content_filter", "unreadable"]]:
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text = _text(message.get("content"))
        refused, reason = message.get("refusal"), choice.get("finish_reason") or "stop"
    except (AttributeError, TypeError, LookupError):
        return "", "unreadable"
    if refused or reason == "content_filter":
        return text or "", "content_filter"
    if text is None:
        return "", "unreadable"
    # Also other words for no proper end, such as that of a server that broke it off.
    return text, "stop" if reason in _ENDED else "length"


def _text(content: Any) -> str | None:
    """A message's text, which may come in parts: those that hold the model's thoughts are left out.

    None: it holds no text at all.
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [
        part if isinstance(part, str) else part["text"]
        for part in parts
        if isinstance(part, str)
        or (
            isinstance(part, dict)
            and part.get("type", "text") in _TEXTS
            and isinstance(part.get("text"), str)
        )
    ]
    return "".join(texts) if texts else None


def _decode(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        ValueError: it is no JSON, or not in UTF-8.
    """
    try:
        # The standard library's takes half a surrogate pair too; and floats are numbers of any length.
        return json.loads(body.decode("utf-8-sig"), parse_int=float)
    except RecursionError:  # nested too deeply for it, but an answer
        return None


def _count(value: Any) -> int | None:
    """A number of tokens, however the server wrote it; None if it isn't one."""
    try:
        return int(value) if int(value) == float(value) and 0 <= int(value) < 2**53 else None
    except (TypeError, ValueError, OverflowError):
        return None


class LocalTeacher:
    """A model on this machine, through the same backends that run students.

    Up to `parallel` requests are answered together, without a time limit: the token budget ends each.
    """

    def __init__(self, model: str, *, max_tokens: int, parallel: int):
        from qe_edge.runtime.expander import Expander

        self._expander = Expander.load(model, budget_tokens=max_tokens, parallel=parallel)
        self.parallel = min(parallel, self._expander.backend.parallel)

    @property
    def prompt(self) -> PromptSpec:
        """The model's own."""
        return self._expander.spec.prompt

    async def models(self) -> list[str]:
        return []

    async def ask(self, request: Request) -> Answer:
        return await asyncio.to_thread(self._ask, request)

    def _ask(self, request: Request) -> Answer:
        expander = self._expander
        pieces = expander.spec.prompt.chat(request.system, request.user)
        prompt = encode(pieces, expander.backend.tokenize)
        try:
            # Every candidate of a query asks the same: only the last token is computed again.
            written = expander.complete(
                prompt, prefix=len(prompt) - 1, temperature=request.temperature, seed=request.seed
            )
        except BadInput as error:
            raise Unanswerable(str(error)) from None
        cut = len(written.token_ids) == expander.budget_tokens
        return Answer(written.text, "length" if cut else "stop", len(prompt), len(written.token_ids))

    async def close(self) -> None:
        await asyncio.to_thread(self._expander.close)  # which waits for the step that is computed
