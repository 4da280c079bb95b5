"""A checkpoint taken apart: embeddings, positions, any range of layers, logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from .layers import Rotary, decoder_layer, raw_relevance, rms_norm
from .media import MediaItem
from .positions import mrope_positions, mrope_positions_by_slice
from .prompt import Prompt


class Network:
    """A frozen checkpoint on the CPU. Hidden states are [tokens, hidden], without a batch."""

    def __init__(self, checkpoint_path: str | Path, dtype: torch.dtype) -> None:
        of_class: Any = AutoModelForImageTextToText
        if AutoConfig.from_pretrained(checkpoint_path).model_type == "qwen3_omni_moe":
            of_class = Qwen3OmniMoeThinkerForConditionalGeneration
        self.model = of_class.from_pretrained(
            checkpoint_path, dtype=dtype, attn_implementation="eager"
        )
        self.model.eval().requires_grad_(False)

    @property
    def num_layers(self) -> int:
        return len(self._decoder.layers)

    def media_embeddings(self, prompt: Prompt) -> list[Tensor]:
        """Output of the vision tower for each media item, [length, hidden].

        With DeepStack [length, (1 + levels) hidden]: what is added after each of the first layers.
        """
        return [self._media_embedding(item) for item in prompt.media]

    def embeddings(
        self, prompt: Prompt, generated: Sequence[int], media: Sequence[Tensor]
    ) -> Tensor:
        """Rows that enter layer 0: the prompt, its media in their places, the generated tokens."""
        token_ids = torch.tensor([*prompt.token_ids, *generated])
        hidden = self.model.get_input_embeddings()(token_ids)
        for item, embedding in zip(prompt.media, media, strict=True):
            hidden[item.rows] = _entered(item, embedding)[:, : hidden.shape[1]]
            if self._is_llava and item.modality == "video":
                hidden[item.end] = self.model.model.image_newline
        return hidden

    def deepstack(
        self, prompt: Prompt, num_generated: int, media: Sequence[Tensor]
    ) -> list[Tensor]:
        """What is added after each of the first layers, [tokens, hidden] each."""
        if not media:
            return []
        width = self.model.config.get_text_config().hidden_size
        levels = media[0].shape[1] // width - 1
        num_tokens = len(prompt.token_ids) + num_generated
        added = [media[0].new_zeros(num_tokens, width) for _ in range(levels)]
        for item, embedding in zip(prompt.media, media, strict=True):
            own = _entered(item, embedding).split(width, dim=1)[1:]
            for level, of_level in zip(added, own, strict=True):
                level[item.rows] = of_level
        return added

    def positions(self, prompt: Prompt, num_generated: int) -> Tensor:
        """Positions [3, tokens] of the prompt and of the tokens generated behind it.

        [1, tokens] where a model counts tokens.
        """
        vision = self.model.config.vision_config
        count = torch.arange(len(prompt.token_ids) + num_generated)
        if self.model.config.model_type == "internvl" or self._is_llava:
            return count[None]
        if self._is_minicpm:
            return count.expand(3, -1)
        if self.model.config.model_type.startswith(("qwen3_vl", "qwen3_5", "glm4v")):
            return mrope_positions_by_slice(
                len(prompt.token_ids) + num_generated,
                prompt.media,
                spatial_merge_size=vision.spatial_merge_size,
            )
        of_omni = getattr(self.model.config, "position_id_per_seconds", 1.0)
        return mrope_positions(
            len(prompt.token_ids) + num_generated,
            prompt.media,
            tokens_per_second=getattr(vision, "tokens_per_second", of_omni),
            spatial_merge_size=vision.spatial_merge_size,
        )

    def hidden_states(
        self, hidden: Tensor, positions: Tensor, layers: range, deepstack: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """What enters each of the layers, and last what leaves them: one more than there are.

        Of a model with linear attention, all of whose layers are asked for, the ends alone.
        """
        states = [hidden]
        if self.has_linear_attention and layers:
            assert layers == range(self.num_layers) and not deepstack
            output = self._decoder(inputs_embeds=hidden[None], position_ids=positions[:, None])
            return [hidden, output.last_hidden_state[0]]
        rotary = self._rotary(positions)
        for index in layers:
            left = decoder_layer(self._decoder.layers[index], states[-1], rotary)
            states.append(left + deepstack[index] if index < len(deepstack) else left)
        return states

    def raw_relevance(
        self,
        layer: int,
        hidden: Tensor,
        positions: Tensor,
        question: Sequence[int],
        video: Sequence[int],
    ) -> Tensor:
        """Attention of the question to each token of the video at one layer, [video tokens]."""
        rotary = self._rotary(positions)
        decoder_layer = self._decoder.layers[layer]
        return raw_relevance(decoder_layer, hidden, rotary, list(question), list(video))

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, vocabulary] from what leaves the last layer."""
        if self.has_linear_attention:
            return self.model.lm_head(hidden)  # transformers' own decoder ends with its norm
        return self.model.lm_head(rms_norm(self._decoder.norm, hidden))

    @property
    def has_linear_attention(self) -> bool:
        """Whether the decoder sums up what it has read: only transformers' own forward runs it."""
        return self.model.config.get_text_config().model_type.startswith("qwen3_5")

    @property
    def _is_llava(self) -> bool:
        return self.model.config.model_type == "llava_onevision"

    @property
    def _is_minicpm(self) -> bool:
        return self.model.config.model_type == "minicpmv4_6"

    @property
    def _decoder(self) -> torch.nn.Module:
        return getattr(self.model.model, "language_model", self.model.model)

    def _rotary(self, positions: Tensor) -> Rotary:
        if len(positions) > 1:
            positions = positions[:, None]
        cos, sin = self._decoder.rotary_emb(self.model.lm_head.weight, positions)
        return cos[0], sin[0]

    def _media_embedding(self, item: MediaItem) -> Tensor:
        model = self.model
        if model.config.model_type == "internvl":
            return model.get_image_features(item.pixel_values).pooler_output.flatten(0, 1)
        if self._is_llava:
            pixels = item.pixel_values[None].to(model.dtype)
            if item.modality == "video":
                return model.get_video_features(pixels).pooler_output[0, :-1]
            sizes = torch.tensor([item.image_size])
            return model.get_image_features(pixels, image_sizes=sizes).pooler_output[0]
        if self._is_minicpm:  # of an image, too, whose tiles are as a frame's
            sizes = torch.tensor(item.target_sizes)
            return torch.cat(model.get_image_features(item.pixel_values, sizes).pooler_output)
        encode = model.get_video_features if item.modality == "video" else model.get_image_features
        pixel_values = item.pixel_values.to(model.dtype)
        output = encode(pixel_values, torch.tensor([item.grid_thw]))
        levels = [level[0] for level in getattr(output, "deepstack_features", None) or ()]
        return torch.cat([output.pooler_output[0], *levels], dim=1)


def _entered(item: MediaItem, embedding: Tensor) -> Tensor:
    return embedding if item.entered is None else embedding[list(item.entered)]
