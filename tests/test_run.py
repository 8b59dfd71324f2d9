"""The whole pipeline on a small simulated population: every artifact, skipping, resuming, bad input."""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import artifacts
import config
import report
import run
import simulate
import train_delay
import train_vf

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--set", "SIM_CELLS=240", "--set", "SIM_GENES=60", "--set", "VF_EPOCHS=3", "--set", "STAGE1_EPOCHS=2",
         "--set", "STAGE2_EPOCHS=2", "--set", "BATCH_SIZE=64", "--set", "N_STEPS=20", "--set", "THREADS=1",
         "--set", "DEVICE=cpu", "--set", "ANCHOR_STEPS=60", "--set", "EM_EPOCHS=9", "--set", "BOOTSTRAP=2",
         "--set", "CELL_GROUPS=3", "--set", "WORKERS=1"]
ARTIFACTS = ["effendi_rna_emb.npy", "effendi_rna_obs.pkl", "effendi_atac_emb.npy", "effendi_atac_obs.pkl",
             "peak_embeddings.npy", "gene_embeddings.npy", "align_mlp.pt", "vector_field_frozen.pt",
             "effendi_stage1.pt", "effendi_final.pt", "effendi.pt", "gene_tau_estimates.csv", "effendi.h5ad",
             "gene_peaks.npz", "gene_peaks.csv", "validation.json", "report.html"]
STAGES = {      # the file whose arrival says that the stage before has ended -> the stage that then runs
    None: "simulate", "simulated.txt.json": "rna", "genes.csv.json": "atac", "peaks.csv.json": "genes",
    "gene_embeddings.npy.json": "train_vf", "train_vf_curve.csv.json": "train_delay",
    "gene_tau_estimates.csv.json": "validate", "validation.json.json": "report",
}


