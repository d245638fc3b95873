"""The direction of imports, and who may import which third party: read from the source with `ast`."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import jpq

ROOT = Path(jpq.__file__).parent

# a package imports only what stands on a later line, or itself
ORDER = (
    ("cli",),
    ("trials",),
    ("recipe",),
    ("results", "session", "detection", "data_free", "testing", "integrations"),
    ("training",),
    ("allocation", "export"),
    ("compression", "tasks"),
    ("tracing",),
    ("methods",),
    ("config", "plan"),
    ("costs", "files"),
    ("types", "lazy"),
)
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
BESIDE = {
    ("session", "results"),
    ("detection", "results"),
    ("data_free", "results"),
    ("integrations", "session"),
    ("plan", "config"),
}
ANNEXES = {"detection", "data_free"}  # imported by the command line alone
FACES = {"__init__", "__main__"}

THIRD_PARTIES = {
    "brevitas": ("methods/quantizers/brevitas_layers", "methods/quantizers/proxies", "export/onnx/"),
    "scipy": ("allocation/measured/",),
    "optuna": ("trials/", "allocation/allocators"),
    "pandas": ("results/",),
    "matplotlib": ("results/",),
    "rich": ("cli/",),
    "tyro": ("cli/",),
    "onnx": ("export/",),
    "onnxruntime": ("export/",),
    "openvino": ("export/",),
    "lightning": ("integrations/",),
    "accelerate": ("integrations/",),
    "ultralytics": ("integrations/",),
    "transformers": ("integrations/", "tasks/"),
    "timm": ("tasks/",),
    "segmentation_models_pytorch": ("tasks/",),
}


def modules() -> dict[str, ast.Module]:
    """Path without suffix, from the package's root -> syntax tree."""
    files = sorted(ROOT.rglob("*.py"))
    return {path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text("utf-8")) for path in files}


def imports(tree: ast.AST) -> list[str]:
    """Every module that a file imports, anywhere in it; `from a import b` counts as both a and a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def parts(name: str) -> list[str]:
    """`jpq.a.b` -> ["a", "b"]; [] for what is not of this package."""
    head, *rest = name.split(".")
    return rest if head == "jpq" else []


def test_the_root_holds_six_modules_and_the_packages_of_the_plan():
    modules_at_root = {path.stem for path in ROOT.glob("*.py")} - FACES
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert len(modules_at_root) <= 6
    assert modules_at_root | packages == set(FLOOR)


def test_imports_go_down_only():
    wrong = []
    for path, tree in modules().items():
        here = path.split("/")[0]
        if here in FACES:
            continue
        for name in imports(tree):
            there = (parts(name) or [here])[0]
            if there == here or there not in FLOOR:
                continue
            up = FLOOR[there] <= FLOOR[here] and (here, there) not in BESIDE
            if up or (there in ANNEXES and here != "cli"):
                wrong.append(f"{path} imports {name}")
    assert not sorted(set(wrong))


def test_modules_import_each_other_in_no_circle():
    """Also imports for types alone and inside functions count; faces of packages, which only hand names on, do not."""
    trees = {path: tree for path, tree in modules().items() if path.split("/")[-1] not in FACES}
    graph = {path: {"/".join(parts(name)) for name in imports(tree)} & set(trees) for path, tree in trees.items()}
    assert sum(map(len, graph.values())) > len(graph)  # the imports were found
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_members_of_a_family_know_only_their_own_contract():
    beside = {"gates": {"structures"}}  # a gate that ranks weights sees how its units lie in them
    wrong = []
    for path, tree in modules().items():
        if not path.startswith("methods/") or path.count("/") < 2:
            continue
        family = path.split("/")[1]
        for name in imports(tree):
            inner = parts(name)
            if inner[:1] == ["methods"] and len(inner) > 1 and inner[1] not in {family, *beside.get(family, ())}:
                wrong.append(f"{path} imports {name}")
    assert not sorted(set(wrong))


def gate_classes() -> set[str]:
    """Names of the gate contract and of every class that jpq.methods.gates offers."""
    from jpq.methods import gates

    return {name for name in gates.__all__ if name != "GATES"}


def test_no_module_asks_for_the_class_of_a_gate():
    """Gates are asked by the members of their contract, so that a new gate touches its own file and two rows."""
    wrong, classes = [], gate_classes()
    for path, tree in modules().items():
        if path.startswith("methods/gates/"):
            continue
        for node in ast.walk(tree):
            asks = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass")
            compared = isinstance(node, ast.Compare)
            operands = node.args[1:] if asks else [node.left, *node.comparators] if compared else []
            names = {name.id for operand in operands for name in ast.walk(operand) if isinstance(name, ast.Name)}
            if names & classes:
                wrong.append(f"{path}, line {node.lineno}")
    assert not wrong


def test_third_parties_stay_where_they_belong():
    wrong = []
    for path, tree in modules().items():
        for name in imports(tree):
            allowed = THIRD_PARTIES.get(name.split(".")[0])
            if allowed is not None and not path.startswith(allowed):
                wrong.append(f"{path} imports {name}")
    assert not sorted(set(wrong))


def test_public_names_are_not_hidden_by_modules():
    import importlib
    import pkgutil

    for module in pkgutil.walk_packages(jpq.__path__, "jpq."):
        needs_extra = module.name.startswith("jpq.integrations.")
        if not module.name.endswith("__main__") and not needs_extra:
            importlib.import_module(module.name)
    assert all(not hasattr(getattr(jpq, name), "__path__") for name in jpq.__all__)
    for name in jpq.__all__:
        assert not isinstance(getattr(jpq, name), type(ast)), name


def public_names(package: str) -> set[str]:
    """The names that a package offers: its `__all__`, or what its `__init__` binds and imports."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text("utf-8"))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = {t.id for t in node.targets if isinstance(t, ast.Name)}
            names |= set(ast.literal_eval(node.value)) if "__all__" in targets else targets
        elif isinstance(node, ast.AnnAssign | ast.FunctionDef | ast.ClassDef):
            names.add(node.target.id if isinstance(node, ast.AnnAssign) else node.name)  # type: ignore[union-attr]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return {name for name in names if not name.startswith("_")}


