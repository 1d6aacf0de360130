"""Tables for terminals and READMEs, headlines, merging, and where chart labels go."""

from __future__ import annotations

import csv
import io
import re

import msgspec
import numpy as np
import pytest
from results import bench, small
from rich.cells import cell_len

from qe_edge.bench.report.columns import all_columns, notes
from qe_edge.bench.report.figures import rate, score, signed
from qe_edge.bench.report.labels import HEIGHT, WIDTH, Line, Plane, Point, text_width
from qe_edge.bench.report.section import headline, merge, verdict
from qe_edge.bench.report.table import console_table, csv_rows, latex_table, markdown_table
from qe_edge.bench.result import BenchResult, Tuning
from qe_edge.errors import BadArgument
from qe_edge.retrieval.measures import Interval


def test_figures_are_written_as_the_field_does() -> None:
    assert [score(v) for v in (0.4854, 1.0, 0, -0.0304, -0.0001)] == [
        ".485",
        "1.000",
        ".000",
        "−.030",
        ".000",
    ]
    assert [signed(v) for v in (0.051, -0.051, 0.0001)] == ["+.051", "−.051", ".000"]
    assert [rate(v) for v in (158.4, 9.96, 0.41)] == ["158", "10.0", "0.4"]


def test_console_table() -> None:
    assert (
        console_table(small())
        == """\
demo-en@test on laptop

                                                              of
system                      nDCG@10              vs BM25 teacher tok/s ms/query
───────────────────────────────────────────────────────────────────────────────
BM25              .434 [.360, .500]                    –       –     –        –
my[bold]|Q4       .485 [.412, .561] +.051 [−.003, +.101]    61 %   158      385
gpt-4.1 zero-shot .800 [.700, .900]                    –       –     –        –

2 queries, 95 % bootstrap intervals. So few cannot tell small differences from
chance: see the interval of “vs BM25”.
gpt-4.1 zero-shot: the teacher's texts.
tok/s: tokens written a second. ms/query: the median time to expand a query.
of teacher: nDCG@10 as a share of that of gpt-4.1 zero-shot (–: BM25, and the
teacher itself).
Joined by mass:0.7: my[bold]|Q4.
Joined by repeat:5: gpt-4.1 zero-shot.
mass:R weighs an expansion R times as much as its query; repeat:N counts the
query's words N times, the expansion's once.
my[bold]|Q4: queries without an expansion, searched as they are: 2.
"""
    )


@pytest.mark.parametrize("name", ["a-very-long-model-name-of-the-student-Q4", "学生模型的一个非常长的名字"])
def test_a_name_never_splits_and_80_columns_hold_all(name: str) -> None:
    result = small()
    bm25, model, teacher = result.datasets[0].systems
    long = msgspec.structs.replace(model, name=name)
    data = msgspec.structs.replace(result.datasets[0], systems=[bm25, long, teacher])
    lines = console_table(msgspec.structs.replace(result, datasets=[data])).splitlines()
    assert max(map(cell_len, lines)) <= 80
    place = lines.index(name)
    assert lines[place + 1] == "  .485 [.412, .561]  +.051 [−.003, +.101]     61 %    158       385"


def test_columns_can_be_chosen() -> None:
    (line,) = (x for x in console_table(small(), ["join", "of-gain", "file"]).splitlines() if "|Q4  " in x)
    assert line.split() == ["my[bold]|Q4", "mass:0.7", "−6", "%", "105"]
    assert markdown_table(small().datasets[0], ["ms"]).splitlines()[3] == r"| my[bold]\|Q4 | 385 |"
    # What has no room beside the others stands below them.
    wide = ["join", "ndcg", "vs-bm25", "of-teacher", "of-gain", "helped", "speed", "ms", "file", "memory"]
    lines = console_table(small(), wide).splitlines()
    assert max(map(cell_len, lines)) <= 80 and sum(line.startswith("my[bold]|Q4") for line in lines) >= 2
    # What wasn't measured is not left out without a word.
    told = " ".join(console_table(small(), ["ndcg", "128-tokens"]).split())
    assert "system nDCG@10 128 tokens" in told
    assert "when each expansion ends after so many. –: none is longer, or it wasn't cut." in told
    (data,) = small().datasets
    alone = msgspec.structs.replace(data, teacher=None)
    told = console_table(msgspec.structs.replace(small(), datasets=[alone]), ["of-teacher"])
    assert "No teacher was measured to compare with: --teacher names a file of its texts." in told
    told = "of its gain: of what gpt-4.1 zero-shot gains over BM25, the share that is gained too."
    assert told in " ".join(console_table(small(), ["of-gain"]).split())
    bare = msgspec.structs.replace(data, teacher=None, systems=data.systems[:1])
    table = " ".join(console_table(msgspec.structs.replace(small(), datasets=[bare]), wide[3:]).split())
    for title in ("of teacher", "of its gain", "helped/hurt", "tok/s", "ms/query", "MB file", "MB mem"):
        assert f"{title}: " in table  # said also of a column without a figure
    with pytest.raises(BadArgument, match=r"no column 'x'; there are: join, ndcg, vs-bm25, of-teacher"):
        console_table(small(), ["x"])


