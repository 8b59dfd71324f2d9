"""Every format gives the same matrix; names and positions mean one thing; bad files are refused with a reason."""
import gzip
import io

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import config
import effendi_loader as loader
from effendi_loader import gene_peak_weights, open_counts, pair, parse_peaks, peaks_of_genes

CELLS, GENES = 90, 40


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    for name, value in config.snapshot().items():
        monkeypatch.setattr(config, name, value)
    monkeypatch.setattr(config, "OUT_DIR", str(tmp_path / "out"))
    monkeypatch.setattr(config, "BLOCK_ROWS", 32)


def counts(cells=CELLS, genes=GENES, seed=0):
    x = np.random.default_rng(seed).poisson(0.7, (cells, genes)).astype(np.float32)
    x[:, 0] += 1                                                        # no cell is empty
    return x


def rna(x=None, **options):
    x = counts() if x is None else x
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(x.shape[1])])
    return anndata.AnnData(x, pd.DataFrame(index=[f"cell{i}-1" for i in range(x.shape[0])]), var, **options)


def atac(names, x=None):
    data = rna(counts(genes=len(names)) if x is None else x)
    data.var_names = names
    return data


def saved(data, tmp_path, name="data.h5ad"):
    data.write_h5ad(tmp_path / name)
    return str(tmp_path / name)


def read(path, modality="rna", rows=None):
    return sp.vstack([block for _, block in open_counts(path, modality).blocks(rows)]).toarray()


def write_tenx(path, x, ids, names, types, intervals):
    """What Cell Ranger ARC writes: features x cells, by columns."""
    matrix = sp.csr_matrix(x)
    with h5py.File(path, "w") as f:
        g = f.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            g[key] = getattr(matrix, key).astype(np.int32)
        g["shape"] = np.array(x.shape[::-1])
        g["barcodes"] = [f"cell{i}-1".encode() for i in range(len(x))]
        for key, values in dict(id=ids, name=names, feature_type=types, interval=intervals,
                                genome=["GRCh38"] * len(ids)).items():
            g[f"features/{key}"] = [v.encode() for v in values]


# --- formats --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encode", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_csr_csc_and_dense_files_hold_the_same_matrix(tmp_path, encode):
    assert np.array_equal(read(saved(rna(encode(counts())), tmp_path)), counts())


