"""What Effendi says about groups of genes on real data: A549 cells 0, 1 and 3 hours after dexamethasone.

2,641 cells with RNA and ATAC, about 90 accessible counts near genes a cell: too few for the delay of one gene,
enough for groups. Groups are the genes that bulk RNA of the same treatment calls up or down, from other cells.

    f(t)   = (m(t) - m(0)) / (m(3 h) - m(0))        m: mean over the cells of a collection time and over the group
    timing = int_0^3h (1 - f) dt = 2 - 1.5 f(1 h)   f linear between collection times; hours
    lag    = timing of RNA - timing of chromatin = 1.5 (f_chromatin(1 h) - f_RNA(1 h))
    lead   = (m(1 h) - m(0)) - f_RNA(1 h) (m(3 h) - m(0))      of chromatin, signed by the direction of RNA

Chromatin is Stage 1's readout D(z, g) at t = 0, which has seen no RNA, mean over members; beside it the plain counts
near the gene.
Intervals (95 %) resample cells within collection times and genes. Permuted ATAC: chromatin of other cells, drawn
anew, with everything else as it was. A lag divides by the chromatin's change, which permuted ATAC does not have:
p compares leads, which are lags times that change. Signs of a lag are biased by noise alone, so that 50 % is no
reference for the share of genes with a positive one.
Own chromatin: log-likelihood of a gene's RNA given its own readout, beyond that given another gene's of the group.
tau of a group: the genes' log-likelihoods over tau added up, along the flow as fitted; hours by calibrate.py.

Reads   ../shared/data/a549_multiome, ../shared/data/a549_dex_timecourse; a finished run of it, or makes one (minutes)
Writes  docs/a549_groups.png
Run     python benchmarks/a549_groups.py --out effendi_a549
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import artifacts  # noqa: E402
import calibrate  # noqa: E402
import chromatin  # noqa: E402
import config  # noqa: E402
import delay_fit  # noqa: E402
import inference  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CELLS, BULK = DATA / "a549_multiome", DATA / "a549_dex_timecourse" / "expression_significant_genes.tsv"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "a549_groups.png"
HOURS = np.array([0, 1, 3])
DRAWS = 400
OTHERS = 10                             # draws of another gene's chromatin
# Bulk samples whose expression is out of time order
OUT_OF_ORDER = ("t1_rep1", "t2_rep1", "t3_rep1", "t4_rep1", "t7_rep4", "t8_rep4")


# --- data -------------------------------------------------------------------------------------------------------

def fit_run():
    """Effendi on the cells, unless the folder has a finished run; posterior alone, since groups need no bootstrap."""
    if artifacts.path("gene_tau_estimates.csv.json").exists():
        return
    config.RNA_FILE, config.ATAC_FILE = str(CELLS / "rna.h5ad"), str(CELLS / "atac.h5ad")
    config.BOOTSTRAP = 0
    run.train()


def load():
    """{"model", "stage1" [Anchor], "genes", "x" (N, 256), "z_R", "hours" (N,), "access" and "counts" (N, G),
    "depth" (N,), "groups" {name: (G,) bool}, "bulk"}"""
    import anndata
    model, saved = inference.load_effendi(artifacts.path("effendi.pt"))
    cells, genes = anndata.read_h5ad(artifacts.path("effendi.h5ad")), saved["genes"]
    rows = pd.Index(artifacts.load_table("effendi_atac_obs.csv").index).get_indexer(cells.obs_names)
    columns = artifacts.load_table("genes.csv").index.get_indexer(genes)
    x = torch.from_numpy(np.asarray(cells.obsm["z_atac"], np.float32))
    stage1 = [chromatin.restore_anchor(m, x, saved["gene_emb"])
              for m in artifacts.load_model("align_mlp.pt")["members"]]
    bulk = pd.read_csv(BULK, sep="\t").set_index("gene.name")
    calls = bulk["gene.regulation"].reindex(genes).to_numpy()
    groups = {"up": calls == "up-regulated", "down": calls == "down-regulated"}
    return dict(model=model, stage1=stage1, genes=genes, x=x,
                z_R=np.asarray(cells.obsm["z_R"]), hours=cells.obs["time_h"].to_numpy(float),
                access=artifacts.load_sparse("gene_accessibility.npz")[rows][:, columns].toarray(),
                counts=cells[:, genes].X.toarray(), depth=cells.obs["n_counts"].to_numpy(float),
                groups=groups | {"other": ~(groups["up"] | groups["down"])}, bulk=bulk)


# --- timing -----------------------------------------------------------------------------------------------------

def by_time(value, exposure, hours, weight=None):
    """Mean of each gene at each collection time relative to its mean over the three: (3, G).

        sum of value / sum of exposure over cells, value (N, G), exposure (N,), weight (N,) times a cell counts
    """
    at = (hours == HOURS[:, None]) * (1 if weight is None else weight)                         # (3, N)
    mean = at.astype(np.float32) @ value / (at @ exposure)[:, None]
    return mean / np.maximum(mean.mean(0), 1e-9)


def by_one_hour(mean):
    """f(1 h), the share of the 3 h change that is there at 1 h; mean (3, ...)."""
    return (mean[1] - mean[0]) / (mean[2] - mean[0])


def resampled(hours, rng):
    """How often each cell is drawn when each collection time is resampled (N,)."""
    weight = np.zeros(len(hours))
    for h in HOURS:
        rows = np.flatnonzero(hours == h)
        weight[rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)))
    return weight


def lags(data, chromatin, exposure, rng):
    """Per group: lag and f(1 h) with bootstrap draws, lags under permuted ATAC, shares of genes with a positive lag."""
    hours, counts, depth = data["hours"], data["counts"], data["depth"]
    groups = {name: data["groups"][name] for name in ("up", "down")}        # the others' RNA does not change
    rna = by_time(counts, depth, hours)
    found = {name: {"draws": [], "rna_draws": [], "permuted": [], "lead_permuted": [], "share_permuted": []}
             for name in groups}
    own = by_time(chromatin, exposure, hours)
    for name, group in groups.items():
        found[name] |= describe(own, rna, group)
    for _ in range(DRAWS):
        weight = resampled(hours, rng)
        a, r = by_time(chromatin, exposure, hours, weight), by_time(counts, depth, hours, weight)
        other = rng.permutation(len(hours))
        p = by_time(chromatin[other], exposure[other], hours)
        for name, group in groups.items():
            some = rng.choice(np.flatnonzero(group), group.sum())
            drawn, permuted = describe(a, r, some), describe(p, rna, group)
            found[name]["draws"].append(drawn["lag"])
            found[name]["rna_draws"].append(drawn["rna"])
            found[name]["permuted"].append(permuted["lag"])
            found[name]["lead_permuted"].append(permuted["lead"])
            found[name]["share_permuted"].append(permuted["share"])
    return found


def describe(chromatin, rna, group):
    """Lag and lead of a group (mask or indices), f(1 h) of both, the share of its genes whose own lag is positive."""
    m_a, m_r = chromatin[:, group].mean(1), rna[:, group].mean(1)
    a, r = by_one_hour(m_a), by_one_hour(m_r)
    lead = np.sign(m_r[2] - m_r[0]) * ((m_a[1] - m_a[0]) - r * (m_a[2] - m_a[0]))
    with np.errstate(divide="ignore", invalid="ignore"):
        each = by_one_hour(chromatin[:, group]) - by_one_hour(rna[:, group])
    return dict(lag=1.5 * (a - r), lead=lead, chromatin=a, rna=2 - 1.5 * r, rna_done=r,
                share=np.mean(each[np.isfinite(each)] > 0))


def bulk_timing(bulk, genes):
    """int_0^3h (1 - f) dt of bulk expression at 0, 0.5, 1, 2, 3 h, per gene; hours, nan for genes it lacks."""
    at, names = np.array([0, 0.5, 1, 2, 3]), ("t00", "t05", "t1", "t2", "t3")
    level = np.stack([bulk[[c for c in bulk if c.startswith(n + "_") and c not in OUT_OF_ORDER]].mean(axis=1)
                      for n in names])
    f = (level - level[0]) / (level[-1] - level[0])
    return pd.Series(np.trapezoid(1 - f, at, axis=0), bulk.index).reindex(genes).to_numpy()


# --- own chromatin, and tau of a group --------------------------------------------------------------------------

def own_gain(data, rng):
    """{group: (genes,)} nats by which a gene's RNA, over all cells, prefers its own readout to another's; v = 0."""
    counts = torch.from_numpy(data["counts"])
    depth, mean = chromatin.size_factors(counts)
    gains = {name: [] for name in data["groups"]}
    for anchor in data["stage1"]:

        def likelihood(genes, anchor=anchor):
            return delay_fit.still_genes(anchor.z, anchor.readout, counts, depth, mean, genes)[0].numpy()

        own = likelihood(torch.arange(counts.shape[1]))
        for _ in range(OTHERS):
            genes = np.arange(counts.shape[1])
            for group in data["groups"].values():
                members = np.flatnonzero(group)
                genes[members] = np.roll(members, rng.integers(1, len(members)))
            other = likelihood(torch.from_numpy(genes))
            for name, group in data["groups"].items():
                gains[name].append((own - other)[group])
    return {name: np.mean(values, 0) for name, values in gains.items()}


@dataclass
class Flow:
    """A member's fit along some cells: path (S, N, 8), exposures (N,), readout, kernel, log ODE time at tau = 1."""
    path: torch.Tensor
    exposure: torch.Tensor
    readout: chromatin.GeneReadout
    kernel: str
    level: float


