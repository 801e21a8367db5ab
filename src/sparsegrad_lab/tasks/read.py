"""Text files -> rows of strings, each with its line number; what is wrong with a file is said with the line."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_READERS = (".csv", ".tsv", ".json", ".jsonl")


class Row(dict[str, str]):
    """Column -> value, as strings; `line` is where it stands in the file (1 is the first)."""

    line: int = 0


def read_rows(
    path: Path, *, header: Sequence[str] | None = None, quoted: bool = True, skip_ragged: bool = False
) -> list[Row]:
    """Rows of a `.csv`, `.tsv`, `.json` (a list of objects) or `.jsonl` file in UTF-8.

    Args:
        path: the file; its ending says what it is.
        header: column names of a TSV or CSV file that has no header line.
        quoted: whether quotation marks mean something in a CSV or TSV file. In GLUE's they are text.
        skip_ragged: leave out rows with too few or too many fields, and log how many, in place of an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, no UTF-8, of another kind, or a row has too few or too many fields.
    """
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(_READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    text = _text(path)
    if kind in (".csv", ".tsv"):
        rows = list(_delimited(text, path, header, quoted, skip_ragged))
    else:
        found = _json(text, path) if kind == ".json" else _json_lines(text, path)
        rows = [_row(item, path, number) for number, item in found]
    if not rows:
        raise ValueError(f"{path}: expected rows, found none; the file may be cut off")
    return rows


def read_objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a `.jsonl` file in UTF-8 as they are, each with its line number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8, or a line is no JSON object.
    """
    found = list(_json_lines(_text(path), path))
    for number, item in found:
        _check_object(item, path, number)
    return found


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")  # some of GLUE's begin with a byte order mark
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8, found the byte 0x{content[error.start]:02x}; convert the file"
        ) from None


def _delimited(text: str, path: Path, header: Sequence[str] | None, quoted: bool, skip_ragged: bool) -> Iterator[Row]:
    # A quoted field may hold line breaks; an unquoted line is one row, whatever marks are in it.
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=quoted)
    ragged = 0
    try:
        names = list(header) if header is not None else next(reader, [])
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(names):
                if skip_ragged:
                    ragged += 1
                    continue
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(names)} fields ({', '.join(names)}), found "
                    f"{len(fields)}; the file may be cut off here"
                )
            row = Row(zip(names, fields, strict=True))
            row.line = reader.line_num
            yield row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; the file may be cut off here") from None
    if ragged:
        logger.warning("%s: %d rows left out, which have too few or too many fields", path, ragged)


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error.msg}; the file may be cut off here") from None
            yield number, found


def _json(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}; the file may be cut off here") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(found).__name__}")
    yield from enumerate(found, start=1)


def _check_object(item: Any, path: Path, number: int) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{path}, line {number}: expected an object, found {type(item).__name__}")


def _row(item: Any, path: Path, number: int) -> Row:
    _check_object(item, path, number)
    missing = [name for name, value in item.items() if value is None]
    if missing:
        raise ValueError(f"{path}, line {number}: no value for {', '.join(missing)}")
    row = Row({name: value if isinstance(value, str) else str(value) for name, value in item.items()})
    row.line = number
    return row
