"""The answers' folder: what has been answered stays so, whenever a run ends.

`answers.jsonl` gets a line a row as it is answered, and is all that a later run goes by. The other
form, `answers.parquet`, is made of it when every row is there.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from vllm_dpp.batch.rows import RATIOS, Row

ASKED = ("question", *RATIOS)
LINES, TABLE, SETTINGS = "answers.jsonl", "answers.parquet", "settings.json"

Record = dict[str, Any]
"""A row's fields, and the columns of `vllm_dpp.batch.replica.COLUMNS`."""


class Answers:
    """The folder, held by one run at a time.

    Args:
        folder: Made where there is none.
        settings: What an answer depends on beside its row.

    Raises:
        ValueError: What is there came from other settings or is no answers, or another run writes
            there.
        OSError: It cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"another run writes to {folder}: wait for it, or stop it") from None
        try:
            self._check_settings(settings)
            self.records = self._read()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def num_errors(self) -> int:
        return sum(record["error"] is not None for record in self.records.values())

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those that have neither an answer nor an error.

        Raises:
            ValueError: One that has an answer asks something else now.
        """
        for row in rows:
            record = self.records.get(row.id, {"error": ""})
            for name in ASKED:
                if record["error"] is None and record[name] != getattr(row, name):
                    raise ValueError(
                        f"{self.folder} has the row {row.id!r} with {name} {record[name]!r}, not "
                        f"{getattr(row, name)!r}: give another --output, or the row another id"
                    )
        return [row for row in rows if row.id not in self.records]

    def forget_errors(self) -> None:
        """Make rows with errors missing again."""
        self.records = {i: r for i, r in self.records.items() if r["error"] is None}
        self._replace(LINES, "".join(map(_line, self.records.values())).encode())

    def add(self, records: Iterable[Record]) -> int:
        """Append records to the file, at once; of an id that is there the first one counts.

        Returns:
            How many were added.
        """
        new = {record["id"]: record for record in records if record["id"] not in self.records}
        with (self.folder / LINES).open("a") as file:
            file.write("".join(map(_line, new.values())))
        self.records |= new
        return len(new)

    def write_parquet(self, rows: Iterable[Row]) -> Path:
        """Write all records of `rows`, in their order, as a table.

        Returns:
            Its path.
        """
        import pyarrow
        import pyarrow.parquet

        from vllm_dpp.batch.replica import COLUMNS

        text = {name: pyarrow.string() for name in ("id", "video", "question")}
        ratios = {name: pyarrow.float64() for name in RATIOS}
        own = {name: getattr(pyarrow, kind)() for name, kind in COLUMNS.items()}
        schema = pyarrow.schema({**text, **ratios, **own})
        found = [self.records[row.id] for row in rows if row.id in self.records]
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found, schema), sink)
        return self._replace(TABLE, sink.getvalue())

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path, text = self.folder / SETTINGS, json.dumps(settings, indent=1, default=str)
        if not path.exists():
            self._replace(SETTINGS, text.encode())
            return
        before, now = json.loads(path.read_text()), json.loads(text)
        if other := [name for name in now if before.get(name) != now[name]]:
            raise ValueError(
                f"{self.folder} has answers of other settings: {other[0]} was "
                f"{before.get(other[0])!r}, is {now[other[0]]!r}; give another --output"
            )

    def _read(self) -> dict[str, Record]:
        """By id. What was being added when a run was killed has no line end, and is cut off."""
        path = self.folder / LINES
        if not path.exists():
            return {}
        whole, end, torn = path.read_text().rpartition("\n")
        if torn:
            os.truncate(path, len((whole + end).encode()))
        try:
            records = [json.loads(line) for line in whole.split("\n") if line]
            return {record["id"]: record for record in records}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has a line that is no answer: {error}") from error

    def _replace(self, name: str, content: Any) -> Path:
        """Write a whole file, which is there in full or as it was."""
        path, new = self.folder / name, self.folder / f".{name}.new"
        new.write_bytes(content)
        return new.replace(path)


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
