"""The recipe of `jpq optimize`, from a config to a finished run, in ten numbered steps: start reading here.

Steps 1 to 6 are done once (`optimize`), steps 7 to 10 for each budget of the run (`run_budget`). A method that learns
its decisions goes on from budget to budget with the network as it was before it was discretized: soft gates,
real-valued widths, Adam's moments and the multipliers of the targets are kept, and only the controller's ramp begins
anew. A method that decides at once decides again, on the weights that the budget before has trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jpq import costs
from jpq.allocation import structure_mapping, structure_search
from jpq.allocation.decision_data import calibration_batches, calibration_inputs, check_classes
from jpq.allocation.measured.calibration import Measurement
from jpq.allocation.measured.decide import known_table
from jpq.allocation.measured.table import model_checksum, read_table
from jpq.allocation.prepare import Prepared, check_decide, prepare
from jpq.allocation.procedures import procedure_of
from jpq.compression.build import budget_targets
from jpq.compression.calibration import recalibrate
from jpq.compression.masking import original
from jpq.compression.model import CompressedModel
from jpq.compression.power_of_two_steps import round_activation_steps
from jpq.config import MEASURED_START, MINUTES, RULES, SEARCH, Config, Run, parse_formats
from jpq.costs.latency_table import LatencyTable
from jpq.costs.target import Target
from jpq.export.timing import layer_table
from jpq.export.trial_export import check_exportable
from jpq.files import tensors
from jpq.files.paths import mark_latest
from jpq.results import budget_folders, run_folder, run_status
from jpq.results.announce import check_float_metric, describe_run, note_batchnorm
from jpq.results.description import NullAnnouncer, RunAnnouncer
from jpq.results.embedding import check_embedding
from jpq.results.finish import finish
from jpq.results.record import Result
from jpq.tasks.data import Data
from jpq.tasks.load import load_dense_model, read_data
from jpq.training import checkpoint, distributed
from jpq.training.batchnorm_choice import choose_batchnorm
from jpq.training.environment import full_precision, pick_device, restored_threads, set_threads
from jpq.training.epochs import BudgetEpochs, Phase, budget_epochs
from jpq.training.history import NullObserver, TensorBoardObserver, TrainingObserver, import_writer
from jpq.training.job import Job
from jpq.training.loop import Objective, build_optimizer
from jpq.training.loss_scale import scale_loss
from jpq.training.measured_decision import take_contest_weights
from jpq.training.measured_start import ranked_network, with_measured_start
from jpq.training.phases import SearchState, fine_tune, rebuild_opened, search, train
from jpq.training.pruning_report import report_pruning_price
from jpq.training.reconstruction_phase import reconstruct_weights
from jpq.training.resolve_bits import BitsResolver
from jpq.training.run_state import RunState, create_folder
from jpq.types import JpqError

ALREADY_PRUNED = (
    "--weights are pruned already: the float accuracy, and what is distilled from, are those of the pruned model. Give "
    "the dense model with --weights, and the folder that the pruned one lies in with --mask."
)


@restored_threads()
def optimize(
    config: Config,
    observer: TrainingObserver | None = None,
    command: str = "",
    final: bool = True,
    announcer: RunAnnouncer | None = None,
) -> Result:
    """Prune and quantize the configured model onto its budget; everything is written to the run's folder.

    Args:
        config: the settings of the run.
        observer: receives phases, steps and epochs.
        command: the command line that the report names.
        final: False for a trial among others: neither exported nor verified, and its test split stays unread.
        announcer: is told before training what the run works on, and before compression what is odd about it.

    Raises JpqError for settings, files or targets that cannot work, and when a check of the result fails.
    """
    config = config.check()
    if config.budget.has_accuracy_target:
        raise JpqError("--max-drop and --min-metric take several runs: call jpq.find_cheapest(config).")
    check_decide(config.decide)
    run = open_run(config, observer)
    data, model = load_task(config, run)  # 1 model and data
    table = load_table(config, run)
    check_sensitivity(config)
    prepared, targets = prepare_run(model, data, config, table)  # 2 trace, sites, targets
    epochs = budget_epochs(config, prepared.method)
    check_all_budgets(prepared, targets, model, data, config)  # 3 can each budget be met?
    check_sensitivity_fits(prepared, model, data, config)
    if final and not run.saved:
        check_export(prepared, model, data, config)
    begin_folder(config, table, run)  # nothing is written before all checks have passed
    announcer = announcer or NullAnnouncer()
    announcer.describe(describe_run(model, data, prepared, targets, config, run))
    train_float(model, data, config, run)  # 4 float training, without --weights
    if final:
        check_float_metric(model, data, config, run, announcer)
    check_mask(prepared, model, run)
    note_batchnorm(choose_batchnorm(model, data, config), data, run)
    scale_loss(model, data, run)
    if prepared.method.structure == SEARCH:
        prepared = search_structures(prepared, model, data, config, run)  # 5 mask structures, with --structure search
        check_all_budgets(prepared, targets, model, data, config)
    if prepared.structures is not None:
        run.schemes = prepared.method.structure if prepared.method.structure in (RULES, SEARCH) else "hand"
    net = attach_model(prepared, model, calibration_batches(data), config)  # 6 gates and quantizers
    if config.decide.start == MEASURED_START:
        prepared = with_measured_start(prepared, net, model, data, next(iter(targets.values())), run)
        net = attach_model(prepared, model, calibration_batches(data), config)
    run.recorder.full_bops, run.recorder.cost = costs.baseline(net.exact_usage())["bops"], config.budget.cost
    setup = RunSetup(config, data, model, prepared, targets, epochs, table, command, final)
    return run_budgets(setup, net, run)  # 7 to 10, for each budget


@dataclass(frozen=True)
class RunSetup:
    """The set-up that all budgets of one run share: model, data, method and targets."""

    config: Config
    data: Data
    model: nn.Module  # float, trained
    prepared: Prepared
    targets: Mapping[str, tuple[Target, ...]]  # by budget
    epochs: Mapping[str, BudgetEpochs]  # by budget
    table: LatencyTable | None
    command: str
    final: bool

    def reattach(self, model: nn.Module) -> CompressedModel:
        """Attach the method to `model` as it was attached at first, without moving the run's own random numbers."""
        with torch.random.fork_rng():
            return attach_model(self.prepared, model, calibration_batches(self.data), self.config)


