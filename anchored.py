"""Delays anchored in each gene's own chromatin: from arrays to log tau_g and what it is worth.

    z         AlignMLP(x)                                                   (N, 8)
    D(z, g)   T(z) 4 exp(g.e_g + p_g) sigmoid(kappa P(R z).(e_g + delta_g) + b.e_g + q_g)
    Stage 1   access[c, g] ~ Poisson(mu_a[g] s_a[c] D(z_c + 0.3 eps, g) / T)   ATAC alone, never paired
    Stage 2   counts[c, :] ~ Multinomial(n_c, mu_r[g] yhat[c, g])              D frozen; v and tau learned; as Poisson
                                       with exposures s_c / S_c from the last E-step, S_c = sum_g mu_g yhat / sum_g mu_g
    yhat      A_g sum_s W_s(tau_g) D'(z_s, g) + B_g,  dz/dt = v(z), z_0 = z, Lip(v) <= 1
    D'        D, or with the peaks of every gene given: those of them that its expression follows (_EM.weigh)

Expression of gene g is what the frozen readout of its own accessibility gives once the state has moved for
tau_g. Stage 2 is expectation-maximisation: given v, each gene's likelihood is laid out on a grid of log tau
(E-step); given tau, v follows the gradient (M-step). Only ratios of delays are determined: the gauge is
mean log tau = 0 over the genes that carry signal. RNA lags chromatin, so v runs backward in developmental time.

    rng = torch.Generator().manual_seed(0)
    result = fit(x, access, counts, gene_emb, rng)          # both stages, averaged over members
    result.log_tau, result.sd, result.kernel                # (G,), (G,), "exp" | "shift" | "gamma"
    halves = split_half(x, access, counts, gene_emb, rng, result.kernel)
    verdict = gate(result, halves)                          # .open, .reasons
    low, high = intervals(result.log_tau, result.sd, replicates)
    ok, why = identifiable(result, access, counts, halves)

or a stage at a time: anchor = fit_anchor(x, access, gene_emb, rng);
delays = fit_delay(anchor, access, counts, rng, kernel=None).

Shapes  N cells, G genes, C peaks of genes, J landmark states, T + 1 saved times, U grid values; x (N, 256),
        access and counts (N, G), peaks (N, C), gene_emb (G, 512), z (N, 8), D (N, G), log_tau (G,)
Units   ODE time in the gauge above, never hours
Ref     Dempster et al. 1977, Maximum likelihood from incomplete data via the EM algorithm
"""
import copy
import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import nn
from torch.nn.utils import parametrize

from align_mlp import AlignMLP
from vector_field import EffendiVectorField
from workers import Pool

LATENT = 8                                                  # more dimensions measured worse
TIMES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)                          # where the Euler path is kept
KERNELS = ("exp", "shift", "gamma")
# What kernel=None chooses from. gamma lies between the two and took the place of a planted exp on held-out cells by
# 2 % of the gain, which bent the delays (slope of estimated on planted log tau 0.64 instead of 0.86).
CANDIDATES = ("exp", "shift")
TRIAL = (6, 2, 2, 5e-3)                                     # of another kernel: epochs, warm, every, learning rate
LOG_TAU = torch.linspace(math.log(0.06), math.log(8.0), 33)
SHAPES = {"exp": 1.0, "gamma": 3.0}                         # of the gamma-distributed delay; "shift" has none
BANDWIDTH = 0.5                                             # latent units over which landmark cells are averaged
N_LANDMARKS = 400
N_REFERENCES = 1000                                         # cells that stand for all states of the population
OWN = 8.0                                                   # learning rate of what belongs to one gene, over the rest's
NOISE = 0.3                                                 # latent noise under which the readout must hold
PEAK_SD = 0.7                                               # prior spread of what a peak counts for, 1 = as all others
RESIDUAL_SD = 0.2                                           # of what D may miss of a gene's accessibility, mean about 1
RESIDUAL_AXES = 16
AMPLITUDE, OFFSET_SD = (0.8, 0.5), 10.0                     # priors of A and B where they are integrated out
FEW = 10.0                                                  # counts below which a peak's share is that over all cells


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


# --- Stage 1: the readout of a gene's own chromatin ----------------------------------------------------------------

class GeneReadout(nn.Module):
    """Relative accessibility of every gene in a state, mean about 1 over the cells.

        D(z, g) = 4 exp(g.e_g + p_g) sigmoid(kappa P(z).(e_g + delta_g) + b.e_g + q_g)

    e_g is the gene embedding on its leading principal axes; delta_g, p_g, q_g are free per gene and
    penalised, so that a gene differs from what its embedding says only as far as its own counts ask for it.
    """

    def __init__(self, gene_emb, latent=LATENT, hidden=64, rank=32):
        super().__init__()
        self.args = dict(n_genes=len(gene_emb), latent=latent, hidden=hidden, rank=rank)
        centre = gene_emb.mean(0)
        axes = torch.linalg.svd(gene_emb - centre, full_matrices=False).Vh[:rank].T
        e = (gene_emb - centre) @ axes
        axes = axes / e.square().mean().sqrt().clamp_min(1e-12)
        self.register_buffer("centre", centre)
        self.register_buffer("axes", axes)                                      # (emb dim, K)
        self.register_buffer("e", (gene_emb - centre) @ axes)                   # (G, K)
        width = self.e.shape[1]
        self.kappa = 12 / math.sqrt(width)
        self.P = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.gain = nn.Parameter(torch.zeros(width))
        self.offset = nn.Parameter(torch.zeros(width))
        self.delta = nn.Parameter(torch.zeros(len(gene_emb), width))
        self.p = nn.Parameter(torch.full((len(gene_emb),), -math.log(2)))
        self.q = nn.Parameter(torch.zeros(len(gene_emb)))
        self.register_buffer("landmarks", torch.empty(0, latent))
        self.register_buffer("log_size", torch.empty(0))

    def hidden(self, z):
        """P at the nearest believable state, sum_j w_j z_j, and there log T = sum_j w_j log T_j: (..., K + 1).

            w = softmax_j(-|z - z_j|^2 / 2 h^2)         over landmark cells z_j
        The flow leaves the cells that the readout was fitted on; what the readout says out there is arbitrary,
        and a flow free to use it explains expression without moving along the process.
        """
        log_size = z.new_zeros(1).expand(*z.shape[:-1], 1)
        if len(self.landmarks):
            mean = self.near(z) @ torch.cat([self.landmarks, self.log_size[:, None]], 1)
            z, log_size = mean[..., :-1], mean[..., -1:]
        return torch.cat([self.P(z), log_size], -1)

    def near(self, z):
        """The weights w (..., J) of the landmarks."""
        scaled = self.landmarks / BANDWIDTH**2
        return torch.softmax(nn.functional.linear(z, scaled, -(scaled * self.landmarks).sum(1) / 2), -1)

    def forward(self, z, genes=slice(None)):
        """(..., latent) -> (..., G) for the genes asked for."""
        level, shape = self.parts(self.hidden(z), genes)
        return level * shape

    def parts(self, hidden, genes=slice(None)):
        """(G,) and (..., G), whose product is D; hidden as hidden(z) gives it."""
        level, slope, bias = self.linear(genes)
        shape = torch.sigmoid(hidden[..., :-1] @ slope.T + bias)
        return level, shape * hidden[..., -1:].exp() if len(self.landmarks) else shape

    def linear(self, genes=slice(None)):
        """Level (G,), slope (G, K) and bias (G,): D = level T sigmoid(P(z).slope + bias)."""
        e = self.e[genes]
        return (4 * torch.exp(e @ self.gain + self.p[genes]), self.kappa * (e + self.delta[genes]),
                e @ self.offset + self.q[genes])

    @torch.no_grad()
    def land(self, z):
        """Take the cells z (J, 8) as landmarks, and from them the size of every state: all that is open in it.

            log T_j = r (mean_j m_j - m_j),    m_j = median_g (log D(z_j, g) - mean_j log D(z_j, g))
            r = 1 - E[se_j^2] / var_j m_j,     se_j^2 = (pi / 2) (1.48 MAD_g)^2 / G;     0 below 30 genes
        Counts of a cell say what share of all fragments a gene has. Where more genes open than close, shares
        of unchanged genes fall, and a gene seems to close; that the middle gene does not change gives the scale.
        r is the part of m's variance that the luck of which genes were drawn does not explain. Where hardly a gene
        keeps its level there is no such middle gene, and T does harm (LOG.md).
        """
        self.landmarks = torch.empty(0, z.shape[1])
        relative = self(z).clamp_min(1e-30).log()
        relative = relative - relative.mean(0)
        middle = relative.median(1).values
        deviation = 1.48 * (relative - middle[:, None]).abs().median(1).values
        noise = math.pi / 2 * deviation.square().mean() / relative.shape[1]
        r = (1 - noise / middle.var().clamp_min(1e-12)).clamp_min(0)
        enough = relative.shape[1] >= 30 and len(z) > 1
        self.landmarks, self.log_size = z.clone(), r * (middle.mean() - middle) if enough else torch.zeros(len(z))

    def own(self):
        """What belongs to one gene each."""
        return {name: getattr(self, name).detach() for name in ("delta", "p", "q")}

    def penalty(self):
        p = self.p + math.log(2)
        return 1e-2 * self.delta.square().mean() + 1e-4 * (p.square().mean() + self.q.square().mean())


