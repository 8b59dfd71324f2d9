"""Stage 0 as a user runs it: what it writes, that it is skipped or repeated rightly, and what it refuses."""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import real_encoders
import scipy.sparse as sp
import torch
from test_scgpt_encoder import write_folder

import artifacts
import config
import hyenadna_encoder
import linear_encoder as le
import precompute_embeddings as pre
import scgpt_encoder

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CELLS, GENES, PEAKS = 120, 30, 90


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    for name, value in config.snapshot().items():
        monkeypatch.setattr(config, name, value)
    monkeypatch.setattr(config, "OUT_DIR", str(tmp_path / "out"))
    monkeypatch.setattr(config, "BLOCK_ROWS", 32)
    monkeypatch.setattr(config, "GENE_DECAY", 5_000.0)                  # the closed forms below assume it
    monkeypatch.setattr(config, "RNA_ENCODER", "pca")
    monkeypatch.setattr(config, "ATAC_ENCODER", "lsi")


def make(kind, cells=CELLS, seed=0, prefix="cell"):
    """Small paired data: genes every 100 kb on chr1, three peaks around each; four kinds of cells."""
    rng = np.random.default_rng(seed)
    features = GENES if kind == "rna" else PEAKS
    profile = np.random.default_rng(9).gamma(0.5, size=(4, features)) + 0.1
    x = sp.csr_matrix(rng.poisson(profile[np.arange(cells) % 4] * rng.lognormal(0, 0.3, (cells, 1))).astype(np.float32))
    x = x.toarray()
    x[:, 0] = 1                                                         # no cell is empty
    obs = pd.DataFrame({"time_h": np.arange(cells) % 3, "kind": pd.Categorical(list("abcd" * cells)[:cells])},
                       index=[f"{prefix}{i}-1" for i in range(cells)])
    at = np.arange(1, GENES + 1) * 100_000
    if kind == "rna":
        var = pd.DataFrame({"chrom": "chr1", "start": at, "end": at + 20_000, "strand": "+"},
                           index=[f"GENE{i}" for i in range(GENES)])
        var.loc["GENE7", ["chrom", "start", "end", "strand"]] = ["", -1, -1, ""]
    else:
        var = pd.DataFrame(index=[f"chr1:{a + d}-{a + d + 500}" for a in at for d in (-200, 9_000, 30_000)])
    return anndata.AnnData(sp.csr_matrix(x), obs, var, uns={"genome": "GRCh38"})


def saved(tmp_path, name, data):
    data.write_h5ad(tmp_path / f"{name}.h5ad")
    return str(tmp_path / f"{name}.h5ad")


def both(tmp_path, rna=None, atac=None):
    return ["--rna", saved(tmp_path, "rna", make("rna") if rna is None else rna),
            "--atac", saved(tmp_path, "atac", make("atac") if atac is None else atac), "--out", str(tmp_path / "out")]


def run_all(arguments):
    for stage in ("rna", "atac", "genes"):
        pre.main([stage, *arguments])


# --- what it writes --------------------------------------------------------------------------------------------------

def test_every_artifact_has_its_shape_and_its_rows(tmp_path):
    run_all(both(tmp_path))
    z = artifacts.load_array("effendi_rna_emb.npy", (CELLS, 512))
    assert z.dtype == np.float32 and not z[:, GENES:].any()
    artifacts.load_array("effendi_atac_emb.npy", (CELLS, 256))
    artifacts.load_array("peak_embeddings.npy", (PEAKS, 256))
    artifacts.load_array("gene_embeddings.npy", (GENES, 512))
    artifacts.same_rows("effendi_rna_emb.npy", "effendi_rna_obs.csv", "gene_expression.npz")
    artifacts.same_rows("effendi_atac_emb.npy", "effendi_atac_obs.csv", "gene_accessibility.npz")
    artifacts.same_rows("genes.csv", "gene_embeddings.npy")
    artifacts.same_rows("gene_expression.npz", "gene_accessibility.npz", field="columns")
    obs, genes = artifacts.load_table("effendi_rna_obs.csv"), artifacts.load_table("genes.csv")
    assert list(obs.columns) == ["source", "n_counts", "time_h", "kind"] and (obs["source"] == "paired").all()
    assert "100000," in artifacts.path("genes.csv").read_text()         # positions are whole numbers
    assert list(genes.columns) == ["gene_id", "chrom", "start", "end", "strand", "mean", "n_cells"]
    assert list(artifacts.load_table("peaks.csv").columns) == ["chrom", "start", "end", "n_cells", "kept"]
    for name in pre.RNA_FILES + pre.ATAC_FILES + pre.GENE_FILES + pre.PCA_GENE_FILES:
        record = artifacts.record(name)
        assert record["space"] and record["encoder"] in ("pca", "lsi") and record["key"]
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix == ".tmp"]


