"""The benchmark on planted delays: its rivals are given a fair chance, its scores mean what they say, it resumes."""
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import known_truth  # noqa: E402
import oracle_posterior  # noqa: E402
import second_population  # noqa: E402

import delay_fit  # noqa: E402
import simulate  # noqa: E402

TIME = np.arange(0, 6 + known_truth.STEP / 2, known_truth.STEP)


def switches(at, width=0.3):
    """Courses (1, T, G) that open at times `at`."""
    return (1 / (1 + np.exp(-(TIME[:, None] - at) / width)))[None]


@pytest.fixture(scope="module")
def small():
    """600 cells, 80 genes, deep, and its data set."""
    known_truth.SIZES["small"] = dict(cells=600, genes=80, lineages=2)
    yield known_truth.make("small", "6000", "exp", 3)[0]
    del known_truth.SIZES["small"]


def test_cross_correlation_and_half_maximum_gap_find_a_planted_shift():
    tau, at = np.array([0.0, 0.2, 0.77, 1.5]), np.array([1.0, 2.0, 2.5, 3.0])
    access, expression = switches(at), switches(at + tau)
    np.testing.assert_allclose(known_truth.cross_correlation(access, expression), tau, atol=0.03)  # half a grid step
    gap = known_truth.half_time(expression) - known_truth.half_time(access)
    np.testing.assert_allclose(gap[0], tau, atol=0.03)


@pytest.mark.parametrize("kernel,order", [("exp", 1), ("gamma", 2)])
def test_the_lag_is_the_integral_over_the_kernel(kernel, order):
    drive, tau = switches(np.array([2.0])), 0.8
    fine = np.linspace(0, 6, 6001)
    density = (order / tau) ** order * fine ** (order - 1) * np.exp(-order * fine / tau)
    history = np.interp(TIME[:, None] - fine, TIME, drive[0, :, 0])            # before time 0 as at 0
    exact = np.trapezoid(density * history, fine) / np.trapezoid(density, fine)
    # The tail beyond 6 is cut off in `exact`: exp(-6 / 0.8) = 6e-4.
    np.testing.assert_allclose(known_truth.lagged(drive, tau, kernel, 2)[0, :, 0], exact, atol=2e-3)


@pytest.mark.parametrize("kernel", ["exp", "shift"])
def test_the_oracle_lags_courses_as_the_benchmark_does(kernel):
    drive, u = switches(np.array([2.0])), 20
    times = torch.as_tensor(TIME)
    found = oracle_posterior.operators(times, kernel)[u] @ torch.as_tensor(drive[0, :, 0])
    exact = known_truth.lagged(drive, float(delay_fit.LOG_TAU[u].exp()), kernel, 1)[0, :, 0]
    np.testing.assert_allclose(found, exact, atol=2e-3)     # both linear between times, of which one is the middle


def test_the_oracle_finds_delays_and_says_how_well(small):
    log_tau, sd = oracle_posterior.log_tau(small, "exp")
    gap = (log_tau - torch.as_tensor(np.log(small.truth.tau.to_numpy())))[small.used]
    assert known_truth.rank_correlation(log_tau.numpy()[small.used], small.truth.tau[small.used]) > 0.95
    assert ((gap / sd[small.used]).abs() < 1.645).float().mean() > 0.8         # 90 % of 68 genes, within three sd


def test_lineages_of_the_oracle_are_one_before_they_part_and_vary_alike_everywhere():
    times, o = torch.arange(0, 6.05, 0.1, dtype=torch.double), simulate.Options(lineages=3)
    basis = oracle_posterior.axes(times, o, 0.9, 0.6, 0.5).view(3, len(times), -1)
    trunk = times <= o.t_branch
    torch.testing.assert_close(basis[0, trunk], basis[1, trunk], atol=1e-6, rtol=0)     # axes of the square root of 0
    assert (basis[0, -1] - basis[1, -1]).norm() > 0.3
    variance = basis.square().sum(2)
    torch.testing.assert_close(variance, torch.full_like(variance, 0.25), rtol=0.01, atol=0)    # 40 axes hold 99.9 %


