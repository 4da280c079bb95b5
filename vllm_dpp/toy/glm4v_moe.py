"""A small GLM-4.6V, GLM-4.1V with a mixture of experts: what `checkpoint` asks of an architecture.

Its videos have their times in words.
"""

from transformers import (
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Qwen2Tokenizer,
)
from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor

from vllm_dpp.toy import glm4v
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Glm4vMoeForConditionalGeneration
NUM_EXPERTS, PER_TOKEN = 4, 2
make_tokenizer = glm4v.make_tokenizer


def make_processor(tokenizer: Qwen2Tokenizer) -> Glm46VProcessor:
    """The processor of text, images and videos."""
    return glm4v.make_processor(
        tokenizer, Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor
    )


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> Glm4vMoeConfig:
    """The configuration of a model of this shape, for the tokenizer's special tokens."""
    return glm4v.make_config(
        spec,
        tokenizer,
        Glm4vMoeConfig,
        head_dim=spec.head_dim,
        use_qk_norm=False,  # as released, and as transformers always has it
        first_k_dense_replace=1,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=PER_TOKEN,
        moe_intermediate_size=3 * spec.hidden_size // 4,
        routed_scaling_factor=1.5,  # released models have 1, where a lost one would go unnoticed
    )