def test_expression_and_accessibility_are_the_counts_of_the_files(tmp_path):
    run_all(both(tmp_path))
    assert np.array_equal(artifacts.load_sparse("gene_expression.npz").toarray(), make("rna").X.toarray())
    peaks = make("atac").X.toarray().reshape(CELLS, GENES, 3)           # promoter, body, 10 kb behind the gene's end
    want = peaks @ [1, 1, np.exp(-2)]
    want[:, 7] = 0                                                      # no position
    got = artifacts.load_sparse("gene_accessibility.npz").toarray()
    np.testing.assert_allclose(got, want, rtol=1e-5)                    # the next gene's promoter is 12 decays away
    table, parts = artifacts.load_table("gene_peaks.csv"), artifacts.load_sparse("gene_peaks.npz").toarray()
    names = list(artifacts.load_table("genes.csv").index)
    added = np.zeros_like(got)
    np.add.at(added.T, [names.index(gene) for gene in table.index], parts.T)
    np.testing.assert_allclose(added, got, rtol=1e-5)
    np.testing.assert_allclose(table["share"].groupby(table.index).sum(), 1, atol=1e-3)  # rounded to four digits
    third = table.loc["GENE1"].sort_values("tss_distance")         # promoter, body, behind the end
    assert list(third["peak"]) == list(make("atac").var_names[3:6]) and third["tss_distance"].iloc[0] < 500


def test_a_stored_encoder_embeds_the_same_cells_identically(tmp_path):
    run_all(both(tmp_path))
    x, encoder = make("rna").X, artifacts.load_model("rna_encoder.pt")
    z = le.pad(le.pca_transform(x, np.asarray(x.sum(axis=1)).ravel(), encoder), 512)
    np.testing.assert_allclose(artifacts.load_array("effendi_rna_emb.npy", (None, 512)), z, atol=1e-6)
    z = le.pad(le.lsi_transform(make("atac").X, artifacts.load_model("atac_encoder.pt")), 256)
    np.testing.assert_allclose(artifacts.load_array("effendi_atac_emb.npy", (None, 256)), z, atol=1e-6)


def test_a_permuted_file_gives_permuted_rows(tmp_path):
    run_all(both(tmp_path))
    names = ("effendi_rna_emb.npy", "effendi_atac_emb.npy")
    before = [artifacts.load_array(n, (CELLS, None)) for n in names]
    order = np.random.default_rng(3).permutation(CELLS)
    run_all([*both(tmp_path, make("rna")[order], make("atac")[order]), "--out", str(tmp_path / "other")])
    for name, old in zip(names, before):
        np.testing.assert_allclose(artifacts.load_array(name, (CELLS, None)), old[order], atol=1e-6)    # float32


def test_gene_embeddings_have_at_most_the_norm_of_a_layer_norm(tmp_path):
    run_all(both(tmp_path))
    emb = artifacts.load_array("gene_embeddings.npy", (GENES, 512))
    norm = np.linalg.norm(emb, axis=1)
    assert (norm <= np.sqrt(512) * (1 + 1e-6)).all() and norm.min() > 1
    assert not emb[7, 256:].any() and emb[7, :256].any()                # GENE7 has expression but no position


def test_atlas_cells_follow_the_paired_ones_and_keep_their_own_names(tmp_path):
    arguments = [*both(tmp_path), "--unpaired-rna", saved(tmp_path, "big_rna", make("rna", 60, 1, "cell")),
                 "--unpaired-atac", saved(tmp_path, "big_atac", make("atac", 70, 2, "other"))]
    run_all(arguments)
    rna, atac = (artifacts.load_table(f"effendi_{m}_obs.csv") for m in ("rna", "atac"))
    assert rna["source"].tolist() == ["paired"] * CELLS + ["atlas"] * 60
    assert rna.index[CELLS] == "atlas:cell0-1" and len(atac) == CELLS + 70
    assert artifacts.load_sparse("gene_accessibility.npz").shape == (CELLS + 70, GENES)


def test_an_atlas_with_other_peaks_is_refused(tmp_path, capsys):
    other = make("atac", 60)
    other.var_names = [f"chr2:{i * 1000}-{i * 1000 + 500}" for i in range(PEAKS)]
    assert "has 0 of the 90 peaks" in refused(tmp_path, capsys, ["atac", *both(tmp_path), "--unpaired-atac",
                                                                 saved(tmp_path, "atlas", other)])


def test_max_cells_chooses_the_same_cells_in_both_files(tmp_path):
    order = np.random.default_rng(0).permutation(CELLS)
    run_all([*both(tmp_path, atac=make("atac")[order]), "--max-cells", "60"])
    rna, atac = (artifacts.load_table(f"effendi_{m}_obs.csv") for m in ("rna", "atac"))
    assert len(rna) == 60 and set(rna.index) == set(atac.index)
    assert artifacts.load_sparse("gene_accessibility.npz").shape[0] == 60


def batches(kind):
    """Two batches; in the second, features of even number are read three times as often."""
    data, second = make(kind, cells=600), np.arange(600) % 8 >= 4       # kinds repeat every four cells
    x = data.X.toarray()
    x[np.ix_(second, np.arange(x.shape[1]) % 2 == 0)] *= 3
    data.X = sp.csr_matrix(x)
    data.obs["batch"] = np.where(second, "late", "early")
    return data


