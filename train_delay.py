"""Stage 2: learn tau_g from paired cells.

OBJECTIVE = "anchored" (default; equations in delay_fit.py)
    Stage 2.1   AlignMLP frozen: flow, delays and kernel by expectation-maximisation, MEMBERS fits
    Stage 2.2   what they are worth: refits on halves and on resampled cells give the gate, the intervals, the
                reasons why a gene's delay cannot be told, and delays that differ between cell states
OBJECTIVE = "specification"
    L = W_ODE L_ode + W_RECON L_recon + W_TAU L_tau + W_REVERSE L_reverse         (effendi.py)
    Stage 2.1   v_theta frozen: AmortizedTau, GeneDecoder and AlignMLP learn at STAGE1_LR
    Stage 2.2   the same, and v_theta learns at STAGE2_LR_VF

Reads   effendi_{rna,atac}_emb.npy with their obs tables, gene_expression.npz, genes.csv, gene_embeddings.npy,
        align_mlp.pt, vector_field_frozen.pt; anchored: gene_accessibility.npz, gene_peaks.npz, gene_peaks.csv
Writes  effendi_stage1.pt (after 2.1), effendi_final.pt, effendi.pt, gene_tau_estimates.csv, effendi.h5ad,
        train_delay_curve.csv; anchored: gene_peak_weights.csv
Run     python train_delay.py --set STAGE2_EPOCHS=5
"""
import time

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import anchored
import artifacts
import chromatin
import config
import delay_fit
import effendi_loader
import inference
from effendi import AnchoredEffendi, Effendi, delay_losses
from workers import Pool, get_ready

INPUTS = ("effendi_atac_emb.npy", "effendi_atac_obs.csv", "effendi_rna_emb.npy", "effendi_rna_obs.csv",
          "gene_expression.npz", "genes.csv", "gene_embeddings.npy", "align_mlp.pt", "vector_field_frozen.pt")
OUTPUTS = ("effendi_stage1.pt", "effendi_final.pt", "effendi.pt", "gene_tau_estimates.csv", "effendi.h5ad",
           "train_delay_curve.csv")
SETTINGS = ("OBJECTIVE", "DIM", "ALIGN_HIDDEN", "VF_HIDDEN", "TAU_HIDDEN", "TAU_MOD_SCALE", "DEC_HIDDEN",
            "STAGE1_EPOCHS", "STAGE2_EPOCHS", "STAGE1_LR", "STAGE2_LR_VF", "BATCH_SIZE", "W_ODE", "W_RECON",
            "W_TAU", "W_REVERSE", "EXPLODE_NORM", "N_STEPS", "N_STEPS_BAR", "TAU_MAX", "HELD_OUT",
            "MIN_PAIRED_CELLS")
ANCHORED_INPUTS = (*INPUTS, "gene_accessibility.npz", "gene_peaks.npz", "gene_peaks.csv")
ANCHORED_OUTPUTS = (*OUTPUTS, "gene_peak_weights.csv")
ANCHORED_SETTINGS = ("OBJECTIVE", "DIM", "VF_HIDDEN", "KERNEL", "MEMBERS", "EM_EPOCHS", "CELL_GROUPS", "BOOTSTRAP",
                     "RNA_ONLY_CELLS", "HELD_OUT", "MIN_PAIRED_CELLS", "PEAKS_PER_GENE", "N_STEPS")
RESUME = "train_delay.resume.pt"
FEW_GENES = 0.05                            # share of identifiable genes below which a run is called so
MEANINGLESS = ("OBJECTIVE is 'specification': its losses do not determine tau (permuting tau over the genes leaves "
               "them unchanged), so that these delays mean nothing about the genes.")


# --- data -----------------------------------------------------------------------------------------------------

