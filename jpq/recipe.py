"""The recipe of `jpq optimize`, top to bottom: start reading here.

1 model, weights, data - 2 trace - 3 sites - 4 what the targets allow - 5 attach gates and quantizers; then for each
budget (`descent.one`): 6 objective - 7 search - 8 land - 9 fine-tune - 10 rebuild, export, verify, report.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jpq import bench, by_hand, checkpoint, costs, handover, landing, mapping, models, ranks, stages
from jpq.allocators import rank, start_bits
from jpq.budget import Target
from jpq.compose import RULES, SEARCH, channel_multiple, compose
from jpq.config import BY_HAND, Config
from jpq.costs.table import Table
from jpq.data import Data
from jpq.data import load as load_data
from jpq.descent import Begun, descend
from jpq.events import Events
from jpq.gates import Ranked
from jpq.journal import Journal, open_folder
from jpq.judging import calibration, known_classes, score_of
from jpq.machine import pick_device, set_threads
from jpq.mapping import mapped
from jpq.methods import Method, row
from jpq.network.attach import attach
from jpq.network.compressed import Compressed
from jpq.network.norms import require_opened
from jpq.network.record import Network
from jpq.network.timed import timed
from jpq.network.trace import trace
from jpq.network.unpack import unpacked
from jpq.parts import budgets, decide, gates, share_left, sites_of, widths
from jpq.phases import shares, split, train
from jpq.result import Result, Silent, Watch
from jpq.train import Objective, Phase, optimizer
from jpq.types import JpqError

__all__ = ["optimize", "read_data", "split"]

OBEYED = (
    "--weights are pruned already: the float accuracy, and what is distilled from, are those of the pruned model. Give "
    "the dense model with --weights, and the folder that the pruned one lies in with --mask."
)


def optimize(config: Config, watch: Watch | None = None, command: str = "", final: bool = True) -> Result:
    """Prune and quantize the configured model onto its budget; everything is written to the run's folder.

    One that is not `final` is a trial among others: neither exported nor verified, and its test split stays unread.

    Raises JpqError for settings, files or targets that cannot work, and when a check of the result fails.
    """
    config = config.check()
    d = config.decide
    method = compose(d.method, d.structure, d.width, d.score, d.schedule, d.classes, d.allocator)
    multiple = channel_multiple(d.method, method, d.channel_multiple)
    given = handover.read(d.mask) if d.mask else None
    ranks.require_rows(config.train.batch_size)
    run = Journal(config, watch or Silent(), ranks.from_first(lambda: open_folder(config)))
    if config.run.tensorboard and ranks.is_first():
        run.watch = Events(run.watch, run.folder, run.recorder.rows)
    torch.manual_seed(config.run.seed)
    device = pick_device(config.run.device)

    data = ranks.in_turn(lambda: read_data(config, device))  # 1
    ranks.require_same(data.checksum, "a data set")
    run.require_data(data.checksum)
    known_classes(d.classes, data)
    model = dense_model(config, data, device)
    network = trace(model, data.example, open_norms=d.open_norms)  # 2
    if d.open_norms:
        require_opened(network, method.gate is not None)
    network, table = ranks.in_turn(lambda: with_clocks(network, config, run))
    set_threads(config.run.threads, sum(layer.macs for layer in network.layers) * config.train.batch_size)
    schemes = None if given else mapped(method, network, data.example, d.density, d.skip)
    sites = given.sites(network) if given else sites_of(method, network, d.skip, schemes)  # 3

    goals = budgets(network, config)  # 4, of each budget
    parts = shares(config, method)

    def attached(model: nn.Module, inputs: list[Tensor]) -> Compressed:
        torch.manual_seed(config.run.seed)
        left = given.share_left(network, sites) if given else share_left(sites, method, d.density)
        start = start_bits(network, next(iter(goals.values())), d.w_bits, d.a_bits, d.image_bits, left)
        make = widths(method, d.w_bits, d.a_bits, d.image_bits, start)
        first = given.start(model, sites) if given else model
        net = attach(first, network, sites, gates(method, d.density), make, inputs, d.method, d.output_bits, multiple)
        return given.put(net) if given else net

    def again(model: nn.Module) -> Compressed:
        with torch.random.fork_rng():  # the run's own draws go on as if nothing had been attached
            return attached(model, calibration(data))

    def all_possible() -> None:
        net = attached(model, [data.example])
        for targets in goals.values():
            possible(net, targets, config)

    all_possible()
    train_float(model, data, config, run)
    ranks.share_state(model)
    if given and run.saved:
        given.require_same(run.saved["net"], sites)
    if given and given.obeyed(model, sites):
        run.notes.append(OBEYED)
    if method.structure == SEARCH:
        schemes = ranks.from_first(lambda: search_schemes(method, network, model, data, config, run))
        sites = sites_of(method, network, d.skip, schemes)
        all_possible()
    if schemes is not None:
        run.schemes = method.structure if method.structure in (RULES, SEARCH) else "hand"
    net = attached(model, calibration(data))  # 5
    run.recorder.full_bops, run.recorder.cost = costs.baseline(net.exact())["bops"], config.budget.cost
    return descend(Begun(config, data, model, again, goals, parts, table, command, final), net, run)  # 6 to 10


def read_data(config: Config, device: torch.device) -> Data:
    """The configured data set on its device."""
    t = config.task
    return load_data(
        t.data, t.data_root, batch_size=config.train.batch_size, held_out=t.held_out, augment=config.train.augment,
        seed=config.run.seed, device=device, limit=t.limit,
    )  # fmt: skip


def dense_model(config: Config, data: Data, device: torch.device) -> nn.Module:
    """The float model, unpacked, with --weights where they are given, checked against the data's images and classes."""
    model = models.build(config.task.model, data.classes, data.shape[0]).to(device)
    if config.task.weights is not None:
        models.load_weights(model, config.task.weights)
    models.check_fits(model, data.example, data.classes)
    return unpacked(model).eval()


