"""Exports on the real engines: llama.cpp and MLX, tiny models, no network."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny import first_tokens, save_tiny_qwen3
from typer.testing import CliRunner

from qe_edge.backends.open import open_backend
from qe_edge.cli import app
from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError
from qe_edge.export import vocab
from qe_edge.export.card import write_card
from qe_edge.export.compare import compare_retrieval
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import export_model
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.mlx import convert_mlx
from qe_edge.export.probes import HOSTILE, load_reference
from qe_edge.export.quantize import bits_of, quantize_gguf
from qe_edge.export.verify import Closeness, Limits, source_of, verify_export, verify_gguf, verify_mlx
from qe_edge.student.models import resolve
from qe_edge.student.spec import read_spec
from qe_edge.work.folder import Workdir

KINDS = ("F16", "BF16", "Q8_0", "Q4_K_M")
FAMILIES = ("qwen3", "qwen2", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(source folder, export folder, what export_model returned)"""
    source = request.getfixturevalue(f"tiny_{request.param}")
    out = tmp_path_factory.mktemp("export") / request.param
    return source, out, export_model(source, out, ExportConfig(kinds=KINDS))


def tensor_names(file: Path) -> list[str]:
    import gguf

    return [tensor.name for tensor in gguf.GGUFReader(file).tensors]


def test_long_work_tells_how_far_it_is(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[int]] = {}

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
        told[what] = [total, 0]

        def advance() -> None:
            told[what][1] += 1

        yield advance

    for module in ("gguf", "quantize"):
        monkeypatch.setattr(f"qe_edge.export.{module}.progress", progress)
    base = convert_gguf(tiny_qwen3, tmp_path / "base.gguf")
    quantize_gguf(base, tmp_path / "small.gguf", "Q4_K_M")
    whole = [len(tensor_names(base))] * 2
    assert told == {"converting to base.gguf": whole, "quantizing to Q4_K_M": whole}


def test_every_export_loads_generates_and_knows_its_spec(exported: Any) -> None:
    source, out, result = exported
    names = [f"student-{kind}.gguf" for kind in KINDS] + [
        f"student-mlx-{b}" for b in ("bf16", "8bit", "5bit")
    ]
    assert sorted(result["files"]) == sorted(names)
    for name in names:
        ref = resolve(out / name)
        backend = open_backend(ref, engine="mlx" if "mlx" in name else None)
        try:
            assert backend.spec == read_spec(source)
            prompt = backend.spec.prompt.encode("what causes tides", backend.tokenize)
            assert len(first_tokens(backend, prompt, 4)) == 4
        finally:
            backend.close()


def test_checks_show_identical_ids_and_close_logits(exported: Any) -> None:
    checks = exported[2]["checks"]
    assert all(check["token_ids"] == "identical" for check in checks.values())
    assert checks["student-F16.gguf"]["logit_cosine"] >= 0.9999
    assert checks["student-BF16.gguf"]["logit_cosine"] >= 0.9999
    # Llama on MLX falls to .98 when the rotary base is lost on the way.
    assert checks["student-mlx-bf16"]["logit_cosine"] >= 0.9999


def test_hostile_text_has_the_same_ids_everywhere(exported: Any) -> None:
    source, out, _ = exported
    backends = [
        open_backend(resolve(source)),
        open_backend(resolve(out / "student-Q4_K_M.gguf")),
        open_backend(resolve(out / "student-mlx-5bit")),
    ]
    markup = {backends[0].tokenize(text, True)[0] for text in ("<|im_start|>", "<|im_end|>")}
    for text in HOSTILE:
        prompts = [backend.spec.prompt.encode(text, backend.tokenize) for backend in backends]
        assert prompts[0] == prompts[1] == prompts[2]
        assert sum(token in markup for token in prompts[0]) == 5  # those of the prompt's own turns


def test_the_folder_is_checksummed_and_described(exported: Any) -> None:
    _, out, result = exported
    listed = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert listed.keys() == files - {"SHA256SUMS", "run.json"}
    for name, digest in listed.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    record = json.loads((out / "run.json").read_text())
    assert (record["command"], record["files"]) == ("export", result["files"])