@dataclass
class Peaks:
    """Accessibility of the peaks of genes; those of a gene add up to its accessibility."""
    counts: sparse.csr_matrix       # (N, C)
    gene: np.ndarray                # (C,) numbers of genes

    @classmethod
    def of(cls, counts, gene_names, genes):
        """Of the peaks (N, C) of genes `gene_names` (C,) those that belong to one of `genes`, which are numbered."""
        number = {gene: g for g, gene in enumerate(genes)}
        gene = np.array([number.get(name, -1) for name in gene_names], dtype=np.int64)
        without = np.flatnonzero(np.bincount(gene[gene >= 0], minlength=len(genes)) == 0)
        if len(without):
            raise ValueError(f"{len(without)} of {len(genes)} genes with accessibility have no peak, the first "
                             f"{genes[without[0]]}.\n  Make both again: python precompute_embeddings.py genes")
        return cls(counts[:, gene >= 0].tocsr(), gene[gene >= 0])

    def __getitem__(self, cells):
        return Peaks(self.counts[np.asarray(cells)], self.gene)


@dataclass
class PeakShares:
    """How the peaks of every gene share its accessibility in the landmark states."""
    gene: torch.Tensor              # (C,)
    share: torch.Tensor             # (J, C); those of a gene add up to 1

    def of_genes(self, n_genes):
        """The numbers of every gene's peaks (G, k), padded with -1."""
        of_gene = self.gene.argsort(stable=True).split(self.gene.bincount(minlength=n_genes).tolist())
        return nn.utils.rnn.pad_sequence(of_gene, batch_first=True, padding_value=-1)


@dataclass
class Seen:
    """What Stage 1's cells show in the landmark states, each shared out as its ATAC says (state_posterior)."""
    counts: torch.Tensor            # (J, G) sum_c P[c, j] access[c, g]
    exposure: torch.Tensor          # (J,) sum_c P[c, j] s_c


@torch.no_grad()
def gather(readout, access, depth, mean, peaks=None, block=4096):
    """Seen, and the same counts of peaks (J, C), None without Peaks."""
    counts, exposure, of_peaks = 0.0, 0.0, 0.0
    for rows in torch.arange(len(access)).split(block):
        P = state_posterior(readout, readout.landmarks, access[rows], depth[rows], mean)
        counts, exposure = counts + P.T @ access[rows], exposure + P.T @ depth[rows]
        if peaks is not None:
            of_peaks = of_peaks + torch.from_numpy((peaks.counts[rows.numpy()].T @ P.numpy()).T.astype(np.float32))
    return Seen(counts, exposure), None if peaks is None else of_peaks


def share_out(nodes, expected, peaks, n_genes):
    """PeakShares: expected counts of the peaks (J, C) around every landmark, as shares of their gene's.

        n_jp = sum_k K(z_j, z_k) expected_kp,     share_jp = (n_jp + FEW share_p) / (n_jg + FEW)
    K Gaussian of BANDWIDTH, share_p over all cells.
    """
    gene = torch.as_tensor(peaks.gene)
    expected = torch.exp(-torch.cdist(nodes, nodes).square() / (2 * BANDWIDTH**2)) @ expected

    def of_gene(values):
        return torch.zeros(*values.shape[:-1], n_genes).index_add(-1, gene, values)[..., gene]
    total = torch.as_tensor(np.asarray(peaks.counts.sum(0), np.float32)).flatten() + 0.5
    return PeakShares(gene, (expected + FEW * total / of_gene(total)) / (of_gene(expected) + FEW))


@dataclass
class Anchor:
    align: AlignMLP
    readout: GeneReadout
    z: torch.Tensor                 # (N, 8)
    nll: float                      # held-out cells, per entry
    steps: int
    history: list                   # (step, held-out nll)
    seen: Seen
    peaks: PeakShares | None = None

    def state(self):
        """Plain values and tensors, for a file; z is not among them, AlignMLP gives it."""
        return {"align": self.align.state_dict(), "readout": self.readout.state_dict(), "nll": self.nll,
                "steps": self.steps, "history": self.history, "seen": vars(self.seen),
                "peaks": self.peaks and vars(self.peaks)}


def restore_anchor(state, x, gene_emb):
    """An Anchor on the cells x (N, 256) from the state of another one; gene_emb (G, 512) as it was fitted."""
    align_state, readout_state, peaks = (state[name] for name in ("align", "readout", "peaks"))
    hidden = align_state["net.0.bias"].shape[0]
    align, readout = AlignMLP(x.shape[1], LATENT, hidden), GeneReadout(torch.as_tensor(gene_emb))
    readout.landmarks = torch.empty_like(readout_state["landmarks"])
    readout.log_size = torch.empty_like(readout_state["log_size"])
    align.load_state_dict(align_state)
    readout.load_state_dict(readout_state)
    align.eval().requires_grad_(False)
    return Anchor(align, readout.requires_grad_(False), align(torch.as_tensor(x)), state["nll"], state["steps"],
                  state["history"], Seen(**state["seen"]), peaks and PeakShares(**peaks))


def size_factors(counts):
    """Per-cell depth with mean 1 (N,) and per-gene mean (G,)."""
    s = counts.sum(1)
    return (s / s.mean()).clamp_min(1e-3), counts.mean(0).clamp_min(1e-6)


def with_own(readout, delta, p, q):
    """The readout with other parameters of the genes."""
    new = copy.copy(readout)
    new._parameters, new._buffers = dict(readout._parameters), dict(readout._buffers)
    for name, value in dict(delta=delta, p=p, q=q).items():
        setattr(new, name, nn.Parameter(value, requires_grad=False))
    return new


def poisson_nll(mean, counts):
    """mean(m - c log m): the negative log-likelihood up to what depends on counts alone."""
    return (mean - counts * mean.log()).mean()


