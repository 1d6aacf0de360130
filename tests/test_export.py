"""Exports on the real engines: llama.cpp and MLX, tiny models, no network."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny import save_tiny_qwen3

from qe_edge.backends import open_backend
from qe_edge.errors import BadArgument, BadInput, NotFound, NotInstalled, QeEdgeError
from qe_edge.export import export_model, vocab
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.mlx import convert_mlx
from qe_edge.export.probes import HOSTILE, load_reference
from qe_edge.export.quantize import bits_of, quantize_gguf
from qe_edge.export.verify import verify_export, verify_gguf, verify_mlx
from qe_edge.models import resolve
from qe_edge.spec import read_spec

KINDS = ("F16", "BF16", "Q8_0", "Q4_K_M")
FAMILIES = ("qwen3", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(source folder, export folder, what export_model returned)"""
    source = request.getfixturevalue(f"tiny_{request.param}")
    out = tmp_path_factory.mktemp("export") / request.param
    return source, out, export_model(source, out, kinds=KINDS)


@pytest.fixture
def altered(tiny_qwen3: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny Qwen3 with changed config keys (None removes one) or tensors."""

    def alter(tensors: Callable[[dict[str, Any]], object] | None = None, **config: Any) -> Path:
        folder = shutil.copytree(tiny_qwen3, tmp_path / "altered")
        path = folder / "config.json"
        content = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        if tensors:
            from safetensors.torch import load_file, save_file

            weights = load_file(folder / "model.safetensors")
            tensors(weights)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return alter


def tensor_names(file: Path) -> list[str]:
    import gguf

    return [tensor.name for tensor in gguf.GGUFReader(file).tensors]


def test_every_export_loads_generates_and_knows_its_spec(exported: Any) -> None:
    source, out, result = exported
    names = [f"student-{kind}.gguf" for kind in KINDS] + [
        f"student-mlx-{b}" for b in ("bf16", "8bit", "4bit")
    ]
    assert sorted(result["files"]) == sorted(names)
    for name in names:
        ref = resolve(out / name)
        backend = open_backend(ref, engine="mlx" if "mlx" in name else None)
        try:
            assert backend.spec == read_spec(source)
            prompt = backend.spec.prompt.encode("what causes tides", backend.tokenize)
            assert len(list(itertools.islice(backend.generate(prompt), 4))) == 4
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
        open_backend(resolve(out / "student-mlx-4bit")),
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
        assert f"| {name} | {size / 1e6:.1f} | {check['logit_cosine']:.4f} |" in body
    assert str(out.parent) not in card and str(source) not in card  # no path of this machine

    modelfile = (out / "Modelfile").read_text()
    template = modelfile.split('"""')[1]
    assert template.replace("{{ .Prompt }}", "what causes tides") == spec.prompt.render("what causes tides")
    assert f"FROM ./{sorted(n for n in result['files'] if n.endswith('.gguf'))[0]}\n" in modelfile


def test_the_cards_mlx_command_runs(exported: Any) -> None:
    source, out, _ = exported
    spec = read_spec(source)
    assert spec
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", out / "student-mlx-bf16"]
    command += ["--ignore-chat-template", "--temp", "0", "--max-tokens", "3"]
    command += ["--prompt", spec.prompt.render("what causes tides")]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    backend = open_backend(resolve(source), engine="transformers")
    ids = spec.prompt.encode("what causes tides", backend.tokenize)
    assert f"Prompt: {len(ids)} tokens" in done.stdout


def test_an_export_is_verified_later_on(exported: Any, tmp_path: Path) -> None:
    source, out, result = exported
    for name, limit in (("student-F16.gguf", 1e-4), ("student-Q4_K_M.gguf", 0.5), ("student-mlx-bf16", 1e-2)):
        found = verify_export(out / name)
        assert found["checksums"] == (1 if name.endswith(".gguf") else len(list((out / name).iterdir())))
        assert {key: found[key] for key in result["checks"][name]} == result["checks"][name]
        assert 0 <= found["kl_divergence"] < limit
    assert verify_export(out / "student-F16.gguf", source)["token_ids"] == "identical"

    copy = shutil.copytree(out, tmp_path / "copy")
    shutil.copytree(copy / "student-mlx-4bit", tmp_path / "other" / "student-mlx-4bit")
    with (copy / "student-Q4_K_M.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(BadInput, match="it is damaged or was changed"):
        verify_export(copy / "student-Q4_K_M.gguf")
    with pytest.raises(BadInput, match="has no SHA256SUMS beside it"):
        verify_export(tmp_path / "other" / "student-mlx-4bit")
    (copy / "new.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"does not list new\.gguf"):
        verify_export(copy / "new.gguf")
    with pytest.raises(NotFound, match="no such GGUF file or MLX folder"):
        verify_export(copy / "nothing.gguf")
    with pytest.raises(NotFound, match="name it with --source"):
        verify_export(copy / "student-F16.gguf", tmp_path / "gone")


def test_only_what_was_asked_for_is_kept_and_stdout_stays_clean(
    tiny_qwen3: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    result = export_model(tiny_qwen3, tmp_path / "out", progress=notes.append)
    assert list(result["files"]) == ["student-Q4_K_M.gguf", "student-mlx-4bit"]
    assert result["checks"].keys() == {"student-BF16.gguf", *result["files"]}  # the intermediate, too
    assert len(notes) == 4
    assert capfd.readouterr().out == ""


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


def test_the_spec_survives_quantization(tiny_llama: Path, tmp_path: Path) -> None:
    import llama_cpp

    spec = read_spec(tiny_llama)
    assert spec is not None
    base = convert_gguf(tiny_llama, tmp_path / "base.gguf", spec=spec)
    small = quantize_gguf(base, tmp_path / "small.gguf", "Q4_0", threads=1)
    llama = llama_cpp.Llama(str(small), vocab_only=True, verbose=False)
    assert llama.metadata["qe_edge.spec"] == spec.to_json()
    llama.close()


def remove_norm(weights: dict[str, Any]) -> None:
    del weights["model.layers.1.self_attn.q_norm.weight"]


def add_bias(weights: dict[str, Any]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = weights["model.norm.weight"].clone()


def put_nan(weights: dict[str, Any]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def cut_rows(weights: dict[str, Any]) -> None:
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1].clone()


def to_bytes(weights: dict[str, Any]) -> None:
    import torch

    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM .*Qwen3ForCausalLM and LlamaForCausalLM"),
        ({"architectures": None}, "architecture none"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": None}, "no rope_theta"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            r"rope scaling \(yarn\)",
        ),
        (
            {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "linear"}},
            r"scaling \(linear\)",
        ),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
        ({"vocab_size": 500}, "vocab_size is 500|shape"),
        ({"tensors": remove_norm}, "lacks model.layers.1.self_attn.q_norm.weight"),
        ({"tensors": add_bias}, "model.layers.0.self_attn.q_proj.bias"),
        ({"tensors": cut_rows}, "model.embed_tokens.weight has shape"),
        ({"tensors": put_nan}, "model.layers.1.mlp.up_proj.weight holds NaN"),
        ({"tensors": to_bytes}, "model.layers.0.mlp.up_proj.weight is stored as I8"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    altered: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        convert_gguf(altered(**changes), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["altered"]


def test_the_older_place_of_rope_theta_is_read(
    altered: Callable[..., Path], tiny_qwen3: Path, tmp_path: Path
) -> None:
    older = convert_gguf(altered(rope_parameters=None, rope_theta=1_000_000), tmp_path / "older.gguf")
    assert older.read_bytes() == convert_gguf(tiny_qwen3, tmp_path / "newer.gguf").read_bytes()


def test_a_value_too_large_for_f16_is_refused(altered: Callable[..., Path], tmp_path: Path) -> None:
    def enlarge(weights: dict[str, Any]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6

    with pytest.raises(BadInput, match=r"up_proj.weight has values too large .* bf16"):
        convert_gguf(altered(enlarge), tmp_path / "out.gguf", dtype="f16")


def test_damaged_or_absent_files_are_refused_by_name(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_qwen3, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BadInput, match=r"model\.safetensors: not a whole safetensors file"):
        convert_gguf(folder, tmp_path / "out.gguf")
    weights.unlink()
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        convert_gguf(folder, tmp_path / "out.gguf")
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json: not a JSON object"):
        convert_gguf(folder, tmp_path / "out.gguf")


def test_an_index_cannot_point_out_of_the_folder(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_qwen3, tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"outside the model folder: \.\./other\.safetensors"):
        convert_gguf(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"type": "Unigram"}, "not a byte-level BPE"),
        ("normalizer", {"type": "Lowercase"}, "normalizer .*Lowercase"),
        ("pre_tokenizer", {"type": "Whitespace"}, "cuts text .*Whitespace"),
        ("pre_tokenizer", None, "cuts text"),
    ],
)
def test_unknown_tokenizers_are_refused(
    tiny_qwen3: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    folder = shutil.copytree(tiny_qwen3, tmp_path / "model")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(BadInput, match=message):
        convert_gguf(folder, tmp_path / "out.gguf")


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
    with pytest.raises(QeEdgeError, match=r"can't load .*bounds"):
        verify_gguf(bare, reference)


def test_a_failed_export_changes_nothing(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    out = tmp_path / "out"
    out.mkdir()
    (out / "student-Q4_K_M.gguf").write_text("the old one")
    (out / "run.json").write_text('{"command": "export"}')

    def full_disk(*_: Any) -> None:
        raise OSError("262144 requested and 4096 written")  # NumPy's words, without an errno

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full_disk)
    with pytest.raises(QeEdgeError, match=r"cannot write .*No space left"):
        export_model(tiny_qwen3, out, formats=["gguf"], verify=False)
    assert (out / "student-Q4_K_M.gguf").read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_an_older_export_is_replaced(tiny_qwen3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_qwen3, tmp_path / "model")
    with pytest.raises(BadArgument, match="something other than `qe-edge export` made"):
        export_model(model, model)
    for _ in range(2):
        export_model(model, tmp_path / "out", formats=["gguf"], verify=False)


def test_llama_cpp_says_why_it_cannot_quantize(
    tiny_qwen3: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = convert_gguf(tiny_qwen3, tmp_path / "base.gguf")
    small = quantize_gguf(base, tmp_path / "small.gguf", "Q4_K_M")
    with pytest.raises(QeEdgeError, match=r"could not quantize .* requantizing"):
        quantize_gguf(small, tmp_path / "again.gguf", "Q2_K")
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "small.gguf"}
    assert capfd.readouterr() == ("", "")
    with pytest.raises(BadInput, match="not a GGUF"):
        quantize_gguf(tiny_qwen3 / "config.json", tmp_path / "again.gguf", "Q2_K")


def test_unknown_choices_list_the_known_ones(tiny_qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"Q9_K.*Q4_K_M"):
        export_model(tiny_qwen3, tmp_path / "out", kinds=["Q9_K"])
    with pytest.raises(BadArgument, match=r"Q9_K.*Q4_K_M"):
        quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q9_K")
    with pytest.raises(BadArgument, match=r"onnx.*gguf, mlx"):
        export_model(tiny_qwen3, tmp_path / "out", formats=["onnx"])
    with pytest.raises(BadArgument, match="no kind given"):
        export_model(tiny_qwen3, tmp_path / "out", kinds=[])
    with pytest.raises(BadArgument, match=r"f8.*bf16"):
        convert_gguf(tiny_qwen3, tmp_path / "a.gguf", dtype="f8")  # type: ignore[arg-type]


def test_mlx_refuses_a_group_size_that_does_not_fit(altered: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"group size 64 .*\[32\]"):
        convert_mlx(altered(intermediate_size=544), tmp_path / "out")
    with pytest.raises(BadArgument, match="7 bits"):
        convert_mlx(tmp_path / "altered", tmp_path / "out", bits=7)


def test_a_model_without_a_spec_names_the_command_that_writes_it(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_qwen3, tmp_path / "model", ignore=shutil.ignore_patterns("qe_edge.json"))
    with pytest.raises(BadInput, match="qe-edge merge"):
        export_model(folder, tmp_path / "out")
    with pytest.raises(NotFound, match="absent"):
        export_model(tmp_path / "absent", tmp_path / "out")


def test_a_missing_extra_is_named_before_any_work(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(NotInstalled, match=r"qe-edge\[mlx\].*--format gguf"):
        export_model(tiny_qwen3, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bits_come_from_the_name_of_a_kind() -> None:
    assert [bits_of(kind) for kind in ("Q4_K_M", "IQ4_XS", "Q8_0", "BF16", "F32")] == [4, 4, 8, 16, 32]


def test_importing_the_export_loads_no_engine() -> None:
    engines = {"torch", "transformers", "safetensors", "mlx", "llama_cpp", "gguf"}
    code = f"import sys, qe_edge.export; print({engines} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
