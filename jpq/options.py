"""Every setting of a run, by section, with what its flag says: plain frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """What is made smaller, and the data that say how good it is."""

    model: str = "convnet"
    """convnet, lenet5, vgg7, resnet8/20/32/44/56, torchvision:NAME, or module:callable (runs your code)."""
    weights: Path | None = None
    """Trained weights (.pth, .th, .safetensors). Without them a float model is trained first, in this run."""
    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, folder:PATH, or module:callable (runs your code)."""
    data_root: Path = Path("data")
    """Where data sets lie, or are downloaded to."""
    held_out: float = 0.1
    """Share of the training data that steers the search; the test split is read once, at the end."""
    limit: int | None = None
    """Use only this many training samples (for a quick try)."""


MASKED = "masked"  # the method where a mask is given
BY_HAND = "by-hand"  # the method where --bits or --densities say the decisions
BOPS = ("bops", "bops-structured")  # names in jpq.costs.COSTS that --cost may have


@dataclass(frozen=True)
class Budget:
    """What the small model may cost. At least one target; all of them hold together."""

    target_bops: str | None = None
    """Bit-operations: "1%" of the fp32 model, or "12M", "1.2G". Every target may list values that one run follows down,
    such as 4%,2%,1%,0.5%: each becomes a run folder of its own; targets with one value hold for all."""
    cost: str = "bops"
    """How bit-operations are counted. bops: weights that a mask drops cost nothing. bops-structured: they cost what
    others do where they lie anywhere in a layer (--structure elementwise), since no common device skips those."""
    target_macs: str | None = None
    """Multiply-accumulates: "50%" or "12M"."""
    target_size: str | None = None
    """Weights on disk: "5%" of the fp32 model, or "50KB"."""
    target_latency: str | None = None
    """Time for one sample as --latency-table predicts it: "3ms", "250us", or "50%" of the fp32 model."""
    latency_table: Path | None = None
    """Measured layers of this model, from jpq bench --table FILE. Without a target the prediction is only reported."""


TARGETS = ("target_bops", "target_macs", "target_size", "target_latency")
PROXIES = ("projected", "trained")