def test_ways_of_using_a_student_are_explained_where_they_stand() -> None:
    (data,) = small().datasets
    gated = msgspec.structs.replace(data.systems[1], name="my[bold]|Q4 + gate")
    data = msgspec.structs.replace(data, systems=[*data.systems, gated])
    told = "+ gate: the student's text where its gate lets it pass, else the query alone."
    for table in (console_table(msgspec.structs.replace(small(), datasets=[data])), latex_table(data)):
        assert told in table and "+ refine:" not in table


def test_rows_of_one_name_show_their_join() -> None:
    (data,) = small().datasets
    twin = msgspec.structs.replace(data.systems[1], join="mass:2")
    data = msgspec.structs.replace(data, systems=[*data.systems, twin])
    text = console_table(msgspec.structs.replace(small(), datasets=[data]))
    assert "mass:2" in text and "mass:0.7" in text and "Joined by" not in text


def test_a_teacher_that_is_no_yardstick_is_none_in_markdown() -> None:
    (data,) = small().datasets
    better = msgspec.structs.replace(data.systems[0], ndcg=data.systems[2].ndcg)
    table = markdown_table(msgspec.structs.replace(data, systems=[better, *data.systems[1:]]))
    assert "it is no yardstick here" in table and "of teacher" not in table


def test_markdown_table() -> None:
    lines = markdown_table(small().datasets[0]).splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)][1:-1] for line in lines[:5]]
    assert [len(row) for row in cells] == [11] * 5
    assert cells[0][-6:] == ["of its gain", "helped/hurt", "tok/s", "ms/query", "MB file", "MB mem"]
    assert lines[3].startswith(
        r"| my[bold]\|Q4 | mass:0.7 | .485 [.412, .561] | +.051 [−.003, +.101] | 61 % |"
    )
    assert lines[4].endswith("| .800 [.700, .900] | – | – | – | 2/0 | – | – | – | – |")
    told = notes(small().datasets[0], all_columns(small().datasets[0]))
    assert lines[5:] == ["", *(f"- {note}" for note in told)]
    starred = [line for line in markdown_table(rich().datasets[0]).splitlines() if "p < .05" in line]
    assert [line[:12] for line in starred] == [r"- \* p < .05"]


def rich() -> BenchResult:
    """The small result with other measures, budgets, p-values and a tuned join."""
    result = small()
    (data,) = result.datasets
    bm25, model, teacher = data.systems
    model = msgspec.structs.replace(
        model,
        p_vs_bm25=0.04,
        measures={"R@100": Interval(0.61, 0.5, 0.7)},
        budgets={16: Interval(0.45, 0.4, 0.5), 32: Interval(0.47, 0.4, 0.5)},
    )
    bm25 = msgspec.structs.replace(bm25, measures={"R@100": Interval(0.55, 0.5, 0.6)})
    curve = {"mass:0.5": Interval(0.41, 0.4, 0.5), "mass:0.7": Interval(0.43, 0.4, 0.5)}
    return msgspec.structs.replace(
        result,
        datasets=[msgspec.structs.replace(data, systems=[bm25, model, teacher])],
        tuning=[Tuning("my[bold]|Q4", "dev@train", curve, "mass:0.7")],
    )


def test_other_measures_budgets_and_the_tuning_are_shown() -> None:
    lines = [re.sub(r"\s{2,}", "  ", line.strip()) for line in console_table(rich()).splitlines()]
    assert "system  R@100  tokens  tokens" in lines
    assert "BM25  .550  –  –" in lines
    assert "my[bold]|Q4  .610  .450  .470" in lines
    assert any("+.051 [−.003, +.101]*" in line for line in lines)
    assert "* p < .05 against BM25: paired randomization test, corrected by Holm over 2" in lines
    assert "N tokens: nDCG@10 when each expansion ends after so many." in lines
    assert lines[-1] == "my[bold]|Q4: join mass:0.7, the best of 2 on dev@train"
    assert markdown_table(rich().datasets[0]).splitlines()[0].endswith("| R@100 | 16 tokens | 32 tokens |")


