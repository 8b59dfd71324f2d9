"""The Effendi models: as specified (Effendi), and the identifiable default (AnchoredEffendi).

As specified:

    z_A   = AlignMLP(z_ATAC)
    tau_g = AmortizedTau(z_A, e_g)
    h_g   = phi_(tau_g)(z_A)                               linear interpolation on one trajectory of S steps
    y_g   = sigmoid(<proj(mean_g h_g), e_g>)               GeneDecoder

    L_ode     = |z_R - phi_(tau_bar)(z_A)|^2               tau_bar = median of tau
    L_recon   = |y - expression|^2
    L_tau     = |tau|
    L_reverse = |z_A - phi_(-tau_bar)(phi_(tau_bar)(z_A))|^2       the solver's step error, no biology

All four are means over cells and dimensions or genes, so that their weights do not depend on the data's size.
RNA supervises; it is never an input of the ODE.

Shapes  z_atac (B, 256), z_A and z_R (B, D), gene_emb (G, D), tau and y_hat (B, G); B cells, G genes, D = 512
Units   tau in ODE time; expression as log1p of counts per 10,000
Ref     specification, "Core idea" and "Full loss". What these losses can and cannot determine: DESIGN.md.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from align_mlp import AlignMLP
from chromatin import LATENT, GeneReadout, Peaks, of_genes, unseen_genes
from delay_fit import TIMES, cell_size, gauge, head_predict, kernel_weights, new_gene_delays, path, place, predict
from vector_field import EffendiVectorField, interpolation_weights


class AmortizedTauPredictor(nn.Module):
    """Delay of every gene, and of every gene in every cell.

        tau_base[g] = softplus(f(e_g)) + 0.001                          (G,)     z_A=None: this alone
        delta[c, g] = s^2 <h(z_A[c]), e_g>                              (B, G)   s = mod_scale, applied twice
        tau[c, g]   = softplus(tau_base[g] + delta[c, g]) + 0.001       (B, G)

    As in the specification, the cell mode puts a softplus on a softplus, so its values start near
    softplus(softplus(0)) = 1.10 and cannot fall below softplus(0) = 0.69 by the gene's part alone.
    """

    def __init__(self, hidden=128, mod_scale=0.1, z_dim=512, gene_dim=512):
        super().__init__()
        # Every parameter is made here: one made in forward() would never reach the optimiser.
        self.tau_mlp = nn.Sequential(nn.Linear(gene_dim, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.cell_mod = nn.Sequential(
            nn.Linear(z_dim, hidden), nn.LayerNorm(hidden), nn.Tanh(), nn.Dropout(0.1), nn.Linear(hidden, gene_dim),
        )
        self.mod_scale = mod_scale

    def forward(self, z_A, gene_emb):
        tau_base = F.softplus(self.tau_mlp(gene_emb)).squeeze(-1) + 1e-3        # (G,)
        if z_A is None:
            return tau_base
        mod = self.cell_mod(z_A) * self.mod_scale                               # (B, D)
        delta = (mod @ gene_emb.T) * self.mod_scale                             # (B, D) @ (D, G) -> (B, G)
        return F.softplus(tau_base + delta) + 1e-3


class GeneDecoder(nn.Module):
    """Expression from the mean hidden state: y = sigmoid(proj(mean_g h_g) @ gene_emb^T)."""

    def __init__(self, dim=512, hidden=256):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, dim))

    def forward(self, hidden_states, gene_emb):
        """(B, G, D), (G, D) -> (B, G). Effendi calls decode() and never builds the (B, G, D)."""
        return self.decode(hidden_states.mean(dim=1), gene_emb)

    def decode(self, pooled, gene_emb):
        """pooled (B, D) is the mean over genes of the hidden states."""
        return torch.sigmoid(self.proj(pooled) @ gene_emb.T)                    # (B, D) @ (D, G) -> (B, G)


class Effendi(nn.Module):
    def __init__(self, in_dim=256, dim=512, align_hidden=512, vf_hidden=128, tau_hidden=128, tau_mod_scale=0.1,
                 dec_hidden=256, n_steps=200, tau_max=None):
        super().__init__()
        self.args = dict(in_dim=in_dim, dim=dim, align_hidden=align_hidden, vf_hidden=vf_hidden,
                         tau_hidden=tau_hidden, tau_mod_scale=tau_mod_scale, dec_hidden=dec_hidden,
                         n_steps=n_steps, tau_max=tau_max)                      # saved with the weights
        self.align = AlignMLP(in_dim, dim, align_hidden)
        self.field = EffendiVectorField(dim, vf_hidden)
        self.tau_predictor = AmortizedTauPredictor(tau_hidden, tau_mod_scale, dim, dim)
        self.decoder = GeneDecoder(dim, dec_hidden)
        self.n_steps, self.tau_max = n_steps, tau_max

    def forward(self, z_atac, gene_emb):
        """(B, in_dim), (G, dim) -> {"z_A", "tau", "tau_bar", "z_integrated", "y_hat"}."""
        return self.from_latent(self.align(z_atac), gene_emb)

    def from_latent(self, z_A, gene_emb):
        """The same from z_A (B, dim), for states that were reached by inversion or intervention."""
        tau = self.tau_predictor(z_A, gene_emb)                                 # (B, G)
        tau_bar = tau.median()                                                  # ()
        # One trajectory for all genes. Its end only sets the grid: no gradient runs through it.
        t_end = tau.detach().max() if self.tau_max is None else torch.as_tensor(self.tau_max).to(tau)
        weights = torch.stack([interpolation_weights(tau, t_end, self.n_steps),
                               interpolation_weights(tau_bar.expand(len(z_A), 1), t_end, self.n_steps)], dim=1)
        pooled, z_integrated = self.field.weighted_states(z_A, weights, t_end).unbind(dim=1)    # (B, D) each
        return dict(z_A=z_A, tau=tau, tau_bar=tau_bar, z_integrated=z_integrated,
                    y_hat=self.decoder.decode(pooled, gene_emb))


def reverse_loss(field, z_A, z_moved, tau_bar, n_steps):
    """L_reverse: how far running back from phi_(tau_bar)(z_A) misses z_A; zero for an exact solver."""
    return (z_A - field.flow(z_moved, -tau_bar, n_steps)).square().mean()


def delay_losses(model, out, z_R, expression, n_steps_back):
    """The four terms of Stage 2, unweighted, from the output of a forward pass."""
    return dict(ode=(z_R - out["z_integrated"]).square().mean(),
                recon=(out["y_hat"] - expression).square().mean(),
                tau=out["tau"].abs().mean(),
                reverse=reverse_loss(model.field, out["z_A"], out["z_integrated"], out["tau_bar"], n_steps_back))


# --- the identifiable model -----------------------------------------------------------------------------------

class AnchoredMember(nn.Module):
    """One fit of both stages: latent, readout D' of the chromatin that expression follows, flow, and the delays in this
    flow's own time."""

    def __init__(self, in_dim, dim, n_genes, align_hidden, vf_hidden, n_landmarks):
        super().__init__()
        self.align = AlignMLP(in_dim, LATENT, align_hidden)
        self.readout = GeneReadout(torch.zeros(n_genes, dim))
        self.readout.landmarks, self.readout.log_size = torch.zeros(n_landmarks, LATENT), torch.zeros(n_landmarks)
        self.field = EffendiVectorField(dim, vf_hidden, rank=LATENT)
        for name in ("log_tau", "A", "B"):
            self.register_buffer(name, torch.zeros(n_genes))

    def y_hat(self, z, shift, kernel):
        """Relative expression (B, G) of latent states z (B, 8), delays moved by shift (G,) in log."""
        weights = kernel_weights((self.log_tau + shift).exp(), TIMES, kernel)
        return predict(path(self.field.net, z), self.readout, weights, self.A, self.B)


