"""Squared sliced 2-Wasserstein distance between two point clouds, in PyTorch alone.

    SW2(X, Y)^2 = E_u [ W2(X u, Y u)^2 ]          u uniform on the unit sphere of R^D
    W2(a, b)^2  = mean_i (a_(i) - b_(i))^2        on a line, the sorted values are the optimal pairs

The clouds are sets: neither the order of their rows nor any pairing of cells enters.

Shapes  x (N, D), y (N, D), directions (D, P) -> ().  Differentiable in x and y.
Units   those of x, squared. Training uses the square, whose gradient at 0 exists; reports print the root.
Ref     Bonneel, Rabin, Peyre, Pfister 2015, Sliced and Radon Wasserstein barycenters of measures.
"""
import torch


def random_directions(dim, n, rng):
    """n unit vectors as columns (dim, n), drawn on the CPU so that every device sees the same ones."""
    u = torch.randn(dim, n, generator=rng)
    return u / u.norm(dim=0)


def sliced_w2_sq(x, y, directions):
    """SW2(x, y)^2 over the given directions, a scalar tensor."""
    if x.shape != y.shape:
        raise ValueError(f"sliced_w2_sq: x is {tuple(x.shape)} and y is {tuple(y.shape)}, but sorted values pair "
                         "one to one.\n  Draw the same number of rows from both clouds, in the same space.")
    directions = directions.to(x)
    sorted_x = (x @ directions).sort(dim=0).values          # (N, P)
    sorted_y = (y @ directions).sort(dim=0).values          # (N, P)
    return (sorted_x - sorted_y).square().mean()
