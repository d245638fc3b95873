"""Masked integer weights on disk: back bit for bit, as large as promised, damage refused."""

import json
import zlib
from math import comb, prod

import numpy as np
import pytest
import torch
from masks import cases
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Size

from jpq.export.packed.file import PackedLayer, header_bytes, load_packed, packed_bits, packed_bytes, save_packed
from jpq.methods.gates.fixed_count import topk_rows
from jpq.methods.structures import Axis, KernelPattern, WeightLayout, mask_encoding, parse_structure
from jpq.types import JpqError

CASES = list(cases())
PLAIN = [("elementwise", (40, 50)), ("2:4", (16, 8, 3, 3)), ("block:3x4", (16, 8, 3, 3)), ("per-output", (16, 40))]


def layer(structure, size, width=4, signed=True, density=0.5, even=True, seed=0, dtype=torch.int16):
    """Random integers of that width, and random kept units: as many in each row, or any."""
    torch.manual_seed(seed)
    rows, n = structure.shape(size)
    valid = structure.valid(size)
    k = structure.quota() or round(density * n)
    kept = topk_rows(torch.rand(rows, n), k, valid)
    if not even:
        kept = kept * (torch.rand(rows, n) < 0.7)
    low = -(2 ** (width - 1)) if signed else 0
    weight = torch.randint(low, low + 2**width, size)
    weight.flatten()[:2] = torch.tensor([low, low + 2**width - 1])
    mask = structure.expand(kept, size).expand(size)
    return PackedLayer((weight * mask.long()).to(dtype), width, signed, structure, kept)


def equal(a, b):
    """Whether two tensors, or None, are the same to the dtype."""
    return a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))


def changed(a, b):
    """The fields in which the layer b that was read differs from the saved one, a; in the padding nothing is kept."""
    kept = a.kept
    if a.structure is not None:
        valid = a.structure.valid(a.weight.shape)
        kept = kept.bool() if valid is None else kept.bool() & valid
    found = [name for name in ("bits", "signed", "structure") if getattr(a, name) != getattr(b, name)]
    return found + [name for name, t in (("weight", a.weight), ("kept", kept)) if not equal(t, getattr(b, name))]


def round_trip(tmp_path, layers, tensors=None):
    """(file, what in it or read back from it is not as it was saved or promised)."""
    path, given = tmp_path / "weights.jpq", tensors or {}
    save_packed(path, layers, tensors)
    again, others = load_packed(path)
    if list(again) != list(layers) or set(others) != set(given):
        return path, ["names"]
    found = [f"{name}: {field}" for name in layers for field in changed(layers[name], again[name])]
    found += [name for name in given if not equal(given[name], others[name])]
    if path.stat().st_size != header_bytes(path) + packed_bytes(layers, tensors):
        found.append("size")
    return path, found


