"""What a toy checkpoint is made of."""

from dataclasses import dataclass
from typing import Literal, get_args

Architecture = Literal[
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "internvl",
    "glm4v",
    "glm4v_moe",
    "llava_onevision",
    "minicpmv4_6",
]


@dataclass(frozen=True)
class CheckpointSpec:
    """What a toy checkpoint is made of; equal specs give equal files.

    The head size, `hidden_size / num_heads`, must be a multiple of 16, and one that the
    attention backend supports (64 always is). `initializer_range` is the standard deviation
    of every weight and bias. Near `hidden_size ** -0.5` a layer neither drowns its input nor
    drowns in it, so the logits depend on the whole prompt.

    `dtype` is that of the file. vLLM runs a float32 checkpoint in bfloat16 unless it is told
    `--dtype float32`.
    """

    architecture: Architecture = "qwen2_5_vl"
    num_layers: int = 6
    hidden_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    vision_depth: int = 2
    vision_hidden_size: int = 64
    vision_heads: int = 2
    initializer_range: float = 0.06
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.head_dim % 16:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} "
                "is not a head size that is a multiple of 16"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads over {self.num_kv_heads} KV heads")
        if self.architecture not in get_args(Architecture):
            raise ValueError(
                f"architecture must be one of {', '.join(get_args(Architecture))}, not "
                f"{self.architecture!r}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")

    @property
    def head_dim(self) -> int:
        """Elements of one head of the decoder."""
        return self.hidden_size // self.num_heads


TINY = CheckpointSpec()
"""For tests: 4 million parameters."""

TINY_QWEN3 = CheckpointSpec(architecture="qwen3_vl")
"""The same of another family."""

MID = CheckpointSpec(
    num_layers=12,
    hidden_size=512,
    num_heads=8,
    num_kv_heads=4,
    intermediate_size=2048,
    initializer_range=0.044,
)
"""For throughput on a CPU: heavy enough that the decoder, not the engine, takes the time."""
