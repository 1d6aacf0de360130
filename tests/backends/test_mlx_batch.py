"""Several answers in one of mlx-lm's batches are those that are written alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import get_ident

import pytest

from qe_edge import Expander
from qe_edge.export.mlx import convert_mlx
from qe_edge.student.gate import OPEN
from qe_edge.student.spec import read_spec

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
QUERIES = ["what causes tides", "潮汐", "how does bread rise at home", "moon", "iron", "潮汐是怎么形成的"]
TOKENS = 8


@pytest.fixture(scope="module")
def folder(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mlx") / "student"
    return convert_mlx(tiny_qwen3, out, bits=None, spec=read_spec(tiny_qwen3))


@pytest.fixture
def expander(folder: Path) -> Iterator[Expander]:
    with Expander.load(folder, budget_tokens=TOKENS, gate=OPEN) as loaded:
        # In bfloat16, random weights have near ties that another batch rounds another way.
        model = loaded.backend._model  # type: ignore[attr-defined]
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
        yield loaded


@pytest.fixture
def shapes(expander: Expander, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """[sequences, tokens] of each call of the model."""
    found: list[tuple[int, ...]] = []
    kind = type(expander.backend._model)  # type: ignore[attr-defined]
    call = kind.__call__

    def counted(model, ids, **settings):  # type: ignore[no-untyped-def]
        found.append(ids.shape)
        return call(model, ids, **settings)

    monkeypatch.setattr(kind, "__call__", counted)
    return found


def test_together_as_alone(expander: Expander, shapes: list[tuple[int, ...]]) -> None:
    alone = [expander.expand(query).text for query in QUERIES]
    shapes.clear()
    assert [expanded.text for expanded in expander.expand_many(QUERIES, parallel=4)] == alone
    assert max(sequences for sequences, _ in shapes) == 4
    with ThreadPoolExecutor(6) as pool:
        assert [expanded.text for expanded in pool.map(expander.expand, QUERIES)] == alone


def test_a_warm_call_computes_the_querys_own_tokens_alone(
    expander: Expander, shapes: list[tuple[int, ...]]
) -> None:
    first = expander.expand("what causes tides")
    own = first.prompt_tokens - len(expander._writer.prefixes[0])
    assert 0 < own < first.prompt_tokens / 2

    def prompt_tokens() -> int:
        """Also the answer's first step, which reads the prompt's last token; then one a step."""
        return sum(tokens for _, tokens in shapes) - (TOKENS - 1)

    assert prompt_tokens() >= first.prompt_tokens
    shapes.clear()
    assert expander.expand("what causes tides").text == first.text
    assert own <= prompt_tokens() <= own + 1  # it is one token ahead
    shapes.clear()
    expander.forget()
    assert expander.expand("what causes tides").text == first.text
    assert prompt_tokens() >= first.prompt_tokens


def test_sampling_follows_its_seed(expander: Expander) -> None:
    one = expander.expand("tides", temperature=1.0, seed=1).text
    assert expander.expand("tides", temperature=1.0, seed=1).text == one
    assert expander.expand("tides", temperature=1.0, seed=2).text != one


def test_an_answer_that_is_given_up_leaves_its_place(expander: Expander) -> None:
    alone = expander.expand("moon").text
    many = expander.expand_many(QUERIES, parallel=2)
    next(many)
    many.close()  # type: ignore[attr-defined]
    assert expander.expand("tides", deadline_ms=0.01).tokens == 0
    assert expander.expand("moon").text == alone
    assert len(list(expander.expand_many(QUERIES, parallel=2))) == len(QUERIES)


def test_reading_and_writing_share_one_thread(expander: Expander, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal's command buffers belong to all threads, so that two of them at once crash."""
    model, threads = type(expander.backend._model), set()  # type: ignore[attr-defined]
    call = model.__call__

    def noted(self: object, *arguments: object, **settings: object) -> object:
        threads.add(get_ident())
        return call(self, *arguments, **settings)

    monkeypatch.setattr(model, "__call__", noted)
    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(expander.expand, query) for query in QUERIES[:2]]
        read = [pool.submit(expander.feedback, query, ["sea and moon"]) for query in QUERIES[:2]]
        assert all(answer.result().tokens for answer in written)
        assert all(answer.result().relevance for answer in read)
    assert len(threads) == 1