def test_batches_are_levelled_in_both_modalities_and_on_every_pass(tmp_path, capsys):
    arguments = both(tmp_path, batches("rna"), batches("atac"))
    run_all([*arguments, "--set", "BATCH=batch"])
    assert "2 batches by batch (300, 300 cells)" in capsys.readouterr().out
    batch = artifacts.load_table("effendi_rna_obs.csv")["batch"].eq("late").to_numpy()
    for name in ("gene_expression.npz", "gene_accessibility.npz"):
        x = artifacts.load_sparse(name).toarray()
        depth = artifacts.load_table("effendi_rna_obs.csv" if "expr" in name else "effendi_atac_obs.csv")["n_counts"]
        share = np.stack([x[b].sum(0) / depth[b].sum() for b in (batch, ~batch)])[:, x.sum(0) > 300]
        assert abs(np.log(share[0] / share[1])).mean() < 0.2, name      # 0.5 as read; at least 150 counts: 0.12
    run_all([*arguments, "--set", "BATCH=batch"])
    assert capsys.readouterr().out.count("up to date") == 3


@pytest.mark.parametrize("change, said", [
    (lambda obs: obs.drop(columns="batch"), "no column 'batch' in obs (BATCH=batch); there are: time_h, kind"),
    (lambda obs: obs.assign(batch=["a"] * 10 + ["b"] * 590), "batch a has 10 cells"),
    (lambda obs: obs.assign(batch="a"), "all cells have batch a"),
    (lambda obs: obs.assign(batch=[np.nan] + ["b"] * 599), "has no batch")])
def test_batches_are_refused_with(tmp_path, capsys, change, said):
    data = batches("rna")
    data.obs = change(data.obs)
    with pytest.raises(SystemExit, match="2"):
        config.script(lambda: pre.main(["rna", *both(tmp_path, data, batches("atac")), "--set", "BATCH=batch"]))
    assert said in capsys.readouterr().err


def test_a_batch_column_of_our_own_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="BATCH=source"):
        pre.main(["rna", *both(tmp_path), "--set", "BATCH=source"])


def test_labels_of_cells_come_back_as_they_were_and_can_be_written(tmp_path):
    """Texts that look like numbers, flags that an atlas lacks, and names that are ours."""
    data, atlas = make("rna"), make("rna", seed=1, prefix="other")
    data.obs = data.obs.assign(sample="01", doublet=True, barcode="x")
    atlas.write_h5ad(tmp_path / "atlas.h5ad")
    pre.main(["rna", *both(tmp_path, data), "--unpaired-rna", str(tmp_path / "atlas.h5ad")])
    obs = artifacts.load_table("effendi_rna_obs.csv")
    assert set(obs.columns) == {"source", "time_h", "kind", "sample", "doublet", "n_counts"}
    assert set(obs["sample"].dropna()) == {"01"} and set(obs["doublet"].dropna()) == {"True"}
    assert obs["sample"].isna().sum() == CELLS and obs["time_h"].dtype.kind in "if"
    anndata.AnnData(np.zeros((len(obs), 1)), obs=obs).write_h5ad(tmp_path / "again.h5ad")


def test_distances_of_peaks_are_empty_where_the_strand_is_unknown(tmp_path, capsys):
    data = make("rna")
    data.var.loc["GENE1", "strand"] = ""
    data.var.loc["GENE2", "strand"] = "-"
    run_all(both(tmp_path, data))
    table = artifacts.load_table("gene_peaks.csv")
    assert table.loc["GENE1", "tss_distance"].isna().all() and "1 genes have no strand" in capsys.readouterr().out
    minus = table.loc["GENE2"]                              # its TSS is its end: the first peak is behind it
    assert minus["tss_distance"].max() == pytest.approx(20_000 - 50)


def test_a_cell_without_counts_is_left_out_and_named(tmp_path, capsys):
    data = make("rna")
    x = data.X.toarray()
    x[5] = 0
    data.X = sp.csr_matrix(x)
    pre.main(["rna", *both(tmp_path, data)])
    assert "1 cells without a single rna count are left out (first: cell5-1)" in capsys.readouterr().out
    assert "cell5-1" not in artifacts.load_table("effendi_rna_obs.csv").index


# --- choices ------------------------------------------------------------------------------------------------

def test_highly_variable_genes_are_those_of_scanpy(tmp_path):
    import scanpy

    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1, 3, (1, 200)) * rng.gamma(rng.uniform(0.3, 5, 200), size=(300, 200)))
    data = anndata.AnnData(sp.csr_matrix(x.astype(np.float32)), var=pd.DataFrame(index=[f"G{i}" for i in range(200)]))
    pre.main(["rna", "--rna", saved(tmp_path, "rna", data), "--out", str(tmp_path / "out"), "--set", "N_HVG=50"])
    scanpy.pp.filter_genes(data, min_cells=config.MIN_GENE_CELLS)
    scanpy.pp.normalize_total(data)
    scanpy.pp.log1p(data)
    scanpy.pp.highly_variable_genes(data, n_top_genes=50, flavor="seurat")
    assert list(artifacts.load_table("genes.csv").index) == list(data.var_names[data.var["highly_variable"]])


