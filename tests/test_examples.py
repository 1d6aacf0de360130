"""The example of a search app, in a real browser."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any
from urllib.request import urlopen

import pytest
from engines import says, scripted
from tiny_encoder import save_tiny_encoder

from qe_edge import Encoder, Expander
from qe_edge.export.gguf import convert_gguf
from qe_edge.student.spec import read_spec

pytest.importorskip("llama_cpp")
EXAMPLE = Path(__file__).parents[1] / "examples" / "notes"
TIDES, IRON = "tides.md", "iron.md"


@pytest.fixture(scope="module")
def app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notes_app", EXAMPLE / "app.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def expander(tiny_qwen3: Path, tmp_path: Path) -> Iterator[Expander]:
    gguf = convert_gguf(tiny_qwen3, tmp_path / "student.gguf", dtype="f32", spec=read_spec(tiny_qwen3))
    with scripted(gguf, cache=tmp_path / "cache.db") as loaded:
        yield loaded


@pytest.fixture
def url(app: ModuleType, expander: Expander) -> Iterator[str]:
    notes = app.Notes(EXAMPLE / "sample")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(app.Page, notes, expander, False))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    """The page in Chromium; a word in its console is an error."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium found")
    said: list[str] = []
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        shown = chromium.new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.goto(url)
        yield shown
        chromium.close()
    assert said == []


def results(page: Any) -> list[str]:
    return page.locator("#results b").all_text_contents()


def chips(page: Any) -> list[str]:
    return page.locator("#chips button").all_text_contents()


def wait(page: Any, *, expanded: bool) -> None:
    shown = f'#results[data-expanded="{str(expanded).lower()}"]'
    page.wait_for_selector(shown, state="attached", timeout=20_000)


def test_the_expanded_list_comes_after_the_plain_one(page: Any, expander: Expander) -> None:
    says(expander, "fatigue from low ferritin, a sign of anemia")
    held: list[Any] = []  # expansions are held back, so that no list is replaced before it was looked at
    page.route("**/*expand=1*", lambda route: held.append(route))
    page.locator("#query").fill("tiredness")
    wait(page, expanded=False)
    assert results(page) == [IRON] and chips(page) == []
    page.locator("#query").fill("exhausted")
    page.wait_for_function("!document.querySelector('#results li')")
    assert chips(page) == []
    while not any("exhausted" in route.request.url for route in held):
        page.wait_for_timeout(20)
    for route in held:  # perhaps one of the first query too: its answer comes too late
        route.continue_()
    wait(page, expanded=True)
    assert results(page)[0] == IRON
    assert "Ferritin 9" in page.locator("#results p").first.text_content()
    assert {"fatigue", "ferritin", "anemia"} <= set(chips(page)) and "exhausted" not in chips(page)


def test_a_word_can_be_clicked_away(page: Any, expander: Expander) -> None:
    says(expander, "moon ferritin")
    page.locator("#query").fill("xyz")
    wait(page, expanded=True)
    assert set(results(page)) == {TIDES, IRON} and chips(page) == ["moon", "ferritin"]
    page.locator("#chips button", has_text="moon").click()
    page.wait_for_function("document.querySelectorAll('#chips button').length === 1")
    assert results(page) == [IRON] and chips(page) == ["ferritin"]
    page.locator("#query").fill("xy")  # another query has all its words again
    page.wait_for_function("document.querySelectorAll('#chips button').length === 2")
    page.locator("#query").fill("")
    page.wait_for_function("!document.querySelector('#results li')")
    assert chips(page) == [] and page.locator("#state").text_content() == ""


def test_chinese_notes_are_found(page: Any, expander: Expander) -> None:
    says(expander, "月亮和太阳的引力")
    page.locator("#query").fill("海水怎么涨")
    wait(page, expanded=True)
    assert "潮水.md" in results(page) and "月亮" in chips(page)


def test_what_the_gate_says_is_shown(page: Any, expander: Expander) -> None:
    says(expander, "moon moon moon moon moon")
    page.locator("#query").fill("tides")
    wait(page, expanded=True)
    assert results(page)[0] == TIDES
    assert page.locator("#state").text_content().startswith("searched as it is: the text repeats itself")


@pytest.mark.parametrize("query", ['"', "*", "\0", "a" * 5000, "NEAR(", "col:x", "<b>tides</b>"])
def test_no_query_breaks_it(app: ModuleType, expander: Expander, query: str) -> None:
    says(expander, "moon")
    page = app.Page.__new__(app.Page)
    page.notes, page.expander, page.refine = app.Notes(EXAMPLE / "sample"), expander, False
    for expand in (False, True):
        assert page.search(query, expand, set())["results"] is not None


def test_what_is_no_note_of_the_folder_is_passed_over(app: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "TAP.MD").write_text("A tap drips.")
    (tmp_path / ".#tap.md").symlink_to("nobody@host.1:2")  # as Emacs leaves beside what is edited
    (tmp_path / "folder.md").mkdir()
    assert [name for name, _ in app.Notes(tmp_path).search({"tap": 1.0})] == ["TAP.MD"]


def test_it_stays_short() -> None:
    lines = [line for file in ("app.py", "page.html") for line in (EXAMPLE / file).read_text().splitlines()]
    assert len(lines) < 190


def test_a_reader_adds_words_of_the_notes_that_are_found(
    app: ModuleType, tiny_qwen3: Path, tmp_path: Path
) -> None:
    gguf = convert_gguf(tiny_qwen3, tmp_path / "student.gguf", dtype="f32", spec=read_spec(tiny_qwen3))
    encoder = Encoder(save_tiny_encoder(tmp_path / "tiny.gguf"))
    with scripted(gguf, reader=encoder) as expander:
        says(expander, "ferritin in the blood")
        notes = app.Notes(EXAMPLE / "sample")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(app.Page, notes, expander, True))
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/search?q=exhausted"
        plain, refined = (json.load(urlopen(url + more)) for more in ("", "&expand=1"))
        server.shutdown()
    encoder.close()
    assert plain["results"] == [] and plain["chips"] == []
    assert IRON in [result["name"] for result in refined["results"]]
    assert "ferritin" in refined["chips"]
    assert set(refined["chips"]) - {"ferritin", "blood"}  # words of the notes


def test_its_help_names_what_it_takes() -> None:
    asked = [sys.executable, str(EXAMPLE / "app.py")]
    told = subprocess.run([*asked, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--reader" in told and "folder" in told
    assert "--cache" in told
    refused = subprocess.run([*asked, "missing"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "missing is no folder" in refused.stderr