@pytest.mark.parametrize("encode", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_chosen_rows_are_those_rows(tmp_path, encode):
    rows = np.array([0, 3, 4, 40, 71, 89])
    assert np.array_equal(read(saved(rna(encode(counts())), tmp_path), rows=rows), counts()[rows])


def test_a_csc_matrix_is_sorted_by_rows_in_pieces_smaller_than_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CHUNK", 97)                            # about 19 pieces and as many buckets
    path = saved(rna(sp.csc_matrix(counts())), tmp_path)
    assert np.array_equal(read(path), counts())
    assert not list((tmp_path / "out").iterdir())                       # the temporary file never had a name


def test_no_block_has_more_rows_than_asked(tmp_path):
    sizes = [b.shape[0] for _, b in open_counts(saved(rna(sp.csr_matrix(counts())), tmp_path), "rna").blocks()]
    assert sizes == [32, 32, 26]


def test_a_spool_gives_back_its_rows_and_writes_what_scipy_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CHUNK", 100)
    x, spool, f = sp.csr_matrix(counts()), loader.Spool(GENES), io.BytesIO()
    for a in range(0, CELLS, 25):
        spool.append(x[a:a + 25])
    assert (sp.vstack([b for _, b in spool.blocks()]) != x).nnz == 0
    spool.write_npz(f)
    back = sp.load_npz(io.BytesIO(f.getvalue()))
    assert back.format == "csr" and back.shape == x.shape and (back != x).nnz == 0


def test_counts_are_found_in_x_a_layer_or_raw(tmp_path):
    x, log = counts(), np.log1p(counts())
    data = {"X": rna(x), "layers['counts']": rna(log, layers={"counts": x}),
            "layers['counts_recovered']": rna(log, layers={"counts_recovered": x, "scaled": log - 1})}
    data["raw"] = rna(log[:, :10])
    data["raw"].raw = rna(x)
    for place, adata in data.items():
        path = saved(adata, tmp_path, f"{place}.h5ad")
        found = open_counts(path, "rna")
        assert found.place == place and len(found.features) == GENES
        assert np.array_equal(read(path), x)


def test_a_10x_file_splits_into_its_two_modalities(tmp_path):
    x, path = counts(genes=5), str(tmp_path / "arc.h5")
    write_tenx(path, x, ["ENSG00000000001", "ENSG00000000002", "p1", "p2", "p3"],
               ["A", "B", "chr1:100-600", "chr1:900-1400", "chr2:5-505"],
               ["Gene Expression"] * 2 + ["Peaks"] * 3,
               ["chr1:50-51", "", "chr1:100-600", "chr1:900-1400", "chr2:5-505"])
    genes, peaks = open_counts(path, "rna"), open_counts(path, "atac")
    assert np.array_equal(read(path), x[:, :2]) and np.array_equal(read(path, "atac"), x[:, 2:])
    assert list(genes.features.index) == ["A", "B"] and genes.build == peaks.build == "GRCh38"
    assert genes.features.loc["A", ["chrom", "start", "end"]].tolist() == ["chr1", 50, 51]
    assert genes.features.loc["B"].isna()[["chrom", "start", "end", "strand"]].all()
    assert list(peaks.features.index) == ["chr1:100-600", "chr1:900-1400", "chr2:5-505"]


def test_an_h5mu_file_splits_into_its_two_modalities(tmp_path):
    import mudata

    x = counts(genes=3, seed=5)
    both = mudata.MuData({"rna": rna(sp.csr_matrix(counts())), "atac": atac(["1-5-9", "1-20-30", "2-0-4"], x)})
    both.write(tmp_path / "both.h5mu")
    assert np.array_equal(read(str(tmp_path / "both.h5mu")), counts())
    assert np.array_equal(read(str(tmp_path / "both.h5mu"), "atac"), x)


# --- names and positions ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["chr1:100-600", "chr1-100-600", "chr1_100_600", "1:100-600"])
def test_all_notations_of_a_peak_mean_the_same(name):
    assert parse_peaks([name]).iloc[0].tolist() == ["chr1", 100, 600]


def test_contigs_keep_their_underscores_and_mitochondria_get_one_name():
    peaks = parse_peaks(["chrUn_KI270742v1_100_600", "GL000194.1:5-9", "MT:5-9", "chrX-1-2", "GPR153"])
    assert peaks["chrom"].tolist()[:4] == ["chrUn_KI270742v1", "GL000194.1", "chrM", "chrX"]
    assert peaks["start"].isna().tolist() == [False] * 4 + [True]


def test_symbols_come_from_a_column_when_the_names_are_ensembl_identifiers(tmp_path):
    data = rna(counts(genes=3))
    data.var_names = ["ENSG00000000001.2", "ENSG00000000002.1", "ENSG00000000003.4"]
    data.var["feature_name"] = ["CD4", "CD8A", ""]
    features = open_counts(saved(data, tmp_path), "rna").features
    assert list(features.index) == ["CD4", "CD8A", "ENSG00000000003.4"]
    assert list(features["gene_id"]) == ["ENSG00000000001.2", "ENSG00000000002.1", "ENSG00000000003.4"]


def test_genes_that_share_a_symbol_are_told_apart_by_identifier_in_any_order(tmp_path):
    data = rna(counts(genes=3))
    data.var_names = ["ENSG00000000009", "ENSG00000000002", "ENSG00000000003"]
    data.var["symbol"] = ["TBCE", "TBCE", "CD4"]
    features = open_counts(saved(data, tmp_path), "rna").features
    assert list(features.index) == ["TBCE_ENSG00000000009", "TBCE", "CD4"]


def test_gene_positions_come_from_columns_with_empty_ones_unknown(tmp_path):
    data = rna(counts(genes=3))
    data.var = data.var.assign(chrom=["1", "", "chrX"], start=[10, -1, 30], end=[20, -1, 50], strand=["-", "", "1"])
    features = open_counts(saved(data, tmp_path), "rna").features
    assert features["chrom"].tolist()[::2] == ["chr1", "chrX"] and features["strand"].tolist()[::2] == ["-", "+"]
    assert features.iloc[1][["chrom", "start", "end", "strand"]].isna().all()


@pytest.mark.parametrize("zipped", [False, True])
def test_gene_positions_come_from_a_gtf(tmp_path, zipped):
    text = ('#!genome-build GRCh38\n1\tx\tgene\t11\t20\t.\t-\t.\tgene_id "ENSG00000000001.5"; gene_name "OLD";\n'
            '1\tx\texon\t1\t2\t.\t-\t.\tgene_id "ENSG00000000001.5";\n'
            'chrX\tx\tgene\t101\t150\t.\t+\t.\tgene_id "ENSG00000000002"; gene_name "GENE1";\n')
    path = tmp_path / "genes.gtf"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    data = rna(counts(genes=3))
    data.var["gene_id"] = ["ENSG00000000001.7", "", ""]
    features = open_counts(saved(data, tmp_path), "rna", gtf=path).features
    assert features.iloc[0][["chrom", "start", "end", "strand"]].tolist() == ["chr1", 10, 20, "-"]     # 0-based
    assert features.iloc[1][["chrom", "start", "end", "strand"]].tolist() == ["chrX", 100, 150, "+"]
    assert features.iloc[2][["chrom", "start", "end", "strand"]].isna().all()


# --- pairs --------------------------------------------------------------------------------------------------

def table(names, source="paired"):
    return pd.DataFrame({"source": source}, index=list(names))


def test_cells_pair_by_barcode_and_not_by_position(monkeypatch, capsys):
    monkeypatch.setattr(config, "MIN_PAIRED_CELLS", 3)
    a, b = pair(table("abcdx"), table("ydcab"))
    assert a.tolist() == [0, 1, 2, 3] and b.tolist() == [3, 4, 2, 1]
    assert "4 cells paired" in capsys.readouterr().out


def test_what_does_not_pair_is_counted_and_named(monkeypatch, capsys):
    monkeypatch.setattr(config, "MIN_PAIRED_CELLS", 2)
    pair(table("abcX"), table("YZabc"))
    assert "1 in RNA only (first: X); 2 in ATAC only (first: Y)" in capsys.readouterr().out


def test_atlas_cells_never_pair(monkeypatch):
    monkeypatch.setattr(config, "MIN_PAIRED_CELLS", 1)
    a, b = pair(pd.concat([table("ab"), table("cd", "atlas")]), pd.concat([table("bd"), table("ca", "atlas")]))
    assert a.tolist() == [1] and b.tolist() == [0]


def test_too_few_pairs_are_an_error_that_shows_the_names():
    with pytest.raises(ValueError, match="only 0 cells.*first: a-1.*first: a_2"):
        pair(table(["a-1"]), table(["a_2"]))


# --- gene accessibility -------------------------------------------------------------------------------------

def place(chrom, start, end, strand=np.nan):
    return pd.DataFrame({"chrom": [chrom], "start": [start], "end": [end], "strand": [strand]}, index=["G"])


def weights(peaks, gene, window=100_000, decay=5_000.0):
    return gene_peak_weights(parse_peaks(peaks), gene, window, decay).toarray()[:, 0]


def test_peaks_in_the_body_or_promoter_count_fully():
    gene = place("chr1", 50_000, 90_000, "+")
    assert weights(["chr1:60000-60500", "chr1:48100-48600", "chr1:47000-48001"], gene).tolist() == [1, 1, 1]


def test_distal_peaks_decay_with_the_distance_to_the_nearest_edge():
    gene = place("chr1", 50_000, 90_000, "+")                           # counts fully from 48,000 to 90,000
    got = weights(["chr1:42500-43000", "chr1:95000-95500", "chr1:90000-90100"], gene)
    np.testing.assert_allclose(got, [np.exp(-1), np.exp(-1), 1], rtol=1e-6)         # stored as float32


def test_the_promoter_lies_at_the_start_of_the_strand_and_at_both_ends_without_one():
    far = ["chr1:48100-48200", "chr1:91800-91900"]
    assert (weights(far, place("chr1", 50_000, 90_000, "+")) == 1).tolist() == [True, False]
    assert (weights(far, place("chr1", 50_000, 90_000, "-")) == 1).tolist() == [False, True]
    assert (weights(far, place("chr1", 50_000, 90_000)) == 1).tolist() == [True, True]


def test_a_short_gene_still_has_a_promoter_of_two_kilobases_each_way():
    assert weights(["chr1:51900-51950", "chr1:48010-48020"], place("chr1", 50_000, 50_100, "+")).tolist() == [1, 1]


def test_peaks_beyond_the_window_or_on_other_chromosomes_do_not_count():
    gene = place("chr1", 50_000, 60_000, "+")
    assert not weights(["chr2:50000-51000", "chr1:63000-64000"], gene, window=2_000).any()
    assert weights(["chr1:61000-62000"], gene, window=2_000).all()


def test_a_gene_without_a_position_has_no_accessibility():
    assert not weights(["chr1:0-100"], place(np.nan, np.nan, np.nan)).any()


@pytest.mark.parametrize("window", [100_000, 6_000])                    # cut by the smallest weight, and by the window
def test_weights_equal_those_of_a_double_loop(window):
    rng = np.random.default_rng(0)
    peaks = pd.DataFrame({"chrom": rng.choice(["chr1", "chr2"], 60), "start": rng.integers(0, 300_000, 60)})
    peaks["end"] = peaks["start"] + rng.integers(100, 9_000, 60)
    genes = pd.DataFrame({"chrom": rng.choice(["chr1", "chr2"], 20), "start": rng.integers(0, 300_000, 20)})
    genes["end"] = genes["start"] + rng.integers(200, 90_000, 20)
    genes["strand"] = rng.choice(["+", "-"], 20)
    want = np.zeros((60, 20))
    for p in range(60):
        for g in range(20):
            one, gene = peaks.iloc[p], genes.iloc[g]
            tss = gene.start if gene.strand == "+" else gene.end
            low, high = min(gene.start, tss - 2_000), max(gene.end, tss + 2_000)
            gap = max(0, low - one.end, one.start - high)
            if one.chrom == gene.chrom and gap <= window and np.exp(-gap / 5_000) >= loader.MIN_WEIGHT:
                want[p, g] = np.exp(-gap / 5_000)
    assert ((want > 0).sum(1) > 1).any()
    want[want < want.max(1, keepdims=True)] = 0                         # a peak is that of the nearest gene
    got = gene_peak_weights(peaks, genes, window, 5_000.0).toarray()
    np.testing.assert_allclose(got, want, rtol=1e-6)                    # stored as float32


def test_a_peak_counts_for_the_nearest_gene_and_for_all_that_are_as_near():
    genes = pd.concat([place("chr1", 50_000, 60_000, "+"), place("chr1", 100_000, 110_000, "+"),
                       place("chr1", 105_000, 120_000, "-")])
    peaks = parse_peaks(["chr1:65000-65500", "chr1:92000-92500", "chr1:106000-106500", "chr1:79000-79000"])
    got = gene_peak_weights(peaks, genes, 100_000, 50_000.0).toarray()
    # Their regions are 48-60, 98-110 and 105-122 kb: the last peak lies 19 kb from the first two.
    assert (got > 0).tolist() == [[True, False, False], [False, True, False], [False, True, True], [True, True, False]]
    alone = gene_peak_weights(peaks, genes[:1], 100_000, 50_000.0).toarray()[:, 0]
    np.testing.assert_array_equal(alone[[0, 3]], got[[0, 3], 0])        # and for as much as without neighbours


def test_the_strongest_peaks_of_a_gene_stand_alone_and_all_add_up():
    rng = np.random.default_rng(0)
    weights = sp.csr_matrix(sp.random(30, 5, 0.5, random_state=1).toarray() * [1, 1, 1, 0, 1])
    counts = rng.poisson(rng.gamma(1.0, 2.0, 30), (200, 30))
    counts[:, 4] = 0
    columns, gene, peak = peaks_of_genes(weights, counts.sum(0), 3)
    parts = counts @ columns.toarray()
    for g in range(5):
        np.testing.assert_allclose(parts[:, gene == g].sum(1), counts @ weights.toarray()[:, g])
        alone = peak[(gene == g) & (peak >= 0)]
        contribution = counts.sum(0) * weights.toarray()[:, g]
        assert list(alone[:3]) == list(np.argsort(-contribution)[:len(alone[:3])]) and (gene == g).sum() <= 4
    assert (np.diff(gene) >= 0).all() and 3 not in gene and 4 not in peak
    assert peaks_of_genes(weights, counts.sum(0), 0)[0].shape[1] == 4   # one column a gene that has peaks


def test_promoters_hold_more_peaks_than_places_far_away():
    genes = pd.DataFrame({"chrom": "chr1", "start": np.arange(1, 20) * 500_000, "strand": "+"})
    genes["end"] = genes["start"] + 10_000
    peaks = parse_peaks([f"chr1:{s - 200}-{s + 300}" for s in genes["start"]])
    assert loader.promoter_share(peaks, genes) == 1 and loader.promoter_share(peaks, genes, 50_000) == 0


# --- bad files, as the loader sees them ---------------------------------------------------------------------

def test_the_message_about_fractions_names_every_place_that_was_tried(tmp_path):
    data = rna(np.log1p(counts()), layers={"counts": counts() - 1})
    with pytest.raises(ValueError, match=r"X has non-integer.*layers\['counts'\] has negative values such as -1"):
        open_counts(saved(data, tmp_path), "rna")


def test_a_bad_value_deep_in_the_file_is_found_and_its_cell_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "PROBE", 100)
    x = sp.csr_matrix(counts())
    x.data[x.indptr[50]] = 0.5
    with pytest.raises(ValueError, match="non-integer values such as 0.5, first in cell cell50-1"):
        read(saved(rna(x), tmp_path))


