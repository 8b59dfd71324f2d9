"""Stage 1 of the identifiable model: a gene's own chromatin, its readout in a low-dimensional state.

    z         AlignMLP(x)                                                   (N, 8)
    D(z, g)   T(z) 4 exp(g.e_g + p_g) sigmoid(kappa P(R z).(e_g + delta_g) + b.e_g + q_g)
    fit       access[c, g] ~ Poisson(mu_a[g] s_a[c] D(z_c + 0.3 eps, g) / T)        ATAC alone, never paired
    then      P[c, j] ~ prod_g Poisson(access[c, g] | z_j): the readout refitted to it, AlignMLP taught its mean

delay_fit.py asks what expression follows if this readout is right. There, where RNA helps to place cells, what belongs
to one gene is fitted to accessibility again (refine); all else is frozen. GeneReadout.landmarks are the states in which
D is believed; Seen and PeakShares keep what Stage 1's cells show there.

Shapes  N cells, G genes, C peaks of genes, J landmark states; x (N, 256), access (N, G), peaks (N, C),
        gene_emb (G, 512), z (N, 8), D (N, G)
"""
import copy
import math
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import nn

from align_mlp import AlignMLP

LATENT = 8                                                  # more dimensions measured worse
BANDWIDTH = 0.5                                             # latent units over which landmark cells are averaged
N_LANDMARKS = 400
N_REFERENCES = 1000                                         # cells that stand for all states of the population
OWN = 8.0                                                   # learning rate of what belongs to one gene, over the rest's
NOISE = 0.3                                                 # latent noise under which the readout must hold
REFINE = 10.0                                               # precision that holds genes' own values where they were
NEW = 1.0                                                   # and those of new genes at what embeddings say
FEW = 10.0                                                  # counts below which a peak's share is that over all cells


# --- the readout -------------------------------------------------------------------------------------------------

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
        self.landmarks = z.new_empty(0, z.shape[1])
        relative = self(z).clamp_min(1e-30).log()
        relative = relative - relative.mean(0)
        middle = relative.median(1).values
        deviation = 1.48 * (relative - middle[:, None]).abs().median(1).values
        noise = math.pi / 2 * deviation.square().mean() / relative.shape[1]
        r = (1 - noise / middle.var().clamp_min(1e-12)).clamp_min(0)
        enough = relative.shape[1] >= 30 and len(z) > 1
        self.landmarks, self.log_size = z.clone(), r * (middle.mean() - middle) if enough else z.new_zeros(len(z))

    def own(self):
        """What belongs to one gene each."""
        return {name: getattr(self, name).detach() for name in ("delta", "p", "q")}

    def own_together(self):
        """The same as (G, K + 2): delta, q, p, each 0 where a gene is as its embedding says."""
        return torch.cat([self.delta, self.q[:, None], self.p[:, None] + math.log(2)], 1).detach()

    def penalty(self):
        p = self.p + math.log(2)
        return 1e-2 * self.delta.square().mean() + 1e-4 * (p.square().mean() + self.q.square().mean())


def with_own(readout, delta, p, q, e=None):
    """The readout with other parameters of the genes, and other embeddings e where these are given."""
    new = copy.copy(readout)
    new._parameters, new._buffers = dict(readout._parameters), dict(readout._buffers)
    for name, value in dict(delta=delta, p=p, q=q).items():
        setattr(new, name, nn.Parameter(value, requires_grad=False))
    if e is not None:
        new.e = e
    return new


def read_as(readout, target, penalty=0.1):
    """The readout with the genes' own delta, p, q such that it says target (J, G) at its landmarks.

    Minimises the readout's Poisson loss and `penalty` times its penalty, gene by gene.
    """
    K = readout.delta.shape[1]
    ridge = 2 * penalty * torch.cat([torch.full((K,), 1e-2 / K), torch.full((2,), 1e-4)])
    return fit_own(readout, target.new_ones(len(target), 1) / len(target), target / len(target), ridge.to(target))


def of_genes(readout, genes):
    """The readout of some of its genes, by number."""
    return with_own(readout, **{name: value[genes] for name, value in (readout.own() | {"e": readout.e}).items()})


def refine(readout, seen, mean, precision=REFINE):
    """The readout after another M-step in the genes' own delta, p, q, to the counts that are expected at its landmarks.

    Stage 1 fits D under noise and before it is averaged over landmarks: what results opens and closes more slowly than
    the counts say, and a flow can only make up for that by changing its pace along the process, which bends delays.
    delta is held near its last values with this precision, p and q, which every count tells, with less.
    Shapes  seen: Seen, mean (G,) counts
    """
    size = readout.hidden(readout.landmarks)[:, -1].exp()
    ridge = precision * torch.cat([torch.ones(readout.delta.shape[1]), torch.full((2,), 0.3)]).to(mean)
    return fit_own(readout, (seen.exposure / size)[:, None] * mean, seen.counts, ridge, readout.own_together())


