"""The npm package: its own tests under Node, on golden vectors and on a real student in real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from chat_servers import llama_cpp_server
from node import JS, program
from tiny_encoder import save_tiny_encoder
from vectors.make import ROOT, lines, stop_words_module, vectors

from qe_edge import OPEN, Encoder, Expander
from qe_edge.backends.open import open_backend
from qe_edge.export.probes import HOSTILE
from qe_edge.student.models import resolve

QUERIES = ["what causes tides", "how does bread rise", "GPT-4 是什么？", "“quotes”, and\n lines", "où est-ce"]
PASSAGES = [
    "The moon's pull moves the sea.",
    "What causes tides? The moon.",
    "Tides and what causes them.",
]
BUDGET = 24


def node_test(*files: str, **environment: str) -> None:
    path = os.pathsep.join([str(Path(program("node")).parent), os.environ["PATH"]])
    done = subprocess.run(
        [program("node"), "--test", *(f"test/{file}" for file in files)],
        cwd=JS,
        env=os.environ | environment | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout or "ℹ fail 0" in done.stdout


def test_the_golden_vectors_are_what_python_makes() -> None:
    for name, content in vectors().items():
        assert (ROOT / "tests" / "vectors" / f"{name}.json").read_text(encoding="ascii") == lines(content)
    assert (JS / "src" / "stopwords.js").read_text(encoding="ascii") == stop_words_module()


def test_javascript_meets_the_golden_vectors_and_its_own_tests() -> None:
    node_test("vectors.test.js", "offline.test.js")


def test_real_engines_write_and_read_as_in_python(student: Path, tmp_path: Path, packages: None) -> None:
    backend = open_backend(resolve(student), threads=1)
    ids = {query: backend.spec.prompt.encode(query, backend.tokenize) for query in [*QUERIES, *HOSTILE]}
    prompts = [{"query": query, "ids": found, "hostile": query in HOSTILE} for query, found in ids.items()]
    with Expander(backend, gate=OPEN, budget_tokens=BUDGET) as expander:
        texts = [{"query": query, "text": expander.expand(query).text} for query in QUERIES[:2]]
        relevance = expander.feedback(QUERIES[0], PASSAGES).relevance
    encoder = save_tiny_encoder(tmp_path / "encoder.gguf")
    with closing(Encoder(encoder)) as reader, Expander.load(student, reader=reader) as expander:
        encoded = expander.feedback(QUERIES[0], PASSAGES).relevance
    assert relevance and encoded
    expected = tmp_path / "expected.json"
    reading = {"query": QUERIES[0], "passages": PASSAGES, "weights": relevance.weights}
    content = {"spec": msgspec.to_builtins(backend.spec), "prompts": prompts, "texts": texts}
    content |= {"reading": reading, "encoded": encoded.weights, "budget": BUDGET}
    expected.write_text(json.dumps(content), encoding="utf-8")
    with llama_cpp_server(student) as url:
        where = {"gguf": str(student), "encoder": str(encoder), "expected": str(expected), "server": url}
        node_test("engines.test.js", QE_EDGE_JS=json.dumps(where))


@pytest.mark.slow
def test_the_speed_program_compares_with_python(student: Path, packages: None) -> None:
    small = ("--queries", "2", "--tokens", "2", "--rounds", "1")
    program = [sys.executable, "-m", "qe_edge.bench.programs.js_speed", str(student), *small]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")][2:]


def test_the_types_fit_a_program_that_uses_all_of_it(packages: None) -> None:
    tsc = [program("node"), "node_modules/typescript/bin/tsc", "--noEmit", "--strict", "--skipLibCheck"]
    settings = ["--module", "nodenext", "--target", "es2022", "--lib", "es2023,dom"]
    done = subprocess.run(
        [*tsc, *settings, "test/types.ts"], cwd=JS, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout


def test_the_package_is_small_and_has_no_dependencies() -> None:
    package = json.loads((JS / "package.json").read_text(encoding="utf-8"))
    assert "dependencies" not in package
    code = [*(JS / "src").glob("*.js"), JS / "index.d.ts"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in code) < 1000
