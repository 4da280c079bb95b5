"""Conversations about one video, asked of all servers in turn, one request at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_dpp.bench.chat.arms import Arm
from vllm_dpp.bench.chat.client import Message, Reply, ask, assistant, user, video
from vllm_dpp.bench.chat.server import Server
from vllm_dpp.toy.video import as_data_url, render_frames, write_mp4

FPS = 2.0
"""Frames a second: as many as servers sample, so that they see every frame."""

TURNS = (
    ("What is shown?", "Shapes that move over a background."),
    ("Which shape moves the farthest, and where does it go?", "A disc, from left to right."),
    ("What colour is the background while it moves?", "It is mostly grey."),
    ("And which shape vanishes first?", ""),
)
"""Questions, and the answers that the history gives them, equal for all arms."""

OTHER_QUESTIONS = (
    "How many shapes are there in all?",
    "Is there a square that vanishes?",
    "Describe the background in one sentence.",
)
CHAT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """One request's measurements.

    Args:
        prompt_tokens: As the server counts them.
        computed_tokens: Those that the prefix cache did not hold.
        ttft: Seconds to the first token.
        tokens: The answer.
    """

    prompt_tokens: int
    computed_tokens: int
    ttft: float
    tokens: tuple[int, ...]


Talk = dict[str, dict[str, Asked]]
"""By arm, by request."""


def clip(folder: Path, seed: int, num_frames: int, side: int) -> str:
    """The URL of an mp4 of ``num_frames`` frames of ``side`` by ``side`` pixels."""
    frames = render_frames(seed, num_frames, side, side)
    path = write_mp4(folder / f"{seed}-{num_frames}-{side}.mp4", frames, FPS)
    return as_data_url(path)


def script(url: str) -> dict[str, list[Message]]:
    """The requests about one video, in their order: turns, the first again, other questions."""
    requests: dict[str, list[Message]] = {}
    messages: list[Message] = []
    for number, (question, answer) in enumerate(TURNS, 1):
        messages = [*messages, user(question, *([] if messages else [video(url)]))]
        requests[f"turn {number}"] = messages
        messages = [*messages, assistant(answer)]
    requests["turn 1 again"] = requests["turn 1"]
    for number, question in enumerate(OTHER_QUESTIONS, 1):
        requests[f"question {number}"] = [user(question, video(url))]
    return requests


def talk(
    servers: Mapping[Arm, Server],
    url: str,
    *,
    first: int,
    extra: Callable[[Arm], Mapping[str, Any]] = lambda _: {},
    seen: Callable[[Arm, str, Reply], None] = lambda *_: None,
) -> Talk:
    """Send the whole script to every server, request by request.

    Args:
        servers: By arm.
        url: Of a video that no server has seen.
        first: Who begins: this many arms are passed over.
        extra: More fields of an arm's requests.
        seen: Called with every reply.

    Raises:
        OSError: A server failed or refused.
    """
    done: Talk = {arm.name: {} for arm in servers}
    for number, (name, messages) in enumerate(script(url).items()):
        for arm in rotated(list(servers), first + number):
            server = servers[arm]
            reply = ask(server, messages, max_tokens=CHAT_TOKENS, extra=extra(arm))
            checked(server, reply)
            seen(arm, name, reply)
            done[arm.name][name] = Asked(
                reply.prompt_tokens, reply.computed_tokens, reply.ttft, tuple(reply.tokens)
            )
            server.wait_until_idle()
    return done


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """``items``, beginning elsewhere, so that nobody is always the first."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def checked(server: Server, reply: Reply) -> None:
    """Raises ``OSError`` unless the answer is whole."""
    if reply.status != 200 or not reply.is_whole or reply.error:
        raise OSError(f"{server.name} answered {reply.status}: {reply.error[:500]}")


def as_json(done: Talk) -> dict[str, Any]:
    """Without the answers."""
    return {
        arm: {name: {k: v for k, v in asdict(a).items() if k != "tokens"} for name, a in by.items()}
        for arm, by in done.items()
    }
