"""Client, server and arms, against a server made of a few lines."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vllm_dpp.bench.chat.arms import ARMS, make_arm
from vllm_dpp.bench.chat.client import ask, user
from vllm_dpp.bench.chat.kv import layer_bytes, read_record, recorded_bytes, stock_bytes
from vllm_dpp.bench.chat.server import (
    HOST,
    Server,
    ServerError,
    info_label,
    serve,
    summed,
    wait_until_ready,
)
from vllm_dpp.bench.chat.streams import PROMPT_ROOM, arrive

EXPOSITION = """# HELP vllm:num_requests_running Requests.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:cache_config_info{block_size="128",dtype="auto"} 1.0
"""


def piece(tokens: list[int]) -> dict:
    top = [{"logprob": -0.5}, {"logprob": -0.75}]
    choice = {"token_ids": tokens, "logprobs": {"content": [{"top_logprobs": top} for _ in tokens]}}
    return {"id": "chat-1", "choices": [choice]}


USAGE = {
    "id": "chat-1",
    "choices": [],
    "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}},
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # noqa: N802  (its name)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        bad = body["max_tokens"] == 0
        self.send_response(400 if bad else 200)
        self.end_headers()
        if bad:
            self.wfile.write(b'{"error": "none"}')
            return
        for event in ({"id": "chat-1", "choices": [{}]}, piece([1]), piece([2, 3]), USAGE):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer((HOST, 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield Server("few lines", httpd.server_address[1], "m", 0, Path("none"))
        httpd.shutdown()


def test_a_stream(server: Server) -> None:
    reply = ask(server, [user("?")], max_tokens=3)
    assert (reply.status, reply.is_whole, reply.request_id) == (200, True, "chat-1")
    assert (reply.tokens, len(reply.times)) == ([1, 2, 3], 2)
    assert (reply.prompt_tokens, reply.computed_tokens) == (9, 5)
    assert reply.margins == [0.25] * 3 and reply.ttft > 0


def test_hanging_up(server: Server) -> None:
    reply = ask(server, [user("?")], max_tokens=3, watch=lambda r: len(r.times) < 1)
    assert reply.tokens == [1] and not reply.is_whole


def test_a_refusal(server: Server) -> None:
    reply = ask(server, [user("?")], max_tokens=0)
    assert reply.status == 400 and "none" in reply.error


def test_streams_that_are_refused(server: Server) -> None:
    with pytest.raises(OSError, match="a stream ended early: 400"):
        arrive(server, "", num_streams=2, question="?", max_model_len=PROMPT_ROOM)


def test_metrics() -> None:
    assert summed(EXPOSITION)["vllm:num_requests_running"] == 3
    assert info_label(EXPOSITION, "vllm:cache_config_info", "block_size") == "128"
    with pytest.raises(KeyError):
        info_label(EXPOSITION, "vllm:cache_config_info", "other")


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model')"]
    with serve("it", command, "m", tmp_path / "log", {}) as started:
        with pytest.raises(ServerError, match="no such model"):
            wait_until_ready(started, timeout=60)


@pytest.mark.parametrize("name", ARMS)
def test_arms(name: str) -> None:
    arm = make_arm(
        name,
        num_layers=12,
        prune_layer=6,
        retention_ratio=0.25,
        decide_every=512,
        video_share=0.4,
        on_cpu=True,
    )
    words = arm.command("toy", ["--dtype", "float32"])
    assert arm.is_pruned == name.startswith("dpp") == ("vllm_dpp" in words)
    assert bool(arm.unpruned) == arm.is_pruned
    assert ("--decide-every" in words) == (name == "dpp-pieces")
    assert arm.has_prefix_caching != ("--no-enable-prefix-caching" in words) == (name == "evs")


def test_an_unknown_arm() -> None:
    with pytest.raises(ValueError, match="unknown arm 'fast'"):
        make_arm(
            "fast",
            num_layers=2,
            prune_layer=1,
            retention_ratio=1,
            decide_every=1,
            video_share=1,
            on_cpu=True,
        )


class Config:
    hidden_size, num_attention_heads, num_key_value_heads = 512, 8, 4


def test_kv_bytes(server: Server, tmp_path: Path) -> None:
    assert layer_bytes(Config, 4) == 2 * 4 * 64 * 4
    reply = ask(server, [user("?")], max_tokens=3)  # 9 + 3 tokens, of which 11 are read
    assert stock_bytes(reply, 12, 8, 10) == 2 * 8 * 12 * 10
    record = {
        "block_size": 8,
        "kv_groups": [{"blocks": 4, "layers": 6}, {"blocks": 1, "layers": 6}],
    }
    (tmp_path / "chat-1-ab.blocks.json").write_text(json.dumps(record))
    assert recorded_bytes(read_record(tmp_path, "chat-1"), 10) == 5 * 6 * 8 * 10