def with_clocks(network: Network, config: Config, run: Journal) -> tuple[Network, Table | None]:
    """The network with its layers' measured times, and the table they are from, where one is given."""
    if config.budget.latency_table is None:
        return network, None
    table = bench.read_table(config.budget.latency_table)
    network = timed(network, table)
    kept = run.folder / bench.NAME
    if run.saved and kept.is_file() and kept.read_text() != bench.text_of(table):
        raise JpqError(f"{table.source} is no longer the table that this run began with. Run without --resume.")
    if ranks.is_first():
        bench.write_table(list(table.entries), kept)
    return network, table


def possible(net: Compressed, goals: tuple[Target, ...], config: Config) -> None:
    """Raises JpqError, naming the smallest possible cost, where a target cannot be met."""
    d, method = config.decide, row(net.method)
    if method.gate is Ranked and score_of(config).needs == {"scales"}:
        rank(net, score_of(config))  # it needs no data, and may find nothing to rank by
    if net.method == BY_HAND:
        by_hand.require(net, by_hand.plan(net, d), goals)
    elif method.stages:
        stages.decide(net, goals, d.w_bits, d.a_bits, d.density)
    elif method.gate:
        landing.require(net, goals)
        if method.gate is Ranked and method.searches:
            stages.goal_of(net, d.density)
    else:
        decide(net, goals, d.w_bits, d.a_bits, score_of(config), None)


def train_float(model: nn.Module, data: Data, config: Config, run: Journal) -> None:
    """Train the float model, unless its weights were given or an earlier part of this run trained it."""
    kept = run.folder / "float.safetensors"
    if config.task.weights is not None:
        return
    if run.is_past("float"):
        ranks.from_first(lambda: checkpoint.load_tensors(model, kept))
    else:
        phase = Phase("float", config.train.float_epochs)
        optim = optimizer(model, config.train.lr, config.train.weight_decay)
        train(model, data, phase, Objective(), optim, run)
        ranks.from_first(lambda: checkpoint.save_tensors(model, kept))
    model.eval()


def search_schemes(
    method: Method, network: Network, model: nn.Module, data: Data, config: Config, run: Journal
) -> dict[str, str]:
    """The structure of each layer by search on held-out data, unless an earlier part of this run found it."""
    d, path = config.decide, run.folder / mapping.NAME
    if config.run.resume and path.exists():
        return mapping.read(path)
    found, limit = run.timed("schemes", lambda: mapping.searched(
        method, network, model, data, d.density, d.skip, trained=d.proxy == "trained", lr=config.train.lr,
        seed=config.run.seed,
    ))  # fmt: skip
    about = mapping.record(network, found.mapping, d.density, SEARCH)
    mapping.save(path, {**about, "limit_ms": limit, "reward": found.reward, "proxy_accuracy": found.accuracy,
                        "judged": found.judged})  # fmt: skip
    return dict(found.mapping)
