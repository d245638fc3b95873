"""`jpq sensitivity`: measure which layer hurts, as a table in CSV, a heat map, and the most sensitive tensors."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.output import Column, name_column, print_line, table
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.results.formatting import format_number
from jpq.types import JpqError

if TYPE_CHECKING:
    from torch import nn

    from jpq.allocation.measured.estimate import CostEstimate
    from jpq.allocation.measured.table import SensitivityTable
    from jpq.results.sensitivity import SensitivityProbe
    from jpq.tasks.data import Data

SHOWN = 8  # most sensitive tensors and sites that are printed


@dataclasses.dataclass(frozen=True)
class Sensitivity(Task):
    """Flags of `jpq sensitivity`: the model and data as for jpq optimize, and how the table is measured."""

    out: Path = Path("sensitivity.csv")
    """Where the table goes, for jpq optimize --sensitivity; the heat map lies beside it (.png)."""
    estimator: str = "auto"
    """single: one change at a time. coarse: half of the changes on 128 samples, the other widths interpolated. fisher:
    one backward pass, for the largest models. auto: single where it takes less than ten minutes on this machine, else
    coarse where that takes less than thirty, else fisher."""
    samples: int = 512
    """Training samples that are measured on, mixed in pairs: the model is too sure of those that it was trained on."""
    w_bits: tuple[int, int] = (2, 8)
    """Smallest and largest bit-width of weights."""
    a_bits: tuple[int, int] = (2, 8)
    """Smallest and largest bit-width of activations."""
    batch_size: int = 64
    """Samples of one pass."""
    float_epochs: int = 40
    """Epochs that train the float model when no weights are given; they are kept beside the table."""
    seed: int = 0
    """Seeds the weights, and the order of the data."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int = 0
    """CPU threads; 0: one for small nets, torch's choice for larger ones."""
    resume: bool = False
    """Go on with a measurement that was interrupted: the entries that it found lie beside the table (.csv.part), and so
    do the weights of the float model that it trained."""

    def config(self) -> Config:
        """The settings of a run on the same model and data."""
        task = Task(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Task)})
        train = Train(batch_size=self.batch_size, float_epochs=self.float_epochs)
        decide = Decide(method="measured", w_bits=self.w_bits, a_bits=self.a_bits)
        run = Run(seed=self.seed, device=self.device, threads=self.threads)
        return Config(task, Budget(target_bops="100%"), decide, train, run)


def sensitivity_command(args: list[str], console: Console) -> None:
    """Run `jpq sensitivity`."""
    run_sensitivity(parse_flags(with_help(Sensitivity), "sensitivity", args), console)


def run_sensitivity(flags: Sensitivity, console: Console) -> None:
    """Measure, write, draw and print a table. Raises JpqError for settings, files and tasks that cannot work."""
    check_flags(flags)
    from jpq.allocation.decision_data import calibration_inputs
    from jpq.allocation.measured.estimate import AUTO, check_estimator, check_samples, estimate_cost, pick_estimator
    from jpq.allocation.measured.partial import noted_estimator, partial_path
    from jpq.allocation.measured.table import write_table
    from jpq.results import sensitivity as measuring
    from jpq.training.environment import set_threads

    check_samples(flags.samples)
    check_estimator(flags.estimator)
    data, model = load(flags, console)
    batches = calibration_inputs(data)
    divergence = measuring.task_divergence(data.task)
    set_threads(flags.threads, 10**12)
    probed = measuring.probe_model(
        model, batches, divergence, flags.samples, flags.w_bits, flags.a_bits, data.task.main_output, data.task.name
    )
    set_threads(flags.threads, probed.network.macs * flags.batch_size)
    partial = partial_path(flags.out)
    cost = estimate_cost(probed.probe, flags.w_bits, flags.a_bits)
    noted = noted_estimator(partial) if flags.resume and flags.estimator == AUTO else None
    estimator, why = pick_estimator(noted or flags.estimator, cost)
    print_line(console, escape(f"{estimator}: {why}."))
    print_line(console, escape(measuring.describe_cost(cost, estimator, probed.probe.samples) + "."))
    start = time.perf_counter()
    with Bar(console=console, transient=True) as bar:
        shown = bar.add_task("measuring", total=None)
        found = measuring.measure(
            probed,
            estimator,
            partial,
            flags.resume,
            lambda done, total: bar.update(shown, completed=done, total=total),
        )
    seconds = time.perf_counter() - start
    write_table(flags.out, found, probed.network)
    draw(found, probed, flags, data)
    report(found, probed, flags, cost, seconds, console)


def check_flags(flags: Sensitivity) -> None:
    """Raise JpqError for flags that cannot be, before anything is read."""
    if not flags.out.parent.is_dir():
        raise JpqError(f"--out {flags.out}: there is no folder {flags.out.parent}. Make it first.")
    if flags.out.is_dir() or flags.out.suffix != ".csv":
        raise JpqError(f"--out {flags.out}: give the table's file, such as {flags.out.with_suffix('.csv')}.")
    for name, (low, high) in (("w-bits", flags.w_bits), ("a-bits", flags.a_bits)):
        if not 2 <= low <= high <= 8:
            raise JpqError(f"--{name} {low} {high}: give the smallest and the largest width, between 2 and 8.")