def test_a_column_index_outside_the_matrix_is_damage_and_not_a_crash(tmp_path):
    path = saved(rna(sp.csr_matrix(counts())), tmp_path)
    with h5py.File(path, "r+") as f:
        f["X/indices"][5] = 10_000
    with pytest.raises(ValueError, match="damaged"):
        read(path)


def test_different_builds_are_an_error():
    loader.check_builds("a", "GRCh38", "b", None)
    with pytest.raises(ValueError, match="GRCh38.*GRCh37"):
        loader.check_builds("a", "GRCh38", "b", "GRCh37")


# --- batches --------------------------------------------------------------------------------------------------

def log_fold(x, batch):
    """Log ratio of the two batches' means of every column, each relative to its batch's total."""
    totals = np.stack([np.asarray(x[batch == b].sum(0)).ravel() for b in (0, 1)])
    return np.subtract(*np.log(totals / totals.sum(1, keepdims=True)))


def batched(spread, cells=2000, genes=200, seed=0):
    rng = np.random.default_rng(seed)
    batch = rng.integers(2, size=cells)
    fold = np.exp(spread * rng.standard_normal((2, genes)))
    x = sp.csr_matrix(rng.poisson(0.5 * fold[batch]).astype(np.float32))
    return x, batch, loader.batch_shares([np.asarray(x[batch == b].sum(0)).ravel() for b in (0, 1)])


