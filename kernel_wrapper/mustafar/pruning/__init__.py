"""Which values of the KV cache to keep: a rule is a score, `keep_top` turns scores into a pattern.

To add a rule: write its score function in rules.py and add one line to `RULES`. It then works everywhere a
rule is named (`k_rule=`, `v_rule=`, `--k_rule`, `--v_rule`), simulated and on the kernels.
"""

from mustafar.pruning.rules import RULES, Pruning, Rule, get_rule
from mustafar.pruning.selection import keep_top

__all__ = ["RULES", "Pruning", "Rule", "get_rule", "keep_top"]
