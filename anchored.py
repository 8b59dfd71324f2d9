"""Delays anchored in each gene's own chromatin: both stages, from arrays to log tau_g, and what it is worth.

    Stage 1     chromatin.py    state z and readout D of every gene's accessibility, from ATAC alone
    Stage 2.1   delay_fit.py    flow v and delays tau: expression is what D gives once the state has moved for tau_g
    here        members, halves, refits; the gate, intervals, what is identifiable, delays that differ between states

    rng = torch.Generator().manual_seed(0)
    result = fit(x, access, counts, gene_emb, rng)          # both stages, averaged over members
    result.log_tau, result.sd, result.kernel                # (G,), (G,), "exp" | "shift" | "gamma"
    halves = split_half(x, access, counts, gene_emb, rng, result.kernel)
    verdict = gate(result, halves)                          # .open, .reasons
    low, high = intervals(result.log_tau, result.sd, replicates)
    ok, why = identifiable(result, access, counts, halves)

or a stage at a time: anchor = fit_anchor(x, access, gene_emb, rng);
delays = fit_delay(anchor, access, counts, rng, kernel=None).

Shapes  N cells, G genes, K groups of cells; x (N, 256), access and counts (N, G), gene_emb (G, 512), log_tau (G,)
Units   ODE time, mean log tau = 0 over the genes that carry signal; never hours
"""
import hashlib
import math
from dataclasses import dataclass

import torch

from chromatin import fit_anchor
from delay_fit import (
    CANDIDATES,
    LEAST_PAIRING,
    LOG_TAU,
    TIMES,
    chromatin_lead,
    fit_delay,
    kernel_weights,
    moved,
    posterior,
    z_score,
)
from workers import Pool

LEAST_Z, LEAST_AGREEMENT = 3.0, 0.3     # of the gate: standard errors; Spearman of the delays of two halves

# --- both stages -------------------------------------------------------------------------------------------------

