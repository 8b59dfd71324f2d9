"""Seconds of a fit (its usual members, kernel chosen) and of bootstrap refits, members and refits over processes.

--device cuda: the same on a GPU, which the processes share; the first fit of a process also loads CUDA.

Shallow counts, first-order lags, 3 lineages. Run it on an otherwise idle machine. What processes come from is started
beforehand, as run.py does while it reads the data, and its seconds are given apart.

Run     python benchmarks/bench_fit.py --processes 1 2 --refits 4                      3,000 cells x 400 genes
        python benchmarks/bench_fit.py --cells 10000 --genes 1654 --processes 2 --refits 0
Prints  wall-clock seconds; Spearman of estimated and planted log delay, the same for any number of processes
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import known_truth  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import anchored  # noqa: E402
from workers import Pool, get_ready  # noqa: E402


def refit(data, r):
    return anchored.bootstrap_replicate(data, r, "exp")


def nothing(data):
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--genes", type=int, default=400)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--refits", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known_truth.SIZES["own"] = dict(cells=args.cells, genes=args.genes)
    data, _ = known_truth.make("own", "shallow", "exp", args.seed)
    cells = known_truth.tensors(data) | {"device": args.device}
    planted = torch.as_tensor(np.log(data.truth.tau.to_numpy())[data.used])
    for processes in args.processes:
        start = time.time()
        get_ready(processes)
        with Pool(None, processes) as pool:
            pool.start(nothing).result()
        ready = time.time() - start
        start = time.time()
        found = anchored.fit(**cells, rng=anchored.generator(args.seed, "fit"), processes=processes)
        rho = anchored.spearman(found.log_tau[torch.as_tensor(data.used)], planted)
        print(f"{args.cells:,} cells x {len(data.truth):,} genes, {args.device}, {processes} processes: fit "
              f"{time.time() - start:.1f} s after {ready:.1f} s of starting processes, Spearman {rho:.3f}", flush=True)
        if args.refits:
            start = time.time()
            with Pool(cells, processes) as pool:
                done = len(list(pool.each(refit, list(range(args.refits)))))
            seconds = time.time() - start
            print(f"    {done} refits {seconds:.1f} s: 100 in {100 * seconds / done / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
