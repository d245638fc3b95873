"""Fashion-MNIST with LeNet-5 (trained in the same run) at 1 % and 0.4 % of fp32's bit-operations.

python studies/fashion_mnist.py --data-root DIR
"""

import grid

import jpq
from jpq.config import Task, Train

BASE = jpq.Config(
    task=Task(model="lenet5", data="fashion-mnist"),
    train=Train(epochs=6, search=0.34, float_epochs=6, batch_size=128, lr=2e-3),
)

if __name__ == "__main__":
    grid.main("fashion_mnist", "LeNet-5 on Fashion-MNIST", BASE, ["djpq", "uniform"], ["1%", "0.4%"], [0])
