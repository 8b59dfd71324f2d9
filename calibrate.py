"""Delays in hours, from cells with known collection times or from a few genes with known delays.

    tau_hours[g] = scale tau[g]                             tau is relative; one scale per run

Collection times (--time-column). The flow carries a cell's chromatin back in process time, so a state collected
at T, moved for the right ODE time t, looks like a state collected at T' < T:

    u(z)      expected collection time given what the readout sees of z; ridge regression, cross-fitted over cells
    t_k       E[u(phi_t z) | T_k] = E[u(z) | T_(k-1)]                   first t that solves it, linear in between
    scale     exp(level) sum_k (T_k - T_(k-1)) / sum_k t_k              level: log of the member's ODE time at tau = 1

Both sides of the second line are the same score of clouds of the same spread, which is why regression to the
mean in u, however strong, cancels; so does a spread of process time among cells collected together, as long as
it is the same at all times. Nothing is interpolated between collection times unless the path ends before it
has arrived (then the share of the way counts). A time that u does not tell from the one before is passed over.
Into the first collection, before which nothing was seen to happen, every flow slows down; that step is left out
where two others remain.

Known delays (--genes FILE.csv with columns gene, hours).

    log scale = sum_g w_g (log hours_g - log tau_g) / sum_g w_g         w_g = 1 / (sd_g^2 + s^2)
    sd_g from the gene's interval, s^2 the spread between genes beyond that (DerSimonian and Laird 1986)

The interval of an hour holds the gene's own and the scale's, independent on the log scale. The scale's from
collection times: bootstrap over cells, members, unequal pace between collection times, and MODEL_SD, what
remained on simulated time courses.

Reads   gene_tau_estimates.csv; with --time-column: effendi.pt, effendi.h5ad
Writes  gene_tau_hours.csv (gene: tau_hours, low, high, identifiable); scale and its interval in its record
Run     python calibrate.py --time-column time_h
        python calibrate.py --genes known.csv
"""
import math
import time

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from scipy.stats import t as student

import artifacts
import config
import delay_fit
import inference

OUTPUT = "gene_tau_hours.csv"
LEVEL = 0.9                             # of every interval; that of tau in gene_tau_estimates.csv
Z = norm.ppf(0.5 + LEVEL / 2)
FOLDS, RIDGE = 5, 1e-3
DRAWS = 400                             # bootstrap samples of the cells
RESOLVED = 4.0                          # standard errors by which u must tell two collection times apart
MODEL_SD = 0.12                         # of log scale: what the other terms missed on simulated time courses
GENE_SPREAD = 0.3                       # of log hours - log tau between genes, beyond their sd, on simulated data
ARGUMENTS = {
    "--time-column": dict(metavar="NAME", help="column of effendi.h5ad's obs with collection times in hours (time_h)"),
    "--genes": dict(metavar="CSV", help="known delays instead: columns gene, hours"),
}


# --- collection times -------------------------------------------------------------------------------------------

def collection_times(obs, column, where):
    """Hours (N,) and the rows that have them; ValueError for what cannot give a scale."""
    if column not in obs:
        raise ValueError(f"{where} has no obs column {column!r}; it has {', '.join(map(str, obs.columns))}.\n"
                         "  Name the column with collection times in hours: --time-column NAME, or give --genes FILE.")
    hours = pd.to_numeric(obs[column], errors="coerce").to_numpy(float)
    rows = np.flatnonzero(np.isfinite(hours))
    if not len(rows):
        raise ValueError(f"{where}: obs column {column!r} holds no number (first value: {obs[column].iloc[0]!r}).\n"
                         "  It must hold hours, such as 0, 1, 3.")
    if len(np.unique(hours[rows])) < 2:
        raise ValueError(f"{where}: all cells were collected at {hours[rows][0]:g} h; one time point gives no scale.\n"
                         "  Give known delays of a few genes instead: --genes FILE.")
    return hours[rows], rows


