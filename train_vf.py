"""Stage 1, on cells that need not be paired.

OBJECTIVE = "anchored" (default): what a state means in chromatin.
    z = AlignMLP(z_ATAC), D(z, g) a readout of gene g's own accessibility; both fitted to ATAC alone (chromatin.py)

OBJECTIVE = "specification": AlignMLP and v_theta, so that the ATAC cloud, carried by the ODE, covers the RNA cloud.
    L = SW2(phi_tau_bar(z_A), z_R)^2 + W_REVERSE L_reverse          tau_bar one positive number, learned
    Both clouds are drawn from independently, and their rows are first put into an order that depends on their
    values alone, so that no pairing can leak in through the row number.

Reads   effendi_atac_emb.npy (N, 256); anchored: gene_accessibility.npz (N, G), gene_peaks.npz (N, C),
        gene_embeddings.npy (G, 512); specification: effendi_rna_emb.npy (M, 512)
Writes  align_mlp.pt, vector_field_frozen.pt, train_vf_curve.csv
Run     python train_vf.py --set VF_EPOCHS=5
"""
import math
import time

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import anchored
import artifacts
import chromatin
import config
import effendi_loader
from align_mlp import AlignMLP
from effendi import reverse_loss
from slice_w2 import random_directions, sliced_w2_sq
from vector_field import EffendiVectorField
from workers import Pool, get_ready

INPUTS = ("effendi_atac_emb.npy", "effendi_rna_emb.npy")
OUTPUTS = ("align_mlp.pt", "vector_field_frozen.pt", "train_vf_curve.csv")
SETTINGS = ("OBJECTIVE", "DIM", "ALIGN_HIDDEN", "VF_HIDDEN", "N_PROJ_W2", "VF_EPOCHS", "VF_LR", "BATCH_SIZE",
            "W_REVERSE", "EXPLODE_NORM", "N_STEPS_BAR", "HELD_OUT")
RESUME = "train_vf.resume.pt"
ANCHORED_INPUTS = ("effendi_atac_emb.npy", "effendi_atac_obs.csv", "effendi_rna_obs.csv", "gene_accessibility.npz",
                   "gene_peaks.npz", "gene_peaks.csv", "genes.csv", "gene_embeddings.npy")
ANCHORED_SETTINGS = ("OBJECTIVE", "DIM", "VF_HIDDEN", "MEMBERS", "ANCHOR_STEPS", "ANCHOR_CELLS", "MIN_ACCESS",
                     "PEAKS_PER_GENE")
EVAL_CELLS = 1000           # cells of each held-out cloud in a reported SW2; sorting them is quick


class FlowToRNA(nn.Module):
    """AlignMLP, v_theta and the one delay tau_bar that Stage 1 knows."""

    def __init__(self, in_dim, dim, align_hidden, vf_hidden):
        super().__init__()
        self.align = AlignMLP(in_dim, dim, align_hidden)
        self.field = EffendiVectorField(dim, vf_hidden)
        self.raw_tau_bar = nn.Parameter(torch.tensor(0.0))

    @property
    def tau_bar(self):
        return F.softplus(self.raw_tau_bar)

    def losses(self, z_atac, z_R, directions, n_steps):
        """{"sw2_sq": (), "reverse": ()} of two batches of the same size, not paired."""
        with parametrize.cached():
            z_A = self.align(z_atac)
            z_moved = self.field.flow(z_A, self.tau_bar, n_steps)
            return dict(sw2_sq=sliced_w2_sq(z_moved, z_R, directions),
                        reverse=reverse_loss(self.field, z_A, z_moved, self.tau_bar, n_steps))


def split(z, rng):
    """Rows in an order of their values alone, then a seeded draw: (training rows, held-out rows)."""
    z = torch.from_numpy(np.ascontiguousarray(z[np.lexsort(z[:, :8].T)], dtype=np.float32))
    order = torch.randperm(len(z), generator=rng)
    n_out = max(2, round(config.HELD_OUT * len(z)))
    return z[order[n_out:]], z[order[:n_out]]


