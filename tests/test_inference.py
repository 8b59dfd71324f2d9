"""inference.py on a model that the small pipeline trained: known cells, new cells, new genes, bad input."""
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import artifacts
import config
import inference
import run
import simulate
import train_delay
from effendi import Effendi
from effendi_loader import gene_peak_weights

SMALL = ["--set", "STAGE1_EPOCHS=1", "--set", "STAGE2_EPOCHS=1", "--set", "VF_EPOCHS=1", "--set", "N_STEPS=20",
         "--set", "ANCHOR_STEPS=150", "--set", "EM_EPOCHS=10", "--set", "BOOTSTRAP=0", "--set", "MEMBERS=1",
         "--set", "CELL_GROUPS=2", "--set", "DEVICE=cpu"]


@pytest.fixture(scope="module", params=["anchored", "specification"])
def trained(request, tmp_path_factory):
    """A folder with train/ (40 of 60 genes) and new/ (other cells, all genes), and a finished run in out/."""
    folder = tmp_path_factory.mktemp(request.param)
    first = simulate.simulate(300, 60, 2, "exp", "deep", 3)
    second = simulate.simulate(200, 60, 2, "exp", "deep", 3, cell_seed=9)
    first.rna[:, :40].copy().write_h5ad(folder / "rna.h5ad")
    first.atac.write_h5ad(folder / "atac.h5ad")
    second.rna[::-1].copy().write_h5ad(folder / "new_rna.h5ad")             # another order of rows than its ATAC
    second.atac.write_h5ad(folder / "new_atac.h5ad")
    before = config.snapshot()
    run.main(["--rna", str(folder / "rna.h5ad"), "--atac", str(folder / "atac.h5ad"), "--out", str(folder / "out"),
              "--set", f"OBJECTIVE={request.param}", *SMALL])
    for name, value in before.items():
        setattr(config, name, value)
    return folder


def infer(folder, out, *args):
    inference.main(["--model", str(folder / "out" / "effendi.pt"), "--out", str(out), "--set", "DEVICE=cpu", *args])
    return artifacts.load_table("inference_tau.csv"), anndata.read_h5ad(artifacts.path("inference.h5ad"))


