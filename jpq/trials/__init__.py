"""A study: many runs of `jpq.optimize`, whose settings Optuna chooses, towards a front of accuracy against cost."""
