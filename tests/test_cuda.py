"""The same on an NVIDIA GPU as on the CPU: the fits, the encoders, the specification's training, the whole pipeline."""
import math

import numpy as np
import pytest
import test_anchored
import test_hyenadna_encoder
import test_scgpt_encoder
import test_train_delay
import torch
from test_inference import SMALL

import anchored
import artifacts
import chromatin
import config
import delay_fit
import hyenadna_encoder
import inference
import run
import train_delay
import train_vf

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
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


def test_what_delays_are_worth_is_judged_the_same(data):
    x, access, counts, emb, _ = data
    rng = torch.Generator().manual_seed(0)
    result = anchored.fit(x, access, counts, emb, rng, kernel="exp", members=1, steps=400)
    (ok, why), (ok_gpu, why_gpu) = (anchored.identifiable(result, access, counts, device=d) for d in ("cpu", DEVICE))
    assert (ok == ok_gpu).float().mean() > 0.95 and set(why_gpu) <= set(why) | {"another gene's chromatin as good"}


def test_the_specification_trains_alike_and_repeats_itself(tiny):
    def fit(device):
        data = test_train_delay.data()
        stage1, curve = train_vf.fit(data["z_atac"], data["z_R"], torch.device(device), 0)
        model, history = train_delay.fit(data, stage1.align.cpu().state_dict(), stage1.field.cpu().state_dict(),
                                         torch.device(device), 0)
        return model, [*curve, *history]
    tiny.VF_EPOCHS, tiny.DEVICE = 2, DEVICE
    config.pick_device()                                    # which asks for repeatable sums
    (_, on_cpu), (gpu, on_gpu), (again, _) = fit("cpu"), fit(DEVICE), fit(DEVICE)
    assert equal(gpu.cpu(), again.cpu())
    for a, b in zip(on_cpu, on_gpu, strict=True):           # dropout draws differ
        for name in ("sw2", "total", "ode", "recon"):
            assert name not in a or math.isclose(a[name], b[name], rel_tol=0.2), (name, a[name], b[name])


@pytest.mark.parametrize("layout", ["flash", "stock"])
def test_scgpt_embeds_cells_as_on_the_cpu(tmp_path, layout):
    folder, cells = test_scgpt_encoder.write_folder(tmp_path / "model", layout), test_scgpt_encoder.cells(40)
    cpu = test_scgpt_encoder.encode(cells, folder)
    for options in ({}, dict(use_fast_transformer=True), dict(dtype="bfloat16")):
        gpu = test_scgpt_encoder.encode(cells, folder, **dict(dict(device=DEVICE), **options))
        cosine = (cpu * gpu).sum(1) / np.linalg.norm(cpu, axis=1) / np.linalg.norm(gpu, axis=1)
        assert cosine.min() > (0.999 if "dtype" in options else 1 - 1e-5)       # 8 bits of mantissa; round-off


def test_hyenadna_embeds_sequences_as_on_the_cpu(tmp_path, settings):
    settings.HYENADNA_D_MODEL = test_hyenadna_encoder.SMALL["d_model"]
    test_hyenadna_encoder.write_hf(tmp_path / "model")
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGTN"), n)) for n in (1, 7, 64, 500, 501, 1000)]
    cpu, gpu = (hyenadna_encoder.encode_sequences(
        sequences, hyenadna_encoder.load_model(tmp_path / "model"), device=d, dtype=torch.float32)
        for d in ("cpu", DEVICE))
    np.testing.assert_allclose(np.asarray(gpu), np.asarray(cpu), rtol=1e-3, atol=1e-4)      # FFTs of another library


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
