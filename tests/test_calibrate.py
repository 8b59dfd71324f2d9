import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import artifacts
import calibrate
import chromatin
import inference
from effendi import AnchoredEffendi

DIM = 16


class Still(nn.Module):
    """Reads latent states as they are."""

    def forward(self, x):
        return x


def clock(speed, level=0.0, n_genes=6, members=1):
    """An AnchoredEffendi whose flow moves every state by -speed along the first latent axis, level as its gauge."""
    model = AnchoredEffendi(chromatin.LATENT, DIM, n_genes, "exp", members, n_landmarks=0).eval()
    for member in model.members:
        member.align = Still()
        member.readout.hidden = lambda z: z
        direction = torch.zeros(chromatin.LATENT)
        direction[0] = -speed
        member.field.net = Constant(direction)
        member.log_tau = torch.full((n_genes,), level)
    return model


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z):
        return self.value.expand_as(z)


def course(hours_per_unit=2.0, times=(0, 1, 3, 6), cells=400, spread=0.3, seed=0):
    """Cells whose first latent axis is process time hours / hours_per_unit + noise: (z (N, 8), hours (N,))."""
    rng = np.random.default_rng(seed)
    hours = np.repeat(np.array(times, float), cells)
    z = 0.1 * rng.standard_normal((len(hours), chromatin.LATENT))
    z[:, 0] = hours / hours_per_unit + spread * rng.standard_normal(len(hours))
    return z.astype(np.float32), hours


# --- collection times -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("speed", [0.5, 1.0])
@pytest.mark.parametrize("hours_per_unit", [0.5, 2.0])
def test_a_clock_with_known_speed_gives_its_hours(speed, hours_per_unit):
    times = tuple(hours_per_unit * t for t in (0, 1, 2, 3))
    z, hours = course(hours_per_unit, times)
    log_scale, _, _ = calibrate.scale_from_times(clock(speed), z, hours, seed=0)
    # Cloud means have standard error 0.3 / sqrt(400) = 0.015 of steps of 1; two enter, over two steps.
    assert math.exp(log_scale) == pytest.approx(speed * hours_per_unit, rel=0.05)


def test_cells_spread_so_widely_that_the_score_shrinks_give_the_same_hours():
    z, hours = course(spread=1.5, cells=4000)
    log_scale, _, _ = calibrate.scale_from_times(clock(1.0), z, hours, seed=0)
    # The score's slope on time is below 0.6 here (variance 1.3 of time against 2.25 of spread): were it not to cancel,
    # the scale would miss by as much. Standard error 1.5 / sqrt(4000) = 0.024 of 3 units.
    assert math.exp(log_scale) == pytest.approx(2.0, rel=0.06)


def test_the_gauge_of_a_member_multiplies_its_hours():
    z, hours = course()
    plain, shifted = (calibrate.scale_from_times(clock(1.0, level), z, hours, seed=0)[0] for level in (0.0, 0.7))
    assert shifted - plain == pytest.approx(0.7, abs=1e-6)              # float32 levels


def test_crossing_times_of_a_straight_path_are_exact():
    at = np.array([0.0, 0.5, 1.0, 2.0])
    start = np.array([0.0, 1.2, 1.5])
    t, share = calibrate.crossing_times(start - at[:, None], at)
    np.testing.assert_allclose(t, [1.2, 0.3])
    np.testing.assert_array_equal(share, 1.0)


def test_a_path_that_ends_early_counts_the_share_of_the_way():
    at = np.array([0.0, 1.0, 2.0])
    t, share = calibrate.crossing_times(np.array([0.0, 4.0]) - 0.5 * at[:, None], at)
    np.testing.assert_allclose((t[0], share[0]), (2.0, 0.25))


def test_a_flow_that_runs_forward_is_refused():
    with pytest.raises(ValueError, match="does not carry cells back"):
        calibrate.scale_from_times(clock(-1.0), *course(), seed=0)


def test_collection_times_unrelated_to_chromatin_are_refused():
    z, hours = course()
    hours = np.random.default_rng(0).permutation(hours)
    with pytest.raises(ValueError, match="does not differ"):
        calibrate.scale_from_times(clock(1.0), z, hours, seed=0)


def test_a_score_has_not_seen_the_cell_it_scores():
    rng = np.random.default_rng(0)
    x, hours = torch.from_numpy(rng.standard_normal((1, 60, 40))), rng.standard_normal(60)
    u = calibrate.time_score(x, hours, torch.Generator().manual_seed(0))
    # 40 features of noise fit 60 random hours to r = 0.8 in sample; out of sample the 3-sigma bound is 3 / sqrt(60).
    assert np.corrcoef(u[0], hours)[0, 1] < 0.39


