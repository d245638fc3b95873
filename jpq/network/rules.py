"""What each ATen op does to channel labels: `RULES`, op name -> handler.

Add one of your own with the decorator; an op without a rule freezes every channel that it touches, and is listed in
`Network.unknown_ops`:

    @rule("aten.cosh")
    def cosh(call: Call) -> Dims:
        return call.x
"""

from __future__ import annotations

from jpq.network import rules_layers, rules_pointwise, rules_reshape, rules_shape
from jpq.network.call import RULES, Call, Dims, Rule, rule

__all__ = ["RULES", "Call", "Dims", "Rule", "rule"]

MEMBERS = (rules_layers, rules_pointwise, rules_reshape, rules_shape)  # importing them fills the table
