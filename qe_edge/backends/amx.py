"""Intel's AMX under llama.cpp: taken where a trial in a process of its own came through.

A compiler whose `_tile_loadconfig` doesn't say that it reads all of its argument (GCC 12) leaves most of the
tiles' shapes out of the program, which then ends at the first multiplication by a quantized weight
(https://github.com/ggml-org/llama.cpp/pull/26954). Nothing tells whether a build was spared. Even a good one
multiplies a single token by Q4_1 wrongly (llama-cpp-python 0.3.36). So it is tried: once for each build,
processor and set of weight types.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from qe_edge.errors import QeEdgeError
from qe_edge.work.files import read_json, write_json
from qe_edge.work.folder import user_folder
from qe_edge.work.machine import cpu_name

TRIALS = "amx.json"
Verdict = Literal["agrees", "differs", "dies"]
SECONDS = 300.0  # a large model is read from a slow disk


def may_repack(lib: Any, path: Path, types: frozenset[int]) -> bool:
    """Whether llama.cpp may lay out a file's weights anew for the processor: for AMX, where it knows that.

    `lib` is llama_cpp, `types` are ggml's numbers of the types of the file's tensors.
    """
    return not has_amx(lib) or verdict(lib, path, types) == "agrees"


def verdict(lib: Any, path: Path, types: frozenset[int]) -> Verdict:
    """How a trial with weights of these types ended, now or earlier."""
    build = [(file.name, file.stat().st_mtime_ns) for file in (Path(lib.__file__).parent / "lib").iterdir()]
    about = msgspec.json.encode([sorted(build), cpu_name(), sorted(types)])
    key = hashlib.sha256(about).hexdigest()[:16]
    file = user_folder() / TRIALS
    known: dict[str, Verdict] = {}
    with suppress(QeEdgeError, OSError):
        known = read_json(file)
    if key not in known:
        known[key] = _try(path)
        with suppress(QeEdgeError, OSError):  # then it is tried again the next time
            write_json(file, known)
    return known[key]


def has_amx(lib: Any) -> bool:
    """Whether this build of llama.cpp multiplies on AMX, on this processor."""
    return b"AMX_INT8 = 1" in lib.llama_print_system_info()


@contextmanager
def kept_off_amx(lib: Any, *, unless: bool = False) -> Iterator[None]:
    """Keep a `llama_cpp.Llama` that is made within off AMX, `unless` it is safe: it has no such setting."""
    functions, defaults = lib.llama_cpp, lib.llama_cpp.llama_model_default_params

    def without() -> Any:
        params = defaults()
        params.use_extra_bufts = unless or not has_amx(lib)
        return params

    functions.llama_model_default_params = without
    try:
        yield
    finally:
        functions.llama_model_default_params = defaults


def _try(path: Path) -> Verdict:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qe_edge.backends.amx_trial", str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "dies"
    if done.returncode:
        return "dies"
    return "agrees" if done.stdout.strip() == b"agrees" else "differs"
