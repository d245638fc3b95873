"""The recipe of `jpq optimize`, top to bottom: start reading here.

1 model, weights, data - 2 trace - 3 sites - 4 what the targets allow - 5 attach gates and quantizers - 6 objective -
7 search - 8 land - 9 fine-tune - 10 rebuild, export, verify, report.
"""

from __future__ import annotations

import copy
import os
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq import checkpoint, costs, landing, models, report
from jpq.allocators import uniform
from jpq.budget import Controller, Target, spent, targets
from jpq.config import Config, write
from jpq.data import Data
from jpq.data import load as load_data
from jpq.exporters import onnx, verify
from jpq.exporters.quantized import build, rebuild
from jpq.gates import Decided, Gate
from jpq.methods import METHODS, Method
from jpq.network.attach import Compressed, attach
from jpq.network.record import Layer
from jpq.network.sites import channels
from jpq.network.trace import trace
from jpq.plan import Plan, from_json
from jpq.plan import read as read_plan
from jpq.quantizers import Fixed, Width
from jpq.result import Figures, LayerRow, Result, Row, Silent, Watch
from jpq.train import Objective, Phase, Recorder, evaluate, fit, optimizer, reestimate
from jpq.types import JpqError, unknown

CALIBRATION = 8  # batches that fit the quantizers' ranges


def optimize(config: Config, watch: Watch | None = None, command: str = "") -> Result:
    """Prune and quantize the configured model onto its budget; everything is written to the run's folder.

    Raises JpqError for settings, files or targets that cannot work, and when a check of the result fails.
    """
    config.check()
    method = _method(config.decide.method)
    run = _Run(config, watch or Silent(), open_folder(config))
    torch.manual_seed(config.run.seed)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = torch.device(_device(config.run.device))

    data = read_data(config, device)  # 1
    model = float_model(config, data, device, run)
    network = trace(model, data.example)  # 2
    sites = channels(network, config.decide.skip) if method.gate else ()  # 3
    torch.manual_seed(config.run.seed)
    net = attach(  # 4, 5
        model, network, sites, gates(method), widths(method, config), calibration(data), config.decide.method
    )
    asked = {"bops": config.budget.target_bops, "macs": config.budget.target_macs, "size": config.budget.target_size}
    goals = targets(asked, net.exact())
    run.recorder.full_bops = costs.baseline(net.exact())["bops"]

    plan = search(net, model, data, goals, method, config, run)  # 6, 7, 8
    fine_tune(net, model, data, config, run, plan)  # 9
    return finish(net, model, data, goals, config, run, command)  # 10


@dataclass
class _Run:
    """What accompanies one run: its folder, clock, history and checkpoint."""

    config: Config
    watch: Watch
    folder: Path
    recorder: Recorder = field(default_factory=lambda: Recorder(_clock()))
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    saved: dict[str, Any] | None = None  # the checkpoint that this run goes on from

    def __post_init__(self) -> None:
        if self.config.run.resume:
            self.saved = checkpoint.load(self.folder)
            if self.saved and self.saved["settings"] != self.config.hash():
                raise JpqError(f"The checkpoint in {self.folder} belongs to other settings; run without --resume.")
            if self.saved:
                self.recorder.rows = [Row(**row) for row in self.saved["history"]]
                earlier = self.recorder.rows[-1].seconds if self.recorder.rows else 0.0
                self.recorder.clock = _clock(earlier)

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Do `work` and note how long it took."""
        start = time.perf_counter()
        done = work()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)
        return done

    def keep(self, phase: Phase, net: nn.Module, optim: torch.optim.Optimizer, **more: Any) -> None:
        """Write the checkpoint and the history so far."""
        report.write_history(self.recorder.rows, self.folder)
        state = {
            "kind": "jpq checkpoint", "settings": self.config.hash(), "phase": phase.name, "done": phase.done,
            "net": net.state_dict(), "optimizer": optim.state_dict(), "random": torch.get_rng_state(),
            "history": [asdict(row) for row in self.recorder.rows], **more,
        }  # fmt: skip
        checkpoint.save(self.folder, state)

    def go_on(self, phase: Phase, net: nn.Module, optim: torch.optim.Optimizer) -> None:
        """If the checkpoint lies in this phase: put its state in place."""
        if not self.saved or self.saved["phase"] != phase.name:
            return
        checkpoint.restore(net, self.saved["net"], self.folder / checkpoint.NAME)
        optim.load_state_dict(self.saved["optimizer"])
        torch.set_rng_state(self.saved["random"])
        phase.done = int(self.saved["done"])

    def is_past(self, phase: str) -> bool:
        """Whether the checkpoint lies after this phase."""
        order = ["float", "search", "fine-tune"]
        return bool(self.saved) and order.index(self.saved["phase"]) > order.index(phase)  # type: ignore[index]


def _clock(earlier: float = 0.0) -> Callable[[], float]:
    start = time.perf_counter() - earlier
    return lambda: round(time.perf_counter() - start, 2)


def _method(name: str) -> Method:
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        raise JpqError(f"--device {name} is not here. Use cpu or auto.")
    return name


def open_folder(config: Config) -> Path:
    """The run's folder, made, with its config.toml. Raises JpqError where it cannot be written."""
    folder = config.run.out / config.hash()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(config, folder / "config.toml")
    except OSError as error:
        raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error
    return folder


