"""No native object is freed while a call is inside it. A fault ends the process, so each test has its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
from survival import CLOSED_BESIDE, LEFT_BEHIND

from qe_edge.backends.lifetime import Lifetime
from qe_edge.errors import QeEdgeError
from qe_edge.student.spec import read_spec

pytest.importorskip("llama_cpp")


def test_ctrl_c_while_llama_cpp_logs_is_not_forgotten(gguf, monkeypatch):
    """Python reports what is raised in a function that C calls back, and goes on."""
    from llama_cpp import _logger

    from qe_edge import Expander

    class Levels(dict[int, int]):
        def __getitem__(self, level: int) -> int:
            if threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(level)

    levels = Levels(_logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL)
    monkeypatch.setattr(_logger, "GGML_LOG_LEVEL_TO_LOGGING_LEVEL", levels)
    with pytest.raises(KeyboardInterrupt):
        Expander.load(gguf)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


@pytest.mark.parametrize("what", ["feedback", "tokenize", "detokenize", "expand", "stream", "all"])
def test_closed_beside_six_threads(gguf, what):
    assert run(CLOSED_BESIDE, gguf, "llama.cpp", what) == "done\n"


def test_transformers_closed_beside_six_threads(tiny_qwen3):
    assert run(CLOSED_BESIDE, tiny_qwen3, "transformers", "all") == "done\n"


def test_mlx_closed_beside_six_threads(tiny_qwen3, tmp_path):
    pytest.importorskip("mlx_lm")
    from qe_edge.export.mlx import convert_mlx

    folder = convert_mlx(tiny_qwen3, tmp_path / "mlx", bits=None, spec=read_spec(tiny_qwen3))
    assert run(CLOSED_BESIDE, folder, "mlx", "all") == "done\n"


@pytest.mark.parametrize("what", ["expand", "feedback"])
def test_the_interpreter_ends_beside_threads_that_it_does_not_wait_for(gguf, what):
    for _ in range(3):
        assert run(LEFT_BEHIND, gguf, what) == "done\n"


def test_a_lifetime_waits_for_calls_and_goes_after_its_children():
    class Owner:
        pass

    owner, freed = Owner(), []
    parent = Lifetime(owner, lambda: freed.append("parent"))
    child = Lifetime(owner, lambda: freed.append("child"), parent)
    entered, leave = threading.Event(), threading.Event()

    def call():
        with child:
            entered.set()
            leave.wait(10)

    inside = threading.Thread(target=call)
    inside.start()
    entered.wait(10)
    parent.close(patience=0.05)
    assert freed == []  # still in use
    with pytest.raises(QeEdgeError, match="the model was closed"), child:
        pass
    closing = threading.Thread(target=parent.close)
    closing.start()
    time.sleep(0.05)
    assert freed == []
    leave.set()
    closing.join(10)
    inside.join(10)
    assert freed == ["child", "parent"]
    parent.close()
    child.close()
    assert freed == ["child", "parent"]


def test_a_lifetime_ends_with_its_owner():
    class Owner:
        pass

    freed = []
    owner = Owner()
    Lifetime(owner, lambda: freed.append("it"))
    del owner
    assert freed == ["it"]
