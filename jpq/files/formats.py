"""`FORMATS`: the file formats of a small model, each with its file name and the function that writes and checks it.

| format | file             | reader                                                                     |
|--------|------------------|----------------------------------------------------------------------------|
| onnx   | model.onnx       | any ONNX runtime; integers in 8 bits or fewer (narrow_weights.py)          |
| qonnx  | model.qonnx.onnx | netron, qonnx, FINN and hls4ml: Quant nodes of any width, one sample       |
| pt2    | model.pt2        | torch.export.load, without jpq or brevitas: ATen operators, int8 weights   |

The settings read this table too (`--formats`). It names writers instead of importing them, so it needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Writer = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """A file format: the name of its file in a run's folder, and its writer.

    A writer is called as `writer(small, example, path, batches, weights, task)` with the rebuilt model, an example of
    its inputs, the file to write, batches to compare on (read several times), the type of stored weights
    (`--onnx-weights`), and the task, which says when two outputs are the same decision. It returns the comparison of
    file and model, as `jpq.export.verify.compare` gives it.
    """

    file_name: str
    writer: Writer | str  # a function, or "module:function", imported when it is called

    def import_writer(self) -> Writer:
        """The writer as a function."""
        if not isinstance(self.writer, str):
            return self.writer
        module, _, function = self.writer.partition(":")
        writer: Writer = getattr(import_module(module), function)
        return writer


FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", "jpq.export.formats:write_onnx"),
    "qonnx": Format("model.qonnx.onnx", "jpq.export.formats:write_qonnx"),
    "pt2": Format("model.pt2", "jpq.export.formats:write_pt2"),
}