def test_public_names_of_packages_resolve_and_hide_no_module():
    import importlib

    for init in sorted(ROOT.glob("*/**/__init__.py")):
        package = init.parent.relative_to(ROOT).as_posix()
        if "_HOMES" not in init.read_text("utf-8"):
            continue
        module = importlib.import_module("jpq." + package.replace("/", "."))
        assert set(module._HOMES) <= set(module.__all__), package
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert not (init.parent / f"{name}.py").exists(), f"jpq.{package}.{name} is a module too"
            assert not (init.parent / name).is_dir(), f"jpq.{package}.{name} is a package too"


PUBLIC_MODULES = {"tasks": {"data", "models", "zoo"}}  # documents read their functions as `models.build`
MODULES_OF_THE_ROOT = {"config", "plan", "recipe", "session", "types"}  # which a reader opens first


def imported_names(tree: ast.AST) -> list[tuple[str, str]]:
    """(module, name) of every import of jpq; the name is "" for `import module`."""
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            pairs += [(node.module or "", alias.name) for alias in node.names]
    return [(module, name) for module, name in pairs if module.split(".")[0] == "jpq"]


def is_public(module: str, name: str) -> bool:
    """Whether a user may import this: from jpq, a module at the root, or what a package's `__init__` offers."""
    place = "/".join(parts(module))
    if place.startswith("integrations/"):
        return True  # each module is an extra's, and is imported by its name
    if place in MODULES_OF_THE_ROOT or module == "jpq":
        return not name or place != "" or name in {*jpq.__all__, *FLOOR}
    is_package = (ROOT / place / "__init__.py").is_file()
    return is_package and (not name or name in public_names(place) | PUBLIC_MODULES.get(place, set()))


def test_studies_import_public_names_only():
    wrong = [
        f"{path.name}: from {module} import {name}"
        for path in sorted((ROOT.parent / "studies").rglob("*.py"))
        for module, name in imported_names(ast.parse(path.read_text("utf-8")))
        if not is_public(module, name)
    ]
    assert not wrong


def test_modules_on_the_path_of_tests_have_a_name_each():
    """One process imports all of them: of two that share a name, the test that runs first decides which one is seen."""
    folders = (ROOT.parent / "tests" / "support", ROOT.parent / "studies")
    names = [path.stem for folder in folders for path in sorted(folder.glob("*.py"))]
    assert len(names) > 40
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
