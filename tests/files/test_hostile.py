"""Files from others are data: whatever is in them, a reader gives what is right or one sentence, and runs nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from commands import refused
from support import kills
from torch import nn

import jpq
from jpq.allocation import structure_mapping
from jpq.cli.main import main
from jpq.compression import external_mask
from jpq.config import read_toml
from jpq.costs.target import parse_target
from jpq.export.packed.file import load_packed
from jpq.export.runtimes import OpenVinoSession, Session
from jpq.export.timing import layer_table
from jpq.export.timing.runner import Runner
from jpq.files import tensors
from jpq.files.tensors import read_safetensors, read_torch
from jpq.files.untrusted import parse_json, read_text
from jpq.plan import MaskPlan, Plan, from_json
from jpq.results import run_folder
from jpq.results.front.points import read_point
from jpq.tasks import models
from jpq.tracing.network import Network
from jpq.tracing.trace import trace
from jpq.training import checkpoint
from jpq.types import JpqError

Captured = pytest.CaptureFixture[str]
ROOM = 2**29  # bytes that reading a file of some hundred thousand may take, at most
SECONDS = 20  # for one file, on a machine that does other things too
TABLE = (
    "kind,groups,kernel,stride,size,inputs,outputs,bits,ms\nconv,1,3x3,1x1,8x8,1,32,8,0.01\nlinear,1,,,,64,10,8,0.002\n"
)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good file of every kind that jpq reads."""
    out = tmp_path_factory.mktemp("good")
    asked = kills.tiny_config(out)
    with pytest.raises(KeyboardInterrupt):
        jpq.optimize(asked, Stop(), final=False)
    shutil.copy(out / asked.hash() / checkpoint.NAME, out / "kept.pt")
    jpq.optimize(kills.resumed(asked))
    folder = out / asked.hash()
    shutil.copy(out / "kept.pt", folder / checkpoint.NAME)
    torch.manual_seed(0)
    model = net()
    torch.save(model.state_dict(), folder / "weights.pth")
    torch.save(
        {"state_dict": model.state_dict(), "epoch": 3}, folder / "weights.th", _use_new_zipfile_serialization=False
    )
    tensors.save_tensors(model, folder / "weights.safetensors")
    (folder / "table.csv").write_text(TABLE)
    kept = {"0": MaskPlan.of(torch.rand(8, 9) > 0.5), "4": MaskPlan.of(torch.rand(10, 288) > 0.5)}
    plan = Plan("dpf", {}, {}, kept, dict.fromkeys(kept, "per-output"), model={"name": "net"})
    (folder / "mask.json").write_text(plan.to_json())
    (folder / "schemes.json").write_text(json.dumps({"by": "rules", "layers": {"0": {"structure": "2:4", "ms": 0.5}}}))
    return folder


class Stop(kills.NullObserver):
    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        if bops_share == bops_share:  # in the search
            raise KeyboardInterrupt


@cache
def traced_network() -> Network:
    return trace(net(), torch.rand(2, 1, 8, 8))


def loaded(folder: Path) -> None:
    small, _ = jpq.load(folder)
    assert all(t.isfinite().all() for t in small.state_dict().values() if t.is_floating_point())


def weighed(path: Path) -> None:
    model = net()
    models.load_weights(model, path)
    assert all(t.isfinite().all() for t in model.state_dict().values())


