"""Corpus feedback: what the student reads, how likely it holds the query, and what comes of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest
from engines import says, scripted

from qe_edge import Expander
from qe_edge.backends.open import open_backend
from qe_edge.backends.protocol import PROMPTS, READ, TOGETHER, groups
from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.student.feedback import MOST_PASSAGES, Feedback, RelevanceModel
from qe_edge.student.gate import OPEN, Gate
from qe_edge.student.join import Join
from qe_edge.student.models import resolve
from qe_edge.student.spec import read_spec
from qe_edge.text import get_analyzer, words_of

pytest.importorskip("llama_cpp")
QUERY = "what causes tides"
PASSAGES = [
    "The moon's gravity pulls the oceans, and so it causes tides.",
    "Bread rises since yeast turns sugar into gas.",
    "",
    "潮汐是由月球引力引起的。",
    "Tides follow the moon. " * 40,
]


@pytest.fixture(scope="module")
def gguf(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qe_edge.export.gguf import convert_gguf

    out = tmp_path_factory.mktemp("gguf") / "student-F32.gguf"
    spec = read_spec(tiny_qwen3)
    assert spec
    return convert_gguf(tiny_qwen3, out, dtype="f32", spec=msgspec.structs.replace(spec, gate=OPEN))


@pytest.fixture
def expander(gguf: Path) -> Iterator[Expander]:
    with Expander.load(gguf) as loaded:
        yield loaded


def log_likelihoods(model: Path, engine: Any = None) -> list[float]:
    backend = open_backend(resolve(model), engine=engine)
    spec = backend.spec
    prompts, answer, prefix = spec.feedback.encode(QUERY, PASSAGES, spec.prompt, backend.tokenize)
    reader = backend.reader()
    found = [value for values in reader.log_likelihoods(prompts, answer, prefix=prefix) for value in values]
    reader.forget()
    again = next(reader.log_likelihoods(prompts, answer, prefix=prefix))
    assert again == pytest.approx(found[: len(again)], abs=1e-3)
    reader.close()
    backend.close()
    return found


@pytest.fixture(scope="module")
def reference(tiny_qwen3: Path) -> list[float]:
    """One prompt at a time, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    backend = open_backend(resolve(tiny_qwen3), engine="transformers")
    spec = backend.spec
    prompts, answer, _ = spec.feedback.encode(QUERY, PASSAGES, spec.prompt, backend.tokenize)
    found = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        found.append(sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True)))
    return found


def test_transformers_gives_the_querys_likelihood(tiny_qwen3: Path, reference: list[float]) -> None:
    assert log_likelihoods(tiny_qwen3, "transformers") == pytest.approx(reference, abs=1e-3)


def test_llama_cpp_gives_the_same(gguf: Path, reference: list[float]) -> None:
    assert log_likelihoods(gguf) == pytest.approx(reference, abs=0.05)  # its cache is in f16


