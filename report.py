"""report.html: what was run, the delays, the pictures, and every check with its verdict. One file, no network.

Reads   gene_tau_estimates.csv, gene_peak_weights.csv, validation.json, the curves, effendi.h5ad, records, TRUTH_FILE
Writes  report.html, report_tau.png (and report_recovery.png where the planted delays are known)
Run     python report.py --truth effendi_output/simulated/truth.csv
"""
import base64
import html
import io
import json
import time

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

import artifacts
import config
import simulate

INPUTS = ("gene_tau_estimates.csv", "validation.json", "train_vf_curve.csv", "train_delay_curve.csv", "effendi.h5ad")
BLUE, ORANGE, GREY = "#2b6ca3", "#d2691e", "#8a8a8a"
CURVE_LABELS = {"held_out_nll": "held-out accessibility:\n-log likelihood (nats an entry)",
                "gain_over_v0": "held-out RNA:\ngain over v = 0 (nats a cell)"}
KERNELS = {"exp": "exp: first-order lag", "shift": "shift: pure delay", "gamma": "gamma: lag in three steps"}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:3px 10px;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}.pass{color:#1a7f37}.fail{color:#b3261e;font-weight:600}
.verdict{border-left:5px solid;padding:.6em 1em;background:#f6f6f6}img{max-width:100%}"""


# --- pictures --------------------------------------------------------------------------------------------------

def new_figure(columns, height=3.6):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, columns, figsize=(4.6 * columns, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def png(figure):
    import matplotlib.pyplot as plt
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()


def tau_picture(table):
    """Distribution of tau over genes, and its spread over cells against its size."""
    figure, (left, right) = new_figure(2)
    sure = table["identifiable"].astype(bool)
    left.hist([table["tau"][sure], table["tau"][~sure]], bins=40, stacked=True, color=[BLUE, GREY],
              label=["identifiable", "not identifiable"])
    left.set(xlabel="delay τ_g (ODE time)", ylabel="genes", title=f"{len(table)} genes, {sure.sum()} identifiable")
    left.legend(frameon=False, fontsize=8)
    for some, colour in ((~sure, GREY), (sure, BLUE)):
        right.scatter(table["tau"][some], table["cell_sd"][some], s=8, color=colour, alpha=0.6, linewidths=0)
    right.set(xlabel="delay τ_g (ODE time)", ylabel="sd of τ over cells (ODE time)",
              title="between genes and between cells")
    return png(figure)


def peaks_picture(table):
    """What peaks count for, by how well that is known and by where they lie."""
    known = table[(table["peak"] != "others") & (table["sd"] > 0)]
    figure, (left, right) = new_figure(2)
    left.scatter(known["weight"], known["sd"], s=8, color=BLUE, alpha=0.5, linewidths=0)
    left.set(xlabel="weight of a peak (1 = as open, 0 = not followed)", ylabel="posterior sd of the weight",
             yscale="log", title=f"{len(known)} peaks of {known.index.nunique()} genes")
    sure = known[known["sd"] < known["sd"].quantile(0.25)]
    right.axhline(1, color=GREY, lw=0.8)
    right.scatter(sure["tss_distance"] / 1000, sure["weight"], s=8, color=BLUE, alpha=0.6, linewidths=0)
    right.set(xlabel="distance from the TSS along the strand (kb)", ylabel="weight of a peak",
              title=f"the {len(sure)} best-known weights")
    return png(figure)


def recovery_picture(table, truth):
    """Estimated against planted delay, genes whose accessibility changes and genes that carry no signal apart."""
    both = table.join(truth, how="inner", rsuffix="_true")
    signal = (both["changes"] & both["has_link"]).astype(bool)
    figure, (axis,) = new_figure(1, 4.4)
    if "tau_low" in both and both["tau_low"].notna().any():
        shown = both[signal]
        spread = [shown["tau"] - shown["tau_low"], shown["tau_high"] - shown["tau"]]
        axis.errorbar(shown["tau_true"], shown["tau"], yerr=spread, fmt="none", ecolor=GREY, alpha=0.25, lw=0.8,
                      label="90 % interval")
    for some, colour, label in ((~signal, GREY, "no signal planted"), (signal, BLUE, "accessibility changes")):
        axis.scatter(both["tau_true"][some], both["tau"][some], s=11, color=colour, label=label, linewidths=0)
    rho = spearmanr(both["tau"][signal], both["tau_true"][signal]).statistic
    axis.set(xscale="log", yscale="log", xlabel="planted delay (time units of the simulation)",
             ylabel="estimated delay τ_g (ODE time)", title=f"Spearman {rho:.2f} over {int(signal.sum())} genes")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_formatter("{x:g}")
        which.set_minor_formatter("")
    axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 5])
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5])
    axis.set_xlim(both["tau_true"].min() * 0.9, both["tau_true"].max() * 1.1)
    axis.legend(frameon=False, loc="best", fontsize=8)
    return png(figure)