def test_thinning_levels_the_batches_and_keeps_counts():
    x, batch, shares = batched(0.3)
    thinned = loader.thin(x.copy(), shares, batch, [f"cell{i}" for i in range(len(batch))])
    # Planted sd 0.3 sqrt 2 = 0.42; what is left is counting noise, sqrt(2 / 500) = 0.06 a column.
    assert log_fold(x, batch).std() > 0.35 and log_fold(thinned, batch).std() < 0.1
    assert (thinned.data == np.rint(thinned.data)).all() and (thinned > x).nnz == 0
    assert (shares.max(0) == 1).all() and shares.min() > 0.2            # the lowest batch of a gene keeps all of it
    dense = thinned.toarray()[batch == 0]                               # still Poisson: variance over mean is 1
    assert abs((dense.var(0) / dense.mean(0)).mean() - 1) < 0.02        # standard error sqrt(2 / 1000 / 200) = 0.003


def test_batches_that_differ_by_counting_noise_alone_keep_their_counts():
    _, _, shares = batched(0.0)
    assert shares.mean() > 0.99


def test_a_cell_keeps_the_same_counts_whatever_its_block():
    x, batch, shares = batched(0.3, cells=60)
    names = [f"cell{i}" for i in range(60)]
    whole = loader.thin(x.copy(), shares, batch, names)
    parts = [loader.thin(x[a:a + 25].copy(), shares, batch[a:a + 25], names[a:a + 25]) for a in (0, 25, 50)]
    assert (whole != sp.vstack(parts)).nnz == 0


def test_rare_features_do_not_hide_the_batches_of_the_others():
    """Peaks of real data: open in 1 % of cells in the median, and in up to half."""
    rng = np.random.default_rng(0)
    rate, fold = np.exp(-4.6 + 1.2 * rng.standard_normal(20_000)), np.exp(0.3 * rng.standard_normal((2, 20_000)))
    totals = rng.poisson(1500 * rate * fold)
    shares, many = loader.batch_shares(totals), totals.min(0) > 50
    exact = (fold / fold.sum(0, keepdims=True)).min(0) / (fold / fold.sum(0, keepdims=True)).max(0)
    assert abs(shares[:, many].min(0).mean() / exact[many].mean() - 1) < 0.05
    assert (loader.batch_shares(rng.poisson(1500 * rate, (3, 20_000))) > 0.9).all()


def test_features_with_few_counts_everywhere_are_left_as_they_are():
    assert (loader.batch_shares(np.random.default_rng(0).poisson(5, (2, 100))) == 1).all()
