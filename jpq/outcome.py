"""What a run leaves behind: the model rebuilt, counted again, exported, packed, verified and reported."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq import bench, checkpoint, costs, machine, mapping, models, report
from jpq.budget import Target, meets
from jpq.config import Config
from jpq.costs.latency import NS
from jpq.costs.table import Table
from jpq.data import Data
from jpq.exporters import forms, onnx, verify
from jpq.exporters.branches import branched
from jpq.exporters.narrow import WEIGHTS
from jpq.exporters.pack import pack
from jpq.exporters.quantized import build, complete, rebuild
from jpq.exporters.timing import float_layers
from jpq.figures import layer_rows, reached, uniform_costs, versions
from jpq.files import replace_file
from jpq.formats import forms_in
from jpq.journal import Journal
from jpq.network.compressed import Compressed
from jpq.network.unpack import unpacked
from jpq.plan import Plan
from jpq.plan import read as read_plan
from jpq.result import UNREAD, Figures, Result
from jpq.train import evaluate
from jpq.types import JpqError

SPLITS = ("train", "held_out", "test")


def finish(
    net: Compressed, tuned: nn.Module, model: nn.Module, data: Data, goals: tuple[Target, ...], config: Config,
    run: Journal, command: str, table: Table | None = None, final: bool = True,
) -> Result:  # fmt: skip
    """Rebuild, count again, save; where it is `final` export, verify and read the test split, here and only here."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # compare at full precision
    run.watch.phase("verify", 0, 0)
    small, plan = rebuild(net, model) if tuned is net else (tuned.eval(), complete(net))
    plan = replace(plan, model={"name": config.task.model, "classes": data.classes, "channels": data.shape[0]})
    uses = net.exact(plan)
    require_as_planned(small, plan, uses, goals, data)
    planned = [u for u in uses if u.name in plan.layers]
    if len(planned) < len(uses):
        rigid = [u.name for u in uses if u.name not in plan.layers]
        run.notes.append(f"{len(rigid)} layers cannot be quantized and stay at 32 bits: {', '.join(rigid[:5])} ...")
    replace_file(run.folder / "plan.json", lambda path: path.write_text(plan.to_json()))
    checkpoint.save_tensors(small, run.folder / "model.safetensors")
    schemes = {}
    if run.schemes:
        left = {u.name: float(u.density) for u in uses}
        schemes = mapping.record(net.network, plan.structures, left, run.schemes)
    predicted = _ms(costs.latency_ns(uses)) if table is not None else None
    shipped = {}
    if final:
        path, files = ship(small, plan, data, run.folder, config)
        verified = run.timed("verify", lambda: proof(net, tuned, small, path, data, run))
        shipped = {**files, "verified": verified}
        if table is not None and predicted is not None:
            shipped["latency"] = run.timed("bench", lambda: bench.compare(path, predicted, table))
    full = costs.baseline(uses)
    bops = costs.COSTS[config.budget.cost](uses)
    result = Result(
        folder=run.folder,
        method=net.method,
        float=Figures(
            evaluate(model, data.test) if final else UNREAD, int(full["bops"]), int(full["macs"]), int(full["size"]),
            1.0, int(full["bops"]), _ms(full.get("latency")),
        ),
        compressed=Figures(
            evaluate(small, data.test) if final else UNREAD, int(bops), int(costs.macs(uses)), int(costs.size(uses)),
            float(bops) / full["bops"], int(costs.bops_structured(uses)), predicted,
        ),
        held_out={"float": evaluate(model, data.held_out), "compressed": evaluate(small, data.held_out)},
        targets={goal.cost: reached(goal, uses) for goal in goals},
        layers=layer_rows(net, plan, config.budget.cost),
        history=run.lineage(),
        seconds={**run.seconds, "total": run.recorder.clock()},
        command=command or shlex.join(["jpq", "optimize"]),
        versions=versions(),
        seed=config.run.seed,
        notes=tuple(run.notes),
        metrics=run.metrics,
        schemes=schemes,
        data={"name": data.name, "checksum": data.checksum, **{k: getattr(data, k).size for k in SPLITS}},
        uniform=uniform_costs(net, uses),
        machine=machine.record(data.example.device),
        final=final,
        **shipped,
    )  # fmt: skip
    report.write(result, config)
    (run.folder / checkpoint.NAME).unlink(missing_ok=True)
    return result


