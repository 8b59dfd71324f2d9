"""Stage 2.1 of the identifiable model: flow and delays by expectation-maximisation, on Stage 1's readout D.

    dz/dt = v(z), Lip(v) <= 1                               z_0 of a cell: what its ATAC says (_EM.starts)
    yhat      A_g sum_s W_s(tau_g) D'(z_s, g) + B_g         D' is D, or with the peaks of every gene given: those of
                                                            them that its expression follows (_EM.weigh)
    counts[c, :] ~ Multinomial(n_c, mu_r[g] yhat[c, g])     v and tau learned; for tau, gene by gene, as Poisson with
                                                            exposures s_c / S_c, S_c = sum_g mu_g yhat / sum_g mu_g
                                                            of the delays so far

Expression of gene g is what the readout of its own accessibility gives once the state has moved for tau_g. D is not
fitted to expression; but RNA helps to place cells, and D is fitted to their accessibility twice more (_EM.refined).
Given v, each gene's likelihood is laid out on a grid of log tau (E-step); given tau, v follows the gradient (M-step).
The last E-step also integrates out what ATAC leaves open about the accessibility (grid_evidence). Only ratios of delays
are determined: the gauge is mean log tau = 0 over the genes that carry signal. RNA lags chromatin, so v runs backward
in developmental time.

Shapes  N cells, G genes, C peaks of genes, J landmark states, T + 1 saved times, U grid values; access and counts
        (N, G), z (N, 8), D (N, G), log_tau (G,)
Units   ODE time in the gauge above, never hours
Ref     Dempster et al. 1977, Maximum likelihood from incomplete data via the EM algorithm
"""
import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from chromatin import (
    BANDWIDTH,
    LATENT,
    NEW,
    GeneReadout,
    PeakShares,
    Seen,
    descend,
    mean_states,
    on,
    read_as,
    refine,
    share_out,
    size_factors,
    split_cells,
    state_likelihood,
    with_own,
)
from vector_field import EffendiVectorField

TIMES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)                          # where the Euler path is kept
KERNELS = ("exp", "shift", "gamma")
# What kernel=None chooses from. gamma lies between the two and took the place of a planted exp on held-out cells by
# 2 % of the gain, which bent the delays (slope of estimated on planted log tau 0.64 instead of 0.86).
CANDIDATES = ("exp", "shift")
TRIAL = (6, 2, 2, 5e-3)                                     # of another kernel: epochs, warm, every, learning rate
LOG_TAU = torch.linspace(math.log(0.06), math.log(8.0), 33)
SHAPES = {"exp": 1.0, "gamma": 3.0}                         # of the gamma-distributed delay; "shift" has none
PEAK_SD = 0.7                                               # prior spread of what a peak counts for, 1 = as all others
RESIDUAL_SD = 0.3                                           # of what D may miss of a gene's accessibility, mean about 1
RESIDUAL_BANDWIDTH = 2 * BANDWIDTH                          # over which that stays alike, latent units
RESIDUAL_AXES = 16                                          # leading ones; 24 measured the same
AMPLITUDE = (0.8, 0.5)                                      # prior of A where peaks are weighed, and by which
                                                            # grid_evidence looks for the likeliest A: mean, sd
OFFSET_SD = 0.5                                             # and of B, mean expression about 1
REFINEMENTS = 2                                             # first E-steps before which D is refined
LEAST_PAIRING = 4.0                                         # standard errors, for RNA to take part in placing cells
AMPLITUDES = tuple((a / 10, sd) for a in range(4, 13) for sd in (0.3, 0.5))     # in grid_evidence: mean, sd of A
BASAL_SDS = (0.1, 0.2, 0.5, 1.5)                            # and of B > 0


# --- the delay kernel --------------------------------------------------------------------------------------------

def kernel_weights(tau, times, kernel):
    """How much each saved state counts when a gene of mean delay tau is read from the path.

        W_s(tau) = int k_tau(t) hat_s(t) dt      hat_s: the s-th hat function of the piecewise-linear path
        k_tau    "shift": a point mass at tau; "exp", "gamma": the gamma density of mean tau and shape 1, 3
        F(t) = int_0^t k,  M(t) = int_0^t s k(s) ds give both in closed form, interval by interval
        Past the last time the path stays at its last state.

    Shapes  tau (...), times (T+1,) -> (..., T+1), summing to 1
    """
    t = torch.as_tensor(times, dtype=tau.dtype, device=tau.device)
    tau = tau[..., None]
    if kernel == "shift":
        mass = ((t >= tau) & (t > 0)).to(tau.dtype)                             # F at each saved time
        first = tau * mass                                                      # M at each saved time
    else:
        k = torch.full_like(tau * t, SHAPES[kernel])
        mass = torch.special.gammainc(k, k * t / tau)
        first = tau * torch.special.gammainc(k + 1, k * t / tau)
    inside = mass.diff(dim=-1)                                                  # (..., T) mass of each interval
    upper = (first.diff(dim=-1) - t[:-1] * inside) / (t[1:] - t[:-1])           # its share for the later state
    weights = torch.cat([inside - upper, 1 - mass[..., -1:]], -1)
    weights[..., 1:] += upper
    return weights


# --- likelihood and evidence of delays ---------------------------------------------------------------------------

def bounded_least_squares(ff, f1, fr, n, r, low=0.05):
    """A >= low, B >= 0 that minimise sum w (A F + B - y)^2, from its sums, elementwise.

        ff = sum w F^2, f1 = sum w F, fr = sum w F y, n = sum w, r = sum w y
    The problem is convex: a violated bound holds with equality at the solution.
    """
    det = (ff * n - f1.square()).clamp_min(1e-9 * ff * n)
    a, b = (fr * n - f1 * r) / det, (ff * r - f1 * fr) / det
    a = torch.where(b < 0, fr / ff.clamp_min(1e-12), a)
    b = b.clamp_min(0)
    b = torch.where(a < low, ((r - low * f1) / n).clamp_min(0), b)
    return a.clamp_min(low), b


@torch.no_grad()
def grid_likelihood(states, readout, counts, offset, mean, kernel, now=None, block=16, times=TIMES,
                    chromatin=None, grid=LOG_TAU):
    """Log-likelihood of every gene on a grid of log tau, A and B fitted at each point.

        yhat = A sum_s W_s(tau) D(z_s, g) + B      A, B by least squares weighted with 1 / variance
        L_g(u) = sum_c y log yhat - mu s yhat
    now: (A W^T (T+1, G), B), for the variance. chromatin (G,): whose readout each gene is given (None = its own).

    Shapes  states (T+1, N, 8), counts (N, G), offset (N,), mean (G,) -> L, A, B (G, U)
    """
    weights = kernel_weights(grid.exp(), times, kernel).to(states)              # (U, T+1)
    hidden = readout.hidden(states)
    like, a, b = [], [], []
    for start in range(0, counts.shape[1], block):
        genes = slice(start, min(start + block, counts.shape[1]))
        level, shape = readout.parts(hidden, genes if chromatin is None else chromatin[genes])
        d = level * shape                                                       # (T+1, N, g)
        y = counts[:, genes]
        exposure = offset[:, None] * mean[genes]                                # (N, g)
        if now is None:
            guess = 0.8 * d.mean(0) + 0.2
        else:
            guess = torch.einsum("tg,tng->ng", now[0][:, genes], d) + now[1][genes]
        w = exposure / guess                                                    # 1 / variance of y / exposure
        wy = y / guess
        dg = d.permute(2, 0, 1).contiguous()                                    # (g, T+1, N)
        wd = dg * w.T[:, None]
        gram = wd @ dg.transpose(1, 2)                                          # (g, T+1, T+1)
        ff = torch.einsum("us,gst,ut->gu", weights, gram, weights)
        f1 = wd.sum(2) @ weights.T
        fr = torch.einsum("gsn,gn->gs", dg, wy.T.contiguous()) @ weights.T
        aa, bb = bounded_least_squares(ff, f1, fr, w.sum(0)[:, None], wy.sum(0)[:, None])
        f = (weights @ d.flatten(1)).view(-1, *d.shape[1:])                     # (U, N, g)
        f = f.mul_(aa.T[:, None]).add_(bb.T[:, None])
        reach = torch.einsum("gsn,gn->gs", dg, exposure.T.contiguous()) @ weights.T
        total = aa * reach + bb * exposure.sum(0)[:, None]                      # sum_c m
        like.append(f.log_().mul_(y).sum(1).T - total)
        a.append(aa)
        b.append(bb)
    return torch.cat(like), torch.cat(a), torch.cat(b)


