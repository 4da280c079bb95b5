"""A CPU worker on which EVS runs, for `vllm serve --worker-cls`."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dpp.bench.evs_on_cpu import mend_evs_on_cpu


class EvsWorker(CPUWorker):
    """vLLM's own, with the line that its ``load_model`` lacks (patches/evs-on-cpu.md)."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        mend_evs_on_cpu(self)