def test_csv_holds_every_figure() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_rows([rich(), small()]))))
    assert [row["name"] for row in rows] == ["BM25", "my[bold]|Q4", "gpt-4.1 zero-shot"] * 2
    model = rows[1]
    assert (model["machine"], model["dataset"], model["kind"]) == ("laptop", "demo-en@test", "model")
    assert model["queries"] == str(len(rich().datasets[0].queries))
    figures = {"ndcg.mean": 0.485, "vs_bm25.high": 0.101, "measures.R@100.low": 0.5, "budgets.16.mean": 0.45}
    assert {name: float(model[name]) for name in figures} == figures
    assert float(model["speed.decode_tokens_per_s"]) == 158.4
    assert rows[0]["speed.decode_tokens_per_s"] == rows[4]["budgets.16.mean"] == ""
    assert not any(name.startswith(("per_query", "expansions")) for name in model)


def test_latex_escapes_what_latex_would_read() -> None:
    data = small().datasets[0]
    hostile = msgspec.structs.replace(data.systems[0], name="a_b & 50% {x} #1 ^~\\")
    warnings = ["2 of 3 texts were cut where `teach` ended them"]
    data = msgspec.structs.replace(data, systems=[hostile, *data.systems[1:]], warnings=warnings)
    lines = latex_table(data).splitlines()
    assert lines[-2:] == [r"2 of 3 texts were cut where \texttt{teach} ended them.", r"\end{table}"]
    assert lines[:5] == [
        r"\begin{table}",
        r"\centering",
        r"\caption{nDCG@10 on demo-en@test, 2 queries.}",
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
    ]
    name = r"a\_b \& 50\% \{x\} \#1 \textasciicircum{}\textasciitilde{}\textbackslash{}"
    assert any(line.startswith(name + " & .434 [.360, .500] &") for line in lines)
    assert any(r"+.051 [$-$.003, +.101] & 61 \% & 158 & 385" in line for line in lines)
    assert (
        "of teacher: nDCG@10 as a share of that of gpt-4.1 zero-shot (--: BM25, and the teacher itself)."
        in lines
    )
    assert r"\begin{tabular}{lrr}" in latex_table(data, ["of-gain", "helped"])


def test_shares_of_a_teacher_near_zero_are_left_out_and_explained_where_asked_for() -> None:
    result = small()
    bm25, model, teacher = result.datasets[0].systems
    data = msgspec.structs.replace(
        result.datasets[0], systems=[bm25, msgspec.structs.replace(model, retention=None), teacher]
    )
    without = msgspec.structs.replace(result, datasets=[data])
    assert "of teacher" not in console_table(without) and "of teacher" in console_table(result)
    told = " ".join(console_table(without, ("ndcg", "of-teacher")).split())
    assert "(–: on so few queries, the teacher's figure can't be told from zero)" in told
    alone = msgspec.structs.replace(data, systems=[bm25, teacher])
    told = " ".join(console_table(msgspec.structs.replace(result, datasets=[alone]), ("of-teacher",)).split())
    assert "(–: BM25, and the teacher itself)" in told


def test_columns_that_are_asked_for_are_there_without_a_figure() -> None:
    result = small()
    plain = [system for system in result.datasets[0].systems if not system.speed]
    data = msgspec.structs.replace(result.datasets[0], systems=plain)
    asked = ("ndcg", "vs-bm25", "of-teacher", "of-gain", "helped", "speed", "ms", "file", "memory")
    table = console_table(msgspec.structs.replace(result, datasets=[data]), asked)
    heads = table[: table.index("95 % bootstrap")]
    for title in ("nDCG@10", "vs BM25", "teacher", "gain", "helped", "tok/s", "query", "file", "mem"):
        assert title in heads
    assert max(map(cell_len, table.splitlines())) <= 80


