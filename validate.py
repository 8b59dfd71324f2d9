"""Validation in five layers; every check with its value, threshold, n, a control, and a verdict.

    layer 1   model health: Lipschitz bound, reversibility, finite outputs, distribution of tau, reconstruction
    truth     recovery of planted delays, where the data are simulated (TRUTH_FILE)
    layer 2-5 immediate-early genes, xQTL, perturbation, age and time series: they need data of their own

A verdict is "pass", "fail", "report" (no threshold) or "not run: why"; a check that did not run never passes.
Controls are the same number from shuffled labels, and from an untrained model (specification) or from one whose
state does not move, v = 0 (anchored: without training it has no readout at all).

Reads   effendi.pt, effendi.h5ad, gene_tau_estimates.csv, train_delay_curve.csv, TRUTH_FILE
Writes  validation.json
Run     python validate.py --truth effendi_output/simulated/truth.csv
"""
import copy
import json
import time

import numpy as np
import pandas as pd
import torch
from scipy.stats import shapiro, skew, spearmanr

import artifacts
import config
import inference
import simulate
from anchored import LEAST_AGREEMENT, LEAST_PAIRING, LEAST_Z

INPUTS = ("effendi.pt", "effendi.h5ad", "gene_tau_estimates.csv", "train_delay_curve.csv")
LIPSCHITZ_SLACK = 1e-4          # float32 rounding of three spectral norms
LATER_LAYERS = {
    "2 immediate-early against priming genes": "needs PBMC genes; follows with layer 2",
    "3 xQTL natural experiments": "needs CIMA_caQTL_eQTL_SMR.csv and CIMA_Lead_cis-xQTL.csv",
    "4 perturbation": "needs Perturb-seq tables",
    "5 age, eRegulons, time series, epigenomes": "needs CIMA GRN tables and external data",
}


@torch.no_grad()
def check_model_health(model, z_test, gene_emb=None, tau=1.0, n_steps=200):
    """Layer 1 of the model itself, from states z_test (B, D); the specification's flags and the values behind them.

    rev_err is the mean over cells of |z - phi_(-tau)(phi_tau(z))|, in latent units: the solver's step error.
    """
    bound = model.field.lipschitz_bound()
    moved = model.field.flow(z_test, tau, n_steps)
    back = model.field.flow(moved, -tau, n_steps)
    rev_err = (back - z_test).norm(dim=1).mean().item()
    reverse_loss = (back - z_test).square().mean().item()
    _, exploded = inference.reverse_ode(model, z_test, tau, n_steps, config.EXPLODE_NORM)
    outputs = [moved, back]
    if gene_emb is not None:
        outputs += [v for v in model.from_latent(z_test, gene_emb).values() if torch.is_tensor(v)]
    return dict(lipschitz=bound, lip_in_range=bound <= 1 + LIPSCHITZ_SLACK,
                rev_err=rev_err, rev_err_acceptable=rev_err < 0.01, reverse_loss=reverse_loss,
                explosion_rate=exploded.float().mean().item(),
                numerically_stable=all(torch.isfinite(v).all().item() for v in outputs))


def check(layer, name, value, threshold, passed, n, note="", **control):
    """One row of validation.json. passed None = reported without a threshold."""
    verdict = "report" if passed is None else "pass" if passed else "fail"
    if value is not None and not np.isfinite(value):
        value, verdict = None, "not run: no finite value"
    return dict(layer=layer, check=name, value=value, threshold=threshold, n=n, verdict=verdict, note=note,
                control=control)


def health_checks(model, cells, gene_emb, curve):
    z_test = torch.from_numpy(np.asarray(cells.obsm["z_A"][:1000], dtype=np.float32))
    tau_gene = np.asarray(cells.layers["tau"]).mean(0)
    health = check_model_health(model, z_test, gene_emb, float(np.median(tau_gene)), config.N_STEPS)
    n = len(z_test)
    last = curve.iloc[-1]
    normal = shapiro(tau_gene[:5000]).pvalue
    return [
        check("1", "Lipschitz bound of v", health["lipschitz"], "<= 1.0 (+1e-4 round-off)", health["lip_in_range"], 3,
              "product of the layers' largest singular values"),
        check("1", "reversibility error", health["rev_err"], "< 0.01", health["rev_err_acceptable"], n,
              f"mean |z - back(forth(z))| over {config.N_STEPS} Euler steps; speaks of the solver, not of biology"),
        check("1", "L_reverse", health["reverse_loss"], "< 0.1", health["reverse_loss"] < 0.1, n),
        check("1", "reverse ODE explosions", health["explosion_rate"], "< 0.10", health["explosion_rate"] < 0.1, n),
        check("1", "finite outputs", float(health["numerically_stable"]), "all", health["numerically_stable"], n),
        check("1", "tau not collapsed", float(tau_gene.max() / max(tau_gene.min(), 1e-12)), "> 1.01, finite",
              bool(np.isfinite(tau_gene).all() and tau_gene.max() > 1.01 * tau_gene.min()), len(tau_gene),
              "largest gene's tau over the smallest gene's"),
        check("1", "skew of tau", float(skew(tau_gene)), "report", None, len(tau_gene),
              f"Shapiro-Wilk p = {normal:.2g}; the specification expects a right skew"),
    ] + ([check("1", "L_ode, held-out cells", float(last["ode"]), "< 0.1", last["ode"] < 0.1,
                int(cells.obs["checked"].sum()))] if "ode" in curve else [])