class AnchoredTau(nn.Module):
    """tau[c, g] = exp(log_tau[g] + shift[g, k(c)]), k(c) the cell group whose centre is nearest to z_A[c]."""

    def __init__(self, n_genes, n_groups, dim):
        super().__init__()
        self.register_buffer("log_tau", torch.zeros(n_genes))
        self.register_buffer("shift", torch.zeros(n_genes, n_groups))
        self.register_buffer("centres", torch.zeros(n_groups, dim))

    def group(self, z_A):
        return torch.cdist(z_A, self.centres).argmin(dim=1)                     # (B,)

    def forward(self, z_A, gene_emb):
        """(B, G), or (G,) for z_A=None. gene_emb is not read: these delays were estimated, not predicted."""
        if z_A is None:
            return self.log_tau.exp()
        return (self.log_tau + self.shift[:, self.group(z_A)].T).exp()


class AnchoredEffendi(nn.Module):
    """The default model: each gene read at its own delay through the readout of its own chromatin (delay_fit.py).

        z_A   = Q AlignMLP(z_ATAC)                            8 dimensions, lifted orthonormally to D
        tau   = AnchoredTau(z_A)                              relative: mean log tau over genes is 0
        y_hat = mean_members mu_g (A_g sum_s W_s(tau_g) D'(z_s, g) + B_g) / S  counts in a cell of mean depth

    z_A and the flow shown are those of the first member; tau and y_hat are means over members.
    """

    def __init__(self, in_dim, dim, n_genes, kernel, n_members=2, n_groups=1, align_hidden=128, vf_hidden=128,
                 n_landmarks=0, n_steps=200):
        super().__init__()
        self.args = dict(in_dim=in_dim, dim=dim, n_genes=n_genes, kernel=kernel, n_members=n_members,
                         n_groups=n_groups, align_hidden=align_hidden, vf_hidden=vf_hidden,
                         n_landmarks=n_landmarks, n_steps=n_steps)              # saved with the weights
        self.members = nn.ModuleList(AnchoredMember(in_dim, dim, n_genes, align_hidden, vf_hidden, n_landmarks)
                                     for _ in range(n_members))
        self.tau_predictor = AnchoredTau(n_genes, n_groups, dim)
        self.register_buffer("mean", torch.ones(n_genes))
        self.kernel, self.n_steps = kernel, n_steps

    @property
    def field(self):
        return self.members[0].field

    def align(self, z_atac):
        """(B, in_dim) -> z_A (B, dim)."""
        return self.members[0].align(z_atac) @ self.field.lift.T

    def forward(self, z_atac, gene_emb=None):
        """As Effendi.forward, for the genes the model was fitted to."""
        out = self.from_latent(self.align(z_atac))
        group = self.tau_predictor.group(out["z_A"])
        z = [member.align(z_atac) for member in self.members]
        out["y_hat"] = self._expression(z, self.members, group)
        return out

    def from_latent(self, z_A, gene_emb=None):
        """From z_A (B, dim) alone, which is a state of the first member: y_hat is that member's."""
        tau = self.tau_predictor(z_A, gene_emb)
        tau_bar = tau.median()
        z_integrated = self.field.flow(z_A, tau_bar, self.n_steps)
        y_hat = self._expression([z_A @ self.field.lift], self.members[:1], self.tau_predictor.group(z_A))
        return dict(z_A=z_A, tau=tau, tau_bar=tau_bar, z_integrated=z_integrated, y_hat=y_hat)

    def _expression(self, z, members, group):
        """Mean over members of mu yhat / S; the cells of a group share their delays."""
        total = torch.zeros(len(group), len(self.mean), device=self.mean.device)
        known = self.args["n_genes"]                        # genes added later leave the size of a cell as it was
        for k in group.unique():
            cells, shift = group == k, self.tau_predictor.shift[:, k]
            for z_member, member in zip(z, members):
                yhat = member.y_hat(z_member[cells], shift, self.kernel)
                total[cells] += yhat / cell_size(yhat[:, :known], self.mean[:known]) / len(members)
        return total * self.mean


