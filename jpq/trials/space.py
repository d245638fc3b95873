"""Search space of a study: readable names of a trial's parameters, and the config that they describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import Trial

from jpq.config import Config
from jpq.methods.compatibility import is_allowed
from jpq.methods.table import METHODS
from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.trials.settings import STEP, Study, parse_bops_share
from jpq.types import JpqError, unknown

EVERYWHERE = "all layers"  # name of the one group of --per network

UNIFORM = (8, 4, 3, 2)  # bit-widths of the anchors (uniform trials)

RATES = {"lr": "learning rate of weights", "gate_lr": "learning rate of gates", "bit_lr": "learning rate of bits"}

TARGET = "BOPs target (% of fp32)"


def block_of(name: str) -> str:
    """The block that a layer belongs to: `layer1.0` of `layer1.0.conv1`, `features.3` of `features.3.0.block.1.0`.

    The shortest beginning of the name that ends with a number; a layer without one is a block of its own.
    """
    parts = name.split("->")[0].split(".")
    ends = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: ends[0] + 1]) if ends else name


def group_names(names: Iterable[str], per: str) -> dict[str, list[str]]:
    """Names that share a decision: by layer, by block, or all of them."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault({"layer": name, "block": block_of(name)}.get(per, EVERYWHERE), []).append(name)
    return groups


def check_names(study: Study) -> None:
    """Raises JpqError for an unknown method or structure to choose from; incompatible ones fail as trials."""
    for name in study.choices("methods") if "method" in study.varied_names() else ():
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    check_structure = is_allowed(next(method for method in METHODS.values() if method.gate is not None))
    for name in study.choices("structures") if "structure" in study.varied_names() else ():
        check_structure(name)


@dataclass(frozen=True)
class Space:
    """Decisions that trials of one study may take.

    Args:
        study, config: the settings; trials change what `study.vary` names.
        layers: name of each layer that can be quantized -> whether it reads the image, whose width is given.
        sites: names of the sites whose channels may be dropped.
    """

    study: Study
    config: Config
    layers: Mapping[str, bool]
    sites: Sequence[str]

    @classmethod
    def of(cls, study: Study, config: Config, network: Network, sites: Sequence[Site]) -> Space:
        """The search space over a network. Raises JpqError where there is nothing to vary."""
        layers = {x.name: x.reads_input for x in network.layers if not x.float_reason}
        space = cls(study, config, layers, [site.name for site in sites])
        if study.is_manual() and study.varied_names() == ("density",) and not sites:
            raise JpqError("No channel of this model can be dropped (see jpq inspect): vary bits instead of density.")
        return space

    def suggest(self, trial: Trial) -> Config:
        """The config that a trial's parameters describe."""
        config = self._decide_manually(trial) if self.study.is_manual() else self._decide_for_method(trial)
        if "lr" in self.study.varied_names():
            config = self._scale_rates(trial, config)
        return config

    def anchors(self) -> list[dict[str, Any]]:
        """Parameters of the uniform trials that the study begins with."""
        varied, study, d = self.study.varied_names(), self.study, self.config.decide
        if not (study.is_manual() and study.anchors):
            return []
        allowed = [b for b in UNIFORM if all(low <= b <= high for low, high in (d.w_bits, d.a_bits))]
        anchors = []
        for bits in allowed if "bits" in varied else [0]:
            values: dict[str, Any] = {}
            if "bits" in varied:
                for label, names in group_names(self.layers, study.per).items():
                    values |= {name: bits for name in self._bit_names(label, names)}
            if "density" in varied:
                values |= {_density(label): study.density_range[1] for label in group_names(self.sites, study.per)}
            if "lr" in varied:
                values[RATES["lr"]] = self.config.train.lr
            anchors.append(values)
        return anchors

    def smallest_config(self) -> Config:
        """The config of the smallest decisions, in a study of decisions by hand."""
        varied, d = self.study.varied_names(), self.config.decide
        if "bits" in varied:
            d = replace(d, bits=f"{d.w_bits[0]}/{d.a_bits[0]}")
        if "density" in varied:
            d = replace(d, densities=f"{self.study.density_range[0]:.4g}")
        return replace(self.config, decide=d)

    def _bit_names(self, label: str, names: Sequence[str]) -> list[str]:
        """Parameters of a group: bits of its weights, and of its inputs unless they are the image."""
        sides = ["weight", *(["activation"] if any(not self.layers[n] for n in names) else [])]
        return [f"{label} {side} bits" for side in sides]

    def _decide_manually(self, trial: Trial) -> Config:
        study, d = self.study, self.config.decide
        if "bits" in study.varied_names():
            chosen: dict[str, str] = {}
            for label, names in group_names(self.layers, study.per).items():
                bounds = (d.w_bits, d.a_bits)
                got = [trial.suggest_int(n, *b) for n, b in zip(self._bit_names(label, names), bounds, strict=False)]
                w, a = got if len(got) == 2 else (got[0], d.image_bits)
                chosen |= dict.fromkeys(names, f"{w}/{a}")
            d = replace(d, bits=",".join(f"{name}={pair}" for name, pair in chosen.items()))
        if "density" in study.varied_names() and self.sites:
            shares: dict[str, str] = {}
            for label, names in group_names(self.sites, study.per).items():
                share = trial.suggest_float(_density(label), *study.density_range, step=STEP)
                shares |= dict.fromkeys(names, f"{share:.4g}")
            d = replace(d, densities=",".join(f"{name}={share}" for name, share in shares.items()))
        return replace(self.config, decide=d)

    def _decide_for_method(self, trial: Trial) -> Config:
        study, config = self.study, self.config
        varied, d = study.varied_names(), config.decide
        if "method" in varied:
            d = replace(d, method=trial.suggest_categorical("method", study.choices("methods")))
        if "structure" in varied:
            d = replace(d, structure=trial.suggest_categorical("structure", study.choices("structures")))
        gate = METHODS[d.method].gate if d.method in METHODS else None
        if "density" in varied and gate is not None and (gate.takes_density or gate.ranks_units):
            d = replace(d, density=round(trial.suggest_float("density", *study.density_range, step=STEP), 4))
        if "bits" in varied:
            w, a = (
                trial.suggest_int(f"largest {side} bits", *bounds)
                for side, bounds in (("weight", d.w_bits), ("activation", d.a_bits))
            )
            d = replace(d, w_bits=(d.w_bits[0], w), a_bits=(d.a_bits[0], a))
        budget = config.budget
        if "target" in varied:
            low, high = (float(100 * parse_bops_share(text)) for text in study.bops_range)
            percent = trial.suggest_float(TARGET, low, high, log=True)
            budget = replace(budget, target_bops=f"{percent:.4g}%")
        return replace(config, decide=d, budget=budget)

    def _scale_rates(self, trial: Trial, config: Config) -> Config:
        low, high = self.study.lr_range

        def rate(name: str, now: float) -> float:
            return float(f"{trial.suggest_float(RATES[name], low * now, high * now, log=True):.4g}")

        config = replace(config, train=replace(config.train, lr=rate("lr", config.train.lr)))
        if self.study.is_manual():
            return config
        d = config.decide
        return replace(config, decide=replace(d, gate_lr=rate("gate_lr", d.gate_lr), bit_lr=rate("bit_lr", d.bit_lr)))


def _density(label: str) -> str:
    return f"density of {label}"