def generator(seed, what, index=0):
    """A stream of its own for every piece of work, so that redoing one piece alone gives it the same draws."""
    digest = hashlib.blake2b(f"{seed} {what} {index}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def descend(loss, optimiser, schedule):
    """One step down the gradient of a loss."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    schedule.step()


def split_cells(n, share, rng):
    """Shuffled cell indices: (kept, held out)."""
    order = torch.randperm(n, generator=rng)
    n_out = max(1, round(share * n))
    return order[n_out:], order[:n_out]


def fit_anchor(x, access, gene_emb, rng, steps=800, batch=256, lr=6e-3, held_out=0.1, hidden=128, check=50,
               peaks=None):
    """Stage 1: latent and readout from accessibility alone. The number of steps is chosen by held-out cells.

    AlignMLP and readout are fitted together first. Then every cell's state is inferred from its accessible genes
    (sharpen), which tells it better than its embedding alone, and AlignMLP learns to say the same.
    Shapes  x (N, 256), access (N, G), gene_emb (G, 512), rng torch.Generator on the CPU, peaks: Peaks
    """
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))           # weights and dropout
    x, access, gene_emb = (torch.as_tensor(a, dtype=torch.float32) for a in (x, access, gene_emb))
    centre, scale = x.mean(0), (x - x.mean(0)).square().mean(0).max().sqrt().clamp_min(1e-12)
    xs = (x - centre) / scale
    align, readout = AlignMLP(x.shape[1], LATENT, hidden), GeneReadout(gene_emb)
    own = [readout.delta, readout.p, readout.q]
    shared = [p for p in (*align.parameters(), *readout.parameters()) if not any(p is o for o in own)]
    opt = torch.optim.Adam([{"params": shared}, {"params": own}], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, [lr, OWN * lr], total_steps=steps + 1, pct_start=0.1)
    depth, mean = size_factors(access)
    train, out = split_cells(len(x), held_out, rng)
    best, history = (math.inf, 0, None), []
    for step in range(1, steps + 1):
        rows = train[torch.randint(len(train), (batch,), generator=rng)]
        z = align(xs[rows])
        z = z + NOISE * torch.randn(z.shape, generator=rng)
        loss = poisson_nll(depth[rows, None] * mean * readout(z), access[rows]) + readout.penalty()
        descend(loss, opt, schedule)
        if step % check == 0 or step == steps:
            align.eval()
            with torch.no_grad():
                nll = poisson_nll(depth[out, None] * mean * readout(align(xs[out])), access[out]).item()
            align.train()
            history.append((step, nll))
            if nll < best[0]:
                best = (nll, step, copy.deepcopy((align.state_dict(), readout.state_dict())))
    nll, step, (state_align, state_readout) = best
    align.load_state_dict(state_align)
    readout.load_state_dict(state_readout)
    sharpen(align, readout, xs, access, depth, mean, train, rng)
    align.eval().requires_grad_(False)
    readout.requires_grad_(False)
    with torch.no_grad():                                   # AlignMLP takes x as it comes
        first = align.net[0]
        first.weight /= scale
        first.bias -= first.weight @ centre
        z = align(x)
    readout.land(z[train[:N_LANDMARKS]])
    seen, of_peaks = gather(readout, access, depth, mean, peaks)
    shares = None if peaks is None else share_out(readout.landmarks, of_peaks, peaks, len(mean))
    return Anchor(align, readout, z, nll, step, history, seen, shares)


def sharpen(align, readout, x, access, depth, mean, train, rng, steps=100, lr=1e-2, align_steps=200, batch=512):
    """One round of expectation-maximisation over the states of cells; align and readout are changed in place.

        E   P[c, j] ~ prod_g Poisson(access[c, g]; mu_g s_c D(z_j, g))          z_j of reference cells, themselves
                                                                                moved to their posterior mean first
        M   readout: sum_cj P[c, j] log Poisson(...), latent noise NOISE / 3; then E once more, and AlignMLP:
            |AlignMLP(x_c) - P z|^2
    Genes count as independent; those that share a peak are not, so that P is somewhat too sure.
    Ref     Bishop, Svensen & Williams 1998, GTM: the generative topographic mapping
    """
    align.eval()
    rows = train[:N_REFERENCES]
    with torch.no_grad():
        nodes = align(x[rows])
        nodes = state_posterior(readout, nodes, access[rows], depth[rows], mean) @ nodes
        expected, exposure = 0.0, 0.0                       # of every reference state
        for part in train.split(4096):
            share = state_posterior(readout, nodes, access[part], depth[part], mean)
            expected, exposure = expected + share.T @ access[part], exposure + share.T @ depth[part]
    params = list(readout.parameters())
    opt = torch.optim.Adam(params, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        D = readout(nodes + NOISE / 3 * torch.randn(nodes.shape, generator=rng)).clamp_min(1e-30)
        loss = (exposure[:, None] * mean * D - expected * D.log()).sum() / (len(train) * len(mean)) + readout.penalty()
        descend(loss, opt, schedule)
    with torch.no_grad():
        z = torch.cat([state_posterior(readout, nodes, access[part], depth[part], mean) @ nodes
                       for part in torch.arange(len(x)).split(4096)])
    align.train()
    opt = torch.optim.AdamW(align.parameters(), lr=4e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=align_steps + 1, pct_start=0.1)
    for _ in range(align_steps):
        rows = torch.randint(len(x), (batch,), generator=rng)
        loss = (align(x[rows]) - z[rows]).square().mean()
        descend(loss, opt, schedule)


def state_posterior(readout, nodes, access, depth, mean):
    """P[c, j], the probability that cell c is in state nodes[j], all states equally likely before: (N, J)."""
    return torch.softmax(state_likelihood(readout, nodes, access, depth, mean), 1)


def state_likelihood(readout, nodes, access, depth, mean):
    """log prod_g Poisson(access[c, g]; mu_g s_c D(z_j, g)) up to what the state leaves as it is: (N, J)."""
    rate = mean * readout(nodes).clamp_min(1e-30)                               # (J, G); one zero would be all nan
    return access @ rate.log().T - depth[:, None] * rate.sum(1)


# --- Stage 2: flow and delays ----------------------------------------------------------------------------------------

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


def path(field, z, times=TIMES):
    """Euler states (T+1, B, 8) at the saved times, the spectral norms computed once."""
    return moving_path(field, z, times)[0]


@torch.no_grad()
def grid_likelihood(states, readout, counts, offset, mean, kernel, now=None, block=16, times=TIMES,
                    chromatin=None):
    """Log-likelihood of every gene on a grid of log tau, A and B fitted at each point.

        yhat = A sum_s W_s(tau) D(z_s, g) + B      A, B by least squares weighted with 1 / variance
        L_g(u) = sum_c y log yhat - mu s yhat
    now: (A W^T (T+1, G), B), for the variance. chromatin (G,): whose readout each gene is given (None = its own).

    Shapes  states (T+1, N, 8), counts (N, G), offset (N,), mean (G,) -> L, A, B (G, U)
    """
    weights = kernel_weights(LOG_TAU.exp(), times, kernel).to(states)           # (U, T+1)
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
        Phi Phi^T ~ RESIDUAL_SD^2 exp(-|z_j - z_k|^2 / 2 (2 h)^2), its leading axes;  c ~ N(0, 1) before any count
        seen[j, g] / (mu_g s_j / T_j) ~ N(D + Phi c, variance of the counts)
    D has been fitted to these counts, as well as its shape allows: how far it may be off, and where the counts say that
    it is, decides what expression may ask of it. Exact in c: a normal distribution, kept as precision and pull.
    Ref     Rasmussen & Williams 2006, Gaussian processes for machine learning, chapters 2 and 8
    """

    def __init__(self, readout, seen):
        nodes = readout.landmarks
        value, axis = torch.linalg.eigh(torch.exp(-torch.cdist(nodes, nodes).square() / (8 * BANDWIDTH**2)).double())
        self.basis = RESIDUAL_SD * (axis * value.clamp_min(0).sqrt())[:, -RESIDUAL_AXES:]          # (J, R)
        D = readout(nodes).clamp_min(0.02).double()
        mean = (seen.counts.sum(0) / seen.exposure.sum()).clamp_min(1e-6)
        weight = (seen.exposure / readout.log_size.exp())[:, None].double() * mean / D             # 1 / variance
        n_axes = self.basis.shape[1]
        self.precision = (weight.T @ products(self.basis)).view(-1, n_axes, n_axes) + torch.eye(n_axes)     # (G, R, R)
        self.pull = (seen.counts / D - weight * D).T @ self.basis                                  # (G, R)


def products(x):
    """Of all pairs of columns (J, R) -> (J, R R)."""
    return (x[:, :, None] * x[:, None]).flatten(1)


@torch.no_grad()
def grid_evidence(states, readout, counts, exposure, mean, kernel, A, now, residual, times=TIMES):
    """Log evidence of genes on the grid of log tau, with A, B and the residual integrated out (G, U).

        y = A sum_s W_s(tau) D(z_s) + A_0 sum_s W_s(tau) r(z_s) + B        y normal with the variance of counts
        A ~ N(0.8, 0.5^2), B ~ N(0, 10^2), r what ATAC leaves open (Residual), A_0 the A found before
    A course that ATAC does not show well may be another one: a delay that only its noise asks for is not believed, and
    expression helps to find the course.

    Shapes  states (T+1, J, 8), counts (J, G), exposure (J,), mean and A (G,), now (J, G) yhat, for the variance
    """
    W = kernel_weights(LOG_TAU.exp(), times, kernel).double()
    D, moved_basis = readout(states).double(), readout.near(states).double() @ residual.basis       # (T+1, J, G or R)
    now, A = now.clamp_min(0.05).double(), A.double()[:, None]
    w, wy = mean * exposure[:, None] / now, counts / now                        # 1 / variance of y, and that times y
    n_axes, evidence = residual.basis.shape[1], []
    Q, v = w.new_empty(len(mean), n_axes + 2, n_axes + 2), w.new_empty(len(mean), n_axes + 2)
    for weights in W:                                       # variables: B, A, c_1 ... c_R
        f, r = (torch.einsum("s,sjk->jk", weights, part) for part in (D, moved_basis))
        wf = w * f
        Q[:, 0, 0], Q[:, 1, 1] = w.sum(0) + OFFSET_SD**-2, (wf * f).sum(0) + AMPLITUDE[1]**-2
        Q[:, 0, 1] = Q[:, 1, 0] = wf.sum(0)
        Q[:, 0, 2:] = Q[:, 2:, 0] = A * (w.T @ r)
        Q[:, 1, 2:] = Q[:, 2:, 1] = A * (wf.T @ r)
        Q[:, 2:, 2:] = A[..., None].square() * (w.T @ products(r)).view(-1, n_axes, n_axes) + residual.precision
        v[:, 0], v[:, 1] = wy.sum(0), (wy * f).sum(0) + AMPLITUDE[0] * AMPLITUDE[1]**-2
        v[:, 2:] = A * (wy.T @ r) + residual.pull
        evidence.append(normal_evidence(Q, v)[0])
    evidence = torch.stack(evidence, 1)
    return (evidence - evidence.amax(1, keepdim=True)).float()                  # float32 would lose nats of large sums


def normal_evidence(Q, v):
    """log int exp(v.x - x.Q x / 2) dx up to a constant (...), the mean of x (..., K) and the Cholesky factor of Q."""
    factor = torch.linalg.cholesky(Q)
    centre = torch.cholesky_solve(v[..., None], factor)[..., 0]
    return (0.5 * (v * centre).sum(-1) - torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)), centre, factor