class Residual:
    """What ATAC leaves open about the accessibility of genes: D(z, g) + r(z, g), r smooth over the states.

        r(z, g) = sum_j w_j(z) (Phi c_g)_j            w as in GeneReadout.hidden
        Phi Phi^T ~ RESIDUAL_SD^2 exp(-|z_j - z_k|^2 / 2 RESIDUAL_BANDWIDTH^2), its leading axes;  c ~ N(0, 1) a priori
        seen[j, g] / (mu_g s_j / T_j) ~ N(D + Phi c, variance of the counts)
    D has been fitted to these cells' counts, as well as its shape allows: how far it may be off, and where the counts
    say that it is, decides what expression may ask of it. Cells are where Stage 1 puts them, though D has been refined
    since: placed by RNA too, they gain nothing (LOG.md). Exact in c: a normal distribution, kept as precision and pull.
    ATAC is compared with Phi c, expression with r, its average around a state, 4-8 % smaller.
    Ref     Rasmussen & Williams 2006, Gaussian processes for machine learning, chapters 2 and 8
    """

    def __init__(self, readout, seen):
        nodes = readout.landmarks
        alike = torch.exp(-torch.cdist(nodes, nodes).square() / (2 * RESIDUAL_BANDWIDTH**2))
        value, axis = torch.linalg.eigh(alike.double())
        self.basis = RESIDUAL_SD * (axis * value.clamp_min(0).sqrt())[:, -RESIDUAL_AXES:]          # (J, R)
        D = readout(nodes).clamp_min(0.02).double()
        mean = (seen.counts.sum(0) / seen.exposure.sum()).clamp_min(1e-6)
        weight = (seen.exposure / readout.log_size.exp())[:, None].double() * mean / D             # 1 / variance
        n_axes = self.basis.shape[1]
        of_atac = (weight.T @ products(self.basis)).view(-1, n_axes, n_axes)
        self.precision = of_atac + torch.eye(n_axes).to(of_atac)                # (G, R, R)
        self.pull = (seen.counts / D - weight * D).T @ self.basis                                  # (G, R)


def products(x):
    """Of all pairs of columns (J, R) -> (J, R R)."""
    return (x[:, :, None] * x[:, None]).flatten(1)


@torch.no_grad()
def grid_evidence(states, readout, counts, exposure, mean, kernel, now, residual, prior_mean, prior_sd, times=TIMES,
                  fineness=(101, 4)):
    """Log evidence of genes on the grid of log tau, with A, B and the residual integrated out (G, U), less its largest.

        y = A sum_s W_s(tau) (D'(z_s) + r(z_s)) + B         y normal with the variance of counts
        0 < A < 2.5 ~ N(a_0, a_1^2), r what ATAC leaves open (Residual)
        0 < B ~ sum_k pi_k N(0, b_k^2), b_k = BASAL_SDS
        pi by maximum likelihood over all genes and delays; a of AMPLITUDES by that of all other genes
        E_k(tau) = log int p(A) exp(A m - A^2 s / 2 + |q|^2 / 2) / prod_i (1 + A^2 lambda_i)^(1/2)
                       int p_k(B) N(B; offset, variance) dB dA
    m, s: what y and F know of A; q: what RNA and ATAC know of r; offset, variance: of B given A; r is integrated out.
    lambda are the eigenvalues of what RNA knows of r against what ATAC knows of it, so that no A needs a factorisation.
    A course that ATAC does not show well may be another one: a delay that only its noise asks for is not believed, and
    expression helps to find the course. r is what D misses, and enters D' as it is where peaks are weighed. B is the
    expression that no chromatin drives. A gene could make up for a wrong delay by more amplitude and a B to match, even
    a negative one; how large A and B are in these data, all genes say together.

    Shapes  states (T+1, J, 8) of the landmarks at `times`, readout D', counts (J, G), exposure (J,), mean (G,),
            now (J, G) yhat, for the variance, residual: Residual, prior_mean (G,) of log tau, fineness: points and
            zooms of amplitude_integrals
    Ref     Stephens 2017, False discovery rates: a new deal (a scale mixture whose shares the data choose)
    """
    W = kernel_weights(LOG_TAU.exp(), times, kernel).to(states.device).double()
    D, basis = readout(states).double(), readout.near(states).double() @ residual.basis             # (T+1, J, G or R)
    now = now.clamp_min(0.05).double()
    courses = ([torch.einsum("s,sjk->jk", weights, part) for part in (D, basis)] for weights in W)
    return evidence_of_courses(courses, mean * exposure[:, None] / now, counts / now, residual.precision, residual.pull,
                               prior_mean, prior_sd, fineness)


def evidence_of_courses(courses, w, wy, precision, pull, prior_mean, prior_sd, fineness=(101, 4)):
    """grid_evidence for genes that are read as f + r c at every tau of the grid.

    c ~ N(precision^-1 pull, precision^-1) is what ATAC knows of it.
    Shapes  courses U pairs of f (J, G) and r (J, R); w and wy (J, G) precision of y and that times y;
            precision (G, R, R), pull (G, R) -> (G, U)
    """
    n, y = w.sum(0), wy.sum(0)                                                  # B is integrated out by these
    factor, each = torch.linalg.cholesky(precision), []

    def whiten(x):
        return torch.linalg.solve_triangular(factor, x, upper=False)
    pull = whiten(pull[..., None])
    for f, r in courses:
        wf, wr = w * f, w.T @ r
        f_mean = wf.sum(0) / n
        known = (w.T @ products(r)).view(precision.shape) - wr[:, :, None] * wr[:, None] / n[:, None, None]
        value, axis = torch.linalg.eigh(whiten(whiten(known).mT))
        q = [axis.mT @ part for part in (                   # q_0 + A q_1 - A^2 q_2 on these axes
            pull, whiten((wy.T @ r - wr * (y / n)[:, None])[..., None]),
            whiten((wf.T @ r - wr * f_mean[:, None])[..., None]))]
        m, s = ((part * f).sum(0) - f_mean * total for part, total in ((wy, y), (wf, wf.sum(0))))
        each.append(amplitude_integrals(partial(
            given_amplitude, m=m[:, None], s=s[:, None], q=q, value=value.clamp_min(0)[..., None], n=n[:, None],
            y_mean=(y / n)[:, None], f_mean=f_mean[:, None], r_mean=axis.mT @ whiten((wr / n[:, None])[..., None])),
            len(n), *fineness, device=n.device))
    evidence, of_gene = learned_mixture(torch.stack(each, 3), prior_mean, prior_sd)
    others = torch.log_softmax(of_gene.sum(1, keepdim=True) - of_gene, 0)       # no gene chooses its own prior of A
    evidence = torch.logsumexp(evidence + others[..., None], 0)
    return (evidence - evidence.amax(1, keepdim=True)).float()                  # float32 would lose nats of large sums