READERS: dict[str, Callable[[Path], Any]] = {
    "plan.json": lambda path: loaded(path.parent),
    "model.safetensors": lambda path: loaded(path.parent),
    "config.toml": lambda path: read_toml(path).check(),
    "result.json": lambda path: (run_folder.read_run(path.parent), read_point(path.parent)),
    "layers.csv": lambda path: (run_folder.read_run(path.parent), read_point(path.parent)),
    "history.csv": lambda path: run_folder.read_run(path.parent),
    "model.packed": load_packed,
    "checkpoint.pt": lambda path: checkpoint.load(path.parent),
    "weights.pth": weighed,
    "weights.th": weighed,
    "weights.safetensors": weighed,
    "mask.json": lambda path: external_mask.read(path).sites(traced_network()),
    "table.csv": layer_table.read_table,
    "schemes.json": structure_mapping.read_mapping,
}
BAD: tuple[Any, ...] = (
    -1,
    0,
    1.5,
    True,
    None,
    "",
    "x" * 3000,
    "../../../etc/passwd",
    "\0",
    10**9,
    10**30,
    -(10**300),
    1e308,
    [],
    {},
    [[]],
    {"a": 1},
    "os:system",
    "NaN",
    "\N{SUPERSCRIPT TWO}",
    [10**12] * 3,
    "1e999999999%",
)
TOKENS = (
    b"NaN",
    b"Infinity",
    b"1e999",
    b"-1",
    b"9" * 5000,
    b"true",
    b"null",
    b"[" * 100_000,
    b"{}",
    b"\xff\xfe",
    b"\0",
    b'""',
    b"../../x",
    b"'",
    b'"',
    b",",
    b"\n",
    b"1_000",
    b"0x10",
    b"nan",
    b"-inf",
)


def mutated(data: bytes, draw: random.Random, suffix: str) -> bytes:
    """The file with one to three things wrong."""
    for _ in range(draw.randint(1, 3)):
        at, until = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
        near = min(until, at + draw.choice((1, 8, 64)))
        kind = draw.choice((*CHANGES, "value"))
        if kind == "value" or (kind == "flip" and at == len(data)):
            data = revalued(data, draw, suffix)
        else:
            data = CHANGES[kind](data, at, near, draw)
    return data


def flip(data: bytes, at: int, near: int, draw: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << draw.randint(0, 7)]) + data[at + 1 :]


def early_byte(data: bytes, at: int, near: int, draw: random.Random) -> bytes:
    """One of the first bytes, where headers are."""
    at = draw.randint(0, min(300, len(data)))
    return data[:at] + draw.randbytes(1) + data[at + 1 :]


def cut(data: bytes, at: int, near: int, draw: random.Random) -> bytes:
    return data[:at]


def drop(data: bytes, at: int, near: int, draw: random.Random) -> bytes:
    return data[:at] + data[near:]


def twice(data: bytes, at: int, near: int, draw: random.Random) -> bytes:
    return data[:near] + data[at:near] + data[near:]


def noise(data: bytes, at: int, near: int, draw: random.Random) -> bytes:
    return data[:at] + draw.randbytes(near - at) + data[near:]


def token(data: bytes, at: int, near: int, draw: random.Random) -> bytes:
    return data[:at] + draw.choice(TOKENS) + data[near:]


def length(data: bytes, at: int, near: int, draw: random.Random) -> bytes:
    return data[:at] + struct.pack("<q", draw.choice((2**62, 2**31, -1, 10**9))) + data[at + 8 :]


CHANGES: dict[str, Callable[[bytes, int, int, random.Random], bytes]] = {
    "flip": flip,
    "byte": early_byte,
    "cut": cut,
    "drop": drop,
    "twice": twice,
    "noise": noise,
    "token": token,
    "length": length,
}


def revalued(data: bytes, draw: random.Random, suffix: str) -> bytes:
    """The file with one of its values replaced, where it is text."""
    if suffix == ".json":
        return replanted(data, draw)
    return respelled(data, draw) if suffix in (".csv", ".toml") else data