def time_score(seen, hours, rng, folds=FOLDS):
    """u: expected collection time of every state of the path, by regressions that have not seen the cell.

        u = mean(hours) + (x - mean x) b,   b = (x'x + RIDGE tr(x'x)/K I)^-1 x' hours

    Shapes  seen (S, N, K) what the readout sees of state s of cell n, hours (N,) -> (S, N)
    """
    x, hours = seen.double(), torch.as_tensor(hours, dtype=torch.float64)
    fold = torch.randperm(x.shape[1], generator=rng) % folds
    u = torch.empty(x.shape[:2], dtype=torch.float64)
    for k in range(folds):
        fit, rest = fold != k, fold == k
        centre, level = x[0, fit].mean(0), hours[fit].mean()
        gram = (x[0, fit] - centre).T @ (x[0, fit] - centre)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        slope = torch.linalg.solve(gram, (x[0, fit] - centre).T @ (hours[fit] - level))
        u[:, rest] = level + (x[:, rest] - centre) @ slope
    return u.numpy()


def crossing_times(moved, at):
    """ODE time after which a later cloud looks like the earlier one, and the share of the way if it never does.

        moved (S, ..., K) mean score of the cells of each collection time after ODE time at (S,)
        t_k: the first t with moved(t, k) = moved(0, k - 1), linear between saved states
    Returns t and share, (..., K - 1) each; share is 1 where the cloud arrives.
    """
    way = (moved[0, ..., 1:] - moved[:, ..., 1:]) / (moved[0, ..., 1:] - moved[0, ..., :-1])
    arrived = way >= 1
    first = np.where(arrived.any(0), arrived.argmax(0), len(at) - 1)
    after = np.take_along_axis(way, first[None], 0)[0]
    before = np.take_along_axis(way, np.maximum(first - 1, 0)[None], 0)[0]
    start, end = at[np.maximum(first - 1, 0)], at[first]
    there = arrived.any(0)
    part = np.where(there, (1 - before) / np.where(there, after - before, 1), 1)
    return start + part * (end - start), np.where(there, 1.0, after)


def member_pace(u, hours, at, rng, draws=DRAWS):
    """Hours per ODE unit of one flow from the scores u (S, N) of its path.

    Returns {"pace" (), "draws" (draws,), "steps" (pairs,), "pairs"}; steps are the paces between the neighbouring
    collection times that were used, pairs.
    """
    times, label = np.unique(hours, return_inverse=True)
    n = np.bincount(label)
    if n.min() < 10:
        raise ValueError(f"only {n.min()} cells were collected at {times[n.argmin()]:g} h; a time point needs 10.\n"
                         "  Leave it out (an empty field in the column), or join it with its neighbour.")
    mean = np.stack([u[:, label == k].mean(1) for k in range(len(times))], -1)                # (S, K)
    error = np.array([u[0, label == k].std() for k in range(len(times))]) / np.sqrt(n)
    keep = [0]                          # a time point that u does not tell from the one before is passed over
    for k in range(1, len(times)):
        if mean[0, k] - mean[0, keep[-1]] > RESOLVED * math.hypot(error[k], error[keep[-1]]):
            keep.append(k)
    if len(keep) < 2:
        raise ValueError("the chromatin of cells collected at different times does not differ in any direction that "
                         "the model sees, so that nothing ties ODE time to hours.\n"
                         "  Give known delays of a few genes instead: --genes FILE.")
    draw = [u[:, label == k] @ rng.multinomial(n[k], np.full(n[k], 1 / n[k]), size=draws).T / n[k] for k in keep]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.concatenate([mean[:, None, keep], np.stack(draw, -1)], 1)                    # (S, 1 + draws, K)
        t, share = crossing_times(means, np.asarray(at))
        used = slice(1 if len(keep) > 3 else 0, None)
        gone = (share * np.diff(times[keep]))[:, used]                            # hours, (1 + draws, pairs)
        pace = gone.sum(-1) / t[:, used].sum(-1)
    return dict(pace=pace[0], draws=pace[1:], steps=gone[0] / t[0, used],
                pairs=[(times[a], times[b]) for a, b in zip(keep, keep[1:])][used])


@torch.no_grad()
def scale_from_times(model, z_atac, hours, seed):
    """log scale, its sd, and what it was made of, from an AnchoredEffendi and cells z_atac (N, 256), hours (N,)."""
    if not isinstance(model, inference.AnchoredEffendi):
        raise ValueError("effendi.pt was trained under OBJECTIVE specification, whose delays have no time scale.\n"
                         "  Train the default: python run.py --set OBJECTIVE=anchored")
    seen = []
    for member in model.members:
        path = delay_fit.path(member.field.net, member.align(torch.as_tensor(z_atac)))
        level = (member.log_tau - model.tau_predictor.log_tau).mean()
        seen.append((member.readout.hidden(path), float(level)))
    return scale_from_paths(seen, hours, seed)


