"""Delays planted in simulated data against their estimates: Effendi, its controls, and its rivals.

    Spearman    of estimated and planted log tau, over genes whose accessibility changes and drives expression
    error       RMSE of log tau after the gauge: the mean difference over those genes is taken away
    coverage    share of planted log tau, in the gauge, inside the nominal 90 % interval; width in log tau
    gate        whether the run says that tau means something; identifiable: share of genes marked so

Data come from simulate.py (sizes "second", "switches", "stages": from second_population.py) and go through the
functions of Stage 0: choice of peaks, LSI, gene accessibility, gene embeddings. Rows:

    default             both stages with the settings of config.py, the gate, and `identifiable`
    intervals           default, and --replicates refits on resampled cells behind its intervals
    specification       OBJECTIVE "specification": train_vf.fit and train_delay.fit, --spec-epochs
    still               v = 0: the likelihood of a path that does not move, on the grid of log tau
    shuffled_pairs      each cell's RNA given to another cell; one member, 500 steps and 12 epochs, planted kernel
                        given, unless --full-controls
    shuffled_genes      each gene's accessibility given to another gene, embeddings included; the same settings
    untrained           default's E-step with AlignMLP, readout and field as they are initialised
    dpt_xcorr, dpt_half     scanpy's diffusion pseudotime from the true root, then the lag of the largest
                        correlation, or the gap between half-maximum times, of accessibility and expression
    dpt_xcorr_lineages  dpt_xcorr, told the true lineages as well
    rna_half            half-maximum time of RNA along that pseudotime: no ATAC at all
    oracle              told time, lineage, size factors and kernel: the posterior given these (oracle_posterior.py)
    true_time           told time, lineage and kernel: smooth accessibility, its lag, likelihood of log tau
    multivelo           MultiVelo 0.1.5 in an environment of its own, on spliced and unspliced counts

Every finished (data set, row) is a line of OUT/results.jsonl and is not done again, unless it failed; estimates and
refits lie in OUT/estimates. `code` in a line is a hash of the files that fit, --redo does again what others did.
seconds is wall-clock, of the fit alone in default and the shuffled rows; cpu_seconds what the process itself used,
since cores may be shared; mib the peak resident memory of the process during the row, about 500 MiB of libraries
and the data included. One thread, one process; with --processes 2 members are fitted side by side.

Run     python benchmarks/known_truth.py --seeds 100-104                        3 lineages, 3,000 cells, 400 genes
        python benchmarks/known_truth.py --seeds 100-101 --sizes few,one,genes,cells --rows default,true_time
        python benchmarks/known_truth.py --seeds 100-104 --sizes second,switches,stages
        python benchmarks/known_truth.py --seeds 100-101 --rows intervals --replicates 10
        python benchmarks/known_truth.py --seeds 100 --rows multivelo --multivelo
        python benchmarks/known_truth.py --table                                the table and docs/known_truth.png
        A data set of the first command takes about 150 CPU seconds (default 38 and as much for its halves and what
        is identifiable, a shuffled row 30, the rivals 10) and 0.6 to 1.1 GiB; a refit 9 CPU seconds.
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import oracle_posterior  # noqa: E402
import pandas as pd  # noqa: E402
import second_population  # noqa: E402
import torch  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import anchored  # noqa: E402
import chromatin  # noqa: E402
import config  # noqa: E402
import delay_fit  # noqa: E402
import effendi_loader  # noqa: E402
import inference  # noqa: E402
import linear_encoder  # noqa: E402
import precompute_embeddings  # noqa: E402
import simulate  # noqa: E402
import train_delay  # noqa: E402
import train_vf  # noqa: E402
from align_mlp import AlignMLP  # noqa: E402
from vector_field import EffendiVectorField  # noqa: E402

SIZES = {"main": {}, "few": dict(cells=1000), "one": dict(lineages=1), "genes": dict(genes=1000),
         "cells": dict(cells=6000), "second": dict(simulator=second_population.population),
         "switches": dict(simulator=partial(second_population.population, courses=second_population.one_switch)),
         "stages": dict(simulator=partial(second_population.population, courses=second_population.stages))}
SIZE_NAMES = {"main": "3 lineages, 3,000 cells, 400 genes", "few": "1,000 cells", "one": "one lineage",
              "genes": "1,000 genes", "cells": "6,000 cells", "second": "second generator",
              "switches": "second generator, one switch a gene", "stages": "second generator, stages"}
FITS = ("chromatin.py", "delay_fit.py", "anchored.py")
STEP = 0.05                                 # of the grid on which courses along time are kept
WIDTHS = (0.1, 0.16, 0.25, 0.4, 0.65)       # bandwidths tried for them, time units, held-out cells choose
LAST_LAG = 3.0                              # longest lag that cross-correlation tries
MULTIVELO_CELLS, MULTIVELO_GENES = 500, 30


# --- data -------------------------------------------------------------------------------------------------------

@dataclass
class Data:
    x: np.ndarray               # (N, 256) LSI
    access: np.ndarray          # (N, G) accessibility of the genes
    counts: np.ndarray          # (N, G)
    emb: np.ndarray             # (G, 512)
    z_R: np.ndarray             # (N, 512) PCA of expression
    truth: pd.DataFrame         # of the G genes
    cells: pd.DataFrame
    options: simulate.Options
    atac_depth: np.ndarray      # (N,)
    peaks: chromatin.Peaks       # of the G genes
    peak: np.ndarray            # (C,) numbers of the peaks in the simulation, -1 several

    @property
    def used(self):
        return (self.truth.changes & self.truth.has_link).to_numpy()


def name_of(size, depth, kernel, seed):
    return f"{size}-{depth}-{kernel}-{seed}"


def make(size, depth, kernel, seed, level=True, **options):
    options = dict(SIZES[size], **options)
    sim = options.pop("simulator", simulate.simulate)(depth=depth, kernel=kernel, seed=seed, **options)
    if level and sim.population.o.batches > 1:              # as with BATCH=batch
        level_batches(sim)
    rna, peaks = sim.rna.X, sim.atac.var
    kept = np.asarray((rna > 0).sum(0)).ravel() >= config.MIN_GENE_CELLS
    with contextlib.redirect_stdout(io.StringIO()):
        n_cells = np.asarray((sim.atac.X > 0).sum(0)).ravel()
        chosen, _ = precompute_embeddings.choose_peaks(peaks, n_cells, len(sim.cells))
    opened = sim.atac.X[:, chosen]
    lsi = linear_encoder.fit_lsi(lambda: [opened], list(peaks.index[chosen]), precompute_embeddings.RANK)
    weights = effendi_loader.gene_peak_weights(peaks, sim.rna.var[kept], config.GENE_WINDOW, config.GENE_DECAY)
    access = (sim.atac.X @ weights).tocsr()
    near, gene, peak = effendi_loader.peaks_of_genes(weights, np.asarray(sim.atac.X.sum(0)).ravel(),
                                                  config.PEAKS_PER_GENE)
    atac_depth = np.asarray(sim.atac.X.sum(1)).ravel()
    counts = rna[:, kept]
    z_R, _ = pca(counts, np.asarray(counts.sum(1)).ravel())
    return Data(linear_encoder.pad(linear_encoder.lsi_transform(opened, lsi), config.HYENADNA_D_MODEL),
                access.toarray().astype(np.float32), counts.toarray(), gene_embeddings(counts, access, atac_depth),
                linear_encoder.pad(z_R, config.DIM), sim.truth[kept], sim.cells, sim.population.o, atac_depth,
                chromatin.Peaks((sim.atac.X @ near).tocsr(), gene), peak), sim


def level_batches(sim):
    """Thin both count matrices as Stage 0 does when it is told the batches."""
    batch = pd.factorize(sim.cells.batch)[0]
    for data in (sim.rna, sim.atac):
        totals = np.stack([np.asarray(data.X[batch == b].sum(0)).ravel() for b in range(batch.max() + 1)])
        data.X = effendi_loader.thin(data.X, effendi_loader.batch_shares(totals), batch, list(data.obs_names))


def pca(counts, depth):
    """Scores (N, k) and the loadings of the genes (G, k)."""
    encoder = linear_encoder.fit_pca(lambda: [(counts, depth)], range(counts.shape[1]), float(np.median(depth)),
                                     precompute_embeddings.RANK)
    z = linear_encoder.pca_transform(counts, depth, encoder)
    return z, linear_encoder.pca_gene_loadings(lambda: [(counts, depth)], z, encoder)


def gene_embeddings(counts, access, atac_depth):
    rna_depth = np.asarray(counts.sum(1)).ravel()
    return precompute_embeddings.gene_embeddings(pca(counts, rna_depth)[1], pca(access, atac_depth)[1])


# --- Effendi and its controls -----------------------------------------------------------------------------------

def tensors(data, pairs=None, genes=None):
    """The data of anchored.fit, with cells' RNA or genes' chromatin exchanged where given."""
    access, emb, peaks = data.access, data.emb, data.peaks
    if genes is not None:
        import scipy.sparse as sp
        access = access[:, genes]
        emb = gene_embeddings(sp.csr_matrix(data.counts), sp.csr_matrix(access), data.atac_depth)
        peaks = chromatin.Peaks(peaks.counts, np.argsort(genes)[peaks.gene])
    counts = data.counts if pairs is None else data.counts[pairs]
    return anchored.as_data(data.x, access, counts, emb, peaks=peaks if config.PEAKS_PER_GENE else None)


def fitted(data, processes, quick=False, pairs=None, genes=None):
    """Both stages as the pipeline runs them, then the halves, the gate and what is identifiable.

    quick: the planted kernel given, one member, 500 steps and 12 epochs, in the halves too.
    """
    seed, cells = data.options.seed, tensors(data, pairs, genes)
    settings = dict(kernel=config.KERNEL, members=config.MEMBERS, steps=config.ANCHOR_STEPS, epochs=config.EM_EPOCHS)
    of_halves = {}                                          # their own defaults, as in train_delay.py
    if quick:
        of_halves = dict(members=1, steps=500, epochs=12)
        settings = dict(of_halves, kernel=data.options.kernel)
    start, cpu = time.time(), time.process_time()
    result = anchored.fit(**cells, rng=anchored.generator(seed, "fit"), **settings, processes=processes)
    seconds, cpu = time.time() - start, time.process_time() - cpu
    rng = anchored.generator(seed, "halves")
    halves = anchored.split_half(**cells, rng=rng, kernel=result.kernel, **of_halves, processes=processes)
    gate = anchored.gate(result, halves)
    ok, _ = anchored.identifiable(result, cells["access"], cells["counts"], halves)
    return dict(log_tau=result.log_tau, sd=result.sd, ok=ok, kernel_found=result.kernel, gate_open=gate.open,
                pairing_z=gate.pairing_z, gain_z=gate.gain_z, differ_z=gate.differ_z, own_z=gate.own_z,
                split_half=gate.split_half, seconds=seconds, cpu_seconds=cpu)


def default(data, args):
    return fitted(data, args.processes)


def shuffled_pairs(data, args):
    rng = np.random.default_rng(data.options.seed)
    return fitted(data, args.processes, not args.full_controls, pairs=rng.permutation(len(data.counts)))


def shuffled_genes(data, args):
    rng = np.random.default_rng(data.options.seed)
    return fitted(data, args.processes, not args.full_controls, genes=rng.permutation(len(data.truth)))


def intervals(data, args):
    """Default's estimate with the posterior's and the bootstrap's spread; refits are kept one by one."""
    name = name_of(args.size, args.depth, args.kernel, data.options.seed)
    file = args.out / "estimates" / f"{name}.default.npz"
    if not file.exists():
        return None                                         # run the row `default` first
    first = np.load(file)
    cells, refits = tensors(data), []
    for r in range(args.replicates):
        kept = file.with_name(f"{name}.refit{r}.npy")
        if not kept.exists() or kept.stat().st_mtime < file.stat().st_mtime:
            log_tau = anchored.bootstrap_replicate(cells, train_delay.bootstrap_seed(data.options.seed, r),
                                                   str(first["kernel_found"]))
            np.save(kept, log_tau.numpy())
        refits.append(np.load(kept))
    log_tau, sd = torch.tensor(first["log_tau"]), torch.tensor(first["sd"])
    low, high = anchored.intervals(log_tau, sd, np.stack(refits))
    alone = coverage(data, *anchored.intervals(log_tau, sd), first["log_tau"])
    return dict(log_tau=log_tau, low=low, high=high, ok=torch.tensor(first["ok"]), posterior_coverage=alone[0],
                posterior_width=alone[1], note=f"{args.replicates} refits")