@pytest.mark.parametrize("top, min_peaks, expected, why", [
    (None, 2, [0, 1, 2], "in at least 10% of the cells"),
    (None, 5, [0, 1, 2, 3, 4, 5], "lowered to 5.00%"),      # the fifth most open, with its tie
    (None, 99, [0, 1, 2, 3, 4, 5, 6], "all that are open"),
    (0, 2, [0, 1, 2, 3, 4, 5, 6, 7], "all"),
    (2, 2, [1, 2], "the most variable"),                    # nearest to open in half of the cells
])
def test_the_peak_filter_keeps(monkeypatch, top, min_peaks, expected, why):
    monkeypatch.setattr(config, "ATAC_TOP_PEAKS", top)
    monkeypatch.setattr(config, "MIN_PEAKS", min_peaks)
    peaks = pd.DataFrame(index=[f"chr1:{i}-{i + 1}" for i in range(8)])
    mask, reason = pre.choose_peaks(peaks, np.array([95, 50, 10, 9, 5, 5, 1, 0]), 100)
    assert np.flatnonzero(mask).tolist() == expected and why in reason


def test_the_encoder_is_the_embedded_one_without_weights_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "SCGPT_MODEL_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(config, "RNA_ENCODER", None)
    assert pre.choose_encoder("RNA_ENCODER", "scgpt", "pca") == "pca"
    assert "no scgpt weights in" in capsys.readouterr().out


# --- finished work ------------------------------------------------------------------------------------------

def test_finished_work_is_skipped_and_changed_work_is_not(tmp_path, capsys):
    arguments = both(tmp_path)
    run_all(arguments)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    run_all(arguments)
    assert [line for line in capsys.readouterr().out.splitlines() if "up to date" in line] == [
        f"precompute_embeddings {s}: up to date" for s in ("rna", "atac", "genes")]
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    pre.main(["genes", *arguments, "--set", "GENE_DECAY=900"])
    assert artifacts.path("gene_accessibility.npz").stat().st_mtime_ns > before["gene_accessibility.npz"]


def test_genes_finds_the_files_that_atac_read(tmp_path):
    arguments = both(tmp_path)
    pre.main(["rna", *arguments])
    pre.main(["atac", *arguments])
    config.RNA_FILE = config.ATAC_FILE = None                           # restored by the fixture
    pre.main(["genes"])
    artifacts.load_array("gene_embeddings.npy", (GENES, 512))


# --- bad input: exit status 2, a message, nothing written ---------------------------------------------------

