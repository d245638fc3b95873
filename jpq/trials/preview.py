"""Preview of a trial before it trains: the network, and the exact costs of decisions by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from jpq.allocation import manual
from jpq.allocation.decision_data import calibration_batches, score_batches
from jpq.allocation.prepare import prepare
from jpq.compression.model import CompressedModel
from jpq.compression.usage import exact_usage
from jpq.config import MANUAL, Budget, Config
from jpq.costs import COSTS, baseline, latency_ns, macs, size
from jpq.costs.latency import NS
from jpq.costs.target import parse_target
from jpq.export.timing import layer_table
from jpq.files.tensors import save_tensors
from jpq.plan import Plan
from jpq.recipe import check_sensitivity_fits
from jpq.tasks import models
from jpq.tasks.data import Data
from jpq.tasks.load import fit_sizes, load_dense_model, load_plain_or_own, read_data
from jpq.tracing.channel_shares import ChannelShares
from jpq.training.environment import pick_device, set_threads
from jpq.training.epochs import Phase
from jpq.training.history import TrainingObserver
from jpq.training.loop import Objective, Recorder, build_optimizer, fit
from jpq.types import JpqError

Costs = dict[str, float]  # by cost: shares of the fp32 model for bops and macs, bytes for size, ms for latency


@dataclass(frozen=True)
class PreviewedCosts:
    """Exact costs of a trial's decisions, and a digest that is equal for equal decisions."""

    costs: Costs
    name: str  # the digest


class Preview:
    """A network under decisions by hand, whose costs are known without training.

    Args:
        config: with the float weights that all trials start from.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        device = pick_device(config.run.device)
        torch.manual_seed(config.run.seed)
        data = read_data(config, device)
        model = load_dense_model(config, data, device)
        path, decide = config.budget.latency_table, replace(config.decide, method=MANUAL)
        table = None if path is None else layer_table.read_table(path)
        self.prepared = prepare(model, data.example, decide, Budget(), table=table)
        self.network = self.prepared.network
        set_threads(config.run.threads, self.network.macs * config.train.batch_size)
        self.full = {name: float(cost) for name, cost in self._dense().items()}
        self._net: CompressedModel | None = None
        self._start, self.classes, self.task = (model, data), data.classes, data.task

    def check_sensitivity(self) -> None:
        """Raise JpqError where --sensitivity is the table of another model, its weights or data than the trials'."""
        if self.config.decide.sensitivity is not None:
            model, data = self._start
            prepared = prepare(model, data.example, self.config.decide, Budget())
            check_sensitivity_fits(prepared, model, data, self.config)

    def _dense(self) -> Mapping[str, float]:
        """Costs of the fp32 model."""
        return baseline(exact_usage(self.network, ChannelShares(self.network, ()), Plan("", {}, {})))

    def limits(self, texts: Mapping[str, str]) -> Costs:
        """The largest amount of each cost, in the units of `Costs`. Raises JpqError for a text that is no amount.

        `texts`: cost -> amount, such as {"bops": "1%"}.
        """
        limits = {}
        for cost, text in texts.items():
            try:
                limit = parse_target(cost, text, self.full[cost]).limit
            except JpqError as error:
                raise JpqError(error.command_line.replace("--target-", "--max-")) from error
            limits[cost] = self.to_units(cost, limit)
        return limits

    def to_units(self, cost: str, amount: float) -> float:
        """Bit-operations and MACs as shares of the fp32 model, bytes as they are, nanoseconds as milliseconds."""
        return amount / self.full[cost] if cost in ("bops", "macs") else amount / NS if cost == "latency" else amount

    def preview_costs(self, config: Config) -> PreviewedCosts:
        """Costs of the decisions by hand in this config."""
        net = self._ranked()
        plan = manual.manual_plan(net, config.decide)
        uses = net.exact_usage(plan)
        amounts = {"bops": COSTS[config.budget.cost](uses), "macs": macs(uses), "size": size(uses)}
        if "latency" in self.full:
            amounts["latency"] = latency_ns(uses)
        text = f"{plan.to_json()} {config.train.lr}"
        costs = {cost: self.to_units(cost, float(amount)) for cost, amount in amounts.items()}
        return PreviewedCosts(costs, hashlib.sha256(text.encode()).hexdigest()[:12])

    def _ranked(self) -> CompressedModel:
        """The compressed model of the trials with ranked channels, built once."""
        if self._net is None:
            model, data = self._start
            torch.manual_seed(self.config.run.seed)
            net = self.prepared.attach(model, calibration_batches(data))
            manual.rank_and_plan(net, self.prepared.decide, self.prepared.score, score_batches(data))
            self._net = net
        return self._net


@contextmanager
def tidy_refusal(folder: Path) -> Iterator[Path]:
    """The file of float weights in a folder; an error within names it where it was trained within.

    A new folder that holds no more than its lock goes.
    """
    file = folder / "float.safetensors"
    is_new, is_trained = not folder.exists(), file.exists()
    try:
        yield file
    except JpqError as error:
        if file.exists() and not is_trained:
            raise JpqError(
                f"{error.command_line} The float model that was trained is kept, for --weights: {file}."
            ) from error
        if is_new:
            with suppress(OSError):  # other files are in it
                (folder / "lock").unlink(missing_ok=True)
                folder.rmdir()
        raise


def prepare_float_weights(config: Config, file: Path, observer: TrainingObserver) -> tuple[Path, str]:
    """(file, digest) of the float weights that all trials start from; trained into `file` where none are named."""
    device = pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    data = read_data(config, device)
    path = config.task.weights or file
    model = models.build(config.task.model, data.classes, data.shape[0], data.arguments).to(device)
    if not path.exists() and config.task.weights is None:
        models.check_fits(model, data.example, data.classes, data.task)
        fit_sizes(data, model.eval())
        _train(model, data, config, observer)
        save_tensors(model, path)
    model = load_plain_or_own(model, config.task.model, path, data.example)[0] or model
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8 if tensor.dim() else tensor.dtype).numpy())
    return path, digest.hexdigest()[:12]


def _train(model: nn.Module, data: Data, config: Config, observer: TrainingObserver) -> None:
    t = config.train
    phase = Phase("float", t.float_epochs)
    objective = Objective(precision=t.precision)
    fit(model, data, phase, objective, build_optimizer(model, t.lr, t.weight_decay), Recorder(lambda: 0.0), observer)
    model.eval()
