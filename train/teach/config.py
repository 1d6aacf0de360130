"""The settings of `teach`, defined once: its flags are made of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from qe_edge.records import Amount, Count, Positive, Seed
from qe_edge.student.prompt import DEFAULT_TEACHER_PROMPT

DEFAULT_KEY = "OPENAI_API_KEY"
Rule = Literal["random", "bm25"]


class AskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a teacher is asked; none of this changes a candidate.

    Without an `endpoint` the model is a local one. The budgets count all of the model's answers in the output
    file, also from earlier runs, 0 being none; what an endpoint may charge for requests that timed out or
    broke off is not known and not counted.
    """

    endpoint: Annotated[
        str,
        Meta(
            description="An OpenAI-compatible URL, such as http://localhost:8080/v1.",
            extra={"env": "OPENAI_BASE_URL"},
        ),
    ] = ""
    api_key_env: Annotated[str, Meta(description="The environment variable that holds the key.")] = (
        DEFAULT_KEY
    )
    concurrency: Annotated[Count, Meta(description="The most requests at once; rate limits lower it.")] = 16
    timeout: Annotated[Positive, Meta(description="Seconds for one request.")] = 120.0
    patience: Annotated[Positive, Meta(description="Seconds in which a failed request is sent again.")] = (
        900.0
    )
    max_tokens_total: Annotated[
        int, Meta(ge=0, lt=10**15, description="Stop before so many tokens are used.")
    ] = 0
    max_cost: Annotated[Amount, Meta(description="Stop before so much is spent; needs the prices.")] = 0.0
    price_in: Annotated[Amount, Meta(description="Price of a million prompt tokens.")] = 0.0
    price_out: Annotated[Amount, Meta(description="Price of a million answer tokens.")] = 0.0
    keep_bad: Annotated[bool, Meta(description="Keep the text of unusable answers, marked, to look at.")] = (
        False
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):  # not shown: it may be the key itself
            raise ValueError("api-key-env is the name of an environment variable, not the key itself")
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError(
                "a limit of cost needs the prices: give price-in and price-out per million tokens"
            )


class TeachConfig(AskConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is asked for; a change of any of this makes new candidates.

    Of each query `n` candidates per mode, with the seeds `seed`, `seed + 1`, … `extra` takes a field out of
    the request where it is null.
    """

    model: Annotated[
        str,
        Meta(description="The endpoint's model, or a local one as everywhere else.", extra={"short": "-m"}),
    ]
    modes: Annotated[
        tuple[Literal["zero-shot", "few-shot"], ...],
        Meta(min_length=1),
        Meta(description="zero-shot, few-shot, or both: zero-shot,few-shot.", extra={"flag": "--mode"}),
    ] = ("zero-shot", "few-shot")
    n: Annotated[Count, Meta(description="Candidates of each query in each mode.")] = 1
    temperature: Annotated[float, Meta(ge=0, le=10, description="0 is greedy.")] = 1.0
    seed: Annotated[Seed, Meta(description="Of the first sample; the others count on from it.")] = 0
    max_tokens: Annotated[Count, Meta(description="Token budget of one answer.")] = 256
    prompt: Annotated[str, Meta(description="A shipped prompt's id, or a TOML file.")] = (
        DEFAULT_TEACHER_PROMPT
    )
    exemplars: Annotated[
        str,
        Meta(description="Training split to draw few-shot exemplars from (default: the data set's own)."),
    ] = ""
    exemplar_rule: Annotated[Rule, Meta(description="random, or bm25 for the nearest queries.")] = "random"
    shots: Annotated[Count, Meta(description="Exemplars in a few-shot prompt.")] = 4
    extra: Annotated[
        dict[str, Any],
        Meta(description='More fields of the request as JSON, e.g. {"top_p": 0.9}; null takes one out.'),
    ] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if "n" in self.extra:
            raise ValueError("extra must not hold `n`: ask for several candidates with --n")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all n candidates would be the same; raise it or take n = 1")
