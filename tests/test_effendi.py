import pytest
import torch
import torch.nn.functional as F

from align_mlp import AlignMLP
from effendi import AmortizedTauPredictor, Effendi, GeneDecoder, delay_losses
from vector_field import EffendiVectorField


def small(seed=0, **changed):
    torch.manual_seed(seed)
    model = Effendi(**dict(dict(in_dim=6, dim=12, align_hidden=16, vf_hidden=10, tau_hidden=8, dec_hidden=9,
                                n_steps=20), **changed))
    model.field.settle()
    return model


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def materialised(model, z_atac, gene_emb):
    """The specification read literally: the whole path, then (B, G, D) hidden states, then their mean."""
    z_A = model.align(z_atac)
    tau = model.tau_predictor(z_A, gene_emb)
    path = model.field.integrate(z_A, tau.max().detach(), model.n_steps)
    position = tau / tau.max().detach() * model.n_steps
    lower = position.detach().floor().long().clamp(max=model.n_steps - 1)
    share = (position - lower)[..., None]
    cells = torch.arange(len(z_A))[:, None]
    hidden = path[lower, cells] * (1 - share) + path[lower + 1, cells] * share
    return tau, model.decoder(hidden, gene_emb)


def test_the_model_equals_the_specification_read_literally_in_value_and_gradient():
    model, z_atac, gene_emb = small().eval(), randn(7, 6), randn(30, 12, seed=2)
    out = model(z_atac, gene_emb)
    tau, y_hat = materialised(model, z_atac, gene_emb)
    torch.testing.assert_close(out["tau"], tau)
    torch.testing.assert_close(out["y_hat"], y_hat, rtol=1e-5, atol=1e-6)           # float32 sums in another order
    want = torch.autograd.grad(y_hat.square().sum(), list(model.parameters()), allow_unused=True)
    got = torch.autograd.grad(out["y_hat"].square().sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_integrated_state_is_the_flow_at_the_median_delay():
    model, z_atac, gene_emb = small(n_steps=400).eval(), randn(5, 6), randn(9, 12, seed=2)
    out = model(z_atac, gene_emb)
    assert out["tau_bar"] == out["tau"].median()
    exact = model.field.flow(out["z_A"], out["tau_bar"], 400)
    torch.testing.assert_close(out["z_integrated"], exact, rtol=0, atol=2e-3)       # two Euler grids differ by O(dt)


def test_permuting_the_delays_over_genes_changes_nothing_under_the_pooled_decoder():
    """Why the specification alone cannot determine tau: the decoder averages over genes before it decodes."""
    decoder, hidden, gene_emb = GeneDecoder(12, 9).eval(), randn(4, 30, 12), randn(30, 12, seed=2)
    torch.testing.assert_close(decoder(hidden, gene_emb), decoder(hidden.flip(1), gene_emb))


def test_global_mode_gives_one_positive_delay_per_gene_and_cell_mode_one_per_cell_and_gene():
    torch.manual_seed(0)
    head, gene_emb, z_A = AmortizedTauPredictor(8, z_dim=12, gene_dim=12).eval(), randn(30, 12), randn(5, 12, seed=3)
    base, tau = head(None, gene_emb), head(z_A, gene_emb)
    assert base.shape == (30,) and tau.shape == (5, 30)
    assert (base > 0).all() and (tau > 0).all()
    delta = 0.1 * (0.1 * head.cell_mod(z_A)) @ gene_emb.T
    torch.testing.assert_close(tau, F.softplus(base + delta) + 1e-3)


def test_every_parameter_exists_before_the_first_forward_and_receives_a_gradient():
    model = small().train()
    names = [name for name, _ in model.named_parameters()]
    out = model(randn(7, 6), randn(30, 12, seed=2))
    losses = delay_losses(model, out, randn(7, 12, seed=3), torch.rand(7, 30), n_steps_back=5)
    sum(losses.values()).backward()
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_losses_are_the_specified_means():
    model = small().eval()
    out = model(randn(7, 6), randn(30, 12, seed=2))
    z_R, expression = randn(7, 12, seed=3), torch.rand(7, 30)
    losses = delay_losses(model, out, z_R, expression, n_steps_back=5)
    torch.testing.assert_close(losses["ode"], F.mse_loss(out["z_integrated"], z_R))
    torch.testing.assert_close(losses["recon"], F.mse_loss(out["y_hat"], expression))
    torch.testing.assert_close(losses["tau"], out["tau"].mean())
    back = model.field.flow(out["z_integrated"], -out["tau_bar"], 5)
    torch.testing.assert_close(losses["reverse"], F.mse_loss(back, out["z_A"]))


def test_expression_never_reaches_the_ode():
    model = small().eval()
    z_R, expression = randn(7, 12, seed=3).requires_grad_(), torch.rand(7, 30).requires_grad_()
    out = model(randn(7, 6), randn(30, 12, seed=2))
    assert not any(torch.autograd.grad(out["z_integrated"].sum(), [z_R, expression], retain_graph=True,
                                       allow_unused=True))
    delay_losses(model, out, z_R, expression, 5)["ode"].backward()
    assert z_R.grad.abs().sum() > 0                         # it does supervise


def test_a_model_rebuilt_from_its_arguments_and_weights_gives_identical_output():
    model = small(seed=4).eval()
    again = Effendi(**model.args)
    again.load_state_dict(model.state_dict())
    z_atac, gene_emb = randn(7, 6), randn(30, 12, seed=2)
    assert torch.equal(model(z_atac, gene_emb)["y_hat"], again.eval()(z_atac, gene_emb)["y_hat"])


@pytest.mark.parametrize("module,shape", [(AlignMLP(), (3, 256)), (EffendiVectorField(), (3, 512))])
def test_the_default_shapes_are_the_specified_ones(module, shape):
    assert module(torch.zeros(shape)).shape == (3, 512)
