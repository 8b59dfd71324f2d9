"""New cells through a stored encoder: the same numbers as in Stage 0, by name, or a refusal."""
import numpy as np
import pytest
import real_encoders
import scipy.sparse as sp
from test_hyenadna_encoder import cells_and_peaks

import artifacts
import config
import effendi_loader
import embed_cells
import hyenadna_encoder
import precompute_embeddings as pre

KINDS = {"pca": ("rna", "RNA_ENCODER"), "scgpt": ("rna", "RNA_ENCODER"),
         "lsi": ("atac", "ATAC_ENCODER"), "hyenadna": ("atac", "ATAC_ENCODER")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return real_encoders.make(tmp_path_factory.mktemp("real"))


def embedded(files, out, encoder):
    """(embedding of Stage 0, stored encoder) of the simulated cells."""
    modality, setting = KINDS[encoder]
    pre.main([modality, *real_encoders.arguments(files, out), "--set", f"{setting}={encoder}",
              "--set", "DIM=32" if encoder == "scgpt" else "DIM=64",
              "--set", f"HYENADNA_D_MODEL={32 if encoder == 'hyenadna' else 64}"])
    return (artifacts.load_array(f"effendi_{modality}_emb.npy", (None, None)),
            artifacts.load_model(f"{modality}_encoder.pt"))


def transform(data, folder, modality, encoder):
    path = folder / "new.h5ad"
    data.write_h5ad(path)
    one = {"rna": embed_cells.transform_rna, "atac": embed_cells.transform_atac}[modality]
    return one(effendi_loader.open_counts(path, modality), encoder)


@pytest.mark.parametrize("name", KINDS)
def test_the_training_cells_get_their_embedding_again_whatever_the_order_of_rows_and_columns(files, tmp_path, name):
    z, encoder = embedded(files, tmp_path / "out", name)
    modality, _ = KINDS[name]
    data, rng = files["data"].rna if modality == "rna" else files["data"].atac, np.random.default_rng(0)
    cells, features = rng.permutation(data.n_obs), rng.permutation(data.n_vars)
    again = transform(data[cells][:, features].copy(), tmp_path, modality, encoder)
    assert again.dtype == np.float32
    np.testing.assert_allclose(again, z[cells], atol=2e-5 * np.abs(z).max())    # float32 sums in another order


def test_missing_peaks_count_as_zero_and_are_named_but_not_too_many_of_them(files, tmp_path, capsys):
    _, encoder = embedded(files, tmp_path / "out", "hyenadna")
    data, lost = files["data"].atac, encoder["peaks"][:3]
    zeroed = data.copy()
    zeroed.X = sp.csr_matrix(zeroed.X.multiply(~np.isin(data.var_names, lost)))
    want = transform(zeroed, tmp_path, "atac", encoder)
    capsys.readouterr()
    got = transform(data[:, ~np.isin(data.var_names, lost)].copy(), tmp_path, "atac", encoder)
    assert "lacks 3 of the 40 peaks" in capsys.readouterr().out
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="on the peaks of the training data"):
        transform(data[:, ~np.isin(data.var_names, encoder["peaks"][:30])].copy(), tmp_path, "atac", encoder)


def test_another_scgpt_than_the_one_of_training_is_refused(files, tmp_path):
    _, encoder = embedded(files, tmp_path / "out", "scgpt")
    config.SCGPT_MODEL_DIR = str(real_encoders.write_folder(tmp_path / "other", seed=5, genes=encoder["genes"]))
    with pytest.raises(ValueError, match="not the scGPT with which the training cells"):
        transform(files["data"].rna, tmp_path, "rna", encoder)


def test_fit_and_transform_together_are_the_cell_embeddings_of_hyenadna():
    x, peaks = cells_and_peaks(n=200)
    x = x.tolil()
    x[4] = 0
    blocks = [x.tocsr()[:70], x.tocsr()[70:]]
    encoder = embed_cells.fit_peak_means(lambda: blocks, peaks, map(str, range(80)))
    z = np.vstack([embed_cells.block_transform(encoder)(block, None, None) for block in blocks])
    want = hyenadna_encoder.cell_embeddings(lambda: blocks, peaks)
    np.testing.assert_allclose(z, want, atol=1e-5 * np.abs(want).max())         # float32 inside
    assert not z[4].any()