def test_mlx_gives_the_same(tiny_qwen3: Path, reference: list[float], tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    from qe_edge.export.mlx import convert_mlx

    folder = convert_mlx(tiny_qwen3, tmp_path / "student", bits=None, spec=read_spec(tiny_qwen3))
    assert log_likelihoods(folder, "mlx") == pytest.approx(reference, abs=0.5)  # bf16, sums of 40 nats


def test_prompts_are_read_in_their_order_a_few_at_a_time() -> None:
    prefix, answer = [7] * 9, [8]
    sizes = [TOGETHER - 1, 1, 1, READ - 1, *(2,) * (PROMPTS + 1)]  # with the answer one more
    prompts = [prefix + [number] * size for number, size in enumerate(sizes)]
    found = list(groups(prompts, answer, len(prefix)))
    assert [len(group) for group in found] == [1, 2, 1, PROMPTS, 1]
    assert [prompt for group in found for prompt in group] == [prompt + answer for prompt in prompts]
    assert list(groups([], answer, 0)) == []
    with pytest.raises(BadInput, match=f"take {READ + 1} tokens"):
        next(groups([[0], [0] * READ], answer, 0))


def test_the_prompt_is_the_passages_beginning_and_the_answer_the_query(expander: Expander) -> None:
    backend, prompt = expander.backend, expander.spec.prompt
    settings = Feedback(tokens=4)
    prompts, answer, prefix = settings.encode(
        "tides <|im_end|>", ["moon and sun and sea"], prompt, backend.tokenize
    )
    words = backend.tokenize("moon and sun and sea", False)
    text = settings.texts["en"]
    before, after = text.user.split("{passage}")
    opening, closing = (
        [t for piece in pieces for t in backend.tokenize(piece.text, piece.special)]
        for pieces in (prompt.opening(text.system, before), prompt.closing(after))
    )
    assert prompts == [opening + words[:4] + closing]
    assert prefix == len(opening)
    (end,) = backend.tokenize("<|im_end|>", True)
    assert end not in answer
    assert backend.detokenize(answer) == "tides <|im_end|>"


def test_a_chinese_query_gets_the_chinese_prompt(expander: Expander) -> None:
    prompts, *_ = Feedback().encode("潮汐", ["x"], expander.spec.prompt, expander.backend.tokenize)
    assert "段落：x" in expander.backend.detokenize(prompts[0])


def test_weights_are_likelihoods_softened_by_the_temperature_and_the_length_of_the_query() -> None:
    soft = Feedback(temperature=2)
    assert soft.weigh([-10, -14]) == pytest.approx((1 / (1 + math.e**-2), 1 / (1 + math.e**2)))
    assert Feedback().weigh([-4000.0]) == (1,)


def test_the_relevance_model_mixes_the_passages_terms() -> None:
    analyze = get_analyzer("english")
    model = RelevanceModel(("moon moon tide sea", "", "tide bread"), (0.5, 0.3, 0.2), most=3, join=Join())
    assert model.terms(analyze) == pytest.approx({"moon": 0.25, "tide": 0.225, "sea": 0.125})
    assert list(model.terms(analyze)) == ["moon", "tide", "sea"]


def test_feedback_gives_weighted_terms_and_writes_nothing(expander: Expander) -> None:
    expanded = expander.feedback(QUERY, PASSAGES)
    assert (expanded.text, expanded.tokens, expanded.fallback) == ("", 0, "")
    assert expanded.relevance
    assert expanded.relevance.passages == tuple(" ".join(p.split()) for p in PASSAGES if p)
    assert str(expanded) == expanded.summary()
    assert sum(expanded.relevance.weights) == pytest.approx(1)
    mass = expander.spec.feedback.join.value
    terms = expanded.terms()
    assert sum(terms.values()) == pytest.approx((1 + mass) * 3)  # the query's terms: what, caus, tide
    assert {"moon", "tide", "yeast"} <= set(terms)
    weights = expanded.relevance.weights
    heaviest = expanded.relevance.passages[weights.index(max(weights))]
    assert expanded.summary().split()[0] in words_of(heaviest)
    assert "tides" not in expanded.summary().split()
    assert '"moon"' in expanded.to_fts5()
    prompts, answer, prefix = expander.spec.feedback.encode(
        QUERY, expanded.relevance.passages, expander.spec.prompt, expander.backend.tokenize
    )
    assert expanded.prompt_tokens == prefix + sum(len(p) - prefix + len(answer) for p in prompts)


def test_only_the_first_passages_are_read(expander: Expander) -> None:
    expanded = expander.feedback(QUERY, [f"moon {i}" for i in range(30)])
    assert expanded.relevance
    assert len(expanded.relevance.passages) == Feedback().passages


def test_more_or_fewer_can_be_read(gguf: Path) -> None:
    passages = [f"moon {i}" for i in range(60)]
    for most in (1, 3, MOST_PASSAGES):
        with Expander.load(gguf, passages=most) as expander:
            expanded = expander.feedback(QUERY, passages)
        assert expanded.relevance
        assert len(expanded.relevance.passages) == most
    for wrong in (0, MOST_PASSAGES + 1):
        with pytest.raises(BadArgument, match=f"passages must be from 1 to 50, not {wrong}"):
            Expander.load(gguf, passages=wrong)


def test_without_passages_it_is_the_plain_query(expander: Expander) -> None:
    expanded = expander.feedback(QUERY, [])
    assert expanded.fallback == "there was no passage to read"
    assert expander.feedback(QUERY, ["", " \n"]).fallback == expanded.fallback
    among = expander.feedback(QUERY, ["", "the moon", " \n"])
    assert among.relevance == expander.feedback(QUERY, ["the moon"]).relevance
    assert expanded.terms() == {"what": 1, "caus": 1, "tide": 1}


def test_the_gate_holds_a_query_back(gguf: Path) -> None:
    from qe_edge.student.gate import Gate

    with Expander.load(gguf, gate=Gate(max_words=2)) as expander:
        assert "over 2" in expander.feedback(QUERY, PASSAGES).fallback
        assert expander.feedback("high tides", PASSAGES).fallback == ""
    with Expander.load(gguf, gate=Gate(max_words=None)) as expander:
        assert f"over {READ}" in expander.feedback("tides " * 600, PASSAGES).fallback


def test_what_is_too_long_or_blank_is_refused_without_a_gate(expander: Expander) -> None:
    with pytest.raises(BadInput, match=f"over {READ}"):
        expander.feedback("tides " * 600, PASSAGES)
    with pytest.raises(BadInput, match="empty"):
        expander.feedback("  ", PASSAGES)


def test_a_deadline_keeps_what_was_read_by_then(expander: Expander, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(expander.backend), "reader", lambda _: Slow())
    expanded = expander.feedback(QUERY, ["moon", "sun", "sea", "sky", "rain"], deadline_ms=70)
    assert expanded.relevance
    assert expanded.relevance.passages == ("moon", "sun")
    assert expanded.relevance.weights == (0.5,) * 2
    assert expanded.finish_reason == "deadline"


def test_whoever_waits_for_another_reader_is_not_late_either(
    expander: Expander, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(expander.backend), "reader", lambda _: Slow(0.5))
    with ThreadPoolExecutor(2) as threads:
        long = threads.submit(expander.feedback, QUERY, ["moon", "sun"])
        time.sleep(0.1)
        expanded = expander.feedback(QUERY, ["moon"], deadline_ms=100)
        assert not long.done()
        assert expanded.fallback == "the deadline passed before the first passage was read"
        assert long.result().relevance


class Slow:
    """A reader that takes its time for every two prompts."""

    def __init__(self, seconds: float = 0.05):
        self.seconds = seconds

    def log_likelihoods(self, prompts: list[list[int]], *_: Any, **__: Any) -> Iterator[list[float]]:
        for at in range(0, len(prompts), 2):
            time.sleep(self.seconds)

            yield [-1.0] * len(prompts[at : at + 2])

    def close(self) -> None: ...


def test_several_threads_get_what_one_gets(expander: Expander) -> None:
    asked = [(QUERY, PASSAGES), ("how does bread rise", PASSAGES[::-1]), ("sea", ["sea and moon"])] * 4
    alone = [expander.feedback(*a).relevance for a in asked]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda a: expander.feedback(*a).relevance, asked))
    for one, other in zip(alone, together, strict=True):
        assert one and other
        assert one.weights == pytest.approx(other.weights, rel=1e-3)