def still(data, args):
    """Zero field: all states of a path are equal, so that log tau leaves the likelihood as it is."""
    cells = tensors(data)
    anchor = chromatin.fit_anchor(cells["x"], cells["access"], cells["gene_emb"],
                                 anchored.generator(data.options.seed, "anchor"))
    counts = cells["counts"]
    depth, mean = chromatin.size_factors(counts)
    states = anchor.z.expand(len(delay_fit.TIMES), *anchor.z.shape)
    like, _, _ = delay_fit.grid_likelihood(states, anchor.readout, counts, depth, mean, args.kernel)
    flat = (like.max(1).values - like.min(1).values).max().item()
    log_tau = delay_fit.posterior(like, torch.zeros(len(like)), 1.0)[1]
    if flat < 0.5:
        log_tau = torch.zeros_like(log_tau)
    return dict(log_tau=log_tau, note=f"likelihood flat in log tau: changes by {flat:.2g} nats at most")


def untrained(data, args):
    x, counts, emb = (tensors(data)[name] for name in ("x", "counts", "gene_emb"))
    torch.manual_seed(data.options.seed)
    align, field = AlignMLP(x.shape[1], chromatin.LATENT, 128).eval(), EffendiVectorField(chromatin.LATENT, 128)
    field.settle()
    readout = chromatin.GeneReadout(emb).requires_grad_(False)
    depth, mean = chromatin.size_factors(counts)
    with torch.no_grad():
        states = delay_fit.path(field.eval(), align((x - x.mean(0)) / x.std(0).max()), delay_fit.TIMES)
    like, _, _ = delay_fit.grid_likelihood(states, readout, counts, depth, mean, args.kernel)
    return dict(log_tau=delay_fit.posterior(like, torch.zeros(len(like)), 1.0)[1])


