"""The same on an NVIDIA GPU as on the CPU: the fits, the encoders, the specification's training, the whole pipeline.

Without a GPU two tests are left: marked tensors stand in for those of a GPU, and meta tensors for their moves.
"""
import copy
import math
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import test_anchored
import test_hyenadna_encoder
import test_scgpt_encoder
import test_train_delay
import torch
from test_inference import SMALL
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

import anchored
import artifacts
import chromatin
import delay_fit
import hyenadna_encoder
import inference
import run
import train_delay
import train_vf

DEVICE = "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
tiny = test_train_delay.tiny                                # a fixture


@pytest.fixture(scope="module")
def data():
    return test_anchored.population()


@pytest.fixture(scope="module")
def anchor(data):
    x, access, _, emb, _ = data
    return chromatin.fit_anchor(x, access, emb, torch.Generator().manual_seed(0))


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- without a GPU -------------------------------------------------------------------------------------------------

ELSEWHERE = torch.device("meta")                            # what marked tensors call their device


class Marked(torch.Tensor):
    """A tensor of the CPU that passes for one of a GPU."""


class TwoDevices(TorchFunctionMode):
    """Marked tensors and others do not mix, as on a GPU, but for single numbers and the indices of marked ones."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = [t for t in _pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        if name == "__get__":
            asked = func == torch.Tensor.device.__get__ and isinstance(args[0], Marked)
            return ELSEWHERE if asked else func(*args, **kwargs)
        if name == "cpu":
            return args[0].as_subclass(torch.Tensor)
        if name == "to" and any(isinstance(a, (torch.device, str, torch.Tensor)) for a in args[1:]):
            like = args[1]
            there = like == ELSEWHERE if isinstance(like, torch.device) else isinstance(like, Marked)
            dtype = like.dtype if torch.is_tensor(like) else args[0].dtype
            return args[0].as_subclass(torch.Tensor).to(dtype).as_subclass(Marked if there else torch.Tensor)
        if kwargs.get("device") == ELSEWHERE:
            return func(*args, **kwargs | {"device": "cpu"}).as_subclass(Marked)
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], Marked):
            tensors = [t for t in (args[0], *args[2:]) if torch.is_tensor(t)]
        marked = {isinstance(t, Marked) for t in tensors if t.dim() or isinstance(t, Marked)}
        if len(marked) > 1 or name == "numpy" and True in marked:
            raise RuntimeError(f"{name} of tensors on two devices: {[(type(t), t.shape) for t in tensors]}")
        return func(*args, **kwargs)


def mark(thing):
    """chromatin.on for the device that is not there."""
    if torch.is_tensor(thing):
        return thing.detach().clone().as_subclass(Marked)
    if isinstance(thing, torch.nn.Module):
        new = copy.deepcopy(thing)
        for module in new.modules():
            for name, value in module._parameters.items():
                module._parameters[name] = torch.nn.Parameter(mark(value), requires_grad=value.requires_grad)
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else mark(value)
        return new
    if isinstance(thing, dict):
        return {name: mark(value) for name, value in thing.items()}
    if is_dataclass(thing):
        return replace(thing, **{field.name: mark(getattr(thing, field.name)) for field in fields(thing)})
    return thing


def test_every_tensor_of_the_e_steps_lies_where_the_cells_are():
    x, access, counts, emb, peaks, _ = test_anchored.split_peaks(0.5, 0, cells=300)
    anchor = chromatin.fit_anchor(x, access, emb, torch.Generator().manual_seed(0), steps=50, peaks=peaks)
    delay = delay_fit.fit_delay(anchor, access, counts, torch.Generator().manual_seed(0), "exp", epochs=9)
    rng, there, n = torch.Generator().manual_seed(0), mark(anchor), len(emb)
    found = mark(dict(field=delay.field, log_tau=delay.log_tau, A=delay.A, B=delay.B, prior=torch.zeros(n),
                      readout=delay.followed(anchor.readout), peak_weight=delay.peak_weight, peak_sd=delay.peak_sd,
                      held_out=delay.held_out))
    with TwoDevices(), torch.no_grad():
        em = delay_fit._EM.of(there, access, counts, rng)
        flow = delay_fit._Flow(kernel="exp", D=em.readout, z=em.z, given_atac=em.given_atac, **found)
        assert isinstance(em.counts, Marked) and isinstance(em.e_step(flow).log_tau, Marked)
        assert isinstance(em.weigh(flow).readout.delta, Marked)
        refined = em.refined(flow)
        assert isinstance(refined.D.delta, Marked) and isinstance(refined.z, Marked)
        assert isinstance(em.describe(flow, rng).log_tau, Marked)
        lead = delay_fit.chromatin_lead(there, mark(delay), access, counts, rng, others=1, device=ELSEWHERE)
        assert not isinstance(lead, Marked)
        for wrong in (lambda: flow.log_tau + torch.zeros(n), lambda: torch.zeros(n)[there.peaks.gene]):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()                                     # the stand-in would notice


def test_what_is_put_on_a_device_is_there_and_what_it_was_made_from_stays(anchor):
    there = chromatin.on("meta", anchor)
    assert there.z.is_meta and there.seen.counts.is_meta and there.readout.delta.is_meta
    assert chromatin.on("cpu", anchor).align is anchor.align and there.align is not anchor.align
    assert not any(t.is_meta for t in (anchor.z, anchor.seen.counts, anchor.readout.delta))


# --- on a GPU ------------------------------------------------------------------------------------------------------

@needs_gpu
def test_the_evidence_of_delays_is_that_of_the_cpu(data, anchor):
    _, _, counts, _, _ = data
    both = []
    for device in ("cpu", DEVICE):
        there, field = chromatin.on(device, anchor), delay_fit.Still()
        states = delay_fit.path(field, there.readout.landmarks)
        seen = torch.from_numpy(counts).to(device)
        mean = seen.mean(0)
        near = there.readout.near(there.z)
        counted, exposure = near.T @ seen, near.sum(0)
        now = there.readout(there.readout.landmarks)
        evidence = delay_fit.grid_evidence(
            states, there.readout, counted, exposure, mean, "exp", now, delay_fit.Residual(there.readout, there.seen),
            torch.zeros_like(mean), 1.0)
        like, a, b = delay_fit.grid_likelihood(states, there.readout, counted, exposure, mean, "exp")
        both.append([part.cpu() for part in (evidence, like - like.amax(1, keepdim=True), a, b)])
    for cpu, gpu in zip(*both):                             # sums of float32 products in another order
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=2e-3)


@needs_gpu
def test_delays_are_those_of_the_cpu_up_to_what_another_seed_changes(data, anchor):
    x, access, counts, emb, log_tau = data
    def fit(seed, device):
        return anchored.fit(x, access, counts, emb, torch.Generator().manual_seed(seed), kernel="exp", members=1,
                            device=device)
    cpu, gpu, again = fit(0, "cpu"), fit(0, DEVICE), fit(0, DEVICE)
    assert gpu.log_tau.device.type == "cpu" and gpu.anchors[0].z.device.type == "cpu"
    assert torch.equal(gpu.log_tau, again.log_tau)          # same seed, same device, same result
    truth = [anchored.spearman(fit.log_tau, log_tau) for fit in (cpu, gpu)]
    assert abs(truth[0] - truth[1]) < 0.1                   # dropout draws differ; seeds alone differ by up to 0.06
    assert anchored.spearman(cpu.log_tau, gpu.log_tau) > 0.8


@needs_gpu
def test_what_delays_are_worth_is_judged_the_same(data):
    x, access, counts, emb, _ = data
    rng = torch.Generator().manual_seed(0)
    result = anchored.fit(x, access, counts, emb, rng, kernel="exp", members=1, steps=400)
    (ok, why), (ok_gpu, why_gpu) = (anchored.identifiable(result, access, counts, device=d) for d in ("cpu", DEVICE))
    assert (ok == ok_gpu).float().mean() > 0.95 and np.mean([a == b for a, b in zip(why, why_gpu)]) > 0.95


@needs_gpu
def test_the_specification_trains_alike_and_repeats_itself(tiny):
    def fit(device):
        data = test_train_delay.data()
        stage1, curve = train_vf.fit(data["z_atac"], data["z_R"], torch.device(device), 0)
        model, history = train_delay.fit(data, stage1.align.cpu().state_dict(), stage1.field.cpu().state_dict(),
                                         torch.device(device), 0)
        return model, [*curve, *history]
    tiny.VF_EPOCHS = 2
    (_, on_cpu), (gpu, on_gpu), (again, _) = fit("cpu"), fit(DEVICE), fit(DEVICE)
    assert equal(gpu.cpu(), again.cpu())
    for a, b in zip(on_cpu, on_gpu, strict=True):           # dropout draws differ
        names = [name for name in ("sw2", "total", "ode", "recon") if name in a]
        assert names and all(math.isclose(a[name], b[name], rel_tol=0.2) for name in names), (a, b)


@needs_gpu
@pytest.mark.parametrize("layout", ["flash", "stock"])
def test_scgpt_embeds_cells_as_on_the_cpu(tmp_path, layout):
    folder, cells = test_scgpt_encoder.write_folder(tmp_path / "model", layout), test_scgpt_encoder.cells(40)
    cpu = test_scgpt_encoder.encode(cells, folder)
    for options in ({}, dict(use_fast_transformer=True), dict(dtype="bfloat16")):
        gpu = test_scgpt_encoder.encode(cells, folder, **dict(dict(device=DEVICE), **options))
        cosine = (cpu * gpu).sum(1) / np.linalg.norm(cpu, axis=1) / np.linalg.norm(gpu, axis=1)
        assert cosine.min() > (0.999 if "dtype" in options else 1 - 1e-5)       # 8 bits of mantissa; round-off


@needs_gpu
def test_hyenadna_embeds_sequences_as_on_the_cpu(tmp_path, settings):
    settings.HYENADNA_D_MODEL = test_hyenadna_encoder.SMALL["d_model"]
    test_hyenadna_encoder.write_hf(tmp_path / "model")
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGTN"), n)) for n in (1, 7, 64, 500, 501, 1000)]
    cpu, gpu = (hyenadna_encoder.encode_sequences(
        sequences, hyenadna_encoder.load_model(tmp_path / "model"), device=d, dtype=torch.float32)
        for d in ("cpu", DEVICE))
    np.testing.assert_allclose(np.asarray(gpu), np.asarray(cpu), rtol=1e-3, atol=1e-4)      # FFTs of another library


@needs_gpu
@pytest.mark.parametrize("objective", ["anchored", "specification"])
def test_the_whole_pipeline_runs_and_its_model_serves_a_machine_without_gpu(tmp_path, objective):
    simulated = ["--set", "SIM_CELLS=300", "--set", "SIM_GENES=60", "--set", f"OBJECTIVE={objective}"]
    out = tmp_path / "out"
    run.main(["--out", str(out), *SMALL, *simulated, "--set", f"DEVICE={DEVICE}", "--set", "BOOTSTRAP=2"])
    table = artifacts.load_table("gene_tau_estimates.csv")
    assert np.isfinite(table["tau"]).all()
    atac = next(out.rglob("atac.h5ad"))
    inference.main(["--model", str(out / "effendi.pt"), "--atac", str(atac), "--out", str(tmp_path / "new"),
                    "--set", "DEVICE=cpu"])
    again = artifacts.load_table("inference_tau.csv")
    # tau of a gene, and its mean over cells, from whose states delays may differ
    np.testing.assert_allclose(again["tau"][table.index], table["tau"], rtol=0.02)
