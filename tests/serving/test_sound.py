"""Sound beside a video, in Qwen3-Omni: to us it is text, and it loses nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from tests.engines.host import EngineError, EngineHost, engine_host
from tests.engines.traffic import Answer, Arrival
from tests.reference.chats import video
from tests.reference.prompt import multi_modal_data
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import CheckpointSpec

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SCENE = multi_modal_data([{"role": "user", "content": [video(5, 6, 352, 416)]}])
CONTENT = [{"type": "video"}, {"type": "audio"}, {"type": "text", "text": "What?"}]


def tone(hertz: int) -> np.ndarray:
    """A second of it."""
    return np.sin(np.arange(16000) * hertz * 2 * np.pi / 16000)


def ask(host: EngineHost, text: str, hertz: int, entry: float, kept: float | None) -> Answer:
    prompt: dict[str, Any] = {
        "prompt": text,
        "multi_modal_data": SCENE | {"audio": [(tone(hertz), 16000)]},
    }
    args = None
    if kept is not None:
        prompt["mm_processor_kwargs"] = {"dpp_entry_ratio": entry}
        args = {"dpp_retention_ratio": kept}
    traffic = host.run([Arrival("a", prompt, extra_args=args)])
    assert (traffic.blocks_held, traffic.plans_left) == (0, 0)
    return traffic.answers["a"]


def test_sound_beside_a_video(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "omni", CheckpointSpec(architecture="qwen3_omni_moe"))
    processor = AutoProcessor.from_pretrained(checkpoint)
    text = processor.apply_chat_template([{"role": "user", "content": CONTENT}])
    engine = {"max_num_batched_tokens": 256, "enable_prefix_caching": True}
    engine["limit_mm_per_prompt"] = {"video": 1, "audio": 1, "image": 0}
    with engine_host("v1") as host:
        host.load(checkpoint, None, **engine)
        stock = ask(host, text, 300, 1, None)
        host.load(checkpoint, {"prune_layer": 3}, **engine)
        whole = ask(host, text, 300, 1, 1)
        assert (whole.logprobs == stock.logprobs).all(), "bit for bit, where nothing is pruned"
        low, again = (ask(host, text, 300, 0.4, 0.25) for _ in range(2))
        high = ask(host, text, 900, 0.4, 0.25)
        between = {"mm_processor_kwargs": {"use_audio_in_video": True}}
        with pytest.raises(EngineError, match="send the sound as audio beside the video"):
            host.run([Arrival("b", {"prompt": text, "multi_modal_data": SCENE} | between)])
    assert low.logprobs is not None and high.logprobs is not None
    assert np.abs(again.logprobs - low.logprobs).max() < 1e-4, "warm as cold"
    assert np.abs(high.logprobs[0] - low.logprobs[0]).max() > 0.01, "it is heard"
    lost = len(whole.prompt_token_ids) - len(low.prompt_token_ids)
    assert lost == 429 - round(0.4 * 429)