@torch.no_grad()
def fit_own(readout, exposure, counts, ridge, about=0.0, steps=10):
    """The readout with other delta, p, q, gene by gene by Fisher scoring with the damping of Levenberg and Marquardt.

        min  sum_j exposure_jg D(z_j, g) - counts_jg log D(z_j, g) + sum ridge (own_g - about_g)^2 / 2
    over its landmarks j.

    Shapes  exposure (J, G or 1), counts (J, G), ridge (K + 2,), about (G, K + 2) as own_together gives it
    """
    hidden = readout.hidden(readout.landmarks).double()
    h = torch.cat([readout.kappa * hidden[:, :-1], hidden.new_ones(len(hidden), 1)], 1)          # (J, K + 1)
    hh = (h[:, :, None] * h[:, None]).flatten(1)                                # (J, (K + 1)^2)
    log_size, exposure, counts, ridge = hidden[:, -1:], exposure.double(), counts.double(), ridge.double()
    K, G = h.shape[1] - 1, counts.shape[1]
    slope, bias, level = readout.e, readout.e @ readout.offset, readout.e @ readout.gain + math.log(2)
    alone = torch.cat([slope, bias[:, None], level[:, None]], 1).double()       # without delta, q, p
    theta, about = alone + readout.own_together(), alone + about
    damping = h.new_full((G,), 1e-3)

    def loss(theta):
        logit = h @ theta[:, :-1].T
        log_D = theta[:, -1] + nn.functional.logsigmoid(logit) + log_size
        fitted = exposure * log_D.exp()
        value = (fitted - counts * log_D).sum(0) + 0.5 * (ridge * (theta - about).square()).sum(1)
        return value, torch.sigmoid(-logit), fitted
    value, closed, fitted = loss(theta)
    for _ in range(steps):
        error = fitted - counts
        gradient = torch.cat([(error * closed).T @ h, error.sum(0)[:, None]], 1) + ridge * (theta - about)
        H = h.new_empty(G, K + 2, K + 2)
        H[:, :-1, :-1] = ((fitted * closed.square()).T @ hh).view(G, K + 1, K + 1)
        H[:, -1, :-1] = H[:, :-1, -1] = (fitted * closed).T @ h
        H[:, -1, -1] = fitted.sum(0)
        H += torch.diag(ridge)
        H += torch.diag_embed(damping[:, None] * torch.diagonal(H, dim1=1, dim2=2))
        trial = theta - torch.linalg.solve(H, gradient)
        after = loss(trial)
        better = after[0] < value
        theta = torch.where(better[:, None], trial, theta)
        value, closed, fitted = (torch.where(better, new, old) for new, old in zip(after, (value, closed, fitted)))
        damping = torch.where(better, damping / 5, damping * 10).clamp(1e-6, 1e6)
    own = (theta - alone).float()
    return with_own(readout, own[:, :K], own[:, -1] - math.log(2), own[:, K])


# --- what Stage 1 hands on ---------------------------------------------------------------------------------------

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


@torch.no_grad()
def gather(readout, access, depth, mean, peaks=None, block=4096):
    """Seen, and the same counts of peaks (J, C) on the CPU, where Peaks are, None without Peaks."""
    counts, exposure, of_peaks = 0.0, 0.0, 0.0
    for rows in torch.arange(len(access)).split(block):
        P = state_posterior(readout, readout.landmarks, access[rows], depth[rows], mean)
        counts, exposure = counts + P.T @ access[rows], exposure + P.T @ depth[rows]
        if peaks is not None:
            of_peaks = of_peaks + (peaks.counts[rows.numpy()].T @ P.cpu().numpy()).T.astype(np.float32)
    return Seen(counts, exposure), None if peaks is None else torch.from_numpy(of_peaks)


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


# --- the fit -----------------------------------------------------------------------------------------------------

def size_factors(counts):
    """Per-cell depth with mean 1 (N,) and per-gene mean (G,)."""
    s = counts.sum(1)
    return (s / s.mean()).clamp_min(1e-3), counts.mean(0).clamp_min(1e-6)


def poisson_nll(mean, counts):
    """mean(m - c log m): the negative log-likelihood up to what depends on counts alone."""
    return (mean - counts * mean.log()).mean()


