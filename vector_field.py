"""The Lipschitz-bounded vector field v_theta and the hand-written solvers that follow it.

    dz/dt = v(z),   v(z) = W3 tanh(W2 tanh(W1 z + b1) + b2) + b3,   |Wi|_2 = 1  =>  Lip(v) <= 1
    phi_t(z)        the state after time t; t < 0 runs backward

Spectral norm 1 on every layer and the 1-Lipschitz tanh bound the whole field, so that two solutions part no
faster than e^t and the flow can be run backward. Fixed-step Euler and RK4 in float32 need nothing that MPS
lacks. With rank = r the field moves an r-dimensional subspace only: v(z) = Q net(Q^T z), Q (dim, r)
orthonormal, which commutes with both solvers.

Shapes  z (B, D); trajectory (S+1, B, D) for S steps
Units   latent units; time is ODE time, never hours
Ref     Miyato et al. 2018, Spectral normalization; Chen et al. 2018, Neural ordinary differential equations
"""
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

# --- solvers -------------------------------------------------------------------------------------------------

def euler_step(v, z, dt):
    return z + dt * v(z)


def rk4_step(v, z, dt):
    k1 = v(z)
    k2 = v(z + dt / 2 * k1)
    k3 = v(z + dt / 2 * k2)
    k4 = v(z + dt * k3)
    return z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


STEPS = {"euler": euler_step, "rk4": rk4_step}


def trajectory(v, z0, t, n_steps, method="euler"):
    """Yield z(0), z(t/n), ..., z(t): n_steps + 1 states (B, D). t < 0 runs backward."""
    if method not in STEPS:
        raise ValueError(f"no solver {method!r}; choose one of {', '.join(STEPS)}")
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}, but a trajectory needs at least 1 step")
    dt, z = t / n_steps, z0
    yield z
    for _ in range(n_steps):
        z = STEPS[method](v, z, dt)
        yield z


def integrate(v, z0, t, n_steps=20, method="euler"):
    """phi_t(z0), shape of z0, after n_steps fixed steps; keeps no path."""
    for z in trajectory(v, z0, t, n_steps, method):         # noqa: B007  (the last state is the result)
        pass
    return z


def interpolation_weights(tau, t_end, n_steps):
    """How much each saved state counts in linear interpolation at tau, averaged over the last axis.

        mean_g z(tau_g) = sum_s w_s z_s     z linear between the S+1 states at s t_end / S

    Shapes  tau (B, G) in [0, t_end] -> (B, S+1), each row summing to 1. Differentiable in tau. This
            histogram is why the states of all genes, (B, G, D), never have to exist.
    """
    position = (tau / t_end * n_steps).clamp(0, n_steps)
    lower = position.detach().floor().clamp(max=n_steps - 1)
    upper_share = (position - lower) / tau.shape[1]                             # (B, G)
    lower_share = 1 / tau.shape[1] - upper_share
    lower = lower.long()
    zeros = tau.new_zeros(tau.shape[0], n_steps + 1)
    return zeros.scatter_add(1, lower, lower_share).scatter_add(1, lower + 1, upper_share)


# --- the field -------------------------------------------------------------------------------------------------

