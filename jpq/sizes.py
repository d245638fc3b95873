"""Bytes on disk: what a run wrote, beside the model that it began with in float and at 8 bits; and what runs it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from jpq.files import replace_file
from jpq.result import Result, human, percent

NAME = "sizes.csv"


def sizes(result: Result) -> list[dict[str, Any]]:
    """A row for each file, and for the whole model in fp32 and int8 (weights, biases, scales; nothing around them)."""
    float_bytes = result.float.size_bytes
    int8_bytes = result.uniform.get("W8A8", {}).get("size")
    rows: list[dict[str, Any]] = [{"what": "unpruned, fp32, as counted", "bytes": float_bytes}]
    if int8_bytes is not None:
        rows.append({"what": "unpruned, int8, as counted", "bytes": int(int8_bytes)})
    if result.packed:
        rows.append({"what": "model.packed", "bytes": int(result.packed["total"])})
    rows += [{"what": form["file"], "bytes": int(form["bytes"])} for form in result.export.get("forms", {}).values()]
    for row in rows:
        row["share_of_fp32"] = row["bytes"] / float_bytes
        row["share_of_int8"] = row["bytes"] / int8_bytes if int8_bytes else None
    return rows


def write(result: Result) -> None:
    """sizes.csv, in the run's folder."""

    def fill(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["what", "bytes", "share_of_fp32", "share_of_int8"])
            writer.writeheader()
            writer.writerows(sizes(result))

    replace_file(result.folder / NAME, fill)


def export_lines(result: Result) -> list[tuple[str, str]]:
    """What the summary says of it: (label, text)."""
    if not result.export:
        return []
    e = result.export
    rows = {row["what"]: row for row in sizes(result)}
    parts = []
    for name in ("model.packed", *(form["file"] for form in e["forms"].values())):
        row = rows.get(name)
        if row is not None:
            int8 = "" if row["share_of_int8"] is None else f" and {percent(row['share_of_int8'])} of int8"
            parts.append(f"{name} {human(row['bytes'], 'B')} ({percent(row['share_of_fp32'])} of fp32{int8})")
    lines = [("on disk", "; ".join(parts))]
    left, total = len(e["float_layers"]), e["integer_layers"] + len(e["float_layers"])
    kernels = f"onnxruntime computes {e['integer_layers']} of {total} layers in integers"
    hint = "" if not left else "; --output-bits 8 is for those before sums and poolings"
    odd = next((x.outputs for x in result.layers if x.outputs < x.outputs_all and x.outputs % 4), None)
    if odd:
        hint += f"; channels in multiples of 8 run faster than {odd} (--channel-multiple 8)"
    lines.append(("ONNX", f"opset {e['opset']}, weights in {e['weights']}; {kernels}{hint}"))
    for form, made in e["forms"].items():
        found = made.get("verified", {})
        if form != "onnx" and "images" in found:
            same = found["images"] - found["argmax_differs"]
            lines.append(("verified", f"{made['file']} agrees on {same} of {found['images']} test images"))
    return lines
