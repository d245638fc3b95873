"""The recipe of `jpq optimize`, top to bottom: start reading here.

1 model, weights, data - 2 trace - 3 sites - 4 what the targets allow - 5 attach gates and quantizers; then for each
budget (`descent.one`): 6 objective - 7 search - 8 land - 9 fine-tune - 10 rebuild, export, verify, report.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jpq import costs
from jpq.allocation import manual, structure_search, two_stage
from jpq.allocation.allocators import check_allocator
from jpq.allocation.procedures import calibration, check_classes, decide, score_of
from jpq.allocation.ranking.rank import rank
from jpq.allocation.structure_search import map_structures
from jpq.allocation.uniform_bits import start_bits
from jpq.compression import discretize, external_mask
from jpq.compression.attach import attach
from jpq.compression.build import budget_targets, fixed_share, gate_factory, method_sites, width_factory
from jpq.compression.calibration import recalibrate
from jpq.compression.channel_counts import channel_multiple
from jpq.compression.masking import original
from jpq.compression.model import CompressedModel
from jpq.config import MANUAL, Config
from jpq.costs.latency_table import LatencyTable
from jpq.costs.target import Target
from jpq.export.timing import layer_table
from jpq.files import tensors
from jpq.methods.compatibility import RULES, SEARCH, compose
from jpq.methods.gates import Ranked
from jpq.methods.table import Method, row
from jpq.results import plots, run_folder
from jpq.results.finish import finish
from jpq.results.front import front
from jpq.results.front.plots import plane
from jpq.results.front.points import read
from jpq.results.record import BudgetRecord, Result
from jpq.results.run_folder import FRONT_PICTURE, budget_folder_name, point_to_latest, prepare_folder
from jpq.tasks.data import Data
from jpq.tasks.load import dense_model, read_data
from jpq.tracing.network import Network, with_times
from jpq.tracing.open_norms import require_opened
from jpq.tracing.trace import trace
from jpq.training import checkpoint, distributed, history
from jpq.training.environment import pick_device, set_threads
from jpq.training.epochs import BudgetEpochs, Phase, budget_epochs
from jpq.training.history import NullObserver, TensorBoardObserver, TrainingObserver
from jpq.training.loop import Objective, optimizer
from jpq.training.phases import More, SearchState, fine_tune, opened, search, train
from jpq.training.run_state import RunState, open_folder
from jpq.types import JpqError

ALREADY_PRUNED = (
    "--weights are pruned already: the float accuracy, and what is distilled from, are those of the pruned model. Give "
    "the dense model with --weights, and the folder that the pruned one lies in with --mask."
)


def optimize(config: Config, watch: TrainingObserver | None = None, command: str = "", final: bool = True) -> Result:
    """Prune and quantize the configured model onto its budget; everything is written to the run's folder.

    One that is not `final` is a trial among others: neither exported nor verified, and its test split stays unread.

    Raises JpqError for settings, files or targets that cannot work, and when a check of the result fails.
    """
    config = config.check()
    d = config.decide
    method = compose(d.method, d.structure, d.width, d.score, d.schedule, d.classes)
    check_allocator(d.method, d.allocator)
    multiple = channel_multiple(d.method, method, d.channel_multiple)
    given = external_mask.read(d.mask) if d.mask else None
    distributed.require_rows(config.train.batch_size)
    run = RunState(config, watch or NullObserver(), distributed.run_on_first(lambda: open_folder(config)))
    if config.run.tensorboard and distributed.is_first():
        run.watch = TensorBoardObserver(run.watch, run.folder, run.recorder.rows)
    torch.manual_seed(config.run.seed)
    device = pick_device(config.run.device)

    data = distributed.first_then_others(lambda: read_data(config, device))  # 1
    distributed.require_same(data.checksum, "a data set")
    run.require_data(data.checksum)
    check_classes(d.classes, data)
    model = dense_model(config, data, device)
    network = trace(model, data.example, open_norms=d.open_norms)  # 2
    if d.open_norms:
        require_opened(network, method.gate is not None)
    network, table = distributed.first_then_others(lambda: with_layer_times(network, config, run))
    set_threads(config.run.threads, sum(layer.macs for layer in network.layers) * config.train.batch_size)
    schemes = None if given else map_structures(method, network, data.example, d.density, d.skip)
    sites = given.sites(network) if given else method_sites(method, network, d.skip, schemes)  # 3

    goals = budget_targets(network, config)  # 4, of each budget
    parts = budget_epochs(config, method)

    def attached(model: nn.Module, inputs: list[Tensor]) -> CompressedModel:
        torch.manual_seed(config.run.seed)
        left = given.share_left(network, sites) if given else fixed_share(sites, method, d.density)
        start = start_bits(network, next(iter(goals.values())), d.w_bits, d.a_bits, d.image_bits, left)
        make = width_factory(method, d.w_bits, d.a_bits, d.image_bits, start)
        first = given.start(model, sites) if given else model
        net = attach(
            first, network, sites, gate_factory(method, d.density), make, inputs, d.method, d.output_bits, multiple
        )
        return given.put(net) if given else net

    def again(model: nn.Module) -> CompressedModel:
        with torch.random.fork_rng():  # the run's own draws go on as if nothing had been attached
            return attached(model, calibration(data))

    def all_possible() -> None:
        net = attached(model, [data.example])
        for targets in goals.values():
            check_feasible(net, targets, config)

    all_possible()
    train_float(model, data, config, run)
    distributed.share_state(model)
    if given and run.saved:
        given.require_same(run.saved["net"], sites)
    if given and given.obeyed(model, sites):
        run.notes.append(ALREADY_PRUNED)
    if method.structure == SEARCH:
        schemes = distributed.run_on_first(lambda: search_schemes(method, network, model, data, config, run))
        sites = method_sites(method, network, d.skip, schemes)
        all_possible()
    if schemes is not None:
        run.schemes = method.structure if method.structure in (RULES, SEARCH) else "hand"
    net = attached(model, calibration(data))  # 5
    run.recorder.full_bops, run.recorder.cost = costs.baseline(net.exact_usage())["bops"], config.budget.cost
    return run_budgets(RunSetup(config, data, model, again, goals, parts, table, command, final), net, run)  # 6 to 10


def with_layer_times(network: Network, config: Config, run: RunState) -> tuple[Network, LatencyTable | None]:
    """The network with its layers' measured times, and the table they are from, where one is given."""
    if config.budget.latency_table is None:
        return network, None
    table = layer_table.read_table(config.budget.latency_table)
    network = with_times(network, table)
    kept = run.folder / layer_table.TABLE_NAME
    if run.saved and kept.is_file() and kept.read_text() != layer_table.text_of(table):
        raise JpqError(f"{table.source} is no longer the table that this run began with. Run without --resume.")
    if distributed.is_first():
        layer_table.write_table(list(table.entries), kept)
    return network, table


