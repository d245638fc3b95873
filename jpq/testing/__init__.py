"""Conformance checks of the laws that every gate, score, structure and task obeys, for tests of user-defined parts."""

from __future__ import annotations

from jpq.testing.gates import check_gate
from jpq.testing.scores import check_score
from jpq.testing.structures import check_structure
from jpq.testing.tasks import check_task

__all__ = ["check_gate", "check_score", "check_structure", "check_task"]