def test_intervals_cover_a_clock_whose_pace_is_uneven():
    z, hours = course(2.0, (0, 2, 4, 6))
    z[hours > 2, 0] += 0.5                                              # a step of 1.5 units where others take 1
    log_scale, sd, made_of = calibrate.scale_from_times(clock(1.0), z, hours, seed=0)
    assert set(made_of["steps"][0]) == {"2-4 h", "4-6 h"}               # the step into the first collection is left out
    slow, fast = made_of["steps"][0].values()
    assert slow == pytest.approx(2 / 1.5, rel=0.1) and fast == pytest.approx(2.0, rel=0.1)
    assert math.log(slow) > log_scale - calibrate.Z * sd and math.log(fast) < log_scale + calibrate.Z * sd


# --- known delays -----------------------------------------------------------------------------------------------

def test_exact_known_delays_give_the_exact_scale():
    assert calibrate.scale_from_genes([0.4, 0.4, 0.4], [0.1, 0.2, 0.3])[0] == pytest.approx(0.4)


def test_one_gene_gives_its_own_uncertainty_and_the_usual_spread_between_genes():
    mean, sd, spread = calibrate.scale_from_genes([0.4], [0.4])
    assert (mean, sd, spread) == (pytest.approx(0.4), pytest.approx(0.5), pytest.approx(calibrate.GENE_SPREAD))


def test_genes_that_agree_are_weighted_by_their_own_precision():
    mean, sd, spread = calibrate.scale_from_genes([0.0, 0.1], [0.1, 0.2])
    assert (mean, sd, spread) == (pytest.approx(0.02), pytest.approx(1 / math.sqrt(125)), 0.0)


def test_genes_that_disagree_widen_the_interval_and_weigh_alike():
    mean, sd, spread = calibrate.scale_from_genes([-1.0, 1.0], [1e-4, 1e-3])
    # Two exact genes 2 apart: Q - 1 over the weights' term gives s^2 = 2, the sample variance.
    assert (mean, spread) == (pytest.approx(0.0, abs=1e-4), pytest.approx(math.sqrt(2), rel=1e-4))
    assert sd > 1


def test_the_interval_of_the_scale_covers_it_in_nine_of_ten_draws():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(1000):
        sd = rng.uniform(0.2, 0.6, 5)
        mean, wide, _ = calibrate.scale_from_genes(0.4 * rng.standard_normal(5) + sd * rng.standard_normal(5), sd)
        hits.append(abs(mean) < calibrate.Z * wide)
    # Five genes: the estimate of their spread is rough, so the level holds to a few per cent only.
    assert 0.85 < np.mean(hits) < 0.97


def test_the_sd_of_a_known_gene_is_that_of_its_interval(tmp_path):
    table = pd.DataFrame(dict(tau=[2.0], tau_low=[2 * math.exp(-0.3)], tau_high=[2 * math.exp(0.5)]), index=["a"])
    gap, sd, names = calibrate.known_delays(known(tmp_path, "gene,hours\na,6\n"), table)
    assert (gap[0], sd[0], names) == (pytest.approx(math.log(3)), pytest.approx(0.4 / 1.6449, rel=1e-4), ["a"])


# --- the stage --------------------------------------------------------------------------------------------------

@pytest.fixture
def run_folder(settings):
    """gene_tau_estimates.csv of six genes, the last without chromatin, and what --time-column reads."""
    write_table(gate_open=True)
    return settings


def write_table(gate_open):
    tau = np.array([0.5, 0.8, 1.0, 1.5, 2.0, 1.0])
    table = pd.DataFrame(dict(tau=tau, tau_low=tau / 1.5, tau_high=tau * 2.0, identifiable=True),
                         index=pd.Index([f"gene{g}" for g in range(6)], name="gene"))
    table.loc["gene5", ["tau_low", "tau_high", "identifiable"]] = np.nan, np.nan, False
    table["identifiable"] = table["identifiable"].astype(bool)
    artifacts.save_table("gene_tau_estimates.csv", table, stage="train_delay", metrics=dict(gate_open=gate_open))


def write_cells(**obs):
    import anndata
    z, hours = course()
    cells = anndata.AnnData(np.zeros((len(z), 1), np.float32), obs=pd.DataFrame(
        {"time_h": hours, **obs}, index=[f"cell{i}" for i in range(len(z))]))
    cells.obsm["z_atac"] = z
    artifacts.save("effendi.h5ad", lambda f: cells.write_h5ad(f.name), stage="train_delay")
    artifacts.save_model("effendi.pt", {"stands": "in"}, stage="train_delay")


def known(tmp_path, text):
    file = tmp_path / "known.csv"
    file.write_text(text)
    return str(file)