def check_feasible(net: CompressedModel, targets: tuple[Target, ...], config: Config) -> None:
    """Raises JpqError, naming the smallest possible cost, where a target cannot be met."""
    d, method = config.decide, row(net.method)
    if method.gate is Ranked and score_of(config).needs == {"scales"}:
        rank(net, score_of(config))  # it needs no data, and may find nothing to rank by
    if net.method == MANUAL:
        manual.check_targets(net, manual.plan(net, d), targets)
    elif method.stages:
        two_stage.decide_two_stage(net, targets, d.w_bits, d.a_bits, d.density)
    elif method.gate:
        discretize.check_reachable(net, targets)
        if method.gate is Ranked and method.searches:
            discretize.density_target(net, d.density)
    else:
        decide(net, targets, d.w_bits, d.a_bits, score_of(config), None)


def train_float(model: nn.Module, data: Data, config: Config, run: RunState) -> None:
    """Train the float model, unless its weights were given or an earlier part of this run trained it."""
    kept = run.folder / "float.safetensors"
    if config.task.weights is not None:
        return
    if run.is_past("float"):
        distributed.run_on_first(lambda: tensors.load_tensors(model, kept))
    else:
        phase = Phase("float", config.train.float_epochs)
        optim = optimizer(model, config.train.lr, config.train.weight_decay)
        train(model, data, phase, Objective(), optim, run)
        distributed.run_on_first(lambda: tensors.save_tensors(model, kept))
    model.eval()


def search_schemes(
    method: Method, network: Network, model: nn.Module, data: Data, config: Config, run: RunState
) -> dict[str, str]:
    """The structure of each layer by search on held-out data, unless an earlier part of this run found it."""
    d, path = config.decide, run.folder / structure_search.NAME
    if config.run.resume and path.exists():
        return structure_search.read_mapping(path)
    found, limit = run.timed(
        "schemes",
        lambda: structure_search.search_mapping(
            method,
            network,
            model,
            data,
            d.density,
            d.skip,
            trained=d.proxy == "trained",
            lr=config.train.lr,
            seed=config.run.seed,
        ),
    )
    about = structure_search.mapping_record(network, found.mapping, d.density, SEARCH)
    structure_search.save_mapping(
        path,
        {**about, "limit_ms": limit, "reward": found.reward, "proxy_accuracy": found.accuracy, "judged": found.judged},
    )
    return dict(found.mapping)


