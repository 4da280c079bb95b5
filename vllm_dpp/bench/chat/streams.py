"""Streams of text that decode while a long video arrives: how long do they wait for a token?"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vllm_dpp.bench.chat.client import Reply, ask, user, video
from vllm_dpp.bench.chat.server import Server
from vllm_dpp.bench.chat.talk import checked

WARM_TOKENS = 8
VIDEO_TOKENS = 4
PROMPT_ROOM = 128  # tokens of a stream's prompt at most
TIMEOUT_S = 300.0
PROMPTS = (
    "Tell me a long story about a disc.",
    "Count as far as you can.",
    "Write down all that you know of squares.",
    "Which colours are there?",
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the streams saw of one video.

    Args:
        ttft: Seconds from sending the video to its first token.
        prompt_tokens: Of the request with the video.
        computed_tokens: Of those, what the prefix cache did not hold.
        gaps: Seconds between neighbouring tokens of each stream, all streams together, from the
            sending of the video to the end of its answer.
        quiet_gaps: The same before the video came.
    """

    ttft: float
    prompt_tokens: int
    computed_tokens: int
    gaps: tuple[float, ...]
    quiet_gaps: tuple[float, ...]


def arrive(
    server: Server,
    url: str,
    *,
    num_streams: int,
    question: str,
    max_model_len: int,
    salt: str | None = None,
) -> Arrival:
    """Let ``num_streams`` decode, send a video, and hang up when it has been answered.

    Args:
        server: Idle.
        url: Of the video.
        num_streams: Streams of text.
        question: About the video.
        max_model_len: The server's; no stream must come to its end before the video is answered.
        salt: Keeps the prefix cache apart, so that a video whose encoding is cached is read anew.

    Raises:
        OSError: A request failed.
    """
    over = threading.Event()
    warm = threading.Barrier(num_streams + 1, timeout=TIMEOUT_S)

    def stream(index: int) -> Reply:
        def watch(reply: Reply) -> bool:
            if len(reply.times) == WARM_TOKENS:
                warm.wait()
            return not over.is_set()

        prompt = [user(f"{index}: {PROMPTS[index % len(PROMPTS)]}")]
        reply = ask(server, prompt, max_tokens=max_model_len - PROMPT_ROOM, watch=watch)
        if reply.is_whole or len(reply.times) < WARM_TOKENS:
            warm.abort()
            raise OSError(f"{server.name}: a stream ended early: {reply.status} {reply.error}")
        return reply

    with ThreadPoolExecutor(num_streams) as pool:
        running = [pool.submit(stream, index) for index in range(num_streams)]
        try:
            warm.wait()
            extra = {"cache_salt": salt} if salt else {}
            messages = [user(question, video(url))]
            reply = ask(server, messages, max_tokens=VIDEO_TOKENS, extra=extra)
        except threading.BrokenBarrierError:
            ended = [error for future in running if (error := future.exception())]
            raise next((e for e in ended if isinstance(e, OSError)), ended[0]) from None
        finally:
            over.set()
        streams = [future.result() for future in running]
    checked(server, reply)
    server.wait_until_idle()
    return measured(reply, [stream.times for stream in streams])


def measured(reply: Reply, streams: Sequence[Sequence[float]]) -> Arrival:
    """From clocks to gaps.

    Args:
        reply: To the request with the video.
        streams: Of each, the clock at its tokens, in seconds.
    """
    end = reply.times[-1]
    gaps, quiet = [], []
    for times in streams:
        for before, after in zip(times, times[1:], strict=False):
            if after <= reply.sent:
                quiet.append(after - before)
            elif before <= end:
                gaps.append(after - before)
    return Arrival(
        reply.ttft, reply.prompt_tokens, reply.computed_tokens, tuple(gaps), tuple(quiet)
    )
