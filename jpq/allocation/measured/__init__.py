"""Decisions by measurement: the sensitivity table, the exact solver, and the contest of plans."""