def curve_picture(stage1, stage2):
    """Held-out values along training: per member (anchored), or per term with a line where Stage 2.2 begins."""
    figure, (left, right) = new_figure(2)
    for axis, curve, title in ((left, stage1, "Stage 1"), (right, stage2, "Stage 2")):
        axis.set(title=title)
        if "member" in curve:
            along, value = curve.columns[1:3]
            for member, part in curve.groupby("member"):
                axis.plot(part[along], part[value], label=f"fit {member}", lw=1.4)
            axis.set(xlabel=along, ylabel=CURVE_LABELS[value])
        else:
            epochs = np.arange(1, len(curve) + 1)
            for name in curve.select_dtypes("number"):
                axis.plot(epochs, curve[name], label=name, lw=1.4)
            axis.set(xlabel="epoch", ylabel="held-out value (see label)", yscale="symlog")
        axis.legend(frameon=False, fontsize=7)
    return png(figure)


def cells_picture(cells):
    """Where the flow carries the cells: z_A and phi_tau(z_A) on the two leading axes of z_A."""
    z, moved = np.asarray(cells.obsm["z_A"]), np.asarray(cells.obsm["phi_tau_z_A"])
    some = np.random.default_rng(0).permutation(len(z))[:800]
    centre = z[some].mean(0)
    axes = np.linalg.svd(z[some] - centre, full_matrices=False)[2][:2].T
    start, end = (z[some] - centre) @ axes, (moved[some] - centre) @ axes
    figure, (axis,) = new_figure(1, 4.2)
    axis.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, width=0.002, color=GREY, alpha=0.5)
    axis.scatter(*start.T, s=5, color=BLUE, label="z_A (ATAC)", linewidths=0)
    axis.scatter(*end.T, s=5, color=ORANGE, label="φ_τ̄(z_A)", linewidths=0)
    axis.set(xlabel="axis 1 of z_A (latent units)", ylabel="axis 2 of z_A (latent units)", title=f"{len(some)} cells")
    axis.legend(frameon=False, fontsize=8)
    return png(figure)


# --- the page ----------------------------------------------------------------------------------------------------

def image(data, text):
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'


def checks_html(checks):
    rows = []
    for c in checks:
        value = "" if c["value"] is None else f"{c['value']:.3g}"
        control = "; ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in c["control"].items())
        kind = c["verdict"].split(":")[0]
        rows.append(f"<tr><td>{c['layer']}</td><td>{html.escape(c['check'])}</td><td class=n>{value}</td>"
                    f"<td>{html.escape(c['threshold'] or '')}</td><td class=n>{c['n'] or ''}</td><td>{control}</td>"
                    f'<td class="{kind}">{html.escape(c["verdict"])}</td><td>{html.escape(c["note"])}</td></tr>')
    return ("<table><tr><th>layer<th>check<th>value<th>threshold<th>n<th>controls<th>verdict<th>note</tr>"
            + "".join(rows) + "</table>")


def table_html(table, n=12):
    """The shortest and the longest delays of those that can be told; of all where none can."""
    sure = table[table["identifiable"].astype(bool)]
    table = sure if len(sure) else table
    shown = pd.concat([table.head(n), table.tail(n)]) if len(table) > 2 * n else table
    return shown.to_html(float_format=lambda v: f"{v:.3f}", border=0, na_rep="")