@torch.no_grad()
def stored_flows(data, order=slice(None)):
    """The run's members along its cells; with order, along the chromatin of other cells (A, B and the weights of peaks
    stay those of the true pairs)."""
    model, flows = data["model"], []
    depth, mean = chromatin.size_factors(torch.from_numpy(data["counts"]))
    for m in model.members:
        states = delay_fit.path(m.field.net, m.align(data["x"][order]))
        weights = delay_fit.kernel_weights(m.log_tau.exp(), delay_fit.TIMES, model.kernel)
        exposure = delay_fit.exposures(states, m.readout, weights, m.A, m.B, depth, mean)
        flows.append(Flow(states, exposure, m.readout, model.kernel,
                          float((m.log_tau - model.tau_predictor.log_tau).mean())))
    return flows


@torch.no_grad()
def group_tau(flows, counts, groups, rng):
    """Relative tau of each group from the sum of its genes' log-likelihoods, genes resampled: {group: (draws,)}."""
    mean = chromatin.size_factors(counts)[1]
    found = {name: 0 for name in groups}
    picks = {name: rng.choice(np.flatnonzero(group), (DRAWS, group.sum())) for name, group in groups.items()}
    for flow in flows:
        like = delay_fit.grid_likelihood(flow.path, flow.readout, counts, flow.exposure, mean, flow.kernel)[0].double()
        for name, pick in picks.items():
            share = torch.softmax(like[pick].sum(1), 1)                                         # (draws, U)
            found[name] = found[name] + (share @ delay_fit.LOG_TAU.double() - flow.level).numpy() / len(flows)
    return {name: np.exp(value) for name, value in found.items()}


