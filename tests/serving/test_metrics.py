"""Metrics of schedulers and workers, on their way to a scrape."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from vllm.engine.arg_utils import EngineArgs

from vllm_dpp.serving import metrics
from vllm_dpp.serving.engine.deferred_rows import DeferredRows
from vllm_dpp.serving.engine.metrics import SchedulerMetrics, num_cached_videos
from vllm_dpp.serving.engine.planned_request import PlannedRequest
from vllm_dpp.serving.front.metrics import OfProcesses
from vllm_dpp.serving.plan import MediaSpan, build_plan
from vllm_dpp.serving.request_plan import RequestOptions
from vllm_dpp.serving.worker import clock

ROOT = Path(__file__).parents[2]
DEPLOYMENT = ROOT / "examples" / "deployment"


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> Any:
    return EngineArgs(
        str(tiny_checkpoint),
        hf_overrides={"architectures": ["DPPQwen2_5_VLForConditionalGeneration"]},
        max_model_len=1024,
    ).create_engine_config()


def scraped(folder: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(OfProcesses(folder))
    lines = generate_latest(registry).decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def test_a_scheduler_is_scraped_from_another_registry(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    engines = []
    for engine in (0, 1):
        monkeypatch.setattr(config.parallel_config, "data_parallel_index", engine)
        engines.append(SchedulerMetrics(config, 100))
    rows = DeferredRows(100)
    assert rows.lend("first", 80) and not rows.fits("second", 30) and not rows.fits("second", 30)
    engines[1].step(rows)
    for engine in engines:
        engine.write()
    found = scraped(tmp_path)
    model = config.model_config.served_model_name
    values = [
        found[f'vllm_dpp_{name}{{engine="{engine}",model_name="{model}"}}']
        for name in ("deferred_rows", "deferred_rows_capacity", "waits_for_rows_total")
        for engine in (0, 1)
    ]
    assert values == [0, 80, 100, 100, 0, 1]
    assert not [name for name in found if "_created" in name]


def test_they_are_written_without_being_asked(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    kept = SchedulerMetrics(config, 7)
    end = time.monotonic() + 30
    while not list(tmp_path.glob("*.prom")) and time.monotonic() < end:
        time.sleep(0.1)
    assert 7 in scraped(tmp_path).values()
    del kept


def test_where_values_are_shared_nothing_is_written(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    SchedulerMetrics(config, 7).write()
    assert not list(tmp_path.glob("*.prom"))


def test_a_wait_is_counted_once() -> None:
    rows = DeferredRows(10)
    rows.lend("first", 10)
    for _ in range(3):
        assert not rows.fits("second", 5)
        rows.end_step()
    assert (rows.take_waits(), rows.take_waits()) == (1, 0)
    rows.settle("first", 0)
    assert rows.lend("second", 5)
    rows.end_step()
    assert not rows.fits("second", 11)
    rows.forget("second")
    assert not rows.fits("second", 11)
    assert rows.take_waits() == 2


def request(*spans: tuple[int, int]) -> Any:
    places = [SimpleNamespace(offset=start, length=length) for start, length in spans]
    return SimpleNamespace(
        mm_features=[SimpleNamespace(modality="video", mm_position=place) for place in places]
    )


def test_videos_that_the_prefix_cache_holds() -> None:
    """Of a pruned one a hit may leave the tail, which is kept whatever it shows."""
    spans = [(10, 40), (60, 40)]
    media = [MediaSpan(start, length, is_prunable=True) for start, length in spans]
    plan = build_plan([1] * 120, media, retention_ratio=0.5, turn_end_token_id=None, block_size=16)
    assert plan is not None
    planned = PlannedRequest(plan, RequestOptions(), None, plan)
    decided = [turn.decided for turn in plan.turns]
    assert decided[-1] < 100, "there is a tail"
    for cached in range(120):
        unpruned = num_cached_videos(request(*spans), None, cached)
        assert unpruned == (cached >= 50) + (cached >= 100)
        pruned = num_cached_videos(request(*spans), planned, cached)
        assert pruned == sum(turn.decided <= cached for turn in plan.turns for _ in turn.videos)


def test_the_hosts_clock() -> None:
    start = clock.mark(on_gpu=False)
    time.sleep(0.01)
    end = clock.mark(on_gpu=False)
    assert clock.is_past(end) and 0.01 <= clock.seconds(start, end) < 1


@pytest.mark.gpu
def test_the_devices_clock() -> None:
    start = clock.mark(on_gpu=True)
    torch.cuda._sleep(10_000_000)
    end = clock.mark(on_gpu=True)
    assert not clock.is_past(end), "nothing has waited"
    torch.cuda.synchronize()
    assert clock.is_past(end) and 1e-3 < clock.seconds(start, end) < 1


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bvllm_dpp_\w+", text))


def test_the_dashboard_asks_for_what_there_is() -> None:
    documented = names_in((ROOT / "vllm_dpp" / "serving" / "README.md").read_text())
    dashboard = json.loads((DEPLOYMENT / "grafana" / "dashboard.json").read_text())
    asked = {
        name.removesuffix("_bucket")
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in names_in(target["expr"])
    }
    assert asked == documented


def test_the_deployment_mounts_what_there_is() -> None:
    compose = yaml.safe_load((DEPLOYMENT / "compose.yaml").read_text())
    services = compose["services"]
    build = services["server"]["build"]
    root = (DEPLOYMENT / build["context"]).resolve()
    assert root == ROOT and (root / build["dockerfile"]).is_file()
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOYMENT / source).is_file(), volume
    scrape = yaml.safe_load((DEPLOYMENT / "prometheus.yaml").read_text())
    [target] = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services
    provisioned = yaml.safe_load((DEPLOYMENT / "grafana" / "provisioning.yaml").read_text())
    assert "prometheus" in provisioned["datasources"][0]["url"]