def specification(data, args):
    """OBJECTIVE "specification"; tau is the mean over cells of what AmortizedTau says."""
    import scipy.sparse as sp
    config.VF_EPOCHS, config.STAGE1_EPOCHS, config.STAGE2_EPOCHS = args.spec_epochs
    seed, barcodes, cpu, emb = data.options.seed, data.cells.index, torch.device("cpu"), data.emb.astype(np.float32)
    with contextlib.redirect_stdout(io.StringIO()):
        first, _ = train_vf.fit(data.x, data.z_R, cpu, seed)
        paired = dict(z_atac=data.x, z_R=data.z_R, counts=sp.csr_matrix(data.counts), depth=data.counts.sum(1),
                      gene_emb=emb, cells=barcodes, held_out=train_delay.held_out_cells(barcodes))
        model, _ = train_delay.fit(paired, first.align.state_dict(), first.field.state_dict(), cpu, seed)
        tau = inference.predict(model, data.x, emb, cpu)["tau"].mean(0)
    return dict(log_tau=np.log(tau), note="epochs {}, {} + {}; tau {:.3f} to {:.3f}".format(
        *args.spec_epochs, tau.min(), tau.max()))


# --- courses along a time ---------------------------------------------------------------------------------------

def course(time_, lineage, shared, counts, width, t_max):
    """Local-linear rate of counts along time in every lineage, (L, T, G); shared cells belong to all lineages."""
    grid, depth = np.arange(0, t_max + STEP / 2, STEP), counts.sum(1) / counts.sum(1).mean()
    out = []
    for l in range(lineage.max() + 1):
        rows = (lineage == l) | shared
        gap = time_[rows] - grid[:, None]
        w = np.exp(-0.5 * (gap / width) ** 2)
        ws = w * depth[rows]
        s0, s1, s2 = ((ws * gap**k).sum(1)[:, None] for k in range(3))
        y0, y1 = w @ counts[rows], (w * gap) @ counts[rows]
        # A point with no cell around it keeps the plain mean of the few there are.
        det = s0 * s2 - s1**2
        rate = np.where(det > 1e-3 * s0 * s2 + 1e-9, (s2 * y0 - s1 * y1) / np.maximum(det, 1e-12), y0 / (s0 + 1e-12))
        out.append(rate)
    mean = counts.mean(0)
    return np.maximum(np.stack(out), 0.02 * mean)


