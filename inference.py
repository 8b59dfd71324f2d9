"""A trained model on new cells: delays and expression without retraining, and the flow run backward.

    z_A = AlignMLP(encode(ATAC))        with the encoder that is stored in effendi.pt
    tau, y_hat                          as in training, for the training genes or for given gene embeddings
    reverse_ode:   z_A ~ phi_(-tau_bar)(z_R)
    scRNA_to_tau:  RNA alone -> z_A by the reversed flow -> tau

Reads   effendi.pt, new cells (.h5ad, 10x .h5, .h5mu), gene_embeddings.npy of another run if asked for
Writes  inference.h5ad (X the RNA counts if given; obsm z_atac, z_A, phi_tau_z_A; layers tau, y_hat),
        inference_tau.csv (one row per gene: tau, cell_sd, and against RNA if given: spearman)
Run     python inference.py --model effendi_output/effendi.pt --atac new_atac.h5ad --rna new_rna.h5ad --out new_output
"""
import io
import time

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

import artifacts
import config
import effendi_loader
from effendi import Effendi

MODELS = {"specification": Effendi}


def load_effendi(file):
    """(model in eval mode, everything else in effendi.pt) ; ValueError for a file of another kind."""
    saved = artifacts.read_weights(file)
    needed = {"objective", "args", "state_dict", "genes", "gene_emb", "atac_encoder"}
    if not isinstance(saved, dict) or not needed <= set(saved):
        raise ValueError(f"{file} is a .pt file, but not an effendi.pt: it lacks "
                         f"{', '.join(sorted(needed - set(saved)))}.\n  Give the effendi.pt that train_delay.py wrote.")
    model = MODELS[saved["objective"]](**saved["args"])
    try:
        model.load_state_dict(saved["state_dict"])
    except RuntimeError as err:
        raise ValueError(f"{file} holds weights of another architecture: {str(err).splitlines()[-1].strip()}\n"
                         "  It was written by another version of Effendi; train it again.") from err
    return model.eval(), saved


@torch.no_grad()
def predict(model, z_atac, gene_emb, device, batch=128):
    """All cells, batch by batch: {"z_A", "z_integrated" (N, D), "tau", "y_hat" (N, G)} as numpy arrays."""
    gene_emb = torch.as_tensor(gene_emb).to(device)
    model.to(device)
    parts = {"z_A": [], "z_integrated": [], "tau": [], "y_hat": []}
    for start in tqdm(range(0, len(z_atac), batch), desc="predict", unit_scale=batch, unit="cell", leave=False):
        out = model(torch.from_numpy(z_atac[start:start + batch]).to(device), gene_emb)
        for name, kept in parts.items():
            kept.append(out[name].cpu().numpy())
    return {name: np.concatenate(kept) for name, kept in parts.items()}


@torch.no_grad()
def reverse_ode(model, z_R, tau_bar, n_steps=200, explode_norm=50.0):
    """RNA states (B, D) carried back to the ATAC states they came from: (z_A (B, D), exploded (B,) bool).

    A state whose norm grows by more than explode_norm, or is not finite, has exploded.
    """
    z_A = model.field.flow(z_R, -tau_bar, n_steps)
    growth = z_A.norm(dim=1) / z_R.norm(dim=1).clamp_min(1e-6)
    return z_A, ~(torch.isfinite(z_A).all(dim=1) & (growth <= explode_norm))


@torch.no_grad()
def scRNA_to_tau(model, z_R, gene_emb, n_steps=200, explode_norm=50.0):
    """Delays (B, G) of cells of which only RNA is known, and which of them exploded on the way back."""
    tau_bar = model.tau_predictor(None, gene_emb).median()
    z_A, exploded = reverse_ode(model, z_R, tau_bar, n_steps, explode_norm)
    return model.tau_predictor(z_A, gene_emb), exploded


def gene_spearman(y_hat, counts, depth):
    """Spearman correlation of predicted and measured expression over cells, per gene (G,); nan if constant."""
    observed = counts.toarray() / np.maximum(depth, 1)[:, None]
    rho = np.full(counts.shape[1], np.nan)
    for g in np.flatnonzero((observed.std(0) > 0) & (y_hat.std(0) > 0)):
        rho[g] = spearmanr(y_hat[:, g], observed[:, g]).statistic
    return rho
