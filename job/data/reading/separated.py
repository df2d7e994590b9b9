"""CSV and TSV -> rows."""

import csv
from collections.abc import Iterator
from pathlib import Path

from job.data.reading.lines import MAX_LINE_BYTES, read_blocks
from job.data.reading.rows import BadRow, Chunk, Row, dump_text, pack_rows
from job.errors import DataError

_HEADER_HINT = "the first line must name every column once"


def read_separated(path: Path, name: str, compression: str | None, delimiter: str) -> Iterator[Chunk]:
    """Yield the records of a file, parsed: where one begins is only known when those before it have been read.

    Raises DataError for a malformed header and for a line that is too long.
    """
    yield from pack_rows(_read_records(_read_lines(path, name, compression), name, delimiter))


def _read_lines(path: Path, name: str, compression: str | None) -> Iterator[str]:
    for block in read_blocks(path, name, compression):
        if block.is_too_long:
            raise DataError(
                f"{name}:{block.number}: a line of more than {MAX_LINE_BYTES >> 20} MiB",
                hint="mend the file: is it cut into lines at all, and is every quote closed?",
            )
        for _, line in block.lines():
            # Bytes that aren't UTF-8 become surrogates here, so that one bad record doesn't end the file.
            yield line.decode("utf-8", "surrogateescape") + "\n"


def _read_records(lines: Iterator[str], name: str, delimiter: str) -> Iterator[tuple[Row | BadRow, int]]:
    # The module's own limit is 128 KiB a field, less than one long document. Without any limit, a quote that is never
    # closed would take the rest of the file into memory.
    csv.field_size_limit(MAX_LINE_BYTES)
    taken: list[str] = []  # the lines of the record
    # strict: otherwise a quote that is never closed swallows the rest of the file in silence.
    reader = csv.reader(_remember(lines, taken), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        taken.clear()
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(f"{name}:{number}: the header can't be read: {error}", hint=_HEADER_HINT) from error
            yield _bad_record(name, number, f"not valid {'CSV' if delimiter == ',' else 'TSV'}: {error}", taken), 0
            continue
        if not fields:
            continue
        if header is None:
            header = _check_header(fields, name, number)
        elif reason := _find_fault(fields, header):
            yield _bad_record(name, number, reason, taken), 0
        else:
            yield Row(name, number, dict(zip(header, fields, strict=True))), sum(map(len, fields))


def _remember(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _find_fault(fields: list[str], header: list[str]) -> str | None:
    if len(fields) != len(header):
        return f"{len(fields)} field{'s' if len(fields) > 1 else ''}, but the header names {len(header)}"
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        return "not valid UTF-8"
    return None


def _bad_record(name: str, number: int, reason: str, lines: list[str]) -> BadRow:
    text = "".join(lines).removesuffix("\n")
    return BadRow(name, number, reason, dump_text(text.encode("utf-8", "surrogateescape")))


def _check_header(fields: list[str], name: str, number: int) -> list[str]:
    header = [field.strip() for field in fields]
    where = f"{name}:{number}: the header"
    if "" in header:
        raise DataError(f"{where} leaves column {header.index('') + 1} without a name", hint=_HEADER_HINT)
    if twice := sorted({field for field in header if header.count(field) > 1}):
        raise DataError(f"{where} names {', '.join(twice)} twice", hint=_HEADER_HINT)
    return header