@torch.no_grad()
def hours_per_unit(flows, hours, rng):
    """Draws of the scale (draws,), or why there is none."""
    try:
        log_scale, sd, _ = calibrate.scale_from_paths([(f.readout.hidden(f.path), f.level) for f in flows], hours,
                                                      config.SEED)
    except ValueError as err:
        return str(err).splitlines()[0]
    return np.exp(log_scale + sd * rng.standard_normal(DRAWS))


# --- what is printed and drawn ----------------------------------------------------------------------------------

def span(draws, digits=2):
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def print_lags(results, groups):
    print(f"  {'chromatin':<17}{'group':<7}{'genes':>5}   {'at 1 h: ATAC':>12} {'RNA':>5}   {'lag, h':<20}"
          f"{'lead':<8}{'permuted ATAC':<18}{'p':<7}{'lag > 0':<9}permuted ATAC")
    for source, found in results.items():
        for name, f in found.items():
            p = (1 + np.sum(np.array(f["lead_permuted"]) >= f["lead"])) / (1 + DRAWS)
            print(f"  {source:<17}{name:<7}{groups[name].sum():>5}   {f['chromatin']:>12.2f} {f['rna_done']:>5.2f}   "
                  f"{f['lag']:<5.2f}{span(f['draws']):<15}{f['lead']:<8.3f}{span(f['lead_permuted'], 3):<18}{p:<7.3f}"
                  f"{f['share']:<9.2f}{np.mean(f['share_permuted']):.2f} {span(f['share_permuted'])}")
    for source, found in results.items():
        gap = np.array(found["up"]["draws"]) - found["down"]["draws"]
        print(f"  {source}: lag of up - lag of down {found['up']['lag'] - found['down']['lag']:.2f} h {span(gap)}")
    gap = np.array(found["up"]["rna_draws"]) - found["down"]["rna_draws"]
    print(f"  RNA alone: timing of up {found['up']['rna']:.2f} - timing of down {found['down']['rna']:.2f} = "
          f"{found['up']['rna'] - found['down']['rna']:.2f} h {span(gap)}")


