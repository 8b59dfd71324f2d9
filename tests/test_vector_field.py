import math

import pytest
import torch
from torch.nn.utils import parametrize

from vector_field import EffendiVectorField, integrate, interpolation_weights, trajectory


def cloud(seed, n=16, d=8):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def field(dim=8, hidden=16, rank=None, seed=0):
    torch.manual_seed(seed)
    made = EffendiVectorField(dim, hidden, rank)
    made.settle()
    return made.eval()


def test_exponential_decay_is_solved_forward_in_time():
    z0 = cloud(1)
    torch.testing.assert_close(integrate(lambda z: -z, z0, 1.0, 10), z0 * 0.9**10)        # Euler's own answer
    torch.testing.assert_close(integrate(lambda z: -z, z0, 1.0, 2000), z0 * math.exp(-1), rtol=1e-3, atol=0)


def test_negative_time_runs_backward():
    z0 = cloud(1)
    torch.testing.assert_close(integrate(lambda z: -z, z0, -1.0, 10), z0 * 1.1**10)


def error(method, n):
    """Against the logistic equation's closed form, in float64 so that round-off stays out of the order."""
    z0 = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    exact = 1 / (1 + (1 / z0 - 1) * math.exp(-2.0))
    return (integrate(lambda z: z * (1 - z), z0, 2.0, n, method) - exact).abs().max()


@pytest.mark.parametrize("method,order", [("euler", 1), ("rk4", 4)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(method, order):
    ratio = error(method, 64) / error(method, 128)
    assert abs(math.log2(ratio) - order) < 0.1              # the next term of the expansion is 1/64 of this one


def test_forward_then_backward_misses_by_an_amount_that_shrinks_with_the_step():
    v, z0 = field().double(), cloud(2).double()
    def gap(n):
        return (v.flow(v.flow(z0, 1.0, n), -1.0, n) - z0).abs().max()
    assert 0 < gap(400) < 1e-2
    assert 1.8 < gap(200) / gap(400) < 2.2                  # Euler is first order


def test_the_path_starts_at_z0_ends_at_the_flow_and_has_one_state_more_than_steps():
    v, z0 = field(), cloud(3)
    path = v.integrate(z0, torch.linspace(0, 1.5, 7), n_steps=30)
    assert path.shape == (31, 16, 8)
    assert torch.equal(path[0], z0)
    torch.testing.assert_close(path[-1], v.flow(z0, 1.5, 30))
    torch.testing.assert_close(v.integrate(z0, 1.5, 30), path)


def test_an_unknown_solver_or_no_step_is_refused():
    with pytest.raises(ValueError, match="midpoint.*euler, rk4"):
        list(trajectory(torch.tanh, cloud(1), 1.0, 5, "midpoint"))
    with pytest.raises(ValueError, match="n_steps is 0"):
        integrate(torch.tanh, cloud(1), 1.0, 0)


def test_the_field_is_lipschitz_by_its_weights_and_between_points():
    v = field(32, 24)
    assert abs(v.lipschitz_bound() - 1) < 1e-4              # each layer has norm 1 to float32 round-off
    x, y = cloud(4, 500, 32), cloud(5, 500, 32)
    assert ((v(x) - v(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-4)).all()


def test_the_bound_sees_a_layer_whose_norm_is_wrong():
    v = field()
    parametrize.remove_parametrizations(v.net[0], "weight")
    with torch.no_grad():
        v.net[0].weight *= 3
    assert v.lipschitz_bound() > 2.9


def test_every_parameter_of_the_field_receives_a_gradient():
    v = field().train()
    v.flow(cloud(6), 1.0, 5).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in v.parameters())


def test_interpolation_weights_give_the_mean_of_linearly_interpolated_states():
    path = torch.randn(11, 5, 3, generator=torch.Generator().manual_seed(0))          # (S+1, B, D), t_end = 2
    tau = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) * 2
    position = tau / 2 * 10
    lower = position.floor().long().clamp(max=9)
    share = (position - lower)[..., None]
    cells = torch.arange(5)[:, None]
    hidden = path[lower, cells] * (1 - share) + path[lower + 1, cells] * share        # (B, G, D), only here
    weights = interpolation_weights(tau, 2.0, 10)
    torch.testing.assert_close(torch.einsum("bs,sbd->bd", weights, path), hidden.mean(1))
    torch.testing.assert_close(weights.sum(1), torch.ones(5))


def test_tau_at_both_ends_of_the_path_reads_the_first_and_the_last_state():
    assert interpolation_weights(torch.tensor([[0.0]]), 2.0, 4).tolist() == [[1, 0, 0, 0, 0]]
    assert interpolation_weights(torch.tensor([[2.0]]), 2.0, 4).tolist() == [[0, 0, 0, 0, 1]]


@pytest.mark.parametrize("rank", [None, 3])
def test_weighted_states_equal_the_weighted_path_without_building_it(rank):
    v, z0 = field(8, 16, rank), cloud(7)
    weights = torch.rand(16, 2, 26, generator=torch.Generator().manual_seed(2))
    expected = torch.einsum("bks,sbd->bkd", weights, v.integrate(z0, 1.7, 25))
    torch.testing.assert_close(v.weighted_states(z0, weights, 1.7), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_weighted_states_matches_finite_differences():
    v = field(4, 5).double()
    z0 = cloud(8, 2, 4).double().requires_grad_()
    tau = (torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1).requires_grad_()
    def pooled(z0, tau):
        return v.weighted_states(z0, interpolation_weights(tau, 1.5, 7)[:, None], 1.5)
    assert torch.autograd.gradcheck(pooled, (z0, tau))


def test_a_field_of_rank_r_moves_within_its_subspace_and_commutes_with_the_lift():
    v, low = field(8, 16, rank=3), cloud(9, 16, 3)
    torch.testing.assert_close(v.lift.T @ v.lift, torch.eye(3))
    lifted = v.flow(low @ v.lift.T, 1.0, 10)
    torch.testing.assert_close(lifted, integrate(v.net, low, 1.0, 10) @ v.lift.T)
