"""What the front end refuses, and that a refused request leaves no trace in the media caches.

The front end is vLLM's own, without an engine behind it: renderer, processor, cache and input
processor. Where the engine's half of the cache matters, that half is vLLM's own, too.
"""

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache import LruKeyReplicatedReceiverCache
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_dpp.serving.front import admission
from vllm_dpp.serving.front.admission import RefusedRequestError, check_http_request
from vllm_dpp.serving.front.shares import spread
from vllm_dpp.serving.request_plan import RequestOptions
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.video import render_frames

VARIANT = {"architectures": ["DPPQwen2_5_VLForConditionalGeneration"]}
BAD = SamplingParams(extra_args={"dpp_retention_ratio": 7})
VIDEO_BYTES = 602_140
"""Of one video of 16 frames in the media cache."""


class FrontEnd:
    """A front end of an engine that is not there, and what the engine would have received."""

    def __init__(self, checkpoint: Path, dpp: dict[str, Any] | None = None, **args: Any) -> None:
        plugin = {} if dpp is None else {"hf_overrides": VARIANT, "additional_config": {"dpp": dpp}}
        self.config = EngineArgs(
            str(checkpoint), max_model_len=1024, enforce_eager=True, **plugin, **args
        ).create_engine_config()
        self.input_processor = InputProcessor(self.config)
        self.renderer = self.input_processor.renderer
        self.cache = self.renderer.mm_processor_cache
        self.engine_core = self
        self.engine_cache = LruKeyReplicatedReceiverCache(self.config.model_config)

    def render(self, seed: int | None, question: str = "What moves?") -> Any:
        """The rendered prompt of a question about a video, or about none."""
        video = "" if seed is None else "<|vision_start|><|video_pad|><|vision_end|>"
        prompt: dict[str, Any] = {"prompt": f"<|im_start|>user\n{video}{question}<|im_end|>\n"}
        if seed is not None:
            prompt["multi_modal_data"] = {"video": [(render_frames(seed, 16, 112, 112), METADATA)]}
        (rendered,) = self.renderer.render_cmpl([prompt])
        return rendered

    def process(self, prompt: Any, params: SamplingParams, **more: Any) -> EngineCoreRequest:
        return self.input_processor.process_inputs(
            "request", prompt, params, supported_tasks=("generate",), **more
        )

    def add_request(self, request: EngineCoreRequest) -> None:
        """What the engine's process does with the media of a new request."""
        self.engine_cache.get_and_update_features(request.mm_features or [])

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.add_request(request)

    def ask(self, prompt: Any, params: SamplingParams | None = None) -> None:
        """``LLMEngine.add_request``, as far as media are concerned."""
        admission._delivering(self._ask)(self, prompt, params or SamplingParams())

    def _ask(self, _: Any, prompt: Any, params: SamplingParams) -> None:
        self.add_request(self.process(prompt, params))

    async def ask_async(self, prompt: Any, params: SamplingParams | None = None) -> None:
        """``AsyncLLM.add_request``, as far as media are concerned."""

        async def inner(_: Any, prompt: Any, params: SamplingParams) -> None:
            await self.add_request_async(self.process(prompt, params))

        await admission._delivering_async(inner)(self, prompt, params or SamplingParams())


METADATA = {
    "fps": 2.0,
    "duration": 8.0,
    "total_num_frames": 16,
    "frames_indices": list(range(16)),
    "video_backend": "opencv",
    "do_sample_frames": False,
}


@pytest.fixture(scope="module")
def front(tiny_checkpoint: Path) -> Iterator[FrontEnd]:
    """One with a small media cache and a small buffer for deferred rows."""
    settings = {"min_retention_ratio": 0.1, "max_deferred_tokens": 150}
    started = FrontEnd(tiny_checkpoint, settings, mm_processor_cache_gb=2.5 * VIDEO_BYTES / 2**30)
    yield started
    started.renderer.shutdown()


PART = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
ABOUT_A_VIDEO = [{"role": "user", "content": [PART, {"type": "text", "text": "What moves?"}]}]
SETTINGS = ServingSettings(min_retention_ratio=0.1)


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=ABOUT_A_VIDEO, **fields)


