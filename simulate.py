"""Simulated multiome data (ATAC and RNA of the same cells) whose delays are known.

    a_g(t, l)     accessibility of gene g at process time t in lineage l, in (0, 1]: smooth switches and
                  pulses, up and down alike, the same in all lineages before the branch
    d_g(t, l)     what drives transcription: a_g, unless an option says otherwise; d_g(t < 0) = d_g(0)
    y_g(t, l)   = A_g (k * d_g)(t, l) + B_g        k a kernel on s >= 0 with mean tau_g
        exp       k(s) = exp(-s/tau) / tau         first-order lag: tau y' = d - y
        shift     k(s) = delta(s - tau)            pure delay: d(t - tau)
        gamma     n first-order lags of mean tau/n one after the other, n = `shape`
    ATAC[c, p]  ~ Poisson(s_c  m_p a_g(t_c, l_c))  p one of the peaks of g; m_p its count when fully open
    RNA[c, g]   ~ Poisson(r_c  y_g(t_c, l_c))      s_c, r_c log-normal size factors of mean 1, drawn apart

One trunk splits at `t_branch` into `lineages` branches. t is uniform on (0, t_max), log tau uniform. The lag
follows a cell's own history, back through the trunk. On a grid of step t_max/1200 the lag is exact for the
piecewise-linear drive: errors in y stay below 1e-4 of a gene's range.

Genes that open are as many as genes that close, so that the total of a cell hardly depends on t and library
size remains a fair estimate of the size factor; what is left of it falls with the number of genes.

Depth   "deep" 680 and "shallow" 170 ATAC counts a cell in the peaks of the genes at 400 genes, in proportion
        at other sizes; RNA gets `rna_ratio` = 1.5 times as many, 2.55 and 0.64 counts a gene a cell.
        These are means over cells even in t and lineage: doublets and an uneven t move them. Background peaks
        come on top. A gene without a link to its chromatin (`unlinked`) has tau = NaN in the truth.
Shapes  rna (N, G), atac (N, P): CSR counts; never a dense N x P.
Units   t and tau in process time; positions in bp, 0-based half-open; time_h in hours.
Seeds   `seed` draws genes, peaks and delays, `cell_seed` the cells: the same `seed` with another `cell_seed`
        is a second data set of the same genes. Each component has a stream of its own, so that an option
        does not reshuffle what it does not concern.
Ref     Kingman 1993, Poisson Processes, 5.1 (colouring): the counts of a gene's peaks are drawn as one
        Poisson count and dealt to the peaks, which is the same distribution.

Writes  rna.h5ad, atac.h5ad (what a user would have, no truth), truth.csv (genes), cells_truth.csv,
        peaks_truth.csv; unpaired_rna.h5ad, unpaired_atac.h5ad, unpaired_truth.csv; genome.fa
Run     python simulate.py --out sim --cells 3000 --genes 400 --depth shallow --kernel shift
"""
import dataclasses
import difflib
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

import config

DEPTHS = {"shallow": 170.0, "deep": 680.0}      # ATAC counts a cell in the peaks of 400 genes
KERNELS = ("exp", "shift", "gamma")
GRID = 1200             # steps of the time grid
BLOCK = 2048            # cells at once
SLOT = 700              # bp: a peak lives in one slot, so peaks never overlap
GATE = 0.5              # time units over which lineages part after the branch
UNSPLICED = 0.3         # unspliced counts per spliced count
MOTIF, COPIES = 12, 4   # length of a planted motif, and how often a peak holds it