def at_cells(values, time_, lineage):
    """(L, T, G) at the times and lineages of cells (N, G)."""
    x = np.clip(time_ / STEP, 0, values.shape[1] - 1)
    i = np.minimum(x.astype(int), values.shape[1] - 2)
    f = (x - i)[:, None]
    return (1 - f) * values[lineage, i] + f * values[lineage, i + 1]


def smooth_course(time_, lineage, shared, counts, t_max):
    """course() at the bandwidth that predicts the other half of the cells best, chosen for every gene."""
    depth = counts.sum(1) / counts.sum(1).mean()
    loss = np.zeros((len(WIDTHS), counts.shape[1]))
    for fold in (0, 1):
        own, other = (np.arange(len(time_)) % 2 == h for h in (fold, 1 - fold))
        for i, width in enumerate(WIDTHS):
            rate = course(time_[own], lineage[own], shared[own], counts[own], width, t_max)
            m = depth[other, None] * np.maximum(at_cells(rate, time_[other], lineage[other]), 1e-9)
            loss[i] += (m - counts[other] * np.log(m)).sum(0)
    best, out = loss.argmin(0), None
    for i in np.unique(best):
        rate = course(time_, lineage, shared, counts, WIDTHS[i], t_max)
        out = rate if out is None else np.where(best == i, rate, out)
    return out


def lagged(drive, tau, kernel, shape):
    """The drive (L, T, G) after one delay tau for all genes; before time 0 as at 0."""
    L, T, G = drive.shape
    if kernel == "shift":
        x = np.maximum(np.arange(T) - tau / STEP, 0)
        i = np.minimum(x.astype(int), T - 2)
        f = (x - i)[:, None]
        return (1 - f) * drive[:, i] + f * drive[:, i + 1]
    y = drive.transpose(1, 0, 2).reshape(T, L * G)
    steps = shape if kernel == "gamma" else 1
    for _ in range(steps):
        y = simulate.lag(y, tau / steps, STEP)
    return y.reshape(T, L, G).transpose(1, 0, 2)


def oracle(data, args):
    """oracle_posterior.py, and the posterior's own intervals."""
    log_tau, sd = oracle_posterior.log_tau(data, args.kernel)
    half = 1.645 * sd                                       # a normal distribution's central 90 %
    return dict(log_tau=log_tau, low=log_tau - half, high=log_tau + half)


def true_time(data, args):
    """Accessibility smoothed along the true time of each lineage, and Effendi's own E-step on its lags."""
    o, cells = data.options, data.cells
    time_, lineage = cells.time.to_numpy(), cells.lineage.to_numpy()
    drive = smooth_course(time_, lineage, cells.trunk.to_numpy(), data.access.astype(float), o.t_max)
    drive = drive / drive.mean((0, 1))
    y = torch.as_tensor(data.counts, dtype=torch.float64)
    depth, mean = chromatin.size_factors(y)
    exposure = depth[:, None] * mean
    like = []
    for u in delay_fit.LOG_TAU.tolist():
        f = torch.as_tensor(at_cells(lagged(drive, np.exp(u), o.kernel, o.shape), time_, lineage))
        guess = 0.8 * f + 0.2
        w, wy = exposure / guess, y / guess
        a, b = delay_fit.bounded_least_squares((w * f * f).sum(0), (w * f).sum(0), (wy * f).sum(0), w.sum(0), wy.sum(0))
        m = a * f + b
        like.append((y * m.log() - exposure * m).sum(0))
    like, centre = torch.stack(like, 1).float(), torch.tensor(0.0)
    for _ in range(5):                                      # the prior's mean is that of the genes
        log_tau, sd = delay_fit.posterior(like, centre.expand(len(like)), 1.0)[1:]
        centre = delay_fit.gauge(log_tau, sd, centre)
    low, high = anchored.intervals(log_tau, sd)
    return dict(log_tau=log_tau, low=low, high=high)


# --- diffusion pseudotime ------------------------------------------------------------------------------------------

def pseudotime(data):
    """scanpy's diffusion pseudotime of the RNA from the earliest cell, as even ranks over (0, t_max)."""
    import anndata
    import scanpy as sc
    cells = anndata.AnnData(data.counts.copy())
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=min(30, cells.n_vars - 1))
    sc.pp.neighbors(cells, n_neighbors=15)
    sc.tl.diffmap(cells)
    cells.uns["iroot"] = int(data.cells.time.to_numpy().argmin())
    sc.tl.dpt(cells)
    rank = cells.obs["dpt_pseudotime"].rank().to_numpy()
    return data.options.t_max * (rank - 0.5) / len(rank)


