"""What clients send and get: the bodies of requests and of replies."""

# No postponed annotations: pydantic reads them where they stand.

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Discriminator, Field, StringConstraints, Tag

from qe_edge.arguments import LONGEST_MS
from qe_edge.errors import BadInput
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.student.feedback import MOST_PASSAGES
from qe_edge.student.prompt import clean_query

QUERY_CHARACTERS = 1000
PASSAGE_CHARACTERS = 2000  # of which the first 1,024 count
QUERIES = 64  # in one request
BODY_BYTES = 12 * QUERIES * QUERY_CHARACTERS + 1024  # as \uXXXX, two for a rare character


def _is_query(text: str) -> str:
    try:
        clean_query(text)
    except BadInput as error:
        raise ValueError(str(error)) from None
    return text


QueryText = Annotated[str, StringConstraints(max_length=QUERY_CHARACTERS), AfterValidator(_is_query)]
# With a discriminator, an error names one of the two kinds and not a validator of ours.
QueryTexts = Annotated[
    Annotated[QueryText, Tag("one")]
    | Annotated[list[QueryText], Field(min_length=1, max_length=QUERIES), Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
]
Deadline = Annotated[
    float | None,
    Field(
        ge=0,
        le=LONGEST_MS,
        allow_inf_nan=False,
        description="Milliseconds; never more than the server's own.",
    ),
]


Fields = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=200)]], Field(max_length=20)
]
Passage = Annotated[str, StringConstraints(max_length=PASSAGE_CHARACTERS)]


class StreamRequest(BaseModel, extra="forbid"):
    """The parameters of `/expand/stream`."""

    query: QueryText
    deadline_ms: Deadline = None


class ExpandRequest(BaseModel, extra="forbid", strict=True):
    """One query, or several; `fields`, such as `title^2`, are those of an Elasticsearch index."""

    query: QueryTexts
    fields: Fields = []
    deadline_ms: Deadline = None


class FeedbackRequest(BaseModel, extra="forbid", strict=True):
    """A query and the passages that your own index found for it, best first.

    With a `text` that `/expand` wrote for it, they are what the expanded query found, and both expand it.
    """

    query: QueryText
    passages: Annotated[list[Passage], Field(max_length=MOST_PASSAGES)]
    text: Passage = ""
    fields: Fields = []
    deadline_ms: Deadline = None


class Queries(BaseModel):
    """The expanded query as search engines take it; see the methods `to_…` of `ExpandedQuery`.

    Elasticsearch's wants the request's `fields`.
    """

    fts5: str
    tantivy: str
    lucene: str
    elasticsearch: dict[str, Any] | None
    text: str


class Expanded(BaseModel):
    """A query and its expansion; `fallback` says why `text` is empty and the query is searched as it is.

    `rejected` is what was written then. `passages` were read; `summary` is the text, or else their heaviest
    words.
    """

    query: str
    text: str
    summary: str
    rejected: str
    passages: int
    words: dict[str, float]
    terms: dict[str, float]
    queries: Queries
    tokens: int
    finish_reason: str
    fallback: str
    cached: bool
    prefill_ms: float
    decode_ms: float

    @classmethod
    def of(cls, expanded: ExpandedQuery, fields: Sequence[str] = ()) -> Self:
        return cls(
            query=expanded.query,
            text=expanded.text,
            summary=expanded.summary(),
            rejected=expanded.rejected,
            passages=len(expanded.relevance.passages) if expanded.relevance else 0,
            words=expanded.words(),
            terms=expanded.terms(),
            queries=Queries(
                fts5=expanded.to_fts5(),
                tantivy=expanded.to_tantivy(),
                lucene=expanded.to_lucene(),
                elasticsearch=expanded.to_elasticsearch(*fields) if fields else None,
                text=expanded.to_text(),
            ),
            tokens=expanded.tokens,
            finish_reason=expanded.finish_reason,
            fallback=expanded.fallback,
            cached=expanded.cached,
            prefill_ms=round(1000 * expanded.prefill_s, 2),
            decode_ms=round(1000 * expanded.decode_s, 2),
        )


class ExpandReply(BaseModel):
    expansions: list[Expanded]


class SearchRequest(BaseModel, extra="forbid", strict=True):
    """A query over a named index, as it is with `expand` false.

    With `feedback` it is expanded by what it finds as it is, instead of by what the student writes; with
    `refine` by both: a text, and what that finds. Either needs `expand`.
    """

    query: QueryText
    index: str = ""
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    expand: bool = True
    feedback: bool = False
    refine: bool = False
    deadline_ms: Deadline = None


class Result(BaseModel):
    rank: int
    doc_id: str
    score: float
    plain_rank: int | None
    text: str


class SearchReply(BaseModel):
    index: str
    expansion: Expanded | None
    hits: list[Result]


class Health(BaseModel):
    """`model` is what the student was made of, `file` its own name."""

    status: str
    version: str
    model: str
    file: str
    indexes: list[str]
    pending: int
