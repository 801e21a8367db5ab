"""Read rows from CSV, TSV, JSON and JSON lines files. Errors name the file and the line."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_ENDINGS = (".csv", ".tsv", ".json", ".jsonl")


class Row(dict[str, Any]):
    """Column -> value: strings, or lists, objects and null as JSON has them; `line` counts from 1."""

    line: int = 0


def read_rows(
    path: Path, *, header: Sequence[str] | None = None, quoting: str | None = None, skip_ragged: bool = False,
    replace_broken: bool = False,
) -> list[Row]:  # fmt: skip
    """Read a `.csv`, `.tsv`, `.json` (a list of objects) or `.jsonl` file in UTF-8. Numbers become strings.

    Args:
        path: the file.
        header: column names of a CSV or TSV file without a header line.
        quoting: "minimal": fields of CSV and TSV files may be in quotation marks; "none": quotation marks are text;
            None: "minimal" for CSV, "none" for TSV.
        skip_ragged: skip rows with too few or too many fields, and log how many, instead of raising an error.
        replace_broken: put U+FFFD in place of bytes that are not UTF-8, and log in how many lines, likewise.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not UTF-8 or of another type; a row has too few or too many fields; two columns
            have the same name.
    """
    rows = list(_rows(path, header, quoting, skip_ragged, replace_broken))
    if not rows:
        raise ValueError(f"{path}: expected rows, found none")
    return rows


def check_first_row(path: Path, columns: Iterable[tuple[str, str]], quoting: str | None = None) -> None:
    """Raise an error if a file has no rows, or if its first row lacks a column. The other rows are not parsed.

    Args:
        path: the file.
        columns: (setting, column) pairs; the setting is for messages.
        quoting: see `read_rows`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing; and see `read_rows`.
    """
    first = next(_rows(path, None, quoting, False, False), None)
    if first is None:
        raise ValueError(f"{path}: expected rows, found none")
    for setting, column in columns:
        if column not in first:
            near = get_close_matches(column, first, n=1)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{setting}: expected a column {column!r} in {path}, found {', '.join(map(repr, first))}{advice}"
            )


def _rows(
    path: Path, header: Sequence[str] | None, quoting: str | None, skip_ragged: bool, replace_broken: bool
) -> Iterator[Row]:
    """Parse the rows one after the other."""
    kind = path.suffix.lower()
    check_rows_file(path)
    text = _text(path, replace_broken)
    if kind in (".csv", ".tsv"):
        quoted = quoting == "minimal" or (quoting is None and kind == ".csv")
        yield from _delimited(text, path, header, quoted, skip_ragged)
    else:
        objects = _json(text, path) if kind == ".json" else _json_lines(text, path)
        yield from (_row(item, path, number) for number, item in objects)


def check_rows_file(path: Path) -> None:
    """Raise an error for a file that `read_rows` cannot read, without reading it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name has another ending.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(_ENDINGS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def check_columns(rows: Iterable[Row], columns: Sequence[str], where: str) -> None:
    """Raise ValueError for the first row in which one of the columns is missing or not a text.

    Args:
        rows: the rows.
        columns: names of the columns.
        where: the file, for messages.
    """
    for row in rows:
        for column in columns:
            place = f"{where}, line {row.line}: "
            if column not in row:
                raise ValueError(f"{place}expected a column {column!r}, found {', '.join(map(repr, row))}")
            if row[column] is None:
                raise ValueError(f"{place}expected a text as {column!r}, found no value")
            if not isinstance(row[column], str):
                found = "a list" if isinstance(row[column], list) else "an object"
                raise ValueError(
                    f"{place}expected a text as {column!r}, found {found}. Conversations are for task text, in a "
                    "column named messages or conversations, or in the two columns prompt and completion"
                )


def read_objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the objects of a `.jsonl` file in UTF-8, unchanged, each with its line number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, or a line is not a JSON object.
    """
    return objects_in(path.read_bytes(), path)


def objects_in(content: bytes, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """As `read_objects`, for the content of a file or its beginning."""
    found = list(_json_lines(_decoded(content, path), path))
    for number, item in found:
        _check_object(item, path, number)
    return found


def _text(path: Path, replace_broken: bool = False) -> str:
    return _decoded(path.read_bytes(), path, replace_broken)


def _decoded(content: bytes, path: Path, replace_broken: bool = False) -> str:
    try:
        return content.decode("utf-8-sig")  # some GLUE files begin with a byte order mark
    except UnicodeDecodeError as error:
        if replace_broken:
            text = content.decode("utf-8-sig", errors="replace")
            lines = sum("\ufffd" in line for line in text.split("\n"))
            logger.warning("%s: %d lines have bytes that are not UTF-8", path, lines)
            return text
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8, found the byte 0x{content[error.start]:02x}; convert the file"
        ) from None


def _delimited(text: str, path: Path, header: Sequence[str] | None, quoted: bool, skip_ragged: bool) -> Iterator[Row]:
    # A quoted field may contain line breaks; without quoting, each line is a row.
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=quoted)
    ragged = 0
    try:
        with _long_fields():
            names = list(header) if header is not None else next(reader, [])
            if not names and text.strip():
                raise ValueError(f"{path}, line 1: expected the names of the columns, found an empty line; remove it")
            if "" in names and header is None:
                raise ValueError(
                    f"{path}, line 1: {names.count('')} of {len(names)} columns have no name; name or delete them"
                )
            other = next((mark for mark in ";\t," if mark != delimiter and mark in names[0]), None) if names else None
            if len(names) == 1 and other is not None:
                raise ValueError(
                    f"{path}, line 1: expected fields that are separated by {delimiter!r}, found one field, "
                    f"{names[0]!r}; separate them by {delimiter!r}, or name a file with tabs .tsv"
                )
            _check_names(names, path)
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(names):
                    if skip_ragged:
                        ragged += 1
                        continue
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(names)} fields ({', '.join(names)}), found "
                        f"{len(fields)}; {_advice(text, quoted)}"
                    )
                row = Row(zip(names, fields, strict=True))
                row.line = reader.line_num
                yield row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; {_advice(text, quoted)}") from None
    if ragged:
        logger.warning("%s: skipped %d rows with too few or too many fields", path, ragged)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters per field."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _advice(text: str, quoted: bool) -> str:
    if '"' not in text:
        return "the file may be truncated"
    return f"the file may be truncated, or use --data.quoting {'none' if quoted else 'minimal'}"


def _check_names(names: Sequence[str], path: Path) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: expected different column names, found several columns {', '.join(repeated)}")


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parsed(line, path, number)


def _json(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    found = _parsed(text, path)
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(found).__name__}")
    yield from enumerate(found, start=1)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            _check_names([name for name, _ in pairs], path)
        return found

    def no_number(name: str) -> None:
        raise ValueError(f"{path}, line {line or 1}: {name} is not a value of JSON; write null or a number")

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
        if "\\ud" in text.lower():  # half of a pair of surrogates is no character
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{path}, line {line or 1}: {code} is not a character; repair the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line or error.lineno}: {error.msg}; the file may be truncated") from None
    except RecursionError:
        raise ValueError(f"{path}, line {line or 1}: the JSON is nested too deeply") from None


def _check_object(item: Any, path: Path, number: int) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{path}, line {number}: expected an object, found {type(item).__name__}")


def _row(item: Any, path: Path, number: int) -> Row:
    _check_object(item, path, number)
    kept = (str, list, dict, type(None))
    row = Row({name: value if isinstance(value, kept) else json.dumps(value) for name, value in item.items()})
    row.line = number
    return row
