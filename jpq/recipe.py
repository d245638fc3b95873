"""The recipe of `jpq optimize`, top to bottom: start reading here.

1 model, weights, data - 2 trace - 3 sites - 4 what the targets allow - 5 attach gates and quantizers - 6 objective -
7 search - 8 land - 9 fine-tune - 10 rebuild, export, verify, report.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from jpq import checkpoint, costs, landing, models, report
from jpq.allocators import start_bits
from jpq.budget import Controller, Target, targets
from jpq.compose import compose
from jpq.config import Config
from jpq.data import Data
from jpq.data import load as load_data
from jpq.exporters import onnx, verify
from jpq.exporters.quantized import build, complete, rebuild
from jpq.figures import layer_rows, reached, versions
from jpq.joint import decide, gates, pick_score, sites_of, widths
from jpq.journal import Journal, open_folder
from jpq.machine import pick_device, set_threads
from jpq.methods import METHODS, Method
from jpq.network.attach import attach
from jpq.network.compressed import Compressed, exact_uses
from jpq.network.norms import require_opened
from jpq.network.record import Network
from jpq.network.shares import Shares
from jpq.network.trace import trace
from jpq.network.unpack import unpacked
from jpq.plan import Plan, from_json
from jpq.plan import read as read_plan
from jpq.result import Figures, Result, Silent, Watch
from jpq.train import Objective, Phase, evaluate, fit, optimizer, reestimate
from jpq.types import JpqError, unknown

SPLITS = ("train", "held_out", "test")
CALIBRATION = 8  # batches that fit the quantizers' ranges


def optimize(config: Config, watch: Watch | None = None, command: str = "") -> Result:
    """Prune and quantize the configured model onto its budget; everything is written to the run's folder.

    Raises JpqError for settings, files or targets that cannot work, and when a check of the result fails.
    """
    config.check()
    d = config.decide
    method = compose(d.method, d.structure, d.width)
    pick_score(d.score)
    run = Journal(config, watch or Silent(), open_folder(config))
    torch.manual_seed(config.run.seed)
    device = pick_device(config.run.device)

    data = read_data(config, device)  # 1
    model = dense_model(config, data, device)
    network = trace(model, data.example, open_norms=d.open_norms)  # 2
    if d.open_norms:
        require_opened(network, method.gate is not None)
    set_threads(config.run.threads, sum(layer.macs for layer in network.layers) * config.train.batch_size)
    sites = sites_of(method, network, d.skip)  # 3

    goals = asked(network, config)  # 4
    start = start_bits(network, goals, d.w_bits, d.a_bits, d.image_bits)

    def attached(inputs: list[Tensor]) -> Compressed:
        torch.manual_seed(config.run.seed)
        make = widths(method, d.w_bits, d.a_bits, d.image_bits, start)
        return attach(model, network, sites, gates(method, d.density), make, inputs, d.method)

    possible(attached([data.example]), goals, config)
    train_float(model, data, config, run)
    net = attached(calibration(data))  # 5
    run.recorder.full_bops = costs.baseline(net.exact())["bops"]
    plan = search(net, model, data, goals, config, run)  # 6, 7, 8
    tuned = opened(net, model, data, run) if net.opened else net
    fine_tune(tuned, model, data, config, run, plan)  # 9
    return finish(net, tuned, model, data, goals, config, run, command)  # 10


def pick_method(name: str) -> Method:
    """The row of METHODS, or the closest names."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


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


def asked(network: Network, config: Config) -> tuple[Target, ...]:
    """The targets, in units of this network."""
    b = config.budget
    dense = exact_uses(network, Shares(network, ()), Plan(config.decide.method, {}, {}))
    return targets({"bops": b.target_bops, "macs": b.target_macs, "size": b.target_size}, dense)


def possible(net: Compressed, goals: tuple[Target, ...], config: Config) -> None:
    """Raises JpqError, naming the smallest possible cost, where a target cannot be met."""
    if METHODS[net.method].gate:
        landing.require(net, goals)
    else:
        decide(net, goals, config.decide.w_bits, config.decide.a_bits, pick_score(config.decide.score), None)


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
        run.go_on(phase, model, optim)
        save = lambda p: run.keep(p, model, optim)  # noqa: E731
        run.timed("float", lambda: fit(model, data, phase, Objective(), optim, run.recorder, run.watch, save))
        checkpoint.save_tensors(model, kept)
    model.eval()


def calibration(data: Data) -> list[torch.Tensor]:
    """A few training batches."""
    return [x for x, _ in islice(data.train.epoch(0), CALIBRATION)]


def split(config: Config, method: Method) -> tuple[int, int]:
    """(search epochs, fine-tune epochs)."""
    if not method.searches:
        return 0, config.train.epochs
    search = min(config.train.epochs - 1, max(1, round(config.train.search * config.train.epochs)))
    return search, config.train.epochs - search


def search(
    net: Compressed, model: nn.Module, data: Data, goals: tuple[Target, ...], config: Config, run: Journal
) -> Plan:
    """Learn the decisions (or take them at once), land them on the targets, and settle the network."""
    d, t, method = config.decide, config.train, METHODS[net.method]
    if not method.searches:
        plan = decide(net, goals, d.w_bits, d.a_bits, pick_score(d.score), calibration(data)[0])
    elif run.is_past("search"):
        plan = from_json(run.saved["plan"], str(run.folder / checkpoint.NAME))  # type: ignore[index]
    else:
        epochs, rest = split(config, method)
        phase = Phase("search", epochs, before=0, total=epochs + rest)
        controller = Controller(goals)
        controller.begin(net.exact())
        objective = Objective(model, t.distill, t.temperature, d.gate_weight, controller)
        optim = optimizer(net, t.lr, t.weight_decay, d.gate_lr, d.bit_lr)
        run.go_on(phase, net, optim)
        if phase.done and run.saved:
            controller.restore(run.saved["controller"])
        save = lambda p: run.keep(p, net, optim, controller=controller.state())  # noqa: E731
        run.timed("search", lambda: fit(net, data, phase, objective, optim, run.recorder, run.watch, save))
        plan = landing.land(net, goals)
    note = landing.note(goals, net, plan)
    if note:
        run.notes.append(note)
    net.settle(plan)
    return plan