def generator(seed, what, index=0):
    """A stream of its own for every piece of work, so that redoing one piece alone gives it the same draws."""
    digest = hashlib.blake2b(f"{seed} {what} {index}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@dataclass
class Result:
    """log_tau (G,) is the mean over members; sd (G,) their posterior spread and their disagreement."""
    log_tau: torch.Tensor
    sd: torch.Tensor
    kernel: str
    gain: torch.Tensor              # (N_out,) nats per held-out cell beyond v = 0, all members
    differ: torch.Tensor | None     # (N_out,) nats per held-out cell beyond one delay for all genes, if judged
    own: torch.Tensor               # (G,) nats of a gene's own chromatin beyond another's
    gene_gain: torch.Tensor         # (G,) nats beyond v = 0
    pairing: float                  # standard errors by which a cell's RNA fits its own ATAC better, mean of members
    anchors: list
    delays: list


def usual_members(n_cells):
    """How many fits are averaged. Few paired cells gain from more, and have the time for it (LOG.md)."""
    return 2 if n_cells >= 2000 else 4


def fit(x, access, counts, gene_emb, rng, kernel=None, members=None, steps=800, epochs=20, processes=1, rna_only=None,
        peaks=None, device="cpu", judge=True):
    """Both stages, `members` times from different weights, held-out cells and batches; delays are averaged.

    members: None = usual_members; processes: how many of them are fitted at a time, one thread each. The result does
    not depend on it. rna_only (M, G): counts of further cells, of which there is no ATAC; peaks: Peaks; device: where
    fits are computed; what they find lies on the CPU. judge: also what gate asks of it and not of halves.
    """
    data = as_data(x, access, counts, gene_emb, rna_only, peaks, device)
    members = members or usual_members(len(x))
    seeds = torch.randint(2**62, (members, 2), generator=rng).tolist()
    with Pool(data, min(processes, members)) as pool:
        jobs = [pool.start(_fit_anchor, seed, steps) for seed, _ in seeds]
        anchors = [job.result() for job in jobs]
        delays = list(side_by_side(lambda m, name: pool.start(_fit_delay, anchors[m], seeds[m][1], name, epochs, judge),
                                   members, kernel))
    return combine(anchors, delays)


def as_data(x, access, counts, gene_emb, rna_only=None, peaks=None, device="cpu"):
    """What both stages are fitted to, as float32 tensors on the CPU and Peaks, and where: shared by a workers.Pool."""
    data = dict(x=x, access=access, counts=counts, gene_emb=gene_emb,
                rna_only=counts[:0] if rna_only is None else rna_only)
    return {k: torch.as_tensor(v, dtype=torch.float32) for k, v in data.items()} | {"peaks": peaks, "device": device}


def _fit_anchor(data, seed, steps):
    return fit_anchor(data["x"], data["access"], data["gene_emb"], torch.Generator().manual_seed(seed), steps=steps,
                      peaks=data["peaks"], device=data["device"])


def _fit_delay(data, anchor, seed, kernel, epochs, judge):
    rng = torch.Generator().manual_seed(seed)
    return fit_delay(anchor, data["access"], data["counts"], rng, kernel, epochs=epochs,
                     rna_only=data["rna_only"], device=data["device"], judge=judge)


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


def variance_of_mean(values):
    """Of independent rows (M, ...), from how they differ: (...); 0 for a single one, which does not tell."""
    return values.var(0) / len(values) if len(values) > 1 else torch.zeros_like(values[0])


def over_members(log_taus, sds):
    """Mean of the members' log tau (M, G), and its sd: of their posteriors, with the spread of the mean."""
    return log_taus.mean(0), (sds.square().mean(0) + variance_of_mean(log_taus)).sqrt()


def combine(anchors, delays):
    """The members' Result: mean delays, and the spread of the mean."""
    log_tau, sd = over_members(torch.stack([d.log_tau for d in delays]), torch.stack([d.sd for d in delays]))
    differ = None if delays[0].differ is None else torch.cat([d.differ for d in delays])
    return Result(log_tau, sd, delays[0].kernel,
                  torch.cat([d.held_out - d.still for d in delays]), differ,
                  torch.stack([d.own for d in delays]).mean(0),
                  torch.stack([d.gene_gain for d in delays]).mean(0), sum(d.pairing for d in delays) / len(delays),
                  anchors, delays)


# --- what the result is worth ------------------------------------------------------------------------------------

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
               peaks=None, device="cpu"):
    """Both stages on two disjoint halves of the cells. Errors of either stage are drawn twice."""
    data = as_data(x, access, counts, gene_emb, rna_only, peaks, device)
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
               peaks=None if data["peaks"] is None else data["peaks"][rows], device=data["device"], judge=False)


def informed(sd, prior_sd=1.0):
    """Genes whose data removed at least half of the prior variance."""
    return sd < prior_sd / math.sqrt(2)


@dataclass
class Gate:
    open: bool
    reasons: list                   # why tau means nothing on these data; empty when open
    pairing_z: float
    gain_z: float
    differ_z: float
    own_z: float
    split_half: float


def gate(result, halves):
    """Whether tau means anything on these data: five tests, all of which have to pass.

        RNA fits the ATAC of its own cell better than another's; moving beats v = 0 on held-out cells; and so do delays
        that differ beat one delay for all genes; a gene's own chromatin beats another gene's; the halves agree
    z = mean / standard error: over held-out cells for motion, over genes for own chromatin. Over cells the latter
    would not do: with labels shuffled all cells share the luck of the draw (z above 3 in 8-15 % of shuffles).
    """
    gain_z, differ_z, own_z = (z_score(part) for part in (result.gain, result.differ, result.own))
    reasons = []
    if not result.pairing > LEAST_PAIRING:
        reasons.append("no clear sign that the RNA and ATAC of a barcode come from one cell "
                       f"(z = {result.pairing:.1f}): are the barcodes of both files those of the same cells?")
    if not gain_z > LEAST_Z:
        reasons.append(f"a moving state predicts held-out expression no better than v = 0 (z = {gain_z:.1f})")
    if not differ_z > LEAST_Z:
        reasons.append(f"one delay for all genes predicts held-out expression as well (z = {differ_z:.1f})")
    if not own_z > LEAST_Z:
        reasons.append(f"a gene's own chromatin predicts no better than another gene's (z = {own_z:.1f})")
    if not halves.spearman > LEAST_AGREEMENT:
        reasons.append(f"delays from two halves of the cells disagree (Spearman {halves.spearman:.2f})")
    return Gate(not reasons, reasons, result.pairing, gain_z, differ_z, own_z, halves.spearman)


