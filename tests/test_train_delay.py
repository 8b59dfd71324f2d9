import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import anchored
import train_delay
from align_mlp import AlignMLP
from vector_field import EffendiVectorField


@pytest.fixture
def tiny(settings):
    settings.OBJECTIVE = "specification"
    settings.STAGE1_EPOCHS, settings.STAGE2_EPOCHS, settings.BATCH_SIZE = 2, 2, 32
    settings.N_STEPS, settings.N_STEPS_BAR = 10, 4
    settings.ALIGN_HIDDEN, settings.VF_HIDDEN, settings.TAU_HIDDEN, settings.DEC_HIDDEN = 16, 8, 8, 8
    return settings


def data(n=100, g=20):
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(1.0, (n, g)).astype(np.float32))
    cells = pd.Index([f"cell{i}" for i in range(n)])
    return dict(z_atac=rng.normal(size=(n, 6)).astype(np.float32), z_R=rng.normal(size=(n, 12)).astype(np.float32),
                counts=counts, depth=np.asarray(counts.sum(1)).ravel().astype(np.float32),
                gene_emb=rng.normal(size=(g, 12)).astype(np.float32), cells=cells, obs=pd.DataFrame(index=cells),
                genes=pd.DataFrame(index=[f"gene{i}" for i in range(g)]), held_out=train_delay.held_out_cells(cells))


def start():
    torch.manual_seed(0)
    field = EffendiVectorField(12, 8)
    field.settle()
    return AlignMLP(6, 12, 16).state_dict(), field.state_dict()


def fit(**more):
    return train_delay.fit(data(), *start(), torch.device("cpu"), 0, **more)


def field_weights(model):
    return {name: value.clone() for name, value in model.field.state_dict().items()}


def test_stage_2_1_leaves_the_vector_field_bit_identical_and_stage_2_2_does_not(tiny):
    seen = []
    model, _ = fit(after_stage1=lambda model: seen.append(field_weights(model)))
    initial = start()[1]
    assert all(torch.equal(seen[0][name], initial[name]) for name in initial)
    assert any(not torch.equal(field_weights(model)[name], initial[name]) for name in initial)


def test_stage_2_1_trains_everything_but_the_field(tiny):
    tiny.STAGE2_EPOCHS = 0
    before = {}
    def remember(model):
        before.update({name: p.clone() for name, p in model.named_parameters()})
    torch.manual_seed(0)
    fresh = dict(train_delay.new_model(6, 12).named_parameters())
    fit(after_stage1=remember)
    unmoved = {name for name in before if name in fresh and torch.equal(before[name], fresh[name])}
    assert not {name for name in unmoved if name.startswith(("tau_predictor", "decoder", "align"))}


def test_the_field_learns_at_its_own_rate_in_stage_2_2(tiny):
    model = train_delay.new_model(6, 12)
    assert [group["lr"] for group in train_delay.start_phase(model, 1).param_groups] == [tiny.STAGE1_LR]
    rates = [group["lr"] for group in train_delay.start_phase(model, 2).param_groups]
    assert rates == [tiny.STAGE1_LR, tiny.STAGE2_LR_VF]


def test_every_parameter_is_in_the_optimiser_of_stage_2_2(tiny):
    model = train_delay.new_model(6, 12)
    held = {id(p) for group in train_delay.start_phase(model, 2).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_stopping_after_any_epoch_and_going_on_gives_the_uninterrupted_weights(tiny, tmp_path):
    states = []
    def keep(state):
        torch.save(state, tmp_path / "state.pt")
        states.append(torch.load(tmp_path / "state.pt", weights_only=True))
    whole, history = fit(checkpoint=keep)
    for state in states:
        resumed, again = fit(resume=state)
        assert again == history
        for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_the_total_is_the_weighted_sum_of_its_terms(tiny):
    _, history = fit()
    for row in history:
        total = row["ode"] + 0.5 * row["recon"] + 0.01 * row["tau"] + 0.1 * row["reverse"]
        assert row["total"] == pytest.approx(total, rel=1e-5)       # float32 sums


def test_held_out_cells_depend_on_names_and_seed_and_not_on_the_order_of_the_file(settings):
    names = np.array([f"c{i}" for i in range(50)])
    shuffled = np.random.default_rng(0).permutation(names)
    assert set(names[train_delay.held_out_cells(names)]) == set(shuffled[train_delay.held_out_cells(shuffled)])
    settings.SEED = 1
    assert set(names[train_delay.held_out_cells(names)]) != set(shuffled[:5])


def test_a_run_that_can_tell_hardly_a_gene_says_so():
    gate = anchored.Gate(True, [], 9.0, 9.0, 9.0, 9.0, 0.7)
    few, many = (train_delay.meaning(gate, torch.arange(100) < n, {"genes": range(100)}) for n in (4, 5))
    assert "for hardly a gene" in few and "4 of 100" in few and "tau is meaningful on these data" in many


def test_no_gradient_sees_a_held_out_cell(tiny):
    d = data()
    changed = dict(d, counts=d["counts"].copy(), z_R=d["z_R"].copy())
    changed["z_R"][d["held_out"]] = 99
    a, _ = train_delay.fit(d, *start(), torch.device("cpu"), 0)
    b, _ = train_delay.fit(changed, *start(), torch.device("cpu"), 0)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_log_expression_is_log1p_of_counts_per_10000():
    x = train_delay.log_expression(sp.csr_matrix(np.array([[1.0, 3.0], [0, 0]], dtype=np.float32)), np.array([4.0, 0]))
    np.testing.assert_allclose(x, np.log1p([[2500, 7500], [0, 0]]), rtol=1e-6)      # float32