def given_amplitude(A, m, s, q, value, n, y_mean, f_mean, r_mean):
    """What grid_evidence integrates over A, r and a flat B integrated out: its log, and the mean and variance of B.

    Shapes  A (G, k); m, s, n, y_mean, f_mean (G, 1); q three (G, R, 1); value, r_mean (G, R, 1) -> (3, G, k)
    """
    powers = torch.stack([torch.ones_like(A), A, A.square()], 1)                # (G, 3, k)
    scale = torch.addcmul(torch.ones_like(value), value, powers[:, 2:])         # (G, R, k)
    pull = torch.cat([q[0], q[1], -q[2]], 2) @ powers
    shrunk = pull / scale
    of_residual = (pull * shrunk).sum(1) - scale.prod(1).log()
    return torch.stack([A * m - (A.square() * s - of_residual) / 2,
                        y_mean - A * (f_mean + (r_mean.mT @ shrunk)[:, 0]),
                        1 / n + A.square() * (r_mean.square().mT @ scale.reciprocal())[:, 0]])


def amplitude_integrals(given, n, points=101, zooms=4, largest=2.5, device="cpu"):
    """log int p(data, A, B) dA dB over 0 < A < largest, B > 0, for all priors of A and of B and n genes: (K_A, K_B, n).

    given: of A (n, k), as given_amplitude (3, n, k). A's prior is even between neighbouring points.
    16 points are added, `zooms` times over, around the highest one: peaks of genes with many counts are narrow, and
    fall off steeply from an end where a gene follows its chromatin upside down.
    """
    def with_height(A):                                     # how high, about: B < 0 costs half its square
        log_p, offset, variance = found = given(A)
        low = ((A - AMPLITUDE[0]) / AMPLITUDE[1]).square() + offset.clamp_max(0).square() / variance
        return torch.cat([found, (log_p - low / 2)[None]])
    A = torch.linspace(0, largest, points, dtype=torch.double, device=device).expand(n, -1)
    found = with_height(A)
    for _ in range(zooms):
        best = found[3].argmax(1, keepdim=True)
        low, high = (A.gather(1, (best + k).clamp(0, A.shape[1] - 1)) for k in (-2, 2))
        more = low + (high - low) * (torch.arange(16) + 0.5).to(low) / 16
        A, order = torch.cat([A, more], 1).sort(1)
        found = torch.cat([found, with_height(more)], 2).gather(2, order.expand(4, -1, -1))
    log_p, offset, variance, _ = found
    middle, masses = (A[:, 1:] + A[:, :-1]) / 2, []
    normal = torch.distributions.Normal(*A.new_tensor(AMPLITUDES).T[..., None])                 # (K_A, 1) of them
    prior = normal.log_prob(middle[:, None]).exp() / (normal.cdf(A.new_tensor(largest)) - normal.cdf(A.new_tensor(0.0)))
    for sd in BASAL_SDS:                                    # int 2 N(B; 0, sd^2) N(B; offset, variance) dB over B > 0
        total = sd**2 + variance
        inside = torch.special.log_ndtr(offset * sd / (variance * total).sqrt())
        masses.append(log_integrals(A, log_p + inside - (offset.square() / total + total.log()) / 2))
    log_mass = torch.stack(masses, 2)                                           # (n, k - 1, K_B)
    top = log_mass.amax(1, keepdim=True)
    return ((prior @ (log_mass - top).exp()).log() + top).permute(1, 2, 0)


def log_integrals(x, log_f):
    """log of the integral of f between neighbours of points x (n, k) in order, exponential there: (n, k - 1)."""
    fall = log_f.diff(dim=1).abs().clamp_min(1e-9)
    return torch.maximum(log_f[:, 1:], log_f[:, :-1]) + (-torch.expm1(-fall) / fall * x.diff(dim=1)).log()


def learned_mixture(each, prior_mean, prior_sd, rounds=300):
    """Log evidence (..., G, U) of mixtures of K models (..., K, G, U), in shares that make all genes the likeliest.

    With few genes the shares are those that suit these few best. And that of each gene, its delay integrated out
    (..., G).
    """
    log_prior = torch.log_softmax(-((LOG_TAU.to(prior_mean) - prior_mean[:, None]) / prior_sd).square().double() / 2, 1)
    of_gene = torch.logsumexp(each + log_prior, -1)                             # (..., K, G)
    share = torch.full_like(of_gene[..., :1], 1 / of_gene.shape[-2])
    for _ in range(rounds):
        share = torch.softmax(of_gene + share.log(), -2).mean(-1, keepdim=True).clamp_min(1e-9)
    return torch.logsumexp(each + share.log()[..., None], -3), torch.logsumexp(of_gene + share.log(), -2)


def weigh_peaks(part, W, w, wy):
    """Log evidence (g, U), mean and variance (g, U, k) of A + d_p of genes at every tau of a grid: weighed's model.

    Shapes  part (T+1, J, g, k) peaks along the paths, W (U, T+1), w and wy (J, g) precision of y and that times y
    """
    S, J, n, k = part.shape
    # float32 would lose nats in genes with millions of counts.
    part, W, w, wy = (v.double() for v in (part, W, w, wy))
    flat = part.permute(2, 1, 0, 3).reshape(n, J, S * k)
    weighted = flat * w.T[..., None]
    gram = (weighted.mT @ flat).view(n, S, k, S, k).transpose(2, 3)             # (g, S, S, k, k)
    pairs = (W[:, :, None] * W[:, None]).flatten(1)                             # (U, S S)
    gram = (pairs @ gram.reshape(n, S * S, k * k)).view(n, -1, k, k)
    # Variables: B, A, d_1 ... d_k; F of A is the sum of all.
    mix = torch.cat([torch.ones(k, 1), torch.eye(k)], 1).to(W)                  # (k, 1 + k)
    Q, v = W.new_zeros(n, len(W), k + 2, k + 2), W.new_zeros(n, len(W), k + 2)
    Q[..., 0, 0], Q[..., 1:, 1:] = w.sum(0)[:, None], mix.T @ gram @ mix
    Q[..., 0, 1:] = Q[..., 1:, 0] = W @ weighted.sum(1).view(n, S, k) @ mix
    v[..., 0], v[..., 1:] = wy.sum(0)[:, None], W @ (flat.mT @ wy.T[..., None]).view(n, S, k) @ mix
    precision = W.new_full((k + 2,), PEAK_SD**-2)
    precision[0], precision[1] = OFFSET_SD**-2, AMPLITUDE[1]**-2
    v[..., 1] += AMPLITUDE[0] * precision[1]
    factor = torch.linalg.cholesky(Q + torch.diag(precision))
    covariance = torch.cholesky_inverse(factor)
    centre = (covariance @ v[..., None])[..., 0]
    evidence = (0.5 * (v * centre).sum(-1) - torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)
                + 0.5 * precision.log().sum())
    spread = (mix @ covariance[..., 1:, 1:] @ mix.T).diagonal(dim1=-2, dim2=-1)
    return evidence, (centre[..., 1:] @ mix.T).float(), spread.float()


def peak_explainer(D, peaks, states, W, counts, exposure, mean, yhat):
    """A function that explains genes by peaks of others: what weigh_peaks says, and these at t = 0 (J, g, k).

    Shapes  peaks: PeakShares; states (T+1, J, 8) of the landmarks, W (U, T+1), counts (J, G) and exposure (J,) there,
            mean (G,), yhat (J, G), for the variance
    """
    now = yhat.clamp_min(0.05)
    readings, near = D(states), D.near(states)                                  # (T+1, J, G), (T+1, J, J)
    of_genes, shares = peaks.of_genes(len(mean)), nn.functional.pad(peaks.share, (0, 1))

    def explain(genes, whose):
        share = shares[:, of_genes[whose]]                                      # (J, g, k); of the padding 0
        part = readings[:, :, whose, None] * (near @ share.flatten(1)).unflatten(-1, share.shape[1:])
        w = mean[genes] * exposure[:, None] / now[:, genes]
        return *weigh_peaks(part, W, w, counts[:, genes] / now[:, genes]), part[0]
    return explain