def run_budgets(setup: RunSetup, net: CompressedModel, run: RunState) -> Result:
    """The result for the last budget; its `front` holds all of them where there are several.

    Args:
        setup: everything that the budgets share.
        net: attached to the trained model.
        run: the state of the whole run.
    """
    configs, state, weights = setup.config.each(), SearchState(net), setup.model
    searches = procedure_of(net.method).searches
    folders = {name: budget_folders.budget_folder(run.folder, name, each) for name, each in configs.items()}
    for place, (name, config) in enumerate(configs.items()):
        budget_run = run.for_budget(place, name, folders[name])
        if run.saved and int(run.saved.get("budget", 0)) > place:
            continue  # an earlier part of this run finished it
        if place and not searches:
            weights = resumed_weights(weights, budget_run)
            state = SearchState(setup.reattach(weights))
        result, tuned = run_budget(setup, config, state, weights, budget_run, last=place == len(configs) - 1)
        if tuned is not None and not searches and config.train.effort != MINUTES:  # a reconstruction begins in float
            weights = with_trained_weights(setup.model, tuned)
    if len(configs) == 1:
        return result
    return replace(result, front=distributed.run_on_first(lambda: budget_folders.finish_front(folders, run)))


def run_budget(
    setup: RunSetup, config: Config, state: SearchState, weights: nn.Module, run: RunState, last: bool
) -> tuple[Result, CompressedModel | None]:
    """Run one budget: its result, and the fine-tuned network (None where the rebuilt one was fine-tuned instead)."""
    job = Job(setup.model, setup.data, setup.targets[run.label], config, run)
    searches = procedure_of(state.net.method).searches
    searching, tuning = setup.epochs[run.label].phases(run.label, run.budget == 0)
    if run.label:
        distributed.run_on_first(lambda: run_folder.prepare_folder(run, config, setup.table))

    def with_weights() -> dict[str, Any]:
        return {} if searches or not run.budget else {"first": weights.state_dict()}

    float_net = partial(setup.reattach, setup.model) if run.budget else None
    plan = search(state, job, searching, with_weights, float_net)  # 7 search, discretize
    if setup.final:
        report_pruning_price(state.net, plan, job)
    if searches and run.is_past("search") and run.saved and run.saved.get("soft"):
        state.restore(run.saved["soft"], config, run)
    net = state.net if last or not searches else copy_with_state(state.net, setup.reattach(weights))
    if searches and not run.is_past("search"):
        recalibrate(net, calibration_batches(setup.data))  # the search has changed what layers read
    net.freeze(plan)  # 8 take the plan's decisions
    round_activation_steps(net)
    take_contest_weights(net, job)

    def with_search() -> dict[str, Any]:
        return with_weights() if last or not searches else {"soft": state.state()}

    tuned = rebuild_opened(net, job) if net.opened else net
    reconstruct_weights(net, job)  # 9 rounding alone, with --effort minutes or as a warm start
    resolver = None
    if config.decide.resolve_at:
        resolver = BitsResolver(net, plan, job, tuning.epochs)
    fine_tune(tuned, job, plan, state.moments(net), tuning, with_search, resolver)  # weights alone
    last_step = partial(finish, net, tuned, job, setup.command, setup.table, setup.final)
    with full_precision():
        result = distributed.run_on_first(last_step)  # 10 rebuild, export, verify, report
    return result, net if tuned is net else None