def print_tau(what, flows, counts, hours, groups, rng):
    """A line: scale, and tau of up and down genes with intervals, in hours where there is a scale."""
    taus, scale = group_tau(flows, counts, groups, rng), hours_per_unit(flows, hours, rng)
    text = []
    for name in ("up", "down"):
        text.append(f"{name} {np.median(taus[name]):.2f} {span(taus[name])}")
        if not isinstance(scale, str):
            text[-1] += f" = {np.median(taus[name]) * np.median(scale):.2f} h {span(taus[name] * scale)}"
    print(f"  tau of groups, {what} ({flows[0].kernel}): " + "; ".join(text)
          + (f"; no hours: {scale}" if isinstance(scale, str) else ""))


def known_time(data):
    """Correlation over cells of collection time with what chromatin, and with what RNA, expects it to be."""
    cut = torch.Generator().manual_seed(config.SEED)
    return [np.corrcoef(calibrate.time_score(torch.as_tensor(z)[None], data["hours"], cut)[0], data["hours"])[0, 1]
            for z in (data["x"], data["z_R"])]


def picture(results, data, gains):
    """Responses, lags against permuted ATAC, and own against another gene's chromatin."""
    figure, (left, middle, right) = report.new_figure(3, 4.0)
    rna = by_time(data["counts"], data["depth"], data["hours"])
    chromatin = by_time(data["D"], np.ones(len(data["x"])), data["hours"])
    access = by_time(data["access"], data["access"].sum(1), data["hours"])
    readings = {"chromatin, Effendi's readout": (chromatin, report.BLUE), "chromatin, counts": (access, report.GREY),
                "RNA, counts": (rna, report.ORANGE)}
    for label, (mean, colour) in readings.items():
        for name, style in (("up", "-"), ("down", "--")):
            m = mean[:, data["groups"][name]].mean(1)
            left.plot(HOURS, (m - m[0]) / (m[2] - m[0]), style, color=colour, marker="o", ms=3,
                      label=f"{label}, {name}")
    left.set(xlabel="time after dexamethasone (h)", ylabel="share of the 3 h change", xticks=HOURS,
             title="response of gene groups")
    left.legend(frameon=False, fontsize=7, loc="lower right", handlelength=3.5)
    rows = [(source, name, f) for source, found in results.items() for name, f in found.items()]
    for at, (source, _, f) in enumerate(rows):
        colour = report.BLUE if source == "Effendi readout" else report.GREY
        low, high = np.quantile(f["draws"], [0.025, 0.975])
        middle.errorbar(at, f["lag"], [[f["lag"] - low], [high - f["lag"]]], fmt="o", color=colour, capsize=3)
    middle.axhline(0, color="black", lw=0.6)
    middle.set_xticks(range(len(rows)), [f"{name}\n{source.split()[-1]}" for source, name, _ in rows])
    middle.set(xlim=(-0.5, len(rows) - 0.5), xlabel="gene group, source of chromatin",
               ylabel="lag of RNA behind chromatin (h)", title="lag, with 95 % interval")
    right.boxplot([gains[name] for name in gains], showfliers=False, widths=0.5,
                  medianprops=dict(color=report.BLUE), tick_labels=[f"{n} ({len(v)})" for n, v in gains.items()])
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="group (genes)", ylabel="own beyond another's (nats a gene)",
              title="RNA given a gene's own chromatin")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(report.png(figure))


