"""One streamed chat request, timed; by the standard library alone, as clients must be light."""

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_dpp.bench.chat.server import HOST, Server

TIMEOUT_S = 300.0
EVENT = b"data: "
DONE = b"[DONE]"

Message = dict[str, Any]


@dataclass(slots=True)
class Reply:
    """What came back, and when.

    Args:
        status: Of HTTP.
        sent: Clock (``time.perf_counter``) when the request was sent, in seconds.
        error: The server's message where ``status`` is not 200, or that of a failed stream.
        request_id: The response's.
        tokens: Generated token ids.
        times: Clock when each piece of the answer came, in seconds; it may hold several tokens.
        margins: Log-probability of each token above the runner-up, where it was asked for.
        prompt_tokens: As the server counts them.
        cached_tokens: Among them, those that the prefix cache held.
        is_whole: Whether the stream came to its end.
    """

    status: int
    sent: float
    error: str = ""
    request_id: str = ""
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    is_whole: bool = False

    @property
    def ttft(self) -> float:
        """Seconds from sending the request to the first token."""
        return self.times[0] - self.sent

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the prefix cache did not hold."""
        return self.prompt_tokens - self.cached_tokens


def user(text: str, *parts: Message) -> Message:
    """A user's turn: media, then words."""
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def video(url: str) -> Message:
    return {"type": "video_url", "video_url": {"url": url}}


def image(url: str) -> Message:
    return {"type": "image_url", "image_url": {"url": url}}


def ask(
    server: Server,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    extra: Mapping[str, Any] | None = None,
    watch: Callable[[Reply], bool] | None = None,
    timeout: float = TIMEOUT_S,
) -> Reply:
    """Ask greedily for exactly ``max_tokens`` tokens.

    Args:
        server: Whom.
        messages: The conversation.
        max_tokens: End tokens do not stop the answer.
        extra: More fields of the request.
        watch: Called after each piece; ``False`` hangs up.
        timeout: Seconds without a byte after which the connection is given up.

    Raises:
        OSError: The server cannot be reached, or is silent for too long.
    """
    body = {
        "model": server.model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **(extra or {}),
    }
    payload = json.dumps(body).encode()
    connection = http.client.HTTPConnection(HOST, server.port, timeout=timeout)
    try:
        connection.connect()
        sent = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", payload, headers)
        response = connection.getresponse()
        reply = Reply(response.status, sent)
        if response.status == 200:
            _read(response, reply, watch)
        else:
            reply.error = response.read().decode(errors="replace")
        return reply
    except http.client.HTTPException as error:
        raise OSError(f"{server.name}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _read(
    response: http.client.HTTPResponse, reply: Reply, watch: Callable[[Reply], bool] | None
) -> None:
    """Read events until the end, or until ``watch`` says so."""
    for line in response:
        if not line.startswith(EVENT):
            continue
        data = line.removeprefix(EVENT).strip()
        if data == DONE:
            reply.is_whole = True
            return
        now = time.perf_counter()
        if _take(json.loads(data), reply, now) and watch is not None and not watch(reply):
            return


def _take(event: dict[str, Any], reply: Reply, now: float) -> bool:
    """Note one event; whether it held tokens."""
    if "error" in event:
        reply.error = json.dumps(event["error"])
        return False
    reply.request_id = event["id"]
    if usage := event.get("usage"):
        reply.prompt_tokens = usage["prompt_tokens"]
        reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    new = [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
    if not new:
        return False
    reply.tokens += new
    reply.times.append(now)
    for choice in event["choices"]:
        for entry in (choice.get("logprobs") or {}).get("content") or ():
            reply.margins.append(_margin(entry))
    return True


def _margin(entry: dict[str, Any]) -> float:
    """How far the chosen token lies above the next, from its ``top_logprobs``."""
    best = sorted((top["logprob"] for top in entry["top_logprobs"]), reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")