def weighed(explain, D, peaks, prior_mean, prior_sd):
    """D', a readout of those peaks of every gene that its expression follows; what peaks count for (C,), and its sd.

        y = B + sum_p (A + d_p) F_p,   F_p = sum_s W_s(tau) D(z_s, g) share_p(z_s)       at the landmarks
        A ~ N(0.8, 0.5^2), B ~ N(0, 0.5^2), d_p ~ N(0, PEAK_SD^2), y normal with the variance of counts
        b_p = E[A + d_p] over the posterior of tau, whose evidence has A, B, d integrated out
        D'(z) ~ sum_p b_p D(z, g) share_p(z) + c_g, c_g such that it is nowhere below 2 % of its mean size
    Peaks of which expression follows only some, or which repress it, would otherwise bend the delay. Where all act
    alike, d is small. A gene of one peak, or one that only follows its chromatin upside down, keeps D: a turned course
    and a delay of half a period look alike.
    explain: peak_explainer on LOG_TAU; peaks: PeakShares, prior_mean (G,) of log tau
    """
    of_genes, n_peaks = peaks.of_genes(len(prior_mean)), len(peaks.gene)
    courses, weights, variances, done = [], [], [], []
    for genes in torch.arange(len(prior_mean)).split(32):
        evidence, centre, spread, part = explain(genes, genes)
        prior = ((LOG_TAU.to(prior_mean) - prior_mean[genes, None]) / prior_sd).square() / 2
        tau = torch.softmax(evidence - prior, 1).float()[:, None]               # (g, 1, U)
        b = tau @ centre                                                        # (g, 1, k)
        upright = (part * b[:, 0]).sum((0, 2)) > 0
        several = (of_genes[genes] >= 0).sum(1) > 1
        done.append(upright & several)
        course = (part * torch.where(done[-1][:, None], b[:, 0], 1.0)).sum(2)
        course = course + (0.02 * course.abs().mean(0) - course.amin(0)).clamp_min(0)
        courses.append(course / course.mean(0))
        weights.append(b[:, 0])
        variances.append((tau @ (spread + (centre - b).square()))[:, 0])
    b, done = torch.cat(weights), torch.cat(done)[:, None]
    scale = (b.abs() * nn.functional.pad(peaks.share.mean(0), (0, 1))[of_genes]).sum(1, keepdim=True)
    real, (weight, sd) = of_genes >= 0, b.new_empty(2, n_peaks)
    weight[of_genes[real]] = torch.where(done, b / scale, 1.0)[real]
    sd[of_genes[real]] = torch.where(done, torch.cat(variances).sqrt() / scale, 0.0)[real]
    return read_as(D, torch.cat(courses, 1)), weight, sd


def posterior(log_like, prior_mean, prior_sd):
    """Posterior weights on the grid (G, U), posterior mean and sd (G,)."""
    grid = LOG_TAU.to(prior_mean)
    log_post = log_like - ((grid - prior_mean[:, None]) / prior_sd).square() / 2
    weights = torch.softmax(log_post.double(), 1).float()
    mean = weights @ grid
    return weights, mean, (weights @ grid.square() - mean.square()).clamp_min(1e-6).sqrt()


def centred(log_like, prior_mean, prior_sd, rounds=10):
    """prior_mean (G,), all moved alike to where log_like (G, U) has the gauge's mean: genes are drawn to their middle.

    The gauge of the fit is that of the field's likelihood. The evidence, which keeps the field, has a level of its own.
    """
    for _ in range(rounds):
        _, mean, sd = posterior(log_like, prior_mean, prior_sd)
        prior_mean = prior_mean + gauge(mean - prior_mean, sd, prior_mean, prior_sd)
    return prior_mean


def gauge(log_tau, sd, prior_mean, prior_sd=1.0):
    """Mean of log tau (G,) over genes, each weighted with what_data_say."""
    weight = what_data_say(sd, prior_mean, prior_sd)
    return (weight * log_tau).sum() / weight.sum()


def what_data_say(sd, prior_mean, prior_sd):
    """The share of the prior variance of log tau that a gene's data removed (G,), from its posterior sd (G,).

    prior_mean (G,) or one for all.
    """
    prior_mean = torch.as_tensor(prior_mean).to(sd).expand_as(sd)
    unknown = posterior(sd.new_zeros(len(sd), len(LOG_TAU)), prior_mean, prior_sd)[2]   # < prior_sd: the grid has ends
    return (1 - (sd / unknown).square()).clamp_min(1e-3)


# --- what embeddings say about delays ----------------------------------------------------------------------------

def head_means(gene_emb, log_tau, sd, prior_mean, prior_sd, ridge=10.0):
    """What the embeddings of all other genes say about a gene's log tau: ridge regression, leave-one-out.

        mean_-g = (fit_g - h_g y_g) / (1 - h_g)     h the diagonal of the hat matrix
    Shrunk by its own leave-one-out slope, so that embeddings that predict nothing give the gauge's zero.
    """
    e = torch.cat([gene_emb, gene_emb.new_ones(len(gene_emb), 1)], 1).double()
    w = what_data_say(sd, prior_mean, prior_sd).double()
    we = e * w[:, None]
    solve = torch.linalg.solve(e.T @ we + ridge * torch.eye(e.shape[1]).to(e), we.T)                # (K, G)
    h = (e * solve.T).sum(1).clamp_max(0.99)
    y = log_tau.double()
    left_out = (e @ (solve @ y) - h * y) / (1 - h)
    slope = (w * left_out * y).sum() / (w * left_out.square()).sum().clamp_min(1e-12)
    return (left_out * slope.clamp(0, 1)).float()


def head_predict(gene_emb, log_tau, sd, new_emb, prior_sd=1.0, ridge=10.0):
    """log tau (H,) of genes that were not fitted, from their embeddings (H, D): the same ridge, shrunk alike.

    gene_emb (G, D), log_tau and sd (G,) of the fitted genes, the prior of each about 0, as their embeddings seldom tell
    much. Embeddings are read on the fitted genes' axes.
    """
    known = GeneReadout(gene_emb)
    left_out = head_means(known.e, log_tau, sd, 0.0, prior_sd, ridge)
    e, new = (torch.cat([x, torch.ones(len(x), 1)], 1).double()
              for x in (known.e, (new_emb - known.centre) @ known.axes))
    w = what_data_say(sd, 0.0, prior_sd).double()
    we = e * w[:, None]
    fit = torch.linalg.solve(e.T @ we + ridge * torch.eye(e.shape[1], dtype=e.dtype), we.T @ log_tau.double())
    raw = e @ fit
    shrink = ((left_out.double() * raw).sum() / raw.square().sum().clamp_min(1e-12)).clamp(0, 1)
    return (shrink * (new @ fit)).float()


# --- paths and predictions ---------------------------------------------------------------------------------------

def path(field, z, times=TIMES):
    """Euler states (T+1, B, 8) at the saved times, the spectral norms computed once."""
    return moving_path(field, z, times)[0]


def moving_path(field, z, times):
    """Euler states (T+1, B, 8) and the mean squared speed per dimension along them."""
    states, speed_sq = [z], 0.0
    with parametrize.cached():
        for t0, t1 in zip(times[:-1], times[1:]):
            v = field(states[-1])
            speed_sq = speed_sq + v.square().mean() / (len(times) - 1)
            states.append(states[-1] + (t1 - t0) * v)
    return torch.stack(states), speed_sq


class Still(nn.Module):
    """v = 0."""

    def forward(self, z):
        return torch.zeros_like(z)


