"""vllm_dpp: prune video tokens in the middle of the decoder, inside vLLM.

Importing this package changes nothing: vLLM calls `vllm_dpp.serving.front.plugin.register`
through the entry point group `vllm.general_plugins`.
"""

__version__ = "0.1.0"