def test_the_training_cells_get_what_training_gave_them(trained, tmp_path):
    table, cells = infer(trained, tmp_path, "--rna", str(trained / "rna.h5ad"), "--atac", str(trained / "atac.h5ad"))
    before = anndata.read_h5ad(trained / "out" / "effendi.h5ad")[cells.obs_names, cells.var_names]
    # The stored encoder sees the cells in other blocks: sums in another order.
    np.testing.assert_allclose(cells.layers["tau"], before.layers["tau"], rtol=1e-4)
    np.testing.assert_allclose(cells.layers["y_hat"], before.layers["y_hat"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(cells.obsm["z_A"], before.obsm["z_A"], rtol=1e-3, atol=1e-3)


def test_new_cells_need_no_rna(trained, tmp_path):
    table, cells = infer(trained, tmp_path, "--atac", str(trained / "new_atac.h5ad"))
    assert cells.shape == (200, 40) and np.isfinite(cells.layers["tau"]).all() and "spearman" not in table
    with_rna, paired = infer(trained, tmp_path / "b", "--atac", str(trained / "new_atac.h5ad"),
                             "--rna", str(trained / "new_rna.h5ad"))
    # RNA is compared with, never used: the same cells get the same delays with and without it.
    np.testing.assert_allclose(paired[cells.obs_names].layers["tau"], cells.layers["tau"], rtol=1e-6)
    assert with_rna["spearman"].notna().any()


def test_new_genes_get_delays_and_leave_the_old_ones_alone(trained, tmp_path):
    args = ("--atac", str(trained / "new_atac.h5ad"), "--rna", str(trained / "new_rna.h5ad"))
    table, cells = infer(trained, tmp_path, *args, "--new-genes")
    without, _ = infer(trained, tmp_path / "b", *args)
    assert list(table["trained"]) == [True] * 40 + [False] * 20 and (table["tau"] > 0).all()
    judged = pd.read_csv(trained / "out" / "gene_tau_estimates.csv", index_col="gene").loc[table.index[:40]]
    columns = ["tau_low", "tau_high", "identifiable"]       # of a trained gene as training found them
    pd.testing.assert_frame_equal(table[columns][:40].astype(judged[columns].dtypes), judged[columns], rtol=1e-5)
    assert table["identifiable"][40:].isna().all()
    assert table["tau_low"].isna().all()                    # 300 cells and 10 epochs: the gate is closed
    if "specification" not in str(trained):                 # there tau_bar and the grid depend on all genes
        np.testing.assert_allclose(table["tau"][:40], without["tau"], rtol=1e-6)
        np.testing.assert_allclose(table["spearman"][:40], without["spearman"], rtol=1e-6)
    assert np.isfinite(cells.layers["y_hat"]).all() and cells.layers["y_hat"][:, 40:].std() > 0


def test_new_genes_get_intervals_where_the_gate_is_open_and_they_have_accessibility(trained, tmp_path):
    if "specification" in str(trained):
        pytest.skip("gives no intervals")
    saved = torch.load(trained / "out" / "effendi.pt", weights_only=True)
    saved["judged"] |= dict(tau_low=torch.full((40,), 0.5), tau_high=torch.full((40,), 2.0))    # as if it were open
    torch.save(saved, tmp_path / "open.pt")
    atac = anndata.read_h5ad(trained / "new_atac.h5ad")
    rna = anndata.read_h5ad(trained / "new_rna.h5ad")
    new = rna.var_names[40]
    near = ((atac.var["start"] - rna.var.loc[new, "start"]).abs() < 120_000) & (atac.var["chrom"]
                                                                               == rna.var.loc[new, "chrom"])
    x = atac.X.toarray()
    x[:, near.to_numpy()] = 0
    atac.X = sp.csr_matrix(x)
    atac.write_h5ad(tmp_path / "closed.h5ad")
    table, cells = infer(trained, tmp_path, "--atac", str(tmp_path / "closed.h5ad"),
                         "--rna", str(trained / "new_rna.h5ad"), "--new-genes", "--model", str(tmp_path / "open.pt"))
    assert table.loc[new, ["tau_low", "tau_high"]].isna().all() and table.loc[new, "tau"] > 0
    rest = table.loc[rna.var_names[50:]]
    assert (rest["tau_low"] < rest["tau"]).all() and (rest["tau"] < rest["tau_high"]).all()
    assert np.isfinite(cells.layers["y_hat"]).all()


def test_known_genes_keep_the_peaks_of_training_and_new_ones_take_the_nearest():
    sim = simulate.simulate(5, 60, seed=1, spacing=25_000)
    genes, peaks = sim.rna.var, sim.atac.var
    known, new = genes[::2], genes[1::2]
    data = inference.NewData.__new__(inference.NewData)
    data.saved = dict(positions=train_delay.positions(known), gene_window=[100_000, 50_000.0])
    data.atac, data.rna = SimpleNamespace(features=peaks), SimpleNamespace(features=genes[3:])      # lacks known ones
    found = data.peak_weights([*new.index[1:], *known.index]).toarray()
    as_trained = gene_peak_weights(peaks, known, 100_000, 50_000.0).toarray()
    np.testing.assert_array_equal(found[:, len(new) - 1:], as_trained)
    both = gene_peak_weights(peaks, pd.concat([known, new[1:]]), 100_000, 50_000.0).toarray()
    np.testing.assert_array_equal(found[:, :len(new) - 1], both[:, len(known):])
    assert (as_trained > both[:, :len(known)]).any()        # it does matter here


def test_peaks_of_new_genes_are_weighed_if_those_of_training_were(trained, tmp_path):
    if "specification" in str(trained):
        pytest.skip("knows no peaks")
    args = ("--atac", str(trained / "new_atac.h5ad"), "--rna", str(trained / "new_rna.h5ad"), "--new-genes")
    saved = torch.load(trained / "out" / "effendi.pt", weights_only=True)
    torch.save(saved | {"peaks_per_gene": 0}, tmp_path / "whole.pt")
    weighed, whole = (infer(trained, tmp_path / str(k), *args, *more)[0].tau for k, more in enumerate(
        ((), ("--model", str(tmp_path / "whole.pt")))))
    assert saved["peaks_per_gene"] == config.PEAKS_PER_GENE and (weighed[:40] == whole[:40]).all()
    assert (weighed[40:] != whole[40:]).mean() > 0.5


@pytest.mark.parametrize("args,message", [
    ([], "no new cells"),
    (["--atac", "A", "--new-genes"], "needs the RNA"),
    (["--atac", "nowhere.h5ad"], "nowhere.h5ad not found"),
    (["--atac", "FEW"], "lacks .* of the .* peaks")])
def test_bad_input_ends_with_status_2_and_writes_nothing(trained, tmp_path, capsys, args, message):
    few = anndata.read_h5ad(trained / "new_atac.h5ad")
    few[:, :20].copy().write_h5ad(tmp_path / "few.h5ad")
    known = {"A": str(trained / "new_atac.h5ad"), "FEW": str(tmp_path / "few.h5ad")}
    with pytest.raises(SystemExit) as stop:
        config.script(lambda: inference.main(["--model", str(trained / "out" / "effendi.pt"), "--out",
                                              str(tmp_path / "new"), *(known.get(a, a) for a in args)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and pd.Series([error]).str.contains(message).all() and "Traceback" not in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("make,message", [
    (lambda path, saved: path.write_bytes(b"not a model"), "not a weights file"),
    (lambda path, saved: torch.save({"args": {}}, path), "not an effendi.pt"),
    (lambda path, saved: torch.save(dict(saved, args=Effendi(dim=32).args, objective="specification"), path),
     "another architecture"),
    (lambda path, saved: None, "not found")])
def test_a_model_file_of_another_kind_is_refused(trained, tmp_path, make, message):
    path = tmp_path / "effendi.pt"
    make(path, torch.load(trained / "out" / "effendi.pt", weights_only=True))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        inference.load_effendi(path)


def test_the_reversed_flow_returns_to_where_it_came_from():
    torch.manual_seed(0)
    model = Effendi(in_dim=6, dim=12, vf_hidden=16).eval()
    z_A = torch.randn(20, 12)
    z_R = model.field.flow(z_A, 0.7, 400)
    back, exploded = inference.reverse_ode(model, z_R, 0.7, n_steps=400)
    assert (back - z_A).abs().max() < 1e-2 and not exploded.any()           # Euler is first order in 1/400


def test_states_that_explode_are_flagged():
    class Field:
        def flow(self, z, t, n):
            return z * torch.tensor([1.0, 1e3, float("nan")])[:, None]
    class Model:
        field = Field()
    _, exploded = inference.reverse_ode(Model(), torch.ones(3, 4), 1.0, explode_norm=50)
    assert exploded.tolist() == [False, True, True]


def test_delays_from_rna_alone_go_through_the_reversed_flow():
    torch.manual_seed(0)
    model = Effendi(in_dim=6, dim=12, vf_hidden=16).eval()
    z_R, gene_emb = torch.randn(5, 12), torch.randn(9, 12)
    tau, exploded = inference.scRNA_to_tau(model, z_R, gene_emb)
    z_A, _ = inference.reverse_ode(model, z_R, model.tau_predictor(None, gene_emb).median())
    torch.testing.assert_close(tau, model.tau_predictor(z_A, gene_emb))
    assert tau.shape == (5, 9) and not exploded.any()