def open_run(config: Config, observer: TrainingObserver | None) -> RunState:
    """The state of a run, new or resumed; the seed of all draws is set. Nothing is written yet."""
    distributed.check_rows(config.train.batch_size)
    distributed.run_on_first(lambda: run_status.check_other_settings(config))
    if config.run.tensorboard:
        import_writer()
    run = RunState(config, observer or NullObserver(), config.folder())
    torch.manual_seed(config.run.seed)
    return run


def begin_folder(config: Config, table: LatencyTable | None, run: RunState) -> None:
    """Make the run's folder, with its settings and the table of measured layers."""

    def begin() -> None:
        if config.run.overwrite:
            run_status.clear_folder(run.folder, keep=run_status.input_files(config))
        create_folder(config)
        if config.run.out == Run.out:
            mark_latest(run.folder)
        if table is not None:
            layer_table.write_table(list(table.entries), run.folder / layer_table.TABLE_NAME)

    distributed.run_on_first(begin)
    if config.run.tensorboard and distributed.is_first():
        run.observer = TensorBoardObserver(run.observer, run.folder, run.recorder.rows)


def load_task(config: Config, run: RunState) -> tuple[Data, nn.Module]:
    """The data set and the float model (not trained yet, where no weights are given)."""
    device = pick_device(config.run.device)
    data = distributed.first_then_others(lambda: read_data(config, device))
    distributed.check_same(data.checksum, "a data set")
    run.check_data(data.checksum)
    run.notes.extend(data.notes)
    check_classes(config.decide.classes, data)
    check_embedding(data, config)
    return data, load_dense_model(config, data, device, run.notes)


def load_table(config: Config, run: RunState) -> LatencyTable | None:
    """The table of measured layers, where one is given. Raises JpqError where a resumed run began with another."""
    if config.budget.latency_table is None:
        return None
    path = config.budget.latency_table

    def load() -> LatencyTable:
        table = layer_table.read_table(path)
        kept = run.folder / layer_table.TABLE_NAME
        if run.saved and kept.is_file() and layer_table.read_table(kept).entries != table.entries:
            raise JpqError(f"{table.source} is no longer the table that this run began with. Run without --resume.")
        return table

    return distributed.first_then_others(load)


def check_sensitivity(config: Config) -> None:
    """Raise JpqError where --sensitivity is no table; `check_sensitivity_fits` says whether it is one of this model."""
    path = config.decide.sensitivity
    if path is not None:
        distributed.first_then_others(lambda: read_table(path))


def check_sensitivity_fits(prepared: Prepared, model: nn.Module, data: Data, config: Config) -> None:
    """Raise JpqError where --sensitivity is the table of another task, network, weights, samples, version or levels.

    Without --weights the model is still to be trained, so its weights are compared when the table is used.
    """
    path = config.decide.sensitivity
    if path is None:
        return
    table = distributed.first_then_others(lambda: read_table(path))
    with torch.random.fork_rng():
        net = attach_model(prepared, model, [data.example], config)
        if config.decide.start == MEASURED_START:
            net = ranked_network(net, model, [data.example], config.decide)
        weights = table.model if config.task.weights is None else model_checksum(model)
        inputs, distance, name = partial(calibration_inputs, data), data.task.divergence, data.task.name
        means = Measurement(inputs, distance, weights, source=str(path), same_samples=True, task=name)
        known_table(table, net, means)


def prepare_run(
    model: nn.Module, data: Data, config: Config, table: LatencyTable | None
) -> tuple[Prepared, dict[str, tuple[Target, ...]]]:
    """The method set up on the model, and the targets of each budget."""
    first_config = next(iter(config.each().values()))
    prepared = prepare(model, data.example, config.decide, first_config.budget, table=table)
    set_threads(config.run.threads, prepared.network.macs * config.train.batch_size)
    return prepared, budget_targets(prepared.network, config)


