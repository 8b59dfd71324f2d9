"""Does an unpaired ATAC atlas help when paired cells are few? Recovery of planted delays, with and without.

Stage 1 needs ATAC alone: it is fitted on the paired cells only, or on the paired cells and an atlas of others.
Stage 2 always sees the paired cells alone. Deep and shallow counts, first-order lags, fresh seeds.

Run     python benchmarks/bench_atlas.py --seeds 300 301 --paired 300 1000         about 10 minutes on one core
Prints  Spearman of estimated and planted log delay over genes whose accessibility changes
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import anchored  # noqa: E402
import config  # noqa: E402
import effendi_loader as loader  # noqa: E402
import linear_encoder as linear  # noqa: E402
import precompute_embeddings as stage0  # noqa: E402
import simulate  # noqa: E402


def embed(sim, paired):
    """LSI of all ATAC cells, gene accessibility of all, and gene embeddings from the paired cells, as in Stage 0."""
    atac = [sim.atac[:paired], *([sim.unpaired_atac] if sim.unpaired_atac is not None else [])]
    blocks = [a.X.tocsr().astype(np.float32) for a in atac]
    peaks = list(sim.atac.var_names)
    encoder = linear.fit_lsi(lambda: blocks, peaks, stage0.RANK, 0)
    x = linear.pad(np.vstack([linear.lsi_transform(b, encoder) for b in blocks]), config.HYENADNA_D_MODEL)
    weights = loader.gene_peak_weights(sim.atac.var, sim.rna.var, config.GENE_WINDOW, config.GENE_DECAY)
    access = np.vstack([(b @ weights).toarray() for b in blocks])
    counts = sim.rna.X[:paired].toarray()
    return x, access, counts, stage0.gene_embeddings(loadings(counts), loadings(access[:paired]))


def loadings(counts):
    import scipy.sparse as sp
    counts = sp.csr_matrix(counts)
    depth = np.asarray(counts.sum(1)).ravel()
    blocks = [(counts, depth)]
    encoder = linear.fit_pca(lambda: blocks, range(counts.shape[1]), float(np.median(depth)), stage0.RANK, 0)
    return linear.pca_gene_loadings(lambda: blocks, linear.pca_transform(counts, depth, encoder), encoder)


def recovery(x, access, counts, gene_emb, paired, truth, atlas, kernel, members=2):
    stage1 = slice(None) if atlas else slice(paired)
    gene_emb = torch.as_tensor(gene_emb, dtype=torch.float32)
    anchors, delays = [], []
    for m in range(members):
        a = anchored.fit_anchor(x[stage1], access[stage1], gene_emb, anchored.generator(0, "anchor", m))
        a = anchored.restore_anchor(a.align.state_dict(), a.readout.state_dict(), x[:paired], gene_emb)
        anchors.append(a)
        delays.append(anchored.fit_delay(a.z, a.readout, counts, anchored.generator(0, "delay", m), kernel))
    found = anchored.combine(anchors, delays).log_tau.numpy()
    seen = (truth["changes"] & truth["has_link"]).to_numpy(bool)
    return anchored.spearman(found[seen], np.log(truth["tau"].to_numpy()[seen]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[300, 301])
    parser.add_argument("--paired", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--atlas", type=int, default=3000)
    args = parser.parse_args()
    print(f"{'depth':<9}{'paired':>7}{'seed':>6}{'alone':>8}{'+ atlas of ' + str(args.atlas):>18}")
    for depth in ("shallow", "deep"):
        for paired in args.paired:
            for seed in args.seeds:
                sim = simulate.simulate(paired, 400, 3, "exp", depth, seed, unpaired=args.atlas)
                small = simulate.simulate(paired, 400, 3, "exp", depth, seed)
                alone = recovery(*embed(small, paired), paired, small.truth, False, "exp")
                both = recovery(*embed(sim, paired), paired, sim.truth, True, "exp")
                print(f"{depth:<9}{paired:>7}{seed:>6}{alone:>8.2f}{both:>18.2f}", flush=True)


if __name__ == "__main__":
    main()