def add_genes(model, z_atac, known, access, counts, gene_emb, new_emb, peaks=None, min_access=20):
    """An AnchoredEffendi that also reads H new genes, with nothing retrained: v, latent and old genes stay as they are.

    Cells are placed by the genes that training knew (place). A new gene's readout comes from its own accessibility, the
    weights of its peaks and its delay from its own expression by the E-steps of training, with what the embeddings of
    the trained genes say as prior. Known genes are estimated beside them, like new ones whose embedding says nothing:
    in the gauge, their delays are on average what training found; the error of that mean is not in the sd. A gene with
    fewer than min_access accessible counts, and every gene where no known one has both ATAC and RNA to place cells by,
    gets its prior, its mean expression, and no sd.
    Shapes  z_atac (N, 256); known (K,) numbers of trained genes; access and counts (N, K + H), of these and the new;
            gene_emb (G, D), new_emb (H, D); peaks: Peaks of the K + H, None = they count as they are open
            -> the model; log tau of the new genes as each of the M members finds it, and its sd, (M, H) both
    """
    K, emb = len(known), torch.cat([gene_emb[known], new_emb])
    guess = head_predict(gene_emb, model.tau_predictor.log_tau, torch.full_like(model.mean, 0.5), new_emb)
    prior, mean = torch.cat([guess.new_zeros(K), guess]), model.mean[known]     # mean in a cell as deep as in training
    new_mean = (counts.sum(0) / counts[:, :K].sum().clamp_min(1) * mean.sum()).clamp_min(1e-6)
    opened = torch.nonzero(access.sum(0) >= max(min_access, 1)).flatten()
    again = opened[opened < K]
    if counts[:, again].sum() == 0:                         # nothing to place cells by
        opened = opened[:0]
    if peaks is not None:
        peaks = Peaks.of(peaks.counts, peaks.gene, opened.tolist())
    wider, log_taus, sds = copy.deepcopy(model), [], []
    for member, wide in zip(model.members, wider.members):
        level, moved = (member.log_tau - model.tau_predictor.log_tau).mean(), 0.0       # the member's own gauge
        z, read = member.align(z_atac), unseen_genes(member.readout, emb)
        log_tau, sd, A, B = prior + level, prior * torch.nan, torch.zeros_like(prior), torch.ones_like(prior)
        if len(opened):
            with torch.no_grad():
                yhat, there = (member.y_hat(s, 0.0, model.kernel)[:, known] for s in (z, member.readout.landmarks))
            placed = place(of_genes(member.readout, known), z, access[:, :K], counts[:, :K], yhat, there, mean)
            found, log_tau[opened], sd[opened], A[opened], B[opened] = new_gene_delays(
                member.field.net, model.kernel, of_genes(read, opened), placed, access[:, opened], counts[:, opened],
                new_mean[opened], log_tau[opened], peaks=peaks)
            for name, value in found.own().items():
                getattr(read, name)[opened] = value
            moved = gauge(log_tau[again] - member.log_tau[known[again]], sd[again], prior[again] + level)
        for name in ("e", "delta", "p", "q"):
            both = torch.cat([getattr(member.readout, name), getattr(read, name)[K:]])
            setattr(wide.readout, name, both if name == "e" else nn.Parameter(both, requires_grad=False))
        wide.log_tau, wide.A, wide.B = (torch.cat([old, new[K:]]) for old, new in
                                        ((member.log_tau, log_tau), (member.A, A), (member.B, B)))
        log_taus.append(torch.where(sd.isnan(), prior, log_tau - level - moved)[K:])
        sds.append(sd[K:])
    wider.mean = torch.cat([model.mean, new_mean[K:]])
    head = wider.tau_predictor
    head.log_tau = torch.cat([model.tau_predictor.log_tau, torch.stack(log_taus).mean(0)])
    head.shift = torch.cat([model.tau_predictor.shift, torch.zeros(len(new_emb), head.shift.shape[1])])
    return wider.eval(), torch.stack(log_taus), torch.stack(sds)
