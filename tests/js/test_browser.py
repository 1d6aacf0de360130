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
    shown.goto(address)
    shown.wait_for_function("crossOriginIsolated")  # after the service worker came in
    shown.click("#samples")
    return context, shown, errors


def said(shown: Any, text: str) -> None:
    """Wait until the page says so."""
    shown.wait_for_function("text => document.getElementById('state').textContent.includes(text)", arg=text)


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

    # An encoder reads what the student's words find.
    shown.set_input_files("#encoder", str(save_tiny_encoder(tmp_path / "encoder.gguf")))
    said(shown, "wrote and read")
    assert set(chips.all_inner_texts()) - set(before)

    # All of it again without a network.
    context.set_offline(True)
    shown.reload()
    shown.click("#samples")
    shown.fill("#query", "how does bread rise")
    said(shown, "with what the student wrote")
    assert errors == []
    context.close()


def test_it_speaks_chinese_and_finds_chinese_notes(chromium: Any, address: str) -> None:
    context, shown, errors = opened(chromium, address, "zh-CN")
    shown.wait_for_function("document.title === '笔记'")  # after the page's module ran
    shown.fill("#query", "水龙头滴水")
    said(shown, "按你的词找到")
    assert first_result(shown).startswith("家里.md")
    assert "水龙" in "".join(shown.locator("#results mark").all_inner_texts())
    said(shown, "没有补充")  # this student speaks English alone
    shown.click("#language")
    assert shown.title() == "Notes"
    assert errors == []
    context.close()


def test_a_folder_of_files_becomes_passages(chromium: Any, address: str, tmp_path: Path) -> None:
    context, shown, errors = opened(chromium, address, "en-US")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Tea\n\nGreen tea wants eighty degrees.\n\nBlack tea boils.\n")
    (tmp_path / "notes" / "b.bin").write_bytes(b"\0tea")
    shown.set_input_files("#folder", str(tmp_path / "notes"))
    shown.wait_for_function("document.getElementById('count').textContent === '3 passages'")
    shown.fill("#query", "eighty")
    assert "Green tea" in first_result(shown) and "a.md" in first_result(shown)
    assert errors == []
    context.close()
