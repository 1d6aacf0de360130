"""No native object is freed while a call is inside it. A fault ends the process, so each test has its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from qe_edge.backends.lifetime import Lifetime
from qe_edge.errors import QeEdgeError
from qe_edge.spec import read_spec

pytest.importorskip("llama_cpp")


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


CLOSED_BESIDE = """
import sys, threading, time
from qe_edge import Expander, QeEdgeError
from qe_edge.gate import OPEN

model, engine, what = sys.argv[1:]
passages = [f"the moon pulls the sea {i}" for i in range(20)]
calls = {
    "feedback": lambda e: e.feedback("what causes tides", passages),
    "tokenize": lambda e: e.backend.tokenize("what causes tides " * 50, False),
    "detokenize": lambda e: e.backend.detokenize([5] * 500),
    "expand": lambda e: e.expand("what causes tides"),
    "stream": lambda e: list(e.stream("what causes tides")),
    "all": None,
}
del calls["all"]
chosen = list(calls.values()) if what == "all" else [calls[what]]
for turn in range(4 if engine == "llama.cpp" else 2):
    expander = Expander.load(model, engine=engine, gate=OPEN, budget_tokens=16, parallel=4)
    ended, wrong = [], []

    def use(number):
        try:
            while True:
                chosen[number % len(chosen)](expander)
        except QeEdgeError as error:
            ended.append(str(error))
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.05 + 0.05 * turn)
    expander.close()
    for thread in threads:
        thread.join(30)
    assert not wrong, wrong
    assert ended == ["the model was closed"] * 6, ended
    expander.close()
print("done")
"""


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


LEFT_BEHIND = """
import sys, threading, time
from qe_edge import Expander
from qe_edge.gate import OPEN

expander = Expander.load(sys.argv[1], gate=OPEN, budget_tokens=400)
passages = [f"the moon pulls the sea {i}" for i in range(20)]

def forever():
    while True:
        if sys.argv[2] == "expand":
            expander.expand("what causes tides")
        else:
            expander.feedback("what causes tides", passages)

for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
print("done")
"""


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
