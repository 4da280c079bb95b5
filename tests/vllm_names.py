"""What only tests use of vLLM and what has another place in another version."""

try:  # 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.v1.core.kv_cache_planning import (
        _get_kv_cache_groups_uniform_page_size as groups_of_uniform_pages,
    )
    from vllm.v1.core.kv_cache_planning import (
        _project_kv_cache_groups_to_worker as groups_of_worker,
    )
except ImportError:  # 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.v1.core.kv_cache_utils import (
        _get_kv_cache_groups_uniform_page_size as groups_of_uniform_pages,
    )
    from vllm.v1.core.kv_cache_utils import (
        _project_kv_cache_groups_to_worker as groups_of_worker,
    )

__all__ = ["groups_of_uniform_pages", "groups_of_worker", "make_arg_parser"]
