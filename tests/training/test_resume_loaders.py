"""A run on the user's own loaders that is interrupted within an epoch goes on to the same bits."""

from __future__ import annotations

from pathlib import Path

import own_loaders
import pytest
import torch

from jpq.config import Budget, Config, Run, Task, Train
from jpq.recipe import optimize
from jpq.training.history import NullObserver

pytestmark = pytest.mark.slow


class StopAt(NullObserver):
    """Interrupts a run at one of its steps."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def config(folder: Path, resume: bool = False) -> Config:
    return Config(
        task=Task(data="own_loaders:noisy", model="own_loaders:Narrow"),
        budget=Budget(target_bops="20%"),
        train=Train(epochs=4, float_epochs=1, batch_size=8),
        run=Run(out=folder, name="run", threads=1, resume=resume),
    )


@pytest.mark.parametrize("step", [3, 14])
def test_a_resumed_run_reads_the_same_batches(tmp_path, step):
    assert own_loaders.noisy()["train"].dataset[0][0].shape == (4,)
    whole = optimize(config(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        optimize(config(tmp_path / "cut"), StopAt(step))
    torch.manual_seed(1234)
    resumed = optimize(config(tmp_path / "cut", resume=True))
    assert [row.loss for row in resumed.history] == [row.loss for row in whole.history]
    assert resumed.compressed.accuracy == whole.compressed.accuracy
    files = [(tmp_path / name / "run" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
