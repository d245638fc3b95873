"""README and docs: their code blocks run as they stand, each on its own; flags, links and dotted names exist.

The blocks of README.md run with the fast tests, those of docs with the slow ones. Blocks of docs/examples find real
data in `data/`, as a reader has them, and train for fewer epochs here.
"""

import dataclasses
import gzip
import importlib
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import jpq
from jpq.cli.main import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHARED = ROOT.parent / "shared" / "data"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.M | re.S)
DEMO = "jpq optimize --target-bops 1% --target-macs 20% --channel-multiple 8"
EXTRAS = {
    "lightning",
    "transformers",
    "accelerate",
    "timm",
    "segmentation_models_pytorch",
    "ultralytics",
}  # blocks that need them skip
EXAMPLES = {  # what docs/examples say, and what is run here, to take seconds
    r"--epochs \d+": "--epochs 2",
    r"--float-epochs \d+": "--float-epochs 1",
    r"--limit \d{3,}": "--limit 40",
    r"images=20_000": "images=500",
    r"400, 0\)": "24, 0)",  # images of training, to be drawn
    r"100, 2\)": "8, 2)",  # of the test part
}
SHORTER = {  # appended, to take seconds
    DEMO: ["--epochs", "2", "--float-epochs", "2"],
    "jpq bench runs/latest --threads 1": ["--repeats", "3"],
    "jpq bench runs/latest --run-code --threads 1": ["--repeats", "3"],
}


def blocks():
    """A parameter set for every block that is run: language and code; `console` and `text` blocks are not run."""
    for path in DOCUMENTS:
        name = path.relative_to(ROOT).as_posix()
        for i, (language, code) in enumerate(BLOCK.findall(path.read_text())):
            marks = () if path.parent == ROOT else pytest.mark.slow
            code = shortened(code) if path.parent.name == "examples" else code
            yield pytest.param(language, code, id=f"{name}-{i}-{language}", marks=marks)


def shortened(code):
    """A block of docs/examples with fewer samples and epochs."""
    for said, run in EXAMPLES.items():
        code = re.sub(rf"(?<![\w-]){said}", run, code)
    return code


@pytest.fixture
def tables_restored(tmp_path):
    """Put back what a block adds to the tables of jpq (METHODS, GATES, TASKS ...); forget modules of its folder."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "jpq"]
    tables = [v for module in modules for name, v in vars(module).items() if name.isupper() and type(v) is dict]
    copies, path = [dict(table) for table in tables], list(sys.path)
    yield
    for table, copy in zip(tables, copies, strict=True):
        table.clear()
        table.update(copy)
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.usefixtures("tables_restored")
@pytest.mark.parametrize(("language", "code"), blocks())
def test_block_runs_on_its_own(language, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if re.search(r"\bdata/|\bdata-root data\b", code):
        link_data(tmp_path / "data")
    check_runs(language, code, tmp_path)


def link_data(folder):
    """Make a folder with the real data sets, in which torchvision may unpack its own; skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data with the real data sets is absent")
    packed = folder / "FashionMNIST" / "raw"
    packed.mkdir(parents=True)
    for archive in (SHARED / "FashionMNIST" / "raw").glob("*.gz"):
        write_first(archive, packed / archive.stem, 600)
    for name in ("camvid", "sst2", "weights"):
        (folder / name).symlink_to(SHARED / name)
    for name in ("train400", "set12"):  # 20 images, of which a corner will do here
        cut = folder / "denoise" / name
        cut.mkdir(parents=True)
        for file in sorted((SHARED / "denoise" / name).glob("*.png"))[:20]:
            Image.open(file).crop((0, 0, 60, 60)).save(cut / file.name)


def write_first(archive, file, count):
    """Write the first samples of a packed file of images or labels, in the format of MNIST: sizes, then bytes."""
    packed = gzip.decompress(archive.read_bytes())
    start = 4 + 4 * packed[3]
    sizes = [int.from_bytes(packed[i : i + 4], "big") for i in range(8, start, 4)]
    file.write_bytes(
        packed[:4] + count.to_bytes(4, "big") + packed[8:start] + packed[start:][: count * math.prod(sizes)]
    )


def check_runs(language, code, folder):
    """Run a block in an empty folder; what it raises, or a command that fails in it, fails the test."""
    for package in set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) & EXTRAS:
        pytest.importorskip(package, reason=f"the block needs the extra with {package}")
    if language == "python":
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})
    else:
        run_shell(code, folder)


def run_shell(code, folder):
    """Run a shell block: `jpq` and `python -c` in this process, everything else, and all expansion, by bash."""
    assignments = ""
    for statement in statements(code):
        if re.match(r"[A-Z_]+=", statement):
            assignments += statement + "\n"
        elif statement.startswith(("jpq ", "python -c ")):
            command, *args = expand(assignments, statement, folder)
            if command == "python":
                exec(args[1], {"__name__": "__main__"})
            else:
                assert main([*args, *SHORTER.get(statement.strip(), [])]) == 0, statement
        else:
            subprocess.run(["bash", "-ec", assignments + statement], check=True, cwd=folder)


def statements(code):
    """The statements of a shell block: here documents in one piece, lines that end in a backslash joined."""
    code = code.replace("\\\n", " ")
    while code.strip():
        match = re.match(r"\s*([^\n]*<<'(\w+)'\n.*?^\2\n)", code, re.M | re.S) or re.match(r"\s*([^\n]+)\n?", code)
        yield match[1]
        code = code[match.end() :]


