"""The model as we see it: trace, rules, sites."""
