"""KV bytes that a request holds when it ends."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dpp.bench.chat.client import Reply

RECORD_TIMEOUT_S = 10.0


def layer_bytes(config: Any, bytes_per_value: int) -> int:
    """KV bytes of one token in one layer, from a Hugging Face text configuration."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head * bytes_per_value


def stock_bytes(reply: Reply, num_layers: int, block_size: int, token_bytes: int) -> int:
    """Of a request in which every layer holds every token; the last has not been read."""
    num_tokens = reply.prompt_tokens + len(reply.tokens) - 1
    return -(-num_tokens // block_size) * block_size * num_layers * token_bytes


def recorded_bytes(record: Mapping[str, Any], token_bytes: int) -> int:
    """Of a record of the blocks that a request held (``dpp_record``)."""
    blocks = sum(group["blocks"] * group["layers"] for group in record["kv_groups"])
    return blocks * record["block_size"] * token_bytes


def read_record(folder: Path, request_id: str) -> dict[str, Any]:
    """The record of a response, which a thread writes a moment after it.

    Raises:
        OSError: None came.
    """
    end = time.monotonic() + RECORD_TIMEOUT_S
    while time.monotonic() < end:
        for path in folder.glob(f"{request_id}*.blocks.json"):
            return json.loads(path.read_text())
        time.sleep(0.05)
    raise OSError(f"no record of {request_id}")