def predict(states, readout, weights, A, B):
    """yhat (N, G) = A sum_s W_s D(z_s) + B, for states (T+1, N, 8) and weights (G, T+1). Gradient: of states only."""
    level, slope, bias = (part.detach() for part in readout.linear())
    return _ReadPath.apply(readout.hidden(states), (weights.T * (A * level)).detach(), slope, bias, B.detach())


class _ReadPath(torch.autograd.Function):
    """B + sum_s C_s T_s sigmoid(h_s slope^T + bias), state by state: a block of cells x genes stays in the cache.

    Shapes  hidden (T+1, N, K+1) = (h, log T), C (T+1, G), slope (G, K), bias and B (G,) -> (N, G)
    """

    @staticmethod
    def forward(ctx, hidden, C, slope, bias, B):
        size = hidden[..., -1:].exp()
        total, opened = B.repeat(hidden.shape[1], 1), []
        for h, t, c in zip(hidden, size, C):
            o = torch.addmm(bias, h[:, :-1], slope.T).sigmoid_()
            total.addcmul_(o * c, t)
            if ctx.needs_input_grad[0]:
                opened.append(o)
        ctx.save_for_backward(size, C, slope, *opened)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        size, C, slope, *opened = ctx.saved_tensors
        out = grad.new_empty(*size.shape[:2], slope.shape[1] + 1)
        for s, (o, t, c) in enumerate(zip(opened, size, C)):
            down = (grad * c).mul_(o).mul_(t)
            out[s, :, -1] = down.sum(1)                     # of log T
            out[s, :, :-1] = down.addcmul_(down, o, value=-1) @ slope
        return out, None, None, None, None


def cell_size(yhat, mean):
    """S: what a cell expresses in all, relative to the mean gene, (N, 1): its counts are n_c shares of this."""
    return (yhat @ mean / mean.sum())[:, None]


@torch.no_grad()
def exposures(states, readout, weights, A, B, depth, mean, block=4096):
    """s_c / S_c (N,), the exposure of a cell's genes under a fit; in blocks of cells, since only (N,) is kept."""
    size = [cell_size(predict(states[:, rows], readout, weights, A, B), mean)
            for rows in torch.arange(len(depth)).split(block)]
    return depth / torch.cat(size)[:, 0]


def cell_likelihood(yhat, counts, mean):
    """(N,) multinomial log-likelihood of counts with shares mu yhat / sum_g mu yhat, up to a constant of the counts."""
    return (counts * yhat.log()).sum(1) - counts.sum(1) * (yhat @ mean).log()


def log_share(expressed):
    """What share of a cell's counts a gene has at each landmark, log (J, G), from the expression expected there."""
    return (expressed / expressed.sum(1, keepdim=True)).clamp_min(1e-30).log()


def pairing(given_atac, given_rna):
    """Standard errors by which RNA fits the states of its own cell's ATAC better than those of another's.

        mean over c of sum_j (P_cj - mean P_j) (l_cj - mean l_j),   P from ATAC alone, l_cj = log p(RNA of c | z_j)
    Shapes  log-likelihoods of the cells' ATAC and RNA at the landmarks, (N, J) both
    """
    P = torch.softmax(given_atac, 1)
    return z_score(((P - P.mean(0)) * (given_rna - given_rna.mean(0))).sum(1))


def still_genes(z, readout, counts, offset, mean, genes=None):
    """v = 0: log-likelihood of every gene over the cells, its A and B, (G,) each.

    genes (G,): whose readout each is given (None = its own).
    offset (N,): depth over cell_size, the same for all that is compared.
    """
    found = grid_likelihood(z[None], readout, counts, offset, mean, "exp", times=(0.0,), chromatin=genes,
                            grid=LOG_TAU[:1])               # every tau says the same
    return [part[:, 0] for part in found]


# --- expectation-maximisation ------------------------------------------------------------------------------------

@dataclass
class DelayFit:
    """What Stage 2 found."""
    field: EffendiVectorField
    kernel: str
    log_tau: torch.Tensor           # (G,) posterior mean in the gauge
    sd: torch.Tensor                # (G,) posterior standard deviation, flow and states given
    A: torch.Tensor                 # (G,)
    B: torch.Tensor                 # (G,)
    held_out: torch.Tensor          # (N_out,) log-likelihood of each held-out cell from where it starts (_EM.starts)
    still: torch.Tensor             # (N_out,) for v = 0, the best of what describe tries
    own: torch.Tensor               # (G,) log-likelihood of a gene's own chromatin beyond another gene's, v = 0
    gene_gain: torch.Tensor         # (G,) log-likelihood over all cells beyond v = 0
    gauge: float                    # own log tau of the field - log_tau: what the gauge took away
    epoch: int
    history: list                   # (epoch, held-out nats a cell beyond v = 0)
    own_parameters: dict            # delta, p, q of the readout that expression follows
    peak_weight: torch.Tensor       # (C,) what every peak counts for; sum of |weight| share over a gene = 1
    peak_sd: torch.Tensor           # (C,) its posterior standard deviation, 0 where a gene's peaks were not weighed
    pairing: float                  # standard errors by which a cell's RNA fits its own ATAC better than another's
    differ: torch.Tensor | None = None      # (N_out,) log-likelihood beyond one delay for all genes (_EM.differ)

    def followed(self, readout):
        """The readout D' that expression follows, from the anchor's D."""
        return with_own(readout, **self.own_parameters)

    def state(self):
        """Plain values and tensors, for a file."""
        return {**vars(self), "field": self.field.state_dict()}

    def __reduce__(self):
        return DelayFit.from_state, (self.state(),)         # a field with its spectral norm cannot be pickled

    @classmethod
    def from_state(cls, state):
        field = EffendiVectorField(LATENT, state["field"]["net.0.bias"].shape[0])
        field.load_state_dict(state["field"])
        return cls(**{**state, "field": field.eval().requires_grad_(False)})


@torch.no_grad()
def moved(anchor, delay, counts, times=TIMES):
    """Path (T+1, N, 8) from AlignMLP's states and exposures (N,) of an anchor's cells under a fit; the genes'
    mean counts (G,); D'.
    """
    depth, mean = size_factors(counts)
    states, readout = path(delay.field, anchor.z, times), delay.followed(anchor.readout)
    weights = kernel_weights((delay.log_tau + delay.gauge).exp(), times, delay.kernel)
    return states, exposures(states, readout, weights, delay.A, delay.B, depth, mean), mean, readout


def fit_delay(anchor, access, counts, rng, kernel=None, epochs=20, warm=6, every=3, batch=256, lr=1e-2,
              kinetic=0.012, held_out=0.1, prior_sd=1.0, times=TIMES, rna_only=None, field=None, device="cpu",
              judge=True):
    """Stage 2. kernel None = "exp", unless held-out cells are more likely under another by two standard errors.

    First-order lags are what mRNA decay gives; a difference within the noise says nothing about the kernel, and
    shapes chosen by noise cost accuracy. Another kernel is first tried from where the first one ended, which is told
    from the better one as well as a fit of its own is, in a third of the time. It has trained longer than what it is
    compared with; so one that wins only earns a fit of its own, which has to win too.
    Shapes  anchor: on the N cells; access and counts (N, G); rna_only (M, G): counts of cells without ATAC, which
            join the E-steps; field: a function that is given the _EM and returns the field to start from;
            device: where it is computed, in float32 and float64; the DelayFit lies on the CPU; judge: whether
            DelayFit.differ is wanted
    """
    least = warm if anchor.peaks is None else warm + every
    if epochs < least:
        raise ValueError(f"EM_EPOCHS={epochs}: at least {least} epochs come before the E-steps that are needed.\n"
                         "  Leave it at its default.")
    seed = int(torch.randint(2**31, (1,), generator=rng))                       # weights of the field
    em = _EM.of(on(device, anchor), access, counts, rng, held_out, times, prior_sd, batch, kinetic, rna_only)
    start = rng.get_state()

    def fitted(name):
        rng.set_state(start)                                # every kernel sees the same cells and weights
        torch.manual_seed(seed)
        flow = em.begin(name)
        return em.run(flow if field is None else replace(flow, field=field(em)), rng, epochs, warm, every, lr)
    best = first = fitted(kernel or CANDIDATES[0])
    for name in CANDIDATES[1:] if kernel is None else ():
        other = em.run(em.begin(name, first), rng, *TRIAL)
        if z_score(other.held_out - first.held_out) > 2:
            best = max(best, fitted(name), key=lambda flow: flow.held_out.mean())
    found = em.describe(best, rng)
    return on("cpu", replace(found, differ=em.differ(best, rng)) if judge else found)