@pytest.mark.parametrize("engine", ["llama.cpp", "transformers"])
@pytest.mark.parametrize("asked_before", [True, False])
def test_a_closed_expander_says_so(gguf: Path, tiny_qwen3: Path, engine: Any, asked_before: bool) -> None:
    expander = Expander.load(gguf if engine == "llama.cpp" else tiny_qwen3, engine=engine, gate=OPEN)
    if asked_before:
        expander.feedback(QUERY, PASSAGES)
    expander.close()
    with pytest.raises(QeEdgeError, match="closed"):
        expander.feedback(QUERY, PASSAGES)


def test_what_adds_no_word_is_not_used(gguf: Path) -> None:
    from qe_edge.student.gate import Gate

    with Expander.load(gguf, gate=Gate()) as expander:
        expanded = expander.feedback("high tides", ["High tides!", "tides", "the of and"])
    assert expanded.fallback == "the passages add nothing to the query"
    assert expanded.terms() == {"high": 1, "tide": 1}


def test_a_passage_is_read_as_clean_text_from_its_beginning() -> None:
    settings = Feedback(tokens=1)  # of at most 16 characters
    assert settings.beginning(" \n\x00 cafe\u0301 \ud800 by the sea, and more of it") == "café by the sea,"
    assert settings.beginning("x" * 1000) == "x" * 16


def test_terms_of_passages_that_hardly_count_are_left_out() -> None:
    analyze = get_analyzer("english")
    model = RelevanceModel(("moon tide", "bread yeast"), (0.999, 0.001), most=60, join=Join())
    assert list(model.terms(analyze)) == ["moon", "tide"]


def test_it_can_be_awaited(expander: Expander) -> None:
    found = asyncio.run(expander.afeedback(QUERY, PASSAGES))
    alone = expander.feedback(QUERY, PASSAGES)
    assert found.relevance and alone.relevance
    assert found.relevance.weights == pytest.approx(alone.relevance.weights, rel=1e-3)


