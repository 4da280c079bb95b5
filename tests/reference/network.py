"""A Qwen2.5-VL checkpoint taken apart: embeddings, positions, any range of layers, logits."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from .layers import Rotary, decoder_layer, raw_relevance, rms_norm
from .positions import mrope_positions
from .prompt import MediaItem, Prompt


class Network:
    """A frozen checkpoint on the CPU. Hidden states are [tokens, hidden], without a batch."""

    def __init__(self, checkpoint_path: str | Path, dtype: torch.dtype) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint_path, dtype=dtype, attn_implementation="eager"
        )
        self.model.eval().requires_grad_(False)

    @property
    def num_layers(self) -> int:
        return len(self._decoder.layers)

    def media_embeddings(self, prompt: Prompt) -> list[Tensor]:
        """Output of the vision tower for each media item, [length, hidden]."""
        return [self._media_embedding(item) for item in prompt.media]

    def embeddings(
        self, prompt: Prompt, generated: Sequence[int], media: Sequence[Tensor]
    ) -> Tensor:
        """Rows that enter layer 0: the prompt, its media in their places, the generated tokens."""
        token_ids = torch.tensor([*prompt.token_ids, *generated])
        hidden = self.model.get_input_embeddings()(token_ids)
        for item, embedding in zip(prompt.media, media, strict=True):
            left = slice(None) if item.entered is None else list(item.entered)
            hidden[item.start : item.end] = embedding[left]
        return hidden

    def positions(self, prompt: Prompt, num_generated: int) -> Tensor:
        """Positions [3, tokens] of the prompt and of the tokens generated behind it."""
        vision = self.model.config.vision_config
        return mrope_positions(
            len(prompt.token_ids) + num_generated,
            prompt.media,
            tokens_per_second=vision.tokens_per_second,
            spatial_merge_size=vision.spatial_merge_size,
        )

    def hidden_states(self, hidden: Tensor, positions: Tensor, layers: range) -> list[Tensor]:
        """What enters each of the layers, and last what leaves them: one more than there are."""
        rotary = self._rotary(positions)
        states = [hidden]
        for index in layers:
            states.append(decoder_layer(self._decoder.layers[index], states[-1], rotary))
        return states

    def raw_relevance(
        self, layer: int, hidden: Tensor, positions: Tensor, question: Sequence[int], video: slice
    ) -> Tensor:
        """Attention of the question to each token of the video at one layer, [video tokens]."""
        rotary = self._rotary(positions)
        return raw_relevance(self._decoder.layers[layer], hidden, rotary, list(question), video)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, vocabulary] from what leaves the last layer."""
        return self.model.lm_head(rms_norm(self._decoder.norm, hidden))

    @property
    def _decoder(self) -> torch.nn.Module:
        return self.model.model.language_model

    def _rotary(self, positions: Tensor) -> Rotary:
        cos, sin = self._decoder.rotary_emb(self.model.lm_head.weight, positions[:, None])
        return cos[0], sin[0]

    def _media_embedding(self, item: MediaItem) -> Tensor:
        model = self.model
        encode = model.get_video_features if item.modality == "video" else model.get_image_features
        pixel_values = item.pixel_values.to(model.dtype)
        return encode(pixel_values, torch.tensor([item.grid_thw])).pooler_output[0]
