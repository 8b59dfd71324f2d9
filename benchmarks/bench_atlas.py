"""Do unpaired cells help when paired ones are few? Recovery of planted delays, with and without them.

    paired      all stages see the paired cells alone
    + ATAC      Stage 1 sees an atlas of ATAC cells too
    + RNA       and Stage 2's E-steps an atlas of RNA cells, other cells than those of the ATAC atlas
    W2          as + ATAC, but v starts from where sliced W2 between unpaired cells has brought it: RNA predicted from
                ATAC cells against the RNA atlas, ten principal axes, all delays equal
    W2 + RNA    both

Deep and shallow counts, first-order lags given, one member.

--fold: the RNA atlas was measured otherwise, every gene thinned by a fold of its own.

Run     python benchmarks/bench_atlas.py --seeds 310 311 --paired 300 1000         about 10 minutes on one core
        python benchmarks/bench_atlas.py --seeds 310 --columns paired "+ ATAC" "+ RNA" --fold 0.5
Prints  Spearman of estimated and planted log delay over genes whose accessibility changes
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy import sparse  # noqa: E402

import anchored  # noqa: E402
import chromatin  # noqa: E402
import config  # noqa: E402
import delay_fit  # noqa: E402
import effendi_loader as loader  # noqa: E402
import linear_encoder as linear  # noqa: E402
import precompute_embeddings as stage0  # noqa: E402
import simulate  # noqa: E402
from slice_w2 import random_directions, sliced_w2_sq  # noqa: E402

COLUMNS = ("paired", "+ ATAC", "+ RNA", "W2", "W2 + RNA")


def embed(sim, paired):
    """Data of anchored.fit as Stage 0 makes it: LSI, accessibility and peaks of all ATAC cells, counts and gene
    embeddings from the paired ones."""
    atac = [sim.atac[:paired], *([sim.unpaired_atac] if sim.unpaired_atac is not None else [])]
    blocks = [a.X.tocsr().astype(np.float32) for a in atac]
    peaks = list(sim.atac.var_names)
    encoder = linear.fit_lsi(lambda: blocks, peaks, stage0.RANK, 0)
    x = linear.pad(np.vstack([linear.lsi_transform(b, encoder) for b in blocks]), config.HYENADNA_D_MODEL)
    weights = loader.gene_peak_weights(sim.atac.var, sim.rna.var, config.GENE_WINDOW, config.GENE_DECAY)
    access = np.vstack([(b @ weights).toarray() for b in blocks])
    totals = np.asarray(sum(b.sum(0) for b in blocks)).ravel()
    near, gene, _ = loader.peaks_of_genes(weights, totals, config.PEAKS_PER_GENE)
    counts = sim.rna.X[:paired].toarray()
    return anchored.as_data(x, access, counts, stage0.gene_embeddings(loadings(counts), loadings(access[:paired])),
                            peaks=chromatin.Peaks(sparse.vstack([b @ near for b in blocks], "csr"), gene)
                            if config.PEAKS_PER_GENE else None)


def loadings(counts):
    counts = sparse.csr_matrix(counts)
    depth = np.asarray(counts.sum(1)).ravel()
    blocks = [(counts, depth)]
    encoder = linear.fit_pca(lambda: blocks, range(counts.shape[1]), float(np.median(depth)), stage0.RANK, 0)
    return linear.pca_gene_loadings(lambda: blocks, linear.pca_transform(counts, depth, encoder), encoder)


def pretrained(z, rna, em, rng, steps=300, batch=512, axes=10):
    """A field that carries ATAC states z to where predicted RNA is distributed as rna (M, G); no cell is paired.

        min sliced W2^2(V (t(m + sqrt(m) eps)), V t(y)) + kinetic energy        t(c) = 2 sqrt(c + 3/8), V principal axes
    """
    flow = em.begin("exp")
    depth, share = rna.sum(1, keepdim=True), rna.mean(0).clamp_min(1e-6)

    def stable(counts, depth):
        return 2 * (counts.clamp_min(0) / depth * rna.sum(1).median() + 0.375).sqrt()
    centre = stable(rna, depth).mean(0)
    V = torch.linalg.svd(stable(rna, depth) - centre, full_matrices=False).Vh[:axes].T
    optimiser = torch.optim.Adam(flow.field.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps + 1)
    for _ in range(steps):
        a, r = torch.randint(len(z), (batch,), generator=rng), torch.randint(len(rna), (batch,), generator=rng)
        states, speed_sq = delay_fit.moving_path(flow.field, z[a], em.times)
        m = share * delay_fit.predict(states, em.readout, em.weights(flow), flow.A, flow.B)
        m = m / m.sum(1, keepdim=True) * depth[r]
        noisy = m + m.sqrt() * torch.randn(m.shape, generator=rng)
        loss = sliced_w2_sq((stable(noisy, depth[r]) - centre) @ V, (stable(rna[r], depth[r]) - centre) @ V,
                            random_directions(axes, 64, rng))
        chromatin.descend(loss + em.kinetic * speed_sq, optimiser, schedule)
    return flow.field


def thinned(counts, fold, rng):
    """Counts (M, G) of which each gene keeps a share of its own, log-normal of spread `fold`, the largest share 1."""
    share = np.exp(rng.normal(0, fold, counts.shape[1]))
    return rng.binomial(counts.astype(np.int64), share / share.max()).astype(np.float32)


def recoveries(sim, paired, fold, columns):
    """Spearman per column of the table."""
    atlas = sim.unpaired_rna.X.toarray()
    atlas = torch.from_numpy(thinned(atlas, fold, np.random.default_rng(sim.population.o.seed)) if fold else atlas)
    seen = (sim.truth["changes"] & sim.truth["has_link"]).to_numpy(bool)
    planted, found = np.log(sim.truth["tau"].to_numpy()[seen]), {}
    embedded = {name: embed(data, paired) for name, data in dict(
        paired=replace(sim, unpaired_atac=None), atlas=sim).items()}
    anchors = {name: chromatin.fit_anchor(data["x"], data["access"], data["gene_emb"], anchored.generator(0, "anchor"),
                                         peaks=data["peaks"]) for name, data in embedded.items()}
    for name in columns:
        cells = "paired" if name == "paired" else "atlas"
        anchor, data = anchors[cells], embedded[cells]
        field = None
        if name.startswith("W2"):
            def field(em, z=anchor.z):
                return pretrained(z, atlas, em, anchored.generator(0, "W2"))
        delay = delay_fit.fit_delay(replace(anchor, z=anchor.z[:paired]), data["access"][:paired], data["counts"],
                                   anchored.generator(0, "delay"), "exp", field=field,
                                   rna_only=atlas if name.endswith("RNA") else None)
        found[name] = anchored.spearman(delay.log_tau[seen], torch.as_tensor(planted))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[310, 311])
    parser.add_argument("--paired", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--atlas", type=int, default=3000)
    parser.add_argument("--depths", nargs="+", default=["shallow", "deep"])
    parser.add_argument("--fold", type=float, default=0.0, help="spread of the genes' log folds in the RNA atlas")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'depth':<9}{'paired':>7}{'seed':>6}" + "".join(f"{name:>10}" for name in args.columns))
    for depth in args.depths:
        for paired in args.paired:
            for seed in args.seeds:
                sim = simulate.simulate(paired, 400, 3, "exp", depth, seed, unpaired=args.atlas)
                found = recoveries(sim, paired, args.fold, args.columns)
                print(f"{depth:<9}{paired:>7}{seed:>6}" + "".join(f"{v:>10.2f}" for v in found.values()), flush=True)


if __name__ == "__main__":
    main()
