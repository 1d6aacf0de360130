"""What can't be exported is refused by name, and whatever goes wrong leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qe_edge.errors import BadArgument, BadInput, NotFound, NotInstalled, QeEdgeError
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import export_model
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.mlx import convert_mlx
from qe_edge.export.quantize import quantize_gguf


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
        (
            {"architectures": ["GemmaForCausalLM"]},
            "GemmaForCausalLM .*Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM",
        ),
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
        export_model(tiny_qwen3, out, ExportConfig(formats=["gguf"], verify=False))
    assert (out / "student-Q4_K_M.gguf").read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_an_older_export_is_replaced(tiny_qwen3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_qwen3, tmp_path / "model")
    with pytest.raises(BadArgument, match="something other than `qe-edge export` made"):
        export_model(model, model)
    for _ in range(2):
        export_model(model, tmp_path / "out", ExportConfig(formats=["gguf"], verify=False))


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
        export_model(tiny_qwen3, tmp_path / "out", ExportConfig(kinds=["Q9_K"]))
    with pytest.raises(BadArgument, match=r"Q9_K.*Q4_K_M"):
        quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q9_K")
    with pytest.raises(BadArgument, match=r"onnx.*gguf, mlx"):
        export_model(tiny_qwen3, tmp_path / "out", ExportConfig(formats=["onnx"]))
    with pytest.raises(BadArgument, match="no kind given"):
        export_model(tiny_qwen3, tmp_path / "out", ExportConfig(kinds=[]))
    with pytest.raises(BadArgument, match=r"f8.*bf16"):
        convert_gguf(tiny_qwen3, tmp_path / "a.gguf", dtype="f8")  # type: ignore[arg-type]


def test_mlx_refuses_a_group_size_that_does_not_fit(altered: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"group size 64 .*\[32\]"):
        convert_mlx(altered(intermediate_size=544), tmp_path / "out")
    with pytest.raises(BadArgument, match="7 bits"):
        convert_mlx(tmp_path / "altered", tmp_path / "out", bits=7)


def test_a_model_without_a_spec_names_the_command_that_writes_it(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_qwen3, tmp_path / "model", ignore=shutil.ignore_patterns("qe_edge.json"))
    Path("a.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"has no qe_edge\.json, which holds its prompt; `qe-edge merge` wr"):
        export_model(folder, tmp_path / "out")
    (folder / "config.json").unlink()  # as a whole export has none
    for nothing, why in (
        (folder, "holds no config.json, so it is no model folder"),
        (Path("a.gguf"), "is a file"),
    ):
        with pytest.raises(BadInput, match=f"{nothing}: {why}; the folder of a merged model is wanted"):
            export_model(nothing, tmp_path / "out")
    with pytest.raises(NotFound, match="absent"):
        export_model(tmp_path / "absent", tmp_path / "out")


def test_a_missing_extra_is_named_before_any_work(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(NotInstalled, match=r"qe-edge\[mlx\].*--format gguf"):
        export_model(tiny_qwen3, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("vocab_size", 10**15),
        ("hidden_size", -256),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("intermediate_size", 2**62),
        ("rms_norm_eps", "1e-6"),
    ],
)
def test_absurd_sizes_are_refused_at_once(
    altered: Callable[..., Path], tmp_path: Path, key: str, value: Any
) -> None:
    folder = altered(**{key: value})
    for convert in (convert_gguf, convert_mlx):
        with pytest.raises((BadInput, BadArgument)):
            convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["altered"]


def test_no_code_of_a_checkpoint_runs(altered: Callable[..., Path], tmp_path: Path) -> None:
    """Neither a module that config.json points to nor a pickle beside the weights."""
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    folder = altered(auto_map=names)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    with pytest.raises(BadInput, match="model_file, which is not run"):
        convert_mlx(folder, tmp_path / "mlx", recipe="mixed_4_6")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).touch()")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    export_model(folder, tmp_path / "out", ExportConfig(kinds=["Q8_0"]))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model\.safetensors: not a whole safetensors file"):
        export_model(folder, tmp_path / "other")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "other").exists()


def test_an_adapter_alone_is_refused(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    shutil.copyfile(tiny_qwen3 / "qe_edge.json", folder / "qe_edge.json")
    with pytest.raises(BadInput, match=r"is an adapter; .*qe-edge merge"):
        export_model(folder, tmp_path / "out")


def test_a_quantized_source_is_refused(altered: Callable[..., Path], tmp_path: Path) -> None:
    folder = altered(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(BadInput, match="is quantized"):
        convert_gguf(folder, tmp_path / "out.gguf")


LIMITED = """
import resource, sys
from pathlib import Path
from qe_edge.errors import QeEdgeError
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.mlx import convert_mlx
from qe_edge.export.quantize import quantize_gguf
what, source, out, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit),) * 2)
made = {"gguf": convert_gguf, "mlx": convert_mlx, "Q4_K_M": lambda a, b: quantize_gguf(a, b, "Q4_K_M")}
try:
    made[what](Path(source), Path(out))