def opened(net: Compressed, model: nn.Module, data: Data, run: Journal) -> nn.Module:
    """The small model at landing, to be fine-tuned in place of `net`: what opened averages did shows on it alone."""
    small, _ = rebuild(net, model)
    resumed = run.saved if run.is_past("search") else None  # which never trained this `net`
    run.opened = float(resumed["opened"]) if resumed else verify.difference(net, small, data.example)
    return small


def fine_tune(net: nn.Module, model: nn.Module, data: Data, config: Config, run: Journal, plan: Plan) -> None:
    """Train the landed network with its decisions fixed, then measure BatchNorm's statistics anew."""
    t = config.train
    before, epochs = split(config, METHODS[plan.method])
    phase = Phase("fine-tune", epochs, before=before, total=before + epochs)
    optim = optimizer(net, t.lr, t.weight_decay)
    run.go_on(phase, net, optim)
    save = lambda p: run.keep(p, net, optim, plan=plan.to_json(), opened=run.opened)  # noqa: E731
    objective = Objective(model, t.distill, t.temperature)
    run.timed("fine-tune", lambda: fit(net, data, phase, objective, optim, run.recorder, run.watch, save))
    run.timed("fine-tune", lambda: reestimate(net, data.train.epoch(phase.total)))


def finish(
    net: Compressed, tuned: nn.Module, model: nn.Module, data: Data, goals: tuple[Target, ...], config: Config,
    run: Journal, command: str,
) -> Result:  # fmt: skip
    """Rebuild, count again, export, verify, save, report. The test split is read here, and only here."""
    run.watch.phase("verify", 0, 0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # compare at full precision
    small, plan = rebuild(net, model) if tuned is net else (tuned.eval(), complete(net))
    plan = replace(plan, model={"name": config.task.model, "classes": data.classes, "channels": data.shape[0]})
    uses = net.exact(plan)
    counted = verify.measure(small, data.example)
    planned = [u for u in uses if u.name in plan.layers]
    if counted["bops"] != costs.bops(planned) or counted["macs"] != costs.macs(planned):
        raise JpqError(
            f"The rebuilt model counts {counted}, the plan {costs.bops(planned)} BOPs. This is a bug in jpq."
        )
    if len(planned) < len(uses):
        rigid = [u.name for u in uses if u.name not in plan.layers]
        run.notes.append(f"{len(rigid)} layers cannot be quantized and stay at 32 bits: {', '.join(rigid[:5])} ...")
    (run.folder / "plan.json").write_text(plan.to_json())
    checkpoint.save_tensors(small, run.folder / "model.safetensors")
    onnx.export(small, data.example, run.folder / "model.onnx")
    path = run.folder / "model.onnx"
    if tuned is net:
        verified = run.timed("verify", lambda: verify.verify(net, small, path, data.test, data.example))
    else:
        outside = run.timed("verify", lambda: verify.exported(small, path, data.test))
        verified = {verify.OPENED: run.opened, **outside}
    full = costs.baseline(uses)
    figures = {
        "float": Figures(evaluate(model, data.test), int(full["bops"]), int(full["macs"]), int(full["size"]), 1.0),
        "compressed": Figures(
            evaluate(small, data.test), int(costs.bops(uses)), int(costs.macs(uses)), int(costs.size(uses)),
            float(costs.bops(uses)) / full["bops"],
        ),
    }  # fmt: skip
    run.seconds["total"] = run.recorder.clock()
    result = Result(
        folder=run.folder,
        method=net.method,
        float=figures["float"],
        compressed=figures["compressed"],
        held_out={"float": evaluate(model, data.held_out), "compressed": evaluate(small, data.held_out)},
        targets={goal.cost: reached(goal, uses) for goal in goals},
        verified=verified,
        layers=layer_rows(net, plan),
        history=tuple(run.recorder.rows),
        seconds=run.seconds,
        command=command or shlex.join(["jpq", "optimize"]),
        versions=versions(),
        seed=config.run.seed,
        notes=tuple(run.notes),
        data={"name": data.name, "checksum": data.checksum, **{k: getattr(data, k).size for k in SPLITS}},
    )
    report.write(result, config)
    (run.folder / checkpoint.NAME).unlink(missing_ok=True)
    return result


def load(folder: str | Path) -> tuple[nn.Module, Plan]:
    """(small model in eval mode, its plan) from a run's folder; no pickle, no optimiser, no data needed.

    Raises JpqError where files are missing, foreign or do not fit together.
    """
    folder = Path(folder)
    plan = read_plan(folder / "plan.json")
    try:
        dense = models.build(str(plan.model["name"]), int(plan.model["classes"]), int(plan.model["channels"]))
    except KeyError as error:
        raise JpqError(f"{folder / 'plan.json'} does not say which model it belongs to ({error}).") from error
    small = build(plan, unpacked(dense))
    checkpoint.load_tensors(small, folder / "model.safetensors")
    return small.eval(), plan
