"""Delays of genes that were left out of training, in new cells, through the scripts a user runs.

    trained     Spearman of tau and planted tau over 300 genes of the first data set, gene_tau_estimates.csv
    left out    over the 100 genes whose RNA training never saw, inference_tau.csv of 1,500 new cells

over genes whose accessibility changes and drives expression. Simulated data, 3,000 cells x 400 genes for training,
first-order lags; new cells come from the same population by draws of their own.

Run     python benchmarks/bench_new_genes.py --seeds 420 421        1.5 minutes a data set, two cores
Prints  a row per data set, then the means and left out / trained
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import simulate  # noqa: E402

CELLS, GENES, LEFT_OUT, NEW_CELLS = 3000, 400, 100, 1500


def script(*args):
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, args))}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def one(depth, seed, folder):
    """Spearman of the trained genes, and of the left-out ones in new cells."""
    first = simulate.simulate(CELLS, GENES, kernel="exp", depth=depth, seed=seed)
    new = simulate.simulate(NEW_CELLS, GENES, kernel="exp", depth=depth, seed=seed, cell_seed=seed + 1000)
    trained = np.sort(np.random.default_rng(seed).permutation(GENES)[LEFT_OUT:])
    first.rna[:, trained].copy().write_h5ad(folder / "rna.h5ad")
    first.atac.write_h5ad(folder / "atac.h5ad")
    new.rna.write_h5ad(folder / "new_rna.h5ad")
    new.atac.write_h5ad(folder / "new_atac.h5ad")
    out, found = folder / "out", folder / "new"
    script("run.py", "--rna", folder / "rna.h5ad", "--atac", folder / "atac.h5ad", "--set", "BOOTSTRAP=0", "--out", out)
    script("inference.py", "--model", out / "effendi.pt", "--rna", folder / "new_rna.h5ad", "--atac",
           folder / "new_atac.h5ad", "--new-genes", "--out", found)
    known = pd.read_csv(out / "gene_tau_estimates.csv", index_col="gene")
    table = pd.read_csv(found / "inference_tau.csv", index_col="gene")
    truth = first.truth[first.truth.changes & first.truth.has_link].tau
    unknown = table[~table.trained].tau.reindex(truth.index).dropna()
    return [spearmanr(tau, truth[tau.index])[0] for tau in (known.tau.reindex(truth.index).dropna(), unknown)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[420, 421])
    args = parser.parse_args()
    print(f"{'depth':>8}{'seed':>6}{'trained':>9}{'left out':>10}")
    for depth in ("shallow", "deep"):
        rows = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one(depth, seed, Path(folder)))
            print(f"{depth:>8}{seed:>6}{rows[-1][0]:>9.2f}{rows[-1][1]:>10.2f}", flush=True)
        trained, left_out = np.mean(rows, 0)
        print(f"{depth:>8}  mean{trained:>9.2f}{left_out:>10.2f}, {left_out / trained:.2f} of the trained genes'")


if __name__ == "__main__":
    main()