def test_lineages_of_single_switches_are_one_before_they_part():
    o, t = simulate.Options(genes=300), np.linspace(0, 6, 301)
    flat = np.arange(300) < 30
    a = second_population.one_switch(np.random.default_rng(0), t, o, flat)
    assert a.shape == (3, 301, 300) and a.min() >= 0.1 and a.max() <= 1
    assert (np.ptp(a[:, t <= o.t_branch], 0) == 0).all() and np.ptp(a[..., flat], (0, 1)).max() == 0
    assert np.abs(np.diff(a, axis=1)).max() < 0.06          # 0.9 / 4 / 0.1 a unit is the steepest; and nothing jumps


def test_stages_change_many_genes_at_a_time_and_none_before_lineages_part_in_one_alone():
    o, t = simulate.Options(genes=300), np.linspace(0, 6, 301)
    flat = np.arange(300) < 30
    a = second_population.stages(np.random.default_rng(0), t, o, flat)
    assert a.shape == (3, 301, 300) and a.min() >= 0.1 and a.max() <= 1
    assert np.ptp(a[:, t <= o.t_branch], 0).max() == 0 and np.ptp(a[..., flat], (0, 1)).max() < 1e-12
    assert np.ptp(a[:, -1], 0).mean() > 0.1                 # lineages differ in the end
    changing = (np.abs(np.diff(a[0, t < o.t_branch], axis=0)) > 1e-2).mean(1)   # share of genes at every time
    assert changing.max() > 0.1 and changing.min() == 0     # some stage has begun; before the first nothing changes
    assert np.abs(np.diff(a, axis=1)).max() < 0.2           # 0.9 (1 - exp(-0.02 / 0.1)) at most


def test_a_shift_moves_the_course_and_stays_at_its_beginning():
    drive = switches(np.array([2.0]))
    moved = known_truth.lagged(drive, 0.5, "shift", 1)[0, :, 0]
    np.testing.assert_allclose(moved, np.interp(np.maximum(TIME - 0.5, 0), TIME, drive[0, :, 0]), atol=1e-12)


def test_a_course_is_exact_for_a_line_up_to_the_ends():
    rng = np.random.default_rng(0)
    time = np.sort(rng.uniform(0, 6, 500))
    rate = np.stack([1 + time, 8 - time], 1)                # the two sum to 9: every cell has the same depth
    zero = np.zeros(500, int)
    found = known_truth.course(time, zero, zero.astype(bool), rate, 0.3, 6.0)[0]
    np.testing.assert_allclose(found, np.stack([1 + TIME, 8 - TIME], 1), atol=1e-6)


def test_the_fit_that_is_told_the_true_time_recovers_the_delays(small):
    found = known_truth.true_time(small, None)
    scores = known_truth.score(small, found)
    assert scores["spearman"] > 0.8                         # 0.88 to 0.96 over seeds 0 to 4
    assert 0.4 < scores["coverage"] <= 1


def test_the_second_generator_has_the_asked_depth_the_same_genes_in_every_condition_and_delays_that_can_be_found():
    shallow, deep = (second_population.population(depth, kernel, seed=5, cells=1500, genes=100)
                     for depth, kernel in (("shallow", "exp"), ("6000", "shift")))
    assert shallow.rna.X.sum(1).mean() == pytest.approx(1.5 * 170 / 4, rel=0.03)    # 170 at 400 genes; luck 0.5 %
    assert 0.8 * 1500 < deep.atac.X.sum(1).mean() < 1.2 * 1500      # less those that overlap, plus those between
    np.testing.assert_array_equal(shallow.truth.tau, deep.truth.tau)
    np.testing.assert_array_equal(shallow.atac.var_names, deep.atac.var_names)
    a = second_population.population("6000", "shift", seed=5, cells=1500, genes=100)
    assert (a.rna.X != deep.rna.X).nnz == 0

    known_truth.SIZES["some"] = dict(simulator=second_population.population, cells=1500, genes=100)
    try:
        data, _ = known_truth.make("some", "6000", "shift", 5)
    finally:
        del known_truth.SIZES["some"]
    assert known_truth.score(data, known_truth.true_time(data, None))["spearman"] > 0.8  # seeds 5 to 8: 0.95 to 0.98


