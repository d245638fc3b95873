"""Fronts of ResNet8 on Fashion-MNIST (10,000 training images) at the same number of epochs (see fronts.py).

python studies/front_fashion_mnist.py --data-root DIR
"""

import fronts
from methods import BASE

if __name__ == "__main__":
    plan = fronts.Plan(each=4, trial=2)
    fronts.main("front_fashion_mnist", "ResNet8 on Fashion-MNIST: 16 epochs for a front", BASE, plan, [0])
