"""What the settings mean, in words and bytes, for the server's log."""

from math import ceil
from typing import TYPE_CHECKING, Any

from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.serving.front.families import family_of, seeing_config
from vllm_dpp.serving.kv_size import kv_bytes_of_layer, num_kv_layers
from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SLICES_PER_MINUTE, FRAMES_PER_SLICE, SIDE = 60, 2, 448
"""Of a video of 448 x 448 pixels, read at 2 frames a second."""


def meaning(settings: ServingSettings, vllm_config: "VllmConfig") -> str:
    """One line: tokens that enter and are kept of a minute of video, and the bytes of their KV."""
    model = vllm_config.model_config
    layers, split = model.hf_text_config.num_hidden_layers, settings.split_layer
    below = num_kv_layers(model) if settings.entry_only else split
    seen = _tokens_per_minute(seeing_config(model))
    text = family_of(model.architecture).has_text_in_videos
    entered = num_kept(seen, settings.entry_ratio)
    kept = num_kept(entered, settings.retention_ratio)
    per_layer = kv_bytes_of_layer(vllm_config)
    left = (below * entered + (layers - split) * kept) * per_layer
    whole = (below + layers - split) * seen * per_layer
    further = "" if settings.entry_only else f" and {kept} go on from layer {split} of {layers}"
    return (
        f"of a minute of video ({seen} tokens{' and text between slices' if text else ''}: "
        f"{SIDE} x {SIDE} pixels, 2 frames a second) {entered} "
        f"tokens enter the decoder{further}: "
        f"{left / 2**20:.0f} MiB of KV instead of {whole / 2**20:.0f}, "
        f"{100 * left / whole:.0f} %"
    )


def _tokens_per_minute(config: Any) -> int:
    if (per_frame := getattr(config, "image_seq_length", None)) is not None:  # of whatever size
        return SLICES_PER_MINUTE * FRAMES_PER_SLICE * per_frame
    vision = config.vision_config
    if not hasattr(vision, "spatial_merge_size"):  # of whatever size, pooled two by two
        side = ceil(vision.image_size // vision.patch_size / 2)
        return SLICES_PER_MINUTE * FRAMES_PER_SLICE * side**2
    return SLICES_PER_MINUTE * (SIDE // (vision.patch_size * vision.spatial_merge_size)) ** 2