def load(flags: Sensitivity, console: Console) -> tuple[Data, nn.Module]:
    """The data, and the float model that --weights holds.

    Without --weights it is trained here; with --resume, its weights are read where an earlier part has trained them.
    """
    import torch

    from jpq.files.tensors import load_tensors, read_about, save_tensors
    from jpq.results.sensitivity import task_divergence
    from jpq.tasks.load import load_dense_model, read_data
    from jpq.training.environment import pick_device
    from jpq.training.epochs import Phase
    from jpq.training.loop import Objective, Recorder, build_optimizer, fit

    config = flags.config().check()
    device = pick_device(flags.device)
    torch.manual_seed(flags.seed)
    data = read_data(config, device)
    task_divergence(data.task)  # a task without one is refused before the float model is trained
    notes = list(data.notes)
    model = load_dense_model(config, data, device, notes)
    for note in notes:
        print_line(console, f"[yellow]note[/] {escape(note)}")
    kept, about = kept_weights(flags.out), {"settings": float_settings(config), "data": data.checksum}
    if config.task.weights is None and flags.resume and kept.exists():
        if read_about(kept) != about:
            raise JpqError(f"{kept} holds weights of another model, data or setting. Run without --resume.")
        load_tensors(model, kept)
        print_line(console, escape(f"The float model is the one that was trained before: {kept}."))
    elif config.task.weights is None:
        count = flags.float_epochs
        epochs = "1 epoch" if count == 1 else f"{count} epochs"
        print_line(console, escape(f"No --weights: the float model is trained first, for {epochs}."))
        start = time.perf_counter()
        optimizer = build_optimizer(model, config.train.lr, config.train.weight_decay)
        recorder = Recorder(lambda: time.perf_counter() - start)
        fit(model, data, Phase("float", flags.float_epochs), Objective(), optimizer, recorder)
        model.eval()
        save_tensors(model, kept, about)
        print_line(console, escape(f"Its weights: {kept}."))
    return data, model


def float_settings(config: Config) -> str:
    """The hash of all settings that the float model's training depends on."""
    return Config(task=config.task, train=config.train, run=config.run).hash()


def kept_weights(out: Path) -> Path:
    """The file beside a table that holds the float model that was trained for it."""
    return out.with_name(f"{out.stem}.float.safetensors")


def draw(found: SensitivityTable, probed: SensitivityProbe, flags: Sensitivity, data: Data) -> None:
    """Draw the heat map beside the table."""
    from jpq.results.plots import save_picture
    from jpq.results.sensitivity_plot import draw_sensitivity

    title = f"Sensitivity of {flags.model} on {flags.data} ({found.estimator}, {found.samples} samples)"
    layers = [layer.name for layer in probed.network.layers]
    figure = draw_sensitivity(found, layers, title, data.task.divergence_unit)
    save_picture(figure, flags.out.with_suffix(".png"))


def report(
    found: SensitivityTable,
    probed: SensitivityProbe,
    flags: Sensitivity,
    cost: CostEstimate,
    seconds: float,
    console: Console,
) -> None:
    """Print the most sensitive tensors and sites, and where the files are."""
    from jpq.training.environment import record_environment

    console.print(table(*most_sensitive_rows(found, probed), title="most sensitive"))
    device = next(probed.probe.net.parameters()).device
    peak = record_environment(device).get("peak_memory_bytes")
    memory = f", {format_number(peak, 'B')} of memory at most" if peak else ""
    lines = (
        f"{cost.changes} entries in {seconds:.0f} s{memory}.",
        f"{flags.out}: the table; {flags.out.with_suffix('.png')}: the heat map.",
        f"Next: jpq optimize --method measured --sensitivity {flags.out} --target-bops 1% and the same model and data"
        + (f", with --weights {kept_weights(flags.out)}" if flags.weights is None else ""),
    )
    for line in lines:
        print_line(console, escape(line))


def most_sensitive_rows(
    found: SensitivityTable, probed: SensitivityProbe
) -> tuple[list[str | Column], list[tuple[str, ...]]]:
    """Columns and rows of the tensors that the smallest width changes most."""
    macs = {layer.name: layer.macs for layer in probed.network.layers}
    total = max(1, sum(macs.values()))
    rows: list[tuple[str, ...]] = []
    for (layer, side), width, divergence in found.most_sensitive(SHOWN):
        row = found.bits[layer, side]
        four = min((b for b in row if b >= 4), default=max(row))
        rows.append(
            (
                escape(layer),
                "weight" if side == "w" else "input",
                f"{divergence:.3g} at {width} bits",
                f"{row[four]:.3g} at {four} bits",
                f"{100 * macs.get(layer, 0) / total:.1f} %",
            )
        )
    columns: list[str | Column] = [
        name_column("layer"),
        Column("what", align="left"),
        "divergence",
        Column("and", optional=1),
        Column("share of MACs", optional=2),
    ]
    return columns, rows
