"""METHODS: the table of named methods, each a row that combines a gate, a kind of width, sites and a procedure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jpq.config import MANUAL, MASKED
from jpq.methods.gates import (
    VIB,
    Admm,
    Annealed,
    DeadZone,
    Feedback,
    FixedMask,
    Gate,
    GumbelTopK,
    HardConcrete,
    Lasso,
    Latent,
    LearnedTopK,
    Polarized,
    Ranked,
    Reweighted,
    SoftThreshold,
    Stochastic,
)
from jpq.methods.quantizers import BitWidth, Fixed, Gated, Learned, PowerOfTwo, SigmoidWidth

ProcedureName = Literal["search", "one-shot", "two-stage", "manual", "measured"]


@dataclass(frozen=True)
class Method:
    """A named method: its gate, widths, sites and procedure, and advice on when to choose it."""

    decides: str  # the decisions that it takes, in a few words
    gate: type[Gate] | None  # gate of each site; None: nothing is pruned
    width: type[BitWidth]
    procedure: ProcedureName  # when and how its decisions are taken (`jpq.allocation.procedures.PROCEDURES`)
    choose: str  # advice: when to choose it
    paper: str
    sites: str = "coupled"  # channels that are kept or removed together; "per-consumer": each consumer has its own
    structure: str = "channels"  # whole channels, or the name of a mask inside each layer
    score: str = ""  # ranking of its channels, a name in jpq.methods.scores.SCORES; "": channels are learned
    schedule: str = ""  # times at which channels close in the search, a name in jpq.methods.schedules.SCHEDULES


METHODS: Mapping[str, Method] = {
    "djpq": Method(
        "channels (VIB gates) and any whole bit-width per tensor, in one loss",
        VIB,
        Learned,
        "search",
        "the default: steady at every budget, and whole channels go; for hardware of any width (FPGA, custom NPU)",
        "Wang et al., Differentiable Joint Pruning and Quantization, ECCV 2020, arXiv:2007.10463",
    ),
    "djpq-pow2": Method(
        "channels (VIB gates) and 2, 4 or 8 bits per tensor, in one loss",
        VIB,
        PowerOfTwo,
        "search",
        "hardware with power-of-two widths only (most NPUs and CPUs)",
        "the restricted DJPQ of arXiv:2007.10463",
    ),
    "l0": Method(
        "channels (hard concrete gates) and any whole bit-width per tensor, in one loss",
        HardConcrete,
        Learned,
        "search",
        "a stochastic alternative to VIB: channels are really absent in part of the training steps",
        "Louizos et al., Learning Sparse Neural Networks through L0 Regularization, ICLR 2018, arXiv:1712.01312",
    ),
    "gdp": Method(
        "channels (polarized gates, smoothed L0) and any whole bit-width per tensor, in one loss",
        Polarized,
        Learned,
        "search",
        "when discretization must cost nothing: gates polarise to exact zeros while training",
        "Guo et al., GDP: Gates with Differentiable Polarization, ICCV 2021, arXiv:2109.02220",
    ),
    "dais": Method(
        "channels (annealed indicators, learned on the other half of the data) and any whole bit-width per tensor",
        Annealed,
        Learned,
        "search",
        "decisions that must not follow the noise of the batches that train the weights",
        "Guan et al., DAIS: Differentiable Annealing Indicator Search, IEEE TNNLS 2023, arXiv:2011.02166",
    ),
    "dpp": Method(
        "exactly k of n weights of each neuron (Gumbel top-k), and any whole bit-width per tensor",
        GumbelTopK,
        Learned,
        "search",
        "hardware that wants the same number of weights in every neuron, kernel row or tile",
        "Gonzalez-Carabarin et al., Dynamic Probabilistic Pruning, IEEE TNNLS, arXiv:2105.12686",
        structure="per-output",
    ),
    "pdp": Method(
        "single weights by a soft threshold on the weights themselves, and any whole bit-width per tensor",
        SoftThreshold,
        Learned,
        "search",
        "unstructured sparsity without any parameter beside the weights",
        "Cho et al., PDP: Parameter-free Differentiable Pruning is All You Need, NeurIPS 2023, arXiv:2305.11203",
        structure="elementwise",
    ),
    "pdp-2:4": Method(
        "2 of 4 consecutive weights by the same soft threshold, and any whole bit-width per tensor",
        SoftThreshold,
        Learned,
        "search",
        "sparse tensor cores and every other 2:4 kernel",
        "Cho et al., PDP, NeurIPS 2023, arXiv:2305.11203",
        structure="2:4",
    ),
    "smart": Method(
        "blocks of weights by scores of their own and one differentiable top-k, and any whole bit-width per tensor",
        LearnedTopK,
        Learned,
        "search",
        "block-sparse kernels: one ranking decides over all layers how much each may keep",
        "Ding et al., SMART Pruner, arXiv:2403.19969",
        structure="block:8x4",
    ),
    "dpf": Method(
        "single weights by magnitude, re-decided every 16 steps, and any whole bit-width per tensor",
        Feedback,
        Learned,
        "search",
        "unstructured sparsity by plain magnitude: dropped weights keep learning and may return",
        "Lin et al., Dynamic Model Pruning with Feedback, ICLR 2020, arXiv:2006.07253",
        structure="elementwise",
    ),
    "admm": Method(
        "kernel patterns (4 of 9 weights) by alternating projection, and any whole bit-width per tensor",
        Admm,
        Learned,
        "search",
        "pattern kernels on mobile CPUs, in long trainings: a short one leaves the weights far from the patterns",
        "Zhang et al., ECCV 2018, arXiv:1804.03294; Gong et al., GLSVLSI 2020, arXiv:2003.06513",
        structure="pattern",
    ),
    "bayesian-bits": Method(
        "channels (hard concrete gates) and 2, 4 or 8 bits per tensor (a gate for each doubling), in one loss",
        HardConcrete,
        Gated,
        "search",
        "power-of-two hardware, in long trainings: some steps feel the coarser grid before a width is given up",
        "van Baalen et al., Bayesian Bits, NeurIPS 2020, arXiv:2005.07093",
    ),
    "codeq": Method(
        "single weights by a learned dead zone inside the quantizer, and any whole bit-width per tensor",
        DeadZone,
        SigmoidWidth,
        "search",
        "unstructured sparsity whose share per layer is learned with the bits; no density to choose",
        "Wenshoj et al., CoDeQ: Joint Model Compression with Dead-Zone Quantizer, 2025, arXiv:2512.12981",
        structure="elementwise",
    ),
    "dhp": Method(
        "channels (latent vectors that generate the weights, made sparse) and any whole bit-width per tensor",
        Latent,
        Learned,
        "search",
        "long searches: neighbouring layers share one latent, so what one layer drops shapes the next one's weights",
        "Li et al., DHP: Differentiable Meta Pruning via HyperNetworks, ECCV 2020, arXiv:2003.13683",
    ),
    "dsp": Method(
        "which input channels each learned group of filters reads, and any whole bit-width per tensor",
        Lasso,
        Learned,
        "search",
        "dense branches instead of sparse kernels, in long trainings: in short ones a single group does as well",
        "Park et al., Dynamic Structure Pruning for Compressing CNNs, AAAI 2023, arXiv:2303.09736",
        structure="kernels",
    ),
    "spp": Method(
        "columns of the weight matrix by probabilities that rise and fall, and any whole bit-width per tensor",
        Stochastic,
        Learned,
        "search",
        "dense matrix products over fewer columns; or whole channels, with --structure channels",
        "Wang et al., Structured Probabilistic Pruning, BMVC 2018, arXiv:1709.06994",
        structure="block:*x1",
    ),
    "scheme-mapping": Method(
        "block-punched kernels and columns of blocks, their size layer by layer, and any whole bit-width per tensor",
        Reweighted,
        Learned,
        "search",
        "block-sparse kernels whose compiler takes another block size in each layer",
        "Gong et al., Automatic Mapping of the Best-Suited DNN Pruning Schemes, ACM TODAES 2022, arXiv:2111.11581",
        structure="rules",
    ),
    "ranked": Method(
        "channels by a score (--score), closed bit by bit (--schedule); any whole bit-width per tensor meanwhile",
        Ranked,
        Learned,
        "search",
        "any score with learned bits; plain magnitude is the cheapest ranking there is",
        "Zhu & Gupta, ICLR workshop 2018, arXiv:1710.01878; Li et al., ICLR 2017, arXiv:1608.08710",
        score="l1",
        schedule="cubic",
    ),
    "taylor": Method(
        "channels by what the loss would change without them, in ten steps; any whole bit-width per tensor meanwhile",
        Ranked,
        Learned,
        "search",
        "one ranking over all layers, when it is not known which layers can spare most",
        "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771",
        score="taylor",
        schedule="iterative",
    ),
    "lookahead": Method(
        "channels by what they weigh in the product with both neighbours, at once; any whole bit-width per tensor",
        Ranked,
        Learned,
        "search",
        "a ranking from the weights alone that sees more than one layer; it needs no data",
        "Park et al., Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning, ICLR 2020, arXiv:2002.04809",
        score="lookahead-forward",
        schedule="one-shot",
    ),
    "catro": Method(
        "channels by the set that separates the classes best, at once; any whole bit-width per tensor",
        Ranked,
        Learned,
        "search",
        "classification, above all where some classes matter more than others (--classes)",
        "Hu et al., CATRO: Channel Pruning via Class-Aware Trace Ratio Optimization, TNNLS 2023, arXiv:2110.10921",
        score="catro",
        schedule="one-shot",
    ),
    "measured": Method(
        "channels by a score (--score) and any whole bit-width per tensor, by a measured table and an exact solver",
        Ranked,
        Fixed,
        "measured",
        "short trainings: decisions are measured and solved before training, so all epochs train the small model",
        "Zandonati et al., FIT, ICLR 2023, arXiv:2210.08502; Peters et al., QBitOpt, ICCV workshop 2023",
        score="l1",
    ),
    "uniform": Method(
        "one width for all weights and one for all activations; nothing is pruned",
        None,
        Fixed,
        "one-shot",
        "the baseline that a joint method must beat, and the simplest thing to deploy",
        "plain quantization-aware training with learned ranges (Esser et al., LSQ, ICLR 2020, arXiv:1902.08153)",
    ),
    "two-stage": Method(
        "channels by a score (--score, --density), then one width for all weights and one for all activations",
        Ranked,
        Fixed,
        "two-stage",
        "the baseline that people use today: prune, fine-tune, quantize, fine-tune",
        "magnitude pruning (Li et al., ICLR 2017, arXiv:1608.08710), then LSQ (Esser et al., ICLR 2020)",
        score="l1",
    ),
    "upscale": Method(
        "channels for each reader on its own, by a score (--score); bits are the largest of --w-bits and --a-bits",
        Ranked,
        Fixed,
        "one-shot",
        "one-shot pruning that no coupling holds back, at given bits; readers select their channels at run time",
        "Wan et al., UPSCALE: Unconstrained Channel Pruning, ICML 2023, arXiv:2307.08771",
        "per-consumer",
        score="l1",
    ),
}

MASKED_ROW = Method(
    "any whole bit-width per tensor; the mask is given (--mask) and held",
    FixedMask,
    Learned,
    "search",
    "the client's half of pruning without her data: jpq prune-private made the mask",
    "Gong et al., GLSVLSI 2020, arXiv:2003.06513",
    structure="pattern",
)

MANUAL_ROW = Method(
    "nothing: --bits and --densities say it",
    Ranked,
    Fixed,
    "manual",
    "decisions that a study, or a person, took elsewhere",
    "magnitude pruning (Li et al., ICLR 2017, arXiv:1608.08710) and LSQ (Esser et al., ICLR 2020, arXiv:1902.08153)",
    score="l1",
)


def method_row(name: str) -> Method:
    """Row of the method that a plan names: of METHODS, of a given mask, or of decisions by hand."""
    return {MASKED: MASKED_ROW, MANUAL: MANUAL_ROW}.get(name) or METHODS[name]