@dataclass(frozen=True)
class RunSetup:
    """What every budget of a run begins with."""

    config: Config
    data: Data
    model: nn.Module  # float, trained
    attached: Callable[[nn.Module], CompressedModel]  # gates and quantizers on a model like it, always the same
    budgets: Mapping[str, tuple[Target, ...]]
    shares: Mapping[str, BudgetEpochs]
    table: LatencyTable | None
    command: str
    final: bool


def run_budgets(begun: RunSetup, net: CompressedModel, run: RunState) -> Result:
    """The result for the last budget; `front` holds all of them where there are several.

    Args:
        begun: what they share.
        net: attached to the trained model.
        run: of the whole.
    """
    each, soft, weights, learns = begun.config.each(), SearchState(net), begun.model, row(net.method).searches
    folders = {name: run.folder / budget_folder_name(name, each[name]) if name else run.folder for name in each}
    for place, (name, config) in enumerate(each.items()):
        at = run.at(place, name, folders[name])
        if run.saved and int(run.saved.get("budget", 0)) > place:
            continue  # an earlier part of this run finished it
        if place and not learns:
            weights = resumed_weights(weights, at)
            soft = SearchState(begun.attached(weights))
        result, tuned = run_budget(begun, config, soft, weights, at, last=place == len(each) - 1)
        if tuned is not None and not learns:
            weights = with_trained_weights(begun.model, tuned)
    if len(each) == 1:
        return result

    def close() -> tuple[BudgetRecord, ...]:
        points = tuple(point_to_latest(name, folders[name]) for name in each)
        run_folder.write_front(points, run.folder)
        made = front.make(read([run.folder]).points)
        plots.save_picture(plane(made), run.folder / FRONT_PICTURE)
        history.write_history(run.recorder.rows, run.folder)
        (run.folder / checkpoint.NAME).unlink(missing_ok=True)
        return points

    return replace(result, front=distributed.run_on_first(close))


def run_budget(
    begun: RunSetup, config: Config, soft: SearchState, weights: nn.Module, run: RunState, last: bool
) -> tuple[Result, CompressedModel | None]:
    """One budget: its result, and the network that it fine-tuned (None where only a rebuilt one was)."""
    data, model, targets = begun.data, begun.model, begun.budgets[run.label]
    if run.label:
        distributed.run_on_first(lambda: prepare_folder(run, config, begun.table))
    searching, tuning = begun.shares[run.label].phases(run.label, run.budget == 0)
    learns = row(soft.net.method).searches
    first: More = lambda: {} if learns or not run.budget else {"first": weights.state_dict()}  # noqa: E731
    plan = search(soft, model, data, targets, config, run, searching, first)  # 6, 7
    if learns and run.is_past("search") and run.saved and run.saved.get("soft"):
        soft.restore(run.saved["soft"], config, run)
    net = soft.net if last or not learns else copy_with_state(soft.net, begun.attached(weights))
    if learns and not run.is_past("search"):
        recalibrate(net, calibration(data))  # ranges are fitted to what layers read now
    net.freeze(plan)  # 8
    kept: More = lambda: first() if last or not learns else {"soft": soft.state()}  # noqa: E731
    tuned = opened(net, model, data, run) if net.opened else net
    fine_tune(tuned, model, data, config, run, plan, soft.moments(net), tuning, kept)  # 9
    last_step = partial(finish, net, tuned, model, data, targets, config, run, begun.command, begun.table, begun.final)
    with full_precision():
        result = distributed.run_on_first(last_step)  # 10
    return result, net if tuned is net else None


@contextmanager
def full_precision() -> Iterator[None]:
    """Leaves TF32 as it was: the last step compares at full precision, and the next budget need not train so."""
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        yield
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed


def copy_with_state(net: CompressedModel, fresh: CompressedModel) -> CompressedModel:
    """`fresh`, which was attached as `net` was, in the state of `net`."""
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        for draw in fresh.draws:
            draw.resample()
    return fresh


@torch.no_grad()
def with_trained_weights(model: nn.Module, tuned: CompressedModel) -> nn.Module:
    """A copy of the float model with the weights of a landed and fine-tuned network, masked ones included."""
    model = copy.deepcopy(model)
    state, own = model.state_dict(), tuned.model.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].shape == tensor.shape:
            tensor.copy_(own[name])
    for layer in tuned.network.layers:
        owner, _, name = layer.weight.rpartition(".")
        state[layer.weight].copy_(original(tuned.model.get_submodule(owner), name))
    return model


def resumed_weights(weights: nn.Module, run: RunState) -> nn.Module:
    """The weights that this budget begins with: those at hand, or those of the checkpoint where it lies in it."""
    if run.saved and (run.is_in("search") or run.is_in("fine-tune")) and "first" in run.saved:
        weights = copy.deepcopy(weights)
        tensors.restore(weights, run.saved["first"], run.top / checkpoint.NAME)
    return weights
