"""Reading rows: four formats, quoting, and the errors for broken files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from sparsegrad_lab.tasks.read import check_columns, check_first_row, read_rows

ROWS = [
    {"a": 'first, with "marks"', "b": "one\nline break", "label": "10"},
    {"a": "second", "b": "déjà vu", "label": "9"},
    {"a": "third\twith a tab", "b": "", "label": "9"},
]
CSV = 'a,b,label\n"first, with ""marks""","one\nline break",10\nsecond,déjà vu,9\nthird\twith a tab,,9\n'
TSV = 'a\tb\tlabel\n"first, with ""marks"""\t"one\nline break"\t10\nsecond\tdéjà vu\t9\n"third\twith a tab"\t\t9\n'
CONTENT = {
    ".csv": CSV,
    ".tsv": TSV,
    ".json": json.dumps(ROWS, ensure_ascii=False, indent=1),
    ".jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n",
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("kind", list(CONTENT))
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_same_rows_in_four_formats(kind: str, mark: str, tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, f"rows{kind}", mark + CONTENT[kind]), quoting="minimal") == ROWS


def test_windows_line_ends_and_capital_endings(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "rows.CSV", "a,label\r\nx,1\r\ny,0\r\n")) == [
        {"a": "x", "label": "1"},
        {"a": "y", "label": "0"},
    ]


def test_quotation_marks_are_text_in_tsv_files(tmp_path: Path) -> None:
    """With quotes, the two rows would become one."""
    path = written(tmp_path, "rows.tsv", 'text\tlabel\n"a film\t1\nnot "good"\t0\nan "end\t1\n')
    assert [row["text"] for row in read_rows(path)] == ['"a film', 'not "good"', 'an "end']
    with pytest.raises(ValueError, match=r"the file may be truncated, or use --data.quoting none"):
        read_rows(path, quoting="minimal")
    assert read_rows(written(tmp_path, "rows.csv", 'text,label\n"a, b",1\n'))[0]["text"] == "a, b"


def test_long_fields(tmp_path: Path) -> None:
    """Longer than the csv module's limit of 131,072 characters."""
    for name in ("rows.csv", "rows.tsv"):
        (row,) = read_rows(written(tmp_path, name, "text\n" + "x" * 200_000 + "\n"))
        assert len(row["text"]) == 200_000


@pytest.mark.skipif("SPARSEGRAD_DATA" not in os.environ, reason="SPARSEGRAD_DATA is not set")
def test_the_official_glue_files_are_read_whole() -> None:
    """As rows of your own: one row per line."""
    root = Path(os.environ["SPARSEGRAD_DATA"]) / "glue"
    paths = [path for path in sorted(root.rglob("*.tsv")) if path.parent.name != "CoLA"]
    assert len(paths) >= 11
    for path in paths:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        assert len(read_rows(path)) == len([line for line in lines if line]) - 1


@pytest.mark.skipif("SPARSEGRAD_DATA" not in os.environ, reason="SPARSEGRAD_DATA is not set")
def test_qqp_is_read_whole(tmp_path: Path) -> None:
    content = (Path(os.environ["SPARSEGRAD_DATA"]) / "qqp" / "dev.tsv").read_bytes()
    path = written(tmp_path, "qqp.tsv", content.decode(errors="replace"))  # some bytes of the file are broken
    assert len(read_rows(path, header=["label", "question1", "question2", "id"])) == 10_000


# Truncated in the second row. A cut inside a last field of free text is not detectable.
@pytest.mark.parametrize(
    ("kind", "cut_at", "words"),
    [
        (".csv", "second,dé", r"line 4: expected 3 fields \(a, b, label\), found 2; the file may be truncated"),
        (".csv", '"one\nli', r"line 3: unexpected end of data; the file may be truncated"),
        (".tsv", "second", r"line 4: expected 3 fields \(a, b, label\), found 1; the file may be truncated"),
        (".json", '"b": "dé', r"line \d+: Unterminated string.*; the file may be truncated"),
        (".json", '"9"\n', r"line \d+: Expecting ',' delimiter; the file may be truncated"),
        (".jsonl", '"second", "b"', r"line 2: Expecting ':' delimiter; the file may be truncated"),
    ],
)
def test_truncated_files(kind: str, cut_at: str, words: str, tmp_path: Path) -> None:
    content = CONTENT[kind]
    path = written(tmp_path, f"rows{kind}", content[: content.index(cut_at) + len(cut_at)])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, {words}"):
        read_rows(path, quoting="minimal")