@dataclass
class DelayFit:
    """What Stage 2 found."""
    field: EffendiVectorField
    kernel: str
    log_tau: torch.Tensor           # (G,) posterior mean in the gauge
    sd: torch.Tensor                # (G,) posterior standard deviation, readout, flow and states given
    A: torch.Tensor                 # (G,)
    B: torch.Tensor                 # (G,)
    log_like: torch.Tensor          # (G, U) grid_evidence on LOG_TAU, before the gauge
    held_out: torch.Tensor          # (N_out,) log-likelihood of each held-out cell
    still: torch.Tensor             # (N_out,) the same for v = 0
    own: torch.Tensor               # (G,) log-likelihood of a gene's own chromatin beyond another gene's, v = 0
    gene_gain: torch.Tensor         # (G,) log-likelihood over all cells beyond v = 0
    gauge: float                    # own log tau of the field - log_tau: what the gauge took away
    epoch: int
    history: list                   # (epoch, held-out nats a cell beyond v = 0)
    own_parameters: dict            # delta, p, q of the readout that expression follows
    peak_weight: torch.Tensor       # (C,) what every peak counts for; sum of |weight| share over a gene = 1
    peak_sd: torch.Tensor           # (C,) its posterior standard deviation, 0 where a gene's peaks were not weighed

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


def posterior(log_like, prior_mean, prior_sd):
    """Posterior weights on the grid (G, U), posterior mean and sd (G,)."""
    log_post = log_like - ((LOG_TAU - prior_mean[:, None]) / prior_sd).square() / 2
    weights = torch.softmax(log_post.double(), 1).float()
    mean = weights @ LOG_TAU
    return weights, mean, (weights @ LOG_TAU.square() - mean.square()).clamp_min(1e-6).sqrt()


def gauge(mean, sd, prior_sd):
    """Mean log tau over genes, each weighted with the share of the prior variance that its data removed."""
    weight = (1 - (sd / prior_sd).square()).clamp_min(1e-3)
    return (weight * mean).sum() / weight.sum()


def head_means(gene_emb, log_tau, sd, prior_sd, ridge=10.0):
    """What the embeddings of all other genes say about a gene's log tau: ridge regression, leave-one-out.

        mean_-g = (fit_g - h_g y_g) / (1 - h_g)     h the diagonal of the hat matrix
    Shrunk by its own leave-one-out slope, so that embeddings that predict nothing give the gauge's zero.
    """
    e = torch.cat([gene_emb, torch.ones(len(gene_emb), 1)], 1).double()
    w = (1 - (sd / prior_sd).square()).clamp_min(1e-3).double()
    we = e * w[:, None]
    solve = torch.linalg.solve(e.T @ we + ridge * torch.eye(e.shape[1], dtype=e.dtype), we.T)       # (K, G)
    h = (e * solve.T).sum(1).clamp_max(0.99)
    y = log_tau.double()
    left_out = (e @ (solve @ y) - h * y) / (1 - h)
    slope = (w * left_out * y).sum() / (w * left_out.square()).sum().clamp_min(1e-12)
    return (left_out * slope.clamp(0, 1)).float()


def head_predict(gene_emb, log_tau, sd, new_emb, prior_sd=1.0, ridge=10.0):
    """log tau (H,) of genes that were not fitted, from their embeddings (H, D): the same ridge, shrunk alike.

    gene_emb (G, D), log_tau and sd (G,) of the fitted genes. Embeddings are read on the fitted genes' axes.
    """
    known = GeneReadout(gene_emb)
    left_out = head_means(known.e, log_tau, sd, prior_sd, ridge)
    e, new = (torch.cat([x, torch.ones(len(x), 1)], 1).double()
              for x in (known.e, (new_emb - known.centre) @ known.axes))
    w = (1 - (sd / prior_sd).square()).clamp_min(1e-3).double()
    we = e * w[:, None]
    fit = torch.linalg.solve(e.T @ we + ridge * torch.eye(e.shape[1], dtype=e.dtype), we.T @ log_tau.double())
    raw = e @ fit
    shrink = ((left_out.double() * raw).sum() / raw.square().sum().clamp_min(1e-12)).clamp(0, 1)
    return (shrink * (new @ fit)).float()


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


@torch.no_grad()
def moved(anchor, delay, counts, times=TIMES):
    """Path (T+1, N, 8) and exposures (N,) of an anchor's cells under a fit, the genes' mean counts (G,), and D'."""
    depth, mean = size_factors(counts)
    states, readout = path(delay.field, anchor.z, times), delay.followed(anchor.readout)
    weights = kernel_weights((delay.log_tau + delay.gauge).exp(), times, delay.kernel)
    return states, exposures(states, readout, weights, delay.A, delay.B, depth, mean), mean, readout


def cell_likelihood(yhat, counts, depth, mean):
    """(N,) sum over genes of y log m - m, m = mu s yhat / S: the multinomial likelihood of the cell's counts."""
    m = depth[:, None] * mean * yhat / cell_size(yhat, mean)
    return (counts * m.log() - m).sum(1)


@torch.no_grad()
def still_cells(z, readout, counts, depth, offset, mean, train, out):
    """v = 0: yhat = A D(z_0) + B. Log-likelihood of held-out cells (N_out,), with exposures of its own.

    offset (N,): exposures to begin with.
    """
    own = torch.ones(len(mean), 1)
    for _ in range(2):
        _, a, b = grid_likelihood(z[None, train], readout, counts[train], offset[train], mean, "exp", times=(0.0,))
        a, b = a[:, 0], b[:, 0]
        offset = exposures(z[None], readout, own, a, b, depth, mean)
    return cell_likelihood(predict(z[None, out], readout, own, a, b), counts[out], depth[out], mean)


def still_genes(z, readout, counts, offset, mean, genes=None):
    """v = 0: log-likelihood of every gene over the cells (G,).

    genes (G,): whose readout each is given (None = its own).
    offset (N,): depth over cell_size, the same for all that is compared.
    """
    return grid_likelihood(z[None], readout, counts, offset, mean, "exp", times=(0.0,), chromatin=genes)[0][:, 0]


def fit_delay(anchor, access, counts, rng, kernel=None, epochs=20, warm=6, every=3, batch=256, lr=1e-2,
              kinetic=0.012, held_out=0.1, prior_sd=1.0, times=TIMES, rna_only=None, field=None):
    """Stage 2. kernel None = "exp", unless held-out cells are more likely under another by two standard errors.

    First-order lags are what mRNA decay gives; a difference within the noise says nothing about the kernel, and
    shapes chosen by noise cost accuracy. Another kernel is first tried from where the first one ended, which is told
    from the better one as well as a fit of its own is, in a third of the time. It has trained longer than what it is
    compared with; so one that wins only earns a fit of its own, which has to win too.
    Shapes  anchor: on the N cells; access and counts (N, G); rna_only (M, G): counts of cells without ATAC, which
            join the E-steps; field: a function that is given the _EM and returns the field to start from
    """
    least = warm if anchor.peaks is None else warm + every
    if epochs < least:
        raise ValueError(f"EM_EPOCHS={epochs}: at least {least} epochs come before the E-steps that are needed.\n"
                         "  Leave it at its default.")
    seed = int(torch.randint(2**31, (1,), generator=rng))                       # weights of the field
    em = _EM.of(anchor, access, counts, rng, held_out, times, prior_sd, batch, kinetic, rna_only)
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
    return em.describe(best, rng)


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
    readout: GeneReadout            # D'
    peak_weight: torch.Tensor       # (C,)
    peak_sd: torch.Tensor           # (C,)
    held_out: torch.Tensor | None = None    # (N_out,) log-likelihood of each held-out cell
    epoch: int = 0
    history: tuple = ()             # (epoch, held-out nats a cell)


