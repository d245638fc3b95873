"""House rules that a machine can hold: imports go down, heavy packages stay where they belong, files stay small."""

import ast
from pathlib import Path

import pytest

import jpq

ROOT = Path(jpq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# each layer may import itself and what stands below it
LAYERS = [
    {
        "cli",
        "__main__",
        "progress",
        "inspection",
        "benching",
        "assessing",
        "private_report",
        "front_table",
        "choosing",
        "study_screen",
        "flags",
    },
    {"__init__"},
    {"finishing"},
    {"trials"},
    {
        "recipe",
        "descent",
        "phases",
        "events",
        "designer",
        "outcome",
        "bench",
        "racing",
        "journal",
        "figures",
        "machine",
    },
    {"front_report"},
    {"joint", "report", "sizes", "mapping", "judging", "picking"},
    {"fronts"},
    {"runs"},
    {"point"},
    {"parts"},
    {
        "train",
        "stages",
        "by_hand",
        "closing",
        "compose",
        "checkpoint",
        "methods",
        "handover",
        "layerwise",
        "detection",
        "diverged",
    },
    {"allocators", "exporters"},
    {"landing"},
    {"models", "data", "sources"},
    {"vision"},
    {"budget"},
    {"network"},
    {
        "structures",
        "gates",
        "quantizers",
        "scores",
        "costs",
        "plan",
        "config",
        "options",
        "settings",
        "private",
        "result",
        "schedule",
        "average_precision",
        "pareto",
    },
    {"ranks", "tensor_files"},
    {"pickles"},
    {"foreign"},
    {"types", "files", "usage", "formats", "interruption"},
]
ONLY = {
    "brevitas": {"quantizers", "exporters", "network/attach.py"},
    "pandas": {"report.py", "fronts.py"},
    "matplotlib": {"report.py", "front_report.py"},
    "rich": {
        "cli.py",
        "progress.py",
        "inspection.py",
        "benching.py",
        "assessing.py",
        "private_report.py",
        "front_table.py",
        "choosing.py",
        "study_screen.py",
    },
    "tyro": {"cli.py", "flags.py"},
    "optuna": {"trials", "allocators/sampled.py"},
    "onnxruntime": {"exporters"},
    "sklearn": {"sources.py", "data.py"},
}


def part(module):
    """The first name below jpq, of "jpq.network.attach" or of a path."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "jpq":
                yield from (f"jpq.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def own(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def height(name):
    for level, layer in enumerate(LAYERS):
        if name in layer:
            return level
    raise AssertionError(f"{name} has no place in the layers")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = own(path)
    top = LAYERS[0] | LAYERS[1]
    for module in imports(path):
        if module.startswith("jpq.") and part(module) != here and here not in top:
            pads = here == "models" and module == "jpq.network.pad"
            assert height(part(module)) >= height(here) or pads, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_stay_where_they_belong(path):
    relative = str(path.relative_to(ROOT))
    for module in imports(path):
        allowed = ONLY.get(module.split(".")[0])
        assert allowed is None or any(relative == a or relative.startswith(f"{a}/") for a in allowed), (
            f"{relative}: {module}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 300


def test_method_files_import_only_their_base_and_types():
    beside = {"gates": ("jpq.structures",)}  # a gate that ranks weights sees how its units lie in them
    for family in ("gates", "quantizers", "scores", "structures"):
        for path in (ROOT / family).glob("*.py"):
            for module in imports(path):
                if module.startswith("jpq."):
                    allowed = (f"jpq.{family}", "jpq.types", *beside.get(family, ()))
                    assert module.startswith(allowed), f"{path.name} imports {module}"