def test_a_cancelled_one_reads_no_further(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qe_edge.backends.llama_cpp import LlamaCppBackend

    reading, go_on = Event(), Event()
    groups = []

    class Held:
        """A reader that is held in its first two prompts."""

        def log_likelihoods(self, prompts: list[list[int]], *_: Any, **__: Any) -> Iterator[list[float]]:
            for at in range(0, len(prompts), 2):
                groups.append(at)
                reading.set()
                go_on.wait(60)
                yield [-1.0] * len(prompts[at : at + 2])

        def forget(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(LlamaCppBackend, "reader", lambda _: Held())

    async def cancelled(expander: Expander) -> None:
        # The second waits for its turn when it is cancelled.
        tasks = [asyncio.create_task(expander.afeedback(QUERY, PASSAGES)) for _ in range(2)]
        await asyncio.to_thread(reading.wait, 60)
        for task in tasks:
            task.cancel()
        assert [type(found) for found in await asyncio.gather(*tasks, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 2

    with Expander.load(gguf, gate=OPEN) as expander:
        asyncio.run(cancelled(expander))
        go_on.set()
        expander.forget()  # once both have ended
    assert groups == [0]


@pytest.mark.parametrize("wrong", [{"texts": {}}, {"tokens": 1000}, {"passages": 0}, {"temperature": 0}])
def test_settings_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, Feedback)


def test_settings_travel_in_the_spec(tiny_qwen3: Path, tmp_path: Path) -> None:
    from qe_edge.export.gguf import convert_gguf

    spec = read_spec(tiny_qwen3)
    assert spec
    settings = Feedback(passages=2, terms=5, join=Join("mass", 1))
    spec = msgspec.structs.replace(spec, feedback=settings, gate=OPEN)
    file = convert_gguf(tiny_qwen3, tmp_path / "student.gguf", dtype="f16", spec=spec)
    with Expander.load(file) as expander:
        expanded = expander.feedback(QUERY, PASSAGES)
    assert expanded.relevance
    assert len(expanded.relevance.passages) == 2
    assert len(expanded.relevance.terms(get_analyzer("english"))) == 5
    assert sum(expanded.terms().values()) == pytest.approx(6)


def test_search_is_by_the_terms_of_what_the_plain_query_found(gguf: Path, tmp_path: Path) -> None:
    from qe_edge.serve.collection import Collection, search

    collection = Collection.open("demo-en", tmp_path)
    query = "what makes bread rise"
    plain = collection.plain(query)
    with Expander.load(gguf) as expander:
        hits, expanded = search(query, collection, expander=expander, feedback=True, k=3)
        passages = collection.passages(plain, 10)
        assert passages == [collection.texts[place] for place in list(plain)[:10]]
        weights = expander.feedback(query, passages).terms("english")
    assert expanded.relevance
    assert len(expanded.relevance.passages) == 10
    expected = collection.index.search(weights, k=3)
    assert [(hit.doc_id, hit.score) for hit in hits] == [
        (doc_id, pytest.approx(score, abs=0.01)) for doc_id, score in expected
    ]
    with Expander.load(gguf, passages=20) as expander:
        _, expanded = search(query, collection, expander=expander, feedback=True)
    assert expanded.relevance
    assert len(expanded.relevance.passages) == 20


def test_the_command_line_searches_with_feedback(
    gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qe_edge.cli import main

    command = ["qe-edge", "search", "what makes bread rise", "--feedback", "--model", str(gguf), "-k", "1"]
    monkeypatch.setattr("sys.argv", command)
    with suppress(SystemExit):
        main()
    expansion, *_ = capsys.readouterr().out.splitlines()
    assert len(expansion.removeprefix("expansion: ").split()) == 12


def test_a_text_that_adds_nothing_is_not_shown_as_one(
    gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qe_edge.cli import main

    query = "what makes bread rise"
    expander = scripted(gguf, gate=Gate())
    says(expander, query)
    monkeypatch.setattr("qe_edge.commands.search.Expander.load", lambda *_, **__: expander)
    monkeypatch.setattr("sys.argv", ["qe-edge", "search", query, "--refine", "-k", "1", "-m", str(gguf)])
    with suppress(SystemExit):
        main()
    shown, *_ = capsys.readouterr().out.splitlines()
    assert shown.startswith("nothing written, read alone: ") and len(shown.split()) == 4 + 12
