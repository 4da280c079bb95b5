"""The vLLM plugin: everything that imports vLLM lives below this package.

Data flows one way. ``plan`` turns a prompt into integers and ``step`` turns the plans of one batch
into row counts; both belong to every process. What runs in one process has its own room:

- ``front``: start-up, and what becomes HTTP 400;
- ``engine``: the scheduler and its KV blocks, which read plans alone;
- ``worker``: the runners' side (``model_state`` on the V2 runner, ``v1`` on the V1 runner), the
  buffer in which videos wait, and the models that apply a step's layout in the forward pass.
"""