def refused(tmp_path, capsys, argv, leaves=()):
    """The message of a run that must fail, with nothing written but what `leaves` names."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        config.script(lambda: pre.main(argv))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message and "\n  " in message
    out = tmp_path / "out"
    assert not out.exists() or {path.name for path in out.iterdir()} <= set(leaves)
    return message


def with_values(kind, change):
    data = make(kind)
    x = data.X.toarray()
    change(x)
    data.X = sp.csr_matrix(x)
    return data


def renamed(kind, obs=None, var=None):
    data = make(kind)
    names = {0: "obs_names", 1: "var_names"}
    for axis, new in ((0, obs), (1, var)):
        if new is not None:
            setattr(data, names[axis], new(list(getattr(data, names[axis]))))
    return data


def first_twice(names):
    return [names[0], *names[:-1]]


def poke(row, column, value):
    def change(x):
        x[row, column] = value
    return change


RNA_FAULTS = {
    "negative": (lambda: with_values("rna", poke(70, 3, -2)), "negative values such as -2"),
    "fractions": (lambda: with_values("rna", lambda x: np.log1p(x, out=x)), "non-integer values"),
    "nan": (lambda: with_values("rna", poke(70, 3, np.nan)), "NaN"),
    "all zero": (lambda: with_values("rna", lambda x: x.fill(0)), "every count is zero"),
    "no cells": (lambda: make("rna")[:0].copy(), "is empty: 0 cells"),
    "no genes": (lambda: make("rna")[:, :0].copy(), "is empty: 120 cells, 0 genes"),
    "duplicate cells": (lambda: renamed("rna", obs=first_twice), "1 duplicate cell names (first: cell0-1)"),
    "duplicate genes": (lambda: renamed("rna", var=first_twice), "1 duplicate gene names (first: GENE0)"),
    "peaks as genes": (lambda: make("atac"), "Are --rna and --atac swapped?"),
    "no shared barcodes": (lambda: renamed("rna", obs=lambda n: [x[:-2] for x in n]), "only 0 cells are in both files"),
}


@pytest.mark.parametrize("fault", RNA_FAULTS)
@pytest.mark.filterwarnings("ignore::UserWarning")                      # anndata warns about the names that we break
def test_bad_expression_is_refused_because_of(tmp_path, capsys, fault):
    data, expected = RNA_FAULTS[fault]
    assert expected in refused(tmp_path, capsys, ["rna", *both(tmp_path, rna=data())])


ATAC_FAULTS = {
    "duplicate peaks": (lambda n: ["1:99800-100300", "chr1-99800-100300", *n[2:]], "1 duplicate peaks"),
    "unreadable names": (lambda n: ["peakX", *n[1:]], "1 of 90 names such as peakX are no peaks"),
    "end before start": (lambda n: ["chr1:500-500", *n[1:]], "1 peaks end at or before their start"),
    "negative start": (lambda n: ["chr1:-5-500", *n[1:]], "1 peaks start below 0"),
    "past the end": (lambda n: ["chr1:248956400-248956900", *n[1:]], "chr1 ends at 248956422"),
    "another genome": (lambda n: [x.replace("chr1", "chr2") for x in n], "share no chromosome"),
    "no peak near any gene": (lambda n: [f"chr1:{i}-{i + 500}" for i in range(200_000_000, 200_000_000 + PEAKS)],
                              "no gene has a peak within"),
}


@pytest.mark.parametrize("stage", ["rna", "atac"])
@pytest.mark.parametrize("fault", ATAC_FAULTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_peaks_are_refused_before_either_stage_writes_because_of(tmp_path, capsys, fault, stage):
    names, expected = ATAC_FAULTS[fault]
    assert expected in refused(tmp_path, capsys, [stage, *both(tmp_path, atac=renamed("atac", var=names))])


def test_swapped_files_are_refused_in_both_stages(tmp_path, capsys):
    arguments = both(tmp_path, rna=make("atac"), atac=make("rna"))
    for stage in ("rna", "atac"):
        assert "Are --rna and --atac swapped?" in refused(tmp_path, capsys, [stage, *arguments])
    alone = ["atac", "--atac", arguments[3], "--out", arguments[-1]]
    assert "Are --rna and --atac swapped?" in refused(tmp_path, capsys, alone)


def test_another_build_label_is_refused(tmp_path, capsys):
    data = make("atac")
    data.uns["genome"] = "hg19"
    assert "GRCh38" in refused(tmp_path, capsys, ["rna", *both(tmp_path, atac=data)])


def test_genes_without_any_position_are_refused_when_accessibility_is_wanted(tmp_path, capsys):
    data = make("rna")
    data.var = data.var[[]]
    assert "Give --gtf FILE" in refused(tmp_path, capsys, ["rna", *both(tmp_path, rna=data)])


@pytest.mark.parametrize("stage", ["rna", "atac"])
def test_a_missing_truncated_or_foreign_file_is_refused(tmp_path, capsys, stage):
    out = ["--out", str(tmp_path / "out")]
    assert "not found" in refused(tmp_path, capsys, [stage, f"--{stage}", str(tmp_path / "none.h5ad"), *out])
    whole = Path(saved(tmp_path, "whole", make(stage))).read_bytes()
    for name, content, expected in (("cut", whole[:len(whole) // 2], "truncated"),
                                    ("text", b"a,b\n1,2\n", "not an HDF5 file"),
                                    ("nothing", b"", "not an HDF5 file (0 bytes)")):
        (tmp_path / name).write_bytes(content)
        message = refused(tmp_path, capsys, [stage, f"--{stage}", str(tmp_path / name), *out])
        assert expected in message and str(tmp_path / name) in message


def test_a_file_without_both_modalities_is_refused(tmp_path, capsys):
    import mudata

    mudata.MuData({"rna": make("rna")}).write(tmp_path / "one.h5mu")
    argv = ["rna", "--multiome", str(tmp_path / "one.h5mu"), "--out", str(tmp_path / "out")]
    assert "has no atac modality" in refused(tmp_path, capsys, argv)
    with h5py.File(tmp_path / "else.h5", "w") as f:
        f["table"] = [1, 2]
    argv[2] = str(tmp_path / "else.h5")
    assert "no .h5ad, .h5mu or 10x matrix" in refused(tmp_path, capsys, argv)


def test_a_real_encoder_without_weights_is_refused_and_says_where_they_go(tmp_path, capsys):
    argv = ["rna", *both(tmp_path), "--set", "RNA_ENCODER=scgpt", "--set", f"SCGPT_MODEL_DIR={tmp_path}/none"]
    assert "lacks args.json, vocab.json, best_model.pt" in refused(tmp_path, capsys, argv)


def test_an_interrupted_write_leaves_the_stage_unfinished(tmp_path, monkeypatch):
    arguments = both(tmp_path)
    monkeypatch.setattr(artifacts, "save_model", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pre.main(["rna", *arguments])
    monkeypatch.undo()
    monkeypatch.setattr(config, "OUT_DIR", arguments[-1])
    key = artifacts.record("effendi_rna_emb.npy")["key"]
    assert not artifacts.is_done(key, *pre.RNA_FILES)


# --- real files ---------------------------------------------------------------------------------------------

@pytest.mark.skipif(not (DATA / "a549_multiome").is_dir(), reason="the A549 multiome files are not there")
def test_real_a549_cells_are_embedded_and_their_promoters_stand_out(tmp_path):
    run_all(["--rna", str(DATA / "a549_multiome/rna.h5ad"), "--atac", str(DATA / "a549_multiome/atac.h5ad"),
             "--out", str(tmp_path / "out"), "--set", "BLOCK_ROWS=2048"])
    assert artifacts.load_array("effendi_rna_emb.npy", (2641, 512)).any()
    record = artifacts.record("gene_accessibility.npz")
    assert len(record["genes_without_position"]) == 138
    assert record["metrics"]["promoter_share"] > 4 * record["metrics"]["promoter_share_shifted"]     # 0.87 and 0.16


@pytest.mark.skipif(not (DATA / "scicar_a549_paired").is_dir(), reason="the sci-CAR files are not there")
def test_real_normalised_accessibility_is_refused_and_recovered_counts_are_found(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    message = refused(tmp_path, capsys, ["atac", "--atac", str(DATA / "scicar_a549_paired/atac.h5ad"), *out])
    assert "no raw counts: X has non-integer values" in message
    config.ATAC_FILE = None
    pre.main(["rna", "--rna", str(DATA / "scicar_a549_paired/rna.h5ad"), *out])
    assert "counts from layers['counts_recovered']" in capsys.readouterr().out


# --- scGPT and HyenaDNA -------------------------------------------------------------------------------------

REAL_ARRAYS = ("effendi_rna_emb.npy", "effendi_atac_emb.npy", "peak_embeddings.npy", "gene_embeddings.npy")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return real_encoders.make(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Folder and arrays of an undisturbed run of all three stages."""
    out = tmp_path_factory.mktemp("whole")
    before = config.snapshot()
    run_all(real_encoders.arguments(files, out))
    arrays = {name: artifacts.load_array(name, (None, 32)) for name in REAL_ARRAYS}
    for name, value in before.items():
        setattr(config, name, value)
    return out, arrays


