"""Which values of the KV cache to keep: a rule is a score, `keep_top` turns scores into a pattern.

To add a rule: write its score function in rules.py and add one line to `RULES`. It then works everywhere a
rule is named (`k_rule=`, `v_rule=`, `--k_rule`, `--v_rule`), simulated and on the kernels. A score that needs
more than the tokens themselves says ``observes=True`` and gets recent queries and their attention (`Observed`)::

    def by_peak(x, window):
        return x.abs() * window.grouped_queries().abs().amax((2, 3)).unsqueeze(2)

    Rule("Kt_Peak", "K", by_peak, uniform=True, observes=True),
"""

from mustafar.pruning.observed import OBSERVED_QUERIES, Observed
from mustafar.pruning.rules import RULES, Pruning, Rule, get_rule
from mustafar.pruning.selection import keep_top

__all__ = ["OBSERVED_QUERIES", "RULES", "Observed", "Pruning", "Rule", "get_rule", "keep_top"]
