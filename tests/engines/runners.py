"""Which vLLM model runner a process uses. Call before anything imports vLLM."""

import os
import types

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def choose(runner: str) -> None:
    """Set this process up for ``"v1"`` or ``"v2"`` on a CPU, or for ``"cuda"``, V2 on a GPU.

    Without a GPU the V2 runner's Triton kernels run in Triton's interpreter on CPU tensors, which
    needs an active driver to be registered.
    """
    os.environ.update(ENVIRONMENT)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
    if runner == "v1":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        return
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    if runner == "cuda":
        os.environ["TRITON_F32_DEFAULT"] = "ieee"  # its products would be TF32
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
