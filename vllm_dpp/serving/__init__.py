"""The vLLM plugin: everything that imports vLLM lives below this package.

Data flows one way. ``plan`` turns a prompt into integers and ``step`` turns the plans of one batch
into row counts. The scheduler side (``scheduler``, ``kv_cache``) and the worker side
(``model_state`` or ``v1``) both read those, and ``models`` applies them inside the forward pass.
"""
