import pytest

from qe_edge.errors import BadInput, NotFound
from qe_edge.records import Expansion, encode_jsonl, read_jsonl

ROW = Expansion("demo-en", "q1", "tides", "en", "teacher", "zero-shot", "the moon\u2028and the sun\x85 too")


def test_rows_survive_and_only_newlines_split_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(encode_jsonl([ROW, ROW]) + b"\n")
    assert list(read_jsonl(file, Expansion)) == [ROW, ROW]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "malformed"),
        (b'{"dataset": "d"}', "missing required field"),
        (encode_jsonl([ROW]).replace(b'"lang":"en"', b'"lang":"fr"').strip(), "invalid enum value 'fr'"),
        (encode_jsonl([ROW]).replace(b'"text"', b'"txt"').strip(), "unknown field `txt`"),
        (encode_jsonl([ROW]).replace(b'"q1"', b"1").strip(), "expected `str`, got `int`"),
        (b'{"dataset": "\xff"}', "utf-8"),
        (b"17", "no json object"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, reason):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(encode_jsonl([ROW]) + b"\n" + line + b"\n")
    with pytest.raises(BadInput) as error:
        list(read_jsonl(file, Expansion))
    assert str(error.value).startswith(f"{file}:3: not a valid expansion (as `qe-edge teach` writes them): ")
    assert reason in str(error.value).lower()


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(NotFound, match=r"nothing\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "nothing.jsonl", Expansion))
    with pytest.raises(BadInput, match="is a folder"):
        list(read_jsonl(tmp_path, Expansion))
