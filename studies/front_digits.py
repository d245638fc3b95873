"""Fronts of the built-in job at the same number of epochs, three seeds (see fronts.py).

python studies/front_digits.py
"""

import fronts

import jpq

if __name__ == "__main__":
    fronts.main(
        "front_digits", "convnet on digits (8x8): 40 epochs for a front", jpq.Config(), fronts.Plan(), [0, 1, 2]
    )
