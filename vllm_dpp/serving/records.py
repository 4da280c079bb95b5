"""Records of what pruning did to one request, for people: JSON files in ``dpp.record_dir``.

Two files for each request that asks with ``dpp_record``: ``<request>.kept.json`` from the worker
says which tokens were kept, ``<request>.blocks.json`` from the scheduler says which KV blocks the
request held when it finished. ``<request>`` is vLLM's internal id; it starts with the response id.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_dpp.serving.plan import PrunePlan
from vllm_dpp.serving.request_plan import RequestOptions

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec
    from vllm.v1.request import Request


logger = init_logger("vllm.vllm_dpp")


def path_of(folder: Path, request_id: str, kind: str) -> Path:
    """The record file of a request; clients choose ids, so no character leaves the folder."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", request_id)[:200]
    return folder / f"{name}.{kind}.json"


def write_kept(folder: Path, request_id: str, videos: Sequence[dict[str, Any]]) -> None:
    """Write which tokens of each video were kept; a later turn of the same request adds to it."""
    path = path_of(folder, request_id, "kept")
    before = _videos_in(path)
    starts = {video["start"] for video in videos}
    merged = [v for v in before if v["start"] not in starts] + list(videos)
    _write(path, {"request_id": request_id, "videos": merged})


def _videos_in(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())["videos"]
    except (OSError, ValueError, KeyError):  # none yet, or not one of ours
        return []


def write_blocks(
    folder: Path | None,
    request: "Request",
    plan: PrunePlan | None,
    groups: Sequence["KVCacheGroupSpec"],
    block_ids: Sequence[Sequence[int]],
) -> None:
    """Write the KV blocks that a finishing request holds, where it asked for a record."""
    if folder is None or not _asks_for_a_record(request):
        return
    record = {
        "request_id": request.request_id,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_tokens": request.num_tokens,
        "num_video_tokens": sum(
            f.mm_position.length for f in request.mm_features if f.modality == "video"
        ),
        "num_pruned_tokens": sum(turn.num_pruned for turn in plan.turns) if plan else 0,
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
    _write(path_of(folder, request.request_id, "blocks"), record)


def _asks_for_a_record(request: "Request") -> bool:
    if request.sampling_params is None:
        return False
    try:
        return RequestOptions.from_extra_args(request.sampling_params.extra_args).record
    except ValueError:  # refused, and on its way out
        return False


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write whole files only, so that a reader never sees half of one.

    A folder that is gone or full costs the record, not the engine that runs this.
    """
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(path)
    except OSError as error:
        logger.warning("no record %s: %s", path, error)
