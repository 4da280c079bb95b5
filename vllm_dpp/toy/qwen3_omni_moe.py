"""A small Qwen3-Omni: what `checkpoint` asks of an architecture. vLLM serves its thinker."""

from math import isqrt

from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)

from vllm_dpp.toy import qwen3_vl, qwen3_vl_moe
from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.fields import special_token_ids
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Qwen3OmniMoeForConditionalGeneration
NAMED = {
    "image_token": tok.IMAGE_PAD,
    "video_token": tok.VIDEO_PAD,
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": tok.VISION_START,
    "vision_eos_token": tok.VISION_END,
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
MEL_BINS = 16

_TEXT = "{%- elif 'text' in content -%}"
CHAT_TEMPLATE = tok.CHAT_TEMPLATE.replace(
    _TEXT,
    "{%- elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content -%}\n"
    f"{NAMED['audio_bos_token']}{NAMED['audio_token']}{NAMED['audio_eos_token']}\n{_TEXT}",
)
"""Qwen's, with a place for sound."""


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with tokens of audio, and names for those that the processor asks for."""
    others = [token for token in tok.SPECIAL_TOKENS if token not in NAMED.values()]
    return tok.make_tokenizer(others, named=NAMED)


def make_processor(tokenizer: Qwen2Tokenizer) -> Qwen3OmniMoeProcessor:
    """The processor of text, images, videos and audio, with Qwen's chat template."""
    pixels = {"shortest_edge": 64 * 64, "longest_edge": 1280 * 32 * 32}
    normalised = {"image_mean": qwen3_vl.HALF, "image_std": qwen3_vl.HALF}
    return Qwen3OmniMoeProcessor(
        Qwen2VLImageProcessor(size=pixels, patch_size=qwen3_vl.PATCH, **normalised),
        Qwen2VLVideoProcessor(size=pixels, patch_size=qwen3_vl.PATCH, **normalised),
        WhisperFeatureExtractor(feature_size=MEL_BINS),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> Qwen3OmniMoeConfig:
    """The configuration of a model of this shape, for the tokenizer's special tokens."""
    seeing = qwen3_vl_moe.make_config(spec, tokenizer)
    listening = {
        "num_mel_bins": MEL_BINS,
        "encoder_layers": 1,
        "encoder_attention_heads": spec.vision_heads,
        "encoder_ffn_dim": spec.vision_hidden_size,
        "d_model": spec.vision_hidden_size,
        "downsample_hidden_size": 16,
        "output_dim": spec.hidden_size,
        "initializer_range": 4 * spec.initializer_range,  # or no sound would get through
    }
    thinker = {
        "text_config": without_type(seeing.text_config.to_dict())
        | qwen3_vl_moe.expert_fields(spec)
        | {"tie_word_embeddings": False},
        "vision_config": without_type(seeing.vision_config.to_dict())
        | {
            # As released checkpoints say beside what transformers knows of.
            "image_size": isqrt(seeing.vision_config.num_position_embeddings) * qwen3_vl.PATCH,
            "apply_vit_abs_pos_embed": True,
        },
        "audio_config": listening,
        **special_token_ids(tokenizer),
        "audio_token_id": tokenizer.convert_tokens_to_ids(NAMED["audio_token"]),
        "audio_start_token_id": tokenizer.convert_tokens_to_ids(NAMED["audio_bos_token"]),
        "position_id_per_seconds": 13,
    }
    return Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)


def without_type(config: dict) -> dict:
    """The fields of a configuration for one of another name."""
    return {name: value for name, value in config.items() if name != "model_type"}
