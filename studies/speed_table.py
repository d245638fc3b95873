"""README's table of how fast compressed models are, from results/speed.csv."""

from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent


def speed() -> str:
    """How fast compressed models are beside fp32 and plain int8, and how large their files."""
    table = pd.read_csv(HERE / "results" / "speed.csv", keep_default_na=False)
    lines = [
        "| model | BOPs, bits | channels in multiples of | MACs, % | ms | as fast as fp32 | as fast as int8 "
        "| two threads: fp32 | int8 | layers in float | `model.onnx`, % of fp32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, what in table[["model", "what"]].drop_duplicates().itertuples(index=False):
        rows = table[(table.model == model) & (table.what == what)]
        one, two = rows[rows.clock == "processor"].iloc[0], rows[rows.threads == 2].iloc[0]
        macs = 100 * float(one.macs_share) if one.macs_share else 100
        multiple = int(float(one.channel_multiple)) if one.channel_multiple else ""
        ratios = [f"{r:.2f}x" for t in (one, two) for r in (t.times_as_fast_as_fp32, t.times_as_fast_as_int8)]
        lines.append(
            f"| {model.split(':')[-1]} | {what.removesuffix(', any channels')} | {multiple} | {macs:.0f} "
            f"| {one.median_ms:.2f} | {' | '.join(ratios)} | {one.float_layers} of {one.layers} "
            f"| {100 * one.onnx_bytes_over_fp32:.1f} |"
        )
    first = table.iloc[0]
    lines += [
        "",
        f"Random weights, one image, onnxruntime {first.onnxruntime} on {first.hardware} otherwise idle; "
        f"medians of {first.n} turns in one process: the processor's time with one thread, the wall clock's ratios "
        "with two. Channels in multiples: `--channel-multiple`. int8: all channels at 8 bits, results rounded. Float "
        "results: without `--output-bits`. `python studies/speed.py`.",
        "",
    ]
    return "\n".join(lines)