@dataclass
class _EM:
    """Expectation-maximisation on some paired cells.

        M   v follows the gradient; cells start from z_c, which ATAC alone gives
        E   P[c, j] ~ p(access[c] | z_j) prod_g share_jg^counts[c, g]               z_j the readout's landmarks
            share_jg = mu_g yhat(z_j, g) / sum of it;  then L_g(log tau) from the sums of P counts and P depth per state
            The last one, on all cells, does without the readout's word for a gene's accessibility (grid_evidence).
    The ATAC of a cell leaves its state open; its RNA narrows it, given all genes' delays so far. A cell without ATAC
    has a flat first factor. Nothing of this is needed or used to predict. A factor that is broader than what ATAC says,
    such as exp(-|z_c - z_j|^2 / 2 h^2), would let RNA overrule it, and shuffled pairing would give delays too.
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
    given_atac: torch.Tensor        # (N, J) log p(access[c] | z_j)
    peaks: PeakShares | None
    seen: Seen

    @classmethod
    def of(cls, anchor, access, counts, rng, held_out=0.1, times=TIMES, prior_sd=1.0, batch=256, kinetic=0.012,
           rna_only=None):
        access, counts = (torch.as_tensor(a, dtype=torch.float32) for a in (access, counts))
        rna_only = torch.as_tensor(counts[:0] if rna_only is None else rna_only, dtype=torch.float32)
        train, out = split_cells(len(counts), held_out, rng)
        with torch.no_grad():
            given_atac = state_likelihood(anchor.readout, anchor.readout.landmarks, access, *size_factors(access))
        return cls(anchor.z, anchor.readout, counts, *size_factors(counts), train, out, times, prior_sd, batch, kinetic,
                   rna_only, given_atac, anchor.peaks, anchor.seen)

    def begin(self, kernel, after=None):
        """The start of a fit, or what a fit with another kernel has reached, read with this one."""
        n_genes, n_peaks = len(self.mean), 0 if self.peaks is None else len(self.peaks.gene)
        if after is None:
            return _Flow(EffendiVectorField(LATENT, 128), kernel, torch.zeros(n_genes), torch.full((n_genes,), 0.8),
                         torch.full((n_genes,), 0.2), torch.zeros(n_genes), self.readout, torch.ones(n_peaks),
                         torch.full((n_peaks,), PEAK_SD))
        flow = replace(after, field=copy.deepcopy(after.field).requires_grad_(True), held_out=None, kernel=kernel)
        return self.e_step(flow if self.peaks is None else self.weigh(flow))

    def weights(self, flow):
        return kernel_weights(flow.log_tau.exp(), self.times, flow.kernel)

    @torch.no_grad()
    def exposure(self, flow):
        """(N,) under what has been found so far."""
        flow.field.eval()
        return exposures(path(flow.field, self.z, self.times), flow.readout, self.weights(flow), flow.A, flow.B,
                         self.depth, self.mean)

    @torch.no_grad()
    def at_landmarks(self, flow, rows):
        """Paths (T+1, J, 8) of the landmarks; counts (J, G) and exposures (J,) of the cells `rows` expected there."""
        states = path(flow.field.eval(), self.readout.landmarks, self.times)
        yhat = predict(states, flow.readout, self.weights(flow), flow.A, flow.B)
        share = self.mean * yhat
        share = (share / share.sum(1, keepdim=True)).clamp_min(1e-30).log()
        counts, exposure = 0.0, 0.0
        paired = ((self.counts[part], self.given_atac[part]) for part in rows.split(4096))
        alone = ((part, 0.0) for part in (self.rna_only.split(4096) if len(self.rna_only) else ()))
        for y, given_atac in (*paired, *alone):
            P = torch.softmax(given_atac + y @ share.T, 1)
            counts, exposure = counts + P.T @ y, exposure + y.sum(1) @ P
        return states, counts, exposure / self.mean.sum() / cell_size(yhat, self.mean)[:, 0]

    def e_step(self, flow, damping=1.0, kernel=None):
        """Delays, A and B given the field. Damped: the field was fitted to the last ones, and follows only in part."""
        like, a, b = self.likelihood(flow, *self.at_landmarks(flow, self.train), kernel)
        share, centre, sd = posterior(like, flow.prior, self.prior_sd)
        centre = centre - gauge(centre, sd, self.prior_sd)
        return replace(flow, kernel=kernel or flow.kernel, log_tau=flow.log_tau + damping * (centre - flow.log_tau),
                       A=flow.A + damping * ((share * a).sum(1) - flow.A),
                       B=flow.B + damping * ((share * b).sum(1) - flow.B),
                       prior=head_means(self.readout.e, centre, sd, self.prior_sd))

    def likelihood(self, flow, states, counts, exposure, kernel=None):
        """grid_likelihood of what at_landmarks gives: L, A, B (G, U)."""
        return grid_likelihood(states, flow.readout, counts, exposure, self.mean, kernel or flow.kernel,
                               (flow.A * self.weights(flow).T, flow.B), times=self.times)

    @torch.no_grad()
    def weigh(self, flow):
        """The flow with D', a readout of those peaks of every gene that its expression follows.

            y = B + sum_p (A + d_p) F_p,   F_p = sum_s W_s(tau) D(z_s, g) share_p(z_s)       at the landmarks
            A and B as in grid_evidence, d_p ~ N(0, PEAK_SD^2), y normal with the variance of counts
            b_p = E[A + d_p] over the posterior of tau, whose evidence has A, B, d integrated out
            D'(z) ~ sum_p b_p D(z, g) share_p(z) + c_g, c_g such that it is nowhere below 2 % of its mean size
        Peaks of which expression follows only some, or which repress it, would otherwise bend the delay. Where
        all act alike, d is small. A gene of one peak, or one that only follows its chromatin upside down, keeps D:
        a turned course and a delay of half a period look alike.
        """
        explain, peaks = self.explainer(flow, self.train), self.peaks.of_genes(len(self.mean))
        courses, weights, variances, weighed = [], [], [], []
        for genes in torch.arange(len(self.mean)).split(32):
            evidence, centre, spread, part = explain(genes, genes)
            prior = ((LOG_TAU - flow.prior[genes, None]) / self.prior_sd).square() / 2
            tau = torch.softmax(evidence - prior, 1).float()[:, None]           # (g, 1, U)
            b = tau @ centre                                                    # (g, 1, k)
            upright = (part * b[:, 0]).sum((0, 2)) > 0
            several = (peaks[genes] >= 0).sum(1) > 1
            weighed.append(upright & several)
            course = (part * torch.where(weighed[-1][:, None], b[:, 0], 1.0)).sum(2)
            course = course + (0.02 * course.abs().mean(0) - course.amin(0)).clamp_min(0)
            courses.append(course / course.mean(0))
            weights.append(b[:, 0])
            variances.append((tau @ (spread + (centre - b).square()))[:, 0])
        b, weighed = torch.cat(weights), torch.cat(weighed)[:, None]
        scale = (b.abs() * nn.functional.pad(self.peaks.share.mean(0), (0, 1))[peaks]).sum(1, keepdim=True)
        real, weight, sd = peaks >= 0, torch.empty_like(flow.peak_weight), torch.empty_like(flow.peak_sd)
        weight[peaks[real]] = torch.where(weighed, b / scale, 1.0)[real]
        sd[peaks[real]] = torch.where(weighed, torch.cat(variances).sqrt() / scale, 0.0)[real]
        return replace(flow, readout=read_as(self.readout, torch.cat(courses, 1)), peak_weight=weight, peak_sd=sd)

    def explainer(self, flow, rows, grid=LOG_TAU):
        """A function that explains genes by peaks of others: what weigh_peaks says, and these at t = 0 (J, g, k)."""
        states, counts, exposure = self.at_landmarks(flow, rows)
        now = predict(states, flow.readout, self.weights(flow), flow.A, flow.B).clamp_min(0.05)     # (J, G)
        W = kernel_weights(grid.exp(), self.times, flow.kernel)
        D, near = self.readout(states), self.readout.near(states)               # (T+1, J, G), (T+1, J, J)
        peaks = self.peaks or PeakShares(torch.arange(len(self.mean)), torch.ones(D.shape[1:]))
        of_genes, shares = peaks.of_genes(len(self.mean)), nn.functional.pad(peaks.share, (0, 1))

        def explain(genes, whose):
            share = shares[:, of_genes[whose]]                                  # (J, g, k); of the padding 0
            part = D[:, :, whose, None] * (near @ share.flatten(1)).unflatten(-1, share.shape[1:])
            w = self.mean[genes] * exposure[:, None] / now[:, genes]
            return *weigh_peaks(part, W, w, counts[:, genes] / now[:, genes]), part[0]
        return explain

    @torch.no_grad()
    def likelihood_out(self, flow):
        states = path(flow.field.eval(), self.z[self.out], self.times)
        yhat = predict(states, flow.readout, self.weights(flow), flow.A, flow.B)
        return cell_likelihood(yhat, self.counts[self.out], self.depth[self.out], self.mean)

    def run(self, flow, rng, epochs, warm, every, lr):
        """The flow of the epoch that held-out cells like best, from `warm` on; an E-step every `every` epochs."""
        field, train = flow.field, self.train
        opt = torch.optim.Adam(field.parameters(), lr=lr, fused=True)
        n_steps = epochs * math.ceil(len(train) / self.batch)
        # A warm-up of a tenth needs ten steps to have length; a few hundred cells make fewer.
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=max(n_steps + 1, 20), pct_start=0.1)
        offset = self.exposure(flow) if flow.epoch else self.depth
        best, history = None, []
        for epoch in range(1, epochs + 1):
            field.train()
            weights = self.weights(flow)
            for rows in train[torch.randperm(len(train), generator=rng)].split(self.batch):
                states, speed_sq = moving_path(field, self.z[rows], self.times)
                yhat = predict(states, flow.readout, weights, flow.A, flow.B)
                loss = poisson_nll(offset[rows, None] * self.mean * yhat, self.counts[rows]) + self.kinetic * speed_sq
                descend(loss, opt, schedule)
            if epoch < warm:
                continue
            if (epoch - warm) % every == 0:
                offset = self.exposure(flow)
                if self.peaks is not None and flow.readout is self.readout and epoch > warm:
                    flow = self.e_step(self.weigh(flow))
                else:
                    flow = self.e_step(flow, damping=0.7)
            like = self.likelihood_out(flow)
            history.append((epoch, like.mean().item()))
            if self.peaks is not None and flow.readout is self.readout:
                continue                                    # peaks not weighed yet
            if best is None or like.mean() > best.held_out.mean():
                best = replace(flow, field=copy.deepcopy(field), held_out=like, epoch=epoch)
        best.field.settle()                                 # the power iteration lags behind a fast learning rate
        best.field.eval().requires_grad_(False)
        return replace(best, history=history)

    def describe(self, flow, rng):
        """The DelayFit: a last E-step on all cells, and what v = 0 and other genes' chromatin explain.

        The delays come from grid_evidence. A and B go with D' as it is, since that is what predicts.
        v = 0 is given the better of the weights of peaks that the moving fit chose and of its own. A gene's own
        chromatin is compared with another's before peaks are weighed, since those of the other are not.
        """
        offset = self.exposure(flow)
        weights = self.weights(flow)
        states, counts, exposure = self.at_landmarks(flow, torch.arange(len(self.z)))
        _, a, b = self.likelihood(flow, states, counts, exposure)
        evidence = grid_evidence(states, flow.readout, counts, exposure, self.mean, flow.kernel, flow.A,
                                 predict(states, flow.readout, weights, flow.A, flow.B),
                                 Residual(self.readout, self.seen), self.times)
        share, centre, sd = posterior(evidence, flow.prior, self.prior_sd)
        moving = grid_likelihood(path(flow.field, self.z, self.times), flow.readout, self.counts, offset, self.mean,
                                 flow.kernel, (flow.A * weights.T, flow.B), times=self.times)[0]
        readouts = [flow.readout]
        if self.peaks is not None:
            readouts.append(self.weigh(self.e_step(replace(flow, field=Still(), readout=self.readout))).readout)
        still = max((still_cells(self.z, readout, self.counts, self.depth, offset, self.mean, self.train, self.out)
                     for readout in readouts), key=torch.sum)
        still_gene = torch.stack([still_genes(self.z, readout, self.counts, offset, self.mean)
                                  for readout in readouts]).amax(0)
        another = torch.randperm(len(self.mean), generator=rng)
        own, foreign = (still_genes(self.z, self.readout, self.counts, offset, self.mean, genes)
                        for genes in (None, another))
        level = gauge(centre, sd, self.prior_sd).item()
        return DelayFit(flow.field, flow.kernel, centre - level, sd, (share * a).sum(1), (share * b).sum(1), evidence,
                        flow.held_out, still, own - foreign,
                        (posterior(moving, flow.prior, self.prior_sd)[0] * moving).sum(1) - still_gene, level,
                        flow.epoch, [(e, total - still.mean().item()) for e, total in flow.history],
                        flow.readout.own(), flow.peak_weight, flow.peak_sd)


def weigh_peaks(part, W, w, wy):
    """Log evidence (g, U), mean and variance (g, U, k) of A + d_p of genes at every tau of a grid: _EM.weigh's model.

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
    evidence, centre, factor = normal_evidence(Q + torch.diag(precision), v)
    spread = (mix @ torch.cholesky_inverse(factor)[..., 1:, 1:] @ mix.T).diagonal(dim1=-2, dim2=-1)
    return evidence + 0.5 * precision.log().sum(), (centre[..., 1:] @ mix.T).float(), spread.float()


