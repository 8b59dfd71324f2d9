import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import artifacts


class Stop(Exception):
    pass


def test_what_is_saved_is_loaded_and_described():
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    artifacts.save_array("a.npy", array, ["x", "y", "z"], stage="test", key="k")
    assert np.array_equal(artifacts.load_array("a.npy", (None, 2)), array)
    meta = artifacts.record("a.npy")
    assert meta["rows"] == 3 and meta["stage"] == "test" and meta["config"]["SEED"] == 0
    assert meta["ids"] == artifacts.hash_ids(["x", "y", "z"]) != artifacts.hash_ids(["y", "x", "z"])


def test_sparse_tables_and_models_come_back_unchanged():
    matrix = sp.random(5, 4, 0.5, format="csr", random_state=0)
    artifacts.save("m.npz", lambda f: sp.save_npz(f, matrix))
    assert (artifacts.load_sparse("m.npz") != matrix).nnz == 0
    table = pd.DataFrame({"v": [1.5, None]}, index=pd.Index(["007", "NA1"], name="gene"))
    artifacts.save_table("t.csv", table)
    pd.testing.assert_frame_equal(artifacts.load_table("t.csv"), table)
    artifacts.save_model("w.pt", {"args": {"dim": 3}, "state_dict": {"w": torch.ones(2)}})
    assert torch.equal(artifacts.load_model("w.pt")["state_dict"]["w"], torch.ones(2))


def test_a_gene_called_NA_or_nan_keeps_its_name():
    artifacts.save_table("t.csv", pd.DataFrame({"v": [1, 2]}, index=pd.Index(["nan", "NA"], name="gene")))
    assert list(artifacts.load_table("t.csv").index) == ["nan", "NA"]


def test_an_interrupted_write_leaves_the_old_pair():
    artifacts.save_array("a.npy", np.zeros((2, 1)), ["x", "y"], key="old")
    def stopped(file):
        file.write(b"half")
        raise Stop
    with pytest.raises(Stop):
        artifacts.save("a.npy", stopped, key="new")
    assert artifacts.record("a.npy")["key"] == "old"
    assert artifacts.load_array("a.npy", (2, 1)).shape == (2, 1)


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_stop_between_the_two_renames_is_never_read_as_finished(monkeypatch, stop_at):
    artifacts.save_array("a.npy", np.zeros((2, 1)), ["x", "y"], key="old")
    calls, replace = [], artifacts.os.replace
    def stopping(*args):
        calls.append(args)
        if len(calls) == stop_at:
            raise Stop
        replace(*args)
    monkeypatch.setattr(artifacts.os, "replace", stopping)
    with pytest.raises(Stop):
        artifacts.save_array("a.npy", np.ones((2, 1)), ["x", "y"], key="new")
    assert not artifacts.is_done("new", "a.npy")
    with pytest.raises(FileNotFoundError, match="interrupted write"):
        artifacts.load_array("a.npy", (2, 1))


def test_a_missing_artifact_names_the_command_that_makes_it():
    with pytest.raises(FileNotFoundError, match="precompute_embeddings.py atac"):
        artifacts.load_array("effendi_atac_emb.npy", (None, 256))
    with pytest.raises(FileNotFoundError, match="train_vf.py"):
        artifacts.load_model("align_mlp.pt")
    with pytest.raises(FileNotFoundError, match="precompute_embeddings.py genes"):
        artifacts.load_sparse("gene_accessibility.npz")


def test_a_truncated_file_is_refused():
    artifacts.save_array("a.npy", np.zeros((20, 3)), range(20))
    path = artifacts.path("a.npy")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated"):
        artifacts.load_array("a.npy", (20, 3))
    assert not artifacts.is_done(None, "a.npy")


def test_another_shape_is_refused_with_both_shapes():
    artifacts.save_array("a.npy", np.zeros((2, 3)), ["x", "y"])
    with pytest.raises(ValueError, match=r"\(2, 3\), expected \(any, 4\)"):
        artifacts.load_array("a.npy", (None, 4))


def test_joining_files_whose_rows_are_swapped_is_an_error():
    artifacts.save_array("a.npy", np.zeros((2, 1)), ["x", "y"])
    artifacts.save_array("b.npy", np.zeros((2, 1)), ["x", "y"])
    artifacts.save_array("c.npy", np.zeros((2, 1)), ["y", "x"])
    artifacts.same_rows("a.npy", "b.npy")
    with pytest.raises(ValueError, match="c.npy"):
        artifacts.same_rows("a.npy", "b.npy", "c.npy")


def test_the_key_follows_content_and_settings_and_not_time_or_place(tmp_path, settings):
    for name, text in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / name).write_text(text)
    def key(name):
        return artifacts.stage_key("s", {"input": tmp_path / name}, ("VF_EPOCHS",))
    assert key("one") == key("two") != key("three")
    before = key("one")
    settings.DEC_HIDDEN += 1
    assert key("one") == before                             # a setting the stage does not read
    settings.VF_EPOCHS += 1
    assert key("one") != before


def test_a_checkpoint_is_returned_under_its_own_key_only():
    artifacts.save_checkpoint("c.pt", "k1", {"epoch": 3, "w": torch.ones(2)})
    assert artifacts.load_checkpoint("c.pt", "k1")["epoch"] == 3
    assert artifacts.load_checkpoint("c.pt", "k2") is None
    artifacts.drop_checkpoint("c.pt")
    assert artifacts.load_checkpoint("c.pt", "k1") is None


def test_code_in_a_weights_file_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))
    artifacts.save("evil.pt", lambda f: torch.save({"x": Evil()}, f))
    with pytest.raises(ValueError, match="weights_only"):
        artifacts.load_model("evil.pt")
    assert not (tmp_path / "owned").exists()


def test_records_are_plain_json():
    artifacts.save_array("a.npy", np.zeros((1, 1)), ["x"], metrics={"n": np.float32(1.5), "v": np.arange(2)})
    meta = json.loads(artifacts.path("a.npy.json").read_text())
    assert meta["metrics"] == {"n": 1.5, "v": [0, 1]}
