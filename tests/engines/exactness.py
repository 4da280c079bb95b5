"""One batch of chats at several ratios, cold and warm, held against the reference in every way."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from tests.engines.host import EngineHost
from tests.engines.judge import TOLERANCE, Judge
from tests.engines.traffic import Arrival
from tests.reference.media import MediaItem
from vllm_dpp.serving.settings import ServingSettings


def name_of(chat: str, ratio: float) -> str:
    """Of a request, fit for a file."""
    return f"{chat} {ratio}".replace(" ", "-").replace(".", "_")


def check_chats(
    host: EngineHost,
    judge: Judge,
    chats: Mapping[str, str],
    ratios: Sequence[float],
    settings: ServingSettings,
    block_size: int | None,
    records: Path,
) -> int:
    """Ask everything at once, and again, when it comes from the cache if there is one.

    Args:
        host: Its engine writes its records to ``records``.
        judge: Knows the chats.
        chats: The name under which the judge knows what enters, by what is asked.
        ratios: What is kept of that.
        settings: The engine's.
        block_size: Of an engine that caches prefixes, else ``None``.
        records: Folder.

    Returns:
        How many videos lost tokens in the middle.
    """
    pruned = 0
    for again in ("", " again"):
        asked = [(chat, name, ratio) for chat, name in chats.items() for ratio in ratios]
        traffic = host.run(
            [
                Arrival(
                    name_of(chat + again, ratio),
                    judge.engine_prompts[chat],
                    extra_args={"dpp_retention_ratio": ratio, "dpp_record": 1},
                )
                for chat, _, ratio in asked
            ]
        )
        recorded: dict[str, list[dict[str, Any]]] = {}
        for chat, name, ratio in asked:  # before any is judged: what one chose others may share
            request = name_of(chat + again, ratio)
            if list(records.glob(f"{request}-*.kept.json")):
                recorded[request] = host.call("record", str(records), request)
                kept = {video["start"]: video.get("keep") for video in recorded[request]}
                judge.keep(name, ratio, settings.split_layer, settings, block_size, kept)
        for chat, name, ratio in asked:
            request, videos = name_of(chat + again, ratio), judge.prompts[name].videos
            keep = judge.keep(name, ratio, settings.split_layer, settings, block_size)
            answer = traffic.answers[request]
            found = judge.difference(answer, name, settings.split_layer, keep)
            assert found <= TOLERANCE, (chat, ratio)
            lost = [len(kept) < video.length for video, kept in zip(videos, keep, strict=True)]
            pruned += sum(lost)
            if request in recorded:
                check_record(recorded[request], videos, keep)
            else:  # nothing was selected, or all of it came from the cache
                all_enter = all(video.entered is None for video in videos)
                assert block_size or (all_enter and not any(lost)), (chat, ratio)
        assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
    return pruned


def check_record(
    recorded: list[dict[str, Any]], videos: Sequence[MediaItem], keep: Sequence[list[int]]
) -> None:
    """What the record says of each video, as far as it was computed for this request."""
    by_start = {video.start: (video, kept) for video, kept in zip(videos, keep, strict=True)}
    for entry in recorded:
        video, kept = by_start[entry["start"]]
        assert prod(entry["grid"]) == prod(video.grid_thw) // 4
        if "entered" in entry:
            assert entry["num_entered"] == video.length
            assert set(entry["entered"]) <= set(video.entered or ())
            whole = len(entry["entered"]) == video.length
            assert not whole or tuple(entry["entered"]) == video.entered
        if "keep" in entry:
            assert entry["keep"] == kept
