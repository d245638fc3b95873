"""The task of detection: assignment, suppression, loss and average precision by hand, and torchvision's own scores."""

import json
import math

import pytest
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from jpq.tasks import TASKS, models
from jpq.tasks.batches import ListColumn
from jpq.tasks.data import load
from jpq.tasks.detection import AMBIGUOUS, assign, detect, split_columns, sure_classes
from jpq.tasks.detectors import DetectorNetwork
from jpq.tasks.zoo import is_detector
from jpq.types import JpqError

DETECTION = TASKS["detection"]

SQUARE = torch.tensor([0.0, 0.0, 10.0, 10.0])


def output(*rows):
    """[1, A, 3 + 8] of (scores of classes 1 and 2, box); each box is its own anchor."""
    return torch.stack([torch.cat([torch.tensor([0.0, *scores]), box, box]) for scores, box in rows])[None]


def shifted(x):
    return SQUARE + torch.tensor([x, 0.0, x, 0.0])


def test_anchors_stand_for_what_they_overlap_by_half_and_each_object_has_its_best_one():
    anchors = torch.stack([shifted(0), shifted(4.0), shifted(3.0), shifted(30.0), shifted(58.0)])
    boxes = torch.stack([SQUARE, shifted(50.0)])  # overlaps of 1, 6/14, 7/13 and 0; of the second only 2/18
    assert assign(anchors, boxes).tolist() == [0, AMBIGUOUS, 0, -1, 1]
    assert assign(anchors, boxes[:0]).tolist() == [-1] * 5


def test_detections_are_the_best_boxes_that_do_not_overlap_a_better_one_of_their_class():
    found = detect(output(((2.0, -9.0), SQUARE), ((1.0, 0.5), shifted(1.0)), ((-9.0, -9.0), shifted(40.0))))[0]
    assert found["labels"].tolist() == [1, 2]
    assert torch.equal(found["boxes"], torch.stack([SQUARE, shifted(1.0)]))
    assert found["scores"].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.5))])


def test_the_loss_is_focal_loss_and_generalized_overlap_over_the_boxes_with_objects():
    logit = 1.0
    net = output(((logit, -2.0), SQUARE), ((-3.0, -3.0), shifted(100.0)))
    net[0, 0, 3:7] = shifted(5.0)  # a box that overlaps its object by a third, in a hull of 15 x 10
    p = [1 / (1 + math.exp(-v)) for v in (logit, -2.0, -3.0, -3.0)]
    focal = 0.25 * (1 - p[0]) ** 2 * -math.log(p[0]) + sum(0.75 * q**2 * -math.log(1 - q) for q in p[1:])
    target = [{"boxes": SQUARE[None], "labels": torch.tensor([1])}]
    assert float(DETECTION.loss(net, target)) == pytest.approx(focal + 1 - 1 / 3, rel=1e-4)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]
    assert float(DETECTION.loss(net, nothing)) > 0


def test_labels_may_be_bytes():
    net = output(((1.0, -2.0), SQUARE), ((-3.0, -3.0), shifted(100.0)))
    losses = [
        float(DETECTION.loss(net, [{"boxes": SQUARE[None], "labels": torch.tensor([2], dtype=kind)}]))
        for kind in (torch.int64, torch.uint8)
    ]
    assert losses[0] == losses[1]


def test_boxes_of_some_images_are_on_the_device_of_all():
    column = ListColumn([{"boxes": SQUARE[None]}] * 3).to("meta")
    assert column[:2].device == column[torch.tensor([True, False, True])].device == torch.device("meta")


def test_average_precision_of_one_hit_and_one_miss():
    net = output(((3.0, -9.0), SQUARE), ((-9.0, 3.0), shifted(50.0)))
    target = [{"boxes": torch.stack([SQUARE, shifted(20.0)]), "labels": torch.tensor([1, 2])}]
    score, others = DETECTION.evaluate_all(lambda _: net, [(torch.zeros(1), target)])
    assert score == pytest.approx(0.5)  # class 1 is found at every overlap, class 2 nowhere
    assert others["AP50"] == (pytest.approx(0.5), "%")


def test_boxes_agree_in_class_and_place():
    a = output(((3.0, -9.0), SQUARE), ((-9.0, -9.0), shifted(50.0)), ((3.0, -9.0), shifted(20.0)))
    b = a.clone()
    b[0, 0, 3:7] += 0.9
    b[0, 1, 3:7] += 9.0  # no class in either
    b[0, 2, 3:7] += 1.1  # more than a tenth of the anchor
    assert sure_classes(a).tolist() == [[1, 0, 1]]
    assert DETECTION.same_decision(a, b).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.zeros(2, 5), 'a dict of "boxes"'),
        ([{"boxes": SQUARE[None]}], 'a dict of "boxes"'),
        ([{"boxes": SQUARE.flip(0)[None], "labels": torch.tensor([1])}], "x1 < x2"),
        ([{"boxes": SQUARE[None], "labels": torch.tensor([3])}], "A target of task 'detection' is 3"),
    ],
)
def test_wrong_targets_are_one_sentence(target, words):
    with pytest.raises(JpqError) as error:
        DETECTION.check_target(target, 3)
    assert words in str(error.value)


