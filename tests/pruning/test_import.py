import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.modules["vllm"] = None  # an import of it raises ImportError
import torch
before = set(sys.modules)
import vllm_dpp.pruning
assert sys.modules["vllm"] is None
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
video = vllm_dpp.pruning.VideoTokens(torch.eye(4), None, 2, 2)
print(vllm_dpp.pruning.keep_indices([video], vllm_dpp.pruning.PruningConfig())[0].tolist())
"""


def test_needs_torch_and_the_standard_library_alone():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['vllm_dpp']", "[0, 1]"]