def intervals(log_tau, sd, replicates=None, level=0.9, model_sd=0.14, prior_sd=1.0):
    """Central intervals (low, high) of log tau: normal, variance = sd^2 + max(0, r - n) + model_sd^2.

        r   variance of refits on resampled cells (R, G)
        n = sd^2 (1 - sd^2 / prior_sd^2), what the noise of the gene's own counts does to a refit that prior_sd shrinks
    The posterior knows that noise given flow and states; what refits vary by beyond it is what these do not know.
    model_sd is what all refits share: a flow whose pace is not that of the process everywhere. Set on simulations,
    where it is what deep data leave over.
    """
    variance = sd.square() + model_sd**2
    if replicates is not None:
        of_counts = sd.square() * (1 - (sd / prior_sd).square()).clamp_min(0)
        variance = variance + (torch.as_tensor(replicates).float().var(0) - of_counts).clamp_min(0)
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


def identifiable(result, access, counts, halves=None, least_counts=100, least_change=0.15, least_gain=2.0, seed=0,
                 device="cpu"):
    """Per gene (G,) whether the data can tell its delay, and the reason ("" where they can).

    seed draws the other genes whose chromatin must do worse than a gene's own.
    """
    access, counts = (torch.as_tensor(a, dtype=torch.float32) for a in (access, counts))
    change = torch.stack([a.readout(a.z).std(0) / a.readout(a.z).mean(0) for a in result.anchors]).mean(0)
    few = torch.minimum(access.sum(0), counts.sum(0)) < least_counts
    tests = [("too few counts", few), ("flat accessibility", change < least_change),
             ("likelihood flat in tau", ~informed(result.sd)), ("v = 0 as good", result.gene_gain < least_gain)]
    lead = torch.stack([chromatin_lead(a, d, access, counts, generator(seed, "other genes", m), device=device)
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


# --- delays that differ between cell states ----------------------------------------------------------------------

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
    # Not delay.log_tau, which comes of another model (grid_evidence) and would move all groups.
    centre = posterior(like.sum(1), torch.zeros(len(like)), 1.0)[1]
    log_post = like - ((LOG_TAU - centre[:, None, None]) / prior_sd).square() / 2
    share = torch.softmax(log_post.double(), 2).float()
    shift = share @ LOG_TAU - centre[:, None]                                   # (G, K)
    known = (1 - (share @ LOG_TAU.square() - (share @ LOG_TAU).square()) / prior_sd**2).clamp(1e-3, 1)
    pace = (known * shift).sum(0) / known.sum(0)
    return (shift - pace) * known.ceil(), known


def modulation(result, halves, counts, labels):
    """Relative modulation of log tau per gene and group (G, K), shrunk to what two halves of the cells share.

        m = r m_all,   r = 2 c / (v + c)        c covariance of the halves' m1 and m2 over genes and groups, v variance
    Halves are fitted apart in both stages, so that noise of readout, flow and counts does not correlate and r goes to 0
    where nothing was shared. r is the reliability of (m1 + m2) / 2; m_all, from all cells, has no less.
    Returns m and r.
    """
    counts = torch.as_tensor(counts, dtype=torch.float32)
    n_groups = int(labels.max()) + 1

    def found(fits, rows):
        both = [group_shift(a, d, counts[rows], labels[rows], n_groups) for a, d in zip(fits.anchors, fits.delays)]
        shift, known = (torch.stack(of_members).mean(0) for of_members in zip(*both))
        return shift - shift.mean(1, keepdim=True), known                       # the gene's own level is its tau_g
    (a, known_a), (b, known_b) = (found(*half) for half in zip(halves.fits, halves.rows))
    w = (known_a * known_b).sqrt()
    shared = (w * a * b).sum() / w.sum()
    spread = (w * (a.square() + b.square())).sum() / (2 * w.sum())
    reliability = (2 * shared / (spread + shared)).clamp(0, 1)
    return reliability * found(result, slice(None))[0], float(reliability)