def reconstruction_checks(model, control, cells, gene_emb, control_name):
    """Is predicted expression ordered like the measured one, in the checked cells? Over all entries, and per gene.

    Under OBJECTIVE specification these cells are held out; the anchored model's last E-step has seen them.
    """
    sample = "held-out cells" if control_name == "untrained" else "in-sample cells"
    held = cells[cells.obs["checked"].to_numpy(bool)]
    counts, depth = held.X.tocsr(), held.obs["n_counts"].to_numpy(np.float32)
    observed = counts.toarray() / np.maximum(depth, 1)[:, None]
    y_hat = np.asarray(held.layers["y_hat"])
    shuffled = y_hat[np.random.default_rng(config.SEED).permutation(held.n_obs)]
    y_control = inference.predict(control, np.asarray(held.obsm["z_atac"]), gene_emb, "cpu")["y_hat"]
    overall = [spearmanr(y.ravel(), observed.ravel()).statistic for y in (y_hat, y_control, shuffled)]
    per_gene = [_median(inference.gene_spearman(y, counts, depth)) for y in (y_hat, y_control, shuffled)]
    return [
        check("1", "reconstruction, all entries", overall[0], "Spearman > 0.5", overall[0] > 0.5, int(observed.size),
              f"{sample}; mostly which genes are high: compare with shuffled cells",
              **{control_name: overall[1], "shuffled_cells": overall[2]}),
        check("1", "reconstruction, per gene over cells", per_gene[0], "report (median Spearman)", None,
              held.n_vars, f"{sample}; what the model knows about differences between cells",
              **{control_name: per_gene[1], "shuffled_cells": per_gene[2]}),
    ]


def _median(values):
    return np.nanmedian(values) if np.isfinite(values).any() else np.nan


def control_model(model, objective):
    """(model, name) of the control: untrained weights, or the same model read where its path begins."""
    if objective == "specification":
        torch.manual_seed(config.SEED)
        return type(model)(**model.args).eval(), "untrained"
    still = copy.deepcopy(model)
    for member in still.members:
        member.log_tau.fill_(-20.0)                         # e^-20 of a time unit: the state has not moved
    return still, "v = 0"


def gate_checks(training):
    """What train_delay.py found out about the run as a whole (anchored only)."""
    found = training["metrics"]
    if "gate_open" not in found:
        return []
    if not {"pairing_z", "differ_z"} <= set(found):
        raise ValueError(f"{artifacts.path('gene_tau_estimates.csv')} was made by an earlier version, without one of "
                         "the gate's tests.\n  Make it again: python train_delay.py")
    n, genes, least = training["cells"], training["genes"], f"> {LEAST_Z:.0f} standard errors"
    return [
        check("1", "gate: RNA fits its own cell's ATAC", found["pairing_z"], f"> {LEAST_PAIRING:.0f} standard errors",
              found["pairing_z"] > LEAST_PAIRING, n, "before any fit to RNA"),
        check("1", "gate: moving beats v = 0", found["gain_z"], least, found["gain_z"] > LEAST_Z,
              found.get("held_out_cells"), "RNA of held-out cells"),
        check("1", "gate: delays that differ beat one for all", found["differ_z"], least, found["differ_z"] > LEAST_Z,
              found.get("held_out_cells"), "RNA of held-out cells"),
        check("1", "gate: own chromatin beats another's", found["own_z"], least, found["own_z"] > LEAST_Z, genes,
              "all cells, v = 0"),
        check("1", "gate: halves of the cells agree", found["split_half"], f"Spearman > {LEAST_AGREEMENT}",
              found["split_half"] > LEAST_AGREEMENT, genes,
              "gate open: tau is meaningful" if found["gate_open"] else "gate CLOSED: tau means nothing on these data"),
    ]