def read_data(config: Config, device: torch.device) -> Data:
    """The configured data set on its device."""
    t = config.task
    return load_data(
        t.data, t.data_root, batch_size=config.train.batch_size, held_out=t.held_out, augment=config.train.augment,
        seed=config.run.seed, device=device, limit=t.limit,
    )  # fmt: skip


def float_model(config: Config, data: Data, device: torch.device, run: _Run) -> nn.Module:
    """The trained float model: from --weights, from an earlier part of this run, or trained now."""
    model = models.build(config.task.model, data.classes, data.shape[0]).to(device)
    models.check_fits(model, data.example, data.classes)
    kept = run.folder / "float.safetensors"
    if config.task.weights is not None:
        models.load_weights(model, config.task.weights)
    elif run.is_past("float") and kept.exists():
        checkpoint.load_tensors(model, kept)
    else:
        phase = Phase("float", config.train.float_epochs)
        optim = optimizer(model, config.train.lr, config.train.weight_decay)
        run.go_on(phase, model, optim)
        save = lambda p: run.keep(p, model, optim)  # noqa: E731
        run.timed("float", lambda: fit(model, data, phase, Objective(), optim, run.recorder, run.watch, save))
        checkpoint.save_tensors(model, kept)
    return model.eval()


def gates(method: Method) -> Callable[[int, int], Gate]:
    """What makes the gate of a site."""
    return method.gate if method.gate else Decided.all


def widths(method: Method, config: Config) -> Callable[[Layer], tuple[Width, Width]]:
    """What makes the widths of a layer: the method's, and the image's fixed one."""

    def pair(layer: Layer) -> tuple[Width, Width]:
        (w_low, w_high), (a_low, a_high) = config.decide.w_bits, config.decide.a_bits
        if method.width is Fixed:
            made: tuple[Width, Width] = (
                Fixed(w_high, tuple(range(w_low, w_high + 1))), Fixed(a_high, tuple(range(a_low, a_high + 1)))
            )  # fmt: skip
        else:
            made = method.width(w_high, w_low, w_high), method.width(a_high, a_low, a_high)  # type: ignore[call-arg]
        return (made[0], Fixed(config.decide.image_bits)) if layer.reads_input else made

    return pair


def calibration(data: Data) -> list[torch.Tensor]:
    """A few training batches."""
    return [x for x, _ in data.train.epoch(0)][:CALIBRATION]


def split(config: Config, method: Method) -> tuple[int, int]:
    """(search epochs, fine-tune epochs)."""
    if not method.searches:
        return 0, config.train.epochs
    search = min(config.train.epochs - 1, max(1, round(config.train.search * config.train.epochs)))
    return search, config.train.epochs - search


def search(
    net: Compressed, model: nn.Module, data: Data, goals: tuple[Target, ...], method: Method, config: Config, run: _Run
) -> Plan:
    """Learn the decisions (or let the allocator take them), land them on the targets, and settle the network."""
    d, t = config.decide, config.train
    if not method.searches:
        w, a = range(d.w_bits[0], d.w_bits[1] + 1), range(d.a_bits[0], d.a_bits[1] + 1)
        plan = uniform(net, goals, w, a)
    elif run.is_past("search"):
        plan = from_json(run.saved["plan"], str(run.folder / checkpoint.NAME))  # type: ignore[index]
    else:
        landing.require(net, goals)
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


