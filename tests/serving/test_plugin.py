"""The entry point: lazy, idempotent, and no business of other models."""

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from vllm_dpp import serving
from vllm_dpp.serving.front.families import FAMILIES

PROGRAM = """
import sys
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

archs, hooks = set(ModelRegistry.get_supported_archs()), dict(MODELS_CONFIG_MAP)
from vllm_dpp.serving.front.plugin import register

register()
register()
added = set(ModelRegistry.get_supported_archs()) - archs
models = {f"DPP{name}ForConditionalGeneration" for name in (
    "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe",
    "Qwen3OmniMoe", "InternVL", "Glm4v", "Glm4vMoe", "LlavaOnevision", "MiniCPMV4_6",
)}
assert added == models, added
assert {k: v for k, v in MODELS_CONFIG_MAP.items() if k not in added} == hooks
assert "vllm_dpp.serving.worker.models.qwen2_5_vl" not in sys.modules, "models load lazily"
assert "vllm.model_executor.models.qwen2_5_vl" not in sys.modules
assert "vllm.model_executor.models.qwen3_vl" not in sys.modules
print("fine")
"""


def test_registering_twice_adds_our_variant_and_loads_no_model() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.endswith("fine\n"), done.stderr


def test_vllm_finds_the_entry_point() -> None:
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "dpp"]
    assert found.value == "vllm_dpp.serving.front.plugin:register"


def test_the_page_of_models_names_them_all() -> None:
    page = (Path(serving.__file__).parent / "README.md").read_text()
    named = re.findall(r"^\|[^|]*\(`(\w+ForConditionalGeneration)`\)", page, re.MULTILINE)
    assert named == [family.base for family in FAMILIES]
