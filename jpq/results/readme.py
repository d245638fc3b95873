"""README.md of a run's folder: ten lines of Python that run the exported file on one input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpq.files.model_files import KEPT
from jpq.results.record import Result

NAME = "README.md"

START = """\
import json

import numpy as np
import onnxruntime
{imports}
session = onnxruntime.InferenceSession("model.onnx")
entries = session.get_modelmeta().custom_metadata_map
about = {{key: json.loads(text) if text[:1] in "[{{" else text for key, text in entries.items()}}
"""

IMAGE = """\
channels, height, width = about["input_size"]
image = ImageOps.exif_transpose(Image.open("image.png"))
if image.mode[0] == "I":  # 16 bits, which convert() clips
    image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
image = image.convert("L" if channels == 1 else "RGB")
image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
x = np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1)[None] / 255
"""

WHOLE = """\
channels = about["input_size"][0]
image = ImageOps.exif_transpose(Image.open("image.png"))
if image.mode[0] == "I":  # 16 bits, which convert() clips
    image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
image = image.convert("L" if channels == 1 else "RGB")
x = np.asarray(image, np.float32).reshape(image.height, image.width, channels).transpose(2, 0, 1)[None] / 255
"""

NORMALISE = """\
x = (x - np.reshape(about["mean"], {shape})) / np.reshape(about["std"], {shape})
"""

TEXT = """\
numbers = {word: number for number, word in enumerate(about["vocabulary"])}
words = re.findall(r"\\w+|[^\\w\\s]", "a moving and funny film".lower())[: int(about["length"])]
x = np.zeros((1, int(about["length"])), np.int64)
x[0, : len(words)] = [numbers.get(word, int(about["unknown"])) for word in words]
"""

TOKENS = """\
tokenizer = AutoTokenizer.from_pretrained("{folder}")
form = {{"padding": "max_length", "truncation": True, "max_length": int(about["length"]), "return_tensors": "np"}}
x = tokenizer(["a moving and funny film"], **form)
"""

TABLE = """\
columns = about["columns"]  # the row holds their values, in this order
x = np.array([[float(value) for value in open("row.csv").read().split(",")]])
"""

SERIES = """\
x = np.load("window.npy").reshape(1, *about["input_size"])
"""

OTHER = """\
types = {"tensor(int64)": np.int64, "tensor(uint8)": np.uint8}
feed = {
    i.name: np.ones([n if isinstance(n, int) else 1 for n in i.shape], types.get(i.type, np.float32))
    for i in session.get_inputs()
}
print(session.run(None, feed)[0].shape)
"""

RUN = """\
output = session.run(None, {{"input": x.astype({type})}})[0][0]
"""

RUN_MASKED = """\
feed = {"input_ids": x, "attention_mask": (x != int(about["padding"])).astype(np.int64)}
output = session.run(None, feed)[0][0]
"""

RUN_TOKENS = """\
feed = {"input_ids": x["input_ids"].astype(np.int64), "attention_mask": x["attention_mask"].astype(np.int64)}
output = session.run(None, feed)[0][0]
"""

ENDS = {
    "segmentation": 'print(output.argmax(0).shape, "class numbers, one for each pixel")\n',
    "restoration": (
        'pixels = (output.clip(0, 1) * 255).round().astype("uint8").transpose(1, 2, 0)\n'
        'Image.fromarray(pixels.squeeze()).save("restored.png")\n'
    ),
    "regression": ('print(output * float(about.get("target_std", 1)) + float(about.get("target_mean", 0)))\n'),
    "multi-label": "print(1 / (1 + np.exp(-output)))\n",
    "detection": (
        "scores = 1 / (1 + np.exp(-output[:, 1:-8]))\n"
        'names = about.get("class_names") or range(output.shape[1] - 8)\n'
        "for n in scores.max(1).argsort()[::-1][:5]:  # jpq.tasks.detection.detect also drops boxes that overlap\n"
        '    print(names[1 + scores[n].argmax()], scores[n].max(), "x1, y1, x2, y2 in pixels", output[n, -8:-4])\n'
    ),
}

CLASS_END = 'names = about.get("class_names") or range(len(output))\nprint(names[output.argmax()])\n'


def run_code(data: Mapping[str, Any], any_size: bool = False) -> str:
    """Python that runs model.onnx, in its folder, on one input of data with this record (`result.json`, "data").

    any_size: whether the file takes images of any size.
    """
    task, shape = str(data.get("task", "classification")), list(data.get("shape", ()))
    start, imports, dims = _input_code(task, shape, data)
    if start == IMAGE and any_size:
        start, imports = WHOLE, "from PIL import Image, ImageOps\n"
    if start == OTHER:
        return START.format(imports="") + OTHER
    normalise = NORMALISE.format(shape=(1, -1, *[1] * (dims - 1))) if data.get("mean") else ""
    if start == TOKENS:
        run, start = RUN_TOKENS, TOKENS.format(folder=KEPT)
    elif start == TEXT and data.get("inputs", 1) == 2:
        run = RUN_MASKED
    else:
        run = RUN.format(type="np.int64" if task == "text-classification" else "np.float32")
    return START.format(imports=imports) + start + normalise + run + ENDS.get(task, CLASS_END)


def _input_code(task: str, shape: list[int], data: Mapping[str, Any]) -> tuple[str, str, int]:
    """(code that makes x, imports that it needs, dims of one sample) for data of this kind."""
    if len(shape) == 3 and shape[0] in (1, 3) and data.get("inputs", 1) == 1:
        return IMAGE, "from PIL import Image, ImageOps\n", 3
    inputs = data.get("inputs", 1)
    if task == "text-classification" and data.get("tokenizer_checksum") and inputs == 2:
        return TOKENS, "from transformers import AutoTokenizer\n", 1
    if task == "text-classification" and data.get("tokenizer") and (inputs == 1 or (inputs == 2 and "padding" in data)):
        return TEXT, "import re\n", 1
    if len(shape) == 1 and data.get("columns"):
        return TABLE, "", 1
    if len(shape) == 2 and task in ("sequence-classification", "regression"):
        return SERIES, "", 2
    return OTHER, "", 0


def readme_text(result: Result) -> str:
    """The content of README.md."""
    data = result.data
    metric = f"Made by `{result.command}`."
    embedded = "The file normalises its input itself: give pixels / 255." if result.export.get("normalization") else ""
    lines = [f"# {data.get('name', 'model')}: {result.method}", "", metric, embedded, ""]
    code = run_code(data, result.export.get("sizes") == "any")
    packages = "onnxruntime"
    packages += " pillow" if "PIL" in code else " transformers" if "transformers" in code else ""
    lines += [f"`model.onnx` on one input (`python -m pip install {packages}`):", ""]
    lines += ["```python", code.rstrip("\n"), "```", ""]
    return "\n".join(line for n, line in enumerate(lines) if line or not n or lines[n - 1])