def z_score(gain):
    """Mean over standard error."""
    return float(gain.mean() / gain.std().clamp_min(1e-12)) * math.sqrt(len(gain))


@dataclass
class _Flow:
    """Where expectation-maximisation is: the field, and what every gene reads from its path."""
    field: EffendiVectorField
    kernel: str
    log_tau: torch.Tensor           # (G,) of the field
    A: torch.Tensor
    B: torch.Tensor
    prior: torch.Tensor             # (G,) mean of log tau
    D: GeneReadout
    z: torch.Tensor                 # (N, 8) where cells start
    given_atac: torch.Tensor        # (N, J) log p(access[c] | z_j) under D
    readout: GeneReadout            # D'; D itself before peaks are weighed
    peak_weight: torch.Tensor       # (C,)
    peak_sd: torch.Tensor           # (C,)
    held_out: torch.Tensor | None = None    # (N_out,) log-likelihood of each held-out cell
    epoch: int = 0
    history: tuple = ()             # (epoch, held-out nats a cell)
    refined: int = 0                # how often D has been


@dataclass
class _EM:
    """Expectation-maximisation on some paired cells.

        M   v follows the gradient; cells start where their ATAC puts them (starts)
        E   P[c, j] ~ p(access[c] | z_j) prod_g share_jg^counts[c, g]               z_j the readout's landmarks
            share_jg = mu_g yhat(z_j, g) / sum of it;  then L_g(log tau) from the sums of P counts and P depth per state
            The last one (last_e_step) believes D' only as far as ATAC's counts support it (grid_evidence).
    The ATAC of a cell leaves its state open; its RNA narrows it, given all genes' delays so far. A cell without ATAC
    has a flat first factor. Predictions need what is learned so, D', v and delays, and no cell's RNA. A factor that is
    broader than what ATAC says, such as exp(-|z_c - z_j|^2 / 2 h^2), would let RNA overrule it, and shuffled pairing
    would give delays too. So would RNA of another cell: where there is no sign that pairs are pairs (pairing), ATAC
    alone places cells.
    """
    z: torch.Tensor
    readout: GeneReadout
    counts: torch.Tensor
    depth: torch.Tensor
    mean: torch.Tensor
    train: torch.Tensor
    out: torch.Tensor
    times: tuple
    prior_sd: float
    batch: int
    kinetic: float
    rna_only: torch.Tensor
    access: torch.Tensor
    access_depth: torch.Tensor      # (N,) size factors and (G,) mean, in the units of Stage 1
    access_mean: torch.Tensor
    given_atac: torch.Tensor        # (N, J) log p(access[c] | z_j) under Stage 1's D
    peaks: PeakShares | None
    seen: Seen
    paired: bool = True             # RNA takes part in placing cells

    @classmethod
    def of(cls, anchor, access, counts, rng, held_out=0.1, times=TIMES, prior_sd=1.0, batch=256, kinetic=0.012,
           rna_only=None):
        access, counts, rna_only = (torch.as_tensor(a, dtype=torch.float32, device=anchor.z.device) for a in (
            access, counts, counts[:0] if rna_only is None else rna_only))
        train, out = split_cells(len(counts), held_out, rng)
        mean = (anchor.seen.counts.sum(0) / anchor.seen.exposure.sum()).clamp_min(1e-6)
        depth = (access.sum(1) / mean.sum()).clamp_min(1e-3)
        with torch.no_grad():
            given_atac = state_likelihood(anchor.readout, anchor.readout.landmarks, access, depth, mean)
        em = cls(anchor.z, anchor.readout, counts, *size_factors(counts), train, out, times, prior_sd, batch, kinetic,
                 rna_only, access, depth, mean, given_atac, anchor.peaks, anchor.seen)
        return replace(em, paired=em.pairing() > LEAST_PAIRING)

    def begin(self, kernel, after=None):
        """The start of a fit, or what a fit with another kernel has reached, read with this one."""
        n_genes, n_peaks = len(self.mean), 0 if self.peaks is None else len(self.peaks.gene)
        if after is None:
            new = self.mean.new_full
            return _Flow(EffendiVectorField(LATENT, 128).to(self.z.device), kernel, new((n_genes,), 0.0),
                         new((n_genes,), 0.8), new((n_genes,), 0.2), new((n_genes,), 0.0), self.readout, self.z,
                         self.given_atac, self.readout, new((n_peaks,), 1.0), new((n_peaks,), PEAK_SD))
        flow = replace(after, field=copy.deepcopy(after.field).requires_grad_(True), held_out=None, kernel=kernel)
        return self.e_step(flow if self.peaks is None else self.weigh(flow))

    def weights(self, flow):
        return kernel_weights(flow.log_tau.exp(), self.times, flow.kernel)

    def expected(self, flow):
        """Paths (T+1, J, 8) of the landmarks, yhat (J, G), and log_share, 0 where RNA does not take part in placing."""
        states = path(flow.field.eval(), self.readout.landmarks, self.times)
        yhat = predict(states, flow.readout, self.weights(flow), flow.A, flow.B)
        return states, yhat, log_share(self.mean * yhat) * self.paired

    @torch.no_grad()
    def at_landmarks(self, flow, rows):
        """Paths (T+1, J, 8) of the landmarks; counts (J, G), exposures (J,) of the cells `rows` there; yhat (J, G)."""
        states, yhat, log_share = self.expected(flow)
        counts, exposure = 0.0, 0.0
        paired = ((self.counts[part], flow.given_atac[part]) for part in rows.split(4096))
        alone = ((part, 0.0) for part in self.rna_only.split(4096) if len(part) and self.paired)
        for y, given_atac in (*paired, *alone):
            P = torch.softmax(given_atac + y @ log_share.T, 1)
            counts, exposure = counts + P.T @ y, exposure + y.sum(1) @ P
        return states, counts, exposure / self.mean.sum() / cell_size(yhat, self.mean)[:, 0], yhat

    @torch.no_grad()
    def refined(self, flow):
        """The flow with D fitted once more to accessibility (chromatin.refine), cells placed by both modalities.

        Cells that only Stage 1 has seen, and held-out ones, count where it put them.
        """
        log_share, counts, exposure = self.expected(flow)[2], self.seen.counts, self.seen.exposure
        known = (exposure.sum() / self.access_depth.sum()).clamp_max(1)         # share of the cells that Stage 1 saw
        for part in self.train.split(4096):
            P = torch.softmax(flow.given_atac[part] + self.counts[part] @ log_share.T, 1)
            moved = known * (P - torch.softmax(self.given_atac[part], 1)).T
            counts, exposure = counts + moved @ self.access[part], exposure + moved @ self.access_depth[part]
        # Below 0 by rounding, or where the cells that Stage 1 did not see are others.
        D = refine(flow.D, Seen(counts.clamp_min(0), exposure.clamp_min(0)), self.access_mean)
        given_atac = state_likelihood(D, D.landmarks, self.access, self.access_depth, self.access_mean)
        return replace(flow, D=D, readout=D, z=self.starts(D), given_atac=given_atac, refined=flow.refined + 1)

    @torch.no_grad()
    def starts(self, D):
        """Where cells start (N, 8): AlignMLP's states, or the mean states that the genes' ATAC alone says under D.

        The latter are nearer to the truth where genes have counts enough. AlignMLP's know of all peaks, and are smooth.
        They stay, unless RNA has a say (paired) and that of the training cells is likelier at v = 0 under the others.
        """
        if not self.paired:
            return self.z
        means = mean_states(D, self.access, self.access_depth, self.access_mean)
        return max(self.z, means, key=lambda z: self.still(z, D, self.depth, self.train).sum())

    @torch.no_grad()
    def still(self, z, readout, offset, rows):
        """v = 0: yhat = A D(z_0) + B, A and B of the training cells. Log-likelihood of the cells `rows` (len(rows),).

        offset (N,): exposures to begin with; every z and readout then gets its own.
        """
        own, train = self.mean.new_ones(len(self.mean), 1), self.train
        for _ in range(2):
            _, a, b = still_genes(z[train], readout, self.counts[train], offset[train], self.mean)
            offset = exposures(z[None], readout, own, a, b, self.depth, self.mean)
        return cell_likelihood(predict(z[None, rows], readout, own, a, b), self.counts[rows], self.mean)

    @torch.no_grad()
    def pairing(self):
        """The function of that name for yhat = 0.8 D + 0.2, as a fit begins: v = 0, and nothing has seen RNA but the
        genes' means, so that all cells can be asked.
        """
        yhat = 0.8 * self.readout(self.readout.landmarks) + 0.2
        return pairing(self.given_atac, self.counts @ log_share(self.mean * yhat).T)

    def e_step(self, flow, damping=1.0, kernel=None):
        """Delays, A and B given the field. Damped: the field was fitted to the last ones, and follows only in part."""
        states, counts, exposure, _ = self.at_landmarks(flow, self.train)
        like, a, b = self.likelihood(flow, states, counts, exposure, kernel)
        share, centre, sd = posterior(like, flow.prior, self.prior_sd)
        centre = centre - gauge(centre, sd, flow.prior, self.prior_sd)
        return replace(flow, kernel=kernel or flow.kernel, log_tau=flow.log_tau + damping * (centre - flow.log_tau),
                       A=flow.A + damping * ((share * a).sum(1) - flow.A),
                       B=flow.B + damping * ((share * b).sum(1) - flow.B),
                       prior=head_means(self.readout.e, centre, sd, flow.prior, self.prior_sd))

    def likelihood(self, flow, states, counts, exposure, kernel=None):
        """grid_likelihood of what at_landmarks gives: L, A, B (G, U)."""
        return grid_likelihood(states, flow.readout, counts, exposure, self.mean, kernel or flow.kernel,
                               (flow.A * self.weights(flow).T, flow.B), times=self.times)

    @torch.no_grad()
    def weigh(self, flow):
        """The flow with D', a readout of those peaks of every gene that its expression follows (weighed)."""
        readout, weight, sd = weighed(self.explainer(flow, self.train), flow.D, self.peaks, flow.prior, self.prior_sd)
        return replace(flow, readout=readout, peak_weight=weight, peak_sd=sd)

    def explainer(self, flow, rows, grid=LOG_TAU):
        """peak_explainer at the landmarks, of peaks or, without any, of genes as if they had one."""
        states, *seen, yhat = self.at_landmarks(flow, rows)
        W = kernel_weights(grid.exp(), self.times, flow.kernel).to(self.z.device)
        genes = torch.arange(len(self.mean), device=W.device)
        peaks = self.peaks or PeakShares(genes, W.new_ones(states.shape[1], len(genes)))
        return peak_explainer(flow.D, peaks, states, W, *seen, self.mean, yhat)

    @torch.no_grad()
    def likelihood_out(self, flow):
        states = path(flow.field.eval(), flow.z[self.out], self.times)
        yhat = predict(states, flow.readout, self.weights(flow), flow.A, flow.B)
        return cell_likelihood(yhat, self.counts[self.out], self.mean)

    def run(self, flow, rng, epochs, warm, every, lr):
        """The flow of the epoch that held-out cells like best, from `warm` on; an E-step every `every` epochs."""
        field, train = flow.field, self.train
        opt = torch.optim.Adam(field.parameters(), lr=lr, fused=True)
        n_steps = epochs * math.ceil(len(train) / self.batch)
        # A warm-up of a tenth needs ten steps to have length; a few hundred cells make fewer.
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=max(n_steps + 1, 20), pct_start=0.1)
        best, history = None, []
        for epoch in range(1, epochs + 1):
            field.train()
            weights = self.weights(flow)
            for rows in train[torch.randperm(len(train), generator=rng)].to(self.z.device).split(self.batch):
                states, speed_sq = moving_path(field, flow.z[rows], self.times)
                yhat = predict(states, flow.readout, weights, flow.A, flow.B)
                nll = -cell_likelihood(yhat, self.counts[rows], self.mean).sum() / yhat.numel()
                loss = nll + self.kinetic * speed_sq
                descend(loss, opt, schedule)
            if epoch < warm:
                continue
            if (epoch - warm) % every == 0:
                if flow.refined < REFINEMENTS:
                    flow = self.refined(flow)
                if self.peaks is not None and flow.readout is flow.D and epoch > warm:
                    flow = self.e_step(self.weigh(flow))
                else:
                    flow = self.e_step(flow, damping=0.7)
            like = self.likelihood_out(flow)
            history.append((epoch, like.mean().item()))
            if self.peaks is not None and flow.readout is flow.D:
                continue                                    # peaks not weighed yet
            if best is None or like.mean() > best.held_out.mean():
                best = replace(flow, field=copy.deepcopy(field), held_out=like, epoch=epoch)
        best.field.settle()                                 # the power iteration lags behind a fast learning rate
        best.field.eval().requires_grad_(False)
        return replace(best, history=history)

    def differ(self, flow, rng):
        """Log-likelihood of held-out cells (N_out,) beyond that of one delay for all genes; both trained on (TRIAL).

        A flow may gain on v = 0 by moving cells to where a readout that is a little off suits their RNA better. Only
        ratios of delays mean anything, and with one delay there are none.
        """
        alike = replace(flow, log_tau=torch.zeros_like(flow.log_tau), prior=torch.zeros_like(flow.prior))
        start, held_out = rng.get_state(), []
        for em, after in ((self, flow), (replace(self, prior_sd=1e-3), alike)):     # holds all genes at the gauge's 0
            rng.set_state(start)
            held_out.append(em.run(em.begin(flow.kernel, after), rng, *TRIAL).held_out)
        return held_out[0] - held_out[1]

    @torch.no_grad()
    def last_e_step(self, flow):
        """The flow with log tau, A and B that grid_evidence finds on all cells, and the sd of log tau (G,).

        Twice, since the delays found first, which need not be exact, tell better which states the cells are in.
        """
        cells, residual = torch.arange(len(self.z)), Residual(flow.D, self.seen)
        for fineness in ((26, 5), (101, 4)):
            states, counts, exposure, yhat = self.at_landmarks(flow, cells)
            _, a, b = self.likelihood(flow, states, counts, exposure)
            evidence = grid_evidence(states, flow.readout, counts, exposure, self.mean, flow.kernel, yhat, residual,
                                     flow.prior, self.prior_sd, self.times, fineness)
            prior = centred(evidence, flow.prior, self.prior_sd)
            share, centre, sd = posterior(evidence, prior, self.prior_sd)
            flow = replace(flow, log_tau=centre, A=(share * a).sum(1), B=(share * b).sum(1), prior=prior)
        return flow, sd

    def describe(self, flow, rng):
        """The DelayFit: the last E-step, and what v = 0 and other genes' chromatin explain.

        The delays come from grid_evidence. A and B go with D' as it is, since that is what predicts.
        v = 0 is given the best of Stage 1's D with either kind of states, which no moving fit has helped to find, and,
        from where the moving fit starts, of the weights of peaks that this chose and of its own. A gene's own chromatin
        is compared with another's in Stage 1's D, which has seen no RNA.
        """
        last, sd = self.last_e_step(flow)
        states, weights = path(flow.field, flow.z, self.times), self.weights(flow)
        offset = exposures(states, flow.readout, weights, flow.A, flow.B, self.depth, self.mean)
        moving = grid_likelihood(states, flow.readout, self.counts, offset, self.mean, flow.kernel,
                                 (flow.A * weights.T, flow.B), times=self.times)[0]
        means = mean_states(self.readout, self.access, self.access_depth, self.access_mean)
        still_ways = [(self.z, self.readout), (means, self.readout), (flow.z, flow.readout)]
        if self.peaks is not None:
            em = replace(self, times=self.times[:1])        # of a path that stands still, the first state says all
            still_ways.append((flow.z, em.weigh(em.e_step(replace(flow, field=Still(), readout=flow.D))).readout))
        still = max((self.still(*way, offset, self.out) for way in still_ways), key=torch.sum)
        still_gene = torch.stack([still_genes(*way, self.counts, offset, self.mean)[0]
                                  for way in still_ways])                       # (3 or 4, G), Stage 1's first
        another = torch.randperm(len(self.mean), generator=rng)
        foreign = still_genes(self.z, self.readout, self.counts, offset, self.mean, another)[0]
        gene_gain = (posterior(moving, flow.prior, self.prior_sd)[0] * moving).sum(1) - still_gene.amax(0)
        level = gauge(last.log_tau, sd, last.prior, self.prior_sd).item()
        return DelayFit(flow.field, flow.kernel, last.log_tau - level, sd, last.A, last.B, flow.held_out, still,
                        still_gene[0] - foreign, gene_gain, level, flow.epoch,
                        [(e, total - still.mean().item()) for e, total in flow.history], flow.readout.own(),
                        flow.peak_weight, flow.peak_sd, self.pairing())