def courses(data, args, lineages=False):
    """Courses (L, T, G) of accessibility and expression along diffusion pseudotime, made once per data set."""
    if not hasattr(data, "dpt"):
        data.dpt, data.courses = pseudotime(data), {}
    if lineages not in data.courses:
        lineage, shared = np.zeros(len(data.dpt), int), np.zeros(len(data.dpt), bool)
        if lineages:
            lineage, shared = data.cells.lineage.to_numpy(), data.cells.trunk.to_numpy()
        data.courses[lineages] = [smooth_course(data.dpt, lineage, shared, c.astype(float), data.options.t_max)
                                  for c in (data.access, data.counts)]
    return data.courses[lineages]


def cross_correlation(access, expression):
    """Lag (G,) at which a(t - lag) correlates best with y(t), the vertex of a parabola through the best three."""
    r = []
    for k in range(round(LAST_LAG / STEP) + 1):
        a, y = (v.reshape(-1, v.shape[2]) for v in (access[:, :access.shape[1] - k], expression[:, k:]))
        a, y = a - a.mean(0), y - y.mean(0)
        r.append((a * y).sum(0) / np.sqrt((a**2).sum(0) * (y**2).sum(0) + 1e-20))
    r = np.stack(r)
    best = r.argmax(0)
    i, g = np.clip(best, 1, len(r) - 2), np.arange(r.shape[1])
    bend = r[i - 1, g] - 2 * r[i, g] + r[i + 1, g]
    vertex = 0.5 * (r[i - 1, g] - r[i + 1, g]) / np.where(bend < -1e-12, bend, -np.inf)
    return STEP * np.where(best == i, i + np.clip(vertex, -1, 1), best)


def half_time(values):
    """First time (L, G) at which a course has crossed the middle of its range, from the side where it starts."""
    middle = (values.max(1, keepdims=True) + values.min(1, keepdims=True)) / 2
    above = values > middle
    crossed = above != above[:, :1]
    after = np.where(crossed.any(1), crossed.argmax(1), values.shape[1] - 1)
    l, g = np.indices(after.shape)
    low, high = values[l, after - 1, g], values[l, after, g]
    gap = np.where(high == low, 1, high - low)
    return STEP * (after - 1 + np.clip((middle[:, 0] - low) / gap, 0, 1))


def dpt_xcorr(data, args):
    return dict(log_tau=np.log(cross_correlation(*courses(data, args)) + STEP))


def dpt_xcorr_lineages(data, args):
    return dict(log_tau=np.log(cross_correlation(*courses(data, args, True)) + STEP))


def dpt_half(data, args):
    access, expression = courses(data, args)
    gap = (half_time(expression) - half_time(access))[0]
    return dict(log_tau=gap, note="a gap may be negative: no logarithm, no error")


def rna_half(data, args):
    return dict(log_tau=half_time(courses(data, args)[1])[0], note="a time, not a delay: no error")


# --- MultiVelo -------------------------------------------------------------------------------------------------------

MULTIVELO = ["multivelo==0.1.5", "numpy==1.26.4", "scipy==1.11.4", "pandas==2.1.4", "scanpy==1.9.8",
             "anndata==0.10.5.post1", "scvelo==0.2.5", "matplotlib==3.7.5", "numba==0.59.1", "llvmlite==0.42.0",
             "scikit-learn==1.3.2", "umap-learn==0.5.5", "pynndescent==0.5.11", "h5py==3.10.0", "seaborn==0.13.2",
             "statsmodels==0.14.1", "setuptools<80", *(
                 "tqdm joblib cloudpickle typing-extensions threadpoolctl natsort packaging python-dateutil pytz six "
                 "tzdata patsy array-api-compat networkx session-info stdlib-list loompy numpy-groupies click igraph "
                 "texttable ipywidgets pillow cycler kiwisolver pyparsing contourpy fonttools").split()]
WORKER = """
import sys, warnings
from unittest.mock import MagicMock
warnings.filterwarnings("ignore")
# MultiVelo imports torch for its optional neural networks, which are not used: a stand-in saves the download.
torch = sys.modules["torch"] = MagicMock()
torch.nn.Module = type("Module", (), {"__getattr__": lambda self, name: MagicMock()})
sys.modules["torch.nn"] = torch.nn
import anndata, numpy as np, scanpy as sc, scvelo as scv, multivelo as mv
rna, atac = (anndata.read_h5ad(f) for f in sys.argv[1:3])
for layer in ("spliced", "unspliced"):
    rna.layers[layer] = rna.layers[layer] / rna.obs["factor"].to_numpy()[:, None]
rna.X = np.log1p(rna.layers["spliced"])
sc.pp.pca(rna, n_comps=15)
sc.pp.neighbors(rna, n_neighbors=30, n_pcs=15)
sc.tl.umap(rna)
scv.pp.moments(rna, n_pcs=None, n_neighbors=None)
near = rna.obsp["connectivities"]
atac.layers["Mc"] = np.asarray(near @ atac.X) / np.asarray(near.sum(1))
fit = mv.recover_dynamics_chrom(rna, atac, max_iter=5, init_mode="invert", parallel=False, n_jobs=1)
fit.var.to_csv(sys.argv[3])
"""