def fit(z_atac, z_R, device, seed, resume=None, checkpoint=None):
    """Arrays (N, 256) and (M, 512) in, (model, one dictionary of losses per epoch) out. Touches no files.

    resume      a state that checkpoint(state) was given, to go on from it
    """
    config.make_repeatable(device)
    torch.manual_seed(seed)                                 # weights and dropout
    rng = torch.Generator().manual_seed(seed)               # held-out cells, batches and directions, on the CPU
    model = FlowToRNA(z_atac.shape[1], z_R.shape[1], config.ALIGN_HIDDEN, config.VF_HIDDEN).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.VF_LR)
    (atac, atac_out), (rna, rna_out) = split(z_atac, rng), split(z_R, rng)
    n_eval = min(EVAL_CELLS, len(atac_out), len(rna_out))
    eval_directions = random_directions(z_R.shape[1], config.N_PROJ_W2, rng)
    batch = min(config.BATCH_SIZE, len(atac), len(rna))
    history = []
    if resume:
        artifacts.restore_training(resume, [model], optimiser, rng)
        history = resume["history"]
        print(f"train_vf: going on after epoch {len(history)}")
    for epoch in range(len(history) + 1, config.VF_EPOCHS + 1):
        model.train()
        n_batches = math.ceil(len(atac) / batch)
        for _ in tqdm(range(n_batches), desc=f"epoch {epoch}/{config.VF_EPOCHS}", leave=False, disable=None):
            z_a = atac[torch.randint(len(atac), (batch,), generator=rng)].to(device)
            z_r = rna[torch.randint(len(rna), (batch,), generator=rng)].to(device)
            loss = model.losses(z_a, z_r, random_directions(z_r.shape[1], config.N_PROJ_W2, rng), config.N_STEPS_BAR)
            total = loss["sw2_sq"] + config.W_REVERSE * loss["reverse"]
            if not torch.isfinite(total):
                raise FloatingPointError(
                    f"Stage 1 diverged in epoch {epoch}: " + ", ".join(f"{k} {v.item():.3g}" for k, v in loss.items())
                    + f".\n  Try --set VF_LR={config.VF_LR / 3:.1g}, and look for nan in {INPUTS[0]}, {INPUTS[1]}.")
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.EXPLODE_NORM)
            optimiser.step()
        history.append(evaluate(model, atac_out[:n_eval].to(device), rna_out[:n_eval].to(device), eval_directions))
        print("train_vf: epoch {:>3}  held-out SW2 {:.4f}  L_reverse {:.2e}  tau_bar {:.3f}".format(
            epoch, *history[-1].values()))
        if checkpoint:
            checkpoint(artifacts.training_state([model], optimiser, rng, history=history))
    model.field.settle()
    return model.eval(), history


@torch.no_grad()
def evaluate(model, atac, rna, directions):
    model.eval()
    loss = model.losses(atac, rna, directions, config.N_STEPS_BAR)
    return dict(sw2=loss["sw2_sq"].sqrt().item(), reverse=loss["reverse"].item(), tau_bar=model.tau_bar.item())


# --- Stage 1 of the identifiable model ------------------------------------------------------------------------

def load_accessibility():
    """ATAC embedding (N, 256), accessibility (N, G') and embeddings (G', 512) of the genes that have chromatin, their
    names, and their Peaks (or None). At most ANCHOR_CELLS cells, paired ones first, by a seeded draw."""
    artifacts.same_rows("effendi_atac_emb.npy", "effendi_atac_obs.csv", "gene_accessibility.npz", "gene_peaks.npz")
    artifacts.same_rows("gene_accessibility.npz", "gene_peaks.npz", "gene_peaks.csv", field="key")
    artifacts.same_rows("genes.csv", "gene_embeddings.npy")
    genes, obs = artifacts.load_table("genes.csv"), artifacts.load_table("effendi_atac_obs.csv")
    if artifacts.record("gene_accessibility.npz")["columns"] != artifacts.record("genes.csv")["ids"]:
        raise ValueError(f"{artifacts.path('gene_accessibility.npz')} and {artifacts.path('genes.csv')} name different "
                         "genes.\n  Make it again: python precompute_embeddings.py genes")
    draw = np.random.default_rng(config.SEED).random(len(obs)) + (obs["source"] != "paired").to_numpy()
    rows = np.sort(np.argsort(draw)[:config.ANCHOR_CELLS])
    access = artifacts.load_sparse("gene_accessibility.npz")[rows]
    seen = np.asarray(access.sum(0)).ravel() >= config.MIN_ACCESS
    if seen.sum() < 10:
        raise ValueError(f"only {seen.sum()} of {len(genes)} genes have {config.MIN_ACCESS} accessible counts near "
                         "them, all cells together.\n  Delays need the genes' own chromatin: check gene positions and "
                         "genome build, or lower MIN_ACCESS.")
    print(f"train_vf: {seen.sum():,} of {len(genes):,} genes have accessibility of their own; {len(rows):,} of "
          f"{len(obs):,} ATAC cells")
    names, peaks = list(genes.index[seen]), None
    if config.PEAKS_PER_GENE:
        artifacts.made_with("gene_peaks.npz", PEAKS_PER_GENE=config.PEAKS_PER_GENE)
        peaks = chromatin.Peaks.of(artifacts.load_sparse("gene_peaks.npz")[rows],
                                  artifacts.load_table("gene_peaks.csv").index, names)
    return (artifacts.load_array("effendi_atac_emb.npy", (None, config.HYENADNA_D_MODEL))[rows],
            access[:, seen].toarray(), artifacts.load_array("gene_embeddings.npy", (None, config.DIM))[seen], names,
            peaks)


def fit_member(shared, member):
    """One member of Stage 1 as plain values and tensors: a job of workers.Pool."""
    rng = anchored.generator(shared["seed"], "anchor", member)
    return chromatin.fit_anchor(shared["x"], shared["access"], shared["gene_emb"], rng, steps=shared["steps"],
                               peaks=shared["peaks"], device=shared["device"]).state()


