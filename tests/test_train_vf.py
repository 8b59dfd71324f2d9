import numpy as np
import pytest
import torch

import artifacts
import train_vf


@pytest.fixture
def tiny(settings):
    settings.OBJECTIVE = "specification"
    settings.VF_EPOCHS, settings.BATCH_SIZE, settings.N_PROJ_W2, settings.N_STEPS_BAR = 3, 32, 20, 4
    settings.ALIGN_HIDDEN, settings.VF_HIDDEN = 16, 8
    settings.DIM, settings.HYENADNA_D_MODEL = 12, 6
    return settings


def clouds(n=120, m=100):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6)).astype(np.float32), rng.normal(size=(m, 12)).astype(np.float32)


def fit(z_atac, z_R, seed=0, **more):
    return train_vf.fit(z_atac, z_R, torch.device("cpu"), seed, **more)


def weights(model):
    return torch.cat([p.flatten() for p in model.state_dict().values()])


def test_the_held_out_distance_falls(tiny):
    tiny.VF_EPOCHS = 15
    _, history = fit(*clouds())
    assert history[-1]["sw2"] < 0.8 * history[0]["sw2"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny):
    z = clouds()
    assert torch.equal(weights(fit(*z)[0]), weights(fit(*z)[0]))
    assert not torch.equal(weights(fit(*z)[0]), weights(fit(*z, seed=1)[0]))


def test_shuffling_the_pairing_leaves_stage_1_bit_identical(tiny):
    z_atac, z_R = clouds(100, 100)
    shuffled = z_R[np.random.default_rng(1).permutation(100)]
    assert torch.equal(weights(fit(z_atac, z_R)[0]), weights(fit(z_atac, shuffled)[0]))


def test_every_parameter_receives_a_gradient(tiny):
    model = train_vf.FlowToRNA(6, 12, 16, 8).train()
    z_atac, z_R = (torch.from_numpy(z[:32]) for z in clouds())
    sum(model.losses(z_atac, z_R, torch.nn.functional.normalize(torch.randn(12, 20), dim=0), 4).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_stopping_after_any_epoch_and_going_on_gives_the_uninterrupted_weights(tiny, tmp_path):
    states = []
    whole, history = fit(*clouds(), checkpoint=lambda state: states.append(_through_a_file(state, tmp_path)))
    for state in states[:-1]:
        resumed, again = fit(*clouds(), resume=state)
        assert torch.equal(weights(resumed), weights(whole)) and again == history


def _through_a_file(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def test_the_saved_field_is_lipschitz_bounded(tiny):
    model, _ = fit(*clouds())
    assert model.field.lipschitz_bound() < 1 + 1e-4         # float32 round-off


def test_nan_in_an_embedding_ends_with_the_losses_named_and_nothing_written(tiny):
    z_atac, z_R = clouds()
    z_R[3] = np.nan
    with pytest.raises(FloatingPointError, match="sw2_sq nan.*\n.*VF_LR"):
        fit(z_atac, z_R)
    assert not artifacts.path("align_mlp.pt").exists()