def multivelo_python():
    """Python of the environment, made on the first call; ValueError with the reason where it cannot be."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "effendi-multivelo"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *MULTIVELO], text=True,
                              capture_output=True, timeout=600)
        if done.returncode:
            raise ValueError("not installed: " + done.stderr.strip().splitlines()[-1][:200])
        (home / "ready").touch()
    return python


def multivelo(data, args):
    """1 / degradation rate: the mean lag of spliced RNA behind unspliced, which follows chromatin at once here."""
    if not args.multivelo:
        return None
    folder = args.out / "multivelo"
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(folder / n) for n in ("rna.h5ad", "atac.h5ad", "fit.csv")]
    genes = write_multivelo(args, data, *files[:2])
    start = time.time()
    python, log = multivelo_python(), folder / "log.txt"
    try:
        with open(log, "w") as f:
            done = subprocess.run([str(python), "-u", "-c", WORKER, *files], stdout=f, stderr=subprocess.STDOUT,
                                  timeout=args.limit)
    except subprocess.TimeoutExpired:
        fits = log.read_text().count("predicted model")
        raise ValueError(f"not finished in {args.limit} s: {fits} of {len(genes)} genes") from None
    if done.returncode:
        raise ValueError("did not run: " + log.read_text().strip().splitlines()[-1][:200])
    fit = pd.read_csv(files[2], index_col=0).reindex(data.truth.index)
    log_tau = -np.log(fit["fit_gamma"].to_numpy(float))
    return dict(log_tau=log_tau, seconds=time.time() - start,
                note=f"{np.isfinite(log_tau).sum()} of {len(genes)} genes fitted, {len(data.cells):,} cells offered, "
                     f"{MULTIVELO_CELLS:,} used; delay = 1 / degradation rate")


def write_multivelo(args, data, rna_file, atac_file):
    """Cells and genes that change, true size factors taken out of chromatin, at the size MultiVelo can do."""
    import anndata
    _, sim = make(args.size, args.depth, args.kernel, data.options.seed, splicing=True)
    genes = data.truth.index[data.used][:MULTIVELO_GENES]
    rows = np.sort(np.random.default_rng(0).permutation(sim.rna.n_obs)[:MULTIVELO_CELLS])
    rna = sim.rna[rows, genes].copy()
    rna.obs["factor"] = data.cells.rna_size.to_numpy()[rows]
    for layer in ("spliced", "unspliced"):
        rna.layers[layer] = rna.layers[layer].toarray()
    rna.write_h5ad(rna_file)
    level = data.access[rows][:, data.truth.index.get_indexer(genes)] / data.cells.atac_size.to_numpy()[rows, None]
    anndata.AnnData(level, obs=rna.obs[[]], var=rna.var[[]]).write_h5ad(atac_file)
    return genes


# --- scores --------------------------------------------------------------------------------------------------------

ROWS = {f.__name__: f for f in (default, oracle, true_time, dpt_xcorr, dpt_half, dpt_xcorr_lineages, rna_half,
                                shuffled_pairs, shuffled_genes, untrained, still, intervals, specification, multivelo)}
ROW_NAMES = {
    "default": "Effendi, default", "oracle": "oracle: told time, lineage, sizes, kernel",
    "true_time": "told true time and lineage", "dpt_xcorr": "DPT + cross-correlation",
    "dpt_half": "DPT + half-maximum gap", "dpt_xcorr_lineages": "DPT + cross-correlation, told lineages",
    "rna_half": "RNA alone: half-maximum time", "shuffled_pairs": "pairing shuffled", "still": "v = 0",
    "shuffled_genes": "gene labels shuffled", "untrained": "untrained", "intervals": "Effendi, with bootstrap",
    "specification": "as specified", "multivelo": "MultiVelo 0.1.5"}


def rank_correlation(estimate, truth):
    """Spearman, or None where the estimate is one constant."""
    known = np.isfinite(estimate)
    if known.sum() < 5 or np.ptp(estimate[known]) < 1e-9:
        return None
    return float(spearmanr(estimate[known], truth[known])[0])


def coverage(data, low, high, estimate):
    """Share of planted log tau inside (low, high) and mean width, truth moved into the estimate's gauge."""
    used = data.used
    low, high, estimate = (np.asarray(v)[used] for v in (low, high, estimate))
    truth = np.log(data.truth.tau.to_numpy()[used])
    truth = truth - truth.mean() + estimate.mean()
    return float(((low <= truth) & (truth <= high)).mean()), float((high - low).mean())


def score(data, found):
    """The columns of the table, from a row's log tau and what else it returned."""
    used = data.used
    estimate, truth = np.asarray(found["log_tau"], float)[used], np.log(data.truth.tau.to_numpy()[used])
    gap = estimate - truth
    out = dict(spearman=rank_correlation(estimate, truth), rmse=float(np.nanstd(gap)), genes=int(used.sum()))
    if "no error" in found.get("note", ""):
        out["rmse"] = None
    if "low" in found:
        out["coverage"], out["width"] = coverage(data, found["low"], found["high"], found["log_tau"])
    if "ok" in found:
        ok = np.asarray(found["ok"])
        out |= dict(identifiable=float(ok.mean()), identifiable_used=float(ok[used].mean()),
                    identifiable_flat=float(ok[~used].mean()) if (~used).any() else None,
                    spearman_identifiable=rank_correlation(estimate[ok[used]], truth[ok[used]]))
    return out | {k: v for k, v in found.items() if isinstance(v, (str, bool, int, float))}


