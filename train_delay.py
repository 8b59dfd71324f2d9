"""Stage 2: learn tau_g from paired cells.

OBJECTIVE = "specification"
    L = W_ODE L_ode + W_RECON L_recon + W_TAU L_tau + W_REVERSE L_reverse         (effendi.py)
    Stage 2.1   v_theta frozen: AmortizedTau, GeneDecoder and AlignMLP learn at STAGE1_LR
    Stage 2.2   the same, and v_theta learns at STAGE2_LR_VF

Reads   effendi_{rna,atac}_emb.npy with their obs tables, gene_expression.npz, genes.csv, gene_embeddings.npy,
        align_mlp.pt, vector_field_frozen.pt
Writes  effendi_stage1.pt (after 2.1), effendi_final.pt, effendi.pt, gene_tau_estimates.csv, effendi.h5ad,
        train_delay_curve.csv
Run     python train_delay.py --set STAGE2_EPOCHS=5
"""
import time

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import artifacts
import config
import effendi_loader
import inference
from effendi import Effendi, delay_losses

INPUTS = ("effendi_atac_emb.npy", "effendi_atac_obs.csv", "effendi_rna_emb.npy", "effendi_rna_obs.csv",
          "gene_expression.npz", "genes.csv", "gene_embeddings.npy", "align_mlp.pt", "vector_field_frozen.pt")
OUTPUTS = ("effendi_stage1.pt", "effendi_final.pt", "effendi.pt", "gene_tau_estimates.csv", "effendi.h5ad",
           "train_delay_curve.csv")
SETTINGS = ("OBJECTIVE", "DIM", "ALIGN_HIDDEN", "VF_HIDDEN", "TAU_HIDDEN", "TAU_MOD_SCALE", "DEC_HIDDEN",
            "STAGE1_EPOCHS", "STAGE2_EPOCHS", "STAGE1_LR", "STAGE2_LR_VF", "BATCH_SIZE", "W_ODE", "W_RECON",
            "W_TAU", "W_REVERSE", "EXPLODE_NORM", "N_STEPS", "N_STEPS_BAR", "TAU_MAX", "HELD_OUT",
            "MIN_PAIRED_CELLS")
RESUME = "train_delay.resume.pt"
MEANINGLESS = ("OBJECTIVE is 'specification': its losses do not determine tau (permuting tau over the genes leaves them "
               "unchanged), so that these delays mean nothing about the genes.")


# --- data -----------------------------------------------------------------------------------------------------

def load_paired():
    """The paired cells, their rows joined by barcode and checked.

    Returns {"z_atac" (N, 256), "z_R" (N, D), "counts" (N, G) CSR, "depth" (N,), "gene_emb" (G, D),
             "genes", "cells", "obs", "held_out" (rows)}
    """
    artifacts.same_rows("effendi_rna_emb.npy", "effendi_rna_obs.csv", "gene_expression.npz")
    artifacts.same_rows("effendi_atac_emb.npy", "effendi_atac_obs.csv")
    artifacts.same_rows("genes.csv", "gene_embeddings.npy")
    genes = artifacts.load_table("genes.csv")
    if artifacts.record("gene_expression.npz")["columns"] != artifacts.record("genes.csv")["ids"]:
        raise ValueError(f"{artifacts.path('gene_expression.npz')} and {artifacts.path('genes.csv')} name different "
                         "genes.\n  Make both again: python precompute_embeddings.py rna --rna FILE")
    rna_obs = artifacts.load_table("effendi_rna_obs.csv")
    rows_rna, rows_atac = effendi_loader.pair(rna_obs, artifacts.load_table("effendi_atac_obs.csv"))
    obs = rna_obs.iloc[rows_rna]
    return dict(
        z_atac=artifacts.load_array("effendi_atac_emb.npy", (None, config.HYENADNA_D_MODEL))[rows_atac],
        z_R=artifacts.load_array("effendi_rna_emb.npy", (None, config.DIM))[rows_rna],
        counts=artifacts.load_sparse("gene_expression.npz")[rows_rna], depth=obs["n_counts"].to_numpy(np.float32),
        gene_emb=artifacts.load_array("gene_embeddings.npy", (None, config.DIM)),
        genes=genes, cells=obs.index, obs=obs, held_out=held_out_cells(obs.index))


def log_expression(counts, depth):
    """log1p of counts per 10,000: CSR (B, G) and depth (B,) -> dense float32 (B, G)."""
    return np.log1p(counts.toarray() * (1e4 / np.maximum(depth, 1))[:, None]).astype(np.float32)


def held_out_cells(cells):
    """Rows of the cells that no gradient sees: a seeded draw over their sorted names."""
    rng = torch.Generator().manual_seed(config.SEED)
    order = np.argsort(np.asarray(cells))[torch.randperm(len(cells), generator=rng).numpy()]
    return np.sort(order[:max(2, round(config.HELD_OUT * len(cells)))])


