"""Claims of papers on their methods, measured with a small convnet on 8 x 8 digits: yes, partly or no.

    python studies/claims.py                 # all of them, about five minutes on one core
    python studies/claims.py --only dpf      # one method; its rows replace the old ones

Every row of results/claims.csv is computed: 24 claims on 12 methods, three seeds each, one thread of an x86-64 core,
November 2026. A claim on behaviour holds beyond the bound that its function states, and partly beyond the weaker one. A
claim that something is better holds if it is with every seed, and partly if only on the mean. "not tested" stands where
the run did not bring about what the claim speaks of. Accuracies are per cent of 449 test images, one number a seed; n
counts what `measured` speaks of.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import claims_channels as channels
import claims_masks as masks
import pandas as pd
import torch
from support.result_rows import RESULTS, provenance, read_rows
from support.trial import ADAM, SGD, Measurement

import jpq

PATH = RESULTS / "claims.csv"
COLUMNS = ["method", "claim", "source", "measured", "holds", "n", "threads", "hardware", "torch", "commit", "command"]


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper on its method, and the function that measures it here."""

    method: str
    text: str
    measure: Callable[[], Measurement]

    def row(self) -> dict[str, object]:
        """Measure it; its row of the CSV."""
        measurement = self.measure()
        row = {
            "method": self.method,
            "claim": self.text,
            "source": jpq.METHODS[self.method].paper,
            "measured": measurement.measured,
            "holds": measurement.holds,
        }
        return row | provenance(f"python studies/claims.py --only {self.method}", measurement.n)


CLAIMS = (
    Claim("dpf", "pruned weights return", masks.dpf_returns),
    Claim("dpf", "feedback beats a masked gradient, with SGD as in the paper", partial(masks.dpf_feedback, SGD)),
    Claim("dpf", "feedback beats a masked gradient, with Adam as here", partial(masks.dpf_feedback, ADAM)),
    Claim("pdp", "masks need no parameters", masks.pdp_parameters),
    Claim("pdp", "weights at the boundary get the largest gradient of the mask", masks.pdp_boundary),
    Claim("smart", "the sparsity asked for is exact at every step", masks.smart_exact),
    Claim("smart", "the falling temperature leaves no mask half-open", masks.smart_closes),
    Claim("dpp", "every draw keeps exactly k of each row", masks.dpp_exact),
    Claim("dpp", "goes together with weights of few bits", masks.dpp_bits),
    Claim("dpp", "rows grow confident and stay diverse", masks.dpp_metrics),
    Claim("admm", "weights approach the pattern set", masks.admm_approaches),
    Claim("admm", "beats projecting at once", masks.admm_projection),
    Claim("codeq", "sparsity and bits of each layer are learned, no density is given", masks.codeq_density),
    Claim("codeq", "the first and the last layer keep the most", masks.codeq_ends),
    Claim("spp", "what was likely to be pruned may recover", channels.spp_recovers),
    Claim("gdp", "gates polarise", channels.gdp_polarises),
    Claim("gdp", "gates end as exact zeros or near 1", channels.gdp_exact_zeros),
    Claim("gdp", "dropping costs nothing at the end", channels.gdp_drops_for_nothing),
    Claim("dais", "annealing closes the gap between soft and hard indicators", channels.dais_gap),
    Claim("dais", "hard indicators cost no accuracy", channels.dais_accuracy),
    Claim("dhp", "slicing latents, then generating, equals generating, then slicing", channels.dhp_slices),
    Claim("dsp", "learned groups beat pruning input channels for all filters alike", channels.dsp_groups),
    Claim("bayesian-bits", "doubling gates land on powers of two", channels.bayesian_powers),
    Claim("bayesian-bits", "training feels gates both shut and open", channels.bayesian_gates),
)


def claims_table() -> str:
    """README's table: every claim, what was measured, whether it holds."""
    lines = ["| method | claim | measured | holds |", "|---|---|---|---|"]
    rows = pd.read_csv(PATH).itertuples()
    return "\n".join([*lines, *(f"| {row.method} | {row.claim} | {row.measured} | {row.holds} |" for row in rows), ""])


def main() -> None:
    """Measure all claims, or those of some methods; the CSV is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({claim.method for claim in CLAIMS}))
    only = parser.parse_args().only
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = {(r["method"], r["claim"]): r for r in read_rows(PATH, COLUMNS, dtype=str).to_dict("records")}
    for claim in CLAIMS:
        if only is None or claim.method in only:
            rows[claim.method, claim.text] = row = claim.row()
            print(f"{claim.method}: {claim.text}: {row['holds']}. {row['measured']}", flush=True)
            ordered = [rows[c.method, c.text] for c in CLAIMS if (c.method, c.text) in rows]
            pd.DataFrame(ordered, columns=COLUMNS).to_csv(PATH, index=False)


if __name__ == "__main__":
    main()