@dataclass(frozen=True)
class Decide:
    """How keep-or-drop and bit-widths are decided."""

    method: str = "djpq"
    """What prunes, such as djpq, l0, dpf, pdp-2:4, uniform, two-stage or upscale: see `jpq methods`. Every method also
    takes another --structure and --width, where they go together."""
    score: str = ""
    """What ranks channels, for ranked, taylor, lookahead, catro, two-stage and upscale: l1, l2, fpgm, lamp, hrank,
    taylor, taylor-full, taylor2, lookahead, lookahead-forward, lookahead-backward, lfp, lbp, catro, bn-scale or random.
    Default: the method's."""
    schedule: str = ""
    """When ranked channels close during the search: one-shot (at its start), iterative (ten steps) or cubic. Default:
    the method's."""
    classes: str = ""
    """For --score catro: only these classes (such as 0,3,5) need to be told apart when channels are ranked. Training,
    and every accuracy that is reported, is still on all classes."""
    allocator: str = ""
    """How much stays where, for upscale and two-stage. uniform: the same share of every layer, the same bits.
    threshold: one ranking of all channels, bits by noise. greedy: by gain per MAC, bits by noise. reinforce: a learned
    distribution over layers. sampled: an Optuna search. The last two try plans on held-out images. Default: threshold
    for scores that may be compared between layers, else uniform, with the same bits everywhere."""
    w_bits: tuple[int, int] = (2, 8)
    """Smallest and largest bit-width of weights."""
    a_bits: tuple[int, int] = (2, 8)
    """Smallest and largest bit-width of activations."""
    image_bits: int = 8
    """Bit-width of the model's input, which is not learned."""
    output_bits: int = 0
    """Width of convolutions' results before sums and poolings, so that integer kernels compute them: rounding that is
    part of the model that trains (8 is a good choice). 0: those results stay in floating point."""
    channel_multiple: int | None = None
    """Keep channels in multiples of so many (8 or 16): integer kernels of CPUs and NPUs work on that many at once, and
    57 channels can take longer than 64. Layers that have fewer, or another number, may also keep all of theirs."""
    structure: str = ""
    """Where zeros may lie: channels, elementwise, per-output, kernels, 2:4, block:8x4, pattern ... rules gives each
    layer what suits it, search learns that on held-out data, and conv1=pattern,fc=block:8x1 says it. Default: the
    method's."""
    proxy: str = "projected"
    """How --structure search judges a mapping: projected (zeroed at once), or trained (then also trained for an epoch
    of a tenth of the data: twice the time on the digits, and a somewhat better guess; studies/schemes.py)."""
    width: str = ""
    """How bits are chosen: learned, power-of-two, gated, squashed, or fixed (the largest of --w-bits and --a-bits, so
    that only pruning can reach the target). Default: the method's."""
    density: float = 0.5
    """Share of the weights that stay, for methods that are told how many (dpp, pdp, smart, dpf, dsp, spp, admm); N:M
    and patterns say it themselves. Share of the MACs that stays, for ranked, taylor, lookahead and catro when the
    search ends, for two-stage before bits are chosen (what the bits leave of the budget then opens more channels)."""
    bits: str | None = None
    """Weight and activation bits by hand, in place of a search: "4/4,conv1=8/8,layer1=4/3" (a layer, or all whose names
    begin so; 4/4 for the rest). No target is needed then; one that is given must hold."""
    densities: str | None = None
    """Share of the channels that stay by hand, the best by --score: "0.75,layer1=0.5" (sites of jpq inspect)."""
    skip: tuple[str, ...] = ()
    """Layers whose channels or weights are not pruned."""
    mask: Path | None = None
    """A mask to hold while weights and bits learn, in place of a method: the folder of `jpq prune-private` (training
    begins with the weights in it; --weights names the dense model), or the file of a mask alone (mask.json, a run's
    plan.json)."""
    open_norms: bool = False
    """Also prune channels inside the averages of LayerNorm, RMSNorm and GroupNorm. NOT exact: fine-tuning, then of the
    rebuilt model, must repair what their absence does to the rest."""
    gate_lr: float = 0.05
    """Learning rate of the gates (Adam)."""
    bit_lr: float = 0.02
    """Learning rate of the bit-widths (Adam)."""
    gate_weight: float = 0.03
    """Weight of the gates' own regulariser (nats, mean over units), times the budget's pressure."""


@dataclass(frozen=True)
class Train:
    """The training loop."""

    epochs: int = 40
    """Epochs of search and fine-tuning together. Several budgets share the search; the last is fine-tuned for the rest,
    as if it were alone, and each before it adds --tune-epochs."""
    search: float = 0.5
    """Share of the epochs that search; the rest fine-tunes the landed model."""
    tune_epochs: int | None = None
    """Epochs that fine-tune each of several budgets but the last. Default: a quarter of the last one's."""
    float_epochs: int = 40
    """Epochs that train the float model when no weights are given."""
    batch_size: int = 64
    """Samples per step."""
    lr: float = 2e-3
    """Peak learning rate of the weights (Adam, cosine)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of the weights."""
    distill: float = 1.0
    """Weight of distillation from the float model; 0 turns it off."""
    temperature: float = 2.0
    """Temperature of the distillation."""
    augment: bool = True
    """Random shifts, crops and flips, as is usual for the data set."""


@dataclass(frozen=True)
class Run:
    """Where and how this run works. None of these changes what it computes, except the seed and the device."""

    seed: int = 0
    """Seeds the weights, the order of the data and every draw."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int = 0
    """CPU threads; 0: one for small nets, torch's choice for larger ones."""
    out: Path = Path("runs")
    """Folder for runs; this one goes to OUT/<hash of its settings>."""
    formats: str = "onnx"
    """What to export: onnx (always), qonnx (for FPGA flows), pt2 (torch.export), such as onnx,pt2."""
    onnx_weights: str = "int8"
    """Type of the weights in model.onnx: int8, or where they fit int4 or int2 (not in OpenVINO) for a smaller file."""
    resume: bool = False
    """Go on from the last checkpoint of the same settings."""
    tensorboard: bool = False
    """Also write the history as TensorBoard events into the run's folder (pip install "jpq[tensorboard]")."""
    checkpoint_every: int = 0
    """Save after so many optimiser steps too; 0: after every epoch only. Ctrl-C and SIGTERM always save."""