# --- training, as specified -----------------------------------------------------------------------------------

def new_model(in_dim, dim):
    return Effendi(in_dim, dim, config.ALIGN_HIDDEN, config.VF_HIDDEN, config.TAU_HIDDEN, config.TAU_MOD_SCALE,
                   config.DEC_HIDDEN, config.N_STEPS, config.TAU_MAX)


def start_phase(model, phase):
    """Freeze or free v_theta and return the phase's optimiser; phase 1 is Stage 2.1, phase 2 Stage 2.2."""
    model.field.requires_grad_(phase == 2)
    groups = [{"params": [p for name, p in model.named_parameters() if not name.startswith("field.")],
               "lr": config.STAGE1_LR}]
    if phase == 2:
        groups.append({"params": list(model.field.parameters()), "lr": config.STAGE2_LR_VF})
    return torch.optim.Adam(groups)


def fit(data, align_state, field_state, device, seed, resume=None, checkpoint=None, after_stage1=None):
    """Stages 2.1 and 2.2. Returns (model, one dictionary of held-out losses per epoch). Touches no files.

    data          as load_paired() returns it
    resume        a state that checkpoint(state) was given, to go on from it
    after_stage1  called with the model when Stage 2.1 ends
    """
    torch.manual_seed(seed)                                 # weights and dropout
    rng = torch.Generator().manual_seed(seed)               # batches, on the CPU
    model = new_model(data["z_atac"].shape[1], data["z_R"].shape[1])
    model.align.load_state_dict(align_state)
    model.field.load_state_dict(field_state)
    model.to(device)
    held_out = data["held_out"]
    train = np.setdiff1d(np.arange(len(data["cells"])), held_out)
    gene_emb = torch.from_numpy(data["gene_emb"]).to(device)
    history = resume["history"] if resume else []
    phase, optimiser = 0, None
    if resume:
        phase = resume["phase"]
        optimiser = start_phase(model, phase)
        artifacts.restore_training(resume, [model], optimiser, rng)
        print(f"train_delay: going on after epoch {len(history)}")
    for epoch in range(len(history) + 1, config.STAGE1_EPOCHS + config.STAGE2_EPOCHS + 1):
        if phase != (1 if epoch <= config.STAGE1_EPOCHS else 2):
            phase = 1 if epoch <= config.STAGE1_EPOCHS else 2
            optimiser = start_phase(model, phase)
        train_epoch(model, optimiser, data, train, gene_emb, rng, epoch, phase)
        history.append(dict(stage=f"2.{phase}", **evaluate(model, data, held_out, gene_emb)))
        print("train_delay: stage {} epoch {:>3}  held-out L {:.4f} = ode {:.4f}, recon {:.4f}, tau {:.4f}, "
              "reverse {:.2e}; tau {:.3f}-{:.3f}".format(history[-1]["stage"], epoch,
                                                         *list(history[-1].values())[1:]))
        if epoch == config.STAGE1_EPOCHS and after_stage1:
            after_stage1(model)
        if checkpoint:
            checkpoint(artifacts.training_state([model], optimiser, rng, history=history, phase=phase))
    model.field.settle()
    return model.eval(), history


def train_epoch(model, optimiser, data, rows, gene_emb, rng, epoch, phase):
    model.train()
    # A frozen field stays in eval mode: a training-mode forward would move its power iteration.
    model.field.train(phase == 2)
    order = rows[torch.randperm(len(rows), generator=rng).numpy()]
    n_epochs = config.STAGE1_EPOCHS + config.STAGE2_EPOCHS
    for start in tqdm(range(0, len(order), config.BATCH_SIZE), desc=f"epoch {epoch}/{n_epochs}", leave=False):
        losses, total, _ = batch_losses(model, data, order[start:start + config.BATCH_SIZE], gene_emb)
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"Stage 2.{phase} diverged in epoch {epoch}: "
                + ", ".join(f"{k} {v.item():.3g}" for k, v in losses.items())
                + f".\n  Try --set STAGE1_LR={config.STAGE1_LR / 3:.1g}, and look for nan in the embeddings.")
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.EXPLODE_NORM)
        optimiser.step()


def batch_losses(model, data, rows, gene_emb):
    """({term: ()}, their weighted sum, the model's output) for some rows of the data."""
    device = gene_emb.device
    expression = torch.from_numpy(log_expression(data["counts"][rows], data["depth"][rows])).to(device)
    with parametrize.cached():                              # one spectral norm per step
        out = model(torch.from_numpy(data["z_atac"][rows]).to(device), gene_emb)
        losses = delay_losses(model, out, torch.from_numpy(data["z_R"][rows]).to(device), expression,
                              config.N_STEPS_BAR)
    total = (config.W_ODE * losses["ode"] + config.W_RECON * losses["recon"] + config.W_TAU * losses["tau"]
             + config.W_REVERSE * losses["reverse"])
    return losses, total, out