def test_the_folder_says_what_it_holds_and_how_to_use_it(exported: Any) -> None:
    source, out, result = exported
    spec = read_spec(source)
    assert spec
    card = (out / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "- query-expansion" in front.splitlines() and "- zh" in front.splitlines()
    for query in ("a query", "一个查询"):
        assert f"```text\n{spec.prompt.render(query)}\n```" in body
    for name, size in result["files"].items():
        check = result["checks"][name]
        sample = "1 query" if check["queries"] == 1 else f"{check['queries']} queries"
        start = f"| {name} | {size / 1e6:.1f} | {sample}, {check['positions']} places |"
        assert f"{start} {check['logit_cosine']:.4f} |" in body
    assert str(out.parent) not in card and str(source) not in card  # no path of this machine

    modelfile = (out / "Modelfile").read_text()
    template = modelfile.split('"""')[1]
    condition, given, chinese, english, end = re.split(r"\{\{ (?:(?:else )?if [^}]*|else|end) \}\}", template)
    assert "{{ .System }}" in given and "{{ .Prompt }}" in given
    assert (condition, end) == ("", "")
    for text, query in ((english, "what causes tides"), (chinese, "潮汐的成因是什么")):
        assert text.replace("{{ .Prompt }}", query) == spec.prompt.render(query)
    assert (out / "template").read_text() == template
    parameters = json.loads((out / "params").read_text())
    greedy = {"temperature": 0, "repeat_penalty": 1}
    assert parameters == greedy | {"num_predict": spec.prompt.max_tokens, "stop": ["<|im_end|>"]}
    assert 'PARAMETER stop "<|im_end|>"\n' in modelfile
    ggufs = [name for name in result["files"] if name.endswith(".gguf")]
    smallest = min(ggufs, key=lambda name: (out / name).stat().st_size)
    assert smallest != min(ggufs)  # or this would tell nothing
    assert f"FROM ./{smallest}\n" in modelfile
    assert f'Expander.load("{smallest}")' in body


@pytest.mark.parametrize("queries", [6, 1])
def test_the_card_says_which_rows_are_not_to_be_compared(
    tiny_qwen3: Path, tmp_path: Path, queries: int
) -> None:
    spec = read_spec(tiny_qwen3)
    assert spec
    close = {"logit_cosine": 0.99, "kl_divergence": 0.25, "answer_divergence": 0.5}
    check = close | {"top1_agreement": 0.75, "greedy_agreement": 0.25}
    checks = {
        "student-BF16.gguf": check | {"queries": 6, "positions": 465},  # not kept, so it is in no row
        "student-mlx-5bit": check | {"queries": queries, "positions": 57},
    }
    files = {"student-mlx-5bit": 2_000_000, "adapter": 100_000}
    rows = [
        "| file | MB | compared on | logit cosine | KL divergence | within answers | top-1 | greedy |",
        "| :-- | --: | :-- | --: | --: | --: | --: | --: |",
    ]
    mlx = "1 query" if queries == 1 else "6 queries"
    same = "0.9900 | 0.2500 | 0.5000 | 75% | 25% |"
    last = [f"| student-mlx-5bit | 2.0 | {mlx}, 57 places | {same}"]
    last += ["| adapter | 0.1 | not checked | – | – | – | – | – |"]
    write_card(tmp_path, spec, files, checks, None)
    assert (tmp_path / "README.md").read_text().endswith("\n".join(["", "", *rows, *last, ""]))

    checks["student-Q4_K_M.gguf"] = checks.pop("student-BF16.gguf")
    write_card(tmp_path, spec, {"student-Q4_K_M.gguf": 1_000_000, **files}, checks, None)
    rows += [f"| student-Q4_K_M.gguf | 1.0 | 6 queries, 465 places | {same}", *last]
    if queries == 1:
        rows += [
            "",
            "**Not all files were compared on the same queries.** Compare only rows with the same number of",
            "queries. Between others the queries make a difference, too, and one query says little.",
        ]
    assert (tmp_path / "README.md").read_text().endswith("\n".join(["", "", *rows, ""]))


def test_the_cards_mlx_command_runs(exported: Any) -> None:
    source, out, _ = exported
    spec = read_spec(source)
    assert spec
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", out / "student-mlx-bf16"]
    command += ["--temp", "0", "--max-tokens", "3", "--prompt", "what causes tides"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    backend = open_backend(resolve(source), engine="transformers")
    ids = spec.prompt.encode("what causes tides", backend.tokenize)
    assert f"Prompt: {len(ids)} tokens" in done.stdout


def test_an_export_is_verified_later_on(exported: Any, tmp_path: Path) -> None:
    source, out, result = exported
    for name, limit in (("student-F16.gguf", 1e-4), ("student-Q4_K_M.gguf", 0.5), ("student-mlx-bf16", 1e-2)):
        assert source_of(out / name).resolve() == source.resolve()
        found = verify_export(out / name, source)
        assert found["checksums"] == (1 if name.endswith(".gguf") else len(list((out / name).iterdir())))
        assert {key: found[key] for key in result["checks"][name]} == result["checks"][name]
        assert 0 <= found["kl_divergence"] < limit

    copy = shutil.copytree(out, tmp_path / "copy")
    shutil.copytree(copy / "student-mlx-5bit", tmp_path / "other" / "student-mlx-5bit")
    with (copy / "student-Q4_K_M.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(BadInput, match="it is damaged or was changed"):
        verify_export(copy / "student-Q4_K_M.gguf", source)
    with pytest.raises(BadInput, match="has no SHA256SUMS beside it"):
        verify_export(tmp_path / "other" / "student-mlx-5bit", source)
    added = copy / "student-mlx-bf16" / "model-evil.safetensors"
    added.write_bytes(b"")
    with pytest.raises(BadInput, match=r"model-evil\.safetensors: isn't listed"):
        verify_export(copy / "student-mlx-bf16", source)
    (copy / "new.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"does not list new\.gguf"):
        verify_export(copy / "new.gguf", source)
    with pytest.raises(NotFound, match="no such GGUF file or MLX folder"):
        source_of(copy / "nothing.gguf")
    with pytest.raises(BadArgument, match=r"is a whole export; verify one of its files: .*student-F16\.gguf"):
        source_of(out)
    for content in (b"one\n", b"\xff\xfe\n", b" \n"):
        (copy / "SHA256SUMS").write_bytes(content)
        with pytest.raises(BadInput, match="isn't a list of checksums"):
            verify_export(copy / "student-F16.gguf", source)
    with pytest.raises(NotFound, match="name that with --source"):
        source_of(tmp_path / "other" / "student-mlx-5bit")
    with pytest.raises(NotFound, match="gone: no such file or folder"):
        verify_export(copy / "student-F16.gguf", tmp_path / "gone")


@pytest.mark.parametrize("exported", ["qwen3"], indirect=True)
def test_a_source_that_is_no_model_is_told(exported: Any, tmp_path: Path) -> None:
    _, out, _ = exported
    (tmp_path / "scifacts").mkdir()
    for source, why in (
        (tmp_path / "scifacts", "holds no config.json, so it is no model folder"),
        (out / "student-Q8_0.gguf", "is a file"),
    ):
        command = ["verify", str(out / "student-F16.gguf"), "--source", str(source)]
        checked = CliRunner().invoke(app, command)
        assert isinstance(checked.exception, BadInput)
        assert str(checked.exception) == (
            f"{source}: {why}; the folder of a merged model is wanted, as `qe-edge merge` writes it"
        )


@pytest.mark.parametrize("exported", ["qwen3"], indirect=True)
def test_retrieval_before_and_after_is_compared_query_by_query(exported: Any, tmp_path: Path) -> None:
    source, out, _ = exported
    found = compare_retrieval(out / "student-F16.gguf", source, "demo-en", workdir=Workdir(tmp_path))
    assert (found["dataset"], found["queries"]) == ("demo-en@test", 26)
    # A tiny random model writes noise, and F16 writes the same noise but for near ties.
    change = found["difference"]
    assert change["low"] <= change["mean"] <= change["high"]
    assert found["after"] - found["before"] == pytest.approx(change["mean"], abs=2e-4)
    assert abs(change["mean"]) < 0.1
    assert 0 < found["before"] < 1


@pytest.mark.parametrize("exported", ["qwen3"], indirect=True)
def test_verify_prints_what_it_found(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qe_edge.cli import main

    file = exported[1] / "student-Q8_0.gguf"
    monkeypatch.setattr(sys, "argv", ["qe-edge", "verify", str(file), "--dataset", "demo-en@train"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{file} loses no more than its kind usually does\n  checksums      right\n")
    assert "\n  token ids      identical for 14 texts\n" in printed
    assert (
        "\n  its limits     logit cosine at least 0.995, KL divergence at most 0.02;\n"
        "                 within answers more than 0.2 is warned of\n"
    ) in printed
    *lines, following = printed.splitlines()
    # Of queries that it didn't learn from.
    assert following == f"next:   qe-edge bench --dataset demo-en --model {file}"
    assert [line for line in lines[1:] if len(line) > 80] == []
    assert "nDCG@10 on 48 queries of demo-en@train: " in printed


@pytest.mark.parametrize("exported", ["qwen3"], indirect=True)
def test_verify_of_the_newest_warns_as_export_did(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qe_edge.export.export.FAR", -1.0)
    work, file = tmp_path / "work", tmp_path / "work" / "export" / "001" / "student-Q4_K_M.gguf"
    shutil.copytree(exported[1], file.parent, ignore=shutil.ignore_patterns("*-mlx-*"))
    checked = CliRunner().invoke(app, ["verify", "--workdir", str(work), "--source", str(exported[0])])
    assert f"model: {file} (the newest; name another to use that)" in checked.stderr
    assert checked.stdout.startswith(f"{file} loses no more than its kind usually does, which is much\n")
    assert "student-Q4_K_M.gguf often answers otherwise than its source (KL divergence" in checked.stderr


@pytest.mark.parametrize(("high", "warned"), [(-0.01, True), (0.01, False)])
@pytest.mark.parametrize("exported", ["qwen3"], indirect=True)
def test_verify_warns_of_a_loss_that_is_not_chance(
    exported: Any, monkeypatch: pytest.MonkeyPatch, high: float, warned: bool
) -> None:
    change = {"mean": -0.02, "low": -0.05, "high": high}
    found = {"queries": 26, "dataset": "demo-en@test", "before": 0.5, "after": 0.48, "difference": change}
    monkeypatch.setattr("qe_edge.export.compare.compare_retrieval", lambda *_, **__: found)
    file = exported[1] / "student-Q8_0.gguf"
    checked = CliRunner().invoke(app, ["verify", str(file), "--dataset", "demo-en", "--json"])
    warning = f"{file} finds less than its source, and not by chance: try a larger kind, such as --q8"
    assert json.loads(checked.stdout)["warnings"] == [warning] * warned


def test_only_what_was_asked_for_is_kept_and_stdout_stays_clean(
    tiny_qwen3: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: False)
    notes: list[str] = []
    result = export_model(tiny_qwen3, tmp_path / "out", progress=notes.append)
    assert list(result["files"]) == ["student-Q4_K_M.gguf", "student-mlx-5bit"]
    assert result["checks"].keys() == {"student-BF16.gguf", *result["files"]}  # the intermediate, too
    *_, gguf, mlx = [note.splitlines()[0] for note in notes]
    assert gguf.endswith(" MB, token ids identical")
    assert mlx.endswith(" MB, token ids identical, compared on 1 query of 6")
    assert len(notes) == 5
    assert capfd.readouterr().out == ""


def test_an_export_that_answers_otherwise_says_so(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qe_edge.export.export.FAR", 0.01)  # so small a model's answers hardly diverge
    config = ExportConfig(kinds=("Q8_0", "Q3_K_M"), formats=("gguf",))
    result = export_model(tiny_qwen3, tmp_path / "out", config)
    far = {name: check["answer_divergence"] for name, check in result["checks"].items()}
    assert far["student-Q8_0.gguf"] < 0.01 < far["student-Q3_K_M.gguf"]
    (warning,) = result["warnings"]
    assert warning.startswith("student-Q3_K_M.gguf often answers otherwise than its source")


def test_embeddings_are_stored_once_when_tied(tiny_qwen3: Path, tmp_path: Path) -> None:
    assert "output.weight" not in tensor_names(convert_gguf(tiny_qwen3, tmp_path / "tied.gguf"))
    untied = save_tiny_qwen3(tmp_path / "untied", tied=False)
    file = convert_gguf(untied, tmp_path / "untied.gguf", spec=read_spec(untied))
    assert "output.weight" in tensor_names(file)
    assert verify_gguf(file, untied)["logit_cosine"] >= 0.9999


def test_a_head_stored_beside_tied_embeddings_is_ignored(
    altered: Callable[..., Path], tiny_qwen3: Path, tmp_path: Path
) -> None:
    def add_head(weights: dict[str, Any]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    with_head = convert_gguf(altered(add_head), tmp_path / "a.gguf")
    assert with_head.read_bytes() == convert_gguf(tiny_qwen3, tmp_path / "b.gguf").read_bytes()


def test_layout_and_precision_of_the_source_do_not_matter(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    sharded = shutil.copytree(
        tiny_llama, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors")
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.save_pretrained(sharded, max_shard_size="2MB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    expected = convert_gguf(tiny_llama, tmp_path / "one.gguf").read_bytes()
    assert convert_gguf(sharded, tmp_path / "many.gguf").read_bytes() == expected


def test_token_types_follow_llama_cpps_script(tiny_qwen3: Path, tmp_path: Path) -> None:
    """Markup is a control token by its looks; in Qwen's own file `<|fim_pad|>` isn't marked as special."""
    from gguf import GGUFReader, TokenType

    model = shutil.copytree(tiny_qwen3, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (unmarked,) = [token for token in tokenizer["added_tokens"] if token["content"] == "<|endoftext|>"]
    unmarked["special"] = False
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    fields = GGUFReader(str(convert_gguf(model, tmp_path / "x.gguf"))).fields
    types = dict(
        zip(*(fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type")), strict=True)
    )
    assert types["<|endoftext|>"] == types["<|im_end|>"] == TokenType.CONTROL
    assert types["<think>"] == TokenType.USER_DEFINED
    assert types["e"] == TokenType.NORMAL


def test_the_spec_survives_quantization(tiny_llama: Path, tmp_path: Path) -> None:
    import llama_cpp

    spec = read_spec(tiny_llama)
    assert spec is not None
    base = convert_gguf(tiny_llama, tmp_path / "base.gguf", spec=spec)
    small = quantize_gguf(base, tmp_path / "small.gguf", "Q4_0", threads=1)
    llama = llama_cpp.Llama(str(small), vocab_only=True, verbose=False)
    assert llama.metadata["qe_edge.spec"] == spec.to_json()
    llama.close()


def test_verify_catches_other_token_ids(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = vocab._token_table
    monkeypatch.setattr(vocab, "_token_table", lambda *args: (table(*args)[0], [1] * args[1]))  # no markup
    file = convert_gguf(tiny_llama, tmp_path / "wrong.gguf", spec=read_spec(tiny_llama))
    with pytest.raises(QeEdgeError, match=r"tokenizes .* differently from its source"):
        verify_gguf(file, tiny_llama)


def test_verify_catches_other_weights_and_another_spec(tiny_qwen3: Path, tmp_path: Path) -> None:
    reference, spec = load_reference(tiny_qwen3), read_spec(tiny_qwen3)
    assert spec is not None
    other = save_tiny_qwen3(tmp_path / "other", seed=1)
    changed = msgspec.structs.replace(spec, stage="dpo")
    for make, verify in ((convert_gguf, verify_gguf), (convert_mlx, verify_mlx)):
        with pytest.raises(QeEdgeError, match="answers differently from its source"):
            verify(make(other, tmp_path / f"other.{make.__name__}", spec=spec), reference)
        with pytest.raises(QeEdgeError, match="carries another qe-edge spec"):
            verify(make(tiny_qwen3, tmp_path / f"spec.{make.__name__}", spec=changed), reference)
    bare = convert_gguf(tiny_qwen3, tmp_path / "bare.gguf")
    with pytest.raises(QeEdgeError, match="carries another qe-edge spec"):
        verify_gguf(bare, reference)
    bare.write_bytes(bare.read_bytes()[:-1000])
    with pytest.raises(QeEdgeError, match=r"is damaged"):
        verify_gguf(bare, reference)


def test_divergence_within_the_prompt_is_told_from_that_of_answers(tiny_qwen3: Path) -> None:
    """Of answers: from the prompt's last position, which decides the first token, to the last."""
    reference = load_reference(tiny_qwen3)

    def check(first: int, last: int) -> dict[str, Any]:
        """With changed logits at these positions, counted from the prompt's last."""
        closeness = Closeness(reference)
        for prompt, answer, logits in zip(
            reference.prompts, reference.answers, reference.logits, strict=False
        ):
            other = logits.copy()
            places = np.arange(len(logits)) - (len(prompt) - 1)
            changed = (places >= min(first, len(answer))) & (places <= min(last, len(answer)))
            other[changed, 0] += 9.0  # one token becomes likelier
            closeness.add(other)
        return closeness.check(Limits(-1.0, 99.0), tiny_qwen3)

    within = check(-100, -1)
    assert within["kl_divergence"] > 0 == within["answer_divergence"]
    for one in (check(0, 0), check(1, 1), check(100, 100)):
        assert one["answer_divergence"] > one["kl_divergence"] > 0


def test_bits_come_from_the_name_of_a_kind() -> None:
    assert [bits_of(kind) for kind in ("Q4_K_M", "IQ4_XS", "Q8_0", "BF16", "F32")] == [4, 4, 8, 16, 32]


def test_importing_the_export_loads_no_engine() -> None:
    engines = {"torch", "transformers", "safetensors", "mlx", "llama_cpp", "gguf"}
    code = f"import sys, qe_edge.export; print({engines} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
