"""`ManagedSession`: a session as the network of another library's trainer, driven by that trainer's hooks.

The trainer's optimizer and schedule train the weights. Gates and bit-widths have an Adam of their own at constant
rates, as in jpq's own loop, because they must still move when the weights' rate has fallen.
"""

from __future__ import annotations

import io
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from jpq.session import CompressionSession
from jpq.types import JpqError


class ManagedSession(nn.Module):
    """A session whose trainer calls `before_step` and `after_step` around each step of its optimizer.

    After `session.steps` steps the decisions are discretized, and the trainer goes on to fine-tune the weights. Its
    state dict resumes the search, moments of the decisions' optimizer included.

    Args:
        session: made by `jpq.compress`.
        gate_lr, bit_lr: learning rates of gates and bit-widths.

    Raises JpqError for a bi-level method, which needs two halves of the samples.
    """

    def __init__(self, session: CompressionSession, gate_lr: float = 0.05, bit_lr: float = 0.02):
        super().__init__()
        if session.net.bilevel:
            raise JpqError(
                f"Method '{session.net.method}' learns weights and decisions from different samples, which a trainer's "
                "loop cannot: choose another, or use jpq.compress in your own loop."
            )
        self.session = session
        self._adam = self._decisions_optimizer(gate_lr, bit_lr)

    def _decisions_optimizer(self, gate_lr: float, bit_lr: float) -> torch.optim.Adam | None:
        """An optimizer of the decisions; None where nothing is left to decide."""
        if self.session.controller is None:
            return None
        decisions = self.session.net.decisions()
        groups = [{"params": decisions["gates"], "lr": gate_lr}, {"params": decisions["bits"], "lr": bit_lr}]
        groups = [group for group in groups if group["params"]]
        return torch.optim.Adam(groups) if groups else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the model under the decisions as they stand."""
        return self.session(*args, **kwargs)

    @property
    def decisions(self) -> list[nn.Parameter]:
        """Parameters of gates and bit-widths that are still learned; the trainer's optimizer must not have them."""
        return [] if self._adam is None else [p for group in self._adam.param_groups for p in group["params"]]

    def leave_out_decisions(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the decisions out of the groups of the trainer's optimizer; the groups stay, for its schedule."""
        ours = {id(p) for p in self.decisions}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]

    def before_step(self) -> None:
        """Add the gradient of the budget; call it once before each step, when the loss has been differentiated."""
        pressure = self.session.pressure()
        if pressure.requires_grad:
            pressure.backward()

    def after_step(self) -> None:
        """Step the decisions and the search, which ends with discretization; call it after each optimizer step."""
        if self._adam is not None:
            _move_state(self._adam)
            gradients = [p.grad for p in self.decisions if p.grad is not None]
            if all(bool(g.isfinite().all()) for g in gradients):
                self._adam.step()
            self._adam.zero_grad()
        self.session.step()
        if not self.session.decided and self.session.done >= self.session.steps:
            self.session.discretize()
            self._adam = None

    def finish(self, place: str) -> nn.Module | None:
        """The small model; None, with a warning, where the search has not come to its end.

        `place` is where the user finds the session, as code.
        """
        if not self.session.decided and self.session.done < self.session.steps:
            warnings.warn(
                f"Training ended at step {self.session.done} of {self.session.steps} of the search: resume it from its "
                f"last checkpoint, or call {place}.finalize() to decide now.",
                UserWarning,
                stacklevel=3,
            )
            return None
        return self.session.finalize()

    def get_extra_state(self) -> Tensor:
        """Moments of the decisions' optimizer as bytes, uint8; empty where nothing is left to decide."""
        if self._adam is None:
            return torch.zeros(0, dtype=torch.uint8)
        file = io.BytesIO()
        torch.save(self._adam.state_dict(), file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Continue from a state of `get_extra_state`. Raises JpqError for anything else; no code in it runs."""
        if self._adam is None:
            return
        if isinstance(state, Tensor) and state.numel() == 0:
            self._adam = None  # saved after discretization
            return
        try:
            content = torch.load(io.BytesIO(bytes(state.cpu().numpy())), map_location="cpu", weights_only=True)
            self._adam.load_state_dict(content)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
            raise JpqError("The checkpoint holds no optimizer of the decisions that jpq wrote.") from error


def _move_state(adam: torch.optim.Adam) -> None:
    """Bring moments to their parameters' device: trainers load checkpoints before they move the model."""
    for parameter, moments in adam.state.items():
        for name, value in moments.items():
            if name != "step" and value.device != parameter.device:
                moments[name] = value.to(parameter.device)