def scale_from_paths(seen, hours, seed):
    """The same from [(what the readout sees along a member's path (S, N, K), its level)]."""
    rng, cuts = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    members = []
    for states, level in seen:
        found = member_pace(time_score(states, hours, cuts), hours, delay_fit.TIMES, rng)
        low = np.quantile(found["draws"], 1 - LEVEL)
        if not low > 0:
            raise ValueError("the flow does not carry cells back along their collection times "
                             f"({found['pace']:.3g} hours per ODE unit, {LEVEL:.0%} above {low:.3g}): tau cannot be "
                             "put into hours on these data.\n"
                             "  Give known delays of a few genes instead: --genes FILE.")
        members.append(dict(found, level=level))
    return combine(members)


def combine(members):
    """Mean over members of log pace + level, and its sd.

        sd^2 = bootstrap / M + between members / M + between steps / steps + MODEL_SD^2
    """
    M = len(members)
    logs = np.array([math.log(m["pace"]) + m["level"] for m in members])
    cells = np.mean([np.log(np.clip(m["draws"], 1e-3 * m["pace"], None)).std() ** 2 for m in members]) / M
    between = logs.var(ddof=1) / M if M > 1 else 0.0
    uneven = [np.log(np.clip(m["steps"], 0.1 * m["pace"], 10 * m["pace"])) for m in members]
    uneven = np.mean([s.var(ddof=1) / len(s) if len(s) > 1 else 0.0 for s in uneven])
    parts = dict(cells=math.sqrt(cells), members=math.sqrt(between), uneven_pace=math.sqrt(uneven), model=MODEL_SD)
    sd = math.sqrt(cells + between + uneven + MODEL_SD**2)
    return logs.mean(), sd, dict(sd_parts=parts, hours_per_ode_unit=[float(m["pace"]) for m in members], steps=[
        {f"{a:g}-{b:g} h": float(s) for (a, b), s in zip(m["pairs"], m["steps"])} for m in members])


# --- known delays -----------------------------------------------------------------------------------------------

def known_delays(file, table):
    """log hours - log tau and the sd of log tau, of the genes of the file that have an interval: two arrays, names."""
    known = pd.read_csv(file, dtype={"gene": str}, keep_default_na=False, na_values=[""])
    if not {"gene", "hours"} <= set(known):
        raise ValueError(f"{file} has the columns {', '.join(map(str, known.columns))}; it needs gene and hours.")
    bad = known[~(pd.to_numeric(known["hours"], errors="coerce") > 0)]
    if len(bad):
        raise ValueError(f"{file}: the delay of {bad['gene'].iloc[0]} is {bad['hours'].iloc[0]!r}.\n"
                         "  Delays are hours above 0.")
    if known["gene"].duplicated().any():
        raise ValueError(f"{file} names {known['gene'][known['gene'].duplicated()].iloc[0]} twice.\n"
                         "  Give one delay a gene.")
    hours = known.set_index("gene")["hours"].astype(float)
    found = hours.index.intersection(table.index[table["tau_low"].notna()])
    if not len(found):
        raise ValueError(f"none of the {len(hours)} genes of {file} (first: {hours.index[0]}) has a delay of its own "
                         f"in gene_tau_estimates.csv ({len(table)} genes, first: {table.index[0]}).\n"
                         "  Genes are matched by name, as in the RNA file.")
    if len(found) < len(hours):
        print(f"calibrate: {len(hours) - len(found)} of {len(hours)} known genes have no delay of their own here and "
              f"are left out ({', '.join(hours.index.difference(found)[:5])})")
    rows = table.loc[found]
    return (np.log(hours[found] / rows["tau"]).to_numpy(),
            (np.log(rows["tau_high"] / rows["tau_low"]) / (2 * Z)).to_numpy(), list(found))