def truth_checks(table, truth, untrained_tau):
    """Spearman of tau with the planted delay, over genes whose accessibility changes and that have a link."""
    both = table.join(truth, how="inner", rsuffix="_true")
    both = both[both["changes"].astype(bool) & both["has_link"].astype(bool)]
    if len(both) < 3:
        return [dict(check("truth", "recovery of planted delays", None, "report", None, len(both)),
                     verdict="not run: fewer than 3 genes in common with the truth")]
    control = {"shuffled_genes": spearmanr(np.random.default_rng(config.SEED).permutation(both["tau"]),
                                           both["tau_true"]).statistic}
    if untrained_tau is not None:
        control["untrained"] = spearmanr(untrained_tau.reindex(both.index), both["tau_true"]).statistic
    rows = [check("truth", "recovery of planted delays", spearmanr(both["tau"], both["tau_true"]).statistic,
                  "report (Spearman)", None, len(both), "genes whose accessibility changes", **control)]
    sure = both[both["identifiable"].astype(bool)]
    if len(sure) > 2:
        rho = spearmanr(sure["tau"], sure["tau_true"]).statistic
        rows.append(check("truth", "recovery, genes called identifiable", rho, "report (Spearman)", None, len(sure)))
    if both["tau_low"].notna().all():
        # Only ratios are determined: the planted delays are first brought to the estimates' mean log.
        level = (np.log(both["tau"]) - np.log(both["tau_true"])).mean()
        scaled = both["tau_true"] * np.exp(level)
        inside = ((both["tau_low"] <= scaled) & (scaled <= both["tau_high"])).mean()
        luck = 2 * np.sqrt(0.9 * 0.1 / len(both))               # two standard errors of a share of so many genes
        rows.append(check("truth", "90 % intervals cover", inside, f"0.85 - 0.95 (+-{luck:.2f} by luck)",
                          bool(0.85 - luck <= inside <= 0.95 + luck), len(both)))
    return rows


def run():
    inputs = {name: artifacts.existing(name) for name in INPUTS} | {"truth": config.TRUTH_FILE}
    trained = artifacts.record("gene_tau_estimates.csv")["key"]             # its record holds the gate's numbers
    key = artifacts.stage_key("validate", inputs, dict(
        trained=trained, explode_norm=config.EXPLODE_NORM, n_steps=config.N_STEPS))
    if artifacts.is_done(key, "validation.json"):
        print("validate: up to date")
        return json.loads(artifacts.path("validation.json").read_text())
    import anndata
    start = time.time()
    model, saved = inference.load_effendi(artifacts.path("effendi.pt"))
    control, control_name = control_model(model, saved["objective"])
    everything = anndata.read_h5ad(artifacts.path("effendi.h5ad"))
    cells = everything[:, saved["genes"]].copy()            # the genes the model itself was fitted to
    table, curve = artifacts.load_table("gene_tau_estimates.csv"), artifacts.load_table("train_delay_curve.csv")
    gene_emb = saved["gene_emb"]
    checks = gate_checks(artifacts.record("gene_tau_estimates.csv"))
    checks += health_checks(model, cells, gene_emb, curve)
    checks += reconstruction_checks(model, control, cells, gene_emb, control_name)
    if config.TRUTH_FILE:
        untrained_tau = None
        if control_name == "untrained":
            out = inference.predict(control, np.asarray(cells.obsm["z_atac"][:1000]), gene_emb, "cpu")
            untrained_tau = pd.Series(out["tau"].mean(0), index=saved["genes"])
        checks += truth_checks(table, simulate.read_truth(config.TRUTH_FILE), untrained_tau)
    checks += [dict(layer=name[0], check=name[2:], value=None, threshold=None, n=0, verdict=f"not run: {why}", note="",
                    control={}) for name, why in LATER_LAYERS.items()]
    artifacts.save_text("validation.json", json.dumps(checks, indent=1, default=float), stage="validate", key=key,
                        seconds=round(time.time() - start, 1))
    counted = pd.Series([c["verdict"].split(":")[0] for c in checks]).value_counts()
    print_table(checks)
    print("validate: " + ", ".join(f"{n} {verdict}" for verdict, n in counted.items())
          + f" -> {config.OUT_DIR}/validation.json")
    return checks


def print_table(checks):
    for c in checks:
        value = "-" if c["value"] is None else f"{c['value']:.3g}"
        control = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in c["control"].items())
        print(f"  {c['layer']:<6}{c['check']:<42}{value:>10}  {c['threshold'] or '':<32}{c['verdict']}"
              + (f"   [{control}]" if control else ""))


def main(argv=None):
    config.from_args(__doc__, argv, {"--truth": dict(dest="TRUTH_FILE", metavar="CSV", help="planted delays")})
    run()


if __name__ == "__main__":
    config.script(main)