@torch.no_grad()
def read_as(readout, target, steps=10, penalty=0.1):
    """The readout with the genes' own delta, p, q such that it says target (J, G) at its landmarks.

    Minimises the readout's Poisson loss and `penalty` times its penalty, gene by gene, by Fisher scoring with the
    damping of Levenberg and Marquardt.
    """
    hidden = readout.hidden(readout.landmarks).double()
    h = torch.cat([readout.kappa * hidden[:, :-1], torch.ones(len(hidden), 1)], 1)             # (J, K + 1)
    hh = (h[:, :, None] * h[:, None]).flatten(1)                                # (J, (K + 1)^2)
    log_size, target = hidden[:, -1:], target.double()
    K, G = h.shape[1] - 1, target.shape[1]
    slope, bias, level = readout.e, readout.e @ readout.offset, readout.e @ readout.gain + math.log(4)
    alone = torch.cat([slope, bias[:, None], level[:, None] - math.log(2)], 1).double()        # without p, q, delta
    theta = alone + torch.cat([readout.delta, readout.q[:, None], readout.p[:, None] + math.log(2)], 1)
    ridge = 2 * penalty * torch.cat([torch.full((K,), 1e-2 / K), torch.full((2,), 1e-4)]).double()
    damping = torch.full((G,), 1e-3, dtype=torch.double)

    def loss(theta):
        logit = h @ theta[:, :-1].T
        log_D = theta[:, -1] + nn.functional.logsigmoid(logit) + log_size
        value = (log_D.exp() - target * log_D).mean(0) + 0.5 * (ridge * (theta - alone).square()).sum(1)
        return value, torch.sigmoid(-logit), log_D.exp()
    value, closed, D = loss(theta)
    for _ in range(steps):
        error = (D - target) / len(h)
        gradient = torch.cat([(error * closed).T @ h, error.sum(0)[:, None]], 1) + ridge * (theta - alone)
        fisher = D / len(h)
        H = torch.empty(G, K + 2, K + 2, dtype=torch.double)
        H[:, :-1, :-1] = ((fisher * closed.square()).T @ hh).view(G, K + 1, K + 1)
        H[:, -1, :-1] = H[:, :-1, -1] = (fisher * closed).T @ h
        H[:, -1, -1] = fisher.sum(0)
        H += torch.diag(ridge)
        H += torch.diag_embed(damping[:, None] * torch.diagonal(H, dim1=1, dim2=2))
        trial = theta - torch.linalg.solve(H, gradient)
        after = loss(trial)
        better = after[0] < value
        theta = torch.where(better[:, None], trial, theta)
        value, closed, D = (torch.where(better, new, old) for new, old in zip(after, (value, closed, D)))
        damping = torch.where(better, damping / 5, damping * 10).clamp(1e-6, 1e6)
    own = (theta - alone).float()
    return with_own(readout, own[:, :K], own[:, -1] - math.log(2), own[:, K])


class Still(nn.Module):
    """v = 0."""

    def forward(self, z):
        return torch.zeros_like(z)


def moving_path(field, z, times):
    """Euler states (T+1, B, 8) and the mean squared speed per dimension along them."""
    states, speed_sq = [z], 0.0
    with parametrize.cached():
        for t0, t1 in zip(times[:-1], times[1:]):
            v = field(states[-1])
            speed_sq = speed_sq + v.square().mean() / (len(times) - 1)
            states.append(states[-1] + (t1 - t0) * v)
    return torch.stack(states), speed_sq


# --- both stages, and what the result is worth -----------------------------------------------------------------------

@dataclass
class Result:
    """log_tau (G,) is the mean over members; sd (G,) their posterior spread and their disagreement."""
    log_tau: torch.Tensor
    sd: torch.Tensor
    kernel: str
    gain: torch.Tensor              # (N_out,) nats per held-out cell beyond v = 0, all members
    own: torch.Tensor               # (G,) nats of a gene's own chromatin beyond another's
    gene_gain: torch.Tensor         # (G,) nats beyond v = 0
    anchors: list
    delays: list