@pytest.fixture(params=["anchored", "specification"])
def objective(request):
    return ["--set", f"OBJECTIVE={request.param}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of an uninterrupted run per objective, made on first use."""
    done = {}
    def folder(objective):
        if objective[1] not in done:
            done[objective[1]] = str(tmp_path_factory.mktemp("finished"))
            in_child(objective, done[objective[1]]).join()
        return Path(done[objective[1]])
    return folder


# Children can be killed, and a server that has loaded the modules forks them: quick to start, and free of the threads
# that autograd leaves in this process, with which a plain fork hangs.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run"])


def run_quietly(arguments):
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        run.main(arguments)


def in_child(objective, out):
    child = SERVER.Process(target=run_quietly, args=([*SMALL, *objective, "--out", out],))
    child.start()
    return child


def contents(folder):
    """Every array, tensor and table of a run as numpy arrays or text, by file and name."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".npy":
            found[path.name] = np.load(path)
        elif path.suffix == ".npz":
            config.OUT_DIR = str(folder)
            found[path.name] = artifacts.load_sparse(path.name).toarray()
        elif path.suffix == ".pt":
            found |= {f"{path.name}:{name}": v for name, v in tensors(torch.load(path, weights_only=True))}
        elif path.suffix == ".csv":
            found[path.name] = path.read_text()
        elif path.suffix == ".h5ad":
            cells = anndata.read_h5ad(path)
            found |= {f"{path.name}:{k}": np.asarray(v) for k, v in [*cells.obsm.items(), *cells.layers.items()]}
    return found


def tensors(value, name=""):
    """(name, array) of every tensor in nested dictionaries and lists."""
    if torch.is_tensor(value):
        yield name, value.numpy()
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}.{key}")


def test_every_artifact_of_the_specification_is_written_with_its_record(finished, objective):
    folder = finished(objective)
    config.OUT_DIR = str(folder)
    for name in ARTIFACTS:
        meta = artifacts.record(name)
        assert {"stage", "key", "config", "torch", "bytes"} <= set(meta), name
    assert artifacts.load_array("effendi_rna_emb.npy", (240, 512)).dtype == np.float32
    assert artifacts.load_array("effendi_atac_emb.npy", (240, 256)).shape == (240, 256)
    table = artifacts.load_table("gene_tau_estimates.csv")
    assert {"tau", "tau_low", "tau_high", "cell_sd", "n_cells", "identifiable"} <= set(table.columns)
    cells = anndata.read_h5ad(folder / "effendi.h5ad")
    assert cells.obsm["z_A"].shape == cells.obsm["z_R"].shape == cells.obsm["phi_tau_z_A"].shape == (240, 512)
    assert cells.layers["tau"].shape == cells.layers["y_hat"].shape == (240, len(table))
    np.testing.assert_allclose(cells.var["tau"], table["tau"][cells.var_names], rtol=1e-6)      # float32 in one of them
    assert {"tau_low", "tau_high", "identifiable", "reason"} <= set(cells.var)
    assert cells.uns["effendi"]["meaning"] == artifacts.record("gene_tau_estimates.csv")["meaning"]
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.resume.pt"))


def test_every_check_has_a_verdict_and_what_did_not_run_did_not_pass(finished, objective):
    for c in json.loads((finished(objective) / "validation.json").read_text()):
        assert c["verdict"] in ("pass", "fail", "report") or c["verdict"].startswith("not run: ")
        assert (c["value"] is None) == c["verdict"].startswith("not run")


def test_the_report_names_the_kernel_and_shows_no_table_where_tau_means_nothing(finished, objective):
    folder = finished(objective)
    config.OUT_DIR = str(folder)
    page, training = (folder / "report.html").read_text(), artifacts.record("gene_tau_estimates.csv")
    assert (", held-out cells decide" in page or ", as set" in page) == ("gate_open" in training["metrics"])
    assert not training["metrics"].get("gate_open", False)  # 240 cells
    assert "<th>tau</th>" not in page and "τ means nothing here" in page
    table, checks = artifacts.load_table("gene_tau_estimates.csv"), json.loads((folder / "validation.json").read_text())
    page = report.page(table, checks, {}, {"meaning": "tau is meaningful"})
    assert "<th>tau</th>" in page and "τ means nothing here" not in page


def test_a_second_run_skips_every_stage_and_changes_no_file(finished, objective, capsys):
    folder = finished(objective)
    before = {p.name: (p.stat().st_mtime_ns, artifacts.hash_file(p)) for p in folder.iterdir() if p.is_file()}
    before.pop(".lock")
    run.main([*SMALL, *objective, "--out", str(folder)])
    after = {p.name: (p.stat().st_mtime_ns, artifacts.hash_file(p)) for p in folder.iterdir() if p.is_file()}
    assert {name: after[name] for name in before} == before
    assert capsys.readouterr().out.count("up to date") == len(STAGES)


def test_the_same_seed_gives_the_same_files(finished, objective, tmp_path):
    in_child(objective, str(tmp_path)).join()
    equal(contents(tmp_path), contents(finished(objective)))


def equal(got, want):
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(got[name], value, equal_nan=True), name
        else:
            assert got[name] == value, name


def test_killed_at_a_random_moment_of_every_stage_it_ends_with_the_uninterrupted_tensors(finished, objective, tmp_path):
    whole, draw = finished(objective), random.Random(0)
    seconds = {stage: json.loads((whole / last).read_text()).get("seconds", 1)
               for stage, last in zip(list(STAGES.values()), [*list(STAGES)[1:], "report.html.json"])}
    for signpost, stage in STAGES.items():
        child = in_child(objective, str(tmp_path))
        while signpost and child.is_alive() and not (tmp_path / signpost).exists():
            time.sleep(0.005)
        time.sleep(draw.random() * seconds[stage])
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        nothing_is_half_written(tmp_path)
    child = in_child(objective, str(tmp_path))
    child.join()
    assert child.exitcode == 0
    equal(contents(tmp_path), contents(whole))


def nothing_is_half_written(folder):
    """Whatever has a record is whole; whatever has none is refused by the readers (test_artifacts.py)."""
    config.OUT_DIR = str(folder)
    for meta in folder.glob("*.json"):
        name = meta.name.removesuffix(".json")
        if (folder / name).exists() and meta.with_name(name + ".json") == meta and "." in name:
            assert artifacts.hash_file(folder / name) == artifacts.record(name)["blake2b"], name


def test_changing_a_setting_repeats_the_stages_that_read_it_and_no_other(finished, objective, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    run.main([*SMALL, *objective, *out])
    capsys.readouterr()
    run.main([*SMALL, *objective, *out, "--set", "STAGE2_EPOCHS=1", "--set", "EM_EPOCHS=10"])
    printed = capsys.readouterr().out
    assert "train_vf: up to date" in printed and "train_delay: up to date" not in printed


def test_peaks_count_differently_unless_told_otherwise(finished, tmp_path):
    objective = ["--set", "OBJECTIVE=anchored"]
    config.OUT_DIR = str(finished(objective))
    table = artifacts.load_table("gene_peak_weights.csv")
    assert (table["weight"] - 1).abs().median() > 0.01 and (table["sd"] > 0).mean() > 0.9
    typical = (table["weight"].abs() * table["share"]).groupby(table.index).sum()
    assert typical.between(0.8, 1.25).mean() > 0.9          # 1 by the shares of the landmarks, not of all cells
    run.main([*SMALL, *objective, "--out", str(tmp_path), "--set", "PEAKS_PER_GENE=0"])
    with pytest.raises(ValueError, match="another PEAKS_PER_GENE"):             # Stage 1 has not seen these peaks
        train_delay.main(["--out", str(tmp_path), "--set", "PEAKS_PER_GENE=8"])
    with pytest.raises(ValueError, match="made with PEAKS_PER_GENE=0, not 8"):
        train_vf.main(["--out", str(tmp_path), "--set", "PEAKS_PER_GENE=8"])
    table = artifacts.load_table("gene_peak_weights.csv")
    assert (table["weight"] == 1).all() and table.index.is_unique


def test_refits_over_processes_equal_refits_in_one(finished, tmp_path):
    objective = ["--set", "OBJECTIVE=anchored"]
    run.main([*SMALL, *objective, "--out", str(tmp_path), "--set", "WORKERS=2"])
    equal(contents(tmp_path), contents(finished(objective)))


def test_an_atlas_joins_both_stages(tmp_path, capsys):
    data = tmp_path / "data"
    simulate.write(simulate.simulate(cells=200, genes=60, seed=1, unpaired=80), data)
    files = [f"--{name.replace('_', '-')}={data / name}.h5ad"
             for name in ("rna", "atac", "unpaired_rna", "unpaired_atac")]
    run.main([*SMALL, *files, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "280 of 280 ATAC cells" in printed and "80 cells without ATAC join" in printed
    assert len(artifacts.load_table("gene_tau_estimates.csv")) == 60


def test_two_runs_never_share_a_folder(tmp_path):
    config.OUT_DIR = str(tmp_path)
    lock = run.lock_folder()
    done = script("run.py", *SMALL, "--out", str(tmp_path))
    assert done.returncode == 2 and "another run is writing" in done.stderr
    lock.close()


def script(name, *args):
    return subprocess.run([sys.executable, name, *args], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("args,message", [
    (["--rna", "a.h5ad"], "--atac is missing"),
    (["--atac", "a.h5ad"], "--rna is missing"),
    (["--multiome", "m.h5", "--rna", "a.h5ad"], "either it, or --rna and --atac"),
    (["--unpaired-rna", "a.h5ad"], "Stage 2 needs paired cells"),
    (["--rna", "nowhere.h5ad", "--atac", "nowhere2.h5ad"], "nowhere.h5ad not found")])
def test_inputs_that_cannot_be_meant_end_with_status_2_before_anything_is_written(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        config.script(lambda: run.main([*args, "--out", str(tmp_path / "new")]))
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stage,needs", [
    ("train_vf.py", "effendi_atac_emb.npy"), ("train_delay.py", "effendi_atac_emb.npy"),
    ("validate.py", "effendi.pt"), ("report.py", "gene_tau_estimates.csv")])
def test_a_stage_without_its_input_names_it_and_the_command_that_makes_it(stage, needs, tmp_path):
    done = script(stage, "--out", str(tmp_path / "empty"))
    assert done.returncode == 2 and needs in done.stderr and "Make it with: python" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "empty").exists()


def test_artifacts_of_two_runs_do_not_mix(finished, objective, tmp_path):
    import shutil
    folder = tmp_path / "mixed"
    shutil.copytree(finished(objective), folder)
    config.OUT_DIR = str(folder)
    emb = artifacts.load_array("effendi_rna_emb.npy", (None, 512))
    artifacts.save_array("effendi_rna_emb.npy", emb[::-1], [f"other{i}" for i in range(len(emb))])
    (folder / "effendi.pt.json").unlink()
    done = script("train_delay.py", *SMALL, *objective, "--out", str(folder))
    assert done.returncode == 2 and "do not describe the same rows" in done.stderr


def test_shuffled_truth_is_not_recovered_and_its_control_stands_beside_it(finished, objective):
    checks = json.loads((finished(objective) / "validation.json").read_text())
    row = next(c for c in checks if c["check"] == "recovery of planted delays")
    assert {"shuffled_genes"} <= set(row["control"]) <= {"untrained", "shuffled_genes"}
    truth = pd.read_csv(finished(objective) / "simulated" / "truth.csv", index_col=0)
    assert row["n"] == int((truth["changes"] & truth["has_link"]).sum())
