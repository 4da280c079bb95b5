"""Toy checkpoints: transformers loads them, and what they compute depends on their input."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("cv2")

from vllm_dpp.toy.checkpoint import SPEC_FILE, make_checkpoint  # noqa: E402  (needs the above)
from vllm_dpp.toy.qwen2_5_vl import make_config  # noqa: E402
from vllm_dpp.toy.spec import MID, TINY, CheckpointSpec  # noqa: E402
from vllm_dpp.toy.tokenizer import make_tokenizer  # noqa: E402
from vllm_dpp.toy.video import render_frames  # noqa: E402

SMALL = CheckpointSpec(num_layers=2, vision_depth=1)
PAD_RUN = re.compile(r"(<\|video_pad\|>)+")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("toy") / "tiny", TINY)


@pytest.fixture(scope="module")
def processor(path: Path) -> Any:
    return transformers.AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(path)


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]


def inputs(processor: Any, seed: int, text: str) -> Any:
    prompt = processor.apply_chat_template(question(text), add_generation_prompt=True)
    frames = render_frames(seed, 16, 112, 112)
    return processor(text=[prompt], videos=[frames], return_tensors="pt")


def test_model_loads_complete(path: Path) -> None:
    model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.config.text_config.num_hidden_layers == TINY.num_layers
    assert model.config.text_config.rms_norm_eps == 1e-6
    assert sum(model.config.text_config.rope_parameters["mrope_section"]) == TINY.head_dim // 2


def test_no_parameter_is_trivial(model: Any) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.01, name


def test_tokenizer_round_trips_bytes(path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "Where does the red disc go?\n  Ümläute, 日本 🎬, don't, 42"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|video_pad|>")["input_ids"] == [len(tokenizer) - 1]


def test_generation_ends_with_the_turn(path: Path) -> None:
    config = transformers.GenerationConfig.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.decode([config.eos_token_id]) == tokenizer.eos_token == "<|im_end|>"


def test_chat_template_of_one_turn(processor: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *question("What moves?")]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What moves?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_template_of_two_turns(processor: Any) -> None:
    messages = [
        *question("What moves?"),
        {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]},
        {"role": "user", "content": "Which colour?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=False) == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What moves?<|im_end|>\n"
        "<|im_start|>assistant\nA disc.<|im_end|>\n"
        "<|im_start|>user\nWhich colour?<|im_end|>\n"
    )


def test_processor_yields_the_grid(processor: Any) -> None:
    batch = inputs(processor, 0, "What moves?")
    assert batch["video_grid_thw"].tolist() == [[8, 8, 8]]
    video_id = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert int((batch["input_ids"] == video_id).sum()) == 8 * 8 * 8 // 4
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert PAD_RUN.sub("<V>", text).startswith(
        "<|im_start|>user\n<|vision_start|><V><|vision_end|>W"
    )


@torch.no_grad()
def test_logits_depend_on_video_and_question(model: Any, processor: Any) -> None:
    def logprobs(seed: int, text: str) -> Any:
        return model(**inputs(processor, seed, text)).logits[0, -1].log_softmax(-1)

    base = logprobs(0, "What moves?")
    assert (logprobs(1, "What moves?") - base).abs().max() > 0.5
    assert (logprobs(0, "What stands still?") - base).abs().max() > 0.2
    assert base.max() < -1


@torch.no_grad()
def test_video_tokens_stay_apart_in_the_middle(model: Any, processor: Any) -> None:
    batch = inputs(processor, 0, "What moves?")
    states = model(**batch, output_hidden_states=True).hidden_states[TINY.num_layers // 2][0]
    video = states[batch["input_ids"][0] == model.config.video_token_id]
    similarity = torch.nn.functional.cosine_similarity(video[:, None], video[None], dim=-1)
    apart = similarity[~torch.eye(len(video), dtype=torch.bool)]
    assert apart.mean() < 0.7
    assert apart.max() < 0.99


def test_same_spec_is_reused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "small", SMALL)
    made = (path / "model.safetensors").stat().st_mtime_ns
    assert make_checkpoint(path, SMALL) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == made


def test_other_spec_replaces_and_seed_matters(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "small", SMALL)
    first = (path / "model.safetensors").read_bytes()
    make_checkpoint(path, dataclasses.replace(SMALL, seed=1))
    assert (path / "model.safetensors").read_bytes() != first
    make_checkpoint(path, SMALL)
    assert (path / "model.safetensors").read_bytes() == first
    assert [child.name for child in tmp_path.iterdir()] == ["small"]


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, dtype="bfloat16")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        make_checkpoint(tmp_path, spec)
    )
    assert model.dtype == torch.bfloat16


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a toy checkpoint"):
        make_checkpoint(tmp_path, SMALL)
    assert not (tmp_path / SPEC_FILE).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads 3"),
        ({"hidden_size": 96}, "hidden_size 96"),
        ({"num_kv_heads": 3}, "3 KV heads"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_bad_specs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("spec", [TINY, MID])
def test_presets_have_a_head_size_that_every_backend_supports(spec: CheckpointSpec) -> None:
    assert spec.head_dim == 64
    config = make_config(spec, make_tokenizer())
    assert config.text_config.rope_parameters["mrope_section"] == [8, 12, 12]
