"""Where recovery breaks: planted delays under every unkind option of simulate.py, one at a time.

    Spearman    of estimated and planted log tau, over genes whose accessibility changes and drives expression; whole:
                with the mean delay from opening to expression, late enhancers included
    rmse, slope     of log tau after the gauge; of estimated on planted log tau
    peaks       Spearman of found and planted weight over the peaks of those genes where peaks differ in what they do;
                by_share: of the share of accessibility and planted weight, which needs no fit
    gate        open or closed; identifiable: share of genes marked so, and of the unlinked ones where there are any
    modulation  Spearman, over genes and lineages, of planted and estimated difference of log tau between lineages (the
                mean over a lineage's cells after the branch), and its standard deviation: planted, estimated; r the
                reliability that anchored.modulation found

Deep counts, first-order lags, 3 lineages, 3,000 cells, 400 genes unless the row says otherwise; planted kernel given,
one member; halves as in the pipeline. Batches are levelled as with BATCH=batch, but for the row "not told".

Run     python benchmarks/bench_unkind.py --seeds 400            about 40 CPU seconds a row
        python benchmarks/bench_unkind.py --rows kind,programs,modulation --seeds 400 401
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import known_truth  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import anchored  # noqa: E402
import config  # noqa: E402

ROWS = {
    "kind": {},
    "programs": dict(programs=3),
    "late": dict(late=0.3),
    "repressive": dict(repressive=0.3),
    "unlinked": dict(unlinked=0.3),
    "basal": dict(basal=1.0),
    "burn-in": dict(burn_in=0.7),
    "batches": dict(batch_effect=0.3),
    "not told": dict(batch_effect=0.3, level=False),
    "ambient": dict(ambient=0.2),
    "doublets": dict(doublets=0.1),
    "noise": dict(noise=0.5),
    "uneven": dict(uneven=1.0),
    "lineages": dict(lineages=10),
    "dense": dict(spacing=25_000),
    "far": dict(spacing=25_000, far=0.3),
    "sparse": dict(genes=2000, peaks=20_000, atac_total=2000, rna_total=1500),
    "modulation": dict(lineage_delay=0.6),
}


def lineage_means(shift, labels, cells):
    """Mean over the cells of each lineage after the branch of shift (G, K) at their group: (G, L), centred."""
    lineage, branched = cells.lineage.to_numpy(), ~cells.trunk.to_numpy(bool)
    per_cell = shift[:, labels]                                                 # (G, N)
    means = np.stack([per_cell[:, branched & (lineage == k)].mean(1) for k in range(lineage.max() + 1)], 1)
    return means - means.mean(1, keepdims=True)


def planted_weights(data, sim):
    """(C,) what expression gets from a peak over what accessibility gets, nan where several are one."""
    peaks, names = sim.peaks.iloc[data.peak], data.truth.index.to_numpy()
    own = peaks.gene.to_numpy() == names[data.peaks.gene]
    effect = (peaks.effect / peaks.weight).to_numpy() * np.where(peaks.repressive, -1, 1)
    return np.where(data.peak < 0, np.nan, np.where(own, effect, 0.0))


def run(seed, options):
    data, sim = known_truth.make("main", "deep", "exp", seed, **options)
    cells = known_truth.tensors(data)
    result = anchored.fit(**cells, rng=anchored.generator(seed, "fit"), kernel="exp", members=1)
    halves = anchored.split_half(**cells, rng=anchored.generator(seed, "halves"), kernel="exp")
    gate, counts = anchored.gate(result, halves), cells["counts"]
    ok, used = anchored.identifiable(result, cells["access"], counts, halves)[0].numpy(), data.used
    found, planted = result.log_tau.numpy(), np.log(data.truth.tau.to_numpy())
    gap = (found - planted)[used]
    row = dict(spearman=spearmanr(found[used], planted[used])[0], rmse=(gap - gap.mean()).std(),
               slope=np.polyfit(planted[used], found[used], 1)[0], gate="open" if gate.open else "closed",
               split_half=gate.split_half, identifiable=ok[used].mean())
    if "tau_effective" in data.truth:
        row["whole"] = spearmanr(found[used], data.truth.tau_effective[used])[0]
    if config.PEAKS_PER_GENE and (data.options.programs > 1 or data.options.repressive):
        weight, planted_weight = result.delays[0].peak_weight.numpy(), planted_weights(data, sim)
        seen = used[data.peaks.gene] & np.isfinite(planted_weight)
        total = np.asarray(data.peaks.counts.sum(0)).ravel()
        share = total / np.bincount(data.peaks.gene, total)[data.peaks.gene]
        row["peaks"] = spearmanr(weight[seen], planted_weight[seen])[0]
        row["by_share"] = spearmanr(share[seen], planted_weight[seen])[0]
    unlinked = ~data.truth.has_link.to_numpy()
    if unlinked.any():
        row["identifiable_unlinked"] = ok[unlinked].mean()
    if data.options.lineages > 1 and len(used) <= 500:
        groups = anchored.cell_groups(result.anchors[0].z, config.CELL_GROUPS, anchored.generator(seed, "groups"))
        shift, r = anchored.modulation(result, halves, counts, groups)
        estimated = lineage_means(shift.numpy(), groups.numpy(), data.cells)[used]
        row["mod_sd"], row["r"] = estimated.std(), r
        if sim.population.tau_lineage is not None:
            kept = sim.rna.var_names.get_indexer(data.truth.index)
            true = np.log(sim.population.tau_lineage[:, kept]).T
            true = (true - true.mean(1, keepdims=True))[used]
            row["mod_planted_sd"], row["mod_spearman"] = true.std(), spearmanr(true.ravel(), estimated.ravel())[0]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[400])
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--peaks", type=int, default=config.PEAKS_PER_GENE, help="PEAKS_PER_GENE; 0 = not weighed")
    args = parser.parse_args()
    config.PEAKS_PER_GENE = args.peaks
    torch.set_num_threads(1)
    for name in args.rows:
        for seed in args.seeds:
            row = run(seed, ROWS[name])
            print(f"{name:<11}{seed:>5}  " + "  ".join(f"{k} {v if isinstance(v, str) else format(v, '.2f')}"
                                                       for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