def test_the_model_as_specified_runs_for_the_epochs_it_is_given(small, monkeypatch):
    for name in ("VF_EPOCHS", "STAGE1_EPOCHS", "STAGE2_EPOCHS"):
        monkeypatch.setattr(known_truth.config, name, 1)    # the row sets them; put back afterwards
    found = known_truth.specification(small, Namespace(spec_epochs=[1, 2, 1]))
    assert len(found["log_tau"]) == len(small.truth) and np.isfinite(found["log_tau"]).all()
    assert "epochs 1, 2 + 1" in found["note"]


def test_a_common_factor_of_all_delays_changes_no_score(small):
    truth = np.log(small.truth.tau.to_numpy())
    for shift in (0.0, 2.3):
        low, high = truth + shift - 0.1, truth + shift + 0.1
        scores = known_truth.score(small, dict(log_tau=truth + shift, low=low, high=high))
        assert scores["spearman"] == pytest.approx(1) and scores["rmse"] == pytest.approx(0, abs=1e-9)
        assert scores["coverage"] == 1 and scores["width"] == pytest.approx(0.2)


def test_a_constant_estimate_has_no_rank_correlation():
    assert known_truth.rank_correlation(np.ones(20), np.arange(20.0)) is None


def test_finished_rows_are_not_done_again_and_a_torn_line_is_no_result(small, tmp_path, capsys):
    args = Namespace(out=tmp_path, redo=False, seeds=[3], sizes=["small"], depths=["6000"], kernels=["exp"],
                     rows=["untrained", "true_time"])
    known_truth.run(args)
    file = tmp_path / "results.jsonl"
    first = file.read_text()
    assert [r["row"] for r in known_truth.read_results(file)] == ["untrained", "true_time"]
    known_truth.run(args)
    assert file.read_text() == first
    file.write_text(first + json.dumps(known_truth.read_results(file)[0])[:40])
    assert len(known_truth.read_results(file)) == 2


def test_a_row_that_fails_gives_its_reason_and_the_others_go_on(small, tmp_path, monkeypatch):
    def broken(data, args):
        raise ValueError("not installed: no network")
    monkeypatch.setitem(known_truth.ROWS, "multivelo", broken)
    known_truth.run(Namespace(out=tmp_path, redo=False, seeds=[3], sizes=["small"], depths=["6000"], kernels=["exp"],
                              rows=["multivelo", "untrained"]))
    failed, other = known_truth.read_results(tmp_path / "results.jsonl")
    assert "no network" in failed["failed"] and "spearman" in other


def test_the_table_and_the_picture_are_made_from_any_part_of_the_results(tmp_path, capsys):
    line = dict(dataset="main-deep-exp-100", size="main", depth="deep", kernel="exp", seed=100, row="default",
                spearman=0.9, rmse=0.3, gate_open=True, seconds=20.0, cpu_seconds=19.0, mib=700, code="0")
    lines = [line, dict(line, row="multivelo", dataset="x", failed="ValueError: not installed", spearman=None)]
    known_truth.print_table(lines)
    known_truth.draw(lines, tmp_path / "picture.png")
    shown = capsys.readouterr().out
    assert "| Effendi, default | 0.90 |" in shown and "not installed" in shown and "1 of 1" in shown
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_unknown_names_are_refused():
    assert known_truth.names(simulate.DEPTHS)("deep,shallow") == ["deep", "shallow"]
    with pytest.raises(known_truth.argparse.ArgumentTypeError, match="deap"):
        known_truth.names(simulate.DEPTHS)("deap")
    assert known_truth.seed_list("100-102") == [100, 101, 102]
