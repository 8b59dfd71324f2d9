"""Hours from collection times (calibrate.py) on simulated time courses, against the hours that were planted.

    estimate    exp(log scale) of calibrate.scale_from_paths, hours per unit of relative tau; 90 % interval
    truth       exp(mean_g (log planted tau_hours_g - log relative tau_g)), over genes whose accessibility changes
                and drives expression, weighted as in the gauge: the scale that would be right on average
    ratio       estimate / truth

One time course a seed, 3,000 cells x 400 genes, deep counts, first-order lags, 0.3 units of asynchrony. COURSES
take turns, by seed: the cells of each lie elsewhere in the process, so each needs a fit of its own.

Run     python benchmarks/bench_hours.py --seeds 200 201 202 203 204        40 s a time course, one core
Prints  a row per time course; mean and spread of log ratio, and the share of intervals that hold the truth
"""
import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_atlas import embed  # noqa: E402

import anchored  # noqa: E402
import calibrate  # noqa: E402
import delay_fit  # noqa: E402
import simulate  # noqa: E402

CELLS, GENES = 3000, 400
# Hours in one unit: hours of collection. The process has 6 units; these end at 6, 6 and 3 of them.
COURSES = {0.5: (0, 1, 2, 3), 1.0: (0, 1, 3, 6), 2.0: (0, 1, 3, 6)}


def estimate(result, hours, seed):
    """log scale and its sd from a Result and the collection times (N,) in hours, as calibrate.scale_from_times."""
    with torch.no_grad():
        seen = [(anchor.readout.hidden(delay_fit.path(delay.field, anchor.z)),
                 float((delay.log_tau + delay.gauge - result.log_tau).mean()))
                for anchor, delay in zip(result.anchors, result.delays)]
        return calibrate.scale_from_paths(seen, hours, seed)[:2]


def needed(result, truth):
    """log of the scale that turns relative tau into the planted hours, a mean over genes."""
    used = (truth["changes"] & truth["has_link"]).to_numpy(bool)
    gap = torch.as_tensor(np.log(truth["tau_h"].to_numpy()), dtype=torch.float32) - result.log_tau
    return float(delay_fit.gauge(gap[used], result.sd[used], 0.0))


def one(seed, hours_per_unit):
    """(log scale, its sd, log of the true scale) of one time course."""
    sim = simulate.simulate(CELLS, GENES, kernel="exp", depth="deep", seed=seed, hours_per_unit=hours_per_unit,
                            collection_times=COURSES[hours_per_unit])
    result = anchored.fit(**embed(sim, CELLS), rng=anchored.generator(seed, "fit"), kernel="exp")
    return *estimate(result, sim.rna.obs["time_h"].to_numpy(float), seed), needed(result, sim.truth)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202, 203, 204])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'seed':>5}{'h per unit':>12}{'estimate':>10}{'90 % interval':>18}{'truth':>8}{'ratio':>8}")
    gaps, covered = [], []
    for seed in args.seeds:
        hours_per_unit = list(COURSES)[seed % len(COURSES)]
        log_scale, sd, log_truth = one(seed, hours_per_unit)
        gap, half = log_scale - log_truth, calibrate.Z * sd
        gaps.append(gap)
        covered.append(abs(gap) < half)
        low, high = math.exp(log_scale - half), math.exp(log_scale + half)
        print(f"{seed:>5}{hours_per_unit:>12g}{math.exp(log_scale):>10.2f}{f'{low:.2f} to {high:.2f}':>18}"
              f"{math.exp(log_truth):>8.2f}{math.exp(gap):>8.2f}", flush=True)
    spread = f", spread {np.std(gaps, ddof=1):.2f}" if len(gaps) > 1 else ""
    print(f"log ratio: mean {np.mean(gaps):+.2f}{spread}; {sum(covered)} of {len(covered)} intervals hold the truth "
          f"({np.mean(covered):.0%})")


if __name__ == "__main__":
    main()