def scale_from_genes(gap, sd):
    """log scale, its sd and the spread between genes, from gap = log hours - log tau and its sd, (G,) each.

        s^2 = max(0, (Q - (G - 1)) / (sum w - sum w^2 / sum w)),   Q = sum w (gap - mean)^2,   w = 1 / sd^2
    The sd of few genes is widened as far as Student's t with G - 1 degrees of freedom asks for; one gene cannot
    show a spread, and gets GENE_SPREAD.
    """
    gap, variance, G = np.asarray(gap, float), np.square(np.asarray(sd, float)).clip(1e-12), len(gap)
    w, spread = 1 / variance, GENE_SPREAD**2 if G == 1 else 0.0
    if G > 1:
        Q = (w * (gap - np.average(gap, weights=w)) ** 2).sum()
        spread = max(0.0, (Q - (G - 1)) / (w.sum() - (w**2).sum() / w.sum()))
    w = 1 / (variance + spread)
    wider = student.ppf(0.5 + LEVEL / 2, G - 1) / Z if G > 1 and spread > 0 else 1.0
    return np.average(gap, weights=w), wider / math.sqrt(w.sum()), math.sqrt(spread)


# --- hours --------------------------------------------------------------------------------------------------------

def in_hours(table, log_scale, sd):
    """gene_tau_hours.csv: distances from tau to its bounds and from the scale to its own add as squares, in log.

        log low = log tau + log scale - sqrt((log tau - log tau_low)^2 + (Z sd)^2)          high likewise
    """
    log_tau, half = np.log(table["tau"]), Z * sd
    centre = log_tau + log_scale
    return pd.DataFrame(dict(
        tau_hours=np.exp(centre),
        low=np.exp(centre - np.hypot(log_tau - np.log(table["tau_low"]), half)),
        high=np.exp(centre + np.hypot(np.log(table["tau_high"]) - log_tau, half)),
        identifiable=table["identifiable"].astype(bool)), index=table.index)


def run(column="time_h", genes=None):
    inputs = ("gene_tau_estimates.csv",) if genes else ("gene_tau_estimates.csv", "effendi.pt", "effendi.h5ad")
    key = artifacts.stage_key("calibrate", {name: artifacts.existing(name) for name in inputs} | {"known": genes},
                              {"column": None if genes else column})
    if artifacts.is_done(key, OUTPUT):
        return print("calibrate: up to date")
    start = time.time()
    table = artifacts.load_table("gene_tau_estimates.csv")
    if genes:
        gap, gene_sd, names = known_delays(genes, table)
        log_scale, sd, spread = scale_from_genes(gap, gene_sd)
        made_of, source = dict(genes=names, spread_between_genes=spread), f"{len(names)} known genes"
    else:
        import anndata
        cells = anndata.read_h5ad(artifacts.path("effendi.h5ad"))
        hours, rows = collection_times(cells.obs, column, artifacts.path("effendi.h5ad"))
        model, _ = inference.load_effendi(artifacts.path("effendi.pt"))
        z_atac = np.asarray(cells.obsm["z_atac"], np.float32)[rows]
        log_scale, sd, made_of = scale_from_times(model, z_atac, hours, config.SEED)
        source = f"{len(rows)} cells collected at {len(np.unique(hours))} times"
    is_open = bool(artifacts.record("gene_tau_estimates.csv")["metrics"].get("gate_open", False))
    result = in_hours(table, log_scale, sd)
    if not is_open:
        result["identifiable"] = False
    scale, low, high = np.exp(log_scale + Z * sd * np.array([0, -1, 1]))
    metrics = dict(scale=scale, low=low, high=high, log_sd=sd, gate_open=is_open, **made_of)
    artifacts.save_table(OUTPUT, result, stage="calibrate", key=key, source=source, metrics=metrics,
                         seconds=round(time.time() - start, 1))
    warning = "" if is_open else "; the run's gate is closed: tau means nothing on these data, and neither do hours"
    print(f"calibrate: {scale:.3g} hours per unit of tau [{low:.3g}, {high:.3g}] from {source}{warning} "
          f"-> {config.OUT_DIR}/{OUTPUT}")


def main(argv=None):
    args = config.from_args(__doc__, argv, ARGUMENTS)
    if args.time_column and args.genes:
        raise ValueError("--time-column and --genes are two ways to one scale: give either.")
    run(args.time_column or "time_h", args.genes)


if __name__ == "__main__":
    config.script(main)
