"""What a run leaves behind: the model rebuilt, counted again, exported, packed, verified and reported."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq import costs
from jpq.allocation import structure_mapping
from jpq.compression.model import CompressedModel
from jpq.compression.usage import FLOAT_BITS
from jpq.config import Config, parse_formats
from jpq.costs.latency import NS
from jpq.costs.latency_table import LatencyTable
from jpq.costs.target import Target, all_met, used_share
from jpq.export import formats, verify
from jpq.export.branches import split_into_branches
from jpq.export.onnx.export import export_onnx
from jpq.export.onnx.narrow_weights import WEIGHTS
from jpq.export.packed.model import pack
from jpq.export.rebuild import complete_plan, rebuild
from jpq.export.timing import layer_table
from jpq.export.timing.kernels import float_layers
from jpq.files import tensors
from jpq.files.atomic import replace_file
from jpq.plan import Plan
from jpq.results import run_folder
from jpq.results.record import UNREAD, LayerRecord, ModelMetrics, Result
from jpq.tasks import task_record
from jpq.tasks.data import Data
from jpq.training import checkpoint, environment
from jpq.training.environment import versions
from jpq.training.run_state import RunState
from jpq.types import DENSE, JpqError

SPLITS = ("train", "held_out", "test")

UNIFORM = (2, 3, 4, 8)  # bits of the baselines that a front is drawn beside


def finish(
    net: CompressedModel,
    tuned: nn.Module,
    model: nn.Module,
    data: Data,
    targets: tuple[Target, ...],
    config: Config,
    run: RunState,
    command: str,
    table: LatencyTable | None = None,
    final: bool = True,
) -> Result:
    """Rebuild, count again, save; where it is `final` export, verify and read the test split, here and only here."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # compare at full precision
    run.watch.phase("verify", 0, 0)
    small, plan = rebuild(net, model) if tuned is net else (tuned.eval(), complete_plan(net))
    plan = replace(plan, model={"name": config.task.model, "classes": data.classes, "channels": data.shape[0]})
    uses = net.exact_usage(plan)
    require_as_planned(small, plan, uses, targets, data)
    planned = [u for u in uses if u.name in plan.layers]
    if len(planned) < len(uses):
        rigid = [u.name for u in uses if u.name not in plan.layers]
        run.notes.append(f"{len(rigid)} layers cannot be quantized and stay at 32 bits: {', '.join(rigid[:5])} ...")
    replace_file(run.folder / "plan.json", lambda path: path.write_text(plan.to_json()))
    tensors.save_tensors(small, run.folder / "model.safetensors")
    schemes = {}
    if run.schemes:
        left = {u.name: float(u.density) for u in uses}
        schemes = structure_mapping.mapping_record(net.network, plan.structures, left, run.schemes)
    predicted = _ms(costs.latency_ns(uses)) if table is not None else None
    shipped = {}
    if final:
        path, files = ship(small, plan, data, run.folder, config)
        verified = run.timed("verify", lambda: proof(net, tuned, small, path, data, run))
        shipped = {**files, "verified": verified}
        if table is not None and predicted is not None:
            shipped["latency"] = run.timed("bench", lambda: layer_table.compare_with_prediction(path, predicted, table))
    full = costs.baseline(uses)
    bops = costs.COSTS[config.budget.cost](uses)
    result = Result(
        folder=run.folder,
        method=net.method,
        float=ModelMetrics(
            data.task.evaluate(model, data.test) if final else UNREAD,
            int(full["bops"]),
            int(full["macs"]),
            int(full["size"]),
            1.0,
            int(full["bops"]),
            _ms(full.get("latency")),
        ),
        compressed=ModelMetrics(
            data.task.evaluate(small, data.test) if final else UNREAD,
            int(bops),
            int(costs.macs(uses)),
            int(costs.size(uses)),
            float(bops) / full["bops"],
            int(costs.bops_structured(uses)),
            predicted,
        ),
        held_out={
            "float": data.task.evaluate(model, data.held_out),
            "compressed": data.task.evaluate(small, data.held_out),
        },
        targets={goal.cost: reached(goal, uses) for goal in targets},
        layers=layer_rows(net, plan, config.budget.cost),
        history=run.lineage(),
        seconds={**run.seconds, "total": run.recorder.clock()},
        command=command or shlex.join(["jpq", "optimize"]),
        versions=versions(),
        seed=config.run.seed,
        notes=tuple(run.notes),
        metrics=run.metrics,
        schemes=schemes,
        data={
            "name": data.name,
            "checksum": data.checksum,
            **{k: getattr(data, k).size for k in SPLITS},
            **task_record(data.task),
        },
        uniform=uniform_costs(net, uses),
        machine=environment.record_environment(data.example.device),
        final=final,
        **shipped,
    )
    run_folder.write_run(result, config)
    (run.folder / checkpoint.NAME).unlink(missing_ok=True)
    return result


def require_as_planned(
    small: nn.Module, plan: Plan, uses: Sequence[costs.LayerUse], targets: tuple[Target, ...], data: Data
) -> None:
    """Count the rebuilt model by running it. Raises JpqError where it is not what was planned, or over a target."""
    counted = verify.measure(small, data.example)
    planned = [u for u in uses if u.name in plan.layers]
    if counted["bops"] != costs.bops(planned) or counted["macs"] != costs.macs(planned):
        raise JpqError(
            f"The rebuilt model counts {counted}, the plan {costs.bops(planned)} BOPs. This is a bug in jpq."
        )
    over = [goal for goal in targets if not all_met([goal], uses)]
    if over:
        raise JpqError(f"The landed model misses {over[0].flag} {over[0].text}. This is a bug in jpq.")


def ship(small: nn.Module, plan: Plan, data: Data, folder: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    """Write model.packed, model.onnx and the other forms that the config names, each of those compared on test images.

    Returns the ONNX file, and what a Result says of all of them ("packed", "export").
    """
    stored = pack(small, plan, data.example, folder / "model.packed")
    path, weights = folder / formats.FORMATS["onnx"].file_name, config.run.onnx_weights
    export_onnx(branched_or_same(small, plan, data.example), data.example, path, weights)
    others = [form for form in parse_formats(config.run.formats) if form != "onnx"]
    made = {"onnx": {"file": path.name, "bytes": path.stat().st_size}}
    made |= formats.write(small, data.example, folder, others, data.test)
    integer, left = float_layers(path)
    about = {"opset": WEIGHTS[weights][0], "weights": weights, "integer_layers": integer, "float_layers": left}
    return path, {"packed": asdict(stored), "export": {**about, "forms": made}}


def proof(
    net: CompressedModel, tuned: nn.Module, small: nn.Module, path: Path, data: Data, run: RunState
) -> dict[str, Any]:
    """That masked, rebuilt and exported model compute the same; without the first where opened averages forbid it."""
    if tuned is net:
        return verify.verify(net, small, path, data.test, data.example, data.task)
    return {verify.OPENED: run.opened, **verify.exported(small, path, data.test, data.task)}


def _ms(nanoseconds: costs.Number | None) -> float | None:
    return None if nanoseconds is None else float(nanoseconds) / NS


def branched_or_same(small: nn.Module, plan: Plan, example: torch.Tensor) -> nn.Module:
    """What is exported: where whole kernels were dropped and filters share what they read, dense branches.

    Raises JpqError where the branches compute something else.
    """
    if set(plan.structures.values()) != {"kernels"}:
        return small
    try:
        cut = split_into_branches(small)
    except JpqError:  # filters share nothing
        return small
    apart = verify.difference(small, cut, example)
    if apart > verify.EXACT:
        raise JpqError(f"The branches are not the masked layers: {apart:.2e} apart in float64. This is a bug in jpq.")
    return cut


def reached(goal: Target, uses: Sequence[costs.LayerUse]) -> dict[str, Any]:
    """How one target was met."""
    cost = int(costs.COSTS[goal.cost](uses))
    line = {"asked": goal.text, "limit": goal.limit, "reached": cost, "used": float(used_share(goal, uses))}
    return {**line, "unit": "ns"} if goal.cost == "latency" else line


def layer_rows(net: CompressedModel, plan: Plan, cost: str = "bops") -> tuple[LayerRecord, ...]:
    """One row per layer of the landed model; bit-operations as `cost` ("bops" or "bops-structured") counts them."""
    densities = net.densities.exact(plan.masks)
    uses = net.exact_usage(plan)
    counted = uses if cost == "bops" else costs.structured(uses)
    total = costs.bops(counted)
    inputs, outputs = net.shares.exact(plan.kept)
    rows = []
    every = zip(net.network.layers, uses, counted, inputs, outputs, strict=True)
    for layer, use, count, (i, i_all), (o, o_all) in every:
        bops = int(costs.layer_bops(count))
        kept = (i, i_all) if i_all == len(layer.inputs) else (o, o_all)  # depthwise reads what it writes
        macs = int(use.macs * use.inputs * use.outputs * use.density)
        density = float(densities[layer.name].share) if layer.name in densities else 1.0
        bits = int(use.w_bits), int(use.a_bits)
        ms = None if use.clock is None else float(costs.layer_latency(use)) / NS
        structure = plan.structures.get(layer.name, DENSE)
        share, kind = float(bops / total), layer.kind.value
        rows.append(
            LayerRecord(layer.name, kind, *kept, o, o_all, *bits, macs, bops, share, density, structure, ms, use.macs)
        )
    return tuple(rows)


def uniform_costs(net: CompressedModel, uses: Sequence[costs.LayerUse]) -> dict[str, dict[str, float]]:
    """What the whole model costs at the same bits everywhere (the image keeps its own), by "W4A4" and measure."""
    found = {}
    for bits in UNIFORM:
        whole = [
            costs.dense(u)
            if u.w_bits == FLOAT_BITS
            else replace(costs.dense(u, bits), a_bits=u.a_bits if layer.reads_input else bits)
            for u, layer in zip(uses, net.network.layers, strict=True)
        ]
        spent = {"bops": float(costs.bops(whole)), "macs": float(costs.macs(whole)), "size": float(costs.size(whole))}
        clocks = {"latency": float(costs.latency_ns(whole))} if all(u.clock for u in uses) else {}
        found[f"W{bits}A{bits}"] = {**spent, "bops-structured": spent["bops"], **clocks}
    return found