class SpectralNormLinear(nn.Linear):
    """A linear layer whose weight is divided by its largest singular value (power iteration)."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        spectral_norm(self)


class EffendiVectorField(nn.Module):
    def __init__(self, dim=512, hidden_dim=128, rank=None):
        super().__init__()
        self.args = dict(dim=dim, hidden_dim=hidden_dim, rank=rank)             # saved with the weights
        width = rank or dim
        self.net = nn.Sequential(
            SpectralNormLinear(width, hidden_dim), nn.Tanh(),
            SpectralNormLinear(hidden_dim, hidden_dim), nn.Tanh(),
            SpectralNormLinear(hidden_dim, width),
        )
        # Fixed by the shape alone, so that a latent means the same direction in every run.
        lift = None
        if rank:
            lift = torch.linalg.qr(torch.randn(dim, rank, generator=torch.Generator().manual_seed(0))).Q
        self.register_buffer("lift", lift)                                      # (dim, rank) or None

    def forward(self, z):
        """v(z), (B, dim) -> (B, dim)."""
        return self.net(z) if self.lift is None else self.net(z @ self.lift) @ self.lift.T

    def integrate(self, z0, t, n_steps=100, method="euler"):
        """The whole path from t[0] to t[-1] (a number t means [0, t]): (n_steps + 1, B, dim).

        The spectral norm is computed once for all steps.
        """
        if torch.is_tensor(t) and t.ndim == 0 or isinstance(t, (int, float)):
            t = (0.0, t)
        with parametrize.cached():
            return torch.stack(list(trajectory(self, z0, t[-1] - t[0], n_steps, method)))

    def flow(self, z0, t, n_steps=20, method="euler"):
        """phi_t(z0) alone, (B, dim); t a number or a scalar tensor, whose gradient is kept."""
        with parametrize.cached():
            if method != "euler":
                return integrate(self, z0, t, n_steps, method)
            last = torch.zeros(n_steps + 1, device=z0.device, dtype=z0.dtype)
            last[-1] = 1
            return self.weighted_states(z0, last.expand(len(z0), 1, -1), t)[:, 0]

    def weighted_states(self, z0, weights, t_end):
        """sum_s weights[b, k, s] z_s(b) over the S+1 Euler states from z0 to t_end, without the states.

            u_s = W1 z_s + b1,  h_s = tanh(W2 tanh(u_s) + b2)
            u_(s+1) = u_s + dt (W1 W3 h_s + W1 b3)                  the field sees z only through W1 z
            z_s = z_0 + dt sum_(r<s) (W3 h_r + b3)
            sum_s w_s z_s = z_0 sum_s w_s + dt (W3 sum_r c_r h_r + b3 sum_r c_r),   c_r = sum_(s>r) w_s

        so that a step costs hidden x hidden instead of dim x hidden, and what is kept for the gradient is
        (S, B, hidden), not (S, B, dim). Same numbers as integrate() up to round-off.

        Shapes  z0 (B, dim), weights (B, K, S+1) -> (B, K, dim)
        """
        first, second, third = self.net[0], self.net[2], self.net[4]
        w1, w2, w3, b3 = first.weight, second.weight, third.weight, third.bias
        if self.lift is not None:
            w1, w3, b3 = w1 @ self.lift.T, self.lift @ w3, self.lift @ b3
        n_steps = weights.shape[-1] - 1
        dt = t_end / n_steps
        u = torch.addmm(first.bias, z0, w1.T)                                   # (B, H)
        step_matrix, step_bias = dt * (w1 @ w3).T, dt * (w1 @ b3)
        later = weights.flip(-1).cumsum(-1).flip(-1)                            # sum_(s>=r) w_s
        c = later[..., 1:]                                                      # (B, K, S)
        summed = 0
        for c_r in c.unsqueeze(-1).unbind(2):                                   # (B, K, 1), step by step
            h = torch.addmm(second.bias, torch.tanh(u), w2.T).tanh_()           # (B, H)
            summed = summed + c_r * h[:, None]                                  # (B, K, H)
            u = torch.addmm(u, h, step_matrix).add_(step_bias)
        moved = summed @ w3.T + c.sum(-1, keepdim=True) * b3                    # (B, K, dim)
        return later[..., :1] * z0[:, None, :] + dt * moved

    @torch.no_grad()
    def settle(self):
        """Singular vectors by SVD instead of the power iteration, so that the saved norms are exact to round-off."""
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                weight = layer.parametrizations.weight
                left, _, right = torch.linalg.svd(weight.original.cpu().double(), full_matrices=False)
                weight[0]._u.copy_(left[:, 0])
                weight[0]._v.copy_(right[0])

    @torch.no_grad()
    def lipschitz_bound(self):
        """Product of the layers' largest singular values, by SVD and not by the power iteration."""
        bound = 1.0
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                bound *= torch.linalg.matrix_norm(layer.weight.detach().cpu().double(), ord=2).item()
        return bound
