"""The recipe of `jpq optimize`, top to bottom: start reading here.

1 model, weights, data - 2 trace - 3 sites - 4 what the targets allow - 5 attach gates and quantizers - 6 objective -
7 search - 8 land - 9 fine-tune - 10 rebuild, export, verify, report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jpq import bench, checkpoint, costs, handover, landing, mapping, models, stages
from jpq.allocators import bit_widths, place, rank, start_bits
from jpq.budget import Controller, Target
from jpq.closing import Closing, open_share, within
from jpq.compose import RULES, SEARCH, compose
from jpq.config import Config
from jpq.costs.table import Table
from jpq.data import Data
from jpq.data import load as load_data
from jpq.exporters import verify
from jpq.exporters.quantized import rebuild
from jpq.gates import Ranked
from jpq.journal import Journal, open_folder
from jpq.judging import calibration, evidence, judge_of, known_classes, score_of
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
from jpq.outcome import finish
from jpq.parts import asked, decide, gates, share_left, sites_of, widths
from jpq.plan import Plan, from_json
from jpq.result import Result, Silent, Watch
from jpq.schedule import pick_schedule
from jpq.train import Objective, Phase, fit, optimizer, reestimate
from jpq.types import JpqError

OBEYED = (
    "--weights are pruned already: the float accuracy, and what is distilled from, are those of the pruned model. Give "
    "the dense model with --weights, and the folder that the pruned one lies in with --mask."
)
Moments = dict[Tensor, Any]  # Adam's moving averages, by parameter


def optimize(config: Config, watch: Watch | None = None, command: str = "", final: bool = True) -> Result:
    """Prune and quantize the configured model onto its budget; everything is written to the run's folder.

    One that is not `final` is a trial among others: neither exported nor verified, and its test split stays unread.

    Raises JpqError for settings, files or targets that cannot work, and when a check of the result fails.
    """
    config = config.check()
    d = config.decide
    method = compose(d.method, d.structure, d.width, d.score, d.schedule, d.classes, d.allocator)
    given = handover.read(d.mask) if d.mask else None
    run = Journal(config, watch or Silent(), open_folder(config))
    torch.manual_seed(config.run.seed)
    device = pick_device(config.run.device)

    data = read_data(config, device)  # 1
    known_classes(d.classes, data)
    model = dense_model(config, data, device)
    network = trace(model, data.example, open_norms=d.open_norms)  # 2
    if d.open_norms:
        require_opened(network, method.gate is not None)
    network, table = with_clocks(network, config, run)
    set_threads(config.run.threads, sum(layer.macs for layer in network.layers) * config.train.batch_size)
    schemes = None if given else mapped(method, network, data.example, d.density, d.skip)
    sites = given.sites(network) if given else sites_of(method, network, d.skip, schemes)  # 3

    goals = asked(network, config)  # 4

    def attached(inputs: list[Tensor]) -> Compressed:
        torch.manual_seed(config.run.seed)
        left = given.share_left(network, sites) if given else share_left(sites, method, d.density)
        start = start_bits(network, goals, d.w_bits, d.a_bits, d.image_bits, left)
        make = widths(method, d.w_bits, d.a_bits, d.image_bits, start)
        first = given.start(model, sites) if given else model
        net = attach(first, network, sites, gates(method, d.density), make, inputs, d.method)
        return given.put(net) if given else net

    possible(attached([data.example]), goals, config)
    train_float(model, data, config, run)
    if given and run.saved:
        given.require_same(run.saved["net"], sites)
    if given and given.obeyed(model, sites):
        run.notes.append(OBEYED)
    if method.structure == SEARCH:
        schemes = search_schemes(method, network, model, data, config, run)
        sites = sites_of(method, network, d.skip, schemes)
        possible(attached([data.example]), goals, config)
    if schemes is not None:
        run.schemes = method.structure if method.structure in (RULES, SEARCH) else "hand"
    net = attached(calibration(data))  # 5
    run.recorder.full_bops, run.recorder.cost = costs.baseline(net.exact())["bops"], config.budget.cost
    plan, moments = search(net, model, data, goals, config, run)  # 6, 7, 8
    tuned = opened(net, model, data, run) if net.opened else net
    fine_tune(tuned, model, data, config, run, plan, moments)  # 9
    return finish(net, tuned, model, data, goals, config, run, command, table, final)  # 10


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
    bench.write_table(list(table.entries), kept)
    return network, table


def possible(net: Compressed, goals: tuple[Target, ...], config: Config) -> None:
    """Raises JpqError, naming the smallest possible cost, where a target cannot be met."""
    d, method = config.decide, row(net.method)
    if method.gate is Ranked and score_of(config).needs == {"scales"}:
        rank(net, score_of(config))  # it needs no data, and may find nothing to rank by
    if method.stages:
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
        checkpoint.load_tensors(model, kept)
    else:
        phase = Phase("float", config.train.float_epochs)
        optim = optimizer(model, config.train.lr, config.train.weight_decay)
        train(model, data, phase, Objective(), optim, run)
        checkpoint.save_tensors(model, kept)
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


def train(
    net: nn.Module, data: Data, phase: Phase, objective: Objective, optim: torch.optim.Optimizer, run: Journal,
    more: Callable[[], dict[str, Any]] = dict,
) -> None:  # fmt: skip
    """One phase from where the run stands, with a checkpoint after every epoch that holds `more` too."""
    run.go_on(phase, net, optim)
    save = lambda p: run.keep(p, net, optim, **more())  # noqa: E731
    every = run.config.run.checkpoint_every
    with run.stop:
        run.timed(phase.name, lambda: fit(
            net, data, phase, objective, optim, run.recorder, run.watch, save, every, run.stop,
        ))  # fmt: skip


def split(config: Config, method: Method) -> tuple[int, int]:
    """(search epochs, fine-tune epochs)."""
    if not (method.searches or method.stages):
        return 0, config.train.epochs
    search = min(config.train.epochs - 1, max(1, round(config.train.search * config.train.epochs)))
    return search, config.train.epochs - search


def search(
    net: Compressed, model: nn.Module, data: Data, goals: tuple[Target, ...], config: Config, run: Journal
) -> tuple[Plan, Moments]:
    """Learn the decisions (or take them at once), land them on the targets, and settle the network.

    Returns the plan and what the optimiser knows of each parameter by then.
    """
    d, t, method = config.decide, config.train, row(net.method)
    moments: Moments = {}
    epochs, rest = split(config, method)
    phase = Phase("search", epochs, before=0, total=epochs + rest)
    if run.is_past("search"):
        plan = from_json(run.saved["plan"], str(run.folder / checkpoint.NAME))  # type: ignore[index]
        run.metrics = run.saved["metrics"]  # type: ignore[index]
    elif method.stages:
        judge = judge_of(net, data, config)
        share = open_share(net, within(net, d.density))
        place(net, score_of(config), d.allocator, judge, share, stages.goal_of(net, d.density))
        widths = lambda plan: bit_widths(net, d.allocator, judge, plan, goals, d.w_bits, d.a_bits)  # noqa: E731
        plan = stages.decide(net, goals, d.w_bits, d.a_bits, d.density, widths)
        net.settle(stages.pruned(net, plan))
        objective = Objective(model, t.distill, t.temperature)
        optim = optimizer(net, t.lr, t.weight_decay)
        train(net, data, phase, objective, optim, run)
        moments = dict(optim.state)
        stages.observe_again(net, calibration(data))
    elif not method.searches:
        plan = decide(net, goals, d.w_bits, d.a_bits, score_of(config), judge_of(net, data, config), d.allocator)
    else:
        if method.gate is Ranked:
            schedule = pick_schedule(d.schedule or method.schedule)
            net.closing = Closing(net, score_of(config), schedule, d.density, partial(evidence, data))
            if not run.is_in("search"):
                net.closing(0.0)
        controller = Controller(goals)
        controller.begin(net.exact())
        objective = Objective(model, t.distill, t.temperature, d.gate_weight, controller)
        optim = optimizer(net, t.lr, t.weight_decay, d.gate_lr, d.bit_lr)
        if run.is_in("search"):
            controller.restore(run.saved["controller"])  # type: ignore[index]
        train(net, data, phase, objective, optim, run, lambda: {"controller": controller.state()})
        net.conclude()
        run.metrics = net.metrics()
        plan, moments = landing.land(net, goals), dict(optim.state)
    if d.classes:
        run.notes.append(f"Channels were ranked for classes {d.classes} alone; every accuracy is on all classes.")
    note = landing.note(goals, net, plan)
    if note:
        run.notes.append(note)
    net.settle(plan)
    return plan, moments


def opened(net: Compressed, model: nn.Module, data: Data, run: Journal) -> nn.Module:
    """The small model at landing, to be fine-tuned in place of `net`: what opened averages did shows on it alone."""
    small, _ = rebuild(net, model)
    resumed = run.saved if run.is_past("search") else None  # which never trained this `net`
    run.opened = float(resumed["opened"]) if resumed else verify.difference(net, small, data.example)
    return small


def fine_tune(
    net: nn.Module, model: nn.Module, data: Data, config: Config, run: Journal, plan: Plan, moments: Moments
) -> None:
    """Train the landed network with its decisions fixed, then measure BatchNorm's statistics anew.

    The learning rate is high where the search ends, so parameters that trained in it keep their Adam `moments`.
    """
    t = config.train
    before, epochs = split(config, row(plan.method))
    phase = Phase("fine-tune", epochs, before=before, total=before + epochs)
    optim = optimizer(net, t.lr, t.weight_decay)
    optim.state.update({p: moments[p] for group in optim.param_groups for p in group["params"] if p in moments})
    objective = Objective(model, t.distill, t.temperature)
    settled = lambda: {"plan": plan.to_json(), "opened": run.opened, "metrics": run.metrics}  # noqa: E731
    train(net, data, phase, objective, optim, run, settled)
    run.timed("fine-tune", lambda: reestimate(net, data.train.epoch(phase.total)))
