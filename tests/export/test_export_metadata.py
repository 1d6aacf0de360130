"""`verify` looks at every key of a GGUF, and renders no template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qe_edge.errors import QeEdgeError
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.metadata import expected_keys, read_keys
from qe_edge.export.probes import load_reference
from qe_edge.export.quantize import quantize_gguf
from qe_edge.export.verify import verify_gguf
from qe_edge.student.spec import KIND_KEY, read_spec

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
TEMPLATE = "tokenizer.chat_template"


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def source(request):
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "student-BF16.gguf"
    return convert_gguf(source, out, spec=read_spec(source), provenance={"a": 1})


@pytest.fixture(scope="module")
def reference(source):
    return load_reference(source)


def rewritten(file: Path, out: Path, changed: dict[str, Any], dropped: tuple[str, ...] = ()) -> Path:
    """A copy of a GGUF with other values."""
    reader = gguf.GGUFReader(str(file))
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in dropped:
            continue
        value = changed.pop(name, field.contents())
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    for name, value in changed.items():
        writer.add_string(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_what_an_export_writes_is_what_is_expected(source, exported, reference, tmp_path):
    assert verify_gguf(exported, reference)["token_ids"] == "identical"
    assert verify_gguf(rewritten(exported, tmp_path / "same.gguf", {}), reference)["token_ids"] == "identical"
    quantized = quantize_gguf(exported, tmp_path / "q8.gguf", "Q8_0")
    assert verify_gguf(quantized, reference)["token_ids"] == "identical"
    assert set(expected_keys(source, read_spec(source))) < set(read_keys(exported))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 'a' * 10**10 }}",
        "{% for x in range(10**12) %}{% endfor %}",
        "{% if",
        "",
    ],
)
def test_a_changed_template_is_found_and_not_rendered(exported, reference, tmp_path, template):
    changed = rewritten(exported, tmp_path / "x.gguf", {TEMPLATE: template})
    with pytest.raises(QeEdgeError, match=r"its tokenizer\.chat_template is not what its export wrote"):
        verify_gguf(changed, reference)


def test_any_other_key_is_looked_at_too(source, exported, reference, tmp_path):
    arch = source.name
    tokens = read_keys(exported)["tokenizer.ggml.tokens"]
    for number, (name, value) in enumerate(
        {
            f"{arch}.rope.freq_base": 12345.0,
            f"{arch}.context_length": 4096,
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.eos_token_id": 3,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.tokens": [*tokens[:-1], "changed"],
            "general.name": "another",
        }.items()
    ):
        changed = rewritten(exported, tmp_path / f"{number}.gguf", {name: value})
        with pytest.raises(QeEdgeError, match=f"its {name} is not what its export wrote"):
            verify_gguf(changed, reference)
    with pytest.raises(QeEdgeError, match=r"has a key tokenizer\.chat_template\.tool_use, which no export"):
        extra = {f"{TEMPLATE}.tool_use": "{{ x }}"}
        verify_gguf(rewritten(exported, tmp_path / "extra.gguf", extra), reference)
    with pytest.raises(QeEdgeError, match=r"lacks the key tokenizer\.chat_template"):
        verify_gguf(rewritten(exported, tmp_path / "less.gguf", {}, (TEMPLATE,)), reference)


def test_an_unknown_kind_and_a_damaged_file_are_one_line(exported, reference, tmp_path):
    with pytest.raises(QeEdgeError, match="is of the kind 'bogus', which no export writes"):
        verify_gguf(rewritten(exported, tmp_path / "kind.gguf", {KIND_KEY: "bogus"}), reference)
    cut = Path(shutil.copy(exported, tmp_path / "cut.gguf"))
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(QeEdgeError, match="is damaged"):
        verify_gguf(cut, reference)


def test_an_mlx_folders_template_is_compared_too(tiny_qwen3, tmp_path):
    pytest.importorskip("mlx_lm")
    from qe_edge.export.mlx import convert_mlx
    from qe_edge.export.verify import verify_mlx

    folder = convert_mlx(tiny_qwen3, tmp_path / "mlx", bits=None, spec=read_spec(tiny_qwen3))
    assert verify_mlx(folder, tiny_qwen3)["token_ids"] == "identical"
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10**10 }}")
    with pytest.raises(QeEdgeError, match="its chat template is not its source's"):
        verify_mlx(folder, tiny_qwen3)