def attach_model(prepared: Prepared, model: nn.Module, inputs: list[Tensor], config: Config) -> CompressedModel:
    """Attach the method to a model, with the run's seed for every initial draw."""
    torch.manual_seed(config.run.seed)
    return prepared.attach(model, inputs)


def check_all_budgets(
    prepared: Prepared, targets: Mapping[str, tuple[Target, ...]], model: nn.Module, data: Data, config: Config
) -> None:
    """Raise JpqError, naming the smallest possible cost, where a target of any budget cannot be met."""
    net = attach_model(prepared, model, [data.example], config)
    for each in targets.values():
        prepared.procedure.check_feasible(net, each, config.decide)


def check_export(prepared: Prepared, model: nn.Module, data: Data, config: Config) -> None:
    """Raise JpqError before training where the model's file could not be written or run."""
    with torch.random.fork_rng():
        net = attach_model(prepared, model, [data.example], config)
        check_exportable(net, model, data.example, parse_formats(config.run.formats), config.run.onnx_weights)


def train_float(model: nn.Module, data: Data, config: Config, run: RunState) -> None:
    """Train the float model, unless its weights were given or an earlier part of this run trained it."""
    if config.task.weights is None:
        kept = run.folder / "float.safetensors"
        if run.is_past("float"):
            distributed.run_on_first(lambda: tensors.load_tensors(model, kept))
        else:
            phase = Phase("float", config.train.float_epochs)
            optim = build_optimizer(model, config.train.lr, config.train.weight_decay)
            train(model, data, phase, Objective(precision=config.train.precision), optim, run)
            distributed.run_on_first(lambda: tensors.save_tensors(model, kept))
        model.eval()
    distributed.share_state(model)


def check_mask(prepared: Prepared, model: nn.Module, run: RunState) -> None:
    """Check a mask from outside against a resumed run's, and note where the given weights obey it already."""
    if prepared.mask is None:
        return
    if run.saved:
        prepared.mask.check_same(run.saved["net"], prepared.sites)
    if prepared.mask.is_held_by(model, prepared.sites):
        run.notes.append(ALREADY_PRUNED)


def search_structures(prepared: Prepared, model: nn.Module, data: Data, config: Config, run: RunState) -> Prepared:
    """A copy of the set-up with each layer's mask structure from a search on held-out data, once in a run."""
    path, d = run.folder / structure_mapping.MAPPING_FILE, config.decide

    def find() -> tuple[structure_search.StructureSearchResult, float]:
        return structure_search.search_mapping(
            prepared.method,
            prepared.network,
            model,
            data,
            d.density,
            d.skip,
            pretrain=d.proxy == "trained",
            lr=config.train.lr,
            seed=config.run.seed,
        )

    def search_or_read() -> dict[str, str]:
        if config.run.resume and path.exists():
            return structure_mapping.read_mapping(path)
        search_result, limit_ms = run.timed("schemes", find)
        record = structure_mapping.mapping_record(prepared.network, search_result.mapping, d.density, SEARCH)
        scores = {
            "reward": search_result.reward,
            "proxy_accuracy": search_result.accuracy,
            "judged": search_result.judged,
        }
        structure_mapping.save_mapping(path, {**record, "limit_ms": limit_ms, **scores})
        return dict(search_result.mapping)

    return prepared.with_structures(distributed.run_on_first(search_or_read))


def copy_with_state(net: CompressedModel, fresh: CompressedModel) -> CompressedModel:
    """A freshly attached network in the state of `net`, which was attached the same way."""
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        for draw in fresh.draws:
            draw.resample()
    return fresh


@torch.no_grad()
def with_trained_weights(model: nn.Module, tuned: CompressedModel) -> nn.Module:
    """A copy of the float model with the weights of a discretized and fine-tuned network, masked ones included."""
    model = copy.deepcopy(model)
    state, tuned_state = model.state_dict(), tuned.model.state_dict()
    for name, tensor in state.items():
        if name in tuned_state and tuned_state[name].shape == tensor.shape:
            tensor.copy_(tuned_state[name])
    for layer in tuned.network.layers:
        owner, _, name = layer.weight.rpartition(".")
        state[layer.weight].copy_(original(tuned.model.get_submodule(owner), name))
    return model


def resumed_weights(weights: nn.Module, run: RunState) -> nn.Module:
    """The weights that a budget begins with: the current ones, or those of an interrupted budget's checkpoint."""
    if run.saved and (run.is_within("search") or run.is_within("fine-tune")) and "first" in run.saved:
        weights = copy.deepcopy(weights)
        tensors.restore(weights, run.saved["first"], run.top / checkpoint.NAME)
    return weights
