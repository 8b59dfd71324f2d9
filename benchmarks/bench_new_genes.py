"""Delays of genes that were left out of training, in new cells, through the scripts a user runs.

    trained     Spearman of tau and planted tau over 300 genes of the first data set, gene_tau_estimates.csv
    left out    over the 100 genes whose RNA training never saw, inference_tau.csv of 1,500 new cells
    cover       share of these whose planted log tau, in their gauge, lies in the nominal 90 % interval
    level       by how much their log tau is too long, less the same of trained genes: 0 if both share one gauge

over genes whose accessibility changes and drives expression. Simulated data, 3,000 cells x 400 genes for training,
first-order lags; new cells come from the same population by draws of their own.

Run     python benchmarks/bench_new_genes.py --seeds 420 421        1.5 minutes a data set, two cores
        python benchmarks/bench_new_genes.py --depths deep --programs 3 --seeds 420 421
        python benchmarks/bench_new_genes.py --depths deep --spacing 25000 --seeds 420 421
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


def one(depth, seed, folder, **options):
    """Spearman of the trained genes, and of the left-out ones in new cells; cover and level of these."""
    options = dict(options, kernel="exp", depth=depth, seed=seed)
    first = simulate.simulate(CELLS, GENES, **options)
    new = simulate.simulate(NEW_CELLS, GENES, **options, cell_seed=seed + 1000)
    trained = np.sort(np.random.default_rng(seed).permutation(GENES)[LEFT_OUT:])
    first.rna[:, trained].copy().write_h5ad(folder / "rna.h5ad")
    first.atac.write_h5ad(folder / "atac.h5ad")
    new.rna.write_h5ad(folder / "new_rna.h5ad")
    new.atac.write_h5ad(folder / "new_atac.h5ad")
    out, found = folder / "out", folder / "new"
    script("run.py", "--rna", folder / "rna.h5ad", "--atac", folder / "atac.h5ad", "--set", "BOOTSTRAP=0", "--out", out)
    script("inference.py", "--model", out / "effendi.pt", "--rna", folder / "new_rna.h5ad", "--atac",
           folder / "new_atac.h5ad", "--new-genes", "--out", found)
    truth = np.log(first.truth.tau[first.truth.changes & first.truth.has_link]).rename("planted")
    known = pd.read_csv(out / "gene_tau_estimates.csv", index_col="gene")
    unknown = pd.read_csv(found / "inference_tau.csv", index_col="gene").query("not trained")
    known, unknown = (np.log(table[["tau", "tau_low", "tau_high"]]).join(truth, how="inner")
                      for table in (known, unknown))
    error = (unknown.tau - unknown.planted).mean()
    inside = (unknown.planted + error).between(unknown.tau_low, unknown.tau_high)
    return [*(spearmanr(table.tau, table.planted)[0] for table in (known, unknown)), inside.mean(),
            error - (known.tau - known.planted).mean()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[420, 421])
    parser.add_argument("--depths", nargs="+", default=["shallow", "deep"])
    parser.add_argument("--programs", type=int, default=1, help="different ones among the peaks of a gene")
    parser.add_argument("--spacing", type=int, help="bp from gene to gene")
    args = parser.parse_args()
    print(f"{'depth':>8}{'seed':>6}{'trained':>9}{'left out':>10}{'cover':>7}{'level':>7}")
    for depth in args.depths:
        rows = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one(depth, seed, Path(folder), programs=args.programs, spacing=args.spacing))
            print("{:>8}{:>6}{:>9.2f}{:>10.2f}{:>7.2f}{:>7.2f}".format(depth, seed, *rows[-1]), flush=True)
        mean = np.mean(rows, 0)
        print("{:>8}  mean{:>9.2f}{:>10.2f}{:>7.2f}{:>7.2f}".format(depth, *mean),
              f"  {mean[1] / mean[0]:.2f} of the trained genes'")


if __name__ == "__main__":
    main()
