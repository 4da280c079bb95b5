"""What is asked: a folder of videos with one question, or a table with a question a row."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_dpp.pruning.checks import is_number

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
RATIOS = ("video_share", "retention_ratio")


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one video.

    Args:
        id: Its name, unlike that of any other row.
        video: Absolute path, or a URL that vLLM fetches.
        question: The text beside the video.
        video_share: Of this row, as a request's `dpp_video_share`; `None` takes the engine's.
        retention_ratio: Likewise, as `dpp_retention_ratio`.
        fault: Why it cannot be asked; the fields at fault are empty.
    """

    id: str
    video: str
    question: str
    video_share: float | None = None
    retention_ratio: float | None = None
    fault: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields but `fault`."""
        return {name: value for name, value in asdict(self).items() if name != "fault"}


def read_rows(source: Path, question: str | None = None) -> list[Row]:
    """All rows of a folder, whose videos are found at any depth, or of a table.

    Args:
        source: A folder of videos; or a `.parquet` or `.jsonl` table with the columns `video` (a
            URL, or a path that begins where the table lies), `question` and, if need be, `id`,
            `video_share` and `retention_ratio`. Other columns are not read.
        question: Of every row that has none of its own.

    Raises:
        ValueError: `source` is no such thing, two rows have the same id, or none can be asked. A
            row's own fault is in the row; whether its video can be read is not asked here.
        OSError: `source` cannot be read.
    """
    if source.is_dir():
        rows = _of_folder(source, question)
    else:
        base = source.resolve().parent
        rows = [
            _of_record(record, question, base, number)
            for number, record in enumerate(_records(source), start=1)
        ]
    if not rows:
        raise ValueError(f"{source} has no rows")
    if all(row.fault for row in rows):
        raise ValueError(f"{source}, {rows[0].id}: {rows[0].fault}; no other row can be asked")
    _require_unique(rows, source)
    return rows


def videos_in(folder: Path) -> list[Path]:
    """All videos below `folder`, in order.

    Raises:
        ValueError: there are none.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ValueError(f"{folder} has no videos ({', '.join(VIDEO_SUFFIXES)})")
    return found


def _of_folder(folder: Path, question: str | None) -> list[Row]:
    found = videos_in(folder)
    if not question:
        raise ValueError(f"{folder} is a folder of videos, which needs --question")
    return [Row(str(p.relative_to(folder)), str(p.resolve()), question) for p in found]


def _records(table: Path) -> list[Any]:
    """What the table has, a row each; a line that is not JSON as its text."""
    if table.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(table).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{table} is no parquet file: {error}") from error
    if table.suffix != ".jsonl":
        raise ValueError(f"{table} must be a folder of videos, a .parquet or a .jsonl file")
    try:
        lines = table.read_text().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8: {error}") from error
    return [_parsed(line) for line in lines if line.strip()]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def _of_record(record: Any, question: str | None, base: Path, number: int) -> Row:
    name = None
    try:
        if not isinstance(record, Mapping):
            raise ValueError(f"must be an object with video and question, got {record!r}")
        # Arrow has a null, pandas a NaN, where a row lacks a value.
        given = {
            key: value for key, value in record.items() if value is not None and value == value
        }
        name = given.get("id")
        video = _text("video", given.get("video"))
        asked = _text("question", given.get("question", question))
        return Row(
            f"{video} {asked}" if name is None else str(name),
            _located(video, base),
            asked,
            _number("video_share", given.get("video_share")),
            _number("retention_ratio", given.get("retention_ratio")),
        )
    except ValueError as error:
        return Row(f"row {number}" if name is None else str(name), "", "", fault=str(error))


def _text(name: str, value: Any) -> str:
    """A text that can be sent: not empty, and no half of a surrogate pair in it."""
    if not isinstance(value, str) or not value or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return value


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _located(video: str, base: Path) -> str:
    is_url = re.match(r"(https?|file)://|data:", video)
    return video if is_url else str((base / video).resolve())


def _require_unique(rows: Iterable[Row], source: Path) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ValueError(f"{source}: two rows have the id {row.id!r}; give each its own")
        seen.add(row.id)
