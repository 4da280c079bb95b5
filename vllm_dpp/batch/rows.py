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
    """

    id: str
    video: str
    question: str
    video_share: float | None = None
    retention_ratio: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_rows(source: Path, question: str | None = None) -> list[Row]:
    """All rows of a folder, whose videos are found at any depth, or of a table.

    Args:
        source: A folder of videos; or a `.parquet` or `.jsonl` table with the columns `video` (a
            URL, or a path that begins where the table lies), `question` and, if need be, `id`,
            `video_share` and `retention_ratio`. Other columns are not read.
        question: Of every row that has none of its own.

    Raises:
        ValueError: A row cannot be understood, two have the same id, or there is none. Whether
            its video can be read is not asked here.
        OSError: `source` cannot be read.
    """
    if source.is_dir():
        rows = _of_folder(source, question)
    else:
        base = source.resolve().parent
        rows = [
            _of_record(record, question, base, f"{source}, row {number}")
            for number, record in enumerate(_records(source), start=1)
        ]
    if not rows:
        raise ValueError(f"{source} has no rows")
    _require_unique(rows, source)
    return rows


def _of_folder(folder: Path, question: str | None) -> list[Row]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ValueError(f"{folder} has no videos ({', '.join(VIDEO_SUFFIXES)})")
    if question is None:
        raise ValueError(f"{folder} is a folder of videos, which needs --question")
    return [Row(str(p.relative_to(folder)), str(p.resolve()), question) for p in found]


def _records(table: Path) -> list[dict[str, Any]]:
    if table.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(table).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{table} is no parquet file: {error}") from error
    if table.suffix != ".jsonl":
        raise ValueError(f"{table} must be a folder of videos, a .parquet or a .jsonl file")
    records = []
    for number, line in enumerate(table.read_text().splitlines(), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{table}, line {number} is not JSON: {error}") from error
    return records


def _of_record(record: Any, question: str | None, base: Path, where: str) -> Row:
    """A row of a table; a column without a value is as one that is not there."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} must be an object with video and question, got {record!r}")
    given = {name: value for name, value in record.items() if value is not None}
    text = given.get("question", question)
    for name, value in (("video", given.get("video")), ("question", text)):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where}: {name} must be a text, got {value!r}")
    for name in RATIOS:
        if name in given and not is_number(given[name]):
            raise ValueError(f"{where}: {name} must be a number, got {given[name]!r}")
    return Row(
        str(given.get("id", f"{given['video']} {text}")),
        _located(given["video"], base),
        text,
        *(float(given[name]) if name in given else None for name in RATIOS),
    )


def _located(video: str, base: Path) -> str:
    is_url = re.match(r"(https?|file)://|data:", video)
    return video if is_url else str((base / video).resolve())


def _require_unique(rows: Iterable[Row], source: Path) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ValueError(f"{source}: two rows have the id {row.id!r}; give each its own")
        seen.add(row.id)