def load_paired():
    """The paired cells, their rows joined by barcode and checked.

    Returns {"z_atac" (N, 256), "z_R" (N, D), "counts" (N, G) CSR, "depth" (N,), "gene_emb" (G, D),
             "all_counts" (N_r, G) CSR, "rows_rna", "rows_atac", "genes", "cells", "obs", "held_out" (rows)}
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
    obs, counts = rna_obs.iloc[rows_rna], artifacts.load_sparse("gene_expression.npz")
    return dict(
        z_atac=artifacts.load_array("effendi_atac_emb.npy", (None, config.HYENADNA_D_MODEL))[rows_atac],
        z_R=artifacts.load_array("effendi_rna_emb.npy", (None, config.DIM))[rows_rna],
        counts=counts[rows_rna], all_counts=counts, rows_rna=rows_rna, depth=obs["n_counts"].to_numpy(np.float32),
        gene_emb=artifacts.load_array("gene_embeddings.npy", (None, config.DIM)),
        rows_atac=rows_atac, genes=genes, cells=obs.index, obs=obs, held_out=held_out_cells(obs.index))


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
    config.make_repeatable(device)
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
    starts = range(0, len(order), config.BATCH_SIZE)
    for start in tqdm(starts, desc=f"epoch {epoch}/{n_epochs}", leave=False, disable=None):
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


# --- the identifiable model -----------------------------------------------------------------------------------

def load_anchored():
    """The paired cells with the genes that Stage 1 gave a readout, and Stage 1's members.

    Returns load_paired()'s dictionary with "fitted" (G,) bool, "x" (N, 256), "access" and "y" (N, G') dense, "emb"
    (G', D), "peaks" (Peaks or None) and "rna_only" (M, G') added, and the list of members' states. rna_only: the RNA of
    cells that have no partner, an atlas's or the paired file's; RNA_ONLY_CELLS of them at most, a seeded draw.
    """
    data, saved = load_paired(), artifacts.load_model("align_mlp.pt")
    artifacts.same_rows("effendi_atac_emb.npy", "gene_accessibility.npz", "gene_peaks.npz")
    if "seen" not in saved.get("members", [{}])[0]:
        raise ValueError(f"{artifacts.path('align_mlp.pt')} was trained under OBJECTIVE specification or by an earlier "
                         "version.\n"
                         "  Train it again: python train_vf.py")
    fitted = data["genes"].index.isin(saved["genes"])
    if list(data["genes"].index[fitted]) != saved["genes"]:
        raise ValueError(f"{artifacts.path('align_mlp.pt')} was trained on other genes than genes.csv names.\n"
                         "  Train it again: python train_vf.py")
    artifacts.same_rows("gene_accessibility.npz", "gene_peaks.npz", "gene_peaks.csv", field="key")
    weighed = artifacts.hash_file(artifacts.path("gene_peaks.csv")) if config.PEAKS_PER_GENE else None
    if saved.get("gene_peaks", "none") != weighed:
        raise ValueError(f"{artifacts.path('align_mlp.pt')} was trained on other peaks of genes than "
                         f"{artifacts.path('gene_peaks.csv')} names, or with another PEAKS_PER_GENE.\n"
                         "  Train it again: python train_vf.py")
    access = artifacts.load_sparse("gene_accessibility.npz")[data["rows_atac"]][:, fitted]
    peaks = None
    if config.PEAKS_PER_GENE:
        peaks = chromatin.Peaks.of(artifacts.load_sparse("gene_peaks.npz")[data["rows_atac"]],
                                  artifacts.load_table("gene_peaks.csv").index, saved["genes"])
    alone = np.setdiff1d(np.arange(data["all_counts"].shape[0]), data["rows_rna"])
    alone = np.sort(np.random.default_rng(config.SEED).permutation(alone)[:config.RNA_ONLY_CELLS])
    rna_only = data["all_counts"][alone][:, fitted].toarray()
    rna_only = rna_only[rna_only.sum(1) > 0]
    if len(alone):
        print(f"train_delay: {len(rna_only):,} cells without ATAC join the paired ones, if their pairing shows "
              "(RNA_ONLY_CELLS)")
    return dict(data, fitted=fitted, x=data["z_atac"], access=access.toarray(), rna_only=rna_only,
                peaks=peaks,
                y=data["counts"][:, fitted].toarray(), emb=data["gene_emb"][fitted]), saved["members"]


def fit_members(pool, anchors, done, key):
    """Stage 2.1: an anchored.Result over the members, kept one by one in their order."""
    kept, delays = done["delays"], []

    def start(m, kernel):
        return Kept(kept[m]) if m in kept and kernel in (None, kept[m]["kernel"]) else pool.start(fit_member, m, kernel)
    with tqdm(total=len(anchors), unit="fit", desc="members", leave=False, disable=None) as bar:
        kernel = kept[0]["kernel"] if 0 in kept else config.KERNEL
        for m, delay in enumerate(anchored.side_by_side(start, len(anchors), kernel)):
            delays.append(delay)
            kept[m] = delay.state()
            artifacts.save_checkpoint(RESUME, key, done)
            bar.update()
    for m, delay in enumerate(delays):
        print(f"train_delay: member {m + 1}: kernel {delay.kernel}, best epoch {delay.epoch}, held-out RNA "
              f"{(delay.held_out - delay.still).mean():+.2f} nats a cell against v = 0")
    return anchored.combine(anchors, delays)


class Kept:
    """A job that an earlier run has done."""

    def __init__(self, state):
        self.state = state

    def result(self):
        return delay_fit.DelayFit.from_state(self.state)


def fit_member(shared, m, kernel):
    rng = anchored.generator(shared["seed"], "delay", m)
    return delay_fit.fit_delay(shared["members"][m], shared["access"], shared["counts"], rng, kernel, shared["epochs"],
                              held_out=shared["held_out"], rna_only=shared["rna_only"], device=shared["device"])


def bootstrap(pool, kernel, done, key):
    """Delays (R, G') of both stages refitted on resampled cells; each kept as soon as it is done."""
    kept = done["replicates"]
    left = [(r, kernel) for r in range(config.BOOTSTRAP) if r not in kept]
    with tqdm(total=config.BOOTSTRAP, initial=config.BOOTSTRAP - len(left), unit="refit", desc="bootstrap",
              leave=False, disable=None) as bar:
        for (r, _), log_tau in pool.each(refit, left):
            kept[r] = log_tau
            artifacts.save_checkpoint(RESUME, key, done)
            bar.update()
    return torch.stack([kept[r] for r in range(config.BOOTSTRAP)]) if config.BOOTSTRAP else None


def refit(shared, task):
    r, kernel = task
    return anchored.bootstrap_replicate(shared, bootstrap_seed(shared["seed"], r), kernel)


def bootstrap_seed(seed, r):
    return anchored.generator(seed, "bootstrap", r).initial_seed()


def build_anchored(result, data, groups, shift):
    """AnchoredEffendi from a Result; groups (N,) and shift (G', K), or None before Stage 2.2."""
    first = result.anchors[0]
    n_groups = 1 if shift is None else shift.shape[1]
    model = AnchoredEffendi(data["x"].shape[1], data["emb"].shape[1], len(data["emb"]), result.kernel,
                            len(result.delays), n_groups, first.align.args["hidden"],
                            result.delays[0].field.net[0].out_features,
                            len(first.readout.landmarks), config.N_STEPS)
    for member, anchor, delay in zip(model.members, result.anchors, result.delays):
        member.align.load_state_dict(anchor.align.state_dict())
        member.readout.load_state_dict(delay.followed(anchor.readout).state_dict())
        member.field.net.load_state_dict(delay.field.net.state_dict())
        member.log_tau, member.A, member.B = delay.log_tau + delay.gauge, delay.A, delay.B
    model.mean = torch.from_numpy(data["y"]).mean(0)
    model.tau_predictor.log_tau = result.log_tau
    if shift is not None:
        model.tau_predictor.shift = shift
        z_A = first.z @ model.field.lift.T
        model.tau_predictor.centres = torch.stack([z_A[groups == k].mean(0) for k in range(n_groups)])
    return model.eval()


def anchored_table(result, low, high, ok, why, tau, data):
    """gene_tau_estimates.csv. A gene without accessibility of its own gets what its embedding says, no interval."""
    fitted, n = data["fitted"], len(data["genes"])
    guess = delay_fit.head_predict(torch.from_numpy(data["emb"]), result.log_tau, result.sd,
                                  torch.from_numpy(data["gene_emb"])).exp().numpy()
    table = pd.DataFrame(dict(
        tau=guess, tau_low=np.nan, tau_high=np.nan, cell_sd=0.0,
        n_cells=np.asarray((data["counts"] > 0).sum(0)).ravel(), identifiable=np.zeros(n, bool),
        reason="no accessibility of its own: predicted from the gene embedding"),
        index=pd.Index(data["genes"].index, name="gene"))
    table.loc[fitted, "tau"], table.loc[fitted, "cell_sd"] = result.log_tau.exp().numpy(), tau.std(0).round(6)
    table.loc[fitted, "tau_low"], table.loc[fitted, "tau_high"] = low.exp().numpy(), high.exp().numpy()
    table.loc[fitted, "identifiable"], table.loc[fitted, "reason"] = ok.numpy(), why
    return table.sort_values("tau")


def peak_weights_table(delays, genes):
    """gene_peak_weights.csv: gene_peaks.csv with what each peak counts for, mean over members and its sd."""
    table = artifacts.load_table("gene_peaks.csv")
    table = table[table.index.isin(genes)]
    if config.PEAKS_PER_GENE == 0:
        return table.assign(weight=1.0, sd=0.0)
    weight, sd = (torch.stack([getattr(d, name) for d in delays]) for name in ("peak_weight", "peak_sd"))
    spread = (sd.square().mean(0) + anchored.variance_of_mean(weight)).sqrt()
    return table.assign(weight=weight.mean(0).numpy(), sd=spread.numpy()).round({"weight": 4, "sd": 4})


def whole_output(out, table, data):
    """The model's output widened from the fitted genes to all: the rest get their tau and their mean expression."""
    fitted, n = data["fitted"], len(data["cells"])
    tau = np.repeat(table["tau"].reindex(data["genes"].index).to_numpy(np.float32)[None], n, 0)
    y_hat = np.repeat(np.asarray(data["counts"].mean(0), np.float32).reshape(1, -1), n, 0)
    tau[:, fitted], y_hat[:, fitted] = out["tau"], out["y_hat"]
    return dict(out, tau=tau, y_hat=y_hat)


def run_anchored():
    key = artifacts.stage_key("train_delay", {name: artifacts.existing(name) for name in ANCHORED_INPUTS},
                              ANCHORED_SETTINGS)
    if artifacts.is_done(key, *ANCHORED_OUTPUTS):
        return print("train_delay: up to date")
    if config.BOOTSTRAP < 0 or config.BOOTSTRAP == 1:
        raise ValueError(f"BOOTSTRAP={config.BOOTSTRAP}: a spread needs at least 2 refits.\n"
                         "  Use 20 or more for intervals, or 0 for the posterior alone.")
    start = time.time()
    get_ready(config.processes(2))
    data, members = load_anchored()
    device, fit_on = config.pick_device(), config.fit_device()      # of predictions, and of fits
    facts = dict(stage="train_delay", key=key, cells=len(data["cells"]), genes=len(data["genes"]))
    anchors = [chromatin.restore_anchor(m, data["x"], data["emb"]) for m in members]
    done = artifacts.load_checkpoint(RESUME, key) or {"delays": {}, "replicates": {}}
    shared = dict(x=data["x"], access=data["access"], counts=data["y"], gene_emb=data["emb"],
                  rna_only=data["rna_only"], peaks=data["peaks"], seed=config.SEED, members=anchors,
                  epochs=config.EM_EPOCHS, held_out=config.HELD_OUT, device=fit_on)
    with Pool(shared, config.processes(len(anchors) + 2 + config.BOOTSTRAP, fit_on)) as pool:
        result = fit_members(pool, anchors, done, key)
        before = build_anchored(result, data, None, None)
        artifacts.save_model("effendi_stage1.pt", {"args": before.args, "state_dict": before.state_dict()}, **facts)
        print(f"train_delay: refitting both stages on two halves of the cells and on {config.BOOTSTRAP} resamples")
        rows, jobs = anchored.draw_halves(shared, anchored.generator(config.SEED, "halves", 0))
        jobs = [pool.start(anchored.fit_cells, *job, result.kernel) for job in jobs]
        replicates = bootstrap(pool, result.kernel, done, key)
        halves = anchored.compare_halves(rows, [job.result() for job in jobs])
    gate = anchored.gate(result, halves)
    groups = anchored.cell_groups(result.anchors[0].z, config.CELL_GROUPS,
                                  anchored.generator(config.SEED, "groups", 0))
    shift, reliability = anchored.modulation(result, halves, data["y"], groups)
    low, high = anchored.intervals(result.log_tau, result.sd, replicates)
    ok, why = anchored.identifiable(result, data["access"], data["y"], halves, device=fit_on)
    if not gate.open:                                       # intervals would look as if something were known
        ok, low, high = torch.zeros_like(ok), *torch.full((2, len(ok)), torch.nan)
        why = ["the run's gate is closed" + (f"; {reason}" if reason else "") for reason in why]

    model = build_anchored(result, data, groups, shift)
    out = inference.predict(model, data["x"], data["emb"], device, config.BATCH_SIZE)
    table = anchored_table(result, low, high, ok, why, out["tau"], data)
    metrics = dict(kernel=result.kernel, gate_open=gate.open, pairing_z=gate.pairing_z, gain_z=gate.gain_z,
                   differ_z=gate.differ_z, own_z=gate.own_z, split_half=gate.split_half,
                   held_out_cells=len(result.gain), modulation_reliability=reliability, identifiable=int(ok.sum()))
    history = [dict(member=m + 1, epoch=epoch, gain_over_v0=gain) for m, d in enumerate(result.delays)
               for epoch, gain in d.history]
    seconds = time.time() - start
    facts |= dict(seconds=round(seconds, 1), metrics=metrics, meaning=meaning(gate, ok, data))
    genes = data["genes"].index[data["fitted"]]
    artifacts.save_table("gene_peak_weights.csv", peak_weights_table(result.delays, genes), **facts)
    save_results(model, table, whole_output(out, table, data), data, history, facts, genes, data["emb"])
    artifacts.drop_checkpoint(RESUME)
    print(f"train_delay: {meaning(gate, ok, data)}")
    print(f"train_delay: {len(data['cells'])} cells, kernel {result.kernel}, relative tau {table.tau.min():.2f}-"
          f"{table.tau.max():.2f}, {seconds:.0f} s -> {config.OUT_DIR}/gene_tau_estimates.csv, effendi.h5ad, "
          "effendi.pt")


def meaning(gate, ok, data):
    """One sentence on what the delays of this run are worth."""
    if not gate.open:
        return "tau means NOTHING on these data: " + "; ".join(gate.reasons) + "."
    n = len(data["genes"])
    where = "on these data" if ok.sum() >= FEW_GENES * n else "for hardly a gene of these data"
    return (f"tau is meaningful {where}: {int(ok.sum())} of {n} genes are identifiable, halves of the cells agree at "
            f"Spearman {gate.split_half:.2f}, moving beats v = 0 by {gate.gain_z:.0f} standard errors and delays that "
            f"differ beat one for all genes by {gate.differ_z:.0f}. tau is relative: only ratios of delays are "
            "determined.")


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


def write_h5ad(file, data, out, table, meaning):
    """The paired cells for scanpy: X counts, obsm z_atac, z_A, z_R, phi_tau_z_A, layers tau, y_hat; var holds
    the delays of gene_tau_estimates.csv, uns["effendi"] what the run as a whole is worth.

    obs checked: the rows of validate.py's reconstruction, which no gradient saw under OBJECTIVE specification.
    """
    import anndata
    genes = data["genes"].join(table[["tau", "tau_low", "tau_high", "identifiable", "reason"]])
    cells = anndata.AnnData(data["counts"], obs=data["obs"].copy(), var=genes, uns={"effendi": {"meaning": meaning}})
    cells.obs["checked"] = np.isin(np.arange(cells.n_obs), data["held_out"])
    cells.obsm.update(z_atac=data["z_atac"], z_A=out["z_A"], z_R=data["z_R"], phi_tau_z_A=out["z_integrated"])
    cells.layers.update(tau=out["tau"], y_hat=out["y_hat"])
    cells.write_h5ad(file.name)


def encoders():
    """What inference needs to bring new cells and genes into the same spaces; gene_encoder.pt exists for PCA only."""
    names = [name for name in ("rna_encoder", "atac_encoder", "gene_encoder") if artifacts.path(f"{name}.pt").exists()]
    return {name: artifacts.load_model(f"{name}.pt") for name in names}


def gene_window():
    """GENE_WINDOW and GENE_DECAY under which the genes' accessibility was counted, for new genes."""
    if not artifacts.path("gene_accessibility.npz").exists():
        return [config.GENE_WINDOW, config.GENE_DECAY]
    counted = artifacts.record("gene_accessibility.npz")["config"]
    return [counted["GENE_WINDOW"], counted["GENE_DECAY"]]


def positions(genes):
    """Where the genes of genes.csv lie: the neighbours that a new gene's peaks may belong to."""
    return dict(gene=list(genes.index), chrom=genes["chrom"].fillna("").astype(str).tolist(),
                strand=genes["strand"].fillna("").astype(str).tolist(),
                **{name: torch.tensor(genes[name].to_numpy(float)) for name in ("start", "end")})


def save_results(model, table, out, data, history, facts, genes, gene_emb):
    """The artifacts of Stage 2 that both objectives have.

    genes and gene_emb (G', D) are those the model itself was fitted to.
    """
    model = model.cpu()
    weights = {"args": model.args, "state_dict": {k: v.cpu() for k, v in model.state_dict().items()}}
    judged = {name: torch.tensor(table.loc[genes, name].to_numpy()) for name in ("tau_low", "tau_high", "identifiable")}
    artifacts.save_model("effendi_final.pt", weights, **facts)
    artifacts.save_model("effendi.pt", dict(
        weights, objective=config.OBJECTIVE, genes=list(genes), gene_emb=torch.from_numpy(gene_emb),
        judged=judged, meaning=facts["meaning"], gene_window=gene_window(),
        peaks_per_gene=config.PEAKS_PER_GENE, positions=positions(data["genes"]), **encoders()), **facts)
    artifacts.save_table("gene_tau_estimates.csv", table, **facts)
    artifacts.save("effendi.h5ad", lambda f: write_h5ad(f, data, out, table, facts["meaning"]), rows=len(data["cells"]),
                   ids=artifacts.hash_ids(data["cells"]), **facts)
    curve = pd.DataFrame(history, index=pd.RangeIndex(1, len(history) + 1, name="row"))
    artifacts.save_table("train_delay_curve.csv", curve, **facts)
    artifacts.remove("gene_tau_hours.csv")                  # of the delays before these


def run():
    if config.OBJECTIVE == "anchored":
        return run_anchored()
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
    out = inference.predict(model, data["z_atac"], data["gene_emb"], device, config.BATCH_SIZE)
    table = tau_table(out["tau"], data)
    facts |= dict(seconds=round(seconds, 1), metrics=history[-1], meaning=MEANINGLESS)
    save_results(model, table, out, data, history, facts, data["genes"].index, data["gene_emb"])
    artifacts.remove("gene_peak_weights.csv")               # of an earlier run with "anchored"
    artifacts.drop_checkpoint(RESUME)
    print(f"train_delay: {len(data['cells'])} cells, {len(table)} genes, tau {table.tau.min():.3f}-"
          f"{table.tau.max():.3f} (ODE time), held-out L {history[0]['total']:.3f} -> {history[-1]['total']:.3f}, "
          f"{seconds:.0f} s -> {config.OUT_DIR}/gene_tau_estimates.csv, effendi.h5ad, effendi.pt")


def main(argv=None):
    config.from_args(__doc__, argv)
    run()


if __name__ == "__main__":
    config.script(main)
