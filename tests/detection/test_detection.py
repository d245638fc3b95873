"""Detectors: what saliency is (worked by hand, ablated, differentiated), and the way to a smaller detector and back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from support import shapes
from torch import nn
from torch.nn import functional as F
from torchvision.models import detection as zoo
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import jpq
from jpq.costs.target import parse_targets
from jpq.detection import (
    CamSaliency,
    Saliency,
    SaliencyBatch,
    channel_saliency,
    extract_core,
    prepare_images,
    prepare_saliency_batches,
    rank_channels,
    rank_network,
    rankable_sites,
    reassemble_detector,
)
from jpq.detection.detector import assigned_labels, confidence
from jpq.detection.saliency import LAST_CHANNELS, object_mask, utility
from jpq.export import float_equivalence, verify
from jpq.export.runtimes import Session
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import Evidence, SiteView
from jpq.types import JpqError

SITE = SiteView("site", torch.zeros(1, 0))
SIDE = 64


def evidence(a, g):
    return Evidence(torch.tensor(a).double(), activation_gradients=torch.tensor(g).double())


# the formulas


def test_worked_by_hand():
    seen = evidence([[[[1, 2], [0, 1]]]], [[[[0.5, -0.25], [1, 2]]]])
    assert Saliency()(SITE, seen).item() == 0.75  # .5, .5, 0, 2 over four places; the signed sum is 2
    assert CamSaliency()(SITE, seen).item() == 0.875  # w = mean(.5, 0, 1, 2) = .875, times 4 / 4


@pytest.mark.parametrize("score", [Saliency(), CamSaliency()])
def test_a_unit_and_its_reader_may_trade_scale(score):
    torch.manual_seed(0)
    a, g = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    s = torch.tensor([0.1, 1.0, 30.0])[:, None, None]
    plain = score(SITE, Evidence(a, activation_gradients=g))
    assert torch.allclose(score(SITE, Evidence(a * s, activation_gradients=g / s)), plain, rtol=1e-5)


def test_utility_counts_the_best_boxes_of_each_image():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.2, 0.3]])
    assert utility(scores, 2).item() == pytest.approx(0.9 + 0.5 + 0.3 + 0.2)
    assert utility(scores).item() == pytest.approx(float(scores.sum())), "no more than there are"


def test_only_what_lies_inside_objects():
    """An 80 x 40 image (height x width) on an 8 x 4 map: places of 10 x 10; the box 10..20 grows by 1/2 each way."""
    mask = object_mask([torch.tensor([[10.0, 10, 20, 20]]), torch.zeros(0, 4)], (80, 40), (8, 4))
    assert mask.shape == (2, 1, 8, 4)
    assert mask[0, 0].nonzero().tolist() == [[y, x] for y in (0, 1, 2) for x in (0, 1, 2)]
    assert not mask[1].any()


def test_saliency_without_gradients():
    with pytest.raises(JpqError, match=r"'site' has none. Rank with jpq.detection.rank_channels"):
        Saliency()(SITE, Evidence(torch.zeros(1, 1, 2, 2)))


# on networks


class Tiny(nn.Module):
    """A detector in small: two towers on one feature map, class scores and boxes."""

    def __init__(self, act=nn.Softplus):
        super().__init__()
        self.a, self.norm, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), act()
        self.scores, self.out = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1)
        self.boxes, self.corners = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.act(self.norm(self.a(x)))
        return {"cls": self.out(self.act(self.scores(x))), "box": self.corners(self.act(self.boxes(x)))}


def top(out):
    return utility(out["cls"].sigmoid().flatten(1), 10)


def all_of_it(out):
    return out["cls"].sum()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def tiny(act=nn.Softplus):
    torch.manual_seed(0)
    model = Tiny(act).double().eval()
    network = jpq.trace(model, X)
    return model, network, jpq.channels(network)


def test_a_channel_that_nobody_reads_is_worth_nothing():
    model, network, sites = tiny()
    with torch.no_grad():
        model.scores.weight[:, 2] = 0  # boxes still read it
    found = channel_saliency(model, network, sites, [SaliencyBatch(X, top)])["a"]
    assert found[2] == 0
    assert found[[0, 1, 3, 4, 5]].min() > 0


def test_box_outputs_change_nothing_and_what_feeds_only_them_is_no_part_of_the_ranking():
    model, network, sites = tiny()
    before = channel_saliency(model, network, sites, [SaliencyBatch(X, top)])
    with torch.no_grad():
        model.corners.weight.normal_()
    after = channel_saliency(model, network, sites, [SaliencyBatch(X, top)])
    assert before["boxes"] is None
    assert before["a"].tolist() == after["a"].tolist()
    assert before["scores"].tolist() == after["scores"].tolist()


def test_batches_do_not_matter_nor_does_the_mode_of_the_model():
    model, network, sites = tiny()
    whole = channel_saliency(model, network, sites, [SaliencyBatch(X, top)])
    model.train()  # batch statistics would mix the images
    singles = channel_saliency(model, network, sites, [SaliencyBatch(X[:1], top), SaliencyBatch(X[1:], top)])
    again = channel_saliency(model, network, sites, [SaliencyBatch(x[None], top) for x in X])
    assert model.training
    for name in ("a", "scores"):
        assert torch.allclose(whole[name], singles[name], rtol=1e-9)
        assert torch.allclose(whole[name], again[name], rtol=1e-9)
        assert whole[name].square().mean() == pytest.approx(1), "normalised by layer"


def ablated(model, layer, c):
    """How much `all_of_it` falls when the reader of channel c reads 0 instead."""
    with torch.no_grad():
        weight, full = model.get_submodule(layer).weight, all_of_it(model(X))
        was = weight[:, c].clone()
        weight[:, c] = 0
        less = all_of_it(model(X))
        weight[:, c] = was
    return float(full - less)


def test_where_all_terms_have_one_sign_it_is_the_change_on_removal():
    """Linear after the channel, positive maps and weights: I_c is the share of what is lost."""
    model, network, sites = tiny()
    with torch.no_grad():
        model.out.weight.abs_()
    found = channel_saliency(model, network, sites, [SaliencyBatch(X, all_of_it)])["scores"]
    lost = torch.tensor([ablated(model, "out", c) for c in range(5)]).double()
    assert torch.allclose(found, lost / lost.square().mean().sqrt(), rtol=1e-6)


def test_it_is_never_less_than_the_first_order_change():
    torch.manual_seed(1)
    a, g = torch.randn(3, 7, 5, 5), torch.randn(3, 7, 5, 5)
    bound = 25 * Saliency()(SITE, Evidence(a, activation_gradients=g))[0] * 3
    assert (bound >= (a * g).sum((0, 2, 3)).abs()).all()


def test_the_informative_channel_ranks_first():
    model, network, sites = tiny()
    with torch.no_grad():
        model.scores.weight.mul_(0.01)
        model.scores.weight[:, 4] = 3.0
    assert int(channel_saliency(model, network, sites, [SaliencyBatch(X, top)])["a"].argmax()) == 4


class Reused(nn.Module):
    """One tensor is read before and after its activation, which may overwrite it."""

    def __init__(self, inplace):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.act = nn.ReLU(inplace)

    def forward(self, x):
        x = self.a(x)
        early = self.b(x)
        return early + self.c(self.act(x))


def test_members_are_normalised_one_by_one():

    torch.manual_seed(0)
    model = Reused(inplace=False).double().eval()
    network = jpq.trace(model, X)
    (site,) = jpq.channels(network)
    model.requires_grad_(False)
    found = channel_saliency(model, network, (site,), [SaliencyBatch(X, torch.sum)])[site.name]
    a = model.a(X).requires_grad_()
    r = a.relu()
    r.retain_grad()
    (model.b(a) + model.c(r)).sum().backward()
    members = [(t.detach() * t.grad).abs().mean((0, 2, 3)) for t in (a, r)]
    assert torch.allclose(found, sum(m / m.square().mean().sqrt() for m in members) / 2, rtol=1e-9)


def test_what_is_overwritten_has_no_gradient():
    model = Reused(inplace=True).double().eval()
    network = jpq.trace(model, X)
    with pytest.raises(JpqError, match=r"cannot be differentiated.*inplace=False"):
        channel_saliency(model, network, jpq.channels(network), [SaliencyBatch(X, torch.sum)])


def test_layers_that_read_the_same_tensor_share_its_whole_gradient():
    """Two heads that want the opposite: what they read is worth nothing, not twice as much."""

    class Opposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) + self.c(x)

    torch.manual_seed(0)
    model = Opposed().double().eval()
    network = jpq.trace(model, X)
    (site,) = jpq.channels(network)
    with torch.no_grad():
        model.c.weight[:, 1:] = -model.b.weight[:, 1:]
    found = channel_saliency(model, network, (site,), [SaliencyBatch(X, torch.sum)])[site.name]
    assert found.tolist() == pytest.approx([2, 0, 0, 0], abs=1e-9)


def test_nothing_to_look_at():
    model, network, sites = tiny()
    with pytest.raises(JpqError, match="at least one batch"):
        channel_saliency(model, network, sites, [])


# detectors


class Stages(nn.Module):
    """A backbone of two maps."""

    def __init__(self):
        super().__init__()
        block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU6(True))  # noqa: E731
        self.first, self.second = nn.Sequential(block(3, 16), block(16, 24), block(24, 32)), block(32, 40)

    def forward(self, x):
        fine = self.first(x)
        return OrderedDict([("0", fine), ("1", self.second(fine))])


def small_ssd():
    """torchvision's SSD with SSDlite's heads, on a backbone of four layers."""
    torch.manual_seed(0)
    anchors = DefaultBoxGenerator([[2, 3]] * 2, min_ratio=0.2, max_ratio=0.9)
    head = SSDLiteHead([32, 40], anchors.num_anchors_per_location(), 4, nn.BatchNorm2d)
    return scrambled(SSD(Stages(), anchors, (SIDE, SIDE), 4, head=head, image_mean=[0.5] * 3, image_std=[0.5] * 3))


def ssdlite():
    torch.manual_seed(0)
    side = SIDE
    model = zoo.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    model.transform = GeneralizedRCNNTransform(
        side, side, [0.5] * 3, [0.5] * 3, size_divisible=1, fixed_size=(side, side)
    )
    return scrambled(model)


def scrambled(model):
    """With weights that hand the image on: fresh ones drown it."""
    float_equivalence.randomize(extract_core(model), torch.randn(2, 3, SIDE, SIDE).double())
    return model.float().eval()


def photographs(n=2, seed=0):
    data = shapes.make(n, seed)
    images, wanted = next(data.batches(n))
    return [F.avg_pool2d(x, 2) for x in images], [{**t, "boxes": t["boxes"] / 2} for t in wanted]


@pytest.fixture(scope="module", params=[small_ssd, pytest.param(ssdlite, marks=pytest.mark.slow)])
def pruned(request):
    """A ranked and landed detector: (detector, core, masked, small, images)."""
    detector = request.param()
    images, wanted = photographs()
    part, x = extract_core(detector), prepare_images(detector, images)
    network = jpq.trace(part, x)
    sites, boxes_only = rankable_sites(detector, part, network, jpq.channels(network), x)
    assert boxes_only == ()
    net = jpq.attach(part, network, sites, Ranked, lambda _: (Fixed(8), Fixed(8)), [x], "saliency")
    rank_channels(net, detector, [(images, wanted)])
    net.freeze(jpq.discretize(net, parse_targets({"bops": "3%"}, net.exact_usage())))
    return detector, part, net.eval(), jpq.rebuild(net, part)[0], images


class Apart(NamedTuple):
    """How far the detections of two detectors are from each other, at most over all images."""

    fewest: int  # detections on an image
    labels: bool  # whether they differ
    scores: float  # relative
    boxes: float  # relative, or in pixels where they are below one
    side: float  # of boxes, as a share of the image's side


def apart(one, other):
    pairs = list(zip(one, other, strict=True))
    boxes = [((a["boxes"] - b["boxes"]).abs(), b["boxes"].abs()) for a, b in pairs]
    return Apart(
        min(len(a["boxes"]) for a, _ in pairs),
        any(a["labels"].tolist() != b["labels"].tolist() for a, b in pairs),
        max(float(((a["scores"] - b["scores"]).abs() / b["scores"]).max()) for a, b in pairs),
        max(float((gap / (1 + size)).max()) for gap, size in boxes),
        max(float(gap.max() / size.max()) for gap, size in boxes),
    )


def test_the_core_gives_the_detectors_own_detections():
    detector = small_ssd()
    images, _ = photographs()
    part = extract_core(detector)
    with torch.no_grad():
        dense = detector(images)
        for own in (part, lambda x: part(x)):
            found = apart(reassemble_detector(detector, own)(images), dense)
            assert found.fewest > 0
            assert not found.labels
            assert found.scores == found.boxes == 0


def test_backbone_and_heads_are_pruned_and_the_heads_outputs_keep_their_width(pruned):
    _, part, _, small, _ = pruned
    wide, narrow = dict(part.named_parameters()), dict(small.named_parameters())
    less = {name for name in wide if narrow[name].numel() < wide[name].numel()}
    assert any(name.startswith("backbone") for name in less)
    for head in ("classification_head", "regression_head"):
        assert f"head.{head}.module_list.0.0.0.weight" in less
        last = f"head.{head}.module_list.0.1.weight"
        assert last in less
        assert narrow[last].shape[0] == wide[last].shape[0]


def test_masked_rebuilt_and_exported_core_detect_the_same(pruned, tmp_path):
    detector, _, net, small, images = pruned
    x = prepare_images(detector, images)
    path = tmp_path / "core.onnx"
    jpq.export_onnx(small, x, path)
    found = jpq.verify(net, small, path, [(x, None)], x)
    assert found["masked_vs_rebuilt_float64"] <= 1e-9
    assert found["rebuilt_vs_onnxruntime"]["argmax_differs"] == 0
    assert jpq.measure(small, x)["bops"] == jpq.costs.bops(net.exact_usage())
    with torch.no_grad():
        rebuilt = reassemble_detector(detector, small)
        outside = reassemble_detector(detector, Session(path, optimised=False))
        found = apart(outside(images), rebuilt(images))
    assert found.fewest > 0
    assert not found.labels
    assert found.scores <= 1e-4
    assert found.side <= 1e-4  # in float32, with 8-bit values in between


@torch.no_grad()
def test_masked_and_rebuilt_detector_in_float64(pruned):
    detector, _, net, small, images = pruned
    wide = [x.double() for x in images]
    models = [reassemble_detector(detector, copy.deepcopy(part)).double() for part in (net, small)]
    found = apart(*(model(wide) for model in models))
    assert found.fewest > 0
    assert not found.labels
    assert found.scores <= 1e-9
    assert found.boxes <= 1e-9


def test_the_smaller_detector_trains_and_the_first_stays_as_it_was(pruned):
    detector, part, _, small, images = pruned
    before = {name: t.clone() for name, t in detector.state_dict().items()}
    _, wanted = photographs()
    assert verify.difference(detector.backbone, part.backbone, prepare_images(detector, images)) == 0
    own = copy.deepcopy(small)  # training moves batch statistics
    smaller = reassemble_detector(detector, own).train()
    sum(smaller(images, wanted).values()).backward()
    assert all(p.grad is not None for p in own.head.parameters())
    assert all(torch.equal(t, before[name]) for name, t in detector.state_dict().items())


def test_a_core_under_compression_trains_inside_the_detector(pruned):
    detector, _, net, small, images = pruned
    _, wanted = photographs()
    losses = []
    for part in (net, small):
        model = reassemble_detector(detector, part).train()
        part.eval()  # fixed batch statistics, so that both compute the same; part of `model`, which stays in training
        losses.append({k: float(v.detach()) for k, v in model(images, wanted).items()})
    assert losses[0].keys() == {"bbox_regression", "classification"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # rounding boundaries


def test_the_same_images_give_the_same_ranking_and_the_floor_goes_last(pruned):
    detector, part, _, _, images = pruned
    x = prepare_images(detector, images)
    network = jpq.trace(part, x)
    sites = jpq.channels(network)
    net = jpq.attach(part, network, sites, Ranked, lambda _: (Fixed(8), Fixed(8)), [x], "saliency")
    margins = []
    for _ in range(2):
        rank_channels(net, detector, [(images, None)])
        margins.append([g.margins.clone() for g in net.gates])
    assert all(torch.equal(a, b) for a, b in zip(*margins, strict=True))
    for site, gate in zip(net.sites, net.gates, strict=True):
        assert int((gate.margins > 1).sum()) == max(LAST_CHANNELS, round(0.1 * site.n))
    places = torch.cat([torch.where(g.margins > 1, g.margins - 1, g.margins).flatten() for g in net.gates])
    assert torch.allclose(places.sort().values, torch.arange(1, len(places) + 1) / len(places), atol=1e-6)


def test_coupled_members_lose_the_same_channels(pruned):
    _, _, net, small, _ = pruned
    readers = [f"head.{head}_head.module_list.0.1" for head in ("regression", "classification")]
    (site,) = (s for s in net.sites if set(readers) <= {tap.layer for tap in s.taps})
    kept = sum(net.plan().kept[site.name])
    assert kept < site.n
    assert {small.get_submodule(name).weight.shape[1] for name in readers} == {kept}
    assert {small.get_submodule(name).weight.shape[0] for name in site.producers} == {kept}, (
        "depthwise in the heads too"
    )


def test_confidence():
    logits = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 4.0]]])
    soft = confidence(small_ssd(), {"cls_logits": logits})
    assert soft[0].tolist() == pytest.approx(logits.softmax(-1)[0, [0, 1], [1, 2]].tolist()), "never the background"
    labels = torch.tensor([[-1, 1]])
    own = confidence(small_ssd(), {"cls_logits": logits}, labels)
    assert own[0].tolist() == pytest.approx([0, float(logits.softmax(-1)[0, 1, 1])])
    plain = object()  # RetinaNet and FCOS: one sigmoid per class
    centre = {"cls_logits": logits, "bbox_ctrness": torch.zeros(1, 2, 1)}
    assert confidence(plain, centre)[0].tolist() == pytest.approx((logits.sigmoid()[0].amax(-1) / 2).tolist())


def test_assigned_boxes_are_those_of_the_training():
    """As many boxes as `compute_loss` takes for foreground, with the class of the object that they overlap most."""
    detector = small_ssd()
    images, wanted = photographs(3)
    labels = assigned_labels(detector, images, wanted)
    seen = []
    compute = detector.compute_loss
    detector.compute_loss = lambda *a: (seen.extend(a[3]), compute(*a))[1]
    detector.train()(images, wanted)
    for row, matched, target in zip(labels, seen, wanted, strict=True):
        expected = torch.where(matched >= 0, target["labels"][matched.clamp_min(0)], -1)
        assert row.tolist() == expected.tolist()
        assert (row > 0).sum() > len(target["labels"]) - 1


@pytest.mark.parametrize("kwargs", [{"counts": "assigned"}, {"location": True}, {"boxes": 5}, {"score": CamSaliency()}])
def test_variants_rank_differently(pruned, kwargs):
    detector, part, _, _, images = pruned
    _, wanted = photographs()
    network = jpq.trace(part, prepare_images(detector, images))
    sites = jpq.channels(network)
    plain, other = (
        channel_saliency(part, network, sites, prepare_saliency_batches(detector, [(images, wanted)], **k), score)
        for k, score in [({}, None), ({k: v for k, v in kwargs.items() if k != "score"}, kwargs.get("score"))]
    )
    assert all((other[s.name] >= 0).all() for s in sites)
    changed = [s.name for s in sites if not torch.allclose(plain[s.name], other[s.name])]
    assert len(changed) >= len(sites) / 4, "places of 1 x 1 maps are always inside"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_towers_that_feed_only_boxes_are_named_and_stay(name):
    torch.manual_seed(0)
    build = zoo.__dict__[name]
    detector = build(weights=None, weights_backbone=None, num_classes=4, min_size=SIDE, max_size=SIDE).eval()
    detector.score_thresh = 0.0  # fresh weights are sure of nothing
    images, _ = photographs(1)
    part, x = extract_core(detector), prepare_images(detector, images)
    network = jpq.trace(part, x)
    every = jpq.channels(network)
    sites, boxes_only = rankable_sites(detector, part, network, every, x)
    assert any(site.name.startswith("head.classification_head") for site in sites)
    attach = lambda some: jpq.attach(part, network, some, Ranked, lambda _: (Fixed(8), Fixed(8)), [x], "saliency")  # noqa: E731
    if name.startswith("fcos"):
        assert boxes_only == (), "its boxes' tower gives centre-ness too, which is part of the score"
    else:
        assert boxes_only
        assert all(name.startswith("head.regression_head") for name in boxes_only)
        with pytest.raises(JpqError, match="feed only box outputs"):
            rank_channels(attach(every), detector, [(images, None)])
    net = attach(sites)
    rank_channels(net, detector, [(images, None)])
    net.freeze(jpq.discretize(net, parse_targets({"bops": "3%"}, net.exact_usage())))
    small, _ = jpq.rebuild(net.eval(), part)
    assert verify.difference(net, small, x) <= 1e-9
    with torch.no_grad():
        smaller, through = reassemble_detector(detector, small).double(), reassemble_detector(detector, net).double()
        found = apart(smaller([images[0].double()]), through([images[0].double()]))
    assert found.fewest > 0
    assert not found.labels
    assert found.scores <= 1e-9
    assert found.boxes <= 1e-9


# what cannot work


def test_other_networks_are_refused():
    with pytest.raises(JpqError, match=r"Linear is not a one-stage detector.*prune .backbone"):
        extract_core(nn.Linear(2, 2))
    with pytest.raises(JpqError, match="is not a one-stage detector"):
        reassemble_detector(nn.Linear(2, 2), nn.Linear(2, 2))


def test_a_part_of_something_else_is_refused():
    detector = small_ssd()
    images, _ = photographs(1)
    for other, says in (
        (lambda x: (x, x, x), "gives 3; the detector.s head gives 2 outputs"),
        (lambda x: {"out": x}, "gives out; the detector"),
    ):
        with pytest.raises(JpqError, match=says):
            reassemble_detector(detector, other)(images)


def test_ways_to_count_and_targets_that_are_missing():
    detector = small_ssd()
    images, _ = photographs(1)
    with pytest.raises(JpqError, match="no way 'best' to count"):
        list(prepare_saliency_batches(detector, [(images, None)], counts="best"))
    for kwargs in ({"counts": "assigned"}, {"location": True}):
        with pytest.raises(JpqError, match=r"give batches of \(images, targets\)"):
            list(prepare_saliency_batches(detector, [(images, None)], **kwargs))


def test_a_site_without_a_value():
    model, network, sites = tiny()
    net = jpq.attach(model.float(), network, sites, Ranked, lambda _: (Fixed(8), Fixed(8)), [X.float()], "saliency")
    found = channel_saliency(net, network, sites, [SaliencyBatch(X.float(), top)])
    with pytest.raises(JpqError, match="such as 'boxes': they feed only box outputs"):
        rank_network(net, found)


def test_shapes_come_from_the_seed_alone_and_their_boxes_fit():
    one, same_again, other = shapes.make(6, 3), shapes.make(6, 3), shapes.make(6, 4)
    assert torch.equal(one.images, same_again.images)
    assert not torch.equal(one.images, other.images)
    for target in one.targets:
        boxes = target["boxes"]
        assert 2 <= len(boxes) <= 5
        assert (boxes[:, 2:] - boxes[:, :2]).min() > 15
        assert boxes.min() >= 0
        assert boxes.max() <= shapes.SIDE
        assert set(target["labels"].tolist()) <= {1, 2, 3}
    twice = shapes.mirrored(shapes.mirrored(one.targets[0]))
    assert torch.allclose(twice["boxes"], one.targets[0]["boxes"], atol=1e-4)