def run_anchored():
    """Stage 1: latent and readout of each gene's own accessibility, from ATAC alone; MEMBERS independent fits."""
    inputs = {name: artifacts.existing(name) for name in ANCHORED_INPUTS}
    key = artifacts.stage_key("train_vf", inputs, ANCHORED_SETTINGS)
    if artifacts.is_done(key, *OUTPUTS):
        return print("train_vf: up to date")
    start = time.time()
    get_ready(config.processes(2))
    x, access, gene_emb, genes, peaks = load_accessibility()
    saved = artifacts.load_checkpoint(RESUME, key) or {}
    if config.MEMBERS is not None and config.MEMBERS < 1:
        raise ValueError(f"MEMBERS={config.MEMBERS}: at least one fit is needed.\n  Leave it at None.")
    paired = effendi_loader.pair(*map(artifacts.load_table, ("effendi_rna_obs.csv", "effendi_atac_obs.csv")))[0]
    members = range(config.MEMBERS or anchored.usual_members(len(paired)))
    left = [m for m in members if m not in saved]
    device = config.fit_device()
    shared = dict(x=x, access=access, gene_emb=gene_emb, peaks=peaks, steps=config.ANCHOR_STEPS, seed=config.SEED,
                  device=device)
    bar = tqdm(total=len(members), initial=len(saved), unit="fit", desc="members", leave=False, disable=None)
    with bar, Pool(shared, config.processes(len(left), device)) as pool:
        for member, found in pool.each(fit_member, left):
            saved[member] = found
            artifacts.save_checkpoint(RESUME, key, saved)
            bar.update()
    done = [saved[m] for m in members]
    for m, found in enumerate(done):
        print(f"train_vf: member {m + 1}: held-out accessibility {found['history'][0][1]:.4f} -> {found['nll']:.4f} "
              f"nats an entry, best after {found['steps']} steps")
    curve = pd.DataFrame([dict(member=m + 1, step=step, held_out_nll=nll) for m, d in enumerate(done)
                          for step, nll in d["history"]])
    curve.index = pd.RangeIndex(1, len(curve) + 1, name="row")
    seconds = time.time() - start
    facts = dict(stage="train_vf", key=key, seconds=round(seconds, 1), cells=len(x), genes=len(genes),
                 metrics=dict(held_out_nll=[d["nll"] for d in done]))
    torch.manual_seed(config.SEED)
    field = EffendiVectorField(config.DIM, config.VF_HIDDEN, rank=chromatin.LATENT)
    weighed = artifacts.hash_file(artifacts.path("gene_peaks.csv")) if config.PEAKS_PER_GENE else None
    artifacts.save_model("align_mlp.pt", {"members": done, "genes": genes, "gene_peaks": weighed}, **facts)
    artifacts.save_model("vector_field_frozen.pt", {"args": field.args, "state_dict": field.state_dict()}, **dict(
        facts, note="untrained: under OBJECTIVE anchored the flow is learned in Stage 2"))
    artifacts.save_table("train_vf_curve.csv", curve, **facts)
    artifacts.drop_checkpoint(RESUME)
    print(f"train_vf: {len(done)} readouts of {len(genes):,} genes' own chromatin in {len(x):,} cells, {seconds:.0f} s "
          f"-> {config.OUT_DIR}/align_mlp.pt")


def run():
    if config.OBJECTIVE == "anchored":
        return run_anchored()
    key = artifacts.stage_key("train_vf", {name: artifacts.existing(name) for name in INPUTS}, SETTINGS)
    if artifacts.is_done(key, *OUTPUTS):
        print("train_vf: up to date")
        return
    start = time.time()
    z_atac = artifacts.load_array("effendi_atac_emb.npy", (None, config.HYENADNA_D_MODEL))
    z_R = artifacts.load_array("effendi_rna_emb.npy", (None, config.DIM))
    model, history = fit(z_atac, z_R, config.pick_device(), config.SEED,
                         artifacts.load_checkpoint(RESUME, key),
                         lambda state: artifacts.save_checkpoint(RESUME, key, state))
    seconds = time.time() - start
    facts = dict(stage="train_vf", key=key, seconds=round(seconds, 1), metrics=history[-1], cells=dict(
        atac=len(z_atac), rna=len(z_R)), spaces=[artifacts.record(name).get("space") for name in INPUTS])
    for name, module in (("align_mlp.pt", model.align), ("vector_field_frozen.pt", model.field)):
        artifacts.save_model(name, {"args": module.args, "state_dict": module.state_dict(),
                                    "tau_bar": model.tau_bar.item()}, **facts)
    curve = pd.DataFrame(history, index=pd.RangeIndex(1, len(history) + 1, name="epoch"))
    artifacts.save_table("train_vf_curve.csv", curve, **facts)
    artifacts.drop_checkpoint(RESUME)
    print(f"train_vf: held-out SW2 {history[0]['sw2']:.3f} -> {history[-1]['sw2']:.3f} in {len(history)} epochs, "
          f"{seconds:.0f} s -> {config.OUT_DIR}/align_mlp.pt, vector_field_frozen.pt")


def main(argv=None):
    config.from_args(__doc__, argv)
    run()


if __name__ == "__main__":
    config.script(main)
