"""Code that the study scripts share: grids of runs, result rows, short trials, synthetic data, the tables of README."""