def test_known_genes_put_all_genes_into_hours(run_folder, tmp_path, capsys):
    calibrate.main(["--genes", known(tmp_path, "gene,hours\ngene0,1.0\ngene2,2.0\nelsewhere,3\n"),
                    "--out", run_folder.OUT_DIR])
    result, table = artifacts.load_table(calibrate.OUTPUT), artifacts.load_table("gene_tau_estimates.csv")
    np.testing.assert_allclose(result["tau_hours"], 2 * table["tau"])
    said = capsys.readouterr().out
    assert "1 of 3 known genes" in said and "elsewhere" in said and "2 hours per unit" in said


def test_an_hour_is_less_certain_than_its_tau(run_folder, tmp_path):
    calibrate.run(genes=known(tmp_path, "gene,hours\ngene0,1.0\n"))
    result, table = artifacts.load_table(calibrate.OUTPUT), artifacts.load_table("gene_tau_estimates.csv")
    fitted = table["tau_low"].notna()
    assert (result["low"] < 2 * table["tau_low"])[fitted].all()
    assert (result["high"] > 2 * table["tau_high"])[fitted].all()
    assert result.loc["gene5", ["low", "high"]].isna().all()            # a predicted gene has no interval in either


def test_bounds_add_as_squares_on_the_log_scale():
    table = pd.DataFrame(dict(tau=[1.0], tau_low=[math.exp(-3.0)], tau_high=[math.exp(5.0)], identifiable=[True]))
    result = calibrate.in_hours(table, math.log(2.0), 4.0 / calibrate.Z).iloc[0]
    assert math.log(result["low"] / 2) == pytest.approx(-5.0)
    assert math.log(result["high"] / 2) == pytest.approx(math.sqrt(41))


def test_collection_times_put_all_genes_into_hours(run_folder, monkeypatch):
    write_cells()
    monkeypatch.setattr(inference, "load_effendi", lambda file: (clock(1.0), None))
    calibrate.run()
    metrics = artifacts.record(calibrate.OUTPUT)["metrics"]
    assert metrics["scale"] == pytest.approx(2.0, rel=0.05)             # cloud means, as above
    assert metrics["low"] < 2.0 < metrics["high"]
    json.dumps(metrics)                                                 # plain numbers


def test_tau_itself_is_left_as_it_was(run_folder, tmp_path):
    before = artifacts.path("gene_tau_estimates.csv").read_bytes()
    calibrate.run(genes=known(tmp_path, "gene,hours\ngene0,1.0\n"))
    assert artifacts.path("gene_tau_estimates.csv").read_bytes() == before


def test_a_closed_gate_marks_every_hour_and_says_so(settings, tmp_path, capsys):
    write_table(gate_open=False)
    calibrate.run(genes=known(tmp_path, "gene,hours\ngene0,1.0\n"))
    assert not artifacts.load_table(calibrate.OUTPUT)["identifiable"].any()
    assert "neither do hours" in capsys.readouterr().out


def test_a_finished_calibration_is_not_repeated(run_folder, tmp_path, capsys):
    file = known(tmp_path, "gene,hours\ngene0,1.0\n")
    calibrate.run(genes=file)
    calibrate.run(genes=file)
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("text, message", [
    ("gene,hours\nnobody,1\n", "none of the 1 genes"),
    ("gene,hours\ngene5,1\n", "none of the 1 genes"),                   # a delay predicted from the embedding is none
    ("gene,delay\ngene0,1\n", "needs gene and hours"),
    ("gene,hours\ngene0,0\n", "hours above 0"),
    ("gene,hours\ngene0,soon\n", "hours above 0"),
    ("gene,hours\ngene0,1\ngene0,2\n", "twice"),
])
def test_a_file_of_known_delays_that_cannot_serve_is_refused(run_folder, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        calibrate.run(genes=known(tmp_path, text))


@pytest.mark.parametrize("column, obs, message", [
    ("hours", {}, "no obs column 'hours'"),
    ("when", {"when": 3.0}, "one time point"),
    ("when", {"when": "later"}, "holds no number"),
])
def test_collection_times_that_cannot_serve_are_refused(run_folder, monkeypatch, column, obs, message):
    write_cells(**obs)
    monkeypatch.setattr(inference, "load_effendi", lambda file: (clock(1.0), None))
    with pytest.raises(ValueError, match=message):
        calibrate.run(column)


def test_a_model_as_specified_is_refused():
    with pytest.raises(ValueError, match="OBJECTIVE"):
        calibrate.scale_from_times(nn.Linear(2, 2), *course(), seed=0)


def test_the_two_ways_exclude_each_other(run_folder):
    with pytest.raises(ValueError, match="either"):
        calibrate.main(["--genes", "known.csv", "--time-column", "time_h"])