@pytest.mark.parametrize(
    ("width", "every"), [*((w, 3) for w in range(1, 9)), pytest.param(None, 1, marks=pytest.mark.slow)]
)
def test_every_structure_on_every_weight_at_every_width(width, every, tmp_path):
    """All of them in the slow suite; the fast one has two or three widths of each structure on each weight."""
    for w in range(1, 9) if width is None else [width]:
        chosen = [(i, *case) for i, case in enumerate(CASES) if (i // 3 + w) % every == 0]
        check_round_trip(w, chosen, tmp_path)


def check_round_trip(width, chosen, tmp_path):
    layers = {}
    for i, spec, name, structure, size in chosen:
        even, signed = (i + width) % 2 == 0, (i + width) % 3 > 0
        layers[f"{spec} {name}"] = layer(structure, size, width, signed, (0.1, 0.5, 0.9)[i % 3], even, i)
    _, found = round_trip(tmp_path, layers)
    assert not found
    promised = sum(
        mask_encoding.length(b, 1)
        for p in layers.values()
        for b in packed_bits(p.structure, p.kept, p.weight.shape, p.bits)
    )
    assert promised == packed_bytes(layers)


def test_dense_layers_and_other_tensors_lie_beside(tmp_path):
    layers = {
        "stem.conv": PackedLayer(torch.randint(-4, 4, (8, 3, 3, 3), dtype=torch.int8), 3),
        "": PackedLayer(torch.randint(0, 2**16, (7, 5), dtype=torch.int32), 16, False),
        "ein/Größe": layer(parse_structure("kernels"), Size((4, 6, 3, 3)), dtype=torch.int64),
    }
    tensors = {"scale": torch.randn(8, 1), "zero": torch.tensor(0.5, dtype=torch.float16), "none": torch.zeros(0, 3)}
    _, found = round_trip(tmp_path, layers, tensors)
    assert not found
    assert packed_bits(None, None, Size((7, 5)), 16) == (35 * 16, 0)


@pytest.mark.parametrize(
    ("spec", "size", "density"), [(*p, d) for p in PLAIN for d in (0, 1) if (p[0], d) != ("2:4", 1)]
)
def test_nothing_and_everything_kept_cost_no_mask(spec, size, density, tmp_path):
    structure = parse_structure(spec)
    kept = torch.full(structure.shape(Size(size)), float(density))
    packed = PackedLayer(torch.full(size, 3 * density), 3, True, structure, kept)
    _, found = round_trip(tmp_path, {"a": packed})
    assert not found
    assert packed_bits(structure, kept, Size(size), 3) == (3 * density * prod(size), 0)


class TestSizes:
    """What each mask takes, counted by hand."""

    def mask(self, spec, size, k, even=True):
        structure = parse_structure(spec)
        torch.manual_seed(0)
        rows, n = structure.shape(Size(size))
        kept = topk_rows(torch.rand(rows, n), k)
        if not even:
            kept[0] = 0
        return packed_bits(structure, kept, Size(size), 4)

    def test_windows_take_the_bits_of_their_choices(self):
        windows = 16 * 9 * 2
        assert self.mask("2:4", (16, 8, 3, 3), 2) == (windows * 2 * 4, windows * 3)  # 6 choices
        assert self.mask("1:4", (16, 8, 3, 3), 1) == (windows * 4, windows * 2)  # 4 choices
        assert self.mask("4:8", (16, 8, 3, 3), 4)[1] == 16 * 9 * 7  # 70 choices: 7 bits for 8 weights

    def test_single_weights_take_a_bitmap_or_places(self):
        n = 2**14
        assert self.mask("elementwise", (128, 128), n // 2) == (n // 2 * 4, n)
        assert self.mask("elementwise", (128, 128), n // 16)[1] == n // 16 * 14  # below 1/14
        assert self.mask("elementwise", (128, 128), n - n // 16)[1] == n // 16 * 14  # the dropped ones

    def test_rows_take_k_places_or_one_choice(self):
        assert self.mask("per-output", (10, 200), 3)[1] == 10 * 3 * 8
        assert self.mask("per-output", (10, 40), 3)[1] == 10 * (comb(40, 3) - 1).bit_length()
        assert self.mask("per-output", (10, 200), 3, even=False)[1] == 9 * 3 * 8 + 24  # ten counts of 2 bits: 3 bytes

    def test_patterns_take_their_number(self):
        assert self.mask("pattern", (8, 6, 3, 3), 1) == (48 * 4 * 4, 48 * 2)
        assert self.mask("pattern:4", (8, 6, 3, 3), 1)[1] == 48 * 6  # 56 patterns

    def test_blocks_take_a_bit_each(self):
        assert self.mask("block:4x4", (16, 8, 3, 3), 36) == (36 * 16 * 4, 72 - 0)


@pytest.mark.parametrize("width", range(17))
def test_streams_of_bits(width):
    draw = np.random.default_rng(width)
    for n in (0, 1, 7, 8, 9, 1000, 2 * mask_encoding.CHUNK + 3):
        numbers = draw.integers(0, 2**width, n)
        data = mask_encoding.pack(numbers, width)
        assert len(data) == mask_encoding.length(n, width) == (n * width + 7) // 8
        assert (mask_encoding.unpack(data, width, n) == numbers).all()
    if width in (1, 3):
        whole = int.from_bytes(mask_encoding.pack(np.array([1, 0, 1]) * (2**width - 1), width).tobytes(), "little")
        assert whole == {1: 0b101, 3: 0b111_000_111}[width]


@pytest.mark.parametrize(
    ("data", "match"), [([7, 0], "take 1 bytes, not 2"), ([], "not 0"), ([64 + 7], "behind the last number")]
)
def test_streams_of_another_length_are_refused(data, match):
    assert mask_encoding.unpack(np.array([0b101_011], np.uint8), 3, 2).tolist() == [3, 5]
    with pytest.raises(JpqError, match=match):
        mask_encoding.unpack(np.array(data, np.uint8), 3, 2)


@pytest.mark.parametrize("name", mask_encoding.ENCODINGS)
def test_every_encoding_says_the_same(name):
    """Also where another would be smaller."""
    draw = np.random.default_rng(0)
    for n, q in ((4, 2), (5, 1), (62, 31), (7, 7), (6, 0)):
        valid = np.ones((9, n), bool)
        valid[::3, n - n // 3 :] = False
        kept = topk_rows(torch.from_numpy(draw.random((9, n))), q, torch.from_numpy(valid)).numpy().astype(bool)
        if name == "all":
            kept = valid
        for even in (q, None) if name in ("kept", "dropped") else (q,):
            listed = kept if name == "kept" else valid & ~kept
            form = mask_encoding.Form(name, even, int(listed.sum(1).max()), 0)
            assert (mask_encoding.decode(mask_encoding.encode(kept, valid, form), valid, form) == kept).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight": torch.randn(16, 8)}, "whole numbers"),
        ({"weight": torch.full((16, 8), 5)}, "not zero"),
        ({"bits": 2}, "do not fit 2 signed bits, which hold -2 to 1"),
        ({"signed": False}, "unsigned"),
        ({"bits": 0}, "1 to 16"),
        ({"kept": None}, "units"),
        ({"kept": torch.ones(8, 16)}, "units"),
        ({"kept": torch.full((16, 8), 0.5)}, "take the decision"),
        ({"structure": parse_structure("kernels")}, "use per-output"),
        ({"structure": Axis(1, np.arange(8), 8), "kept": torch.ones(1, 8)}, "traced network"),
    ],
)
def test_what_is_no_masked_integer_layer_is_refused(change, match, tmp_path):
    good = layer(parse_structure("per-output"), Size((16, 8)))
    fields = {"weight": good.weight, "bits": 4, "signed": True, "structure": good.structure, "kept": good.kept}
    with pytest.raises(JpqError, match=match) as caught:
        save_packed(tmp_path / "x", {"conv": PackedLayer(**{**fields, **change})})
    assert "'conv'" in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("structure", "quota"), [(KernelPattern(), 1), (parse_structure("2:4"), 2)])
def test_a_row_that_keeps_more_than_its_structure_promises_is_refused(structure, quota, tmp_path):
    size = Size((4, 8, 3, 3))
    kept = topk_rows(torch.rand(structure.shape(size)), quota)
    kept[5, :3] = 1
    with pytest.raises(JpqError, match=f"keeps at most {quota} in each row"):
        save_packed(tmp_path / "x", {"c": PackedLayer(torch.zeros(size).int(), 4, True, structure, kept)})


@pytest.fixture
def small(tmp_path):
    layers = {
        "a": layer(parse_structure("2:4"), Size((2, 4, 1, 3))),
        "b": layer(parse_structure("per-output"), Size((3, 9)), even=False),
    }
    path, found = round_trip(tmp_path, layers, {"scale": torch.randn(2)})
    assert not found
    return path, layers


def test_every_damaged_byte_is_noticed(small):
    path, layers = small
    save_packed(path, {"a": layers["a"]}, {"s": torch.ones(1)})
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        with pytest.raises(JpqError, match="Cannot read"):
            load_packed(path)
    for n in (*range(0, len(data), 7), len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(JpqError, match="Cannot read"):
            load_packed(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(JpqError, match="Cannot read"):
        load_packed(path)


def forge(path, edit):
    """Rewrite the header with matching checksums, as somebody who means harm would."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["jpq"])
        streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(about, streams)
    for name, entry in about["layers"].items():
        found = [streams.get(f"layers/{name}/{s}", torch.zeros(0)) for s in ("values", "mask")]
        if isinstance(entry, dict) and all(s.dtype == torch.uint8 for s in found):
            entry["crc32"] = [zlib.crc32(s.numpy().tobytes()) for s in found]
    text = json.dumps(about)
    save_file(streams, path, {"jpq": text, "crc32": str(zlib.crc32(text.encode()))})


def put(layer, **values):
    return lambda about, streams: about["layers"][layer].update(values)


HUGE = 10**15
FORGED = {
    "huge weight": put("a", size=[HUGE, 4, 1, 3]),
    "huge product": put("a", size=[10**5, 4, 10**5, 3]),
    "huge, all dropped": put("b", size=[2**14, 2**15], even=0, encoding="kept"),
    "negative": put("a", size=[-2, 4, 1, 3]),
    "fraction": put("a", size=[2.0, 4, 1, 3]),
    "no list": put("a", size="2413"),
    "many dims": put("a", size=[1] * 2000),
    "other size": put("a", size=[2, 4, 3, 3]),
    "more bits": put("a", bits=5),
    "bits as truth": put("a", bits=True),
    "no bits": put("a", bits=0),
    "sign as number": put("a", signed=1),
    "other structure": put("a", structure="1:4"),
    "no structure": put("a", structure=None),
    "strange structure": put("a", structure="spiral"),
    "structure as number": put("a", structure=7),
    "long structure": put("a", structure="pattern:1x3:" + "/".join(str(i) for i in range(600))),
    "groups": put("a", groups=3),
    "no groups": put("a", groups=0),
    "huge groups": put("a", groups=HUGE),
    "encoding": put("a", encoding="kept"),
    "strange encoding": put("a", encoding="zip"),
    "no even": put("a", even=None),
    "even 3": put("a", even=3),
    "even 5": put("a", even=5),
    "most": put("b", most=1),
    "most huge": put("b", most=HUGE),
    "dtype": put("a", dtype="float32"),
    "dtype as list": put("a", dtype=[]),
    "empty entry": lambda about, streams: about["layers"].update(a={}),
    "entry as list": lambda about, streams: about["layers"].update(a=[]),
    "layers as number": lambda about, streams: about.update(tensors=7),
    "other format": lambda about, streams: about.update(format="jpq packed 2"),
    "missing stream": lambda about, streams: streams.pop("layers/a/mask"),
    "foreign stream": lambda about, streams: streams.update(more=torch.zeros(1)),
    "stream of floats": lambda about, streams: streams.update({"layers/a/values": torch.zeros(6)}),
    "longer stream": lambda about, streams: streams.update({"layers/a/values": torch.zeros(9, dtype=torch.uint8)}),
    "rank 7 of 6": lambda about, streams: streams["layers/a/mask"].fill_(0xFF),
    "tensor": lambda about, streams: streams["scale" if "scale" in streams else "tensors/scale"].add_(1),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_end_in_one_sentence(case, small):
    path, _ = small
    forge(path, FORGED[case])
    with pytest.raises(JpqError, match="Cannot read") as caught:
        load_packed(path, max_weights=10**6)
    assert len(str(caught.value)) < 400


def test_forging_nothing_changes_nothing(small):
    path, layers = small
    forge(path, lambda about, streams: None)
    again, _ = load_packed(path)
    assert not changed(layers["a"], again["a"])


def test_a_reader_makes_no_more_room_than_it_is_told(small):
    path, _ = small
    assert load_packed(path, max_weights=24 + 27)
    with pytest.raises(JpqError, match="26"):
        load_packed(path, max_weights=24 + 26)


def test_forged_places_out_of_order_or_range():
    valid = np.ones((2, 5), bool)
    for columns in ([2, 0, 1, 3], [0, 0, 1, 2], [0, 1, 2, 7]):
        form = mask_encoding.Form("kept", 2, 0, 0)
        with pytest.raises(JpqError, match="rising order"):
            mask_encoding.decode(mask_encoding.pack(np.array(columns), 3), valid, form)
    valid[0, 3:] = False
    with pytest.raises(JpqError, match="do not exist"):
        mask_encoding.decode(mask_encoding.pack(np.array([0, 4, 0, 1]), 3), valid, mask_encoding.Form("kept", 2, 0, 0))
    with pytest.raises(JpqError, match="more units than a row has"):
        mask_encoding.decode(mask_encoding.pack(np.array([4, 1]), 3), valid, mask_encoding.Form("kept", None, 4, 0))


@pytest.mark.parametrize("name", ["missing.jpq", "folder", "text.jpq", "other.safetensors"])
def test_foreign_files_are_refused(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.jpq").write_text("hello" * 10)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(JpqError, match="Cannot read"):
        load_packed(tmp_path / name)


def test_a_transposed_grouped_layer_comes_back_with_its_layout(tmp_path):
    structure = parse_structure("2:4", WeightLayout(transposed=True, groups=2))
    path, found = round_trip(tmp_path, {"up": layer(structure, Size((16, 3, 3, 3)))})
    assert not found
    assert load_packed(path)[0]["up"].structure.layout == WeightLayout(True, 2)
