"""How fast Stage 0 embeds expression, and how its memory grows with the number of cells.

Writes a random sparse .h5ad block by block (20 kinds of cells, about 1,000 of 20,000 genes seen per cell), embeds it
with `precompute_embeddings.py rna` in a process of its own, and prints cells per second and peak memory. Memory must
stay below 2 GiB at 200,000 cells.

Run  python benchmarks/bench_stream.py                          50,000 and 200,000 cells, about 4 GB of disk
     python benchmarks/bench_stream.py --cells 5000 20000       sizes of your own
"""
import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
LIMIT_GIB = 2.0


def write_counts(path, n_cells, n_genes, per_cell=1_000, kinds=20, block=5_000, seed=0):
    """A CSR .h5ad of Poisson-like counts: every kind of cell prefers its own genes."""
    from anndata.io import write_elem

    rng = np.random.default_rng(seed)
    base = rng.gamma(0.5, size=n_genes)
    preference = base * np.exp(rng.normal(0, 1, (kinds, n_genes)) * (rng.random((kinds, n_genes)) < 0.1))
    cumulative = np.cumsum(preference, axis=1)
    cumulative /= cumulative[:, -1:]
    with h5py.File(path, "w") as f:
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(f, "obs", pd.DataFrame(index=[f"cell{i}-1" for i in range(n_cells)]))
        write_elem(f, "var", pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)]))
        x = f.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, n_genes)})
        data, indices = (x.create_dataset(k, (0,), t, maxshape=(None,), chunks=(1 << 20,))
                         for k, t in (("data", np.float32), ("indices", np.int32)))
        indptr = [np.zeros(1, np.int64)]
        for first in range(0, n_cells, block):
            n = min(block, n_cells - first)
            kind, draws = rng.integers(0, kinds, n), rng.poisson(1.1 * per_cell, n)
            u = rng.random(draws.sum())
            cell = np.repeat(np.arange(n), draws)
            gene = np.empty(len(u), np.int64)
            for k in range(kinds):
                of_kind = kind[cell] == k
                gene[of_kind] = np.searchsorted(cumulative[k], u[of_kind])
            seen, counts = np.unique(cell * n_genes + np.minimum(gene, n_genes - 1), return_counts=True)
            for dataset, values in ((data, counts), (indices, seen % n_genes)):
                dataset.resize(len(dataset) + len(values), axis=0)
                dataset[-len(values):] = values
            indptr.append(indptr[-1][-1] + np.cumsum(np.bincount(seen // n_genes, minlength=n)))
        x["indptr"] = np.concatenate(indptr)
    return int(indptr[-1][-1])


def embed(path, out):
    """Seconds and peak resident memory (bytes) of Stage 0 in a child process."""
    code = ("import resource, sys; import precompute_embeddings as p; p.main(sys.argv[1:]); "
            "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    start = time.time()
    run = subprocess.run([sys.executable, "-c", code, "rna", "--rna", path, "--out", out, "--set", "RNA_ENCODER=pca"],
                         cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    *said, peak = run.stdout.strip().splitlines()
    print("  " + "\n  ".join(said))
    unit = 1 if sys.platform == "darwin" else 1024          # ru_maxrss is in bytes there, in KiB elsewhere
    return time.time() - start, int(peak.split()[1]) * unit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--genes", type=int, default=20_000)
    args = parser.parse_args()
    rows = []
    for n in args.cells:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/counts.h5ad"
            nnz = write_counts(path, n, args.genes)
            print(f"{n:,} cells x {args.genes:,} genes, {nnz / n:,.0f} seen per cell, "
                  f"{Path(path).stat().st_size / 2**30:.2f} GiB")
            seconds, peak = embed(path, folder + "/out")
        rows.append((n, seconds, peak))
        print(f"  {n / seconds:,.0f} cells/s ({seconds:.1f} s), peak {peak / 2**30:.2f} GiB\n")
    writer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for (n0, s0, p0), (n1, s1, p1) in zip(rows, rows[1:]):
        print(f"{n0:,} -> {n1:,} cells (x {n1 / n0:.1f}): time x {s1 / s0:.2f}, peak memory x {p1 / p0:.2f}")
    worst = max(p for *_, p in rows) / 2**30
    print(f"peak {worst:.2f} GiB, limit {LIMIT_GIB} GiB: {'ok' if worst < LIMIT_GIB else 'TOO MUCH'} "
          f"(writing the files took {writer:.2f} GiB)")
    sys.exit(worst >= LIMIT_GIB)


if __name__ == "__main__":
    main()
