import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config

ROOT = Path(__file__).resolve().parents[1]
SPECIFIED = dict(DIM=512, HYENADNA_D_MODEL=256, ALIGN_HIDDEN=512, TAU_HIDDEN=128, TAU_MOD_SCALE=0.1, DEC_HIDDEN=256,
                 N_PROJ_W2=200, VF_EPOCHS=50, VF_LR=1e-3, STAGE1_EPOCHS=10, STAGE2_EPOCHS=40, STAGE1_LR=1e-3,
                 STAGE2_LR_VF=1e-6, BATCH_SIZE=128, W_ODE=1.0, W_RECON=0.5, W_TAU=0.01, W_REVERSE=0.1,
                 EXPLODE_NORM=50.0, SCGPT_MAX_SEQ_LEN=None, SCGPT_USE_FAST_TRANSFORMER=False,
                 HYENADNA_BATCH_SIZE=None, ATAC_TOP_PEAKS=None)


def test_the_specified_settings_have_their_specified_defaults():
    assert {name: getattr(config, name) for name in SPECIFIED} == SPECIFIED


@pytest.mark.parametrize("name,text,value", [
    ("VF_EPOCHS", "5", 5), ("VF_LR", "1", 1.0), ("VF_LR", "3e-4", 3e-4), ("ATAC_TOP_PEAKS", "None", None),
    ("ATAC_TOP_PEAKS", "20000", 20000), ("DEVICE", "cpu", "cpu"), ("OUT_DIR", "2026", "2026"), ("DEBUG", "True", True)])
def test_an_override_takes_the_declared_type(name, text, value):
    config.override(name, text)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


@pytest.mark.parametrize("name,text", [("OBJECTIVE", "anchor"), ("KERNEL", "foo"), ("VF_EPOCHS", "5.5"),
                                       ("VF_EPOCHS", "many"), ("VF_LR", "None"), ("DEBUG", "1")])
def test_a_value_of_another_type_is_refused_by_name(name, text):
    with pytest.raises(ValueError, match=name):
        config.override(name, text)


@pytest.mark.parametrize("name,text,value", [
    ("CELL_GROUPS", "0", None), ("ANCHOR_STEPS", "-1", None), ("VF_LR", "0", None), ("HELD_OUT", "10", None),
    ("BOOTSTRAP", "0", 0), ("SEED", "0", 0), ("HELD_OUT", "0.2", 0.2)])
def test_a_number_that_cannot_be_meant_is_refused(name, text, value):
    if value is None:
        with pytest.raises(ValueError, match=f"{name}='{text}': give a"):
            config.override(name, text)
    else:
        config.override(name, text)
        assert getattr(config, name) == value


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="VF_EPOCH .*did you mean VF_EPOCHS"):
        config.override("VF_EPOCH", "5")


def test_set_wins_over_the_environment_and_both_over_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFENDI_VF_EPOCHS", "7")
    monkeypatch.setenv("EFFENDI_BATCH_SIZE", "32")
    config.from_args("doc", ["--set", "VF_EPOCHS=5", "--out", str(tmp_path)])
    assert (config.VF_EPOCHS, config.BATCH_SIZE, config.OUT_DIR) == (5, 32, str(tmp_path))


def test_a_wrong_setting_ends_a_script_with_status_2_and_no_traceback():
    done = subprocess.run([sys.executable, "train_vf.py", "--set", "VF_EPOHCS=5"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "did you mean VF_EPOCHS" in done.stderr and "Traceback" not in done.stderr


def test_the_identifiable_model_is_fitted_on_a_gpu_only_when_asked_to(settings):
    for settings.DEVICE in (None, "cpu", "mps"):
        assert config.fit_device() == torch.device("cpu")
    settings.DEVICE = "cuda:77"                             # is asked for, and is not there
    with pytest.raises(ValueError, match="cuda:77"):
        config.fit_device()


def test_processes_that_share_a_gpu_are_two_unless_set(settings):
    settings.THREADS = 8
    assert [config.processes(20, torch.device(d)) for d in ("cpu", "cuda")] == [8, 2]
    settings.WORKERS = 3
    assert config.processes(20, torch.device("cuda")) == 3
    settings.WORKERS, settings.THREADS = None, 1
    assert config.processes(20, torch.device("cuda")) == 1


def test_memory_of_a_gpu_that_runs_out_is_told_without_a_traceback(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(SystemExit) as end:
        config.script(main)
    assert end.value.code == 2 and "WORKERS=1" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        config.script(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_a_device_that_is_not_there_is_named():
    config.DEVICE = "quantum"
    with pytest.raises(ValueError, match="quantum"):
        config.pick_device()