@torch.no_grad()
def chromatin_lead(anchor, delay, access, counts, rng, others=9, prior_sd=1.0, device="cpu"):
    """Nats by which a gene's own chromatin, moved by the flow, beats the best of some other genes' (G,).

        log sum_u exp(E_g(u) - u^2 / 2)       E the evidence of weigh_peaks, less the largest with another's peaks
    Whosever they are, peaks are weighed anew to explain the gene, in Stage 1's D, which has seen no RNA. A gene that
    follows other chromatin than its own leads one time in others + 1, and its delay means nothing.
    """
    anchor, delay = on(device, anchor), on(device, delay)
    em = _EM.of(anchor, access, counts, rng, prior_sd=prior_sd)
    n = len(em.mean)
    flow = _Flow(delay.field, delay.kernel, delay.log_tau + delay.gauge, delay.A, delay.B, em.mean.new_zeros(n),
                 em.readout, em.z, em.given_atac, delay.followed(anchor.readout), delay.peak_weight, delay.peak_sd)
    grid = LOG_TAU[::2].to(device)
    explain = em.explainer(flow, torch.arange(len(counts)), grid)

    def evidence(whose):
        return torch.cat([torch.logsumexp(explain(genes, whose[genes])[0] - (grid / prior_sd).square() / 2, 1)
                          for genes in torch.arange(n).split(32)])
    best = torch.full((n,), -torch.inf, dtype=torch.double, device=device)
    for _ in range(others):
        another = (torch.arange(n) + torch.randint(1, max(n, 2), (n,), generator=rng)) % n      # never its own
        best = torch.maximum(best, evidence(another))
    return (evidence(torch.arange(n)) - best).float().cpu()


