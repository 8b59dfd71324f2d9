import numpy as np
import pandas as pd
import pytest
import torch

import validate
from effendi import Effendi


def model(seed=0):
    torch.manual_seed(seed)
    made = Effendi(in_dim=6, dim=12, vf_hidden=16, n_steps=50)
    made.field.settle()
    return made.eval()


def test_a_healthy_model_passes_with_the_flags_of_the_specification():
    health = validate.check_model_health(model(), torch.randn(50, 12) * 0.1, torch.randn(9, 12), tau=0.2, n_steps=400)
    assert health["lip_in_range"] and health["rev_err_acceptable"] and health["numerically_stable"]
    assert health["explosion_rate"] == 0


def test_a_field_without_its_norm_is_caught():
    broken = model()
    torch.nn.utils.parametrize.remove_parametrizations(broken.field.net[0], "weight")
    with torch.no_grad():
        broken.field.net[0].weight *= 2
    health = validate.check_model_health(broken, torch.randn(50, 12))
    assert not health["lip_in_range"] and 1.9 < health["lipschitz"] < 2.1


def test_nan_in_a_state_is_caught():
    assert not validate.check_model_health(model(), torch.full((2, 12), float("nan")))["numerically_stable"]


def test_the_reversibility_error_is_the_solvers_and_shrinks_with_its_step():
    z = torch.randn(50, 12)
    coarse, fine = (validate.check_model_health(model(), z, n_steps=n)["rev_err"] for n in (50, 200))
    assert 3.5 < coarse / fine < 4.5                        # first order: four times the steps, a quarter of the error


def truth(n=50):
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(n)]
    changes = [True] * (n - 10) + [False] * 10
    planted = pd.DataFrame(dict(tau=np.exp(rng.normal(size=n)), changes=changes, has_link=True),
                           index=genes)
    return planted, genes


def test_perfect_delays_recover_the_truth_whatever_their_scale_and_shuffled_ones_do_not():
    planted, genes = truth(410)
    table = pd.DataFrame(dict(tau=7 * planted["tau"], tau_low=6 * planted["tau"], tau_high=8 * planted["tau"],
                              identifiable=True), index=genes)
    rows = {row["check"]: row for row in validate.truth_checks(table, planted, None)}
    found = rows["recovery of planted delays"]
    assert found["value"] > 0.999 and found["n"] == 400 and abs(found["control"]["shuffled_genes"]) < 0.2
    assert rows["90 % intervals cover"]["value"] == 1 and rows["90 % intervals cover"]["verdict"] == "fail"


def test_coverage_beyond_the_band_fails_only_where_it_is_more_than_the_luck_of_the_genes():
    for genes_in_all, verdict in ((410, "pass"), (4010, "fail")):
        planted, genes = truth(genes_in_all)
        missed = np.arange(genes_in_all) % 25 == 0              # 4 % missed: the intervals cover 0.96
        low = planted["tau"] * np.where(missed, 1.05, 0.8)
        table = pd.DataFrame(dict(tau=planted["tau"], tau_low=low, tau_high=1.2 * planted["tau"], identifiable=True),
                             index=genes)
        assert validate.truth_checks(table, planted, None)[-1]["verdict"] == verdict


def test_a_gate_that_lacks_a_test_is_an_earlier_version_s():
    tests = dict(gate_open=True, gain_z=9.0, own_z=9.0, split_half=0.8, differ_z=2.9)
    new = dict(metrics={**tests, "pairing_z": 2.0}, cells=3, genes=2)
    found = [row["verdict"] for row in validate.gate_checks(new)]
    assert found == ["fail", "pass", "fail", "pass", "pass"]
    with pytest.raises(ValueError, match="train_delay.py"):
        validate.gate_checks(dict(metrics=tests, cells=3, genes=2))


def test_a_truth_of_other_genes_is_not_run_rather_than_passed():
    planted, genes = truth()
    table = pd.DataFrame(dict(tau=1.0, tau_low=1.0, tau_high=1.0, identifiable=True), index=["other"])
    assert validate.truth_checks(table, planted, None)[0]["verdict"].startswith("not run")


def test_a_value_that_is_not_finite_is_not_run():
    assert validate.check("1", "x", float("nan"), "> 0", True, 3)["verdict"].startswith("not run")
