"""Rules: which tokens of a video are kept. One small file each, chosen by the setting `rule`.

To add one, write a file with a function of type `Rule`, or one for a single video that `each` makes
a rule, and name it in `RULES`; from a package of your own see the guide in `pruning/README.md`.
"""

from vllm_dpp.pruning.rules import attention, change, dpp, random_draw, uniform
from vllm_dpp.pruning.rules.rule import Means, Rule, each

RULES: dict[str, Rule] = {
    "dpp": dpp.keep,
    "change": change.keep,
    "attention": each(attention.keep),
    "uniform": each(uniform.keep),
    "random": each(random_draw.keep),
}

__all__ = ["RULES", "Means", "Rule", "each"]