def fit(x, access, counts, gene_emb, rng, kernel=None, members=2, steps=800, epochs=20, processes=1, rna_only=None,
        peaks=None):
    """Both stages, `members` times from different weights, held-out cells and batches; delays are averaged.

    processes: how many members are fitted at a time, one thread each. The result does not depend on it.
    rna_only (M, G): counts of further cells, of which there is no ATAC; peaks: Peaks.
    """
    data = as_data(x, access, counts, gene_emb, rna_only, peaks)
    seeds = torch.randint(2**62, (members, 2), generator=rng).tolist()
    with Pool(data, min(processes, members)) as pool:
        jobs = [pool.start(_fit_anchor, seed, steps) for seed, _ in seeds]
        anchors = [job.result() for job in jobs]
        delays = list(side_by_side(lambda m, name: pool.start(_fit_delay, anchors[m], seeds[m][1], name, epochs),
                                   members, kernel))
    return combine(anchors, delays)


def as_data(x, access, counts, gene_emb, rna_only=None, peaks=None):
    """What both stages are fitted to, as float32 tensors and Peaks: the shared data of a workers.Pool."""
    data = dict(x=x, access=access, counts=counts, gene_emb=gene_emb,
                rna_only=counts[:0] if rna_only is None else rna_only)
    return {k: torch.as_tensor(v, dtype=torch.float32) for k, v in data.items()} | {"peaks": peaks}


def _fit_anchor(data, seed, steps):
    return fit_anchor(data["x"], data["access"], data["gene_emb"], torch.Generator().manual_seed(seed), steps=steps,
                      peaks=data["peaks"])


def _fit_delay(data, anchor, seed, kernel, epochs):
    rng = torch.Generator().manual_seed(seed)
    return fit_delay(anchor, data["access"], data["counts"], rng, kernel, epochs=epochs,
                     rna_only=data["rna_only"])


def side_by_side(start, members, kernel):
    """The DelayFits of all members, in order; start(m, kernel) gives a job of workers.Pool.

    kernel None: the first member chooses for all. The others do not wait for it: they go ahead with the usual choice.
    """
    jobs = [start(0, kernel)] + [start(m, kernel or CANDIDATES[0]) for m in range(1, members)]
    first = jobs[0].result()
    yield first
    if kernel is None and first.kernel != CANDIDATES[0]:
        jobs = jobs[:1] + [start(m, first.kernel) for m in range(1, members)]
    for job in jobs[1:]:
        yield job.result()


def combine(anchors, delays):
    """The members' Result: mean delays, and the spread of the mean."""
    log_taus = torch.stack([d.log_tau for d in delays])
    within = torch.stack([d.sd.square() for d in delays]).mean(0)
    return Result(log_taus.mean(0), (within + log_taus.var(0, correction=0)).sqrt(), delays[0].kernel,
                  torch.cat([d.held_out - d.still for d in delays]), torch.stack([d.own for d in delays]).mean(0),
                  torch.stack([d.gene_gain for d in delays]).mean(0), anchors, delays)


def spearman(a, b):
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([torch.as_tensor(v).argsort().argsort().double() for v in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


@dataclass
class Halves:
    rows: list                      # cells of each half
    fits: list                      # Result of each half
    spearman: float                 # over the genes that either half can see


def split_half(x, access, counts, gene_emb, rng, kernel, members=1, steps=600, epochs=15, processes=1, rna_only=None,
               peaks=None):
    """Both stages on two disjoint halves of the cells. Errors of either stage are drawn twice."""
    data = as_data(x, access, counts, gene_emb, rna_only, peaks)
    rows, jobs = draw_halves(data, rng)
    with Pool(data, min(processes, 2)) as pool:
        jobs = [pool.start(fit_cells, *job, kernel, members, steps, epochs) for job in jobs]
        return compare_halves(rows, [job.result() for job in jobs])


def draw_halves(data, rng):
    """Rows of the two halves, and what fit_cells is told of each: paired rows, rows without ATAC, a seed."""
    paired, alone = (torch.randperm(len(data[k]), generator=rng) for k in ("x", "rna_only"))
    rows, seeds = [paired[::2], paired[1::2]], torch.randint(2**62, (2,), generator=rng).tolist()
    return rows, list(zip(rows, [alone[::2], alone[1::2]], seeds))


def compare_halves(rows, fits):
    seen = informed(fits[0].sd) | informed(fits[1].sd)
    agreement = spearman(fits[0].log_tau[seen], fits[1].log_tau[seen]) if seen.sum() > 9 else 0.0
    return Halves(rows, fits, agreement)


def fit_cells(data, rows, alone, seed, kernel, members=1, steps=600, epochs=15):
    """Both stages on some paired cells of data (as_data) and some without ATAC."""
    cells = {k: torch.as_tensor(data[k], dtype=torch.float32)[rows] for k in ("x", "access", "counts")}
    rng = torch.Generator().manual_seed(seed)
    return fit(**cells, gene_emb=data["gene_emb"], rng=rng, kernel=kernel, members=members, steps=steps, epochs=epochs,
               rna_only=torch.as_tensor(data["rna_only"], dtype=torch.float32)[alone],
               peaks=None if data["peaks"] is None else data["peaks"][rows])


def informed(sd, prior_sd=1.0):
    """Genes whose data removed at least half of the prior variance."""
    return sd < prior_sd / math.sqrt(2)


@dataclass
class Gate:
    open: bool
    reasons: list                   # why tau means nothing on these data; empty when open
    gain_z: float
    own_z: float
    split_half: float


def gate(result, halves, least_z=3.0, least_agreement=0.3):
    """Whether tau means anything on these data: three tests, all of which have to pass.

        moving beats v = 0 on held-out cells; a gene's own chromatin beats another gene's; the halves agree
    z = mean / standard error: over held-out cells for motion, over genes for own chromatin. Over cells the latter
    would not do: with labels shuffled all cells share the luck of the draw (z above 3 in 8-15 % of shuffles).
    """
    gain_z, own_z = z_score(result.gain), z_score(result.own)
    reasons = []
    if not gain_z > least_z:
        reasons.append(f"a moving state predicts held-out expression no better than v = 0 (z = {gain_z:.1f})")
    if not own_z > least_z:
        reasons.append(f"a gene's own chromatin predicts no better than another gene's (z = {own_z:.1f})")
    if not halves.spearman > least_agreement:
        reasons.append(f"delays from two halves of the cells disagree (Spearman {halves.spearman:.2f})")
    return Gate(not reasons, reasons, gain_z, own_z, halves.spearman)


def intervals(log_tau, sd, replicates=None, level=0.9, model_sd=0.15, prior_sd=1.0):
    """Central intervals (low, high) of log tau: normal, variance = sd^2 + max(0, r - n) + model_sd^2.

        r   variance of refits on resampled cells (R, G)
        n = sd^2 (1 - sd^2 / prior_sd^2), what the noise of the gene's own RNA does to a refit that prior_sd shrinks
    The posterior knows that noise given readout and flow; what refits vary by beyond it is what readout and flow do
    not know. model_sd is what all refits share: a flow whose pace is not that of the process everywhere. Set on
    simulations, where it is what deep data leave over.
    """
    variance = sd.square() + model_sd**2
    if replicates is not None:
        of_rna = sd.square() * (1 - (sd / prior_sd).square()).clamp_min(0)
        variance = variance + (torch.as_tensor(replicates).float().var(0) - of_rna).clamp_min(0)
    half = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.5 + level / 2)) * variance.sqrt()
    return log_tau - half, log_tau + half


def bootstrap_replicate(data, seed, kernel):
    """log tau (G,) of both stages refitted on cells drawn with replacement: a job of workers.Pool.

    data: as_data; kernel: the one that was chosen.
    """
    rng = torch.Generator().manual_seed(seed)
    rows, alone = (torch.randint(max(n, 1), (n,), generator=rng) for n in (len(data["x"]), len(data["rna_only"])))
    seed = int(torch.randint(2**62, (1,), generator=rng))
    return fit_cells(data, rows, alone, seed, kernel, steps=500, epochs=12).log_tau


