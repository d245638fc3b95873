"""Digits, the built-in job: accuracy at 1 % and 0.25 % of fp32's bit-operations, five seeds, all methods.

python studies/digits.py
"""

import grid

import jpq

if __name__ == "__main__":
    methods = ["djpq", "djpq-pow2", "l0", "uniform"]
    grid.main("digits", "convnet on digits (8x8)", jpq.Config(), methods, ["1%", "0.25%"], [0, 1, 2, 3, 4])
