"""Compression in Hugging Face's Trainer: `CompressionCallback` gives it the model to train, and follows its steps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from jpq.integrations.managed_session import ManagedSession
from jpq.session import compress
from jpq.types import JpqError

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise JpqError(
        'jpq.integrations.transformers needs packages that are missing: pip install "jpq[transformers]".'
    ) from error


class CompressionCallback(TrainerCallback):
    """Compress a model of transformers while `Trainer` trains it; afterwards `small` is the small model.

    Give the Trainer `model=callback.model` and `callbacks=[callback]`. Its optimizer and schedule train the weights; in
    the first `steps` optimizer steps the decisions are searched, then discretized within the budget, and the rest
    fine-tunes. The Trainer's checkpoints resume the search.

    Args:
        model: trained, in floating point; it is not changed.
        example_inputs: a real batch as a dict of keywords (input_ids, attention_mask, pixel_values ...), no labels.
        steps: optimizer steps that search, fewer than those of the whole training.
        distill: weight of distillation from `model`, whose `logits` are compared; the model must return its loss.
        temperature: of the distillation.
        gate_lr, bit_lr: learning rates of gates and bit-widths.
        method: a name in `jpq.METHODS`.
        settings: what `jpq.compress` takes, such as `bops="2%"`.

    Raises JpqError for what `jpq.compress` refuses; and when the Trainer is made for several processes, float16,
    `load_best_model_at_end`, `gradient_checkpointing` and `neftune_noise_alpha`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        steps: int,
        distill: float = 0.0,
        temperature: float = 2.0,
        gate_lr: float = 0.05,
        bit_lr: float = 0.02,
        method: str | None = None,
        **settings: Any,
    ):
        session = compress(model, example_inputs, method, steps=steps, **settings)
        self.model: _TransformersSession = _class_like(type(model))(session, gate_lr, bit_lr)
        self.model.distill, self.model.temperature = distill, temperature
        self.model.config = getattr(model, "config", None)
        for parameter in self.model.decisions:
            parameter.requires_grad_(False)  # until the Trainer has made its optimizer, which leaves them out so
        self.small: nn.Module | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the arguments, and take the decisions out of an optimizer that the Trainer was given."""
        _check_arguments(args)
        self._leave_out_decisions(kwargs.get("optimizer"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the decisions learn, now that the Trainer's optimizer is made."""
        _check_arguments(args)
        self._leave_out_decisions(kwargs.get("optimizer"))
        if kwargs.get("model") is not self.model:
            raise JpqError(
                "Give the Trainer the callback's own model: Trainer(model=callback.model, callbacks=[callback])."
            )
        for parameter in self.model.decisions:
            parameter.requires_grad_(True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient of the budget."""
        self.model.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step the search."""
        self.model.after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the small model, where the search came to its end."""
        self.small = self.model.finish("callback.model.session")

    def _leave_out_decisions(self, optimizer: Any) -> None:
        if optimizer is not None:
            self.model.leave_out_decisions(optimizer)


class _TransformersSession(ManagedSession):
    """A managed session whose loss, which the model returns, gets the distillation."""

    accepts_loss_kwargs = False  # the Trainer divides the loss itself where gradients accumulate
    distill: float = 0.0
    temperature: float = 2.0
    config: Any = None  # of the model, for what reads it

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state as the Trainer's files (safetensors) take it: contiguous, tied weights with memory of their own."""
        state = super().state_dict(*args, **kwargs)
        seen: set[int] = set()
        for name, value in state.items():
            place = value.untyped_storage().data_ptr()
            if place in seen or not value.is_contiguous():
                state[name] = value.clone(memory_format=torch.contiguous_format)
            elif value.numel():
                seen.add(place)
        return state

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        output = self.session(*args, **kwargs)
        if not (self.distill and self.training):
            return output
        if not isinstance(output, dict) or output.get("loss") is None:
            raise JpqError(
                "Distillation is added to the loss that the model returns, and it returned none: give the Trainer data "
                "with labels, label_smoothing_factor=0 and no compute_loss_func, or distill=0."
            )
        term = self.session.distill(output, kwargs or args, self.temperature)
        output["loss"] = output["loss"] + self.distill * term
        return output


def _class_like(model_class: type[nn.Module]) -> type[_TransformersSession]:
    """A class of managed sessions whose `forward` has a model's signature and name, as the Trainer reads them.

    It finds the columns of a data set and the labels by the names of the arguments.
    """

    def forward(self: _TransformersSession, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    return type(f"Compressed{model_class.__name__}", (_TransformersSession,), {"forward": forward})


def _check_arguments(args: Any) -> None:
    """Raise JpqError for training arguments that the callback cannot follow."""
    if args.world_size > 1 or args.n_gpu > 1:
        raise JpqError("CompressionCallback trains in one process, on one device: set CUDA_VISIBLE_DEVICES to one.")
    if args.fp16:
        raise JpqError("CompressionCallback needs bf16=True or full precision: fp16=True scales gradients.")
    if args.load_best_model_at_end:
        raise JpqError(
            "load_best_model_at_end=True would bring back a model from before its budget was met: set it to False."
        )
    for name in ("gradient_checkpointing", "neftune_noise_alpha"):
        if getattr(args, name, None):
            raise JpqError(
                f"{name}={getattr(args, name)} needs methods of transformers' own model class, which a model under "
                "compression lacks: leave it out."
            )