def require_as_planned(
    small: nn.Module, plan: Plan, uses: Sequence[costs.LayerUse], goals: tuple[Target, ...], data: Data
) -> None:
    """Count the rebuilt model by running it. Raises JpqError where it is not what was planned, or over a target."""
    counted = verify.measure(small, data.example)
    planned = [u for u in uses if u.name in plan.layers]
    if counted["bops"] != costs.bops(planned) or counted["macs"] != costs.macs(planned):
        raise JpqError(
            f"The rebuilt model counts {counted}, the plan {costs.bops(planned)} BOPs. This is a bug in jpq."
        )
    over = [goal for goal in goals if not meets([goal], uses)]
    if over:
        raise JpqError(f"The landed model misses {over[0].flag} {over[0].asked}. This is a bug in jpq.")


def ship(small: nn.Module, plan: Plan, data: Data, folder: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    """Write model.packed, model.onnx and the other forms that the config names, each of those compared on test images.

    Returns the ONNX file, and what a Result says of all of them ("packed", "export").
    """
    stored = pack(small, plan, data.example, folder / "model.packed")
    path, weights = folder / forms.NAMES["onnx"], config.run.onnx_weights
    onnx.export(branched_or_same(small, plan, data.example), data.example, path, weights)
    others = [form for form in forms_in(config.run.formats) if form != "onnx"]
    made = {"onnx": {"file": path.name, "bytes": path.stat().st_size}}
    made |= forms.write(small, data.example, folder, others, data.test)
    integer, left = float_layers(path)
    about = {"opset": WEIGHTS[weights][0], "weights": weights, "integer_layers": integer, "float_layers": left}
    return path, {"packed": asdict(stored), "export": {**about, "forms": made}}


def proof(
    net: Compressed, tuned: nn.Module, small: nn.Module, path: Path, data: Data, run: Journal
) -> dict[str, Any]:  # fmt: skip
    """That masked, rebuilt and exported model compute the same; without the first where opened averages forbid it."""
    if tuned is net:
        return verify.verify(net, small, path, data.test, data.example)
    return {verify.OPENED: run.opened, **verify.exported(small, path, data.test)}


def _ms(nanoseconds: costs.Number | None) -> float | None:
    return None if nanoseconds is None else float(nanoseconds) / NS


def branched_or_same(small: nn.Module, plan: Plan, example: torch.Tensor) -> nn.Module:
    """What is exported: where whole kernels were dropped and filters share what they read, dense branches.

    Raises JpqError where the branches compute something else.
    """
    if set(plan.structures.values()) != {"kernels"}:
        return small
    try:
        cut = branched(small)
    except JpqError:  # filters share nothing
        return small
    apart = verify.difference(small, cut, example)
    if apart > verify.EXACT:
        raise JpqError(f"The branches are not the masked layers: {apart:.2e} apart in float64. This is a bug in jpq.")
    return cut


def load(folder: str | Path, run_code: bool = False) -> tuple[nn.Module, Plan]:
    """(small model in eval mode, its plan) from a run's folder; no pickle, no optimiser, no data needed.

    Where the model is your own code (module:callable), it is run only if `run_code`: the name is in the folder, and
    whoever made that chose it. Raises JpqError where files are missing, foreign or do not fit together.
    """
    folder = Path(folder)
    plan = read_plan(folder / "plan.json")
    dense = models.of_plan(plan, folder / "plan.json", folder / "model.safetensors", run_code)
    small = build(plan, unpacked(dense))
    checkpoint.load_tensors(small, folder / "model.safetensors")
    return small.eval(), plan