def same_numbers(got, want):
    """Equal but for float32 rounding: the last bit of a matrix product depends on where its operands lie in memory."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_real_encoders_give_what_their_modules_give(files, whole):
    out, arrays = whole
    config.OUT_DIR, config.DIM, config.HYENADNA_D_MODEL = str(out), 32, 32
    rna, peaks = files["data"].rna, artifacts.load_table("peaks.csv")
    z = scgpt_encoder.encode_rna(rna, files["scgpt"], device="cpu", dtype="float32", progress=False)
    np.testing.assert_allclose(arrays["effendi_rna_emb.npy"], z, atol=1e-5)
    kept = peaks[peaks["kept"]]
    model = hyenadna_encoder.load_model(files["hyenadna"])
    want = hyenadna_encoder.encode_sequences(hyenadna_encoder.peak_sequences(kept, files["genome"]), model)
    np.testing.assert_allclose(arrays["peak_embeddings.npy"], want, atol=1e-5)
    counts = files["data"].atac[:, kept.index].X.tocsr()
    want = hyenadna_encoder.cell_embeddings(lambda: [counts], arrays["peak_embeddings.npy"])
    np.testing.assert_allclose(arrays["effendi_atac_emb.npy"], want, atol=1e-5 * np.abs(want).max())    # float32 inside


def test_genes_without_an_scgpt_embedding_are_left_out_everywhere_and_listed(files, whole):
    config.OUT_DIR = str(whole[0])
    missing = list(files["data"].rna.var_names[:real_encoders.UNKNOWN])
    genes = artifacts.load_table("genes.csv")
    assert artifacts.record("genes.csv")["missing"] == missing and not set(missing) & set(genes.index)
    assert len(genes) == real_encoders.GENES - real_encoders.UNKNOWN
    artifacts.same_rows("genes.csv", "gene_embeddings.npy")
    assert artifacts.record("gene_embeddings.npy")["genes"] == list(genes.index)
    artifacts.same_rows("gene_expression.npz", "gene_accessibility.npz", field="columns")
    assert artifacts.record("gene_expression.npz")["columns"] == artifacts.record("genes.csv")["ids"]
    for name in pre.RNA_FILES + pre.ATAC_FILES + pre.GENE_FILES:
        assert artifacts.record(name)["space"] and artifacts.record(name)["encoder"] in ("scgpt", "hyenadna")
    assert not (whole[0] / "shards").exists() and not list(whole[0].glob("*.tmp"))


def test_finished_real_work_is_skipped_until_the_weights_change(files, whole, capsys, tmp_path):
    arguments = real_encoders.arguments(files, whole[0])
    run_all(arguments)
    assert capsys.readouterr().out.count("up to date") == 3
    other = write_folder(tmp_path / "other", seed=1, genes=list(files["data"].rna.var_names))
    key = artifacts.record("genes.csv")["key"]
    config.SCGPT_MODEL_DIR = str(other)
    assert pre._key("rna", pre.input_files("rna"), "scgpt", None, ("N_HVG", "MIN_GENE_CELLS")) != key
    with pytest.raises(ValueError, match="does not hold the scGPT that embedded the cells"):
        pre.main(["genes", *arguments, "--set", f"SCGPT_MODEL_DIR={other}", "--set", "GENE_DECAY=900"])


@pytest.mark.parametrize("stage", ["rna", "atac"])
def test_a_run_stopped_between_shards_goes_on_and_ends_with_the_same_arrays(files, whole, tmp_path, monkeypatch, stage):
    save, saved = pre.save_shard, []

    def stop_after_two(what, first, *rest):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(first)
        save(what, first, *rest)

    arguments = [stage, *real_encoders.arguments(files, tmp_path / "out")]
    monkeypatch.setattr(pre, "save_shard", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        pre.main(arguments)
    assert saved == [0, 16] and not artifacts.path(f"effendi_{stage}_emb.npy").exists()
    monkeypatch.setattr(pre, "save_shard", lambda what, first, *rest: (saved.append(first), save(what, first, *rest)))
    pre.main(arguments)
    assert saved == list(range(0, {"rna": real_encoders.CELLS, "atac": 40}[stage], 16))        # none twice
    name = f"effendi_{stage}_emb.npy"
    same_numbers(artifacts.load_array(name, (None, 32)), whole[1][name])
    assert not artifacts.path("shards").exists()


def test_a_killed_process_leaves_whole_shards_and_nothing_else(files, whole, tmp_path):
    out = tmp_path / "out"
    arguments = ["atac", *real_encoders.arguments(files, out), "--set", "EMB_SHARD_ROWS=2"]
    running = subprocess.Popen([sys.executable, str(ROOT / "precompute_embeddings.py"), *arguments],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("shards/*.npy.json"))) < 3 and running.poll() is None:
        time.sleep(0.005)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert {path.name for path in out.iterdir()} == {"shards", "genome.fa.fai"}
    pre.main(arguments)
    for name in ("effendi_atac_emb.npy", "peak_embeddings.npy"):
        same_numbers(artifacts.load_array(name, (None, 32)), whole[1][name])


def test_the_dtype_is_chosen_once_and_kept_when_the_run_goes_on(files, tmp_path, monkeypatch):
    arguments = ["atac", *real_encoders.arguments(files, tmp_path / "out"), "--set", "EMB_DTYPE=None"]
    choose = hyenadna_encoder.choose_dtype
    monkeypatch.setattr(hyenadna_encoder, "choose_dtype", lambda *a: (choose(*a), (torch.bfloat16, "so chosen"))[1])
    monkeypatch.setattr(pre, "gather_shards", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pre.main(arguments)
    monkeypatch.undo()
    config.OUT_DIR = str(tmp_path / "out")
    monkeypatch.setattr(hyenadna_encoder, "choose_dtype", lambda *a: 1 / 0)
    pre.main(arguments)
    assert artifacts.record("effendi_atac_emb.npy")["how"]["dtype"] == "bfloat16"


def test_two_processes_write_the_arrays_of_one(files, whole, tmp_path):
    out = tmp_path / "out"
    script = tmp_path / "both.py"               # both stages in one start: importing torch takes most of the time
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport precompute_embeddings as pre\n"
                      "with pre.processes():\n    for stage in ('rna', 'atac'):\n"
                      "        pre.main([stage, *sys.argv[1:]])\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(script), *real_encoders.arguments(files, out)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for stage in ("rna", "atac"):
        assert done.stdout.count(f"precompute_embeddings {stage}: {real_encoders.CELLS} cells") == 1
    config.OUT_DIR = str(out)
    for name in REAL_ARRAYS[:3]:
        same_numbers(artifacts.load_array(name, (None, 32)), whole[1][name])
    assert not (out / "shards").exists()


def test_an_atlas_is_embedded_behind_the_paired_cells(files, whole, tmp_path):
    atlas = files["data"].rna[:20].copy()
    pre.main(["rna", *real_encoders.arguments(files, tmp_path / "out"),
              "--unpaired-rna", saved(tmp_path, "atlas", atlas)])
    z = artifacts.load_array("effendi_rna_emb.npy", (real_encoders.CELLS + 20, 32))
    np.testing.assert_allclose(z[-20:], whole[1]["effendi_rna_emb.npy"][:20], atol=1e-5)       # the same cells


def test_cells_without_a_known_gene_are_left_out_and_named(files, tmp_path, capsys):
    data = files["data"].rna.copy()
    x = data.X.tolil()
    x[5, real_encoders.UNKNOWN:] = 0
    x[5, 0] = 3
    data.X = x.tocsr()
    pre.main(["rna", *real_encoders.arguments(files, tmp_path / "out"), "--rna", saved(tmp_path, "rna", data)])
    assert f"1 cells without a single rna count of a gene that the encoder knows are left out (first: " \
           f"{data.obs_names[5]})" in capsys.readouterr().out


# --- bad input to the real encoders -------------------------------------------------------------------------

def copy_of(files, tmp_path, name):
    return Path(shutil.copytree(files[name], tmp_path / name))


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def set_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_a_gene(path):
    genes = [token for token in json.loads(path.read_text()) if token != "SIM00060"]
    path.write_text(json.dumps({token: i for i, token in enumerate(genes)}))


SCGPT_FAULTS = {
    "missing weights": (lambda d: (d / "best_model.pt").unlink(), "lacks best_model.pt"),
    "truncated weights": (lambda d: cut(d / "best_model.pt"), "cannot be read as weights"),
    "another architecture": (lambda d: set_json(d / "args.json", d_hid=64), "is not the scGPT encoder that"),
    "a vocabulary of another size": (lambda d: without_a_gene(d / "vocab.json"), "belong to different models"),
    "too few genes matched": (lambda d: write_folder(d, genes=[f"SIM{i:05d}" for i in range(60, 400)]),
                              "only 71 of 130 genes are in the vocabulary"),
    "another width": (lambda d: None, "has embeddings of width 32, DIM is 16"),
}


@pytest.mark.parametrize("fault", SCGPT_FAULTS)
def test_scgpt_is_refused_with(files, tmp_path, capsys, fault):
    change, expected = SCGPT_FAULTS[fault]
    folder = copy_of(files, tmp_path, "scgpt")
    change(folder)
    width = ["--set", "DIM=16"] if fault == "another width" else []
    assert expected in refused(tmp_path, capsys, ["rna", *real_encoders.arguments(files, tmp_path / "out"),
                                                  "--set", f"SCGPT_MODEL_DIR={folder}", *width])


def fasta(path, sizes):
    path.write_text("".join(f">{name}\n{'ACGT' * (size // 4)}\n" for name, size in sizes.items()))
    return path


HYENADNA_FAULTS = {
    "missing weights": (lambda d: (d / "model.safetensors").unlink(), None, "lacks model.safetensors"),
    "truncated weights": (lambda d: cut(d / "model.safetensors"), None, "truncated or not safetensors"),
    "another architecture": (lambda d: set_json(d / "config.json", n_layer=3), None, "does not fit the HyenaDNA"),
    "another width": (lambda d: set_json(d / "config.json", d_model=64), None, "d_model 64"),
    "no genome": (None, lambda p: "", "GENOME_FILE is not set"),
    "a genome that is not there": (None, lambda p: p / "none.fa", "not found"),
    "what is no genome": (None, lambda p: Path(shutil.copy(__file__, p / "g.fa")), "cannot be read as a genome"),
    "no such chromosome": (None, lambda p: fasta(p / "g.fa", {"chr9": 10_000_000}), "another genome build"),
    "another build": (None, lambda p: fasta(p / "g.fa", {"chr1": 90_000}), "another genome build"),
}


@pytest.mark.parametrize("fault", HYENADNA_FAULTS)
def test_hyenadna_is_refused_with(files, tmp_path, capsys, fault):
    change_model, genome, expected = HYENADNA_FAULTS[fault]
    argv = ["atac", *real_encoders.arguments(files, tmp_path / "out")]
    if change_model:
        folder = copy_of(files, tmp_path, "hyenadna")
        change_model(folder)
        argv += ["--set", f"HYENADNA_MODEL_DIR={folder}"]
    else:
        argv[argv.index("--genome") + 1] = str(genome(tmp_path))
    assert expected in refused(tmp_path, capsys, argv, leaves={"g.fa.fai"})


def test_an_unknown_dtype_is_refused(files, tmp_path, capsys):
    argv = ["rna", *real_encoders.arguments(files, tmp_path / "out"), "--set", "EMB_DTYPE=float16"]
    assert "EMB_DTYPE='float16'" in refused(tmp_path, capsys, argv)


# --- real files through the real encoders' code, with random weights ------------------------------------------

@pytest.mark.skipif(not (DATA / "cima").is_dir(), reason="the CIMA demonstration file is not there")
def test_real_peaks_of_501_bp_are_embedded_on_a_made_up_genome(files, tmp_path):
    data = anndata.read_h5ad(DATA / "cima/demo_atac_raw.h5ad")
    chosen = data[:, data.var_names.str.match("chr(19|21|22):")].copy()
    lines = (line.split() for line in (DATA / "gene_tss/hg38.chrom.sizes").read_text().splitlines())
    sizes = {name: int(size) for name, size in lines if name in ("chr19", "chr21", "chr22")}
    genome = real_encoders.write_random_2bit(tmp_path / "genome.2bit", sizes)
    pre.main(["atac", "--atac", saved(tmp_path, "cima", chosen), "--genome", str(genome),
              "--out", str(tmp_path / "out"), *real_encoders.settings(files), "--set", "ATAC_TOP_PEAKS=100"])
    z = artifacts.load_array("effendi_atac_emb.npy", (None, 32))
    assert np.isfinite(z).all() and (z.std(axis=0) > 0).sum() > 10
    assert np.isfinite(artifacts.load_array("peak_embeddings.npy", (100, 32))).all()


@pytest.mark.skipif(not (DATA / "a549_multiome").is_dir(), reason="the A549 multiome files are not there")
def test_real_a549_cells_are_read_by_an_scgpt_with_the_released_vocabulary(files, tmp_path):
    vocab = json.loads((DATA / "scgpt_vocab/default_census_vocab.json").read_text())
    folder = write_folder(tmp_path / "model", genes=list(vocab))
    pre.main(["rna", "--rna", str(DATA / "a549_multiome/rna.h5ad"), "--max-cells", "60", "--out", str(tmp_path / "out"),
              *real_encoders.settings(files), "--set", f"SCGPT_MODEL_DIR={folder}"])
    z = artifacts.load_array("effendi_rna_emb.npy", (60, 32))
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    record = artifacts.record("genes.csv")
    assert record["how"]["max_seq_len"] == 1186 and len(record["missing"]) < 0.1 * record["rows"]