@torch.no_grad()
def evaluate(model, data, rows, gene_emb):
    """Cell-weighted means over the rows of the total and its four terms, and the range of tau over genes."""
    model.eval()
    sums, tau_sum = {}, 0
    for start in range(0, len(rows), config.BATCH_SIZE):
        part = rows[start:start + config.BATCH_SIZE]
        losses, total, out = batch_losses(model, data, part, gene_emb)
        for name, value in dict(total=total, **losses).items():
            sums[name] = sums.get(name, 0) + value.item() * len(part)
        tau_sum = tau_sum + out["tau"].sum(0)
    tau = tau_sum / len(rows)
    return dict({name: value / len(rows) for name, value in sums.items()},
                tau_min=tau.min().item(), tau_max=tau.max().item())


# --- results --------------------------------------------------------------------------------------------------

def tau_table(tau, data):
    """gene_tau_estimates.csv: one row per gene, sorted by tau. No interval is claimed: under these losses tau
    is not determined by the data, so that every gene is marked as not identifiable."""
    table = pd.DataFrame(dict(
        tau=tau.mean(0), tau_low=np.nan, tau_high=np.nan, cell_sd=tau.std(0),
        n_cells=np.asarray((data["counts"] > 0).sum(0)).ravel(), identifiable=False,
        reason="the specification's losses do not determine tau"),
        index=pd.Index(data["genes"].index, name="gene"))
    return table.sort_values("tau")


def write_h5ad(file, data, out):
    """The paired cells for scanpy: X counts, obs held_out, obsm z_atac, z_A, z_R, phi_tau_z_A, layers tau, y_hat."""
    import anndata
    cells = anndata.AnnData(data["counts"], obs=data["obs"].copy(), var=data["genes"].copy())
    cells.obs["held_out"] = np.isin(np.arange(cells.n_obs), data["held_out"])
    cells.obsm.update(z_atac=data["z_atac"], z_A=out["z_A"], z_R=data["z_R"], phi_tau_z_A=out["z_integrated"])
    cells.layers.update(tau=out["tau"], y_hat=out["y_hat"])
    cells.write_h5ad(file.name)


def save_results(model, data, history, device, facts):
    out = inference.predict(model, data["z_atac"], data["gene_emb"], device, config.BATCH_SIZE)
    table = tau_table(out["tau"], data)
    weights = {"args": model.args, "state_dict": {k: v.cpu() for k, v in model.state_dict().items()}}
    artifacts.save_model("effendi_final.pt", weights, **facts)
    artifacts.save_model("effendi.pt", dict(
        weights, objective=config.OBJECTIVE, genes=list(data["genes"].index),
        gene_emb=torch.from_numpy(data["gene_emb"]), rna_encoder=artifacts.load_model("rna_encoder.pt"),
        atac_encoder=artifacts.load_model("atac_encoder.pt")), **facts)
    artifacts.save("effendi.h5ad", lambda f: write_h5ad(f, data, out), rows=len(data["cells"]),
                   ids=artifacts.hash_ids(data["cells"]), **facts)
    curve = pd.DataFrame(history, index=pd.RangeIndex(1, len(history) + 1, name="epoch"))
    artifacts.save_table("train_delay_curve.csv", curve, **facts)
    artifacts.save_table("gene_tau_estimates.csv", table, **facts)
    return table


def run():
    key = artifacts.stage_key("train_delay", {name: artifacts.existing(name) for name in INPUTS}, SETTINGS)
    if artifacts.is_done(key, *OUTPUTS):
        print("train_delay: up to date")
        return
    start = time.time()
    data, device = load_paired(), config.pick_device()
    facts = dict(stage="train_delay", key=key, cells=len(data["cells"]), genes=len(data["genes"]))
    model, history = fit(
        data, artifacts.load_model("align_mlp.pt")["state_dict"],
        artifacts.load_model("vector_field_frozen.pt")["state_dict"], device, config.SEED,
        artifacts.load_checkpoint(RESUME, key), lambda state: artifacts.save_checkpoint(RESUME, key, state),
        lambda model: artifacts.save_model("effendi_stage1.pt", {"args": model.args, "state_dict": model.state_dict()},
                                           **facts))
    seconds = time.time() - start
    table = save_results(model, data, history, device, dict(
        facts, seconds=round(seconds, 1), metrics=history[-1], meaning=MEANINGLESS))
    artifacts.drop_checkpoint(RESUME)
    print(f"train_delay: {len(data['cells'])} cells, {len(table)} genes, tau {table.tau.min():.3f}-"
          f"{table.tau.max():.3f} (ODE time), held-out L {history[0]['total']:.3f} -> {history[-1]['total']:.3f}, {seconds:.0f} s "
          f"-> {config.OUT_DIR}/gene_tau_estimates.csv, effendi.h5ad, effendi.pt")


def main(argv=None):
    config.from_args(__doc__, argv)
    run()


if __name__ == "__main__":
    config.script(main)
