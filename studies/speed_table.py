"""README's table of how fast compressed models are, from results/speed.csv."""

from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent


def speed() -> str:
    """How fast compressed models are beside fp32 and plain int8, and how large their files."""
    table = pd.read_csv(HERE / "results" / "speed.csv", keep_default_na=False)
    lines = [
        "| model | BOPs, bits | MACs, % | ms | as fast as fp32 | as fast as int8 | two threads: fp32 | int8 "
        "| layers in float | `model.onnx`, % of fp32 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, what in table[["model", "what"]].drop_duplicates().itertuples(index=False):
        rows = table[(table.model == model) & (table.what == what)]
        one, two = rows[rows.clock == "processor"].iloc[0], rows[rows.threads == 2].iloc[0]
        macs = 100 * float(one.macs_share) if one.macs_share else 100
        lines.append(
            f"| {model.split(':')[-1]} | {what} | {macs:.0f} | {one.median_ms:.2f} | {one.times_as_fast_as_fp32:.2f}x "
            f"| {one.times_as_fast_as_int8:.2f}x | {two.times_as_fast_as_fp32:.2f}x | {two.times_as_fast_as_int8:.2f}x "
            f"| {one.float_layers} of {one.layers} | {100 * one.onnx_bytes_over_fp32:.1f} |"
        )
    first = table.iloc[0]
    lines += [
        "",
        f"Random weights, one image, onnxruntime {first.onnxruntime} on {first.hardware} otherwise idle; "
        f"medians of {first.n} turns in one process: the processor's time with one thread, the wall clock's ratios "
        "with two. int8: all channels at 8 bits, results rounded. Float results: without `--output-bits`. "
        "`python studies/speed.py`.",
        "",
    ]
    return "\n".join(lines)
