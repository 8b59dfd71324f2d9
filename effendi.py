"""The Effendi model as specified: delay head, decoder, and the flow that ties ATAC to RNA.

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
import torch
import torch.nn.functional as F
from torch import nn

from align_mlp import AlignMLP
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
