"""Many clients at once: they ask, stream, hang up early or in the middle, and misbehave."""

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vllm_dpp.bench.chat.client import Reply, ask
from vllm_dpp.bench.chat.server import HOST, Server
from vllm_dpp.bench.soak.cases import Case
from vllm_dpp.bench.soak.judge import Expected, judge

LOGPROBS = {"logprobs": True, "top_logprobs": 2}
BAD_SHARE, EARLY_SHARE, MID_SHARE, SALT_SHARE = 0.1, 0.08, 0.12, 0.5
EARLY_S = 0.5
ASKED_AGAIN = "500s, asked again"
MAX_FAULTS = 50


class Tally:
    """What happened, counted by all clients."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.faults: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def count(self, what: str, case: Case) -> None:
        with self._lock:
            self.counts[what] += 1
            self.kinds[case.kind] += 1

    def fault(self, what: str, case: Case, **details: Any) -> None:
        """Count something that must not be; the first ``MAX_FAULTS`` are kept."""
        self.count(what, case)
        with self._lock:
            if len(self.faults) < MAX_FAULTS:
                self.faults.append({"fault": what, "case": case.name, **details})


def serial_answers(server: Server, cases: Sequence[Case], tally: Tally) -> dict[str, Expected]:
    """Ask one at a time; bad requests are asked, too.

    Raises:
        OSError: A good one is not answered.
    """
    found = {}
    for case in cases:
        reply = send(server, case)
        if not case.is_good:
            refused(reply, case, tally)
        elif reply.status != 200 or reply.error or not reply.is_whole:
            raise OSError(f"{case.name} alone: {reply.status} {reply.error[:500]}")
        else:
            found[case.name] = Expected(tuple(reply.tokens), tuple(reply.margins))
    return found


def send(server: Server, case: Case, **options: Any) -> Reply:
    extra = LOGPROBS | case.extra | options.pop("extra", {})
    return ask(server, case.messages, max_tokens=case.max_tokens, extra=extra, **options)


def refused(reply: Reply, case: Case, tally: Tally) -> None:
    """A bad request gets a 4xx.

    What is known only when the media have been processed comes after a stream has begun; vLLM's
    streams then say it in an event.
    """
    if 400 <= reply.status < 500:
        tally.count("bad requests refused with a 4xx", case)
    elif reply.status == 200 and 400 <= error_code(reply) < 500:
        tally.count("bad requests refused with a 4xx inside a stream", case)
    else:
        tally.fault("bad request without a 4xx", case, status=reply.status, error=reply.error[:500])


def error_code(reply: Reply) -> int:
    """The code that an error event of a stream names, 0 where there is none."""
    try:
        return int(json.loads(reply.error)["code"])
    except (ValueError, KeyError, TypeError):
        return 0


def soak(
    server: Server,
    good: Sequence[Case],
    bad: Sequence[Case],
    expected: Mapping[str, Expected],
    tally: Tally,
    *,
    num_clients: int,
    seconds: float,
    seed: int,
) -> None:
    """Let ``num_clients`` loose for ``seconds``; returns when all of them have stopped."""
    end = time.monotonic() + seconds

    def client(index: int) -> None:
        rng = random.Random(f"{seed} {index}")
        while time.monotonic() < end:
            case = rng.choice(bad if rng.random() < BAD_SHARE else good)
            try:
                _one(server, case, expected.get(case.name), tally, rng)
            except OSError as error:
                tally.fault("connection lost", case, error=str(error)[:500])
                if not server.is_healthy():
                    return

    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(client, range(num_clients)))


def _one(
    server: Server, case: Case, expected: Expected | None, tally: Tally, rng: random.Random
) -> None:
    """One request of one client.

    vLLM answers 500 where the two ends of its media cache have drifted apart, and expects to be
    asked again, which clients of OpenAI's do by themselves.
    """
    salt = {"cache_salt": f"{rng.random()}"} if rng.random() < SALT_SHARE else {}
    if expected is None:
        refused(send(server, case, extra=salt), case, tally)
        return
    chance = rng.random()
    if chance < EARLY_SHARE:
        hang_up(server, case, rng.uniform(0, EARLY_S))
        tally.count("hung up before the answer", case)
        return
    after = rng.randint(1, 3) if chance < EARLY_SHARE + MID_SHARE else None

    def once() -> Reply:
        watch = partial(_listens, after)
        return send(server, case, extra=salt, watch=watch)

    reply = once()
    if 500 in (reply.status, error_code(reply)):
        tally.count(ASKED_AGAIN, case)
        reply = once()
    answered(reply, case, expected, tally, hung_up=after is not None)


def _listens(num_pieces: int | None, reply: Reply) -> bool:
    return num_pieces is None or len(reply.times) < num_pieces


def answered(reply: Reply, case: Case, expected: Expected, tally: Tally, *, hung_up: bool) -> None:
    """A good request gets its serial answer, as far as it was listened to."""
    if reply.status != 200 or reply.error:
        tally.fault("good request refused", case, status=reply.status, error=reply.error[:500])
        return
    if not hung_up and (not reply.is_whole or len(reply.tokens) != len(expected.tokens)):
        tally.fault("answer cut off", case, tokens=reply.tokens, expected=expected.tokens)
        return
    verdict = judge(reply.tokens, expected)
    if verdict == "different":
        tally.fault(
            "answer differs",
            case,
            tokens=reply.tokens,
            expected=expected.tokens,
            margins=expected.margins,
            cached_tokens=reply.cached_tokens,
        )
        return
    tally.count("beginnings heard" if hung_up else "whole answers", case)
    tally.counts[f"of these, {verdict if verdict == 'equal' else 'apart at a tie'}"] += 1


def hang_up(server: Server, case: Case, seconds: float) -> None:
    """Send a request and close the connection after so many seconds, without reading."""
    body = {"model": server.model, "messages": case.messages, "stream": True, **case.extra}
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    try:
        payload = json.dumps(body | {"max_tokens": 64}).encode()
        connection.request(
            "POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"}
        )
        time.sleep(seconds)
    finally:
        connection.close()
