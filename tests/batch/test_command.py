"""`vllm-dpp batch` with real engines: killed, resumed, in a cluster, held against a server."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from tests.e2e.server import serve
from vllm_dpp.quality.model import TRAINED
from vllm_dpp.quality.questions import make_questions
from vllm_dpp.quality.render import FPS, render
from vllm_dpp.quality.scene import DENSE, make_scene
from vllm_dpp.toy.video import write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FLAGS = ["--max-model-len", "1024", "--dtype", "float32", "--enforce-eager", "--video-share", "0.3"]
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled"}  # a token may lie in the home folder
MAX_TOKENS = 16
SHARES = (None, 0.2, 1.0)
NUM_VIDEOS, NUM_QUESTIONS = 12, 5
ERRORS = {
    "no mp4": "Could not open video stream",
    "gone": "No such file",
    "refused": "dpp_video_share must be a number in (0, 1], got 2.0",
    "no question": "question must be a text, got None",
}


@dataclass(frozen=True)
class Batch:
    """A table of rows and the videos beside it, which has rows that end in `ERRORS`."""

    folder: Path
    table: Path
    rows: list[dict[str, Any]]

    @property
    def good(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["id"] not in ERRORS]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder, rows = tmp_path_factory.mktemp("batch"), []
    for seed in range(200_012, 200_012 + NUM_VIDEOS):
        name = f"{seed} #%20ä.mp4"
        write_mp4(folder / name, render(scene := make_scene(seed, DENSE)), FPS)
        for question in make_questions(scene)[:NUM_QUESTIONS]:
            share = SHARES[len(rows) % len(SHARES)]
            row = {"id": f"{seed} {question.text}", "video": name, "question": question.text}
            rows.append(row | {"video_share": share})
    (folder / "no.mp4").write_bytes(b"no mp4")
    one = rows[0]
    rows[3:3] = [
        one | {"id": "no mp4", "video": "no.mp4"},
        one | {"id": "gone", "video": "gone.mp4"},
        one | {"id": "refused", "video_share": 2.0},
        one | {"id": "no question", "question": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return Batch(folder, folder / "rows.parquet", rows)


@pytest.fixture(scope="module")
def of_server(batch: Batch) -> dict[str, str]:
    """What a server of the same flags answers, by row."""
    arguments = [*FLAGS, "--allowed-local-media-path", str(batch.folder)]
    with serve(TRAINED, batch.folder / "server.txt", arguments) as server:
        return {row["id"]: ask(server, batch.folder, row) for row in batch.good}


def ask(server: Any, folder: Path, row: dict[str, Any]) -> str:
    content = [
        {"type": "video_url", "video_url": {"url": (folder / row["video"]).as_uri()}},
        {"type": "text", "text": row["question"]},
    ]
    share = row["video_share"]
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    if share is not None:
        body["vllm_xargs"] = {"dpp_video_share": share}
    status, reply = server.post("/v1/chat/completions", body)
    assert status == 200, reply
    return reply["choices"][0]["message"]["content"]


@contextmanager
def running(batch: Batch, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, which has ended with all its processes when the block has."""
    command = [
        *(sys.executable, "-m", "vllm_dpp", "batch", str(TRAINED), *FLAGS),
        *("--input", str(batch.table), "--output", str(batch.folder / "answers")),
        *("--max-tokens", str(MAX_TOKENS), *arguments),
    ]
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with (batch.folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def run(batch: Batch, *arguments: str) -> str:
    """What the command prints to the end."""
    with running(batch, *arguments) as process:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, (batch.folder / "log.txt").read_text()[-4000:]
        return output


def lines(batch: Batch) -> list[str]:
    path = batch.folder / "answers" / "answers.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def by_id(batch: Batch) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in lines(batch)]
    records = {record["id"]: record for record in found}
    assert len(records) == len(found)
    return records


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(batch: Batch) -> list[str]:
    """The lines of a run that was killed between its first answers and its last."""
    with running(batch, "--rows-in-flight", "4") as process:
        wait_until(lambda: len(lines(batch)) > 4, 300)
        family = psutil.Process(process.pid).children(recursive=True)
        # Agents of Ray end a minute later, by themselves.
        engines = [p for p in family if re.match("ray::MapWorker|VLLM", " ".join(p.cmdline()))]
        process.kill()
        process.wait()
    assert len(engines) > 2  # the replica, its engine and worker
    wait_until(lambda: not any(map(lives, engines)), 30)
    assert 4 < len(lines(batch)) < len(batch.rows)
    return lines(batch)


@pytest.fixture(scope="module")
def resumed(batch: Batch, killed: list[str]) -> str:
    return run(batch, "--replicas", "2", "--rows-in-flight", "8", "--format", "parquet")


def test_a_killed_run_goes_on(batch: Batch, killed: list[str], resumed: str) -> None:
    whole = [line for line in killed if line.endswith("}")]
    assert f"{len(batch.rows)} rows, {len(whole)} done before" in resumed
    assert lines(batch)[: len(whole)] == whole
    assert by_id(batch).keys() == {row["id"] for row in batch.rows}
    assert len({record["replica"] for record in by_id(batch).values()} - {None}) == 3


def test_answers_are_a_servers(batch: Batch, resumed: str, of_server: dict[str, str]) -> None:
    found = by_id(batch)
    assert {name: found[name]["answer"] for name in of_server} == of_server
    prompt_tokens = {row["video_share"]: found[row["id"]]["prompt_tokens"] for row in batch.good}
    assert prompt_tokens[0.2] < prompt_tokens[None] < prompt_tokens[1.0]


def test_bad_rows_stop_no_other(batch: Batch, resumed: str) -> None:
    errors = {i: r["error"] for i, r in by_id(batch).items() if r["error"] is not None}
    assert errors.keys() == ERRORS.keys()
    assert all(ERRORS[name] in error for name, error in errors.items())
    assert f"{len(batch.good)} answered, {len(ERRORS)} errors, 0 missing; --retry-errors" in resumed


def test_the_table_has_what_the_lines_have(batch: Batch, resumed: str) -> None:
    path = batch.folder / "answers" / "answers.parquet"
    found = by_id(batch)
    assert pyarrow.parquet.read_table(path).to_pylist() == [found[row["id"]] for row in batch.rows]


def test_nothing_is_left_to_do(batch: Batch, resumed: str) -> None:
    before = lines(batch)
    assert f"{len(batch.rows)} rows, {len(batch.rows)} done before" in run(batch)
    assert lines(batch) == before


def test_errors_are_tried_again_in_a_cluster(
    batch: Batch, resumed: str, of_server: dict[str, str]
) -> None:
    before = {name: record for name, record in by_id(batch).items() if record["error"] is None}
    good = batch.good[0]
    (batch.folder / "gone.mp4").write_bytes((batch.folder / good["video"]).read_bytes())
    with cluster() as address:
        output = run(batch, "--retry-errors", "--address", address)
    assert f"{len(batch.good) + 1} answered, {len(ERRORS) - 1} errors, 0 missing" in output
    found = by_id(batch)
    assert found.items() >= before.items()
    assert found["gone"]["answer"] == of_server[good["id"]]


@contextmanager
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of one machine."""
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.1", "--port", address.partition(":")[2]),
        *("--num-cpus", "2", "--object-store-memory", str(100 << 20)),
        *("--include-dashboard", "false", "--disable-usage-stats"),
    ]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=quiet, stderr=quiet) as head:
        try:
            wait_until(lambda: answers(address), 60)
            yield address
        finally:
            head.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(address: str) -> bool:
    ip, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((ip, int(port))) == 0


def test_no_cluster_answers(batch: Batch, resumed: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "vllm_dpp", "batch", str(TRAINED), *FLAGS),
        *("--input", str(batch.table), "--output", str(tmp_path), "--address", "127.0.0.1:9"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--address 127.0.0.1:9: no Ray cluster answers" in done.stderr
