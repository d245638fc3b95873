"""jpq: prune and quantize a trained network together, in one loss, exactly onto a budget.

`optimize` is the whole job; `compress` is for use inside one's own training loop; the rest are the pieces. Names are
imported when they are first used, so that `jpq --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jpq.config import Budget, Config
    from jpq.exporters.onnx import export as export_onnx
    from jpq.exporters.quantized import rebuild
    from jpq.exporters.verify import measure, verify
    from jpq.fronts import front
    from jpq.joint import Joint, compress
    from jpq.landing import land
    from jpq.methods import METHODS
    from jpq.network.attach import attach
    from jpq.network.compressed import Compressed
    from jpq.network.sites import channels
    from jpq.network.trace import trace
    from jpq.network.unpack import unpacked
    from jpq.outcome import load
    from jpq.plan import Plan
    from jpq.recipe import optimize
    from jpq.train import fit
    from jpq.trials.settings import Study
    from jpq.trials.study import study
    from jpq.types import JpqError

_HOMES = {
    "METHODS": "methods", "Budget": "config", "Compressed": "network.compressed", "Config": "config",
    "Joint": "joint", "JpqError": "types", "Plan": "plan", "attach": "network.attach", "channels": "network.sites",
    "Study": "trials.settings", "compress": "joint", "export_onnx": "exporters.onnx:export", "fit": "train",
    "front": "fronts", "land": "landing", "load": "outcome", "measure": "exporters.verify", "optimize": "recipe",
    "rebuild": "exporters.quantized", "study": "trials.study", "trace": "network.trace", "unpacked": "network.unpack",
    "verify": "exporters.verify",
}  # fmt: skip
_PARTS = ("costs", "data", "gates", "models", "quantizers", "structures")

__all__ = [
    "METHODS", "Budget", "Compressed", "Config", "Joint", "JpqError", "Plan", "Study", "attach", "channels", "compress",
    "export_onnx", "fit", "front", "land", "load", "measure", "optimize", "rebuild", "study", "trace", "unpacked",
    "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"jpq.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'jpq' has no attribute '{name}'")
    home, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(f"jpq.{home}"), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_PARTS])
