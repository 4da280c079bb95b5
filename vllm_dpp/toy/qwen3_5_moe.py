"""A small Qwen3.5 with a mixture of experts: what `checkpoint` asks of an architecture."""

from transformers import Qwen2Tokenizer, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from vllm_dpp.toy import qwen3_5
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Qwen3_5MoeForConditionalGeneration
NUM_EXPERTS = PER_TOKEN = 4
"""So that no rounding chooses among them: on a CPU vLLM runs linear attention in bfloat16 alone."""
make_processor = qwen3_5.make_processor


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> Qwen3_5MoeConfig:
    """The configuration of a model of this shape, for the tokenizer's special tokens."""
    return qwen3_5.make_config(
        spec,
        tokenizer,
        Qwen3_5MoeConfig,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        moe_intermediate_size=3 * spec.hidden_size // 4,
        shared_expert_intermediate_size=spec.intermediate_size,
    )
