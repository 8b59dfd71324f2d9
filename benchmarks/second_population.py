"""A second simulated population with known delays, on whose data no setting of Effendi was chosen (but see one_switch).

simulate.py gives every gene switches and pulses of its own. Here courses come from regulators that genes share, and
cells, counts and delays are distributed otherwise, so that a result that only holds in simulate.py shows itself.

    r_k(t, l)    15 regulators: Gaussian processes, a lineage's own part growing from 0 over one unit after the branch
    a_g(t, l)    e / (1 + 0.3 e), log e = 1.2 (1 to 3 regulators, each times N(0, 0.8^2), + 0.4 of a course of its own)
    y_g          (k * a_g)(t, l), k as in simulate.py, + in half of the genes up to 0.4 of the mean of a_g
    tau          log-normal, median 0.6, sd 0.75 of the log, between 0.1 and 3
    cells        t / 6 ~ Beta(1.2, 1.1); 45, 33 and 22 % in the lineages; log sizes of RNA and ATAC correlated at 0.4
    RNA          negative binomial, squared coefficient of variation 0.1 beyond Poisson
    ATAC         Poisson; 1 to 5 peaks a gene, shares Dirichlet, distal ones 20 kb away; peaks between genes

Depths, shares of flat genes, t_max, t_branch and what the tables hold are those of simulate.py.

With courses=one_switch the same, but every gene opens or closes once: a gene says nothing of the pace of the process
but where it switches. On its seeds 30 to 33 settings were chosen (LOG.md, 2026-11-28). With courses=stages many genes
change at a time, abruptly; on these data nothing was chosen either.

Use     python benchmarks/known_truth.py --sizes second,switches,stages
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import anndata  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scipy.sparse as sp  # noqa: E402

import simulate  # noqa: E402

REGULATORS = 15
SPACING = 260_000           # bp from gene to gene
PEAK = 500                  # bp


def population(depth="deep", kernel="exp", seed=0, cells=3000, genes=400, courses=None):
    """The data set as simulate.simulate gives one; of `population` only the options are there.

    courses(rng, t, o, flat) -> accessibility (L, T, G), None = accessibility.
    """
    o = simulate.Options(cells=cells, genes=genes, kernel=kernel, depth=depth, seed=seed)
    rng, of_cells, of_peaks = o.rng("second genes"), o.cell_rng("second cells"), o.rng("second peaks")
    t = np.linspace(0, o.t_max, 301)
    flat = rng.random(genes) < o.flat
    a = (courses or accessibility)(rng, t, o, flat)                             # (L, T, G)
    tau = np.exp(rng.normal(np.log(0.6), 0.75, genes)).clip(0.1, 3.0)
    basal = np.where(rng.random(genes) < 0.5, rng.uniform(0, 0.4, genes), 0.0) * a.mean((0, 1))
    y = delayed(a, tau, t, kernel) + basal

    time = o.t_max * of_cells.beta(1.2, 1.1, cells)
    lineage = of_cells.choice(o.lineages, cells, p=(0.45, 0.33, 0.22))
    at = np.rint(time / t[1]).astype(int)
    size = np.exp(of_cells.multivariate_normal((-0.07, -0.06), ((0.14, 0.052), (0.052, 0.12)), cells))
    counts = o.counts * genes / 400
    opened = scaled(rng, a[lineage, at], 0.6, counts) * size[:, :1]             # (N, G) mean counts
    expressed = scaled(rng, y[lineage, at], 1.0, o.rna_ratio * counts) * size[:, 1:]
    rna = of_cells.poisson(expressed * of_cells.gamma(10.0, 0.1, expressed.shape))      # negative binomial
    columns, peaks = lay_out(of_peaks, opened, size[:, :1])
    atac = of_cells.poisson(columns)

    start = SPACING * np.arange(1, genes + 1)
    table = pd.DataFrame(dict(chrom="chr1", start=start, end=start + 5000, strand="+"),
                         index=[f"gene{g:04d}" for g in range(genes)])
    barcodes = [f"cell{c:05d}" for c in range(cells)]
    truth_of_cells = pd.DataFrame(dict(time=time, lineage=lineage, trunk=time < o.t_branch, atac_size=size[:, 0],
                                       rna_size=size[:, 1]), index=barcodes)

    def modality(x, var):
        return anndata.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=truth_of_cells[[]], var=var)
    return simulate.Simulation(
        rna=modality(rna, table), atac=modality(atac, peaks), cells=truth_of_cells, peaks=peaks,
        truth=table.assign(tau=tau, has_link=True, changes=np.ptp(a, (0, 1)) > 1e-3, kernel=kernel),
        population=SimpleNamespace(o=o))


def smooth(rng, t, n, width):
    """Gaussian processes (T, n) of unit variance."""
    covariance = np.exp(-0.5 * ((t[:, None] - t) / width) ** 2) + 1e-6 * np.eye(len(t))
    return np.linalg.cholesky(covariance) @ rng.standard_normal((len(t), n))


def over_tree(rng, t, o, n):
    """Courses (L, T, n), the same in all lineages before the branch."""
    own = np.clip(t - o.t_branch, 0, 1)[:, None]
    shared = smooth(rng, t, n, rng.uniform(0.8, 2.0))
    return np.stack([shared + 0.9 * own * smooth(rng, t, n, 1.2) for _ in range(o.lineages)])


def accessibility(rng, t, o, flat):
    weight = np.zeros((REGULATORS, o.genes))
    for g in range(o.genes):
        regulators = rng.choice(REGULATORS, rng.integers(1, 4), replace=False)
        weight[regulators, g] = rng.normal(0, 0.8, len(regulators))
    log = over_tree(rng, t, o, REGULATORS) @ weight + 0.4 * over_tree(rng, t, o, o.genes)
    opened = np.exp(1.2 * np.where(flat, 0.0, log))
    return opened / (1 + 0.3 * opened)


def one_switch(rng, t, o, flat):
    """Sigmoids from 0.1-0.35 to 1 or back; those that begin after the branch, in each lineage with probability 0.6."""
    n = len(flat)
    when, width, least = rng.uniform(0.2, o.t_max - 0.2, n), rng.uniform(0.1, 0.4, n), rng.uniform(0.1, 0.35, n)
    opens = rng.random(n) < 0.5
    shared = when - 4 * width < o.t_branch
    there = shared | (rng.random((o.lineages, n)) < 0.6)
    begun = shared | (t[:, None] > o.t_branch)              # what is left of a sigmoid four widths before: 0.02
    switched = (there[:, None] & begun) / (1 + np.exp(-(t[:, None] - when) / width))
    return np.where(flat, 0.6, least + (1 - least) * np.where(opens, switched, 1 - switched))


def stages(rng, t, o, flat):
    """Two new stages in the trunk, one where lineages part, two in each. At each, genes head for another level with
    probability 0.35, up to 0.6 later, and near it exponentially: fast at first, and many genes at a time."""
    n = len(flat)
    nearing = rng.uniform(0.1, 0.6, n)                      # time units
    target = np.broadcast_to(rng.uniform(0.1, 1.0, n), (o.lineages, len(t), n)).copy()

    def stage(begins, lineages):
        changed, after = (rng.random(n) < 0.35) & ~flat, t[:, None] >= begins + rng.uniform(0, 0.6, n)
        target[lineages] = np.where(changed & after, rng.uniform(0.1, 1.0, n), target[lineages])
    for begins in np.sort(rng.uniform(0.2, o.t_branch - 0.6, 2)):               # the last gene before lineages part
        stage(begins, slice(None))
    for lineage in range(o.lineages):
        for begins in (o.t_branch, *np.sort(rng.uniform(o.t_branch + 0.6, o.t_max - 0.2, 2))):
            stage(begins, lineage)
    return np.stack([simulate.lag(course, nearing, t[1]) for course in target])


def delayed(a, tau, t, kernel):
    """Every course (L, T, G) after its gene's delay; before time 0 as at 0."""
    if kernel == "exp":
        return np.stack([simulate.lag(course, tau, t[1]) for course in a])
    return np.stack([np.stack([np.interp(t - tau[g], t, course[:, g]) for g in range(len(tau))], 1) for course in a])