def generate(parts: list[dict[str, Any]] | None = None, **params: Any) -> GenerateRequest:
    body = {"token_ids": [1], "content_parts": parts, "sampling_params": params}
    return GenerateRequest.model_validate(body)


REFUSED_BODIES = {
    "ratio": (chat(vllm_xargs={"dpp_retention_ratio": 7}), r"\(0, 1\], .*got 7"),
    "low ratio": (chat(vllm_xargs={"dpp_retention_ratio": 0.05}), "--min-retention-ratio"),
    "record": (chat(vllm_xargs={"dpp_record": 1}), "--record-dir"),
    "rule": (chat(vllm_xargs={"dpp_rule": "best"}), "dpp_rule: rule must be one of .*'best'"),
    "unknown": (chat(vllm_xargs={"dpp_nonsense": 1}), "'dpp_nonsense'; known: dpp_retention_ratio"),
    "nearly known": (
        chat(vllm_xargs={"dpp_video_shar": 0.2}),
        r"'dpp_video_shar' \(did you mean 'dpp_video_share'\?\); known: .*, dpp_video_share",
    ),
    "logprobs": (
        chat(prompt_logprobs=0, vllm_xargs={"dpp_retention_ratio": 0.5}),
        "prompt_logprobs .* dpp_retention_ratio=1",
    ),
    "echo": (chat(echo=True, vllm_xargs={"dpp_retention_ratio": 0.5}), "echo"),
    "scored tokens": (
        generate([PART], prompt_logprobs=1, extra_args={"dpp_retention_ratio": 0.5}),
        "prompt_logprobs",
    ),
    "beams": (chat(use_beam_search=True, vllm_xargs={"dpp_retention_ratio": 1}), "beam search"),
    "completion": (
        CompletionRequest(prompt="Hi", vllm_xargs={"dpp_retention": 1}),
        r"\(did you mean 'dpp_retention_ratio'\?\); known",
    ),
    "response": (ResponsesRequest(input="Hi", vllm_xargs={"dpp_retention_ratio": 0}), "got 0"),
    "true": (generate(extra_args={"dpp_retention_ratio": True}), "got True"),
    "tokens": (generate(extra_args={"dpp_retention_ratio": 0.05}), "min_retention_ratio 0.1"),
}


@pytest.mark.parametrize("case", REFUSED_BODIES)
def test_a_body_is_refused_before_media_are_read(case: str) -> None:
    body, message = REFUSED_BODIES[case]
    with pytest.raises(ValueError, match=message):
        check_http_request(body, SETTINGS)


def test_before_the_decoder_alone_a_request_chooses_its_share_alone() -> None:
    settings = ServingSettings(entry_ratio=0.4).as_entry_only(6)
    for xargs in ({"dpp_retention_ratio": 0.5}, {"dpp_rule": "uniform"}, {"dpp_record": 1}):
        with pytest.raises(ValueError, match="before the decoder alone .*dpp_video_share"):
            check_http_request(chat(vllm_xargs=xargs), settings)
    for body in (chat(prompt_logprobs=1), chat(vllm_xargs={"dpp_retention_ratio": 1})):
        check_http_request(body, settings)
    body = chat(vllm_xargs={"dpp_video_share": 0.2})
    spread(body, settings, num_layers=6)
    assert body.mm_processor_kwargs == {"dpp_entry_ratio": 0.2}
    check_http_request(body, settings)


@pytest.mark.parametrize(
    "body",
    [
        chat(vllm_xargs={"dpp_retention_ratio": 0.1, "theirs": "x"}),
        chat(prompt_logprobs=0),
        chat(echo=True),
        chat(use_beam_search=True, vllm_xargs={"theirs": 1}),
        ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], prompt_logprobs=1),
        CompletionRequest(prompt="Hi", echo=True, logprobs=1),
        generate(extra_args={"dpp_retention_ratio": None, "dpp_record": None}),
        generate([PART], prompt_logprobs=1),
    ],
)
def test_other_bodies_pass(body: Any) -> None:
    check_http_request(body, SETTINGS)


