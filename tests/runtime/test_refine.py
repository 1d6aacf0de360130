"""Write, search, read, search; read by the student or by an encoder."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_encoder import HIDDEN, save_tiny_encoder, vectors

from qe_edge import Encoder, ExpandedQuery, Expander, Passage
from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.student.gate import OPEN
from qe_edge.student.join import Join
from qe_edge.text import get_analyzer

pytest.importorskip("llama_cpp")
QUERY = "what causes tides"
MOON, SEA, BREAD = "The moon causes tides.", "The sea rises.", "Yeast, bread rises."


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    made = Encoder(save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny.gguf"))
    yield made
    made.close()


@pytest.fixture
def expander(gguf: Path, encoder: Encoder) -> Iterator[Expander]:
    with Expander.load(gguf, reader=encoder, gate=OPEN, budget_tokens=8) as loaded:
        yield loaded


class Searched(list[ExpandedQuery]):
    """A search that keeps what it was asked for; each further one finds a passage more."""

    def __call__(self, expanded: ExpandedQuery) -> list[str]:
        self.append(expanded)
        return [MOON, SEA, BREAD][: 1 + len(self)]


def test_vectors_are_those_of_transformers(encoder: Encoder) -> None:
    texts = [MOON, SEA, "", "the sea, " * 200, *[f"bread {i}" for i in range(40)]]
    found = encoder.vectors(texts)
    assert found.shape == (44, HIDDEN)
    assert (found * vectors(texts)).sum(1) == pytest.approx(np.ones(44), abs=1e-5)
    assert encoder.vectors([]).shape == (0, HIDDEN)


def test_a_passage_is_worth_its_cosine_with_query_and_text(encoder: Encoder) -> None:
    moon, sea, query, text = vectors([MOON, SEA, QUERY, "the moon"])
    passages = [Passage(MOON), Passage(SEA)]

    def cosines(text: str, passages: list[Passage]) -> list[float]:
        return [value for values in encoder.cosines(QUERY, text, passages) for value in values]

    assert cosines("", passages) == pytest.approx([moon @ query, sea @ query], abs=1e-3)
    both = (query + text) / np.linalg.norm(query + text)
    assert cosines("the moon", passages) == pytest.approx([moon @ both, sea @ both], abs=1e-3)
    # The app's own vectors, of any length, take the place of reading.
    given = [Passage("not read", 3 * moon), Passage(SEA), Passage("nor this", list(map(float, sea)))]
    assert cosines("", given) == pytest.approx([moon @ query, sea @ query, sea @ query], abs=1e-3)
    with pytest.raises(BadArgument, match=f"must be {HIDDEN} finite numbers"):
        cosines("", [Passage(MOON, [1.0])])
    with pytest.raises(BadArgument, match="finite"):
        cosines("", [Passage(MOON, [float("nan")] * HIDDEN)])


def test_prefixes_stand_before_every_text(encoder: Encoder) -> None:
    prefixed = Encoder(encoder.path, query_prefix="sea ", passage_prefix="bread ")
    (found,) = next(prefixed.cosines(QUERY, "", [Passage(MOON)]))
    query, passage = vectors([f"sea {QUERY}", f"bread {MOON}"])
    assert found == pytest.approx(query @ passage, abs=1e-3)
    prefixed.close()


def test_what_is_no_encoder_is_refused(gguf: Path, tmp_path: Path) -> None:
    for path in (gguf, save_tiny_encoder(tmp_path / "x.gguf", pooling=None)):
        with pytest.raises(BadInput, match="it is no encoder"):
            Encoder(path)
    with pytest.raises(NotFound, match="no such file"):
        Expander.load(gguf, reader=tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(BadInput):
        Encoder(tmp_path / "text.gguf")


def test_the_text_is_searched_then_what_was_read(expander: Expander, encoder: Encoder) -> None:
    search = Searched()
    refined = expander.refine(QUERY, search)
    written = expander.expand(QUERY)
    assert [asked.text for asked in search] == [written.text] * 2
    assert search[0].relevance is None
    assert search[1].relevance and search[1].relevance.passages == (MOON, SEA)
    assert refined.relevance and refined.relevance.passages == (MOON, SEA, BREAD)
    values = np.concatenate(list(encoder.cosines(QUERY, written.text, [*map(Passage, (MOON, SEA, BREAD))])))
    expected = np.exp(values / encoder.temperature)
    assert refined.relevance.weights == pytest.approx(expected / expected.sum(), rel=1e-3)
    assert (refined.text, refined.token_ids) == (written.text, written.token_ids)
    assert (refined.finish_reason, refined.fallback) == (written.finish_reason, "")


def test_query_text_and_passages_each_have_their_share(expander: Expander) -> None:
    refined = expander.refine(QUERY, Searched(), rounds=1)
    analyze = get_analyzer("english")
    query = analyze(QUERY)
    terms = refined.terms()
    assert refined.relevance and refined.relevance.join == Join("mass", 3)
    text_terms = analyze(refined.text)
    whole = len(query) * (1 + (0.7 if text_terms else 0) + 3)
    assert sum(terms.values()) == pytest.approx(whole)
    of_passages = refined.relevance.terms(analyze)
    sea = of_passages["sea"] / sum(of_passages.values()) * 3 * len(query)
    own = 0.7 * len(query) * text_terms.count("sea") / max(1, len(text_terms))
    assert terms["sea"] == pytest.approx(sea + own)
    assert set(refined.words()) >= {"causes", "tides", "sea", "moon"}


def test_nothing_is_read_twice(expander: Expander, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    reader: Any = expander._reader
    whole = type(reader).read

    def spy(self: Any, query: str, text: str, passages: list[Passage]) -> Any:
        read.extend(passage.text for passage in passages)
        return whole(self, query, text, passages)

    monkeypatch.setattr(type(reader), "read", spy)
    expander.refine(QUERY, lambda _: [MOON, SEA, MOON], rounds=3)
    assert read == [MOON, SEA]


def test_the_student_reads_where_there_is_no_encoder(gguf: Path) -> None:
    with Expander.load(gguf, gate=OPEN, budget_tokens=8) as expander:
        refined = expander.refine(QUERY, lambda _: [MOON, BREAD])
        alone = expander.feedback(QUERY, [MOON, BREAD])
        assert refined.relevance and alone.relevance and refined.text
        assert refined.relevance.weights == pytest.approx(alone.relevance.weights, rel=1e-3)
        with pytest.raises(BadArgument, match="a vector is for an encoder"):
            expander.feedback(QUERY, [Passage(MOON, [1.0])])


def test_feedback_is_read_by_the_encoder_too(expander: Expander, encoder: Encoder) -> None:
    found = expander.feedback(QUERY, [MOON, BREAD])
    values = np.concatenate(list(encoder.cosines(QUERY, "", [Passage(MOON), Passage(BREAD)])))
    expected = np.exp(values / encoder.temperature)
    assert found.relevance and found.text == ""
    assert found.relevance.weights == pytest.approx(expected / expected.sum(), rel=1e-3)
    # The app's vectors make a passage worth what they say.
    moon, bread = vectors([MOON, BREAD])
    swapped = expander.feedback(QUERY, [Passage(MOON, bread), Passage(BREAD, moon)])
    assert swapped.relevance
    assert swapped.relevance.weights == pytest.approx(found.relevance.weights[::-1], rel=1e-2)


def test_a_deadline_leaves_what_was_done_by_then(expander: Expander) -> None:
    def never(_: ExpandedQuery) -> list[str]:
        raise AssertionError("nothing is to be searched")

    nothing = expander.refine(QUERY, never, deadline_ms=0)
    assert (nothing.text, nothing.relevance, nothing.finish_reason) == ("", None, "deadline")

    def slow(expanded: ExpandedQuery) -> list[str]:
        time.sleep(1.2)
        return [MOON]

    written = expander.refine(QUERY, slow, deadline_ms=1000)
    assert (written.text, written.relevance) == (expander.expand(QUERY).text, None)
    searches = Searched()

    def second_is_slow(expanded: ExpandedQuery) -> list[str]:
        if searches:
            time.sleep(2)
        return searches(expanded)

    once = expander.refine(QUERY, second_is_slow, deadline_ms=1800)
    assert len(searches) == 2 and once.text
    assert once.relevance and once.relevance.passages == (MOON, SEA)


def test_what_the_gate_holds_back_is_not_searched(gguf: Path, encoder: Encoder) -> None:
    with Expander.load(gguf, reader=encoder, budget_tokens=8) as expander:
        held = expander.refine("что вызывает приливы", lambda _: pytest.fail("searched"))
        assert held.fallback and held.terms() == ExpandedQuery(held.query, "", Join()).terms()


def test_a_rejected_text_leaves_what_the_plain_query_finds(gguf: Path, encoder: Encoder) -> None:
    spec = read_gate(gguf)
    search = Searched()
    with Expander.load(
        gguf, reader=encoder, budget_tokens=8, gate=msgspec.structs.replace(spec, min_new_words=10_000)
    ) as expander:
        # Neither a text nor passages bring so many new words.
        plain = expander.refine(QUERY, search)
    assert [asked.text for asked in search] == [""]
    assert plain.relevance is None and plain.fallback


def read_gate(gguf: Path) -> Any:
    with Expander.load(gguf) as expander:
        return expander.gate


def test_an_encoder_reads_nothing_for_a_query_that_it_has_no_tokens_for(expander: Expander) -> None:
    search = Searched()
    refined = expander.refine("潮汐是怎么形成的", search)
    assert (refined.text, refined.relevance) == (search[0].text, None) and len(search) == 1
    alone = expander.feedback("潮汐是怎么形成的", [MOON])
    assert (alone.fallback, alone.relevance) == ("the reader doesn't know the query's letters", None)
    assert expander.feedback(QUERY, [MOON]).relevance


def test_a_search_without_results_leaves_the_text(expander: Expander) -> None:
    asked: list[ExpandedQuery] = []
    found = expander.refine(QUERY, lambda expanded: asked.append(expanded) or [])
    assert found == asked[0] and len(asked) == 1


def test_asyncio_gives_the_same(expander: Expander) -> None:
    search = Searched()

    async def found(expanded: ExpandedQuery) -> list[str]:
        await asyncio.sleep(0)
        return search(expanded)

    refined = asyncio.run(expander.arefine(QUERY, found))
    again = expander.refine(QUERY, Searched())
    assert refined.relevance and again.relevance
    assert refined.terms() == pytest.approx(again.terms(), rel=1e-3)

    async def hangs(_: ExpandedQuery) -> list[str]:
        await asyncio.sleep(60)
        return []

    late = asyncio.run(expander.arefine(QUERY, hangs, deadline_ms=1500))
    assert (late.text, late.relevance, late.finish_reason) == (refined.text, None, "deadline")

    async def fails(_: ExpandedQuery) -> list[str]:
        raise TimeoutError("the search engine's own")

    with pytest.raises(TimeoutError, match="own"):
        asyncio.run(expander.arefine(QUERY, fails, deadline_ms=60_000))


@pytest.mark.parametrize("rounds", [0, 11])
def test_rounds_out_of_bounds_are_refused(expander: Expander, rounds: int) -> None:
    with pytest.raises(BadArgument, match="rounds must be from 1 to 10"):
        expander.refine(QUERY, Searched(), rounds=rounds)


def test_the_searchs_own_error_is_the_callers(expander: Expander) -> None:
    def broken(_: ExpandedQuery) -> list[str]:
        raise ValueError("no such table")

    with pytest.raises(ValueError, match="no such table"):
        expander.refine(QUERY, broken)
    assert expander.refine(QUERY, Searched()).relevance
    with pytest.raises(TypeError, match="several texts"):
        expander.refine(QUERY, lambda _: "one text")


def test_what_is_written_already_is_not_written_again(expander: Expander) -> None:
    written = expander.stream(QUERY).expanded
    whole = expander.refine(QUERY, Searched())
    search = Searched()
    refined = expander.refine(QUERY, search, written=written)
    assert search[0] is written
    assert refined.words() == pytest.approx(whole.words(), rel=1e-3)
    assert refined.decode_s == written.decode_s

    async def asked(expanded: ExpandedQuery) -> list[str]:
        return [MOON, SEA]

    later = asyncio.run(expander.arefine(QUERY, asked, written=written))
    assert later.relevance and (later.text, later.decode_s) == (written.text, written.decode_s)
    with pytest.raises(BadArgument, match=r"is for 'what causes tides', not for 'bread'"):
        expander.refine("bread", Searched(), written=written)


def test_a_text_of_ones_own_is_refined_too(expander: Expander) -> None:
    own = ExpandedQuery(QUERY, "the moon", expander.spec.join)
    refined = expander.refine(QUERY, Searched(), written=own)
    assert refined.relevance and (refined.text, refined.finish_reason) == ("the moon", "stop")


def test_reading_takes_what_all_rounds_took(gguf: Path) -> None:
    with Expander.load(gguf, gate=OPEN, budget_tokens=8) as expander:  # reads itself
        written = expander.expand(QUERY)
        once, twice = (expander.refine(QUERY, Searched(), written=written, rounds=n) for n in (1, 2))
    assert written.prompt_tokens < once.prompt_tokens < twice.prompt_tokens


def test_an_app_with_fts5_needs_three_lines(expander: Expander) -> None:
    notes = sqlite3.connect(":memory:")
    notes.execute("CREATE VIRTUAL TABLE notes USING fts5(body, tokenize='porter')")
    notes.executemany("INSERT INTO notes VALUES (?)", [(MOON,), ("The moon moves the sea.",), (BREAD,)])
    sql = "SELECT body FROM notes WHERE notes MATCH ? ORDER BY rank LIMIT 10"
    search = lambda query: [body for (body,) in notes.execute(sql, [query.to_fts5()])]  # noqa: E731
    plain = search(ExpandedQuery(QUERY, "", Join()))
    assert plain == [MOON]
    expanded = expander.refine(QUERY, search, deadline_ms=20_000)
    assert {MOON, "The moon moves the sea."} <= set(search(expanded))  # by the first one's words
    late = expander.refine(QUERY, search, deadline_ms=0.001)
    assert late.finish_reason == "deadline" and search(late) == plain