# --- genes that were not fitted ----------------------------------------------------------------------------------

@dataclass
class Placed:
    """New cells among the landmarks of a fit."""
    P: torch.Tensor                 # (N, J)
    access_depth: torch.Tensor      # (N,)
    exposure: torch.Tensor          # (J,) of RNA


@torch.no_grad()
def place(readout, z, access, counts, yhat, yhat_there, mean):
    """Placed: new cells as an E-step places cells, by their ATAC and RNA of genes that the fit knows.

    ATAC is read by D' (readout), since the D of an E-step is not kept: cells are placed as well (LOG.md). What a gene's
    counts are on average is asked of the new cells, at the states z that AlignMLP gives them: they may be another
    mixture, or measured otherwise. As in a fit, RNA takes part only if it fits its own cell's ATAC.
    Shapes  readout: GeneReadout of the G known genes; z (N, 8), access and counts (N, G); yhat (N, G) at z,
            yhat_there (J, G) at the landmarks, mean (G,) of RNA in training
    """
    nodes, depth = readout.landmarks, access.sum(1).clamp_min(1)
    depth, total = depth / depth.mean(), counts.sum(1)
    of_atac = access.sum(0) / (depth @ readout(z)).clamp_min(1e-12)
    of_rna = (counts.sum(0) / ((total / (yhat @ mean)) @ yhat)).clamp_min(1e-6)
    given_atac = state_likelihood(readout, nodes, access, depth, of_atac.clamp_min(1e-6))
    log_p = counts @ log_share(of_rna * yhat_there).T
    P = torch.softmax(given_atac + log_p * (pairing(given_atac, log_p) > LEAST_PAIRING), 1)
    return Placed(P, depth, total @ P / (yhat_there @ of_rna))


@torch.no_grad()
def new_gene_delays(field, kernel, readout, placed, access, counts, mean, prior_mean, prior_sd=1.0, peaks=None):
    """Stage 1 and the E-steps for H genes outside training, on new cells: D', own log tau, its sd, A and B, (H,) each.

    v and all that genes share stay as they are. Peaks are weighed once, as in training.
    Shapes  readout: unseen_genes (H); placed: Placed; access and counts (N, H), mean (H,) of the RNA, prior_mean (H,),
            peaks: Peaks of the H genes, None = not weighed
    """
    P, exposure, nodes = placed.P, placed.exposure, readout.landmarks
    seen, counts = Seen(P.T @ access, P.T @ placed.access_depth), P.T @ counts
    D = refine(readout, seen, (access.sum(0) / placed.access_depth.sum()).clamp_min(1e-6), NEW)
    states, residual = path(field, nodes), Residual(D, seen)

    def e_step(readout, now=None):
        like, a, b = grid_likelihood(states, readout, counts, exposure, mean, kernel)
        if now is not None:
            like = grid_evidence(states, readout, counts, exposure, mean, kernel, now, residual, prior_mean, prior_sd)
        share, log_tau, sd = posterior(like, prior_mean, prior_sd)
        A, B = (share * a).sum(1), (share * b).sum(1)
        return predict(states, readout, kernel_weights(log_tau.exp(), TIMES, kernel), A, B), log_tau, sd, A, B
    followed, now = D, e_step(D)[0]
    if peaks is not None:
        W = kernel_weights(LOG_TAU.exp(), TIMES, kernel)
        shares = share_out(nodes, torch.from_numpy((peaks.counts.T @ P.numpy()).T), peaks, len(mean))
        explain = peak_explainer(D, shares, states, W, counts, exposure, mean, now)
        followed = weighed(explain, D, shares, prior_mean, prior_sd)[0]
        now = e_step(followed)[0]
    return followed, *e_step(followed, now)[1:]
