import pytest
import torch

from slice_w2 import random_directions, sliced_w2_sq


def cloud(seed, n=64, d=8):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


DIRECTIONS = random_directions(8, 50, torch.Generator().manual_seed(0))


def test_a_cloud_is_at_distance_zero_from_itself_in_any_order():
    x = cloud(1)
    assert sliced_w2_sq(x, x.flip(0), DIRECTIONS) < 1e-10           # float32 round-off, squared


def test_directions_are_unit_vectors_and_the_same_for_the_same_seed():
    torch.testing.assert_close(DIRECTIONS.norm(dim=0), torch.ones(50))
    assert torch.equal(DIRECTIONS, random_directions(8, 50, torch.Generator().manual_seed(0)))


def test_the_distance_is_symmetric():
    x, y = cloud(1), cloud(2)
    assert torch.equal(sliced_w2_sq(x, y, DIRECTIONS), sliced_w2_sq(y, x, DIRECTIONS))


def test_a_shift_costs_its_projection_squared():
    x, c = cloud(1), cloud(3, n=1)
    torch.testing.assert_close(sliced_w2_sq(x, x + c, DIRECTIONS), (c @ DIRECTIONS).square().mean())


def test_scaling_about_the_mean_has_the_closed_form_of_one_dimension():
    x = cloud(4, d=1)
    one = torch.ones(1, 1)
    torch.testing.assert_close(sliced_w2_sq(x, 3 * x, one), (2 * x).square().mean())


def test_the_gradient_matches_finite_differences():
    # Ties would break the sort's smoothness; random doubles have none.
    x, y = cloud(5, 6, 3).double().requires_grad_(), cloud(6, 6, 3).double()
    directions = random_directions(3, 4, torch.Generator().manual_seed(1)).double()
    assert torch.autograd.gradcheck(lambda x: sliced_w2_sq(x, y, directions), (x,))


def test_clouds_of_different_size_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(64, 8\).*\(63, 8\)"):
        sliced_w2_sq(cloud(1), cloud(2, n=63), DIRECTIONS)