LONG = "word " * 20
HALF: dict[str, Any] = {"extra_args": {"dpp_retention_ratio": 0.5}}


@pytest.mark.parametrize(
    ("question", "params", "more", "message"),
    [
        ("", {"extra_args": {"dpp_retention_ratio": 0.05}}, {}, "min_retention_ratio 0.1"),
        ("", {"extra_args": {"dpp_record": True}}, {}, "record_dir"),
        ("", HALF | {"prompt_logprobs": 1}, {}, "prompt_logprobs .* dpp_retention_ratio=1"),
        ("", HALF, {"resumable": True}, "streaming-input .* dpp_retention_ratio=1"),
        (LONG, {}, {}, "takes 2.. tokens, .* max_deferred_tokens 150 .*--max-deferred-tokens"),
    ],
)
def test_what_reaches_the_engine_is_checked(
    front: FrontEnd, question: str, params: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        front.process(front.render(0, question), SamplingParams(**params), **more)


@pytest.mark.parametrize(
    ("seed", "question", "params"),
    [
        (0, "What?", {}),
        (0, "What?", {"extra_args": {**HALF["extra_args"], "theirs": 1}}),
        (0, LONG, {"extra_args": {"dpp_retention_ratio": 1}, "prompt_logprobs": 1}),
        (None, LONG, {"prompt_logprobs": 1}),
    ],
)
def test_other_requests_reach_the_engine(
    front: FrontEnd, seed: int | None, question: str, params: dict[str, Any]
) -> None:
    front.process(front.render(seed, question), SamplingParams(**params))


@pytest.mark.parametrize(
    ("scores", "more"), [(True, {}), (False, {"resumable": True})], ids=["scored", "session"]
)
def test_what_cannot_lose_tokens_keeps_all_that_entered(
    front: FrontEnd, scores: bool, more: dict[str, Any]
) -> None:
    """Of any length, whatever else it chooses; the caller's parameters stay what they were."""
    params = SamplingParams(
        prompt_logprobs=0 if scores else None, extra_args={"dpp_rule": "uniform"}, skip_clone=True
    )
    request = front.process(front.render(0, LONG), params, **more)
    assert request.sampling_params is not None
    asked = RequestOptions.from_extra_args(request.sampling_params.extra_args)
    assert asked == RequestOptions(1.0, choices=(("rule", "uniform"),))
    assert params.extra_args == {"dpp_rule": "uniform"}


def test_no_input_of_a_session_asks_for_less(front: FrontEnd) -> None:
    """Not even one that brings no video itself."""
    with pytest.raises(VLLMValidationError, match=r"streaming-input .* dpp_retention_ratio=1"):
        front.process(front.render(None), SamplingParams(**HALF), resumable=True)


@pytest.mark.parametrize("scores", [{"prompt_logprobs": 1}, {"echo": True}])
def test_a_share_is_what_enters_where_all_of_that_is_kept(scores: dict[str, Any]) -> None:
    body = chat(vllm_xargs={"dpp_video_share": 0.4}, **scores)
    spread(body, ServingSettings(prune_layer=3), num_layers=6)
    assert body.mm_processor_kwargs == {"dpp_entry_ratio": 0.4}
    assert body.vllm_xargs is not None and body.vllm_xargs["dpp_retention_ratio"] == 1


def test_the_block_size_does_not_matter(tiny_checkpoint: Path) -> None:
    """The engine chooses its own where none is given; a front end hears of it too late."""
    front = FrontEnd(tiny_checkpoint, {}, max_num_batched_tokens=128, block_size=None)
    front.process(front.render(0), SamplingParams())
    front.renderer.shutdown()


def test_another_engine_in_the_process_is_left_alone(tiny_checkpoint: Path) -> None:
    stock = FrontEnd(tiny_checkpoint)
    stock.process(stock.render(0), SamplingParams(prompt_logprobs=1, extra_args={"dpp_own": 1}))
    stock.renderer.shutdown()


@pytest.mark.parametrize("question", ["", LONG], ids=["early", "late"])
def test_a_refused_video_keeps_its_place_among_the_cached(front: FrontEnd, question: str) -> None:
    """The cache holds two videos. Were only the front end to see the first one again, the engine
    would drop it for the third, and not be sent it after that."""
    params = None if question else BAD
    first, second, third = (10, 11, 12) if question else (20, 21, 22)
    for seed in (first, second):
        front.ask(front.render(seed))
    with pytest.raises(RefusedRequestError):
        front.ask(front.render(first, question or "What?"), params)
    for seed in (third, first):
        front.ask(front.render(seed))


def test_another_request_may_rely_on_a_refused_video(front: FrontEnd) -> None:
    """Both are rendered before either is asked: the second one's video is not sent again."""

    async def both() -> None:
        refused, good = front.render(30), front.render(30)
        assert good["mm_kwargs"]["video"] == [None]
        with pytest.raises(RefusedRequestError):
            await front.ask_async(refused, BAD)
        await front.ask_async(good)

    asyncio.run(both())


def test_a_delivery_is_never_scheduled(front: FrontEnd) -> None:
    delivered: list[EngineCoreRequest] = []
    engine = SimpleNamespace(
        renderer=front.renderer,
        input_processor=front.input_processor,
        engine_core=SimpleNamespace(add_request=delivered.append),
    )
    with pytest.raises(RefusedRequestError):
        admission._delivering(lambda _, *args: front.process(*args))(engine, front.render(0), BAD)
    (request,) = delivered
    front.add_request(request)
    assert request.abort_immediately
    assert request.external_req_id == "request" != request.request_id
    admission.check_engine_request(request, ServingSettings.of_engine(front.config))


def test_refused_videos_do_not_fill_shared_memory(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME", f"dpp_test_{id(monkeypatch)}")
    front = FrontEnd(
        tiny_checkpoint,
        {},
        mm_processor_cache_type="shm",
        mm_processor_cache_gb=3.5 * VIDEO_BYTES / 2**30,
        mm_shm_cache_max_object_size_mb=1,
    )
    try:
        for seed in (41, 42, 43, 44):
            with pytest.raises(RefusedRequestError):
                front.ask(front.render(seed), BAD)
        refused, _on_its_way = front.render(45), front.render(45)
        for _ in range(2):  # sent again, it takes back nothing of another request's
            with pytest.raises(RefusedRequestError):
                asyncio.run(front.ask_async(refused, BAD))
        front.renderer._mm_executor.submit(lambda: None).result()
        claims = list(front.cache._shm_cache.writer_flag.values())
        assert claims[-1] == 1 and not any(claims[:-1])
        assert "address" in front.render(46)["mm_kwargs"]["video"][0], "there is room"
    finally:
        front.renderer.shutdown()


def test_installing_twice_wraps_once(front: FrontEnd) -> None:
    places = {
        InputProcessor: "process_inputs",
        AsyncLLM: "add_request",
        LLMEngine: "add_request",
        GenerateBaseServing: "_check_model",
    }
    before = [getattr(owner, name) for owner, name in places.items()]
    admission.install()
    assert [getattr(owner, name) for owner, name in places.items()] == before
    assert all(method.admits for method in before)


@pytest.mark.parametrize(
    "method",
    [
        OpenAIServingChat.render_chat_request,
        OpenAIServingChatBatch.render_batch_chat_request,
        OpenAIServingCompletion.render_completion_request,
        OpenAIServingResponses._create_responses,
        ServingTokens.serve_tokens,
    ],
)
def test_endpoints_check_the_model_before_anything_else(method: Any) -> None:
    _, body = inspect.getsource(method).split(" = await self._check_model(request)\n", 1)
    assert "render" in body or "preprocess" in body
    assert issubclass(OpenAIServingChatBatch, GenerateBaseServing)


@pytest.mark.parametrize("engine", [AsyncLLM, LLMEngine])
def test_engines_take_requests_from_the_input_processor(engine: type) -> None:
    source = inspect.getsource(inspect.unwrap(engine.add_request))  # type: ignore[attr-defined]
    assert "self.input_processor.process_inputs(" in source
    source = inspect.getsource(engine.__init__)
    assert "InputProcessor(self.vllm_config, renderer)" in source
