"""The browser example in headless Chromium, with the real engine in WebAssembly."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import save_tiny_encoder

SECONDS = 120_000  # ms, for a machine that does something else
# What the page says of a query, since some of it stands for no more than 300 ms.
SAYINGS = """
window.sayings = [];
addEventListener("input", () => (sayings.length = 0), true);
addEventListener("DOMContentLoaded", () => {
  const state = document.getElementById("state");
  new MutationObserver(() => sayings.push(state.textContent)).observe(state, { childList: true });
});
"""


class Files(SimpleHTTPRequestHandler):
    """The example's folder, and a student beside it."""

    student: Path

    def translate_path(self, path: str) -> str:
        if path.split("?")[0] == "/student.gguf":
            return str(self.student)
        return super().translate_path(path)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(page: Path, student: Path) -> Iterator[str]:
    Files.student = student
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(page)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(chromium: Any, address: str, locale: str) -> tuple[Any, Any, list[str]]:
    """A context, its page with the sample notes, and what goes wrong in it."""
    context = chromium.new_context(locale=locale)
    shown, errors = context.new_page(), list[str]()
    context.set_default_timeout(SECONDS)
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.add_init_script(SAYINGS)
    shown.goto(address)
    with_samples(shown)
    return context, shown, errors


def with_samples(shown: Any) -> None:
    """Click for the sample notes, once the service worker came in and the page's module answers clicks."""
    shown.wait_for_function("crossOriginIsolated && document.getElementById('samples')?.textContent")
    shown.click("#samples")
    shown.wait_for_function("document.getElementById('count').textContent")


def said(shown: Any, text: str) -> None:
    """Wait until the page has said so of the query."""
    shown.wait_for_function("text => sayings.some((saying) => saying.includes(text))", arg=text)


def first_result(shown: Any) -> str:
    return shown.locator("#results li").first.inner_text()


def test_it_finds_at_once_and_better_when_the_student_has_written(
    chromium: Any, address: str, tmp_path: Path
) -> None:
    context, shown, errors = opened(chromium, address, "en-US")
    shown.fill("#query", "sea")
    said(shown, "Found by your words")
    assert first_result(shown).startswith("sea.md")

    query = "why do my ears pop on a plane"
    shown.fill("#query", query)
    said(shown, "Nothing found yet")  # no note has a word of it
    said(shown, "with what the student wrote")
    assert "Swallowing" in first_result(shown)

    # A word that is clicked away is not searched for.
    chips = shown.locator("#chips button")
    before = chips.all_inner_texts()
    assert before and all(
        word not in ["why", "do", "my", "ears", "pop", "on", "a", "plane"] for word in before
    )
    for _ in before:
        chips.first.click()
    assert shown.locator("#results li").count() == 0

    # The student reads what its words find, when it is asked to.
    shown.fill("#query", query + "?")
    said(shown, "with what the student wrote")
    shown.click("#read")
    said(shown, "written and read")
    assert "Swallowing" in first_result(shown)
    assert set(chips.all_inner_texts()) - set(before)
    assert shown.locator("#read").is_hidden()

    # An encoder reads by itself.
    shown.set_input_files("#encoder", str(save_tiny_encoder(tmp_path / "encoder.gguf")))
    shown.fill("#query", query)
    said(shown, "written and read")
    assert shown.locator("#read").is_hidden()

    # All of it again without a network.
    context.set_offline(True)
    shown.reload()
    with_samples(shown)
    shown.fill("#query", "how does bread rise")
    said(shown, "with what the student wrote")
    assert errors == []
    context.close()


READ = """async ([query, passages]) => {
  const { Wllama } = await import("@wllama/wllama");
  const { Student, wllama } = await import("qe-edge");
  const file = await (await fetch("student.gguf")).blob();
  const wasm = { default: "./node_modules/@wllama/wllama/esm/wasm/wllama.wasm" };
  const instance = new Wllama(wasm, { suppressNativeLog: true });
  await instance.loadModel([file], { n_ctx: 1024 });
  const engine = wllama(instance);
  const { spec } = await Student.load(file, engine);
  const values = await engine.read(query, "", passages, spec);
  const cut = await engine.read(query, "", passages, spec, AbortSignal.abort());
  const messages = [{ role: "user", content: query }]; // the file prompts itself
  const { usage } = await instance.createChatCompletion({ messages, temperature: 0, max_tokens: 1 });
  return [values, cut, usage.prompt_tokens];
}"""


def test_the_student_reads_in_a_tab_as_in_python(chromium: Any, address: str, student: Path) -> None:
    from qe_edge.backends.open import open_backend
    from qe_edge.runtime.expander import Expander
    from qe_edge.student.models import resolve

    passages = [
        "The moon's pull moves the sea.",
        "What causes tides? The moon.",
        "Yeast raises dough.<|im_end|>",
        "A tidy desk. " * 60,
    ]
    context, shown, errors = opened(chromium, address, "en-US")
    backend = open_backend(resolve(student), threads=1)
    feedback, prompt = backend.spec.feedback, backend.spec.prompt
    with Expander(backend) as expander:
        for query in ("what causes tides", "why do my ears pop", 'a "quoted" \\ word, café', "42"):
            prompts, answer, prefix = feedback.encode(query, passages, prompt, backend.tokenize)
            read = expander._decoder.reader().log_likelihoods(prompts, answer, prefix=prefix)
            expected = [value / len(answer) for group in read for value in group]
            found, cut, asked = shown.evaluate(READ, [query, passages])
            assert cut == []
            assert asked == len(prompt.encode(query, backend.tokenize))
            assert len(found) == len(expected)
            # In nats per token: WebAssembly's kernels multiply quantized weights otherwise, and where a long
            # passage ends is guessed there.
            assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 0.5, (found, expected)
    assert errors == []
    context.close()


def test_it_speaks_chinese_and_finds_chinese_notes(chromium: Any, address: str) -> None:
    context, shown, errors = opened(chromium, address, "zh-CN")
    assert shown.title() == "笔记"
    shown.fill("#query", "水龙头滴水")
    said(shown, "按你的词")  # found by it, until the gate says why by it alone
    assert first_result(shown).startswith("家里.md")
    assert "水龙" in "".join(shown.locator("#results mark").all_inner_texts())
    said(shown, "不是模型所写的语言")  # this student speaks English alone
    shown.click("#language")
    assert shown.title() == "Notes"
    assert errors == []
    context.close()


def test_a_folder_of_files_becomes_passages(chromium: Any, address: str, tmp_path: Path) -> None:
    context, shown, errors = opened(chromium, address, "en-US")
    (tmp_path / "notes").mkdir()
    note = "# Tea\n\n## Heat\nGreen tea wants eighty degrees.\n\nBlack tea boils.\n"
    (tmp_path / "notes" / "a.md").write_text(note)
    (tmp_path / "notes" / "b.bin").write_bytes(b"\0tea")
    shown.set_input_files("#folder", str(tmp_path / "notes"))
    shown.wait_for_function("document.getElementById('count').textContent === '2 passages'")
    shown.fill("#query", "eighty")
    assert first_result(shown) == "notes/a.md\nTea – Heat – Green tea wants eighty degrees."
    assert errors == []
    context.close()
