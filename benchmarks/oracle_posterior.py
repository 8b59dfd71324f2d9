"""How well delays can be known from simulated cells by who is told everything but each gene's own: their posterior.

Told    time, lineage and size factors of every cell, where lineages part, the kernel
Not     a_g(t, l), a Gaussian process over the tree, mean 1:
            cov = sd^2 k(t, t') (1 - own + own (sqrt((1 - d^2) (1 - d'^2)) + [same lineage] d d'))
            k Gaussian of a width, d = 0 before lineages part and 1 one time unit later
        A, B and tau of every gene, as in delay_fit.grid_evidence
Seen    counts of both modalities, summed over the cells of a lineage that are nearest to a time on a grid of STEP

a is integrated out given the ATAC counts, so that expression helps to find it, as in the default. Width, own and sd are
those under which held-out cells' ATAC is likeliest. Counts are taken as normal with Poisson's variance, genes as
independent, all accessibility near a gene as its own. A fit that is told nothing should not be better, but where data
are otherwise: genes that share courses, overdispersed RNA, courses unlike a Gaussian process.
Ref     Rasmussen & Williams 2006, Gaussian processes for machine learning
"""
import itertools

import numpy as np
import torch

from chromatin import split_cells
from delay_fit import LOG_TAU, evidence_of_courses, kernel_weights, posterior, products

STEP = 0.1                                                  # time units
WIDTHS, OWN, SDS = (0.4, 0.6, 0.9, 1.3), (0.3, 0.6, 0.9), (0.35, 0.5, 0.7, 1.0)
AXES = 40


def log_tau(data, kernel):
    """Posterior mean and sd of log tau (G,) for a known_truth.Data."""
    if kernel == "gamma":
        raise ValueError("delay_fit's gamma kernel has another shape than simulate.py's")
    o, cells = data.options, data.cells
    times = STEP * torch.arange(round(o.t_max / STEP) + 1, dtype=torch.double)
    node = torch.as_tensor(cells.lineage.to_numpy() * len(times) + np.rint(cells.time.to_numpy() / STEP).astype(int))
    n_nodes = o.lineages * len(times)

    def counted(x, size, rows):
        """Counts (J, G) and exposures (J,) of the nodes."""
        x, size = (torch.as_tensor(np.asarray(v)).double()[rows] for v in (x, size))
        return [torch.zeros(n_nodes, *v.shape[1:], dtype=v.dtype).index_add(0, node[rows], v) for v in (x, size)]
    fitted, out = split_cells(len(node), 0.2, torch.Generator().manual_seed(o.seed))
    atac = [counted(data.access, cells.atac_size, rows) for rows in (fitted, out)]

    def held_out(basis):
        course, (counts, exposure) = smooth(*atac[0], basis)[0], atac[1]
        expected = exposure[:, None] * (atac[0][0].sum(0) / atac[0][1].sum()) * course
        return (counts * expected.clamp_min(1e-12).log() - expected).sum()
    bases = (axes(times, o, *choice) for choice in itertools.product(WIDTHS, OWN, SDS))
    basis = max(bases, key=held_out)

    every = torch.arange(len(node))
    course, precision, pull = smooth(*counted(data.access, cells.atac_size, every), basis)
    counts, exposure = counted(data.counts, cells.rna_size, every)
    mean = counts.sum(0) / exposure.sum()
    lags = torch.stack([torch.block_diag(*[lag] * o.lineages) for lag in operators(times, kernel)])     # (U, J, J)
    now = (0.8 * lags[len(lags) // 2] @ course + 0.2).clamp_min(0.05)
    flat = torch.ones(n_nodes, len(mean), dtype=torch.double)                  # a lag leaves the prior mean as it is
    evidence = evidence_of_courses(((flat, lag @ basis) for lag in lags), mean * exposure[:, None] / now, counts / now,
                                   precision, pull, torch.zeros(len(mean)), 1.0)
    return posterior(evidence, torch.zeros(len(mean)), 1.0)[1:]


def axes(times, o, width, own, sd):
    """The leading axes (J, AXES) of the process over the tree."""
    t = times.repeat(o.lineages)
    lineage = torch.arange(o.lineages).repeat_interleave(len(times))
    apart = (t - o.t_branch).clamp(0, 1)
    common = (1 - apart.square()).sqrt()
    alike = common[:, None] * common + (lineage[:, None] == lineage) * apart[:, None] * apart
    covariance = torch.exp(-0.5 * ((t[:, None] - t) / width).square()) * (1 - own + own * alike)
    value, axis = torch.linalg.eigh(covariance)
    return sd * (axis * value.clamp_min(0).sqrt())[:, -AXES:]


def smooth(counts, exposure, basis, rounds=4):
    """Courses 1 + basis c (J, G) of the posterior mean; precision (G, R, R) and pull (G, R) of c."""
    expected = exposure[:, None] * (counts.sum(0) / exposure.sum()).clamp_min(1e-6)
    course = torch.ones_like(counts)
    for _ in range(rounds):                                 # the variance of counts is that of the course found before
        weight = expected / course
        precision = (weight.T @ products(basis)).view(-1, *[basis.shape[1]] * 2) + torch.eye(basis.shape[1])
        pull = (counts / course - weight).T @ basis
        course = (1 + basis @ torch.linalg.solve(precision, pull).T).clamp_min(0.1)
    return course, precision, pull


def operators(times, kernel):
    """Every delay of the grid as a matrix over the times of one lineage: (U, T, T); before time 0 as at 0."""
    out = torch.zeros(len(LOG_TAU), len(times), len(times), dtype=torch.double)
    for i in range(len(times)):
        out[:, i, :i + 1] = kernel_weights(LOG_TAU.double().exp(), times[:i + 1], kernel).flip(1)
    return out
