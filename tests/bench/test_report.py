"""The report page and its charts, read as text and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from results import CHINESE, HOSTILE, bench, dataset, speed

from qe_edge.bench.result import BenchResult, Kind, Speed
from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.work.files import write_json


def write(folder: Path, *results: BenchResult) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        write_json(path, msgspec.to_builtins(result))
    return paths


def page(folder: Path, *results: BenchResult) -> str:
    pytest.importorskip("vl_convert")
    pytest.importorskip("altair")
    from qe_edge.bench.report.report import report

    return report(write(folder, *results), folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The elements of a page, read as a browser does: nothing inside a script is an element."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def specs(self) -> list[dict[str, Any]]:
        kinds = [attributes.get("type") for tag, attributes in self.elements if tag == "script"]
        return [
            json.loads(text)
            for text, kind in zip(self.scripts, kinds, strict=True)
            if kind == "application/json"
        ]


def test_page_is_safe_and_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, bench())
    parsed = Page(text)
    assert not {"b", "img", "link", "iframe"} & {tag for tag, _ in parsed.elements}
    assert not [a for _, a in parsed.elements if {"src", "href"} & set(a)]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(
        a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert HOSTILE in parsed.text
    pareto, *per_query = parsed.specs()
    assert pareto["layer"]
    assert HOSTILE in {value["query"] for spec in per_query for value in spec["data"]["values"]}, (
        "the query reaches the tooltip unchanged"
    )
    assert text.count("window.vegaEmbed=") == 1


def test_page_content(tmp_path: Path) -> None:
    text = page(tmp_path, bench(), bench("desktop", 3.2))
    parsed = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>qe-edge bench</title>" in text
    assert "教师模型 few-shot" in parsed.text
    assert "student-BF16, the best of 4 rows of models, reaches nDCG@10 .503 on 26 queries" in parsed.text
    assert "No model was run here." in parsed.text
    assert "swap was in use" in parsed.text
    data, *others = bench().datasets
    systems = [
        msgspec.structs.replace(s, speed=s.speed and msgspec.structs.replace(s.speed, reused=True))
        for s in data.systems
    ]
    again = [msgspec.structs.replace(data, systems=systems), *others]
    told = "Times measured in an earlier run, at least in part, and under its load: smollm2-135m base"
    assert told in Page(page(tmp_path, msgspec.structs.replace(bench(), datasets=again))).text
    assert told not in parsed.text
    assert "10000 resamples" in parsed.text
    assert "Processors at other work" not in parsed.text
    busy = msgspec.structs.replace(bench(), machine=bench().machine | {"busy": 0.9})
    assert "<dt>Processors at other work</dt><dd>90 %</dd>" in page(tmp_path, busy)
    assert "Memory, GB" in parsed.text and "budget tokens 64" in parsed.text
    assert "tune joins" not in parsed.text  # nothing was tuned
    assert "Of teacher" in parsed.text
    weak = [msgspec.structs.replace(s, ndcg=systems[0].ndcg) if s.kind == "teacher" else s for s in systems]
    weak = msgspec.structs.replace(bench(), datasets=[msgspec.structs.replace(data, systems=weak)])
    weakly = Page(page(tmp_path, weak)).text
    assert "Of teacher" not in weakly and "few-shot doesn't pass plain BM25, so it is no yardstick" in weakly
    # One chart of effectiveness and speed, and one per model that answered alike on both machines.
    assert len(parsed.specs()) == 5
    machines = {value["machine"] for value in parsed.specs()[0]["layer"][1]["data"]["values"]}
    assert machines == {"laptop, 2 cores", "desktop"}


def test_every_column_is_explained(tmp_path: Path) -> None:
    text = page(tmp_path, bench())
    titles = re.findall(r'<th scope="col"><button type="button">(.+?)</button>', text)
    assert {"Helped", "Failed", "MB memory", "Load s"} < set(titles)
    plain = {"System", "nDCG@10", "R@100", "Threads", "Engine", "SHA-256"}
    assert [title for title in set(titles) - plain if f"{title}: " not in Page(text).text] == []


def test_chinese_queries_carry_their_language(tmp_path: Path) -> None:
    means: dict[str, tuple[Kind, float, Speed | None]] = {
        "BM25": ("bm25", 0.33, None),
        "student": ("model", 0.4, speed(90, 105)),
        "teacher": ("teacher", 0.52, None),
    }
    result = msgspec.structs.replace(bench(), datasets=[dataset("demo-zh@test", "zh", CHINESE, means)])
    text = page(tmp_path, result)
    assert '<p class="query" lang="zh">长江流经哪些省份</p>' in text


def test_user_errors(tmp_path: Path) -> None:
    from qe_edge.bench.report.report import chart_png, report

    with pytest.raises(BadArgument):
        report([], tmp_path / "report.html")
    with pytest.raises(NotFound):
        report([tmp_path / "none.json"], tmp_path / "report.html")
    (tmp_path / "bad.json").write_text('{"label": 1}')
    with pytest.raises(BadInput, match=r"bad\.json: not a bench result"):
        report([tmp_path / "bad.json"], tmp_path / "report.html")
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    untimed = msgspec.structs.replace(bench(), datasets=bench().datasets[1:])
    with pytest.raises(BadInput, match="nothing to draw"):
        chart_png(untimed, tmp_path / "chart.png")
    assert not (tmp_path / "report.html").exists()


def test_chart_png(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    from qe_edge.bench.report.report import chart_png

    assert chart_png(bench(), tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


# Run inside the page: what a reader would see and do, left in an attribute for --dump-dom.
PROBE = """<script>
setTimeout(() => {
  const table = document.querySelector(".sortable"), head = [...table.tHead.rows[0].cells];
  const header = head.find((cell) => cell.textContent === "Tokens/s");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[header.cellIndex].textContent);
  const click = () => {
    header.querySelector("button").click();
    return [header.getAttribute("aria-sort"), column()];
  };
  document.body.dataset.probe = JSON.stringify({
    charts: document.querySelectorAll(".chart > svg, .chart > .chart-wrapper > svg").length,
    points: document.querySelectorAll(".mark-symbol.role-mark path").length,
    bars: document.querySelectorAll(".mark-rect.role-mark path").length,
    clicks: [click(), click()],
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
}, 1500);
</script>"""


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, browsers)), None)
    if browser is None:
        pytest.skip(f"no browser found (looked for {', '.join(browsers)})")
    before, _, after = page(tmp_path, bench()).rpartition("</body>")
    (tmp_path / "probe.html").write_text(f"{before}{PROBE}</body>{after}", encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
    command += ["--window-size=500,900", "--virtual-time-budget=8000", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "probe.html").as_uri()], capture_output=True, encoding="utf-8", timeout=120
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    body = next(a for tag, a in Page(done.stdout).elements if tag == "body")
    seen = json.loads(body.get("data-probe") or "{}")
    assert (seen["charts"], seen["points"], seen["bars"]) == (5, 4, 4 * 26)
    assert seen["overflow"] == 0
    missing = ["–"] * 3
    assert seen["clicks"] == [
        ["descending", ["158", "112", "64", "61", *missing]],
        ["ascending", ["61", "64", "112", "158", *missing]],
    ]
