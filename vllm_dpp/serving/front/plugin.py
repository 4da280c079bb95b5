"""The ``vllm.general_plugins`` entry point."""


def register() -> None:
    """Tell vLLM about the pruning variants.

    vLLM calls this in every process that it starts, sometimes more than once. It imports no model
    and changes nothing for other architectures. Of a vLLM that is not served it asks nothing, and
    says so: the variants stay unknown there, and everybody else's models start.
    """
    from vllm.logger import init_logger

    from vllm_dpp.serving import vllm_versions

    try:
        vllm_versions.check()
    except vllm_versions.UnsupportedVersionError as error:
        init_logger("vllm.vllm_dpp").error("no model is pruned: %s", error)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_dpp.serving.front.config_hook import PruningConfigHook
    from vllm_dpp.serving.front.families import FAMILIES

    known = ModelRegistry.get_supported_archs()
    for family in FAMILIES:
        if family.variant not in known:
            ModelRegistry.register_model(family.variant, family.implementation)
        MODELS_CONFIG_MAP[family.variant] = PruningConfigHook
