"""Plain versions of torch.nn's recurrent modules, as steps of nn.Linear layers whose hidden units are prunable.

    RNN    h' = act(a + b)                                             act: tanh or relu
    LSTM   i, f, g, o = a + b;  c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c')
    GRU    r, z, n = a, b;      n' = tanh(a_n + sigmoid(r) b_n);         h' = (1 - sigmoid(z)) n' + sigmoid(z) h

with a = `inputs`(x), computed for all time steps at once, and b = `hidden`(h), one call per step; with a projection
(proj_size) h' goes through the layer `output`. A unit is an entry of h: the rows of its gates in both layers, and the
column that reads it. Sources: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 1997; Cho et
al. 2014, arXiv:1406.1078; projections: Sak et al. 2014, arXiv:1402.1128. The order of gates is that of torch.nn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from jpq.tracing.attention import copy_as_linear
from jpq.types import JpqError

State = tuple[Tensor, ...]  # (h,), or (h, c): [*batch, units] each


class RecurrentCell(nn.Module, ABC):
    """One direction of one recurrent layer as plain layers; alone, it takes the place of a cell of torch.nn.

    Args:
        source: the module whose weights are copied; it is not changed.
        suffix: end of their names in `source`, such as "_l0_reverse"; empty for a cell.
    """

    blocks: ClassVar[int] = 1  # rows of each weight per unit
    states: ClassVar[int] = 1  # tensors of a state

    start: Tensor

    def __init__(self, source: Any, suffix: str = ""):
        super().__init__()
        self.inputs, self.hidden = (
            copy_as_linear(getattr(source, f"weight_{side}{suffix}"), getattr(source, f"bias_{side}{suffix}", None))
            for side in ("ih", "hh")
        )
        projection: Tensor | None = getattr(source, f"weight_hr{suffix}", None)
        self.output = None if projection is None else copy_as_linear(projection, None)
        if projection is not None:  # the first h; without a projection zeros as large as a gate
            self.register_buffer("start", projection.new_zeros(len(projection)).detach(), persistent=False)
        self.train(source.training)

    @property
    def input_size(self) -> int:
        """The number of features that are read at each time step."""
        return self.inputs.in_features

    @property
    def hidden_size(self) -> int:
        """The number of units now, before a projection."""
        return self.hidden.out_features // self.blocks

    def forward(self, input: Tensor, hx: Tensor | State | None = None) -> Tensor | State:
        """The next state of one time step, as torch.nn's cells give it: h, or (h, c)."""
        given = (hx,) if isinstance(hx, Tensor) else hx
        state = self._next_state(self.inputs(input), given)
        return state if self.states > 1 else state[0]

    def run(self, x: Tensor, state: State | None, time_dim: int, reverse: bool) -> tuple[Tensor, State]:
        """(h of all time steps, shaped as x but for its last dim; the last state)."""
        steps = self.inputs(x).unbind(time_dim)
        results: list[Tensor] = []
        with parametrize.cached():  # masks of the weights are the same in every step
            for a in reversed(steps) if reverse else steps:
                state = self._next_state(a, state)
                results.append(state[0])
        assert state is not None
        return torch.stack(results[::-1] if reverse else results, time_dim), state

    def _next_state(self, a: Tensor, state: State | None) -> State:
        """The state after a step whose inputs are projected to `a`, [*batch, blocks * units]."""
        if state is None:
            zeros = torch.zeros_like(a.chunk(self.blocks, -1)[0])
            h = zeros if self.output is None else self.start.expand(*a.shape[:-1], -1)
            state = (h, zeros)[: self.states]
        h, *memory = self._step(a, self.hidden(state[0]), state)
        return (h if self.output is None else self.output(h), *memory)

    @abstractmethod
    def _step(self, a: Tensor, b: Tensor, state: State) -> State:
        """The next state, before a projection, from the two projections [*batch, blocks * units] and the state."""


class PlainRNNCell(RecurrentCell):
    """nn.RNNCell, or one direction of a layer of nn.RNN."""

    def __init__(self, source: nn.RNN | nn.RNNCell, suffix: str = ""):
        super().__init__(source, suffix)
        self.nonlinearity = source.nonlinearity

    def _step(self, a: Tensor, b: Tensor, state: State) -> State:
        return (torch.tanh(a + b) if self.nonlinearity == "tanh" else torch.relu(a + b),)


class PlainLSTMCell(RecurrentCell):
    """nn.LSTMCell, or one direction of a layer of nn.LSTM."""

    blocks = 4
    states = 2

    def _step(self, a: Tensor, b: Tensor, state: State) -> State:
        i, f, g, o = (a + b).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class PlainGRUCell(RecurrentCell):
    """nn.GRUCell, or one direction of a layer of nn.GRU."""

    blocks = 3

    def _step(self, a: Tensor, b: Tensor, state: State) -> State:
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        return ((1 - z) * n + z * state[0],)