def measured(row, data, args):
    """score() of one row with seconds and memory; a failure is a result, with its reason."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")       # the high-water mark starts again (Linux)
    torch.set_num_threads(1)                                # scanpy's libraries set it back
    start, cpu = time.time(), time.process_time()
    try:
        found = ROWS[row](data, args)
    except Exception as err:
        traceback.print_exc()
        return dict(failed=f"{type(err).__name__}: {err}"[:300])
    if found is None:
        return None
    seconds = dict(seconds=time.time() - start, cpu_seconds=time.process_time() - cpu)
    keep(row, data, args, found)
    out = seconds | score(data, found)
    return out | dict(mib=peak_mib())


def keep(row, data, args, found):
    file = args.out / "estimates" / f"{name_of(args.size, args.depth, args.kernel, data.options.seed)}.{row}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{k: np.asarray(v) for k, v in found.items()})


def peak_mib():
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return round(int(line.split()[1]) / 1024)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# --- running and showing ---------------------------------------------------------------------------------------------

def read_results(file):
    """One row per finished (data set, row); the later of two lines counts, a torn last line does not."""
    lines = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            one = json.loads(line)
            lines[one["dataset"], one["row"]] = one
    return list(lines.values())


def version(row):
    """A hash of the files that fit."""
    names = (*FITS, "benchmarks/oracle_posterior.py") if row == "oracle" else FITS
    return hashlib.blake2b(b"".join((ROOT / name).read_bytes() for name in names), digest_size=4).hexdigest()


def run(args):
    file = args.out / "results.jsonl"
    code = {row: version(row) for row in args.rows}
    args.out.mkdir(parents=True, exist_ok=True)
    done = {(r["dataset"], r["row"]) for r in read_results(file)
            if "failed" not in r and (not args.redo or r["code"] == code.get(r["row"]))}
    for seed in args.seeds:
        for size in args.sizes:
            for depth in args.depths:
                for kernel in args.kernels:
                    dataset = name_of(size, depth, kernel, seed)
                    todo = [row for row in args.rows if (dataset, row) not in done]
                    if not todo:
                        continue
                    data, _ = make(size, depth, kernel, seed)
                    args.size, args.depth, args.kernel = size, depth, kernel
                    for row in todo:
                        found = measured(row, data, args)
                        if found is None:
                            continue
                        line = dict(dataset=dataset, size=size, depth=depth, kernel=kernel, seed=seed, row=row,
                                    code=code[row], **found)
                        with open(file, "a") as f:
                            f.write(json.dumps(line) + "\n")
                        print(f"{dataset:24} {row:20}" + "  ".join(
                            f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))


def cell(values, digits=2):
    """mean (lowest to highest) of what is there."""
    values = [v for v in values if v is not None and np.isfinite(v)]
    if not values:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")


def frame(results):
    """All columns of the table, whichever rows have been done."""
    table = pd.DataFrame(results)
    for name in ("failed", "note", "gate_open", "coverage", "width", "identifiable_used", "spearman_identifiable",
                 "identifiable_flat", "rmse", "spearman", "posterior_coverage"):
        if name not in table:
            table[name] = None
    closed = table.gate_open.map(lambda v: v is False)      # a closed gate marks no gene, as in train_delay.py
    table.loc[closed, ["identifiable_used", "identifiable_flat"]] = 0.0
    table.loc[closed, "spearman_identifiable"] = None
    table["order"] = table.row.map(list(ROWS).index)
    table["place"] = table["size"].map(list(SIZES).index)
    numbers = ["spearman", "rmse", "coverage", "width", "identifiable_used", "spearman_identifiable", "seconds",
               "cpu_seconds", "mib", "posterior_coverage"]
    for name in numbers:
        table[name] = pd.to_numeric(table[name]) if name in table else np.nan
    return table.sort_values(["place", "depth", "kernel", "order", "seed"], ascending=[True, False, True, True, True])


def print_spearman(table, size):
    part = table[table["size"] == size]
    there = set(zip(part.depth, part.kernel))
    conditions = [(d, k) for d in simulate.DEPTHS for k in simulate.KERNELS if (d, k) in there]
    print(f"\n**{SIZE_NAMES[size]}**: Spearman, mean (range over seeds)\n")
    print("| | " + " | ".join(f"{d}, {k}" for d, k in conditions) + " |\n|---|" + "---|" * len(conditions))
    for row in [row for row in ROWS if row in set(part.row)]:
        own = part[part.row == row]
        texts = []
        for d, k in conditions:
            at = own[(own.depth == d) & (own.kernel == k)]
            texts.append(cell(at.spearman) or ("flat" if len(at) and at.failed.isna().all() else ""))
        print(f"| {ROW_NAMES[row]} | " + " | ".join(texts) + " |")


def print_table(results):
    table = frame(results)
    for size in [s for s in SIZES if s in set(table["size"])]:
        print_spearman(table, size)
    print("\n| size, depth, kernel | row | seeds | RMSE of log tau | 90 % coverage (posterior alone) | width | "
          "identifiable | Spearman among them | gate open | seconds | CPU seconds | MiB |\n|" + "---|" * 12)
    shown = table[~table.row.isin(["dpt_half", "rna_half", "still", "untrained"])]     # nothing but Spearman to tell
    for (size, depth, kernel, row), p in shown.groupby(["size", "depth", "kernel", "row"], sort=False):
        gate = p.gate_open.dropna()
        alone = f" ({p.posterior_coverage.mean():.2f})" if p.posterior_coverage.notna().any() else ""
        means = [cell([p[name].mean()], d) for name, d in (
            ("width", 2), ("identifiable_used", 2), ("spearman_identifiable", 2))]
        costs = [cell([p[name].mean()], 0) for name in ("seconds", "cpu_seconds", "mib")]
        print("| " + " | ".join([f"{size}, {depth}, {kernel}", ROW_NAMES[row], str(len(p)), cell(p.rmse),
                                 cell(p.coverage) + alone, *means, f"{int(gate.sum())} of {len(gate)}" if len(gate)
                                 else "", *costs]) + " |")
    notes = table[table.failed.notna() | table.note.notna()].drop_duplicates("row")
    for _, r in notes.iterrows():
        print(f"{ROW_NAMES[r.row]}: {r.failed if isinstance(r.failed, str) else r.note} ({r.dataset})")
    versions = ", ".join(f"{code} ({n} lines)" for code, n in table.code.value_counts().items())
    print(f"versions of the files that fit: {versions}")


def draw(results, file):
    """Spearman of every row and condition, a point per seed, and of the sizes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    table = frame(results)
    rows = [r for r in ROWS if r in set(table.row[table.spearman.notna()]) and r != "intervals"]
    sizes = [s for s in SIZES if s in set(table["size"])]
    fig, axes = plt.subplots(2, 4, figsize=(15, 8.5), sharex=True, height_ratios=[1.5, 1], layout="constrained")
    compared = ["default", "oracle", "true_time", "dpt_xcorr"]
    for top, below, (depth, kernel) in zip(*axes, [(d, k) for d in ("shallow", "deep") for k in ("exp", "shift")]):
        part = table[(table.depth == depth) & (table.kernel == kernel)]
        title = f"{depth}, {'first-order lag' if kernel == 'exp' else 'pure delay'}"
        draw_points(top, part[part["size"] == "main"], "row", rows, ROW_NAMES, [None], title)
        draw_points(below, part, "size", sizes, SIZE_NAMES, compared, "")
        below.set_xlabel("Spearman of estimated and planted log τ")
    for ax in axes[:, 1:].ravel():
        ax.set_yticklabels([])
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, title="below")
    fig.suptitle("Recovery of planted delays, a point per seed, bar = mean.  "
                 "Above: 3 lineages, 3,000 cells, 400 genes.  Below: other sizes, another generator")
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def draw_points(ax, part, by, levels, names, rows, title):
    """One line of points per level; rows beyond the first are drawn beside it in another colour."""
    for j, row in enumerate(rows):
        for i, level in enumerate(levels):
            own = part[(part[by] == level) & ((part.row == row) if row else True)]
            value = own.spearman.dropna().to_numpy(float)
            y = i + (j - (len(rows) - 1) / 2) * 0.2
            colour = f"C{j}" if row else ("C0" if level == "default" else "C7")
            ax.plot(value, np.full(len(value), y), "o", ms=4, alpha=0.7, color=colour,
                    label=ROW_NAMES[row] if row and i == 0 else None)
            if len(value):
                ax.plot([value.mean()] * 2, [y - 0.1, y + 0.1], color=colour, lw=2)
    ax.axvline(0, color="k", lw=0.5)
    ax.set(title=title, yticks=range(len(levels)), yticklabels=[names[n] for n in levels], xlim=(-0.5, 1),
           xticks=(-0.5, 0, 0.5, 1))
    ax.set_ylim(len(levels) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.3)


