"""A detector of Ultralytics (small configuration, random weights) in a loop of one's own: its loss, its budget."""

import warnings

import pytest
import torch

import jpq
from jpq.export.runtimes import Session

pytest.importorskip("ultralytics", reason="needs ultralytics: pip install ultralytics")

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BATCH = {
    "img": IMAGES,
    "cls": torch.tensor([[0.0], [1.0], [2.0], [0.0]]),
    "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 4),
    "batch_idx": torch.arange(4.0),
}


@pytest.mark.slow
def test_a_detector_meets_its_budget_with_its_own_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()
    model.args = get_cfg()
    session = jpq.compress(model, IMAGES, bops="4%", steps=3).train()
    optimizer = torch.optim.Adam(session.groups())
    session.follow(optimizer)
    for _ in range(3):
        loss = session(BATCH)[0].sum() + session.pressure()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    small = session.finalize()
    full = jpq.costs.baseline(session.net.exact_usage())["bops"]
    assert 0.0388 * full < jpq.measure(small, IMAGES)["bops"] <= 0.04 * full
    boxes, raw = small(IMAGES)
    assert boxes.shape == (4, 7, 84)
    assert raw["scores"].shape == (4, 3, 84)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*detector.onnx")
        jpq.export_onnx(small, IMAGES, tmp_path / "detector.onnx")
    found = Session(tmp_path / "detector.onnx")(IMAGES[:3])
    torch.testing.assert_close(found[0], boxes[:3], rtol=1e-4, atol=1e-3)  # in pixels, and shares