_CELLS: dict[str, type[RecurrentCell]] = {
    "RNN_TANH": PlainRNNCell,
    "RNN_RELU": PlainRNNCell,
    "LSTM": PlainLSTMCell,
    "GRU": PlainGRUCell,
}


class Recurrent(nn.Module):
    """Layers of recurrent cells with the arguments, outputs and options of nn.RNN, nn.LSTM and nn.GRU.

    The loop over time is written out by whoever traces it, so that a trace or a file holds for one length of sequence.
    Packed sequences are not taken, and neither is an empty one.

    Args:
        source: the module whose values and options are copied; it is not changed.
    """

    def __init__(self, source: nn.RNNBase):
        super().__init__()
        self.num_layers, self.batch_first, self.dropout = source.num_layers, source.batch_first, source.dropout
        self.bidirectional, self.mode = source.bidirectional, source.mode
        make, directions = _CELLS[source.mode], ("", "_reverse")[: 2 if source.bidirectional else 1]
        self.names = [f"l{k}{direction}" for k in range(source.num_layers) for direction in directions]
        for name in self.names:
            self.add_module(name, make(source, f"_{name}"))
        self.train(source.training)

    @property
    def input_size(self) -> int:
        """The number of features that the first layer reads at each time step."""
        return self._cells()[0].input_size

    @property
    def hidden_size(self) -> int:
        """The number of units of the last layer now, before a projection."""
        return self._cells()[-1].hidden_size

    @property
    def proj_size(self) -> int:
        """The number of outputs of the last layer's projection now; 0 where there is none."""
        projection = self._cells()[-1].output
        return 0 if projection is None else projection.out_features

    def flatten_parameters(self) -> None:
        """Nothing: there is no packed weight, but models' code calls this."""

    def forward(self, input: Tensor, hx: Tensor | State | None = None) -> tuple[Tensor, Any]:
        """(output of all time steps, last states), shaped as nn.RNN, nn.LSTM and nn.GRU document.

        Raises JpqError for a packed sequence, a sequence without time steps, and an input of other than 2 or 3 dims.
        """
        batched = _check_sequence(input, self.batch_first)
        cells, x, finals = self._cells(), input, []
        time_dim = 1 if batched else 0
        if batched and not self.batch_first:
            x = x.transpose(0, 1)  # the batch lies first, where the noise of gates expects it
        states = _states_of_cells(hx, len(cells))
        per_layer = 2 if self.bidirectional else 1
        for k in range(0, len(cells), per_layer):
            if k:
                x = F.dropout(x, self.dropout, self.training)
            results: list[Tensor] = []
            for cell, state in zip(cells[k : k + per_layer], states[k : k + per_layer], strict=True):
                result, final = cell.run(x, state, time_dim, reverse=bool(results))
                results.append(result)
                finals.append(final)
            x = torch.cat(results, -1) if self.bidirectional else results[0]
        last = tuple(_stack_states(tensors) for tensors in zip(*finals, strict=True))
        return x.transpose(0, 1) if batched and not self.batch_first else x, last if len(last) > 1 else last[0]

    def _cells(self) -> list[RecurrentCell]:
        """The cells of all layers and directions, in the order of their states."""
        return [getattr(self, name) for name in self.names]


def _states_of_cells(hx: Tensor | State | None, cells: int) -> Sequence[State | None]:
    """The initial state of every cell, from [cells, *batch, units] per tensor of a state; None stands for zeros."""
    if hx is None:
        return [None] * cells
    tensors = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if any(len(tensor) != cells for tensor in tensors):
        raise JpqError(
            f"An initial state has shape {list(tensors[0].shape)}; its first dim must be {cells}, one for each layer "
            "and direction."
        )
    return list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))


def _stack_states(states: Sequence[Tensor]) -> Tensor:
    """[cells, *batch, units] of the last states of all cells.

    Whoever reads it keeps the units of all cells equal in number. Where nobody does, they may differ: zeros fill up.
    """
    units = max(state.shape[-1] for state in states)
    return torch.stack(
        [state if state.shape[-1] == units else F.pad(state, (0, units - state.shape[-1])) for state in states]
    )


def _check_sequence(x: Tensor, batch_first: bool) -> bool:
    """Whether a sequence has a batch dim. Raises JpqError for what is no sequence of at least one time step."""
    if isinstance(x, PackedSequence):
        raise JpqError(
            "A decomposed recurrent layer takes no packed sequences. Give the padded tensor, and mask the outputs "
            "behind the ends of its sequences."
        )
    if x.dim() not in (2, 3):
        raise JpqError(f"A recurrent layer takes 2 or 3 dims (time, batch, features), got shape {list(x.shape)}.")
    if x.shape[1 if batch_first and x.dim() == 3 else 0] == 0:
        raise JpqError(f"A recurrent layer needs at least one time step; the sequence has shape {list(x.shape)}.")
    return x.dim() == 3
