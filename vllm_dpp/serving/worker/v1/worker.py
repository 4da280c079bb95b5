"""The CPU worker that builds our V1 runner."""

from vllm.v1.worker import cpu_worker  # isort: skip  # first: it orders shared-memory imports

from vllm_dpp.serving.worker.v1.runner import PruningCPUModelRunner


class PruningCPUWorker(cpu_worker.CPUWorker):
    """``CPUWorker`` has no hook for the runner's class, so its module's name is exchanged briefly.

    See ``patches/cpu-worker-runner.md``.
    """

    def init_device(self) -> None:
        stock = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = PruningCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock
