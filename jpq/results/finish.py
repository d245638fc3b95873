"""The last step of a run: rebuild the model, count again, export, verify, collect the numbers, write."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq import costs
from jpq.allocation import structure_mapping
from jpq.compression.float_work import NOTEWORTHY, describe_float_work, find_float_work
from jpq.compression.model import CompressedModel
from jpq.compression.usage import FLOAT_BITS
from jpq.config import TARGETS, Config, parse_formats
from jpq.costs.latency import NS
from jpq.costs.latency_table import LatencyTable
from jpq.costs.target import Target, all_met, used_share
from jpq.export import formats, verify
from jpq.export.branches import split_into_branches
from jpq.export.count import measure
from jpq.export.exact_steps import round_weight_steps
from jpq.export.onnx.export import export_onnx
from jpq.export.onnx.narrow_weights import WEIGHTS
from jpq.export.origin import note_origin
from jpq.export.packed.model import pack_model
from jpq.export.rebuild import complete_plan, rebuild
from jpq.export.runtimes import Session
from jpq.export.timing import layer_table
from jpq.export.timing.kernels import find_float_layers
from jpq.files import tensors
from jpq.files.atomic import replace_file
from jpq.plan import Plan
from jpq.results import run_folder
from jpq.results.embedding import as_exported, describe_normalisation
from jpq.results.record import UNREAD, WARNING, LayerRecord, ModelMetrics, Result
from jpq.tasks import task_record
from jpq.tasks.data import Data
from jpq.tasks.load import fit_sizes
from jpq.tracing.forward import collect_tensors
from jpq.training import checkpoint, environment
from jpq.training.job import Job
from jpq.training.run_state import RunState
from jpq.types import DENSE, JpqError

SHORT = 1000  # entries of a list that result.json holds; longer ones, as vocabularies, are in model.onnx alone

SPLITS = ("train", "held_out", "test")

TASK_KEYS = ("task", "metric", "inputs")  # of the record of the data, which has them for some tasks alone

UNIFORM_BITS = (2, 3, 4, 8)  # bit-widths of the uniform baselines drawn beside a front


def finish(
    net: CompressedModel,
    tuned: nn.Module,
    job: Job,
    command: str,
    table: LatencyTable | None = None,
    final: bool = True,
) -> Result:
    """Step 10 of a run: rebuild, count again, save, export, verify, collect the numbers, write.

    Args:
        net: the model under compression, with frozen decisions.
        tuned: the fine-tuned module: `net`, or with opened norms the model rebuilt before fine-tuning.
        job: what the run works on at this budget; its test data are read here and only here, where the run is final.
        command: the command line, for the report.
        table: measured layers that predict latency.
        final: export, verify and measure on the test split; trials of a study do so later (`finalize`).
    """
    model, data, config, run = job.model, job.data, job.config, job.run
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # compare at full precision
    run.observer.phase("verify", 0, 0)
    trained_state = copy.deepcopy(tuned.state_dict())  # the next budget goes on with norms that are not folded
    round_weight_steps(tuned.model if tuned is net else tuned, data.example)
    small, plan = rebuild_model(net, tuned, model, data, config)
    uses = net.exact_usage(plan)
    check_counts(small, uses, job.targets, data)
    note_float_layers(net, plan, uses, run)
    save_model(small, plan, run.folder)
    predicted_ms = _to_ms(costs.latency_ns(uses)) if table is not None else None
    export_record: dict[str, Any] = {}
    metric = UNREAD
    if final:
        path, export_record = export_model(small, plan, data, run.folder, config)
        export_record["verified"] = run.timed("verify", lambda: verify_models(net, tuned, small, path, data, run))
        metric = export_record["verified"]["metric"]["file"]
        if table is not None and predicted_ms is not None:
            export_record["latency"] = run.timed(
                "bench", lambda: layer_table.compare_with_prediction(path, predicted_ms, table)
            )
    result = Result(
        folder=run.folder,
        method=net.method,
        float=float_metrics(uses, data.task.evaluate(model, data.test) if final else UNREAD),
        compressed=compressed_metrics(uses, config.budget.cost, metric, predicted_ms),
        held_out={
            "float": data.task.evaluate(model, data.held_out),
            "compressed": data.task.evaluate(small, data.held_out),
        },
        targets={target.cost: target_record(target, uses) for target in job.targets},
        layers=layer_records(net, plan, config.budget.cost),
        float_work=asdict(find_float_work(net.network, uses, plan.layers)),
        history=run.lineage(),
        seconds={**run.seconds, "total": run.recorder.clock()},
        command=command or shlex.join(["jpq", "optimize"]),
        versions=environment.versions(),
        seed=config.run.seed,
        notes=tuple(run.notes),
        metrics=run.metrics,
        contest=run.contest,
        pruning=run.pruning,
        schemes=structure_record(net, plan, uses, run),
        data=data_record(data),
        uniform=uniform_costs(net, uses),
        machine=environment.record_environment(collect_tensors(data.example)[0].device),
        final=final,
        **export_record,
    )
    run_folder.write_run(result, config)
    (run.folder / checkpoint.NAME).unlink(missing_ok=True)
    tuned.load_state_dict(trained_state)
    return result


def rebuild_model(
    net: CompressedModel, tuned: nn.Module, model: nn.Module, data: Data, config: Config
) -> tuple[nn.Module, Plan]:
    """(small quantized model in eval mode, its plan with the model's name, classes and input channels)."""
    small, plan = rebuild(net, model) if tuned is net else (tuned.eval(), complete_plan(net))
    about = {"name": config.task.model, "classes": data.classes, "channels": data.shape[0], **data.arguments}
    return small, replace(plan, model=about)


def check_counts(small: nn.Module, uses: Sequence[costs.LayerUse], targets: tuple[Target, ...], data: Data) -> None:
    """Count the rebuilt model by running it. Raises JpqError where it costs more than its plan, or than a target."""
    measured = measure(small, data.example)
    if measured["bops"] != costs.bops(uses) or measured["macs"] != costs.macs(uses):
        raise JpqError(
            f"The rebuilt model counts {measured}, the plan {costs.bops(uses)} BOPs and {costs.macs(uses)} MACs. "
            "This is a bug in jpq."
        )
    over = [target for target in targets if not all_met([target], uses)]
    if over:
        raise JpqError(f"The discretized model misses {over[0].flag} {over[0].text}. This is a bug in jpq.")


def note_float_layers(net: CompressedModel, plan: Plan, uses: Sequence[costs.LayerUse], run: RunState) -> None:
    """Add a note to the run where layers stay at 32 bits, or much of the work does."""
    work = find_float_work(net.network, uses, plan.layers)
    if work.share == 1:
        run.notes.append("All layers stay at 32 bits: nothing is quantized.")
    elif work.share > NOTEWORTHY or any(part.part == "layer" for part in work.parts):
        run.notes.append(f"At 32 bits stay {describe_float_work(work)}.")
    if any(use.clock for use in uses) and net.network.products:
        run.notes.append(f"Latency is that of the layers: {len(net.network.products)} products are not in the table.")


def save_model(small: nn.Module, plan: Plan, folder: Path) -> None:
    """Write plan.json and model.safetensors."""
    replace_file(folder / "plan.json", lambda path: path.write_text(plan.to_json(), encoding="utf-8"))
    tensors.save_tensors(small, folder / "model.safetensors")


def describe_inputs(data: Data, config: Config) -> dict[str, Any]:
    """What exported files say of their inputs, outputs and budget (jpq/export/onnx/metadata.py)."""
    targets = {name.removeprefix("target_"): getattr(config.budget, name) for name in TARGETS}
    return {
        "task": data.task.name,
        "budget": {name: text for name, text in targets.items() if text},
        "input_size": list(data.shape),
        **describe_normalisation(data, config),
        "colour_order": {1: "grey", 3: "RGB"}.get(data.shape[0], "") if len(data.shape) == 3 else "",
        "class_names": list(data.class_names),
        **data.about,
    }


def export_model(small: nn.Module, plan: Plan, data: Data, folder: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    """Write model.packed, model.onnx and the other formats of the config, which are compared on test samples.

    Returns the ONNX file, and the fields "packed" and "export" of a Result.
    """
    note_origin(small, plan, about=describe_inputs(data, config))
    stored = pack_model(small, plan, data.example, folder / "model.packed")
    path, weights = folder / formats.FORMATS["onnx"].file_name, config.run.onnx_weights
    exported, seen = as_exported(with_branches(small, plan, data.example), data, config)
    free = export_onnx(exported, seen.example, path, weights, any_size=data.task.any_size)
    if not free:  # figures of file and model are of the same samples
        fit_sizes(data, Session(path))
    other_formats = [form for form in parse_formats(config.run.formats) if form != "onnx"]
    forms = {"onnx": {"file": path.name, "bytes": path.stat().st_size}}
    small, _ = as_exported(small, data, config)
    forms |= formats.write(small, seen.example, folder, other_formats, seen.test.one_size(), task=data.task)
    integer, in_float = find_float_layers(path)
    about = {"opset": WEIGHTS[weights][0], "weights": weights, "integer_layers": integer, "float_layers": in_float}
    about |= {"normalization": "embedded"} if config.run.embed_normalization else {}
    about |= {"sizes": "any"} if free else {}
    return path, {"packed": asdict(stored), "export": {**about, "forms": forms}}


def verify_models(
    net: CompressedModel, tuned: nn.Module, small: nn.Module, path: Path, data: Data, run: RunState
) -> dict[str, Any]:
    """Check that masked, rebuilt and exported model agree (with opened norms the masked one cannot); note warnings.

    The record's "metric" holds the metric of the file in a default session and that of the model.
    """
    masked, _ = as_exported(net, data, run.config)
    small, data = as_exported(small, data, run.config)
    record: dict[str, Any] = (
        verify.rebuilt(masked, small, data.example) if tuned is net else {verify.OPENED: run.opened}
    )
    record |= verify.exported_with_metric(small, path, data.test, data.task)
    for checked in (record, record["metric"]):
        if "warning" in checked:
            run.notes.insert(0, f"{WARNING}{checked['warning']}")
    return record


def with_branches(small: nn.Module, plan: Plan, example: torch.Tensor) -> nn.Module:
    """The model to export: dense branches where whole kernels were dropped and filters share their inputs.

    Raises JpqError where the branches compute something else.
    """
    if set(plan.structures.values()) != {"kernels"}:
        return small
    try:
        cut = split_into_branches(small)
    except JpqError:  # filters share nothing
        return small
    difference = verify.difference(small, cut, example)
    if difference > verify.EXACT:
        raise JpqError(
            f"The branches are not the masked layers: {difference:.2e} apart in float64. This is a bug in jpq."
        )
    return cut


def float_metrics(uses: Sequence[costs.LayerUse], metric: float) -> ModelMetrics:
    """Test metric and costs of the float model."""
    full = costs.baseline(uses)
    bops = int(full["bops"])
    return ModelMetrics(metric, bops, int(full["macs"]), int(full["size"]), 1.0, bops, _to_ms(full.get("latency")))


def compressed_metrics(
    uses: Sequence[costs.LayerUse], cost: str, metric: float, latency_ms: float | None
) -> ModelMetrics:
    """Test metric and costs of the compressed model; bit-operations as `cost` ("bops", "bops-structured") counts."""
    bops = costs.COSTS[cost](uses)
    return ModelMetrics(
        metric,
        int(bops),
        int(costs.macs(uses)),
        int(costs.size(uses)),
        float(bops) / costs.baseline(uses)["bops"],
        int(costs.bops_structured(uses)),
        latency_ms,
    )


def _to_ms(nanoseconds: costs.Number | None) -> float | None:
    return None if nanoseconds is None else float(nanoseconds) / NS


def target_record(target: Target, uses: Sequence[costs.LayerUse]) -> dict[str, Any]:
    """Limit, cost and used share of one target."""
    cost = int(costs.COSTS[target.cost](uses))
    record = {"asked": target.text, "limit": target.limit, "reached": cost, "used": float(used_share(target, uses))}
    return {**record, "unit": "ns"} if target.cost == "latency" else record


def structure_record(net: CompressedModel, plan: Plan, uses: Sequence[costs.LayerUse], run: RunState) -> dict[str, Any]:
    """Mask structures per layer with their modelled time, where they were chosen per layer."""
    if not run.schemes:
        return {}
    densities = {u.name: float(u.density) for u in uses}
    return structure_mapping.mapping_record(net.network, plan.structures, densities, run.schemes)


def data_record(data: Data) -> dict[str, Any]:
    """Name, checksum and split sizes of the data, their preprocessing, and their task.

    Facts that the data give themselves (`about`) may say the preprocessing, and none of the others.
    """
    sizes = {split: getattr(data, split).size for split in SPLITS}
    preprocessing = {"mean": list(data.train.mean), "std": list(data.train.std)}
    names = {"class_names": list(data.class_names)} if data.class_names else {}
    about = {
        key: value
        for key, value in data.about.items()
        if key not in TASK_KEYS and (not isinstance(value, (list, dict)) or len(value) <= SHORT)
    }
    tree = {"name": data.name, "checksum": data.checksum, **sizes, "shape": list(data.shape)}
    inputs = len(collect_tensors(data.example))
    counted = {"sample": data.sample_name, **({"inputs": inputs} if inputs > 1 else {})}
    return {**preprocessing, **about, **tree, **task_record(data.task, data.classes), **counted, **names}


def layer_records(net: CompressedModel, plan: Plan, cost: str = "bops") -> tuple[LayerRecord, ...]:
    """A record per layer of the compressed model; bit-operations as `cost` ("bops", "bops-structured") counts."""
    densities = net.densities.exact_densities(plan.masks)
    uses = net.exact_usage(plan)
    counted_uses = uses if cost == "bops" else costs.structured(uses)
    total = costs.bops(counted_uses)
    inputs, outputs = net.shares.exact_shares(plan.kept)
    rows = []
    layers = net.network.layers  # products and tables follow behind them
    every = zip(layers, uses[: len(layers)], counted_uses[: len(layers)], inputs, outputs, strict=True)
    for layer, use, count, (i, i_all), (o, o_all) in every:
        bops = int(costs.layer_bops(count))
        kept = (i, i_all) if i_all == len(layer.inputs) else (o, o_all)  # depthwise reads what it writes
        macs = int(costs.layer_macs(use))
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
    """ "W4A4" -> cost -> amount of the unpruned model at these bits everywhere; the image keeps its own."""
    costs_by_name = {}
    layers = net.network.layers
    others = [costs.dense(u) for u in uses[len(layers) :]]
    for bits in UNIFORM_BITS:
        dense = [
            costs.dense(u)
            if u.w_bits == FLOAT_BITS
            else replace(costs.dense(u, bits), a_bits=u.a_bits if layer.reads_input else bits)
            for u, layer in zip(uses[: len(layers)], layers, strict=True)
        ] + others
        amounts = {"bops": float(costs.bops(dense)), "macs": float(costs.macs(dense)), "size": float(costs.size(dense))}
        clocks = {"latency": float(costs.latency_ns(dense))} if costs.are_timed(uses) else {}
        costs_by_name[f"W{bits}A{bits}"] = {**amounts, "bops-structured": amounts["bops"], **clocks}
    return costs_by_name
