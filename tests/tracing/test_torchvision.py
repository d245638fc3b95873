"""torchvision's networks: masked and rebuilt model are equal in float64 with a random half of all units dropped."""

from __future__ import annotations

import coverage
import pytest

from jpq.tasks import zoo
from jpq.types import JpqError

IMAGES = [name for name in coverage.names() if zoo.kind_of(name) == "classification"]
OTHERS = [name for name in coverage.names() if name not in IMAGES]


FAST = ["resnet18"]  # a shufflenet in test_reorder
CASES = [
    *(pytest.param(name, 1, id=name) for name in FAST),
    *(pytest.param(name, 2, id=f"{name}-2", marks=pytest.mark.slow) for name in IMAGES),
    *(pytest.param(name, 1, id=name, marks=pytest.mark.slow) for name in OTHERS),
]


@pytest.mark.parametrize(("name", "seeds"), CASES)
def test_masked_is_rebuilt(name: str, seeds: int) -> None:
    row = coverage.measure(name, range(seeds), coverage.exact_shape(name))
    assert row["rebuilt_ok"], row
    assert row["difference"] <= 1e-9
    assert row["sensitivity"] > 1e-5, "the check must be able to see a wrong channel"
    assert row["unknown_ops"] == ""
    assert row["prunable_macs"] > 0.4  # of all MACs, products of attention (half of MViT's) among them
    assert row["units"] > 500


def test_no_network_is_left_out() -> None:
    assert len(IMAGES) == 80, "classification"
    assert len(OTHERS) == 6 + 12 + 9, "segmentation, backbones of detectors, video"


def test_a_network_that_fails_gets_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise JpqError("because")

    monkeypatch.setattr(coverage, "check_equivalence", refuse)
    row = coverage.measure("squeezenet1_1", [0], (3, 64, 64))
    assert (row["rebuilt_ok"], row["why_not"]) == (False, "because")
    assert row["units"] > 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fasterrcnn_resnet50_fpn", "is a detector.*give torchvision:fasterrcnn_resnet50_fpn.backbone"),
        ("resnet18.backbone", "Unknown torchvision model 'resnet18.backbone'. Did you mean resnet18"),
        ("ssd300_vgg17.backbone", "Did you mean ssd300_vgg16"),
    ],
)
def test_names_that_cannot_be_built(name: str, says: str) -> None:
    with pytest.raises(JpqError, match=says):
        zoo.build_torchvision(name, 10)


def test_usual_shapes() -> None:
    shapes = {name: zoo.usual_shape(name) for name in coverage.names()}
    assert shapes["resnet18"] == (3, 224, 224)
    assert shapes["inception_v3"] == (3, 299, 299)
    assert shapes["ssd300_vgg16.backbone"] == (3, 300, 300)
    assert shapes["r3d_18"] == (3, 16, 112, 112)
    assert shapes["mvit_v2_s"] == (3, 16, 224, 224)