def descend(loss, optimiser, schedule):
    """One step down the gradient of a loss."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    schedule.step()


def on(device, thing):
    """A dataclass with its tensors and modules on a device: copies, but for what is there already."""
    if torch.is_tensor(thing):
        return thing.to(device)
    if isinstance(thing, nn.Module):
        wanted, there = torch.device(device), next(thing.parameters()).device
        here = there.type == wanted.type and wanted.index in (None, there.index)
        return thing if here else copy.deepcopy(thing).to(device)
    if isinstance(thing, dict):
        return {name: on(device, value) for name, value in thing.items()}
    if is_dataclass(thing):
        return replace(thing, **{field.name: on(device, getattr(thing, field.name)) for field in fields(thing)})
    return thing


def noise_like(z, rng):
    """Standard normal, drawn on the CPU so that every device sees the same."""
    return torch.randn(z.shape, generator=rng).to(z.device)


def split_cells(n, share, rng):
    """Shuffled cell indices: (kept, held out)."""
    order = torch.randperm(n, generator=rng)
    n_out = max(1, round(share * n))
    return order[n_out:], order[:n_out]


def fit_anchor(x, access, gene_emb, rng, steps=800, batch=256, lr=6e-3, held_out=0.1, hidden=128, check=50,
               peaks=None, device="cpu"):
    """Stage 1: latent and readout from accessibility alone. The number of steps is chosen by held-out cells.

    AlignMLP and readout are fitted together first. Then every cell's state is inferred from its accessible genes
    (sharpen), which tells it better than its embedding alone, and AlignMLP learns to say the same.
    Shapes  x (N, 256), access (N, G), gene_emb (G, 512), rng torch.Generator on the CPU, peaks: Peaks,
            device: where it is computed, in float32 and float64; the Anchor lies on the CPU
    """
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))           # weights and dropout
    x, access, gene_emb = (torch.as_tensor(a, dtype=torch.float32, device=device) for a in (x, access, gene_emb))
    centre, scale = x.mean(0), (x - x.mean(0)).square().mean(0).max().sqrt().clamp_min(1e-12)
    xs = (x - centre) / scale
    align, readout = AlignMLP(x.shape[1], LATENT, hidden).to(device), GeneReadout(gene_emb).to(device)
    own = [readout.delta, readout.p, readout.q]
    shared = [p for p in (*align.parameters(), *readout.parameters()) if not any(p is o for o in own)]
    opt = torch.optim.Adam([{"params": shared}, {"params": own}], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, [lr, OWN * lr], total_steps=steps + 1, pct_start=0.1)
    depth, mean = size_factors(access)
    train, out = split_cells(len(x), held_out, rng)
    best, history = (math.inf, 0, None), []
    for step in range(1, steps + 1):
        rows = train[torch.randint(len(train), (batch,), generator=rng)].to(device)
        z = align(xs[rows])
        z = z + NOISE * noise_like(z, rng)
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
    if best[2] is None:
        raise FloatingPointError("Stage 1: the likelihood of the held-out cells was never finite.\n"
                                 "  Look for nan in effendi_atac_emb.npy and gene_embeddings.npy.")
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
    shares = None if peaks is None else share_out(readout.landmarks.cpu(), of_peaks, peaks, len(mean))
    return on("cpu", Anchor(align, readout, z, nll, step, history, seen, shares))


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
        D = readout(nodes + NOISE / 3 * noise_like(nodes, rng)).clamp_min(1e-30)
        loss = (exposure[:, None] * mean * D - expected * D.log()).sum() / (len(train) * len(mean)) + readout.penalty()
        descend(loss, opt, schedule)
    with torch.no_grad():
        z = torch.cat([state_posterior(readout, nodes, access[part], depth[part], mean) @ nodes
                       for part in torch.arange(len(x)).split(4096)])
    align.train()
    opt = torch.optim.AdamW(align.parameters(), lr=4e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=align_steps + 1, pct_start=0.1)
    for _ in range(align_steps):
        rows = torch.randint(len(x), (batch,), generator=rng).to(x.device)
        loss = (align(x[rows]) - z[rows]).square().mean()
        descend(loss, opt, schedule)


def state_posterior(readout, nodes, access, depth, mean):
    """P[c, j], the probability that cell c is in state nodes[j], all states equally likely before: (N, J)."""
    return torch.softmax(state_likelihood(readout, nodes, access, depth, mean), 1)


def state_likelihood(readout, nodes, access, depth, mean):
    """log prod_g Poisson(access[c, g]; mu_g s_c D(z_j, g)) up to what the state leaves as it is: (N, J)."""
    rate = mean * readout(nodes).clamp_min(1e-30)                               # (J, G); one zero would be all nan
    return access @ rate.log().T - depth[:, None] * rate.sum(1)


@torch.no_grad()
def mean_states(readout, access, depth, mean, block=4096):
    """The mean landmark of every cell given the genes' ATAC, (N, 8). Counts of a cell show D / T, as in Stage 1."""
    shares = with_own(readout, **readout.own())             # a copy
    shares.log_size = torch.zeros_like(readout.log_size)
    return torch.cat([state_posterior(shares, shares.landmarks, access[rows], depth[rows], mean) @ shares.landmarks
                      for rows in torch.arange(len(access)).split(block)])


def unseen_genes(readout, gene_emb):
    """A readout of new genes (H, D) as their embeddings say alone: all that genes share stays, delta, p, q are 0."""
    e = (gene_emb - readout.centre) @ readout.axes
    return with_own(readout, torch.zeros_like(e), e.new_full((len(e),), -math.log(2)), e.new_zeros(len(e)), e)