@pytest.mark.parametrize("kind", list(CONTENT))
def test_broken_utf8_with_its_line(kind: str, tmp_path: Path) -> None:
    content = CONTENT[kind].encode()
    at = content.index("é".encode()) + 1  # the second byte of a letter
    line = content[:at].count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"line {line}: expected UTF-8, found the byte 0xc3; convert the file"):
        read_rows(written(tmp_path, f"rows{kind}", content[:at] + content[at + 1 :]))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "expected rows, found none"),
        ("b.csv", "a,b,label\n", "expected rows, found none"),
        ("c.tsv", "", "expected rows, found none"),
        ("d.json", "[]", "expected rows, found none"),
        ("e.jsonl", "\n", "expected rows, found none"),
        ("f.json", '{"rows": []}', r"expected a list of objects, found dict"),
        ("g.json", '["x"]', r"line 1: expected an object, found str"),
        ("h.txt", "x", r"expected a file that ends in .csv, .tsv, .json, .jsonl"),
        ("i.csv", "text,label,label\nx,0,1\n", r"expected different column names, found several columns label"),
        ("o.jsonl", '{"text": NaN, "label": 0}\n', r"line 1: NaN is not a value of JSON"),
        ("k.csv", "\ntext,label\nx,0\n", r"line 1: expected the names of the columns, found an empty line"),
        ("l.csv", "text,label,,\nx,0,,\n", r"line 1: 2 of 4 columns have no name; name or delete them"),
        ("m.csv", "text;label\nx, y;0\n", r"line 1: expected fields that are separated by ',', found one field"),
        ("n.csv", "text\tlabel\nx\t0\n", r"or name a file with tabs \.tsv"),
        ("j.jsonl", '{"text": "x", "label": 0, "label": 1}\n', r"found several columns label"),
        ("k.json", "[" * 100_000, r"line 1: the JSON is nested too deeply"),
        ("l.jsonl", '{"text": "x"}\n{"text": "\\ud800"}', r"line 2: \\ud800 is not a character"),
    ],
    ids=lambda value: value if len(str(value)) < 20 else "",
)  # fmt: skip
def test_bad_files(name: str, content: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=words) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))}: no such file"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": "x", "b": "y"}\n{"a": "x"}', r"line 2: expected a column 'b', found 'a'"),
        ('{"a": "x", "b": null}', r"line 1: expected a text as 'b', found no value"),
        ('{"a": "x", "b": {"c": 1}}', r"line 1: expected a text as 'b', found an object. Conversations are for task"),
        ('{"a": "x", "b": ["c"]}', r"line 1: expected a text as 'b', found a list"),
    ],
)
def test_columns_without_a_text(content: str, words: str, tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, "rows.jsonl", content))
    check_columns(rows, ["a"], "rows.jsonl")
    with pytest.raises(ValueError, match=rf"rows.jsonl, {words}"):
        check_columns(rows, ["a", "b"], "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\n", "expected rows, found none"),
        (
            "a.csv",
            "txt,label\na,b\nragged\n",
            "data.text: expected a column 'text' in .*a.csv, found 'txt', 'label'; did",
        ),
        ("a.tsv", "text\tclass\na\tb\n", "data.label: expected a column 'label' in .*a.tsv, found 'text', 'class'$"),
        ("a.jsonl", '{"text": "a"}\n', "data.label: expected a column 'label' in"),
        ("a.json", '[{"label": "a"}]', "data.text: expected a column 'text' in"),
    ],
)
def test_the_columns_of_the_first_row(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        check_first_row(tmp_path / name, [("data.text", "text"), ("data.label", "label")])


def test_json_booleans_keep_their_spelling(tmp_path: Path) -> None:
    """`--labels true,false` names them as the file does."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": true}\n{"text": "b", "label": false}\n', encoding="utf-8")
    assert [row["label"] for row in read_rows(path)] == ["true", "false"]
