"""`data make`: all kinds of files, ids that name the place, and only what changed is read again."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from qe_edge.cli import app
from qe_edge.documents.convert import KINDS, read_texts, without_line_ends
from qe_edge.documents.folder import make_collection
from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.retrieval.datasets import load_collection
from qe_edge.retrieval.judged import is_blank
from qe_edge.work.files import read_json


@pytest.fixture
def notes(tmp_path) -> Path:
    folder = tmp_path / "my notes"
    (folder / "trips").mkdir(parents=True)
    (folder / "trips" / "rome in may.md").write_text(
        "# Hotels\nThe Albergo is quiet.\n\n# Food\nCacio e pepe.\n"
    )
    (folder / "潮水.txt").write_text("月球的引力引起潮汐。\n")
    (folder / "page.html").write_text(
        "<html><head><title>Bread</title><style>p {color: red}</style></head>"
        "<body><nav>Home</nav><h2>Oven</h2><p>Hot, with <a href='x'>steam</a>.</p></body></html>"
    )
    rows = [{"title": "One", "text": "First record."}, {"contents": "Second record."}]
    (folder / "mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / ".hidden.md").write_text("secret")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    return folder


def corpus(out: Path) -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()]
    return {row["_id"]: (row["title"], row["text"]) for row in rows}


def test_every_kind_becomes_passages_whose_ids_name_their_place(notes, tmp_path):
    made = make_collection(notes, tmp_path / "out")
    assert corpus(tmp_path / "out") == {
        "mails.jsonl:1#1": ("One", "First record."),
        "mails.jsonl:2#1": ("mails", "Second record."),
        "page.html#1": ("Bread › Oven", "Hot, with steam."),
        "trips/rome%20in%20may.md#L1": (
            "rome in may › Hotels",
            "The Albergo is quiet.\nFood\nCacio e pepe.",
        ),
        "潮水.txt#L1": ("潮水", "月球的引力引起潮汐。"),
    }
    assert (made.files, made.passages, made.problems, made.unknown) == (4, 5, {}, {".jpg": 1})


def test_only_what_changed_is_read_again(notes, tmp_path, monkeypatch):
    out = tmp_path / "out"
    make_collection(notes, out)
    before = corpus(out)
    read: list[str] = []

    def noted(file: Path):
        read.append(file.name)
        return read_texts(file)

    monkeypatch.setattr("qe_edge.documents.folder.read_texts", noted)
    assert make_collection(notes, out).unchanged == 4
    assert (read, corpus(out)) == ([], before)
    (notes / "潮水.txt").unlink()
    (notes / "new.txt").write_text("A new note.")
    (notes / "mails.jsonl").write_text('{"text": "Another."}\n')
    assert make_collection(notes, out).unchanged == 2
    assert sorted(read) == ["mails.jsonl", "new.txt"]
    assert list(corpus(out)) == [
        "mails.jsonl:1#1",
        "new.txt#L1",
        "page.html#1",
        "trips/rome%20in%20may.md#L1",
    ]
    # As if nothing had been there before.
    make_collection(notes, tmp_path / "anew")
    assert (tmp_path / "anew" / "corpus.jsonl").read_bytes() == (out / "corpus.jsonl").read_bytes()


def test_a_change_of_size_or_of_the_collection_itself_makes_all_anew(notes, tmp_path):
    out = tmp_path / "out"
    make_collection(notes, out)
    assert make_collection(notes, out, words=20).unchanged == 0
    (out / "corpus.jsonl").write_text("")
    assert make_collection(notes, out, words=20).unchanged == 0
    assert len(corpus(out)) == 5


def test_a_file_that_cannot_be_read_is_named_and_tried_again(notes, tmp_path):
    out = tmp_path / "out"
    (notes / "latin.txt").write_bytes("Düsseldorf".encode("latin-1"))
    (notes / "broken.jsonl").write_text('{"text": "good"}\n{"text":\n')
    (notes / "broken.pdf").write_bytes(b"%PDF-1.4 nonsense")
    (notes / "empty.md").write_text("\n")
    (notes / "gone.md").symlink_to(notes / "nowhere.md")
    problems = make_collection(notes, out).problems
    assert set(problems) == {"latin.txt", "broken.jsonl", "broken.pdf", "empty.md", "gone.md"}
    assert problems["gone.md"] == "gone.md: a link to a file that isn't there"
    (notes / "gone.md").unlink()
    assert problems["empty.md"] == "empty.md: holds no text"
    assert "latin.txt:1: not UTF-8 text" in problems["latin.txt"]
    assert "broken.jsonl:2: not a JSON object" in problems["broken.jsonl"]
    assert not any(doc_id.startswith("broken") for doc_id in corpus(out))  # half a file is none
    stat = (notes / "latin.txt").stat()
    (notes / "latin.txt").write_bytes(b"Dusseldorf")
    os.utime(notes / "latin.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert set(make_collection(notes, out).problems) == {"broken.jsonl", "broken.pdf", "empty.md"}


def test_a_real_pdf_and_real_office_files(tmp_path):
    pytest.importorskip("markitdown")
    pytest.importorskip("pypdfium2")
    import openpyxl
    import pptx

    folder = tmp_path / "office"
    folder.mkdir()
    write_docx(folder / "policy.docx", "A burst pipe is covered.")
    slides = pptx.Presentation()
    slide = slides.slides.add_slide(slides.slide_layouts[1])
    slide.shapes.title.text = "Yeast"
    slide.placeholders[1].text = "Turns sugar into gas"
    slides.save(str(folder / "talk.pptx"))
    table = openpyxl.Workbook()
    table.active.append(["city", "rain"])
    table.active.append(["Leeds", 28])
    table.save(folder / "rain.xlsx")
    # Words that stand apart without a blank between them, and one that is divided at a line's end.
    lines = ("[(The) -400 (moon) -400 (pulls)] TJ", "[(the) -400 (at-)] TJ", "(mosphere.) Tj")
    (folder / "tides.pdf").write_bytes(pdf(" 0 -14 Td ".join(lines)))
    assert make_collection(folder, tmp_path / "out").problems == {}
    found = corpus(tmp_path / "out")
    assert found["policy.docx#1"] == ("policy", "A burst pipe is covered.")
    assert "Turns sugar into gas" in found["talk.pptx#1"][1]
    assert "Leeds" in found["rain.xlsx#1"][1]
    assert found["tides.pdf#1"] == ("tides", "The moon pulls\nthe atmosphere.")


def test_the_end_of_a_line_divides_no_word_of_a_pdf():
    assert without_line_ends("en\ufffecoding of\r\nthe sea") == "encoding of\nthe sea"
    assert without_line_ends("月球的引\r\n力，\r\n潮汐 A\r\n水") == "月球的引力，\n潮汐 A\n水"


def write_docx(file: Path, text: str) -> None:
    """The least that Word takes for a document."""
    types = (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument'
        '.wordprocessingml.document.main+xml"/></Types>'
    )
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    relations = (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        f'<Relationship Id="r1" Type="{kind}" Target="word/document.xml"/></Relationships>'
    )
    body = (
        '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>'
        f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:body></w:document>"
    )
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", types)
        archive.writestr("_rels/.rels", relations)
        archive.writestr("word/document.xml", body)


def pdf(shown: str) -> bytes:
    """A page that shows these pieces of text, written by hand."""
    stream = f"BT /F1 12 Tf 72 720 Td {shown} ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(content)
    content += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    content += b"".join(b"%010d 00000 n \n" % place for place in places)
    return content + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start)


def test_without_the_library_an_office_file_is_a_problem_that_says_how(notes, tmp_path, monkeypatch):
    for library, name in (("markitdown", "talk.pptx"), ("pypdfium2", "report.pdf")):
        monkeypatch.setitem(sys.modules, library, None)
        (notes / name).write_bytes(b"x")
    made = make_collection(notes, tmp_path / "out")
    assert "pip install 'qe-edge[documents]'" in made.problems["report.pdf"]
    assert "pip install 'qe-edge[documents]'" in made.problems["talk.pptx"]
    assert made.passages == 5


def test_killed_while_it_writes_it_is_made_anew(notes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".corpus.jsonl.4194305.partial").write_text("half")
    made = make_collection(notes, out)
    (out / "corpus.jsonl").unlink()  # as it is between its two files
    assert make_collection(notes, out).passages == made.passages and (out / "corpus.jsonl").exists()


def test_what_lies_there_is_not_written_over(notes, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "corpus.jsonl").write_text('{"_id": "1", "text": "mine"}\n')
    with pytest.raises(BadArgument, match="holds something other"):
        make_collection(notes, other)
    with pytest.raises(BadArgument, match=r"corpus\.jsonl is a file, so .* choose another folder"):
        make_collection(notes, other / "corpus.jsonl")
    make_collection(notes, tmp_path / "out")
    second = tmp_path / "second"
    second.mkdir()
    (second / "a.txt").write_text("text")
    with pytest.raises(BadArgument, match=r"was made of .*my notes; choose a new folder"):
        make_collection(second, tmp_path / "out")
    with pytest.raises(NotFound, match="no such folder"):
        make_collection(tmp_path / "nothing", tmp_path / "out")
    (second / "a.txt").unlink()
    with pytest.raises(BadInput, match=r"no text that can be read; known are \.txt"):
        make_collection(second, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_its_own_output_inside_the_folder_is_no_note(notes):
    out = notes / "qe-edge-work" / "data" / "notes"
    first = make_collection(notes, out)
    assert make_collection(notes, out).passages == first.passages == 5


@given(st.sampled_from(KINDS), st.binary(max_size=300))
def test_no_content_ends_it(tmp_path_factory, kind, content):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / f"note{kind}").write_bytes(content)
    (folder / "good.txt").write_text("good")
    made = make_collection(folder, folder / "out")
    found = corpus(folder / "out")
    assert "good.txt#L1" in found
    assert made.passages == len(found) and not any(map(is_blank, found))


def test_what_was_made_can_be_searched_at_once(notes, tmp_path):
    make_collection(notes, tmp_path / "out")
    found = CliRunner().invoke(app, ["search", "albergo", "--plain", "-d", str(tmp_path / "out")])
    assert "1. trips/rome%20in%20may.md#L1\n" in found.stdout
    found = CliRunner().invoke(app, ["data", "info", str(tmp_path / "out")])
    assert f"next:   qe-edge data queries {tmp_path / 'out'} --endpoint" in found.stdout
    with pytest.raises(NotFound, match="a file, not a folder"):
        make_collection(notes / "mails.jsonl", tmp_path / "out")
    with pytest.raises(NotFound, match=r"has no corpus\.jsonl.*`qe-edge data make .*` makes one of notes"):
        load_collection(str(notes))


def test_the_command_says_what_it_left_out(notes, tmp_path):
    (notes / "latin.txt").write_bytes("Düsseldorf".encode("latin-1"))
    argv = [sys.executable, "-m", "qe_edge", "data", "make", str(notes), "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "data make: latin.txt:1: not UTF-8 text" in done.stderr
    assert f"5 passages of 5 files in {tmp_path / 'out'}\n" in done.stdout
    assert "left out, since no text is known in them: 1 .jpg\n" in done.stdout
    assert f"next:   qe-edge data queries {tmp_path / 'out'} --endpoint URL --model MODEL" in done.stdout
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, check=True)
    metrics = json.loads(done.stdout)["metrics"]
    assert (metrics["unchanged"], list(metrics["problems"])) == (4, ["latin.txt"])
    assert read_json(tmp_path / "out" / "sources.json")["words"] == 100


def test_a_judged_collections_queries_are_no_notes(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "text": "The moon pulls the sea."}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "what causes tides"}\n')
    (folder / "qrels" / "test.txt").write_text("q1 d1 1\n")
    made = make_collection(folder, tmp_path / "out")
    assert made.passages == 1 and made.problems == {}
