"""The V2 model runner's side where tokens are left out before the decoder alone.

All there is to it: drafters that read what the vision encoder returned get it without its places,
as vLLM does for its own EVS. The decoder itself gets both, see `models.entry`.
"""

from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState


class EntryStateMixin:
    """Mixed into a model state of vLLM's own, whose decoder's path does not pass here."""

    model: Any

    def gather_mm_embeddings(
        self, input_batch: InputBatch, draft_lookahead: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        embeddings, is_multimodal = super().gather_mm_embeddings(  # type: ignore[misc]
            input_batch, draft_lookahead
        )
        return self.model.entry.without_places(embeddings), is_multimodal


class EntryModelState(EntryStateMixin, DefaultModelState):
    """Of decoders whose layers are all attention."""


class HybridEntryModelState(EntryStateMixin, MambaHybridModelState):
    """Of decoders some of whose layers hold a state."""