def replanted(data: bytes, draw: random.Random) -> bytes:
    """JSON with one of its values replaced."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    node = tree
    while isinstance(node, dict | list) and node:
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if draw.random() < 0.3 or not isinstance(node[key], dict | list) or not node[key]:
            node[key] = draw.choice(BAD)
            break
        node = node[key]
    return json.dumps(tree).encode()


def respelled(data: bytes, draw: random.Random) -> bytes:
    """A table or settings with one word or number replaced."""
    words = list(re.finditer(rb"[\w.%-]+", data))
    if not words:
        return data
    word = draw.choice(words)
    return data[: word.start()] + str(draw.choice(BAD)).encode() + data[word.end() :]


@contextmanager
def bounded() -> Iterator[None]:
    """No more room than the process has now, and ROOM."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(name: str, folder: Path, rounds: int, seed: int) -> tuple[int, int]:
    """(good, refused) of so many mutations of one file; whatever else a reader does ends the test."""
    path, draw, good, bad = folder / name, random.Random(f"{name} {seed}"), 0, 0
    whole = path.read_bytes()
    READERS[name](path)
    with bounded():
        for _ in range(rounds):
            data = mutated(whole, draw, path.suffix)
            path.write_bytes(data)
            start = time.perf_counter()
            try:
                READERS[name](path)
                good += 1
            except JpqError as error:
                bad += len(str(error)) < 2000  # a sentence, not the file
            except BaseException:
                Path(os.environ.get("TMPDIR", "/tmp"), f"hostile-{name}").write_bytes(data)  # to be looked at
                raise
            assert time.perf_counter() - start < SECONDS
    path.write_bytes(whole)
    return good, bad


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_give_a_sentence_or_what_is_right(name: str, files: Path) -> None:
    good, bad = read_all(name, files, 25, 0)
    assert bad > 0
    assert good + bad == 25


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_damaged_files(name: str, files: Path) -> None:
    good, bad = read_all(name, files, 300, 1)
    assert bad > 40
    assert good + bad == 300


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def evil_pickles(mark: Path, path: Path) -> Iterator[None]:
    """The same attack in every form that torch.load has had."""
    torch.save({"state_dict": Evil(mark)}, path)
    yield
    torch.save([Evil(mark)], path, _use_new_zipfile_serialization=False)
    yield
    path.write_bytes(pickle.dumps(Evil(mark)))
    yield
    torch.save(net(), path)  # a whole module: not evil, and code all the same
    yield


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".safetensors"])
def test_pickles_that_run_commands_run_nothing(suffix: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / f"w{suffix}"
    words = r"runs nothing|runs no code|header" + (r"|torch\.save wrote" if suffix == ".safetensors" else "")
    for _ in evil_pickles(mark, path):
        with pytest.raises(JpqError, match=words):
            models.load_weights(net(), path)
        shutil.copy(path, tmp_path / checkpoint.NAME)
        with pytest.raises(JpqError, match="Remove it"):
            checkpoint.load(tmp_path)
        assert not mark.exists()


def rezipped(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> None:
    """The archive with its records changed."""
    with zipfile.ZipFile(path) as old:
        records = [change(i.filename, old.read(i)) for i in old.infolist()]
    with zipfile.ZipFile(path, "w", how) as new:
        for name, data in records:
            new.writestr(name, data)


def test_zip_bombs_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(8, dtype=torch.uint8)}, path)
    rezipped(path, lambda n, d: (n, bytes(2**28) if n.endswith("data/0") else d), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with bounded(), pytest.raises(JpqError, match="compressed"):
        read_torch(path)


def declared(numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Callable[[str, bytes], tuple[str, bytes]]:
    """A pickle that says more of its one tensor than there is."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, shape, stride, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(obj, Storage) else None

    out = io.BytesIO()
    Pickler(out, 2).dump({"0.weight": Tensor()})
    return lambda name, data: (name, out.getvalue() if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    ("numel", "shape", "stride"),
    [
        (2**40, (2**40,), (1,)),  # more than the record has: torch would read beyond it
        (72, (2**40,), (0,)),  # few numbers seen many times: whatever looks at them makes room for all
        (72, (72,), (2**20,)),  # far apart
        (72, (2**31, 2**31, 2**31), (0, 0, 0)),
    ],
)
def test_tensors_larger_than_their_file(
    numel: int, shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    torch.save({"0.weight": torch.ones(72)}, path)
    rezipped(path, declared(numel, shape, stride))
    with bounded(), pytest.raises(JpqError, match=r"declares|does not lie within"):
        read_torch(path)


def text_in_pickle(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()


DEEP = pickle.EMPTY_TUPLE + (pickle.BINPUT + b"\1" + pickle.BINGET + b"\1" + pickle.TUPLE2) * 40  # 2^40 leaves
CODECS, ORDERED = b"c_codecs\nencode\n", b"ccollections\nOrderedDict\n"
LATIN = text_in_pickle("latin1") + pickle.TUPLE2 + pickle.REDUCE
STORAGE = (
    pickle.MARK
    + text_in_pickle("storage")
    + b"ctorch\nFloatStorage\n"
    + text_in_pickle("0")
    + text_in_pickle("cpu")
    + b"K\x48"
    + pickle.TUPLE
    + pickle.BINPERSID
)
SLOW = {
    "a dict's key": pickle.EMPTY_DICT + DEEP + pickle.NONE + pickle.SETITEM,
    "several keys": pickle.EMPTY_DICT + pickle.MARK + DEEP + pickle.NONE + pickle.SETITEMS,
    "a dict at once": pickle.MARK + DEEP + pickle.NONE + pickle.DICT,
    "a set": pickle.EMPTY_SET + pickle.MARK + DEEP + pickle.ADDITEMS,
    "a frozen set": pickle.MARK + DEEP + pickle.FROZENSET,
    "a storage's key": STORAGE.replace(text_in_pickle("0"), DEEP),
    "an ordered dict": ORDERED
    + pickle.EMPTY_LIST
    + DEEP
    + pickle.NONE
    + pickle.TUPLE2
    + pickle.APPEND
    + pickle.TUPLE1
    + pickle.REDUCE,
    "a count": b"ccollections\nCounter\n" + pickle.EMPTY_LIST + DEEP + pickle.APPEND + pickle.TUPLE1 + pickle.REDUCE,
    "a state": ORDERED
    + pickle.EMPTY_TUPLE
    + pickle.REDUCE
    + pickle.EMPTY_LIST
    + DEEP
    + pickle.NONE
    + pickle.TUPLE2
    + pickle.APPEND
    + pickle.BUILD,
    "a shape": b"ctorch._utils\n_rebuild_tensor\n"
    + pickle.MARK
    + STORAGE
    + b"K\0"
    + DEEP
    + DEEP
    + pickle.TUPLE
    + pickle.REDUCE,
    "hex": CODECS * 41 + text_in_pickle("a") + LATIN + (text_in_pickle("hex") + pickle.TUPLE2 + pickle.REDUCE) * 40,
    "many copies": pickle.MARK
    + CODECS
    + text_in_pickle("a" * 10**5)
    + pickle.BINPUT
    + b"\1"
    + LATIN
    + (CODECS + pickle.BINGET + b"\1" + LATIN) * 10**4
    + pickle.TUPLE,
    "a storage that says it is larger": STORAGE
    + pickle.EMPTY_DICT
    + text_in_pickle("size")
    + b"J\0\0\0\x7f"
    + pickle.SETITEM
    + pickle.BUILD,
    "a tensor put on another storage": b"ctorch._utils\n_rebuild_tensor\n"
    + pickle.MARK
    + STORAGE
    + b"K\0K\x48"
    + pickle.TUPLE1
    + b"K\1"
    + pickle.TUPLE1
    + pickle.TUPLE
    + pickle.REDUCE
    + pickle.MARK
    + STORAGE
    + b"K\0J\0\0\0\x7f"
    + pickle.TUPLE1
    + b"K\1"
    + pickle.TUPLE1
    + pickle.TUPLE
    + pickle.BUILD,
}


@pytest.mark.parametrize("what", SLOW)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_would_take_ever(what: str, zipped: bool, tmp_path: Path) -> None:
    path, start = tmp_path / "w.pth", time.perf_counter()
    program = pickle.PROTO + b"\2" + SLOW[what] + pickle.STOP
    torch.save({"0.weight": torch.ones(72)}, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        rezipped(path, lambda n, d: (n, program if n.endswith("data.pkl") else d))
    else:
        heads = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in heads) + program + pickle.dumps(["0"], 2) + bytes(296))
    with bounded(), pytest.raises(JpqError, match="is damaged, or no file of tensors"):
        read_torch(path)
    assert time.perf_counter() - start < SECONDS


def test_the_file_that_is_measured_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(8)}, path)
    good = path.read_bytes()
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + good)  # Python sees the archive at its end, torch what is in front
    assert read_torch(path)["a"].shape == (3,)
    path.write_bytes(good + good)  # and of two archives Python takes the second one's directory
    with pytest.raises(JpqError, match="not one archive"):
        read_torch(path)
    for name in ("DATA.PKL", "Data.pkl"):  # torch looks for names without their case
        torch.save({"0.weight": torch.ones(72)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            top = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{top}/{name}", declared(2**14, (2**14,), (1,))("data.pkl", b"")[1])
        with pytest.raises(JpqError, match="not one archive"):
            read_torch(path)


def test_what_torch_refuses_is_said_without_its_advice(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(8)}, path, pickle_protocol=4)
    with pytest.raises(JpqError, match=r"\(Unsupported operand \d+\)\.$"):
        read_torch(path)


def test_what_python_2_wrote_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"0": torch.ones(72)}, path)
    pairs = pickle.EMPTY_LIST + pickle.EMPTY_LIST + b"U\1a" + pickle.APPEND + b"K\7" + pickle.APPEND + pickle.APPEND
    program = pickle.PROTO + b"\2" + ORDERED + pairs + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    rezipped(path, lambda n, d: (n, program if n.endswith("data.pkl") else d))
    assert read_torch(path) == {"a": 7}


def test_what_is_right_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = {"a": torch.rand(3, 4).t(), "b": torch.rand(6)[2:4], "h": torch.rand(2).bfloat16(), "n": torch.tensor(3)}
    for new in (True, False):
        torch.save({"state_dict": state, "epoch": 1, "best": 0.5}, path, _use_new_zipfile_serialization=new)
        found = read_torch(path)["state_dict"]
        assert all(torch.equal(found[k], state[k]) for k in state)
    module = net()
    torch.save({"p": module[0].weight, "o": torch.optim.Adam(module.parameters()).state_dict()}, path)
    assert torch.equal(read_torch(path)["p"], module[0].weight)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99999999999]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"EXE","shape":[2],"data_offsets":[0,8]}}',
        b"[" * 10_000,
    ],
)
def test_headers_that_lie(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for length in (len(header), 2**63, 10**9):
        path.write_bytes(struct.pack("<Q", length) + header + bytes(8))
        with bounded(), pytest.raises(JpqError, match="Cannot read"):
            read_safetensors(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": -Infinity}',
        "[" * 10**6,
        '{"a": ' * 10**5,
        "9" * 5000,
        "",
        "{",
    ],
)
def test_json_that_is_none_of_ours(text: str) -> None:
    with pytest.raises(JpqError, match=r"plan\.json"):
        parse_json(text, "plan.json")


def test_a_key_twice_among_many_is_found_at_once() -> None:
    start = time.perf_counter()
    with pytest.raises(JpqError, match="key 'z' twice"):
        parse_json("{" + ",".join(f'"k{i}":0' for i in range(40_000)) + ',"z":0,"z":1}', "plan.json")
    assert time.perf_counter() - start < 2


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody will ever write to it
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "none", Path("a\0b")):
        with pytest.raises(JpqError, match="Cannot read the file"):
            read_text(path)
        with pytest.raises(JpqError, match="Cannot read the file"):
            read_torch(path)


def test_a_mask_is_measured_before_it_is_unpacked() -> None:
    bomb = MaskPlan.of(torch.ones(2**10, 2**14))
    plan = {
        "format": 1,
        "method": "dpf",
        "layers": {},
        "kept": {},
        "slices": {},
        "model": {},
        "structures": {"a": "2:4"},
    }
    for rows, n in ((2**20, 2**14), (1, 8), (2**40, 2**40), (-1, 5)):
        mask = {"rows": rows, "n": n, "bits": bomb.bits}
        with bounded(), pytest.raises(JpqError, match="not a plan"):
            from_json(json.dumps({**plan, "masks": {"a": mask}}), "plan.json")


def test_masks_are_added_up_before_any_is_unpacked() -> None:
    mask = {"rows": 2**17, "n": 2**14, "bits": MaskPlan.of(torch.ones(1, 8)).bits}  # 2^31 units, as declared
    names = {f"a{i}": mask for i in range(3)}
    plan = {"format": 1, "method": "dpf", "layers": {}, "kept": {}, "slices": {}, "model": {}, "masks": names}
    with pytest.raises(JpqError, match=f"'{3 * 2**31}' where a whole number from 0 to {2**32} belongs"):
        from_json(json.dumps(plan), "plan.json")


def test_amounts_are_short() -> None:
    start = time.perf_counter()
    for text in ("1e999999999%", "9" * 10**6, "1e99999999", "0." + "0" * 10**6 + "1%"):
        with pytest.raises(JpqError, match="not an amount"):
            parse_target("bops", text, 1e9)
    assert time.perf_counter() - start < 5


def with_model(folder: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(folder, out)
    tree = json.loads((out / "plan.json").read_text())
    tree["model"] |= changes
    (out / "plan.json").write_text(json.dumps(tree))
    return out


@pytest.mark.parametrize("changes", [{"classes": 10**7}, {"channels": 10**7}, {"classes": True}, {"name": "../../x"}])
def test_a_plan_cannot_ask_for_a_model_of_any_size(changes: dict[str, Any], files: Path, tmp_path: Path) -> None:
    with bounded(), pytest.raises(JpqError):
        jpq.load(with_model(files, tmp_path / "run", **changes))


def test_files_cannot_name_code_to_run(
    files: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"evil_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text("open('ran', 'w')\ndef make(**_): raise KeyError('it ran')\n")
    run = with_model(files, tmp_path / "run", name=f"{name}:make")
    with pytest.raises(JpqError, match="run_code=True"):
        jpq.load(run)
    assert "--run-code" in refused(["evaluate", "run"], capsys)
    config = (run / "config.toml").read_text()
    for what, old in (("model", "convnet"), ("data", "digits")):
        (run / "config.toml").write_text(config.replace(f'{what} = "{old}"', f'{what} = "{name}:make"'))
        assert f"--{what} {name}:make" in refused(["optimize", "--config", "run/config.toml"], capsys)
    assert "--run-code" in refused(["evaluate", "run"], capsys)
    assert "--run-code" in refused(["export", "run", "--out", "again"], capsys)
    assert "--run-code" in refused(["bench", "run", "--repeats", "2", "--threads", "1"], capsys)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(KeyError, match="it ran"):
        jpq.load(run, run_code=True)
    with pytest.raises(KeyError, match="it ran"):
        main(["bench", "run", "--repeats", "2", "--threads", "1", "--run-code"])


def test_onnx_files_cannot_reach_out(files: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4 * 10**4))
    (tmp_path / "models").mkdir()
    whole = (files / "model.onnx").read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"\x08" * 1000, whole[:100] + b"\xff" * 50 + whole[150:]):
        (tmp_path / "bad.onnx").write_bytes(data)
        with pytest.raises(JpqError, match="cannot load"):
            Runner(tmp_path / "bad.onnx")
    model = onnx.load(files / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda t: t.ByteSize())
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for location in ("../secret", "a/../../secret", "..\\secret", str(tmp_path / "secret"), "C:\\secret"):
        tensor.ClearField("external_data")
        tensor.external_data.add(key="location", value=location)
        (tmp_path / "models" / "reaches.onnx").write_bytes(model.SerializeToString())
        for reader in (Runner, Session, OpenVinoSession):
            with pytest.raises(JpqError, match="lies outside of its folder"):
                reader(tmp_path / "models" / "reaches.onnx")