@torch.no_grad()
def chromatin_lead(anchor, delay, access, counts, rng, others=9, prior_sd=1.0):
    """Nats by which a gene's own chromatin, moved by the flow, beats the best of some other genes' (G,).

        log sum_u exp(E_g(u) - u^2 / 2)       E the evidence of weigh_peaks, less the largest with another's peaks
    Whosever they are, peaks are weighed anew to explain the gene. A gene that follows other chromatin than its own
    leads one time in others + 1, and its delay means nothing.
    """
    em = _EM.of(anchor, access, counts, rng, prior_sd=prior_sd)
    n = len(em.mean)
    flow = _Flow(delay.field, delay.kernel, delay.log_tau + delay.gauge, delay.A, delay.B, torch.zeros(n),
                 delay.followed(anchor.readout), delay.peak_weight, delay.peak_sd)
    grid = LOG_TAU[::2]
    explain = em.explainer(flow, torch.arange(len(counts)), grid)

    def evidence(whose):
        return torch.cat([torch.logsumexp(explain(genes, whose[genes])[0] - (grid / prior_sd).square() / 2, 1)
                          for genes in torch.arange(n).split(32)])
    best = torch.full((n,), -torch.inf, dtype=torch.double)
    for _ in range(others):
        another = (torch.arange(n) + torch.randint(1, max(n, 2), (n,), generator=rng)) % n      # never its own
        best = torch.maximum(best, evidence(another))
    return (evidence(torch.arange(n)) - best).float()


def identifiable(result, access, counts, halves=None, least_counts=100, least_change=0.15, least_gain=2.0, seed=0):
    """Per gene (G,) whether the data can tell its delay, and the reason ("" where they can).

    seed draws the other genes whose chromatin must do worse than a gene's own.
    """
    access, counts = (torch.as_tensor(a, dtype=torch.float32) for a in (access, counts))
    change = torch.stack([a.readout(a.z).std(0) / a.readout(a.z).mean(0) for a in result.anchors]).mean(0)
    few = torch.minimum(access.sum(0), counts.sum(0)) < least_counts
    tests = [("too few counts", few), ("flat accessibility", change < least_change),
             ("likelihood flat in tau", ~informed(result.sd)), ("v = 0 as good", result.gene_gain < least_gain)]
    lead = torch.stack([chromatin_lead(a, d, access, counts, generator(seed, "other genes", m))
                        for m, (a, d) in enumerate(zip(result.anchors, result.delays))]).mean(0)
    tests.append(("another gene's chromatin as good", lead <= 0))
    if halves is not None:
        first, second = halves.fits
        gap, spread = (first.log_tau - second.log_tau).abs(), (first.sd.square() + second.sd.square()).sqrt()
        tests.append(("split halves disagree", (gap > 2.6 * spread) & (gap > 0.7)))
    why = [""] * len(few)
    for reason, fails in reversed(tests):                   # the first test that fails gives the reason
        for g in fails.nonzero().flatten().tolist():
            why[g] = reason
    return torch.tensor([not reason for reason in why]), why


# --- genes that were not fitted ---------------------------------------------------------------------------------------

def read_new_genes(readout, z, access, depth, gene_emb, rng, steps=300, batch=256, lr=3e-2):
    """A readout of new genes: P, g and b stay, only the genes' own delta, p, q are fitted, to their accessibility.

    Shapes  z (N, 8), access (N, H), depth (N,) size factors, gene_emb (H, D) -> GeneReadout of H genes
    """
    new = copy.deepcopy(readout)
    new.log_size = torch.zeros_like(readout.log_size)       # depth is relative to all that is open, as in Stage 1
    new.e = (gene_emb - readout.centre) @ readout.axes
    new.delta = nn.Parameter(torch.zeros_like(new.e))
    new.p, new.q = nn.Parameter(torch.full((len(new.e),), -math.log(2))), nn.Parameter(torch.zeros(len(new.e)))
    own = [new.delta, new.p, new.q]
    optimiser = torch.optim.Adam(own, lr=lr)
    mean = access.mean(0).clamp_min(1e-6)
    for _ in range(steps):
        rows = torch.randint(len(z), (batch,), generator=rng)
        noisy = z[rows] + NOISE * torch.randn(batch, z.shape[1], generator=rng)
        loss = poisson_nll(depth[rows, None] * mean * new(noisy), access[rows]) + new.penalty()
        grads = torch.autograd.grad(loss, own)
        for parameter, grad in zip(own, grads):
            parameter.grad = grad
        optimiser.step()
    new.log_size = readout.log_size
    return new.requires_grad_(False)


def new_gene_delays(field, kernel, readout, z, counts, depth, prior_mean, prior_sd=1.0):
    """E-step alone for genes outside training: own log tau, its sd, A and B, (H,) each. v stays as it is.

    depth (N,): size factors over the cell_size that the trained genes give.
    """
    like, a, b = grid_likelihood(path(field, z), readout, counts, depth, counts.mean(0).clamp_min(1e-6), kernel)
    share, centre, sd = posterior(like, prior_mean, prior_sd)
    return centre, sd, (share * a).sum(1), (share * b).sum(1)


# --- delays that differ between cell states ---------------------------------------------------------------------------

def cell_groups(z, k, rng, rounds=30):
    """k-means of the latent, from cells spread far apart: labels (N,)."""
    centres = z[torch.randint(len(z), (1,), generator=rng)]
    for _ in range(k - 1):
        centres = torch.cat([centres, z[torch.cdist(z, centres).min(1).values.argmax()][None]])
    for _ in range(rounds):
        label = torch.cdist(z, centres).argmin(1)
        centres = torch.stack([z[label == j].mean(0) if (label == j).any() else centres[j] for j in range(k)])
    return label


@torch.no_grad()
def group_shift(anchor, delay, counts, labels, n_groups, prior_sd=0.5, times=TIMES, block=64):
    """How far log tau of a group of cells lies from the gene's own, given that fit: (G, K), relative.

        L_gk(u) = sum_(c in k) y log yhat(u) - m(u)        A, B of the gene
        shift = posterior mean of u - u_g under N(0, prior_sd^2), minus its weighted mean over the genes
    The mean over genes is the flow's pace in that group, not a property of any gene.
    """
    counts = torch.as_tensor(counts, dtype=torch.float32)
    states, offset, mean, readout = moved(anchor, delay, counts, times)
    hidden = readout.hidden(states)
    weights = kernel_weights(LOG_TAU.exp(), times, delay.kernel)
    member = torch.nn.functional.one_hot(labels, n_groups).float()
    like = []
    for start in range(0, counts.shape[1], block):
        genes = slice(start, min(start + block, counts.shape[1]))
        level, shape = readout.parts(hidden, genes)
        f = (weights @ (level * shape).flatten(1)).view(len(weights), *shape.shape[1:])             # (U, N, g)
        f.mul_(delay.A[genes]).add_(delay.B[genes])
        score = f.log().mul_(counts[:, genes]).sub_(f.mul_(offset[:, None] * mean[genes]))
        like.append(torch.einsum("ung,nk->gku", score, member))
    like = torch.cat(like)                                                      # (G, K, U)
    # The gauge shifted log_tau; the grid is in the field's own time.
    centre = posterior(delay.log_like, torch.zeros(len(like)), 1.0)[1]
    log_post = like - ((LOG_TAU - centre[:, None, None]) / prior_sd).square() / 2
    share = torch.softmax(log_post.double(), 2).float()
    shift = share @ LOG_TAU - centre[:, None]                                   # (G, K)
    known = (1 - (share @ LOG_TAU.square() - (share @ LOG_TAU).square()) / prior_sd**2).clamp(1e-3, 1)
    pace = (known * shift).sum(0) / known.sum(0)
    return (shift - pace) * known.ceil(), known


def modulation(halves, counts, labels):
    """Relative modulation of log tau per gene and group (G, K), shrunk to what two halves of the cells share.

        m = r (m1 + m2) / 2,   r = 2 c / (v + c)       c covariance of m1 and m2 over genes and groups, v variance
    Halves are fitted apart in both stages, so that noise of readout, flow and counts does not correlate and
    r goes to 0 where nothing was shared. Returns m and r.
    """
    counts = torch.as_tensor(counts, dtype=torch.float32)
    n_groups = int(labels.max()) + 1
    shifts, knowns = [], []
    for rows, result in zip(halves.rows, halves.fits):
        both = [group_shift(a, d, counts[rows], labels[rows], n_groups) for a, d in zip(result.anchors, result.delays)]
        shift = torch.stack([b[0] for b in both]).mean(0)
        shifts.append(shift - shift.mean(1, keepdim=True))                      # the gene's own level is its tau_g
        knowns.append(torch.stack([b[1] for b in both]).mean(0))
    a, b = shifts
    w = (knowns[0] * knowns[1]).sqrt()
    shared = (w * a * b).sum() / w.sum()
    spread = (w * (a.square() + b.square())).sum() / (2 * w.sum())
    reliability = (2 * shared / (spread + shared)).clamp(0, 1)
    return reliability * (a + b) / 2, float(reliability)
