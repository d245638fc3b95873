"""Compression in Lightning's Trainer: `CompressionCallback` puts a session in the place of a module's network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from jpq.integrations.managed_session import ManagedSession
from jpq.session import compress
from jpq.types import JpqError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise JpqError(
        'jpq.integrations.lightning needs a package that is missing: pip install "jpq[lightning]".'
    ) from error

PRECISIONS = ("32-true", "bf16-mixed")  # of a Trainer; float16 scales gradients, and others cast the whole module

AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")  # callbacks; older Lightning lacks the second


class CompressionCallback(Callback):
    """Compress a LightningModule's network while `Trainer.fit` trains it; afterwards `small` is the small model.

    The module's own optimizer and schedule train the weights. The first `search` of the steps search, then the
    decisions are discretized within the budget and the rest fine-tunes. At the end of `fit` the small model stands in
    the module, for `trainer.test`. Lightning's checkpoints resume the search.

    Args:
        network: name of the module's attribute that is compressed, such as "model" or "backbone.body".
        example_inputs: a real batch of the network's inputs (a tensor, a tuple of arguments, or a dict of keywords);
            default: the first item of the first training batch.
        search: share of the steps of `fit` that search.
        steps: number of steps that search, in place of `search`.
        distill: weight of distillation from the float network; needs one call of the network in a training step.
        temperature: of the distillation.
        gate_lr, bit_lr: learning rates of gates and bit-widths.
        method: a name in `jpq.METHODS`.
        settings: what `jpq.compress` takes, such as `bops="1%"`.

    Raises JpqError when `fit` begins for a trainer with several processes, manual optimization, averaged weights or a
    precision other than "32-true" and "bf16-mixed", and for what `jpq.compress` refuses; and where a checkpoint would
    be loaded into the small model.
    """

    def __init__(
        self,
        network: str = "model",
        *,
        example_inputs: Any = None,
        search: float = 0.5,
        steps: int | None = None,
        distill: float = 0.0,
        temperature: float = 2.0,
        gate_lr: float = 0.05,
        bit_lr: float = 0.02,
        method: str | None = None,
        **settings: Any,
    ):
        if not 0 < search <= 1:
            raise JpqError(f"search={search} is no share of the steps: give a number above 0, at most 1.")
        self.network, self.example_inputs, self.search, self.steps = network, example_inputs, search, steps
        self.distill, self.temperature = distill, temperature
        self._rates = {"gate_lr": gate_lr, "bit_lr": bit_lr}
        self._settings: dict[str, Any] = {"method": method, **settings}
        self.managed: ManagedSession | None = None
        self.small: nn.Module | None = None
        self._call: tuple[Any, Any] | None = None  # inputs and output of the network in this training step
        self._steps_seen = 0
        self._watch: Any = None  # handle of the check of what is loaded outside of `fit`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the session in the network's place, before Lightning makes the optimizer."""
        if stage != "fit":
            self._watch = pl_module.register_load_state_dict_pre_hook(self._check_loaded)
            return
        _check_trainer(trainer, pl_module)
        network = self._find_network(pl_module)
        if self.managed is not None and network is self.managed:  # goes on with the search of an earlier fit
            return
        example = _first_inputs(trainer) if self.example_inputs is None else self.example_inputs
        steps = self._search_steps(trainer) if self.steps is None else self.steps
        session = compress(network, example, steps=steps, **self._settings)
        self.managed = ManagedSession(session, **self._rates)
        if self.distill:
            session.register_forward_hook(self._keep_call, with_kwargs=True)
        self._place(pl_module, self.managed)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was found."""
        self.teardown(trainer, pl_module, "")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the decisions out of the module's optimizer, before Lightning restores its state."""
        if self.managed is None:
            return
        if len(trainer.optimizers) != 1:
            count = len(trainer.optimizers)
            raise JpqError(f"CompressionCallback works with one optimizer, and configure_optimizers gives {count}.")
        self.managed.leave_out_decisions(trainer.optimizers[0])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where a checkpoint was saved."""
        self._steps_seen = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add distillation to the loss of this batch, in place: Lightning has no hook that replaces a loss."""
        if self.managed is None or self._call is None:
            return
        inputs, output = self._call
        self._call = None
        term = self.distill * self.managed.session.distill(output, inputs, self.temperature)
        loss.add_(term / trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the budget."""
        if self.managed is not None:
            self.managed.before_step()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Step the search where Lightning's optimizer took a step."""
        if self.managed is not None and trainer.global_step > self._steps_seen:
            self._steps_seen = trainer.global_step
            self.managed.after_step()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the small model in the module, where the search came to its end."""
        if self.managed is None:
            return
        self.small = self.managed.finish("callback.managed.session")
        if self.small is not None:
            self._place(pl_module, self.small)
            self.managed = None

    def _check_loaded(self, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        """Raise JpqError where a checkpoint of the model under compression is loaded into another one."""
        saved = any(name.startswith(f"{self.network}.session.") for name in state_dict)
        if saved and not isinstance(module.get_submodule(self.network), ManagedSession):
            raise JpqError(
                "The checkpoint holds the model under compression, and the module another one. Test the small model, "
                "which stands in the module after fit, by a new Trainer without a checkpoint: Trainer().test(module, "
                "...). To resume the training, give ckpt_path to fit."
            )

    def _keep_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._call = (kwargs or args, output)

    def _find_network(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.network)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise JpqError(
                f"{type(pl_module).__name__} has no module '{self.network}' when fit begins: give network= one of "
                f"{names or 'those that its __init__ makes'}."
            ) from error

    def _place(self, pl_module: LightningModule, network: nn.Module) -> None:
        owner, _, name = self.network.rpartition(".")
        setattr(pl_module.get_submodule(owner), name, network)

    def _search_steps(self, trainer: Trainer) -> int:
        total = trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            raise JpqError("The number of training steps is not known: give CompressionCallback steps=N that search.")
        return max(1, round(self.search * total))


def _check_trainer(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise JpqError for what the callback cannot follow."""
    if trainer.world_size > 1:
        raise JpqError("CompressionCallback trains in one process: give Trainer devices=1.")
    if not pl_module.automatic_optimization:
        raise JpqError(
            f"{type(pl_module).__name__} optimizes by hand (automatic_optimization=False): use jpq.compress in its "
            "training_step in place of CompressionCallback."
        )
    if trainer.precision not in PRECISIONS:
        raise JpqError(f"CompressionCallback needs precision={' or '.join(PRECISIONS)}, and got {trainer.precision}.")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(base.__name__ in AVERAGING for base in type(callback).__mro__):
            raise JpqError(
                f"{type(callback).__name__} would average weights from before discretization with those from after "
                "it, which are on different grids: leave it out."
            )


def _first_inputs(trainer: Trainer) -> Any:
    """Inputs of the first training batch, without moving the random numbers of the run."""
    with torch.random.fork_rng():
        trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
        batch = next(iter(loader), None) if isinstance(loader, Iterable) else None
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    if isinstance(batch, Tensor):
        return batch
    raise JpqError(
        f"The first training batch is a {type(batch).__name__}: give CompressionCallback example_inputs=, a batch of "
        "the network's inputs."
    )