def _opt(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """Every option of simulate(), each also a flag of the script. Shares lie between 0 and 1."""
    cells: int = _opt(3000, "paired cells")
    genes: int = _opt(400, "genes")
    lineages: int = _opt(3, "branches the trunk splits into (1 = no branch)")
    kernel: str = _opt("exp", "exp, shift or gamma")
    depth: str = _opt("deep", "shallow, deep, or ATAC counts a cell in the peaks of 400 genes")
    seed: int = _opt(0, "draws genes, peaks and delays")
    cell_seed: int | None = _opt(None, "draws the cells (default: as seed)")
    unpaired: int = _opt(0, "further cells of each modality alone, from the same population")
    # the population
    shape: int = _opt(2, "first-order steps of the gamma kernel")
    t_max: float = _opt(6.0, "end of the process, time units")
    t_branch: float = _opt(2.0, "where the trunk splits, time units")
    tau_min: float = _opt(0.15, "shortest delay, time units")
    tau_max: float = _opt(2.5, "longest delay, time units")
    flat: float = _opt(0.15, "share of genes whose accessibility is constant: no delay signal")
    specific: float = _opt(0.6, "share of genes with a lineage-specific part")
    size_sd: float = _opt(0.3, "spread of the log size factors")
    rna_ratio: float = _opt(1.5, "RNA counts per ATAC count in the peaks of genes")
    atac_total: float | None = _opt(None, "ATAC counts a cell over all peaks (replaces depth)")
    rna_total: float | None = _opt(None, "RNA counts a cell (replaces depth and rna_ratio)")
    # the genome
    peaks: int | None = _opt(None, "peaks in all (default: those of the genes + one background peak a gene)")
    spacing: int | None = _opt(None, "bp from gene to gene (default 250000; 21000 with sequences)")
    far: float = _opt(0.0, "share of enhancers that lie among those of a neighbouring gene, beside it")
    sequences: bool = _opt(False, "write genome.fa, with motifs shared by peaks of like programs")
    splicing: bool = _opt(False, "layers spliced (= X) and unspliced")
    # unkind data
    lineage_delay: float = _opt(0.0, "log tau differs by this much, up or down, between lineages")
    programs: int = _opt(1, "different programs among the peaks of a gene")
    basal: float = _opt(0.15, "largest expression, over the drive's amplitude, that no chromatin drives")
    late: float = _opt(0.0, "share of enhancers that act on transcription late_by after they open")
    late_by: float = _opt(1.0, "how late, time units")
    repressive: float = _opt(0.0, "share of enhancers that repress: open where the gene is off")
    unlinked: float = _opt(0.0, "share of genes whose expression ignores their peaks")
    burn_in: float = _opt(0.0, "spread of log(drive before t = 0 / drive at 0): mRNA not steady at the start")
    batches: int = _opt(1, "batches of cells (2 when batch_effect is given)")
    batch_effect: float = _opt(0.0, "spread of the log fold of each gene and peak between batches")
    ambient: float = _opt(0.0, "share of a cell's RNA that comes from the average cell")
    doublets: float = _opt(0.0, "share of barcodes that hold two cells")
    noise: float = _opt(0.0, "squared coefficient of variation of RNA rates beyond Poisson")
    uneven: float = _opt(0.0, "unevenness of cells over time and lineages (1 = about tenfold)")
    collection_times: tuple = _opt((), "hours at which cells are collected, such as 0,1,3,6; written as obs time_h")
    hours_per_unit: float = _opt(1.0, "hours in one time unit, for collection_times")
    asynchrony: float = _opt(0.3, "spread of process time around the collection time, time units")

    def __post_init__(self):
        self.cell_seed = self.seed if self.cell_seed is None else self.cell_seed
        self.collection_times = tuple(float(h) for h in self.collection_times)
        self.spacing = self.spacing or (21_000 if self.sequences else 250_000)
        if self.batch_effect > 0:
            self.batches = max(self.batches, 2)
        if self.lineages == 1:
            self.t_branch = self.t_max
        try:
            self.counts = DEPTHS[self.depth] if self.depth in DEPTHS else float(self.depth)
        except ValueError:
            raise ValueError(f"simulate: depth={self.depth!r}; give shallow, deep or a number") from None
        self._check()

    def _check(self):
        last = max(self.collection_times, default=0) / self.hours_per_unit if self.hours_per_unit > 0 else 0
        shares = ("flat", "specific", "far", "late", "repressive", "unlinked", "ambient", "doublets")
        spreads = ("lineage_delay", "late_by", "burn_in", "batch_effect", "noise", "uneven", "asynchrony", "size_sd")
        for good, problem in (
            (self.kernel in KERNELS, f"kernel={self.kernel!r}; give one of {', '.join(KERNELS)}"),
            (self.cells >= 1 and self.genes >= 1, f"cells={self.cells}, genes={self.genes}; give at least 1 of each"),
            (self.unpaired >= 0, f"unpaired={self.unpaired}; give 0 or more cells"),
            (1 <= self.lineages <= 100, f"lineages={self.lineages}; give 1 to 100"),
            (self.counts > 0, f"depth={self.depth}; give more than 0"),
            (self.basal >= 0, f"basal={self.basal}; give 0 or more"),
            (self.rna_ratio > 0, f"rna_ratio={self.rna_ratio}; give more than 0"),
            (0 < self.tau_min <= self.tau_max,
             f"tau_min={self.tau_min}, tau_max={self.tau_max}; give 0 < tau_min <= tau_max"),
            (self.lineages == 1 or 0 < self.t_branch < self.t_max - 1.5,
             f"t_branch={self.t_branch}, t_max={self.t_max}; branches need 1.5 time units after t_branch"),
            (self.shape >= 1 and self.programs >= 1 and self.batches >= 1, "shape, programs, batches start at 1"),
            (self.lineage_delay == 0 or self.lineages > 1, "lineage_delay needs at least two lineages"),
            (self.spacing >= 14_000, f"spacing={self.spacing}; genes need at least 14000 bp each"),
            (not self.sequences or self.genes * self.spacing <= 2e9,
             f"sequences of {self.genes} genes {self.spacing} bp apart make a genome over 2e9 bp; lower spacing"),
            (self.hours_per_unit > 0, f"hours_per_unit={self.hours_per_unit}; give more than 0"),
            (0 <= min(self.collection_times, default=0) and last <= self.t_max,
             f"collection_times={self.collection_times} h end at {last:g} time units, the process at t_max="
             f"{self.t_max:g}; raise hours_per_unit or t_max"),
            *((0 <= getattr(self, s) <= 1, f"{s}={getattr(self, s)}; a share lies between 0 and 1") for s in shares),
            *((getattr(self, s) >= 0, f"{s}={getattr(self, s)}; give 0 or more") for s in spreads),
        ):
            if not good:
                raise ValueError(f"simulate: {problem}")

    def rng(self, component):
        """Stream of one component of the genes."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(zlib.crc32(component.encode()),)))

    def cell_rng(self, component, sample=0):
        """Stream of one component of the cells; sample 0 paired, 1 RNA alone, 2 ATAC alone."""
        key = (zlib.crc32(component.encode()), sample + 1)
        return np.random.default_rng(np.random.SeedSequence(self.cell_seed, spawn_key=key))


@dataclass
class Simulation:
    rna: object                         # AnnData (N, G), CSR counts
    atac: object                        # AnnData (N, P), CSR counts
    truth: pd.DataFrame                 # genes: tau, has_link, changes, amplitude, ...
    cells: pd.DataFrame                 # barcodes of rna and atac, in their order: time, lineage, trunk, batch, ...
    peaks: pd.DataFrame                 # peaks: gene, role, program, weight, effect, late, repressive
    population: "Population"            # evaluates a_g and y_g at any time
    unpaired_rna: object = None
    unpaired_atac: object = None
    unpaired_cells: pd.DataFrame = None     # both unpaired sets; column `sample` says which
    genome: dict = None                 # chromosome -> bases (uint8), with sequences


# --- programs of accessibility ----------------------------------------------------------------------------

@dataclass
class Shapes:
    """A switch (or a pulse, up at c1 and down again at c2) from 0 to 1, or upside down."""
    pulse: np.ndarray
    down: np.ndarray        # upside down
    c1: np.ndarray
    c2: np.ndarray
    width: np.ndarray

    def __call__(self, t, at=...):
        pulse, down, c1, c2, width = (v[at] for v in (self.pulse, self.down, self.c1, self.c2, self.width))
        value = _sigmoid((t - c1) / width) - np.where(pulse, _sigmoid((t - c2) / width), 0)
        return np.where(down, 1 - value, value)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def draw_shapes(rng, size, first, last):
    c1 = rng.uniform(first, last, size)
    pulse, down = rng.random(size) < 0.4, rng.random(size) < 0.5
    return Shapes(pulse, down, c1, c1 + rng.uniform(1.0, 2.5, size), rng.uniform(0.12, 0.4, size))


@dataclass
class Programs:
    """a(t, l) = floor + (1 - floor) [(1 - u) shared(t) + u part(t, l)], arrays over (G, K).

    part(t, l) = gate(t) on_l own_l(t), or 1 - that where it begins open.
    """
    floor: np.ndarray       # (G, K)
    flat: np.ndarray        # (G, K) no change: the bracket is 1/2
    u: np.ndarray           # (G, K) weight of the lineage-specific part
    begins_open: np.ndarray     # (G, K)
    on: np.ndarray          # (L, G, K) lineages in which that part is active
    shared: Shapes          # (G, K)
    own: Shapes             # (L, G, K)
    t_branch: float

    def __call__(self, t, lineage, program):
        """t (T, 1) or (T, G) -> (T, G). Before t = 0 as at 0."""
        t, k, lk = np.maximum(t, 0), (slice(None), program), (lineage, slice(None), program)
        value = (1 - self.u[k]) * self.shared(t, k)
        if self.u[k].any():
            part = gate(t, self.t_branch) * self.on[lk] * self.own(t, lk)
            value = value + self.u[k] * np.where(self.begins_open[k], 1 - part, part)
        return self.floor[k] + (1 - self.floor[k]) * np.where(self.flat[k], 0.5, value)


def gate(t, t_branch):
    """0 up to the branch, 1 from GATE after it, smooth between: lineages are equal in the trunk."""
    x = np.clip((t - t_branch) / GATE, 0, 1)
    return x * x * (3 - 2 * x)


def draw_programs(o, rng, K, flat):
    """K programs of every gene; flat (G,): genes without change."""
    L, size = o.lineages, (o.genes, K)
    u = np.where((rng.random(size) < o.specific) & (L > 1), rng.uniform(0.4, 1.0, size), 0.0)
    on = rng.random((L, *size)) < 0.5
    on |= np.arange(L)[:, None, None] == rng.integers(L, size=size)     # active in one lineage at least
    shared = draw_shapes(rng, size, 0.08 * o.t_max, 0.72 * o.t_max)
    begin = min(o.t_branch, o.t_max - 1.5)              # unused without a branch, but the draw must be valid
    own = draw_shapes(rng, (L, *size), begin + 0.3, o.t_max - 1.0)
    own.down[:] = False                                 # begins_open turns the part of all lineages around
    return Programs(rng.uniform(0.05, 0.25, size), np.repeat(flat[:, None], K, axis=1), u, rng.random(size) < 0.5,
                    on, shared, own, o.t_branch)


# --- kernels -----------------------------------------------------------------------------------------------------

def lag(drive, tau, step, before=None):
    """First-order lag of mean tau, exact for a drive linear between grid points.

    drive (T, G), tau (G,), before (G,) the steady drive before the first point (None = its first value).
    """
    q = step / tau
    keep = np.exp(-q)
    m = -np.expm1(-q) / q
    y = np.empty_like(drive)
    y[0] = drive[0] if before is None else before
    for i in range(len(drive) - 1):
        y[i + 1] = keep * y[i] + (1 - m) * drive[i + 1] + (m - keep) * drive[i]
    return y


# --- population ------------------------------------------------------------------------------------------------

class Population:
    """Genes, peaks and delays; evaluates accessibility and expression of the noiseless population.

    accessibility(time, lineage)        mean ATAC counts      (N, G)
    expression(time, lineage, tau=None) y_g, mean RNA counts  (N, G)
    driven(tau) lagged drive on the time grid for any delays  (L, T, G)
    """

    def __init__(self, o):
        self.o = o
        G, K = o.genes, o.programs
        self.t = np.linspace(0, o.t_max, GRID + 1)
        pick = o.rng("genes")
        self.flat = pick.permutation(G) < round(o.flat * G)
        self.tau = np.exp(o.rng("tau").uniform(np.log(o.tau_min), np.log(o.tau_max), G))
        self.unlinked = o.rng("unlinked").permutation(G) < round(o.unlinked * G)
        self.programs = draw_programs(o, o.rng("programs"), 1, self.flat)
        if K > 1:                                       # further programs leave the first as it was
            self.programs = _join(self.programs, draw_programs(o, o.rng("more programs"), K - 1, self.flat))
        self.hidden = draw_programs(o, o.rng("hidden"), 1, np.zeros(G, bool)) if o.unlinked else None
        self.tau_lineage = self._lineage_tau(o.rng("lineage tau")) if o.lineage_delay else None
        self.history = np.exp(o.burn_in * o.rng("burn-in").standard_normal(G))
        self.peaks = lay_out_peaks(o)
        linked = self.peaks[self.peaks.gene >= 0]
        self.weight = np.zeros((2, G, K))               # of each program in the drive, prompt and late
        np.add.at(self.weight, (linked.late.astype(int), linked.gene, linked.program), linked.effect)
        level = np.exp(0.5 * pick.standard_normal((2, G)))
        self.amplitude, self.baseline = level[0], level[0] * pick.uniform(0.0, o.basal, G)
        self.rna_grid = self._rna_grid(level[0])                                # (L, T, G) mean counts
        self.atac_grid, self.unit_of_peak = self._atac_grid(level[1])           # (L, T, U) mean counts

    def _lineage_tau(self, rng):
        L, G = self.o.lineages, self.o.genes
        sign = rng.choice([-1.0, 1.0], (L, G))
        same = np.abs(sign.sum(0)) == L                 # all up is the same as none: turn one around
        sign[rng.integers(L, size=G)[same], np.flatnonzero(same)] *= -1
        return self.tau * np.exp(self.o.lineage_delay * (sign - sign.mean(0)))

    def drive(self, t, lineage):
        """d_g at times t (T, 1) or (T, G) -> (T, G)."""
        o, total = self.o, 0
        for k in range(o.programs):
            total = total + self.weight[0, :, k] * self.programs(t, lineage, k)
            if self.weight[1].any():
                total = total + self.weight[1, :, k] * self.programs(t - o.late_by, lineage, k)
        if self.hidden is not None:
            total = np.where(self.unlinked, self.hidden(t, lineage, 0), total)
        return total

    def delayed(self, lineage, tau):
        """(k_tau * d)(t, lineage) on the time grid (T, G)."""
        o, t = self.o, self.t[:, None]
        start = self.drive(t[:1], lineage)[0] * self.history
        if o.kernel == "shift":
            return np.where(t < tau, start, self.drive(t - tau, lineage))
        steps = o.shape if o.kernel == "gamma" else 1
        y = self.drive(t, lineage)
        for _ in range(steps):
            y = lag(y, tau / steps, o.t_max / GRID, start)
        return y

    def driven(self, tau):
        """Lagged drive in every lineage (L, T, G) for delays tau (G,)."""
        return np.stack([self.delayed(l, tau) for l in range(self.o.lineages)])

    def _rna_grid(self, level):
        """Mean RNA counts, scaled together with A and B to the depth that was asked for."""
        o, grid = self.o, []
        for l in range(o.lineages):
            y = self.delayed(l, self.tau)
            if self.tau_lineage is not None:
                # The trunk has one delay; a branch goes over to its own without a jump.
                y = y + gate(self.t, o.t_branch)[:, None] * (self.delayed(l, self.tau_lineage[l]) - y)
            grid.append((self.amplitude * y + self.baseline).astype(np.float32))
        grid = np.stack(grid)
        scale = (o.rna_total or o.rna_ratio * o.counts * o.genes / 400) / grid.mean(axis=(0, 1)).sum()
        self.amplitude, self.baseline = self.amplitude * scale, self.baseline * scale
        grid *= scale
        return grid

    def unspliced_grid(self):
        grid = [self.amplitude * self._unspliced(l) + self.baseline for l in range(self.o.lineages)]
        return UNSPLICED * np.stack(grid).astype(np.float32)

    def _unspliced(self, lineage):
        """What spliced RNA follows: tau s' = u - s holds for exp; the last step for gamma; half way for shift."""
        o = self.o
        if o.kernel == "exp":
            return self.drive(self.t[:, None], lineage)
        if o.kernel == "shift":
            return self.delayed(lineage, self.tau / 2)
        y = self.drive(self.t[:, None], lineage)
        start = y[0] * self.history
        for _ in range(o.shape - 1):
            y = lag(y, self.tau / o.shape, o.t_max / GRID, start)
        return y

    def _atac_grid(self, level):
        """Mean counts of units, the sets of peaks with a common course, and the unit of each peak."""
        o, pk = self.o, self.peaks
        key = np.where(pk.gene < 0, -1, (pk.gene * o.programs + pk.program) * 2 + pk.repressive)
        units, unit_of_peak = np.unique(key, return_inverse=True)
        g, k, mirrored = units // 2 // o.programs, units // 2 % o.programs, units % 2
        grid = np.empty((o.lineages, GRID + 1, len(units)), np.float32)
        for program in range(o.programs):
            at = (units >= 0) & (k == program)
            a = np.stack([self.programs(self.t[:, None], l, program)[:, g[at]] for l in range(o.lineages)])
            top = a.max(axis=(0, 1)) + a.min(axis=(0, 1))
            grid[:, :, at] = np.where(mirrored[at], top - a, a)     # open where the program is closed
        own = units >= 0
        grid[:, :, own] *= level[g[own]] * np.bincount(unit_of_peak, pk.weight, len(units))[own]
        linked, background = (pk.gene >= 0).sum(), (pk.gene < 0).sum()
        total, rest = grid[:, :, own].mean(axis=(0, 1)).sum(), 0.5 * background / linked    # half as open
        grid[:, :, own] *= (o.atac_total / (1 + rest) if o.atac_total else o.counts * o.genes / 400) / total
        grid[:, :, ~own] = rest * grid[:, :, own].mean(axis=(0, 1)).sum()
        return grid, unit_of_peak

    def accessibility(self, time, lineage):
        """Mean ATAC counts of each gene's peaks at the times and lineages of cells (N, G)."""
        return self.at(self.atac_grid, time, lineage) @ self._gene_of_unit()

    def _gene_of_unit(self):
        linked = (self.peaks.gene >= 0).to_numpy()
        pairs = np.unique(np.stack([self.unit_of_peak[linked], self.peaks.gene.to_numpy()[linked]]), axis=1)
        return sp.csr_matrix((np.ones(pairs.shape[1]), pairs), shape=(self.atac_grid.shape[2], self.o.genes))

    def expression(self, time, lineage, tau=None):
        """Noiseless y_g at each cell (N, G); with tau (G,) as if the delays were these, in all lineages."""
        grid = self.rna_grid if tau is None else self.amplitude * self.driven(tau) + self.baseline
        return self.at(grid, time, lineage)

    def at(self, grid, time, lineage):
        """Rows of a grid (L, T, X) at the times and lineages of cells: (N, X)."""
        x = np.clip(np.asarray(time) / self.o.t_max * GRID, 0, GRID)
        i = np.minimum(x.astype(int), GRID - 1)
        f = (x - i)[:, None]
        lineage = np.asarray(lineage)
        return (1 - f) * grid[lineage, i] + f * grid[lineage, i + 1]


def _join(a, b):
    """Two Programs as one, along the last axis."""
    def cat(x, y):
        if isinstance(x, Shapes):
            return Shapes(*(cat(getattr(x, f.name), getattr(y, f.name)) for f in dataclasses.fields(Shapes)))
        return np.concatenate([x, y], axis=-1)

    parts = {f.name: cat(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name != "t_branch"}
    return Programs(**parts, t_branch=a.t_branch)


# --- genome ----------------------------------------------------------------------------------------------------

def chromosomes(o):
    """Genes per chromosome, about 40 each on at most 22."""
    n = int(np.clip(round(o.genes / 40), 1, 22))
    return np.full(n, o.genes // n) + (np.arange(n) < o.genes % n)


def chromosome_of_genes(o):
    """The number of every gene's chromosome, (G,)."""
    per = chromosomes(o)
    return np.repeat(np.arange(len(per)), per)


def gene_table(o):
    """chrom, start, end, strand; gene i has the i-th stretch of `spacing` bp, its TSS near the middle."""
    rng, per, chrom = o.rng("positions"), chromosomes(o), chromosome_of_genes(o)
    block = np.concatenate([np.arange(n) for n in per])
    tss = block * o.spacing + tss_slot(o) * SLOT + SLOT // 2
    length = np.minimum(np.exp(rng.normal(np.log(12_000), 0.7, o.genes)), 0.3 * o.spacing).astype(int)
    plus = rng.random(o.genes) < 0.5
    return pd.DataFrame({"chrom": [f"chr{c + 1}" for c in chrom], "start": np.where(plus, tss, tss - length),
                         "end": np.where(plus, tss + length, tss), "strand": np.where(plus, "+", "-")},
                        index=pd.Index([f"SIM{i + 1:05d}" for i in range(o.genes)], name="gene"))


def tss_slot(o):
    return o.spacing // SLOT // 2


def lay_out_peaks(o):
    """Peaks in genomic order: chrom, start, end, gene (-1 background), role, program, weight, effect, late, repressive.

    Each gene has a promoter and 2 to 4 enhancers within 0.32 spacing (80 kb) of its TSS, or of its neighbour's (far);
    background peaks lie further out, between the genes. weight: a peak's share in the accessibility of its gene,
    effect: its share in the drive; the two differ only with several programs.
    """
    G, rng = o.genes, o.rng("peaks")
    slots, tss = o.spacing // SLOT, tss_slot(o)
    reach = int(0.32 * o.spacing / SLOT)
    offset = np.arange(slots) - tss
    near = (np.abs(offset) <= reach) & (np.abs(offset) >= 1)
    n_enhancers = rng.integers(2, 5, G)
    order = np.argsort(np.where(near, rng.random((G, slots)), 2.0), axis=1)[:, :4]      # distinct random slots
    chosen = np.arange(4) < n_enhancers[:, None]
    gene = np.concatenate([np.arange(G), np.nonzero(chosen)[0]])
    slot = np.concatenate([np.full(G, tss), order[chosen]])
    promoter = np.arange(len(gene)) < G
    weight = rng.gamma(3.0, size=len(gene)) * np.where(promoter, 1.5, 1.0)
    share = weight / np.bincount(gene, weight, G)[gene]
    effect = share
    if o.programs > 1:
        own = o.rng("effects").gamma(2.0, size=len(gene))
        effect = own / np.bincount(gene, own, G)[gene]
    program = np.where(promoter, 0, o.rng("peak programs").integers(o.programs, size=len(gene)))
    table = pd.DataFrame({
        "gene": gene, "slot": slot, "role": np.where(promoter, "promoter", "enhancer"), "program": program,
        "weight": share, "effect": effect, "late": ~promoter & (o.rng("late").random(len(gene)) < o.late),
        "repressive": ~promoter & (o.rng("repressive").random(len(gene)) < o.repressive)})
    table["block"] = table.gene
    move_far(o, table, np.flatnonzero(near))
    table = pd.concat([table, background_peaks(o, len(gene), np.abs(offset) > reach)], ignore_index=True)
    return _place(o, table)


def move_far(o, table, slots):
    """Give a share `far` of the enhancers a free slot of the gene before or after theirs on the chromosome, if any."""
    rng, chrom = o.rng("far"), chromosome_of_genes(o)
    taken = set(zip(table.block, table.slot))
    for row in np.flatnonzero((table.role == "enhancer") & (rng.random(len(table)) < o.far)):
        block = table.gene[row] + rng.choice([-1, 1])
        free = [slot for slot in slots if (block, slot) not in taken]
        if 0 <= block < o.genes and chrom[block] == chrom[table.gene[row]] and free:
            table.loc[row, ["block", "slot"]] = block, rng.choice(free)
            taken.add((block, table.slot[row]))


def background_peaks(o, linked, free):
    """Peaks of no gene; free (slots,): where they may lie in each gene's stretch."""
    n = o.genes if o.peaks is None else o.peaks - linked
    room = o.genes * free.sum()
    if not 0 <= n <= room:
        raise ValueError(f"simulate: peaks={o.peaks}, but {o.genes} genes {o.spacing} bp apart have {linked} peaks of "
                         f"their own and room for {room} more.\n  Give {linked} to {linked + room}, or raise spacing.")
    rng = o.rng("background")
    cell = rng.permutation(room)[:n]
    weight = rng.gamma(2.0, size=n)
    return pd.DataFrame({
        "gene": -1, "slot": np.flatnonzero(free)[cell % free.sum()], "role": "background", "program": 0,
        "weight": weight / max(weight.sum(), 1e-300), "effect": 0.0, "late": False, "repressive": False,
        "block": cell // free.sum()})


def _place(o, table):
    """Slots to positions, rows in genomic order."""
    per = chromosomes(o)
    first = np.concatenate([[0], np.cumsum(per)[:-1]])
    table = table.sort_values(["block", "slot"], ignore_index=True)
    chrom = chromosome_of_genes(o)[table.block]
    width = o.rng("widths").integers(300, 601, len(table))
    start = (table.block - first[chrom]) * o.spacing + table.slot * SLOT + (SLOT - width) // 2
    table.insert(0, "chrom", [f"chr{c + 1}" for c in chrom])
    table.insert(1, "start", start)
    table.insert(2, "end", start + width)
    table.index = pd.Index(table.chrom + ":" + table.start.astype(str) + "-" + table.end.astype(str), name="peak")
    return table.drop(columns=["slot", "block"])


# --- cells -----------------------------------------------------------------------------------------------------

def draw_cells(o, n, sample=0, first=0):
    """Process time, lineage, batch, doublet of n cells; first: number of the first barcode."""
    rng = {name: o.cell_rng(name, sample) for name in ("time", "lineage", "batch", "doublets")}
    lineage = _choose(rng["lineage"].random(n), _lineage_shares(o))
    cells = pd.DataFrame({"time": _times(o, rng["time"].random(n)), "lineage": lineage},
                         index=pd.Index(_barcodes(o, n, first), name="barcode"))
    if o.collection_times:
        hours = np.array(o.collection_times)[rng["time"].integers(len(o.collection_times), size=n)]
        around = hours / o.hours_per_unit + o.asynchrony * rng["time"].standard_normal(n)
        cells["time"], cells["time_h"] = np.clip(around, 0, o.t_max), hours
    # Size factors of both modalities, though an unpaired cell has counts in one of them only.
    for name in ("rna_size", "atac_size"):
        cells[name] = np.exp(o.size_sd * o.cell_rng(name, sample).standard_normal(n) - 0.5 * o.size_sd**2)
    cells["trunk"] = cells.time < o.t_branch if o.lineages > 1 else False
    cells["batch"] = [f"b{b}" for b in rng["batch"].integers(o.batches, size=n)]
    cells["doublet"] = rng["doublets"].permutation(n) < round(o.doublets * n)
    partner = rng["doublets"].permutation(n)            # the second cell of a doublet is like another cell
    for name in ("time", "lineage"):
        cells[f"second_{name}"] = cells[name].to_numpy()[partner]
    return cells


def _times(o, uniform):
    """Uniform on (0, t_max), or by the inverse of an uneven cumulative density."""
    if not o.uneven:
        return o.t_max * uniform
    x = np.linspace(0, 1, 501)
    rng = o.rng("uneven")
    waves = [np.sin(2 * np.pi * (k * x + rng.random())) for k in (1, 2, 3)]
    log_density = o.uneven * sum(waves)
    density = np.exp(0.5 * (log_density[1:] + log_density[:-1]))
    return o.t_max * np.interp(uniform, np.concatenate([[0], np.cumsum(density)]) / density.sum(), x)


def _lineage_shares(o):
    share = np.exp(o.uneven * o.rng("lineage shares").uniform(-1, 1, o.lineages))
    return share / share.sum()


def _choose(uniform, share):
    return np.minimum(np.searchsorted(np.cumsum(share), uniform, side="right"), len(share) - 1)


def _barcodes(o, n, first):
    """Unique 16-base barcodes: an odd multiple runs through all 4^16 numbers before it repeats."""
    number = (int(o.cell_rng("barcodes").integers(4**16)) + 2654435761 * np.arange(first, first + n)) % 4**16
    digits = (number[:, None] >> (2 * np.arange(16))) & 3
    return [row.tobytes().decode() + "-1" for row in np.frombuffer(b"ACGT", np.uint8)[digits]]


# --- counts ----------------------------------------------------------------------------------------------------

def _rates(pop, grid, cells):
    """(n, X) rates of a block of cells; a doublet is the sum of two cells."""
    rate = pop.at(grid, cells.time, cells.lineage)
    two = np.flatnonzero(cells.doublet)
    if len(two):
        rate[two] += pop.at(grid, cells.second_time.iloc[two], cells.second_lineage.iloc[two])
    return rate


def _batch_folds(o, name, width):
    """(batches, width) fold of every gene or peak in each batch."""
    return np.exp(o.batch_effect * o.cell_rng("batch folds " + name).standard_normal((o.batches, width)))


def count_rna(pop, cells, sample=0, grid=None, name="rna"):
    """CSR counts (N, G)."""
    o = pop.o
    grid = pop.rna_grid if grid is None else grid
    rng, gamma = o.cell_rng(name + " counts", sample), o.cell_rng(name + " noise", sample)
    folds = _batch_folds(o, "rna", o.genes) if o.batches > 1 else None
    soup = grid.mean(axis=(0, 1)) / grid.mean(axis=(0, 1)).sum()
    parts = []
    for at in range(0, len(cells), BLOCK):
        block = cells.iloc[at:at + BLOCK]
        rate = _rates(pop, grid, block)
        if o.noise:
            rate = rate * gamma.gamma(1 / o.noise, o.noise, rate.shape)
        if o.ambient:
            rate = (1 - o.ambient) * rate + o.ambient * rate.sum(1, keepdims=True) * soup
        if folds is not None:
            rate = rate * folds[block.batch.str[1:].astype(int)]
        parts.append(sp.csr_matrix(rng.poisson(rate * block.rna_size.to_numpy()[:, None]).astype(np.float32)))
    return sp.vstack(parts, format="csr")


def count_atac(pop, cells, sample=0):
    """CSR counts (N, P): a Poisson count per unit, dealt to the unit's peaks."""
    o, unit = pop.o, pop.unit_of_peak
    U, P = pop.atac_grid.shape[2], len(unit)
    rng = o.cell_rng("atac counts", sample)
    folds = _batch_folds(o, "atac", P) if o.batches > 1 else np.ones((1, P))
    order = np.argsort(unit, kind="stable")
    weight = (pop.peaks.weight.to_numpy() * folds)[:, order]                    # (batches, P), by unit
    total = np.stack([np.bincount(unit[order], w, U) for w in weight])          # (batches, U)
    plain = np.bincount(unit, pop.peaks.weight.to_numpy(), U)
    ladder = _ladder(weight, total, unit[order])
    parts = []
    for at in range(0, len(cells), BLOCK):
        block = cells.iloc[at:at + BLOCK]
        batch = block.batch.str[1:].astype(int).to_numpy()
        rate = _rates(pop, pop.atac_grid, block) * (total / plain)[batch]
        count = rng.poisson(rate * block.atac_size.to_numpy()[:, None])
        row, col = np.nonzero(count)
        row, col = (np.repeat(v, count[row, col]) for v in (row, col))
        rung = np.searchsorted(ladder, batch[row] * U + col + rng.random(len(row)), side="right")
        peak = order[rung % P]
        ones = np.ones(len(row), np.float32)
        parts.append(sp.coo_matrix((ones, (row, peak)), shape=(len(block), P)).tocsr())
    counts = sp.vstack(parts, format="csr")
    counts.sum_duplicates()
    return counts


def _ladder(weight, total, unit):
    """(batches * P,) rising: unit number + cumulative share in the unit, one batch after another."""
    P, U = weight.shape[1], total.shape[1]
    rungs = []
    for b, w in enumerate(weight):
        cum = np.cumsum(w)
        last = np.append(unit[1:] != unit[:-1], True)
        before = np.concatenate([[0], cum[last][:-1]])
        share = (cum - before[unit]) / total[b, unit]
        share[last] = 1.0                               # rounding must not deal a count to the next unit
        rungs.append(b * U + unit + np.minimum(share, 1.0))
    assert len(rungs[0]) == P
    return np.concatenate(rungs)


# --- sequences -------------------------------------------------------------------------------------------------

def make_genome(pop):
    """chromosome -> bases (uint8): random, with motifs in the peaks. Peaks of like programs share a motif."""
    o, pk = pop.o, pop.peaks
    rng, bases = o.rng("genome"), np.frombuffer(b"ACGT", np.uint8)
    genome = {f"chr{c + 1}": bases[rng.integers(4, size=n * o.spacing, dtype=np.uint8)]
              for c, n in enumerate(chromosomes(o))}
    modules = module_of_programs(pop)
    motifs = bases[o.rng("motifs").integers(4, size=(modules.max() + 1, MOTIF))]
    for chrom, start, end, gene, program in zip(pk.chrom, pk.start, pk.end, pk.gene, pk.program):
        if gene >= 0:
            for s in start + (end - start - MOTIF) * (np.arange(COPIES) + rng.random(COPIES)) // COPIES:
                genome[chrom][int(s):int(s) + MOTIF] = motifs[modules[gene, program]]
    return genome


def module_of_programs(pop):
    """(G, K): 0 flat; 1 to 8 shared, by shape and early or late; 9 + 2 l (+ 1) where lineage l's part leads."""
    pr, o = pop.programs, pop.o
    module = 1 + 4 * pr.shared.pulse + 2 * pr.shared.down + (pr.shared.c1 < 0.4 * o.t_max)
    module = np.where(pr.u > 0.5, 9 + 2 * pr.on.argmax(axis=0) + pr.begins_open, module)
    return np.where(pr.flat, 0, module)


# --- the whole -----------------------------------------------------------------------------------------------

def simulate(cells=3000, genes=400, lineages=3, kernel="exp", depth="deep", seed=0, **options):
    """A data set with known delays. Further options are the fields of Options."""
    known = [f.name for f in dataclasses.fields(Options)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"simulate: no option {name}" + (f"; did you mean {near[0]}?" if near else ""))
    o = Options(cells, genes, lineages, kernel, depth, seed, **options)
    pop = Population(o)
    genes_table = gene_table(o)
    paired = draw_cells(o, o.cells)
    sim = Simulation(rna=_rna(pop, paired, genes_table), atac=_atac(pop, paired), cells=_truth_of(o, paired),
                     truth=truth_table(pop, genes_table), peaks=peak_truth(pop, genes_table), population=pop)
    if o.unpaired:
        alone = [draw_cells(o, o.unpaired, s, o.cells + (s - 1) * o.unpaired) for s in (1, 2)]
        sim.unpaired_rna, sim.unpaired_atac = _rna(pop, alone[0], genes_table, 1), _atac(pop, alone[1], 2)
        sim.unpaired_cells = pd.concat([_truth_of(o, c).assign(sample=s) for c, s in zip(alone, ("rna", "atac"))])
    if o.sequences:
        sim.genome = make_genome(pop)
    return sim


def _visible(o, cells):
    """What a user's file would say about its cells."""
    names = ["batch"] * (o.batches > 1) + ["time_h"] * bool(o.collection_times)
    return cells[names].copy()


def _truth_of(o, cells):
    return cells if o.doublets else cells.drop(columns=["second_time", "second_lineage"])


def _rna(pop, cells, genes_table, sample=0):
    import anndata
    data = anndata.AnnData(count_rna(pop, cells, sample), obs=_visible(pop.o, cells), var=genes_table.copy())
    if pop.o.splicing:
        data.layers["spliced"] = data.X.copy()
        data.layers["unspliced"] = count_rna(pop, cells, sample, pop.unspliced_grid(), "unspliced")
    return data


def _atac(pop, cells, sample=0):
    import anndata
    return anndata.AnnData(count_atac(pop, cells, sample), obs=_visible(pop.o, cells),
                           var=pop.peaks[["chrom", "start", "end"]].copy())


def truth_table(pop, genes_table):
    """What is planted in each gene."""
    o = pop.o
    table = genes_table.assign(
        tau=np.where(pop.unlinked, np.nan, pop.tau), has_link=~pop.unlinked, changes=~pop.flat, kernel=o.kernel,
        amplitude=pop.amplitude, baseline=pop.baseline, rna_mean=pop.rna_grid.mean(axis=(0, 1)),
        atac_mean=pop.atac_grid.mean(axis=(0, 1)) @ pop._gene_of_unit(),
        specific=pop.programs.u[:, 0] * ~pop.flat)
    if o.late:                          # mean delay from opening to expression, late enhancers included
        table["tau_effective"] = table.tau + o.late_by * pop.weight[1].sum(axis=1)
    if pop.tau_lineage is not None:
        for l, tau in enumerate(pop.tau_lineage):
            table[f"tau_lineage_{l}"] = np.where(pop.unlinked, np.nan, tau)
    if o.collection_times:
        table["tau_h"] = table.tau * o.hours_per_unit
    first = ["tau", "has_link", "changes", "amplitude"]
    return table[first + [c for c in table.columns if c not in first]]


def peak_truth(pop, genes_table):
    names = np.append(genes_table.index.to_numpy(), "")
    return pop.peaks.assign(gene=names[pop.peaks.gene])     # gene -1, background, takes the last: no name


def write(sim, out):
    """Write the data set into folder out, each file whole or not at all. Returns the paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = {"rna.h5ad": sim.rna, "atac.h5ad": sim.atac, "unpaired_rna.h5ad": sim.unpaired_rna,
             "unpaired_atac.h5ad": sim.unpaired_atac, "truth.csv": sim.truth, "cells_truth.csv": sim.cells,
             "peaks_truth.csv": sim.peaks, "unpaired_truth.csv": sim.unpaired_cells, "genome.fa": sim.genome}
    paths = []
    for name, content in files.items():
        if content is None:
            continue
        tmp = out / (name + ".tmp")
        if name.endswith(".h5ad"):
            content.write_h5ad(tmp, compression="lzf")
        elif name.endswith(".csv"):
            content.to_csv(tmp)
        else:
            write_fasta(content, tmp)
        os.replace(tmp, out / name)
        paths.append(out / name)
    return paths


def read_truth(file):
    """Planted delays: a table of genes with tau, and changes and has_link, true where the file has no such column."""
    truth = pd.read_csv(file, index_col=0)
    if "tau" not in truth:
        raise ValueError(f"{file} has no column tau.\n"
                         "  The truth is a .csv: genes in the first column, their delays in tau.")
    return truth.assign(**{name: truth.get(name, True) for name in ("changes", "has_link")})


def write_fasta(genome, path, width=60):
    with open(path, "wb") as f:
        for chrom, bases in genome.items():
            f.write(f">{chrom}\n".encode())
            whole = len(bases) // width * width
            lines = np.full((whole // width, width + 1), ord("\n"), np.uint8)
            lines[:, :width] = bases[:whole].reshape(-1, width)
            f.write(lines.tobytes())
            if whole < len(bases):
                f.write(bases[whole:].tobytes() + b"\n")


def _arguments():
    """Command-line flags from the fields of Options."""
    flags = {}
    for f in dataclasses.fields(Options):
        text = f.metadata["help"] + ("" if f.default in (None, False, ()) else f" ({f.default})")
        flag = "--" + f.name.replace("_", "-")
        kind = {"cells": int, "cell_seed": int, "peaks": int, "spacing": int, "atac_total": float, "rna_total": float,
                "collection_times": _hours}.get(f.name, type(f.default))
        flags[flag] = dict(help=text, dest=f.name, default=None)
        flags[flag] |= dict(action="store_true") if f.default is False else dict(type=kind, metavar=f.name.upper())
    return flags


def _hours(text):
    return tuple(float(h) for h in text.split(","))


def main(argv=None):
    args = config.from_args(__doc__, argv, _arguments())
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Options)}
    options = {"seed": config.SEED} | {name: value for name, value in given.items() if value is not None}
    sim = simulate(**options)
    write(sim, config.OUT_DIR)
    use = sim.truth[sim.truth.changes & sim.truth.has_link]
    print(f"simulate: {sim.rna.n_obs} cells, {sim.rna.n_vars} genes, {sim.atac.n_vars} peaks, "
          f"{sim.rna.X.sum(1).mean():.0f} RNA and {sim.atac.X.sum(1).mean():.0f} ATAC counts a cell, "
          f"{len(use)} genes with a visible delay of {use.tau.min():.2f} to {use.tau.max():.2f} time units "
          f"-> {config.OUT_DIR}")


if __name__ == "__main__":
    config.script(main)