@torch.no_grad()
def test_a_torchvision_detector_gives_its_own_boxes_and_probabilities():
    torch.manual_seed(0)
    detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    images = torch.rand(1, 3, 320, 320)
    net = DetectorNetwork(detector, (320, 320)).eval()
    x = detector.transform([images[0]])[0].tensors
    scores, boxes, _ = split_columns(net(x))
    raw = detector.head(list(detector.backbone(x).values()))
    assert torch.allclose(scores.sigmoid(), raw["cls_logits"].softmax(-1), atol=1e-5)
    found = detector([images[0]])[0]
    best = found["boxes"][:20]
    distance = (boxes[0].clamp(0, 320)[None] - best[:, None]).abs().amax(-1).amin(1)
    assert float(distance.max()) < 1e-2


def test_detectors_by_name_are_built_for_the_size_of_the_images():
    assert is_detector("ssdlite320_mobilenet_v3_large")
    assert not is_detector("resnet18")
    with pytest.raises(JpqError, match="FCOS is not an SSD, SSDlite or RetinaNet"):
        models.build("torchvision:fcos_resnet50_fpn", 3, 3, {"height": 64, "width": 64})
    with pytest.raises(JpqError, match=r"FasterRCNN chooses proposals .* jpq.compress\(detector.backbone, images\)"):
        models.build("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", 3, 3, {"height": 64, "width": 64})
    net = models.build("torchvision:ssdlite320_mobilenet_v3_large", 3, 3, {"height": 64, "width": 96}).eval()
    assert DETECTION.fits(net(torch.zeros(2, 3, 64, 96)), 2, 3)


def test_drawn_shapes_are_read_from_a_folder_in_cocos_format_as_they_were_drawn(tmp_path):
    from support.shapes import HARD, make
    from support.shapes_coco import write_coco

    data = load(write_coco(tmp_path, {"train": (6, 1), "val": (2, 2), "test": (3, 5)}, HARD))
    assert (data.task.name, data.classes, data.class_names[-1]) == ("detection", 7, "ring")
    drawn = make(3, 5, HARD)
    ((x, objects),) = list(data.test)
    assert torch.equal((255 * x).round().byte(), drawn.images)
    for target, entry in zip(drawn.targets, objects, strict=True):
        assert 4 <= len(target["boxes"]) <= 8
        assert torch.allclose(entry["boxes"], target["boxes"], atol=1e-4)
        assert torch.equal(entry["labels"], target["labels"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], "would fit as x1, y1, x2, y2. COCO's form is x, y, width, height"),
        (lambda x, y, w, h: [8 * x, 8 * y, 8 * w, 8 * h], "lie outside of their images. Give them in pixels of these"),
    ],
    ids=["corners", "pixels of larger images"],
)
def test_boxes_in_cocos_format_that_are_no_boxes_of_their_images_are_refused(tmp_path, change, words):
    name, file, record = shapes_record(tmp_path)
    for entry in record["annotations"]:
        entry["bbox"] = change(*entry["bbox"])
    file.write_text(json.dumps(record))
    with pytest.raises(JpqError, match=words):
        load(name)


def test_a_box_outside_of_its_image_is_left_out_with_a_note(tmp_path):
    name, file, record = shapes_record(tmp_path)
    boxes = len(record["annotations"])
    record["annotations"][0]["bbox"] = [500, 500, 20, 20]
    record["annotations"][1]["bbox"][0] -= 1  # beyond the border or not: this is no mistake
    file.write_text(json.dumps(record))
    data = load(name)
    kept = [target for part in (data.train, data.held_out) for _, targets in part for target in targets]
    assert sum(len(target["labels"]) for target in kept) == boxes - 1
    assert any(f"1 of {boxes} boxes" in note and "left out" in note for note in data.notes)


def shapes_record(folder):
    """(data name, annotation file of the training part, its content) of drawn shapes."""
    from support.shapes import EASY
    from support.shapes_coco import write_coco

    name = write_coco(folder, {"train": (8, 1), "test": (2, 2)}, EASY)
    file = folder / "train" / "_annotations.coco.json"
    return name, file, json.loads(file.read_text())