def main(argv=None):
    config.OUT_DIR = "effendi_a549"
    config.from_args(__doc__, argv)
    if not (CELLS.exists() and BULK.exists()):
        return print(f"a549_groups: not run: data absent ({CELLS}, {BULK})")
    fit_run()
    data, rng = load(), np.random.default_rng(config.SEED)
    data["D"] = torch.stack([anchor.readout(anchor.z) for anchor in data["stage1"]]).mean(0).numpy()
    every = np.ones(len(data["x"]))
    results = {"Effendi readout": lags(data, data["D"], every, rng),
               "plain counts": lags(data, data["access"], data["access"].sum(1), rng)}
    print_lags(results, data["groups"])

    gains = own_gain(data, rng)
    for name, gain in gains.items():
        print(f"  own chromatin beyond another gene's of the group, {name}: {gain.mean():+.2f} nats a gene "
              f"{span([rng.choice(gain, len(gain)).mean() for _ in range(DRAWS)])}, better in {np.mean(gain > 0):.0%}")
    D, access, rna = (by_time(v, e, data["hours"]) for v, e in (
        (data["D"], every), (data["access"], data["access"].sum(1)), (data["counts"], data["depth"])))
    change = {name: np.log((m[2] + 0.2) / (m[0] + 0.2)) for name, m in (("D", D), ("access", access), ("rna", rna))}
    shuffled = [spearmanr(rng.permutation(change["D"]), change["rna"]).statistic for _ in range(DRAWS)]
    print(f"  0 to 3 h change of chromatin and of RNA over {len(data['genes'])} genes, Spearman: Effendi readout "
          f"{spearmanr(change['D'], change['rna']).statistic:.2f}, plain counts "
          f"{spearmanr(change['access'], change['rna']).statistic:.2f}, another gene's {span(shuffled)}")

    print("  collection time of a cell against what is expected of its embedding, Pearson: chromatin {:.2f}, RNA {:.2f}"
          .format(*known_time(data)))
    training = artifacts.record("gene_tau_estimates.csv")
    print(f"  gate: {training['meaning']}")
    tau = artifacts.load_table("gene_tau_estimates.csv")["tau"].reindex(data["genes"]).to_numpy()
    print("  tau of the genes, geometric mean: " + ", ".join(
        f"{name} {np.exp(np.log(tau[group]).mean()):.2f}" for name, group in data["groups"].items()))
    counts, other = torch.from_numpy(data["counts"]), torch.from_numpy(rng.permutation(len(data["x"])))
    print_tau("single cells", stored_flows(data), counts, data["hours"], data["groups"], rng)
    print_tau("single cells, permuted ATAC", stored_flows(data, other), counts, data["hours"], data["groups"], rng)
    clean, up = bulk_timing(data["bulk"], data["genes"]), data["groups"]["up"]
    timing = {"Effendi's tau": tau, "lag, Effendi readout": by_one_hour(D) - by_one_hour(rna),
              "lag, plain counts": by_one_hour(access) - by_one_hour(rna), "RNA alone": -by_one_hour(rna)}
    print(f"  with bulk RNA timing over {up.sum()} up genes, Spearman: " + ", ".join(
        f"{name} {spearmanr(value[up], clean[up], nan_policy='omit').statistic:.2f}" for name, value in timing.items()))
    picture(results, data, gains)
    print(f"a549_groups: {len(data['x'])} cells, {len(data['genes'])} genes -> {PICTURE}")


if __name__ == "__main__":
    config.script(main)
