"""The settings of `teach`, defined once: its flags are made of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from qe_edge.records import Amount, Count, Mode, Positive, Seed, said
from qe_edge.student.prompt import DEFAULT_TEACHER_PROMPT

DEFAULT_KEY = "OPENAI_API_KEY"
Rule = Literal["random", "bm25"]


class AskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who is asked, and how; of this `model` and `extra` alone change an answer.

    Without an `endpoint` the model is a local one. The budgets count all of the model's answers in the output
    file, also from earlier runs, 0 being none; what an endpoint may charge for requests that timed out or
    broke off is not known and not counted. `extra` takes a field out of the request where it is null.
    """

    model: Annotated[
        str, said("The endpoint's model, or a local one: a .gguf, a folder, builtin:NAME.", short="-m")
    ]
    endpoint: Annotated[
        str, said("An OpenAI-compatible URL, such as http://localhost:8080/v1.", env="OPENAI_BASE_URL")
    ] = ""
    api_key_env: Annotated[str, said("The environment variable that holds the key.")] = DEFAULT_KEY
    concurrency: Annotated[Count, said("The most requests at once; rate limits lower it.")] = 16
    timeout: Annotated[Positive, said("Seconds for one request.")] = 120.0
    patience: Annotated[
        Positive, said("Seconds to try a failed request for (before any answer 15 at most).")
    ] = 900.0
    max_tokens_total: Annotated[int, said("Stop before so many tokens are used.", ge=0, lt=10**15)] = 0
    max_cost: Annotated[Amount, said("Stop before so much is spent; needs the prices.")] = 0.0
    price_in: Annotated[Amount, said("Price of a million prompt tokens.")] = 0.0
    price_out: Annotated[Amount, said("Price of a million answer tokens.")] = 0.0
    keep_bad: Annotated[bool, said("Also keep unusable answers, marked, to look at.")] = False
    extra: Annotated[
        dict[str, Any], said('More fields of the request as JSON, e.g. {"top_p": 0.9}; null removes one.')
    ] = {}

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):  # not shown: it may be the key itself
            raise ValueError("api-key-env is the name of an environment variable, not the key itself")
        if "n" in self.extra:
            raise ValueError("extra must not hold `n`: one request has one answer")
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError(
                "--max-cost needs the prices of a million tokens: give --price-in and --price-out"
            )


class TeachConfig(
    AskConfig,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"modes": "mode"},
):
    """What is asked for; a change of any of this makes new candidates.

    Of each query `n` candidates per mode, with the seeds `seed`, `seed + 1`, …
    """

    modes: Annotated[
        tuple[Mode, ...],
        Meta(min_length=1),
        said(
            "zero-shot, few-shot, or both with a comma between; student: a local student's own prompt.",
        ),
    ] = ("zero-shot", "few-shot")
    n: Annotated[Count, said("Candidates of each query in each mode.")] = 1
    temperature: Annotated[float, said("0 is greedy.", ge=0, le=10)] = 1.0
    seed: Annotated[Seed, said("Random seed; a query's later candidates count on from it.")] = 0
    max_tokens: Annotated[Count, said("Token budget of one answer.")] = 256
    prompt: Annotated[str, said("A shipped prompt's id, or a TOML file.")] = DEFAULT_TEACHER_PROMPT
    exemplars: Annotated[
        str, said("Training split to draw few-shot exemplars from (default: the data set's own).")
    ] = ""
    exemplar_rule: Annotated[Rule, said("random, or bm25 for the nearest queries.")] = "random"
    shots: Annotated[Count, said("Exemplars in a few-shot prompt.")] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if "student" in self.modes and self.endpoint:
            raise ValueError("a student's own prompt is known of local models alone; leave out the endpoint")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all n candidates would be the same; raise it or take n = 1")