def expand(assignments, statement, folder):
    """The words of a command, after bash has set variables, expanded globs and dropped comments."""
    script = f"{assignments}show() {{ printf '%s\\0' \"$@\"; }}\nshow {statement}"
    done = subprocess.run(["bash", "-ec", script], check=True, cwd=folder, capture_output=True, text=True)
    return done.stdout.split("\0")[:-1]


def figures_of(pattern, text):
    """The one match of a pattern, its groups as numbers."""
    (found,) = re.findall(pattern, text)
    return [float(number) for number in found]


def test_the_demo_keeps_its_promises():
    """What README printed prunes, meets both targets, and beats plain int8 by as much as it says."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert DEMO in text
    kept, every = figures_of(r"total +(\d+)/(\d+)", text)
    assert kept < every, "channels go"
    bops, macs = figures_of(r"BOPs +\d+ M +\S+ M +(\S+) % of fp32.*\n│ MACs +904 K +(\d+) K", text)
    assert bops <= 1
    assert macs <= 0.2 * 904
    rows = dict(re.findall(r"^  (fp32, pruned|fp32|int8|compressed) {2,}(\S+) ms", text, re.M))
    sizes = dict(re.findall(r"^  (fp32, pruned|fp32|int8|compressed) {2,}.* (\S+) KB$", text, re.M))
    assert len(rows) == len(sizes) == 4
    assert float(rows["compressed"]) < 0.5 * float(rows["int8"]), "half the time"
    assert float(sizes["compressed"]) < 64.5 / 3 + 0.1, "a third of the bytes"


@pytest.mark.slow
def test_the_demo_prunes_is_faster_than_int8_and_smaller(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(DEMO.split()[1:]) == 0
    assert main(["bench", "runs/latest", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    kept, every = figures_of(r"total +(\d+)/(\d+)", out)
    assert kept <= 0.8 * every
    (accuracy,) = re.findall(r"accuracy +\S+ % +(\S+) %", out)
    assert float(accuracy) >= 97.0
    times = {name: float(ms) for name, ms in re.findall(r"^  (int8|compressed) +(\S+) ms", out, re.M)}
    sizes = {name: float(size) for name, size in re.findall(r"^  (int8|compressed) .* (\S+) KB *$", out, re.M)}
    assert times["compressed"] < 0.75 * times["int8"]
    assert sizes["compressed"] < 0.4 * sizes["int8"]


def test_there_are_blocks_of_both_kinds():
    languages = [parameters.values[0] for parameters in blocks()]
    assert languages.count("python") >= 15
    assert languages.count("sh") >= 8


def test_examples_are_shortened_where_they_are_long():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "examples").glob("*.md"))
    assert all(re.search(said, text) for said in EXAMPLES)


def test_flags_exist():
    from jpq.cli.bench import Bench
    from jpq.cli.evaluate import Evaluate
    from jpq.cli.export import Export
    from jpq.cli.list import ListFlags
    from jpq.cli.pareto import Pareto
    from jpq.cli.parse_errors import ALIASES
    from jpq.cli.sensitivity import Sensitivity
    from jpq.config import Config
    from jpq.data_free import DataFreeSettings
    from jpq.trials import Study

    parts = [*vars(Config()).values(), DataFreeSettings, Pareto, Export, Study, Bench, Evaluate, ListFlags, Sensitivity]
    fields = [f for part in parts for f in dataclasses.fields(part)]
    known = {f"--{f.name.replace('_', '-')}" for f in fields}
    known |= {f"--no-{f.name.replace('_', '-')}" for f in fields if f.type == "bool"}
    known |= {"--config", "--help", "--input-shape", "--all", "--table", "--index-url", "--extra-index-url"}
    known |= {f"--{name}" for name in ALIASES.values()}
    foreign = (
        r"`?python studies/[^`\n]*|torchrun .* -m(?= jpq)|optuna-dashboard .*|sbatch .* \"(?=jpq)|kubectl .* --(?= jpq)"
        r"|^\s*(?:ruff|git|pytest|mypy|python -m (?:pip|pytest)) .*$"
    )
    for path in DOCUMENTS:
        text = re.sub(foreign, "", path.read_text(), flags=re.M)  # commands with flags of their own
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        assert used <= known, (path.name, used - known)


def anchor(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_and_paths_resolve():
    for path in [*DOCUMENTS, ROOT / "studies" / "README.md"]:
        text = path.read_text()
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, fragment = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            assert place.exists(), (path.name, target)
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.M) if fragment else []
            assert not fragment or fragment in map(anchor, headings), (path.name, target)
        if path.parent.name == "studies":
            continue  # its paths: tests/test_studies.py
        for name in re.findall(r"\b((?:studies|tests|jpq|docs)/[\w./]+\.(?:py|csv|png|md))", text):
            assert (ROOT / name).exists(), (path.name, name)


def resolves(dotted):
    """Whether a dotted name leads to a module, an attribute, or a field of a dataclass."""
    names = dotted.split(".")
    thing = importlib.import_module(names[0])
    for i, name in enumerate(names[1:], 1):
        fields = getattr(thing, "__dataclass_fields__", {})
        if hasattr(thing, name):
            thing = getattr(thing, name)
        elif name in fields:
            return i == len(names) - 1
        else:
            try:
                thing = importlib.import_module(".".join(names[: i + 1]))
            except ImportError:
                return False
            except jpq.JpqError:  # a module of jpq.integrations whose extra is missing
                return importlib.util.find_spec(dotted) is not None
    return True


def test_dotted_names_resolve():
    wrong = {
        (path.name, name)
        for path in DOCUMENTS
        for name in re.findall(r"(?<![\w./-])jpq(?:\.[A-Za-z_]\w*)+", path.read_text())
        if not resolves(name)
    }
    assert not wrong