def fine_tune(net: Compressed, model: nn.Module, data: Data, config: Config, run: _Run, plan: Plan) -> None:
    """Train the landed network with its decisions fixed, then measure BatchNorm's statistics anew."""
    t = config.train
    before, epochs = split(config, METHODS[net.method])
    phase = Phase("fine-tune", epochs, before=before, total=before + epochs)
    optim = optimizer(net, t.lr, t.weight_decay)
    run.go_on(phase, net, optim)
    save = lambda p: run.keep(p, net, optim, plan=plan.to_json())  # noqa: E731
    objective = Objective(model, t.distill, t.temperature)
    run.timed("fine-tune", lambda: fit(net, data, phase, objective, optim, run.recorder, run.watch, save))
    run.timed("fine-tune", lambda: reestimate(net, data.train.epoch(phase.total)))


def finish(
    net: Compressed, model: nn.Module, data: Data, goals: tuple[Target, ...], config: Config, run: _Run, command: str
) -> Result:
    """Rebuild, count again, export, verify, save, report. The test split is read here, and only here."""
    run.watch.phase("verify", 0, 0)
    small, plan = rebuild(net, model)
    plan = replace(plan, model={"name": config.task.model, "classes": data.classes, "channels": data.shape[0]})
    uses = net.exact(plan)
    counted = verify.measure(small, data.example)
    if counted["bops"] != costs.bops(uses) or counted["macs"] != costs.macs(uses):
        raise JpqError(f"The rebuilt model counts {counted}, the plan {costs.bops(uses)} BOPs. This is a bug in jpq.")
    (run.folder / "plan.json").write_text(plan.to_json())
    checkpoint.save_tensors(small, run.folder / "model.safetensors")
    onnx.export(small, data.example, run.folder / "model.onnx")
    verified = run.timed("verify", lambda: verify.verify(net, small, run.folder / "model.onnx", data.test, data.example))
    full = costs.baseline(uses)
    figures = {
        "float": Figures(evaluate(model, data.test), int(full["bops"]), int(full["macs"]), int(full["size"]), 1.0),
        "compressed": Figures(
            evaluate(small, data.test), counted["bops"], counted["macs"], int(costs.size(uses)),
            counted["bops"] / full["bops"],
        ),
    }  # fmt: skip
    run.seconds["total"] = run.recorder.clock()
    result = Result(
        folder=run.folder, method=net.method, float=figures["float"], compressed=figures["compressed"],
        held_out={"float": evaluate(model, data.held_out), "compressed": evaluate(small, data.held_out)},
        targets={
            g.cost: {"asked": g.asked, "limit": g.limit, "reached": int(costs.COSTS[g.cost](uses)), "used": float(spent(g, uses))}
            for g in goals
        },
        verified=verified, layers=layer_rows(net, plan), history=tuple(run.recorder.rows), seconds=run.seconds,
        command=command or shlex.join(["jpq", "optimize"]), versions=versions(), seed=config.run.seed,
        notes=tuple(run.notes),
        data={
            "name": data.name, "checksum": data.checksum, "train": data.train.size, "held_out": data.held_out.size,
            "test": data.test.size,
        },
    )  # fmt: skip
    report.write(result, config)
    (run.folder / checkpoint.NAME).unlink(missing_ok=True)
    return result


def layer_rows(net: Compressed, plan: Plan) -> tuple[LayerRow, ...]:
    """One row per layer of the landed model."""
    uses = net.exact(plan)
    total = costs.bops(uses)
    inputs, outputs = net.shares.exact(plan.kept)
    rows = []
    for layer, use, (i, i_all), (o, o_all) in zip(net.network.layers, uses, inputs, outputs, strict=True):
        bops = int(costs.layer_bops(use))
        kept = (i, i_all) if i_all == len(layer.inputs) else (o, o_all)  # depthwise reads what it writes
        rows.append(
            LayerRow(
                layer.name, layer.kind, *kept, o, o_all, int(use.w_bits), int(use.a_bits),
                int(use.macs * use.inputs * use.outputs), bops, float(bops / total),
            )  # fmt: skip
        )
    return tuple(rows)


def versions() -> dict[str, str]:
    """What this run was computed with."""
    from importlib.metadata import version

    names = ("jpq", "torch", "torchvision", "brevitas", "numpy", "onnx", "onnxruntime")
    return {"python": platform.python_version(), **{name: version(name) for name in names}, "cores": str(os.cpu_count())}


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
    small = build(plan, copy.deepcopy(dense))
    checkpoint.load_tensors(small, folder / "model.safetensors")
    return small.eval(), plan