def seed_list(text):
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def names(known):
    def parse(text):
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}; give {', '.join(known)}")
        return chosen
    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [r for r in ROWS if r not in ("intervals", "specification", "multivelo")]
    parser.add_argument("--seeds", type=seed_list, default=seed_list("100-104"), help="such as 100-104")
    parser.add_argument("--sizes", type=names(SIZES), default=["main"], help=", ".join(SIZES))
    parser.add_argument("--depths", type=names(simulate.DEPTHS), default=["shallow", "deep"])
    parser.add_argument("--kernels", type=names(simulate.KERNELS), default=["exp", "shift"])
    parser.add_argument("--rows", type=names(ROWS), default=usual, help=", ".join(ROWS))
    parser.add_argument("--replicates", type=int, default=10, help="refits behind the row intervals")
    parser.add_argument("--spec-epochs", type=int, nargs=3, default=[50, 10, 40], help="of Stages 1, 2.1 and 2.2")
    parser.add_argument("--full-controls", action="store_true", help="shuffled rows with the default's settings")
    parser.add_argument("--multivelo", action="store_true", help="install and run MultiVelo for its row")
    parser.add_argument("--limit", type=int, default=1800, help="seconds that MultiVelo may take")
    parser.add_argument("--processes", type=int, default=1, help="for members of a fit; estimates stay the same")
    parser.add_argument("--redo", action="store_true", help="do rows again that another version has done")
    parser.add_argument("--table", action="store_true", help="only print the table and draw the picture")
    parser.add_argument("--out", type=Path, default=ROOT / "effendi_output" / "known_truth")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    if not args.table:
        run(args)
    results = read_results(args.out / "results.jsonl")
    if not results:
        return print(f"no results in {args.out}")
    print_table(results)
    draw(results, ROOT / "docs" / "known_truth.png")


if __name__ == "__main__":
    main()
