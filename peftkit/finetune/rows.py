"""Read rows from files, folders and ``datasets`` objects, each with the file and the line it is from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import ContractError, listing, short
from peftkit.finetune.coco import coco_rows, is_coco

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclass(frozen=True)
class Row:
    """One row as it was read.

    Attributes:
        where: File and line, ``"train.jsonl:17"``, or the number of the row.
        values: Column to value; ``None`` if the line could not be read.
        fault: Why the line could not be read.
    """

    where: str
    values: dict[str, Any] | None
    fault: str = ""


def read_rows(source: Any, format: str, name: str) -> Iterator[Row]:
    """Yield the rows of a source in order.

    Args:
        source: A file, a folder, ``hub:NAME[:SPLIT]``, a list of these, a ``datasets.Dataset``, or a list of dictionaries.
        format: Format of the files, or ``"auto"``.
        name: The key of the source in the recipe, for messages.

    Raises:
        ContractError: A file is missing or cannot be read, or the format is not known.
    """
    if isinstance(source, str):
        yield from _read_place(source, format, name)
    elif isinstance(source, (list, tuple)) and source and all(isinstance(s, str) for s in source):
        for place in source:
            yield from _read_place(place, format, name)
    elif isinstance(source, Path):
        yield from _read_place(str(source), format, name)
    elif _is_table(source):
        yield from _read_table(source, name)
    else:
        raise ContractError(
            f"{name}={short(source)} is of type {type(source).__name__}; give a file, a folder, a list of them, hub:NAME, a "
            "datasets.Dataset or a list of dictionaries"
        )


def _is_table(source: Any) -> bool:
    return hasattr(source, "column_names") or (
        isinstance(source, Sequence) and len(source) > 0 and isinstance(source[0], dict)
    )


def _read_table(table: Any, name: str) -> Iterator[Row]:
    if isinstance(table, dict):
        raise ContractError(
            f"{name} is a DatasetDict with the splits {', '.join(map(str, table))}; pass one of them"
        )
    for number, values in enumerate(table, start=1):
        yield Row(f"{name} row {number}", dict(values))


def _read_place(place: str, format: str, name: str) -> Iterator[Row]:
    if place.startswith("hub:"):
        yield from _read_table(_from_hub(place, name), name)
        return
    path = Path(place)
    if not path.exists():
        raise ContractError(
            f"{name}={place!r} does not exist (looked in {Path.cwd()}); correct the path, or write hub:{place} for a data set on the Hub"
        )
    if path.is_dir():
        yield from _read_folder(path, format, name)
        return
    kind = FORMATS.get(path.suffix.lower()) if format == "auto" else format
    if kind is None:
        raise ContractError(
            f"{name}={place!r}: the format of {path.suffix or 'a file without an ending'} is not known; set data.format to one of "
            f"{', '.join(dict.fromkeys(FORMATS.values()))}"
        )
    if kind in ("images", "sounds", "dataset"):
        raise ContractError(f"data.format={kind!r} needs a folder, but {name}={place!r} is a file")
    try:
        yield from _READERS[kind](path)
    except UnicodeDecodeError as error:
        raise ContractError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8") from None


def _from_hub(place: str, name: str) -> Any:
    import datasets

    repository, _, split = place[len("hub:") :].partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train")
    except Exception as error:
        raise ContractError(
            f"{name}={place!r} cannot be loaded from the Hub: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _read_folder(folder: Path, format: str, name: str) -> Iterator[Row]:
    if format == "dataset" or (format == "auto" and (folder / "dataset_info.json").exists()):
        import datasets

        yield from _read_table(datasets.load_from_disk(str(folder)), name)
        return
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for kind, column, ends in (("images", "image", IMAGES), ("sounds", "audio", SOUNDS)):
        found = [file for file in files if file.suffix.lower() in ends]
        if format == kind or (format == "auto" and found):
            if not found:
                raise ContractError(f"{name}={str(folder)!r} has no {kind} ({', '.join(ends)})")
            # The folder of a file is its label, as in datasets' ImageFolder and AudioFolder.
            for file in found:
                yield Row(str(file), {column: str(file), "label": file.parent.name})
            return
    wanted = [
        file
        for file in files
        if (FORMATS.get(file.suffix.lower()) if format == "auto" else format)
        and not file.name.startswith(".")
        and (format == "auto" or FORMATS.get(file.suffix.lower()) == format)
    ]
    if not wanted:
        raise ContractError(
            f"{name}={str(folder)!r} has no file of a known format "
            f"({', '.join(FORMATS)}); its files are:\n{listing([file.name for file in files]) or '  none'}"
        )
    for file in wanted:
        yield from _read_place(str(file), format, name)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_row(line, f"{path}:{number}")


def _json_row(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        return Row(where, None, f"no valid JSON ({error})")
    if not isinstance(values, dict):
        return Row(where, None, f"a JSON {type(values).__name__} instead of an object with columns")
    return Row(where, values)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ContractError(
            f"{path} is no valid JSON ({error}); for one object a line use the ending .jsonl or data.format=jsonl"
        ) from None
    if is_coco(found):
        for name, values, fault in coco_rows(found, path.parent):
            yield Row(f"{path} {name}", values, fault)
        return
    if isinstance(found, dict):
        lists = [one for one in found.values() if isinstance(one, list)]
        if len(lists) != 1:
            raise ContractError(
                f"{path} is a JSON object with {len(lists)} lists; it must be a list of rows, or an object with one list"
            )
        found = lists[0]
    if not isinstance(found, list):
        raise ContractError(
            f"{path} must be a list of rows, but it is of type {type(found).__name__}"
        )
    for number, values in enumerate(found, start=1):
        good = isinstance(values, dict)
        fault = "" if good else f"a {type(values).__name__} instead of an object with columns"
        yield Row(f"{path} row {number}", values if good else None, fault)


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(f"{path}:{reader.line_num}", None, f"no valid CSV ({error})")
                return
            where = f"{path}:{reader.line_num}"
            # csv gives the key None to values without a column, and the value None to columns without a value.
            if None in values:
                columns = len(reader.fieldnames or ())
                yield Row(where, None, f"more values than the {columns} columns of the first line")
            elif None in values.values():
                yield Row(where, None, "fewer values than the first line has columns")
            else:
                yield Row(where, values)


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path} row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise ContractError(
            f"{path} cannot be read as Parquet: {' '.join(str(error).split())}"
        ) from error


def _read_text(path: Path) -> Iterator[Row]:
    """Each paragraph, or each line if there is no empty line, is a row."""
    content = path.read_text(encoding="utf-8-sig")
    by_paragraph = "\n\n" in content.strip().replace("\r\n", "\n")
    start, part = 1, []
    lines = content.replace("\r\n", "\n").split("\n")
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip() and by_paragraph:
            start = start if part else number
            part.append(line)
        elif line.strip():
            yield Row(f"{path}:{number}", {"text": line})
        elif part:
            yield Row(f"{path}:{start}", {"text": "\n".join(part)})
            part = []


_READERS = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "text": _read_text,
}
