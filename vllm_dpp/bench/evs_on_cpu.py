"""EVS as vLLM ships it, made to run on a CPU."""

from typing import Any


def mend_evs_on_cpu(worker: Any) -> None:
    """Do what vLLM 0.32's ``CPUModelRunner.load_model`` forgets; without it EVS fails on a CPU.

    ``GPUModelRunner.load_model``, which it replaces, notes that videos are pruned. Not knowing, the
    runner leaves the four position channels on the embeddings: "Error during index put operation".
    """
    config = worker.model_config.multimodal_config
    if worker.device.type == "cpu" and config.is_multimodal_pruning_enabled():
        worker.model_runner.is_multimodal_pruning_enabled = True