def page(table, checks, pictures, facts, closed=False):
    """The report. closed: the gate is, or there is none (specification), so that no table of delays is shown."""
    counts = pd.Series([c["verdict"].split(":")[0] for c in checks]).value_counts()
    meaning = facts.pop("meaning")
    about = ("τ is in ODE time, not hours; the shortest and the longest of the identifiable genes are shown (of all "
             "genes where none is identifiable), all are in gene_tau_estimates.csv.")
    if closed:
        about = ("As said above, τ means nothing here: any data give pictures and values like these. Nothing can be "
                 "read from them about the genes.")
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>Effendi report</title><style>{STYLE}</style>
<h1>Effendi report</h1>
<p class=verdict>{html.escape(meaning)}</p>
<table>{''.join(f'<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>' for k, v in facts.items())}</table>
<h2>Delays</h2><p{' class=verdict' if closed else ''}>{about}</p>
{''.join(image(data, text) for text, data in pictures.items())}
{'' if closed else table_html(table)}
<h2>Checks</h2><p>{', '.join(f'{n} {v}' for v, n in counts.items())}. A check that did not run is not a pass.</p>
{checks_html(checks)}</html>"""


def kernel_fact(training):
    """The kernel of delays, and who chose it; the specification has none."""
    if "kernel" not in training["metrics"]:
        return {}
    how = "held-out cells decide" if training["config"]["KERNEL"] is None else "as set"
    return {"kernel": f"{KERNELS[training['metrics']['kernel']]}, {how}"}


def run():
    inputs = {name: artifacts.existing(name) for name in INPUTS} | {"truth": config.TRUTH_FILE}
    key = artifacts.stage_key("report", inputs, {"trained": artifacts.record("gene_tau_estimates.csv")["key"]})
    pngs = ["report_tau.png", *(["report_recovery.png"] if config.TRUTH_FILE else [])]
    if artifacts.is_done(key, "report.html", *pngs):
        print("report: up to date")
        return
    import anndata
    start = time.time()
    table, stage1, stage2 = (artifacts.load_table(name) for name in (INPUTS[0], INPUTS[2], INPUTS[3]))
    checks = json.loads(artifacts.path("validation.json").read_text())
    cells = anndata.read_h5ad(artifacts.path("effendi.h5ad"))
    pictures = {"distribution of delays": tau_picture(table)}
    artifacts.save("report_tau.png", lambda f: f.write(pictures["distribution of delays"]), stage="report", key=key)
    if config.TRUTH_FILE:
        recovery = recovery_picture(table, simulate.read_truth(config.TRUTH_FILE))
        pictures = {"estimated against planted delay": recovery, **pictures}
        artifacts.save("report_recovery.png", lambda f: f.write(recovery), stage="report", key=key)
    else:
        artifacts.remove("report_recovery.png")             # of other data
    if artifacts.path("gene_peak_weights.csv").exists():
        weights = artifacts.load_table("gene_peak_weights.csv")
        if (weights["sd"] > 0).any():
            pictures["what the peaks of genes count for"] = peaks_picture(weights)
    pictures |= {"cells before and after the flow": cells_picture(cells),
                 "learning curves": curve_picture(stage1, stage2)}
    training = artifacts.record("gene_tau_estimates.csv")
    facts = {"meaning": training["meaning"], "cells": cells.n_obs, "genes": len(table),
             "RNA embedding": artifacts.record("effendi_rna_emb.npy")["encoder"],
             "ATAC embedding": artifacts.record("effendi_atac_emb.npy")["encoder"],
             "objective": training["config"]["OBJECTIVE"],
             **kernel_fact(training),
             "seed": config.SEED,
             "training": f"{training['seconds']:.0f} s",
             "versions": f"Python {training['python']}, torch {training['torch']}"}
    closed = not training["metrics"].get("gate_open", False)
    artifacts.save_text("report.html", page(table, checks, pictures, facts, closed), stage="report", key=key,
                        seconds=round(time.time() - start, 1))
    print(f"report: {len(pictures)} pictures, {len(checks)} checks -> {config.OUT_DIR}/report.html")


def main(argv=None):
    config.from_args(__doc__, argv, {"--truth": dict(dest="TRUTH_FILE", metavar="CSV", help="planted delays")})
    run()


if __name__ == "__main__":
    config.script(main)