except QeEdgeError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files by RLIMIT_FSIZE")
@pytest.mark.parametrize("what", ["gguf", "Q4_K_M", "mlx"])
def test_a_file_that_cannot_grow_leaves_nothing(tiny_qwen3: Path, tmp_path: Path, what: str) -> None:
    """As on a full disk, by a limit that the system sets to the size of a file."""
    source = convert_gguf(tiny_qwen3, tmp_path / "base.gguf") if what == "Q4_K_M" else tiny_qwen3
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", LIMITED, what, source, tmp_path / "out", 500_000]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == QeEdgeError.exit_code, done.stderr
    assert f"cannot write {tmp_path / 'out'}" in done.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_a_killed_export_leaves_the_older_one_and_can_be_run_again(tiny_qwen3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(tiny_qwen3, out, ExportConfig(kinds=["F16"], formats=["gguf"]))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    command = [sys.executable, "-m", "qe_edge", "export", str(tiny_qwen3), "--out", str(out), "--bf16"]
    process = subprocess.Popen([*command, "--quant", "Q6_K"], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.*.partial/*.gguf")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    export_model(tiny_qwen3, out, ExportConfig(kinds=["Q8_0"], formats=["gguf"]))
    assert sorted(path.name for path in out.glob("*.gguf")) == ["student-Q8_0.gguf"]
    # What the killed one left is gone.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_behind_a_link_is_replaced_there(tiny_qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for kind in ("F16", "Q8_0"):
        export_model(tiny_qwen3, tmp_path / "out", ExportConfig(kinds=[kind], formats=["gguf"], verify=False))
        assert (tmp_path / "out").is_symlink()
        names = [path.name for path in (tmp_path / "disk" / "real").glob("*.gguf")]
        assert names == [f"student-{kind}.gguf"]


def test_a_target_that_cannot_be_written_is_named_before_the_work(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadArgument, match="file is a file"):
        export_model(tiny_qwen3, tmp_path / "file" / "out")
    monkeypatch.setattr("qe_edge.work.runs.os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(BadArgument, match="is not writable"):
        export_model(tiny_qwen3, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--format", "mlx", "--budget-mb", "1"),
            "--target-bpw needs the format gguf, which --format leaves out",
        ),
        (
            ("--format", "mlx", "--target-bpw", "4"),
            "--target-bpw needs the format gguf, which --format leaves out",
        ),
        (("--format", "mlx", "--adapter"), "--adapter needs the format gguf"),
        (("--format", "mlx", "--calibrate", "x"), "--calibrate needs the format gguf"),
        (("--format", "gguf", "--mlx-bits", "4"), "--mlx-… needs the format mlx"),
        (("--q8", "--calibrate", "x"), "--calibrate changes nothing for Q8_0"),
        (("--mlx-bits", "0"), "can't quantize to 0 bits"),
        (("--mlx-bits", "7"), "can't quantize to 7 bits"),
        (("--mlx-group", "48"), "in groups of 48"),
        (("--mlx-bits", "8", "--mlx-recipe", "mixed_3_4"), "either MLX bits or a recipe"),
        (("--mlx-recipe", "mixed_1_2"), "unknown MLX recipe mixed_1_2; choose from: mixed_2_6"),
        (("--budget-mb", "1", "--target-bpw", "4"), "either --budget-mb or --target-bpw"),
        (("--calibrate", "x", "--no-calibrate"), "either --calibrate or --no-calibrate"),
        (("--quant", "mixed"), "unknown kind mixed"),
        (("--quant", "Q9"), "unknown kind Q9"),
        (("--calibrate", "nothing.jsonl"), "nothing.jsonl: no such file"),
        (("--budget-mb", "1", "--no-calibrate"), "a mixed file needs an importance matrix"),
        (("--adapter",), "wasn't merged from a LoRA adapter"),
    ],
)
def test_choices_that_contradict_are_refused_before_the_work(
    tiny_qwen3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    from qe_edge.cli import main

    monkeypatch.setattr("qe_edge.export.export.load_reference", lambda _: pytest.fail("the work began"))
    monkeypatch.setattr(
        sys, "argv", ["qe-edge", "export", str(tiny_qwen3), "--out", str(tmp_path / "out"), *flags]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (2, 4)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
