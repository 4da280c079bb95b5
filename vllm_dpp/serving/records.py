"""Records of what pruning did to one request, for people: JSON files in ``dpp.record_dir``.

Two files for each request that asks with ``dpp_record``: ``<request>.kept.json`` from the worker
says which tokens were kept, ``<request>.blocks.json`` from the scheduler says which KV blocks the
request held when it finished. ``<request>`` is vLLM's internal id; it starts with the response id.

Nobody waits for a record: a thread copies what was kept from the device and writes the files,
within moments after the request.
"""

import atexit
import hashlib
import json
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vllm.logger import init_logger

from vllm_dpp.serving.plan import PrunePlan
from vllm_dpp.serving.request_plan import RequestOptions

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec
    from vllm.v1.request import Request

    from vllm_dpp.serving.settings import ServingSettings


logger = init_logger("vllm.vllm_dpp")

Record = dict[str, Any]
MAX_WAITING = 256  # records that are not written yet; more are dropped
FLUSH_TIMEOUT_S = 5.0  # how long a process that ends waits for its last records


def path_of(folder: Path, request_id: str, kind: str) -> Path:
    """The record file of a request.

    Clients choose ids. No character leaves the folder, and no two requests share a file: a name
    that had to be changed or cut ends with a hash of the id.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", request_id)[:180]
    if name != request_id:
        name += "-" + hashlib.sha256(request_id.encode()).hexdigest()[:16]
    return folder / f"{name}.{kind}.json"


class RecordWriter:
    """Writes the records of one kind, in a thread of its own.

    A folder that is gone or full costs the record, not the engine that runs this.

    Args:
        folder: Where.
        kind: ``kept`` or ``blocks``.
        max_records: Files of this kind to keep; the oldest are deleted.
    """

    def __init__(self, folder: Path, kind: str, max_records: int) -> None:
        self._folder, self._kind = folder, kind
        self._files = deque(sorted(folder.glob(f"*.{kind}.json"), key=_age))
        self._max_records = max_records
        self._jobs: queue.Queue[tuple[str, Callable[[], Record]]] = queue.Queue(MAX_WAITING)
        threading.Thread(target=self._work, name=f"dpp-{kind}-records", daemon=True).start()
        atexit.register(self.flush)

    @classmethod
    def of(cls, settings: "ServingSettings", kind: str) -> Self | None:
        """The writer that the settings ask for, if any."""
        if settings.record_path is None:
            return None
        return cls(settings.record_path, kind, settings.max_records)

    def write(self, request_id: str, record: Callable[[], Record]) -> None:
        """Write what ``record`` returns, later. A record of the request that is there is extended:
        lists of ``videos`` are merged by their ``start``.
        """
        try:
            self._jobs.put_nowait((request_id, record))
        except queue.Full:
            logger.warning("no record of %s: %d are waiting to be written", request_id, MAX_WAITING)

    def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> None:
        """Wait until everything has been written, but not for ever."""
        done = threading.Thread(target=self._jobs.join, daemon=True)
        done.start()
        done.join(timeout)

    def _work(self) -> None:
        while True:
            request_id, record = self._jobs.get()
            try:
                self._write(path_of(self._folder, request_id, self._kind), record())
            except Exception as error:  # whatever it is, it is only a record
                logger.warning("no record of %s: %s", request_id, error)
            finally:
                self._jobs.task_done()

    def _write(self, path: Path, record: Record) -> None:
        """Write whole files only, so that a reader never sees half of one."""
        if "videos" in record:
            record = record | {"videos": _merge(_videos_in(path), record["videos"])}
        is_new = not path.exists()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(path)
        if is_new:
            self._files.append(path)
        while len(self._files) > self._max_records:
            self._files.popleft().unlink(missing_ok=True)


def kept_record(request_id: str, videos: Sequence[Record]) -> Record:
    """What was kept of some of a request's videos, each as one of the two entries below."""
    return {"request_id": request_id, "videos": list(videos)}


def entered_entry(
    start: int, grid: Sequence[int], num_entered: int, entered: Sequence[int]
) -> Record:
    """A video of which so many tokens enter: those of its grid that did so in one step. A prefix
    that came from the cache is in no step.
    """
    return {
        "start": start,
        "grid": list(grid),
        "num_entered": num_entered,
        "entered": list(entered),
    }


def kept_entry(start: int, grid: Sequence[int], keep: Sequence[int]) -> Record:
    """A video, by its first prompt position: its token grid and the tokens that were kept, counted
    among those that entered.
    """
    return {"start": start, "grid": list(grid), "keep": list(keep)}


def cached_entry(start: int, grid: Sequence[int]) -> Record:
    """A video that another request had decided: the prefix cache holds it, nothing was selected."""
    return {"start": start, "grid": list(grid), "from_cache": True}


def blocks_record(
    request: "Request",
    plan: PrunePlan | None,
    groups: Sequence["KVCacheGroupSpec"],
    block_ids: Sequence[Sequence[int]],
    prunes: Sequence[str],
) -> Record:
    """The KV blocks that a finishing request holds; its tokens of what is pruned at all."""
    return {
        "request_id": request.request_id,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_tokens": request.num_tokens,
        "num_video_tokens": sum(
            f.mm_position.get_num_embeds() for f in request.mm_features if f.modality in prunes
        ),
        "num_pruned_tokens": plan.num_pruned if plan else 0,
        "num_preemptions": request.num_preemptions,
        "block_size": groups[0].kv_cache_spec.block_size,
        "kv_groups": [
            {
                "kind": type(group.kv_cache_spec).__name__,
                "layers": len(group.layer_names),
                "blocks": len(ids),
            }
            for group, ids in zip(groups, block_ids, strict=True)
        ],
    }


def asks_for_a_record(request: "Request") -> bool:
    """Whether a request of any kind, planned or not, wants a record."""
    if request.sampling_params is None:
        return False
    try:
        return RequestOptions.from_extra_args(request.sampling_params.extra_args).record
    except ValueError:  # refused, and on its way out
        return False


def _merge(before: Sequence[Record], videos: Sequence[Record]) -> list[Record]:
    """Videos by position; pieces of one, and a video that was computed again, become one entry."""
    merged = {video["start"]: video for video in before}
    for video in videos:
        old = merged.get(video["start"], {})
        both = old | video
        for name in ("entered", "keep"):
            if name in old and name in video:
                both[name] = sorted({*old[name], *video[name]})
        if "keep" in both:  # a request that came back after a preemption finds its own blocks
            both.pop("from_cache", None)
        merged[video["start"]] = both
    return [merged[start] for start in sorted(merged)]


def _videos_in(path: Path) -> list[Record]:
    try:
        return json.loads(path.read_text())["videos"]
    except (OSError, ValueError, KeyError):  # none yet, or not one of ours
        return []


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process was faster
        return 0.0