def test_headline_claims_no_more_than_the_interval() -> None:
    (section,) = merge([small()])
    assert headline(section).replace("\u00a0", " ") == (
        "my[bold]|Q4 reaches nDCG@10 .485 on 2 queries; plain BM25 reaches .434. "
        "The difference of +.051 has a 95 % interval from −.003 to +.101, which includes 0: "
        "2 queries cannot tell the two apart. "
        "gpt-4.1 zero-shot, the teacher, reaches .800; the model has 61 % of that. "
        "The model writes 158 tokens/s, 385 ms per query, on laptop."
    )
    (data,) = small().datasets
    bm25, model, teacher = data.systems
    gaining = msgspec.structs.replace(model, gain_retention=Interval(0.3, 0.1, 0.5))
    data = msgspec.structs.replace(data, systems=[bm25, gaining, teacher])
    (section,) = merge([msgspec.structs.replace(small(), datasets=[data])])
    assert "has 61 % of that and 30 % of its gain over BM25." in headline(section).replace("\u00a0", " ")
    assert verdict(Interval(0.05, 0.01, 0.1), 43, 0.04).endswith("the gain is unlikely to be chance.")
    assert verdict(Interval(0.05, 0.01, 0.1), 43, None).endswith("the gain is unlikely to be chance.")
    assert verdict(Interval(0.05, 0.01, 0.1), 43, 0.2).endswith("it may be chance (p .200).")
    assert verdict(Interval(-0.05, -0.1, -0.01), 43, 0.01).endswith("the loss is unlikely to be chance.")


def test_two_runs_share_a_section_when_the_collection_is_the_same() -> None:
    english, chinese = merge([bench(), bench("desktop", 3.2)])
    assert [row.system.kind for row in english.rows] == ["bm25", *["model"] * 8, *["teacher"] * 2]
    assert [row.label for row in chinese.rows] == ["laptop, 2 cores"] * 2
    assert english.best is not None
    assert (english.best.system.name, english.best.label) == ("student-BF16", "desktop")
    assert len(english.distinct_models()) == 4

    first = bench()
    changed = [msgspec.structs.replace(data, fingerprint="other") for data in first.datasets]
    assert len(merge([first, msgspec.structs.replace(first, datasets=changed)])) == 4


def test_joins_tell_rows_of_one_model_apart() -> None:
    data = small().datasets[0]
    twin = msgspec.structs.replace(data.systems[1], join="mass:2", ndcg=Interval(0.4, 0.3, 0.5))
    result = msgspec.structs.replace(
        small(), datasets=[msgspec.structs.replace(data, systems=[*data.systems, twin])]
    )
    (section,) = merge([result])
    assert [section.name(row) for row in section.of_kind("model")] == [
        "my[bold]|Q4 (mass:0.7)",
        "my[bold]|Q4 (mass:2)",
    ]
    assert [row.system.join for row in section.drawn] == ["mass:0.7"]


def boxes(plane: Plane) -> list[tuple[float, float, float, float]]:
    """The labels' rectangles in pixels on the narrowest plot."""
    (x_low, x_high), (y_low, y_high) = plane.x_domain, plane.y_domain
    found = []
    for label in plane.labels():
        x = WIDTH * np.log(label["x"] / x_low) / np.log(x_high / x_low)
        y = HEIGHT * (y_high - label["y"]) / (y_high - y_low)
        width = text_width(label["text"])
        left = x - {"left": 0, "center": 0.5, "right": 1}[label["align"]] * width
        found.append((left, y - 6, left + width, y + 6))
    return found


def test_labels_do_not_overlap() -> None:
    points = [
        Point(f"student-{name}", x, 0.41, 0.5, 0.58)
        for name, x in {"BF16": 60, "Q8_0": 100, "Q4_K_M": 160, "Q2_K": 170}.items()
    ]
    lines = [Line("BM25 .434", 0.434), Line("zero-shot .80", 0.80), Line("few-shot .82", 0.82)]
    placed = boxes(Plane(points, lines))
    for number, (left, top, right, bottom) in enumerate(placed):
        assert left >= 0
        assert right <= WIDTH
        for other in placed[:number]:
            assert right <= other[0] or left >= other[2] or bottom <= other[1] or top >= other[3]


def test_long_labels_keep_both_ends() -> None:
    (label,) = Plane([Point("qe-edge-smollm2-135m-dpo-Q4_K_M.gguf", 60, 0.4, 0.5, 0.6)], []).labels()
    assert label["text"] == "qe-edge-smollm2-…m-dpo-Q4_K_M.gguf"


def test_ticks_of_the_speed_axis() -> None:
    def ticks(*speeds: float) -> list[float]:
        return Plane([Point("a", x, 0.4, 0.5, 0.6) for x in speeds], []).x_ticks()

    assert ticks(60, 160) == [50, 100, 200]
    assert ticks(0.7) == pytest.approx([0.5, 0.6, 0.8, 1])