def scaled(rng, rate, spread, total):
    """Rates (N, G) with a level of each gene, log-normal, that add up to `total` a cell in the mean."""
    rate = rate / rate.mean(0) * np.exp(rng.normal(0, spread, rate.shape[1]))
    return rate * total / rate.sum(1).mean()


def lay_out(rng, opened, size):
    """Mean counts (N, P) and places of the genes' peaks and of one between each two genes; overlaps are left out."""
    genes, columns, place = opened.shape[1], [], []
    for g in range(genes):
        n = rng.integers(1, 6)
        distal = rng.exponential(20_000, n - 1) * rng.choice((-1, 1), n - 1)
        place += list(SPACING * (g + 1) + np.concatenate([[0], distal]).clip(-90_000, 90_000).astype(int))
        columns.append(opened[:, g, None] * rng.dirichlet([2.0, *np.ones(n - 1)]))
    columns.append(0.04 * size * np.exp(rng.normal(0, 0.6, genes)))
    place = np.array([*place, *(SPACING * np.arange(1, genes + 1) + SPACING // 2)])
    order = place.argsort(kind="stable")
    order = order[np.diff(place[order], prepend=-SPACING) > PEAK]
    peaks = pd.DataFrame(dict(chrom="chr1", start=place[order], end=place[order] + PEAK),
                         index=[f"chr1:{p}-{p + PEAK}" for p in place[order]])
    return np.hstack(columns)[:, order], peaks
