"""scGPT: equal to the published implementation, independent of batches and orders, strict about its files."""
import importlib
import json
import sys
import types
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import artifacts
import config
import scgpt_encoder as sc

DIM, HEADS, LAYERS, HIDDEN = 32, 4, 3, 48
GENES = [f"GENE{i}" for i in range(160)] + ["HLA-A", "C1orf112", "ENSG00000283886.3"]
DATA = Path(__file__).parents[2] / "shared" / "data"


def write_folder(folder, layout="flash", seed=0, genes=GENES, change=None, **args):
    """A checkpoint in the released format with random weights; ids are not in the order of the file."""
    rng = np.random.default_rng(seed)
    tokens = [*genes, "<pad>", "<cls>", "<eoc>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({tokens[i]: int(i) for i in rng.permutation(len(tokens))}))
    settings = dict(embsize=DIM, nheads=HEADS, d_hid=HIDDEN, nlayers=LAYERS, n_layers_cls=3, dropout=0.2, n_bins=51,
                    pad_value=-2, pad_token="<pad>", input_emb_style="continuous", max_seq_len=1200)
    (folder / "args.json").write_text(json.dumps({**settings, **args}))
    gen = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(t.shape, generator=gen) * (0.3 if t.ndim > 1 else 0.1) + ("norm.w" in name)
             for name, t in sc.ScGPT(len(tokens), DIM, HEADS, HIDDEN, LAYERS).state_dict().items()}
    state |= {"flag_encoder.weight": torch.zeros(2, DIM), "decoder.fc.0.weight": torch.zeros(DIM, DIM),
              "mvc_decoder.W.weight": torch.zeros(DIM, DIM)}
    if layout == "stock":
        state = {name.replace("Wqkv.", "in_proj_"): t for name, t in state.items()}
    if change:
        change(state)
    torch.save(state, folder / "best_model.pt")
    return folder


def cells(n=12, genes=GENES, seed=0, density=0.6):
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.1, density, size=(n, 1))              # cells of very different length
    counts = rng.poisson(rng.gamma(0.7, 4, size=len(genes)), size=(n, len(genes))) + 1
    counts = counts * (rng.random(counts.shape) < share)
    counts[:, 0] = 1                                            # no empty cell
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=pd.DataFrame(index=[f"cell{i}" for i in range(n)]),
                      var=pd.DataFrame(index=list(genes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("scgpt") / "model")


def encode(adata, folder, **kw):
    return sc.encode_rna(adata, folder, **{"device": "cpu", "dtype": "float32", "progress": False, **kw})


# --- the published package ------------------------------------------------------------------------------------

class Vocab:
    """As much of torchtext.vocab.Vocab as scgpt.tokenizer uses."""

    def __init__(self, tokens):
        self.tokens, self.default = list(getattr(tokens, "tokens", tokens)), None

    vocab = property(lambda self: self)

    def __contains__(self, token):
        return token in self.tokens

    def __getitem__(self, token):
        return self.tokens.index(token) if token in self.tokens else self.default

    def __call__(self, tokens):
        return [self[t] for t in tokens]

    def __len__(self):
        return len(self.tokens)

    def insert_token(self, token, place):
        self.tokens.insert(place, token)

    def append_token(self, token):
        self.tokens.append(token)

    def set_default_index(self, place):
        self.default = place


@pytest.fixture
def official(monkeypatch):
    """scgpt 0.2.4 with stand-ins for the three packages that its imports name and the encoder never calls."""
    if importlib.util.find_spec("scgpt") is None:
        pytest.skip("the published package is not installed: pip install --no-deps scgpt==0.2.4")
    stand_ins = {"torchtext.vocab": dict(Vocab=Vocab, vocab=lambda tokens, min_freq=1: Vocab(tokens)),
                 "torchtext": {}, "IPython": dict(get_ipython=None), "datasets": dict(Dataset=None, load_dataset=None)}
    for name, content in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["torchtext"].vocab = sys.modules["torchtext.vocab"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # it has no flash-attn and says so, several times
        package = importlib.import_module("scgpt")
        importlib.import_module("scgpt.tasks.cell_emb")
    yield package
    for name in [n for n in sys.modules if n.split(".")[0] == "scgpt"]:
        del sys.modules[name]


def same_draws(monkeypatch, official, adata, vocab, seed=0):
    """Make the package's global random numbers, cell by cell, those of our hash; one process loads the data."""
    ids = np.array([vocab[g] for g in adata.var_names])
    rows = [ids[row.nonzero()[0]] for row in adata.X.toarray()]
    keys = sc.cell_keys(adata.obs_names, seed)
    ties = iter([sc.draws(key, row, 0) for key, row in zip(keys, rows)])
    orders = iter([np.argsort(sc.draws(key, row, 1)) for key, row in zip(keys, rows)])
    randperms = {len(row): [] for row in rows}
    for row, order in zip(rows, orders):
        randperms[len(row)].append(torch.from_numpy(order))
    monkeypatch.setattr(np.random, "rand", lambda n: next(ties))
    monkeypatch.setattr(official.data_collator.torch, "randperm", lambda n, device=None: randperms[n].pop(0))
    monkeypatch.setattr(sys.modules["scgpt.tasks.cell_emb"].os, "sched_getaffinity", lambda pid: ())


@pytest.mark.filterwarnings("ignore")               # the package's own deprecations
@pytest.mark.parametrize("max_tokens", [1200, 40])
@pytest.mark.parametrize("layout", ["flash", "stock"])
def test_cell_embeddings_equal_those_of_the_published_package(tmp_path, monkeypatch, official, layout, max_tokens):
    folder, adata = write_folder(tmp_path / "model", layout), cells()
    ours = encode(adata, folder, max_seq_len=max_tokens)
    assert max_tokens == 1200 or (np.diff(adata.X.indptr) > max_tokens).sum() > 3       # some cells are cut
    same_draws(monkeypatch, official, adata, sc.read_folder(folder)[1])
    theirs = official.tasks.embed_data(adata.copy(), folder, gene_col="index", max_length=max_tokens, batch_size=5,
                                       device="cpu", use_fast_transformer=False).obsm["X_scGPT"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)     # float32 round-off over three layers; rows have length 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["flash", "stock"])
def test_gene_embeddings_equal_those_of_the_published_package(tmp_path, official, layout):
    folder = write_folder(tmp_path / "model", layout)
    vocab = official.tokenizer.GeneVocab.from_file(folder / "vocab.json")
    model = official.model.TransformerModel(len(vocab), DIM, HEADS, HIDDEN, LAYERS, vocab=vocab, pad_value=-2)
    official.utils.load_pretrained(model, torch.load(folder / "best_model.pt", weights_only=True), verbose=False)
    with torch.no_grad():
        theirs = model.encoder(torch.tensor(vocab(GENES))).numpy()
    ours, matched, missing = sc.gene_embeddings(GENES, folder)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)     # one layer norm in float32
    assert matched == GENES and missing == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("values", [
    np.random.default_rng(0).poisson(2, 3000) + 1, np.random.default_rng(1).negative_binomial(1, 0.02, 997) + 1,
    np.random.default_rng(2).gamma(1, 1, 500) + 0.01, np.ones(40), [7], [1, 2], np.arange(1, 51), [1, 90000, 3]])
def test_binning_is_the_published_one_for_the_same_random_numbers(monkeypatch, official, values):
    values = np.asarray(values, np.float32)
    rand = np.random.default_rng(3).random(len(values))
    monkeypatch.setattr(np.random, "rand", lambda n: rand)
    np.testing.assert_array_equal(sc.bin_values(values, rand), official.preprocess.binning(values, 51))


# --- what must not matter ---------------------------------------------------------------------------------------

def test_an_embedding_does_not_depend_on_the_batch(folder):
    adata = cells(n=20)
    alone = np.concatenate([encode(adata[i:i + 1], folder, batch_size=1) for i in range(adata.n_obs)])
    np.testing.assert_allclose(encode(adata, folder, batch_size=20), alone, atol=1e-6)      # order of float32 sums
    np.testing.assert_allclose(encode(adata, folder, block_rows=7), alone, atol=1e-6)


def test_padding_does_not_matter_where_attention_is_masked():
    q, k, v = torch.randn(3, 5, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    for lengths in ([9, 3, 7, 1, 8], [9] * 5):
        mask = torch.arange(9) < torch.tensor(lengths)[:, None]
        exact, masked = sc.attend(q, k, v, lengths), sc.attend_padded(q, k, v, mask[:, None, None], fast=False)
        for i, n in enumerate(lengths):
            torch.testing.assert_close(masked[i, :, :n], exact[i, :, :n])


def test_the_masked_path_of_other_devices_gives_the_same_cells(folder, monkeypatch):
    exact = encode(cells(), folder)
    monkeypatch.setattr(sc, "attend", lambda q, k, v, lengths, mask, fast: sc.attend_padded(q, k, v, mask, fast))
    np.testing.assert_allclose(encode(cells(), folder), exact, atol=1e-6)


def test_permuting_the_cells_permutes_the_rows(folder):
    adata, order = cells(n=15), np.random.default_rng(1).permutation(15)
    np.testing.assert_allclose(encode(adata[order], folder), encode(adata, folder)[order], atol=1e-6)


@pytest.mark.parametrize("max_seq_len", [None, 30])
def test_the_order_of_the_genes_in_the_file_does_not_matter(folder, max_seq_len):
    adata, order = cells(), np.random.default_rng(1).permutation(len(GENES))
    np.testing.assert_allclose(encode(adata[:, order].copy(), folder, max_seq_len=max_seq_len),
                               encode(adata, folder, max_seq_len=max_seq_len), atol=1e-6)


def test_dense_counts_in_a_layer_and_symbols_in_a_column_give_the_same(folder):
    adata = cells()
    other = ad.AnnData(np.log1p(adata.X.toarray()), obs=adata.obs, layers={"counts": adata.X.toarray()},
                       var=pd.DataFrame({"feature_name": GENES}, index=[f"id{i}" for i in range(len(GENES))]))
    np.testing.assert_array_equal(encode(other, folder), encode(adata, folder))


def test_embeddings_have_unit_length_and_repeat_exactly(folder):
    adata = cells()
    z = encode(adata, folder)
    assert z.shape == (12, DIM) and z.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(z, encode(adata, folder))
    assert np.abs(z - encode(adata, folder, seed=1)).max() > 1e-4      # the seed reaches the ties of the binning


def test_bfloat16_agrees_and_is_taken_only_if_faster_and_close(folder, monkeypatch):
    adata = cells()
    exact, half = encode(adata, folder), encode(adata, folder, dtype="bfloat16")
    assert (exact * half).sum(1).min() > 0.999              # bfloat16 keeps 8 bits; errors average over 32 terms
    for gain, floor, expected in ((2.0, 0.99, "bfloat16"), (0.5, 0.99, "float32"), (2.0, 1.1, "float32")):
        monkeypatch.setattr(sc, "MIN_COSINE", floor)
        encoder = sc.Encoder(folder, device="cpu")
        run = encoder._cls
        seconds = {"float32": gain, "bfloat16": 1.0}
        encoder._timed = lambda inputs, e=encoder, run=run, s=seconds: (s[e.dtype], run(*inputs))
        encoder.encode(adata.X, encoder.match(GENES).ids, adata.obs_names)
        assert encoder.dtype == expected and "cosine" in encoder.why


@pytest.mark.parametrize("n, limit", [(300, 2**19), (300, 2**10), (1, 2**10)])
def test_attention_in_blocks_is_attention(n, limit):
    q, k, v = torch.randn(3, 1, 2, n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sc.sdpa_in_blocks(q, k, v, limit),
                               torch.nn.functional.scaled_dot_product_attention(q, k, v))


# --- tokens ----------------------------------------------------------------------------------------------------

def test_a_long_cell_keeps_a_random_subset_and_never_more_than_max_seq_len(folder, monkeypatch):
    adata, seen = cells(density=0.9), []
    real = sc.Encoder._cls
    monkeypatch.setattr(sc.Encoder, "_cls", lambda self, *inputs: seen.append(inputs) or real(self, *inputs))
    encode(adata, folder, max_seq_len=25)
    lengths = np.concatenate([inputs[2] for inputs in seen])
    np.testing.assert_array_equal(np.sort(lengths), np.sort(np.minimum(np.diff(adata.X.indptr) + 1, 25)))
    cls = sc.read_folder(folder)[1]["<cls>"]
    for ids, bins, sizes in seen:
        assert (ids[:, 0] == cls).all() and (bins[:, 0] == 0).all()
        assert all(len(set(row[:n].tolist())) == n for row, n in zip(ids, sizes))      # no gene twice


def test_automatic_length_is_all_genes_but_at_most_1200(folder):
    counts = sp.csr_matrix(np.ones((1, 1500), np.float32))
    for n_vars, expected in ((163, 164), (1199, 1200), (1500, 1200)):
        encoder = sc.Encoder(folder, device="cpu", dtype="float32")
        seen = []
        encoder._cls = lambda ids, bins, lengths, s=seen: s.append(lengths) or torch.ones(len(lengths), DIM)
        encoder.encode(counts[:, :n_vars], np.arange(n_vars) % 160, ["a"])
        assert seen == [[expected]]


def test_random_numbers_are_uniform_and_differ_between_cells_genes_and_streams():
    keys, ids = sc.cell_keys([f"cell{i}" for i in range(100)], 0), np.arange(1000)
    u = np.stack([[sc.draws(key, ids, stream) for key in keys] for stream in (0, 1)])
    assert len(np.unique(u)) == u.size and 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003                      # 5 standard errors of 200,000 draws
    assert abs(np.corrcoef(u[0].ravel(), u[1].ravel())[0, 1]) < 0.016


def test_batches_hold_every_cell_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(200, 1201, 2000)
    batches = list(sc.batches_by_length(lengths, 9600))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(2000))
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded < 1.01 * lengths.sum() and all(len(b) * lengths[b].max() <= 9600 for b in batches)


# --- names -----------------------------------------------------------------------------------------------------

def test_names_are_found_under_other_spellings_and_the_rest_is_reported(folder):
    vocab = sc.read_folder(folder)[1]
    found = sc.match_genes(["GENE5", "HLA.A", "C1ORF112", "ENSG00000283886.9", "GENE999", "<cls>"], vocab)
    assert found.matched == ["GENE5", "HLA.A", "C1ORF112", "ENSG00000283886.9"]
    assert found.missing == ["GENE999", "<cls>"]
    assert found.renamed == {"HLA.A": "HLA-A", "C1ORF112": "C1orf112", "ENSG00000283886.9": "ENSG00000283886.3"}
    np.testing.assert_array_equal(found.ids, [vocab["GENE5"], vocab["HLA-A"], vocab["C1orf112"],
                                              vocab["ENSG00000283886.3"], -1, -1])
    second = sc.match_genes(["ENSG01", "ENSG02"], vocab, gene_ids={"ENSG01": "GENE7"})
    np.testing.assert_array_equal(second.ids, [vocab["GENE7"], -1])


def test_a_token_goes_to_its_exact_name_never_to_two_genes_and_never_to_another_species(folder):
    vocab = sc.read_folder(folder)[1]
    found = sc.match_genes(["HLA.A", "HLA-A", "gene3", "Gene3", "GENE3"], vocab)
    np.testing.assert_array_equal(found.ids, [-1, vocab["HLA-A"], -1, -1, vocab["GENE3"]])


def test_saved_gene_embeddings_carry_their_names_and_the_missing_ones(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(config, "OUT_DIR", str(tmp_path / "out"))
    names = ["GENE1", "NOT_A_GENE", "GENE0"]
    matched = sc.save_gene_embeddings(names, folder, str(tmp_path / "out" / "gene_embeddings.npy"), key="k")
    array, record = artifacts.load_array("gene_embeddings.npy", (None, DIM)), artifacts.record("gene_embeddings.npy")
    assert matched == ["GENE1", "GENE0"] == record["genes"] and record["missing"] == ["NOT_A_GENE"]
    assert record["ids"] == artifacts.hash_ids(matched) and record["key"] == "k"
    np.testing.assert_array_equal(array, sc.gene_embeddings(names, folder)[0])
    assert "1 of 3 genes are not in the scGPT vocabulary (NOT_A_GENE)" in capsys.readouterr().out
    assert config.OUT_DIR == str(tmp_path / "out")


def test_the_released_vocabulary_covers_the_a549_genes():
    paths = [DATA / "scgpt_vocab" / "default_census_vocab.json", DATA / "a549_multiome" / "rna.h5ad"]
    if not all(p.exists() for p in paths):
        pytest.skip(f"needs {paths[0]} and {paths[1]}")
    vocab = sc.read_vocab(paths[0])
    assert len(vocab) == 60_697 and [vocab[t] for t in sc.SPECIAL] == [60_694, 60_695, 60_696]
    genes = ad.read_h5ad(paths[1], backed="r").var_names
    found = sc.match_genes(genes, vocab)
    print(f"A549: {len(found.matched)} of {len(genes)} genes, {len(found.renamed)} under another spelling")
    # 89.5 %; the rest are retired symbols, old clone names, and genes of the mouse cells of the same experiment.
    assert len(found.matched) == 1060 and len(genes) == 1185 and "Fgfr2" in found.missing


# --- what must be refused ---------------------------------------------------------------------------------------

def refuse(folder, *words):
    with pytest.raises(ValueError) as err:
        sc.read_folder(folder)
    for word in words:
        assert word in str(err.value), str(err.value)


BROKEN = {
    "a missing encoder weight": (dict(change=lambda s: s.pop("value_encoder.norm.weight")), "1 missing: value_encoder"),
    "a missing layer": (dict(nlayers=LAYERS + 1), "12 missing: transformer_encoder.layers.3"),
    "a layer too many": (dict(nlayers=LAYERS - 1), "12 unknown: transformer_encoder.layers.2"),
    "an unknown weight": (dict(change=lambda s: s.update({"dsbn.weight": torch.ones(3)})), "1 unknown: dsbn.weight"),
    "another width": (dict(embsize=2 * DIM), "of another shape: encoder.embedding.weight"),
    "another value encoder": (dict(input_emb_style="category"), "input_emb_style is 'category'"),
    "another order of norms": (dict(pre_norm=True), "pre_norm is True"),
    "no size": (dict(embsize=None), "does not give embsize"),
    "heads that do not divide": (dict(nheads=5), "no multiple of nheads 5"),
    "nan in the weights": (dict(change=lambda s: s["encoder.enc_norm.bias"].fill_(torch.nan)), "nan or infinite"),
    "something else than tensors": (dict(change=lambda s: s.update(epoch=3)), "not a plain dictionary of tensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_is_refused_that_has(tmp_path, case):
    how, message = BROKEN[case]
    refuse(write_folder(tmp_path / "model", **how), str(tmp_path / "model"), message)


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_truncated_weights_are_refused(tmp_path, keep):
    weights = write_folder(tmp_path / "model") / "best_model.pt"
    weights.write_bytes(weights.read_bytes()[:keep])
    refuse(weights.parent, "best_model.pt", "Download it again")


def test_weights_that_would_run_code_are_refused(tmp_path):
    weights = write_folder(tmp_path / "model") / "best_model.pt"
    torch.save({"encoder.embedding.weight": Path("x")}, weights)
    refuse(weights.parent, "best_model.pt", "cannot be read as weights")


@pytest.mark.parametrize("name", sc.FILES)
def test_a_missing_file_is_named(tmp_path, name):
    (write_folder(tmp_path / "model") / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        sc.read_folder(tmp_path / "model")


@pytest.mark.parametrize("edit, message", [
    (lambda v: v.pop("GENE3"), "are not 0 .. "), (lambda v: v.update(GENE3=v["GENE4"]), "are not 0 .. "),
    (lambda v: v.update(EXTRA=len(v)), "but best_model.pt has 166 embeddings")])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, edit, message):
    path = write_folder(tmp_path / "model") / "vocab.json"
    vocab = json.loads(path.read_text())
    edit(vocab)
    path.write_text(json.dumps(vocab))
    refuse(path.parent, "vocab.json", message)
    path.write_text(path.read_text()[:50])
    refuse(path.parent, "vocab.json", "not readable JSON")


def test_a_vocabulary_without_special_tokens_gets_them_at_the_end(tmp_path):
    folder = write_folder(tmp_path / "model")
    whole = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({t: i for t, i in whole.items() if t not in sc.SPECIAL}))
    assert sc.read_folder(folder)[1] == whole


@pytest.mark.parametrize("adata, message", [
    (cells(genes=[*GENES[:99], *(f"X{i}" for i in range(60))]), "only 99 of 159 genes"),
    (cells(genes=[g.lower() for g in GENES]), "look like another species")])
def test_the_wrong_genes_are_refused(folder, adata, message):
    with pytest.raises(ValueError, match=message):
        encode(adata, folder)


@pytest.mark.parametrize("value, message", [(-1, "negative"), (np.nan, "nan"), (np.inf, "infinite")])
def test_impossible_counts_are_refused(folder, value, message):
    adata = cells()
    adata.X[3, 5] = value
    with pytest.raises(ValueError, match=message):
        encode(adata, folder)


def test_a_cell_without_genes_is_named(folder):
    adata = cells()
    adata.X = adata.X.multiply(np.arange(12)[:, None] != 4).tocsr()
    with pytest.raises(ValueError, match="1 cells express none of the 163 matched genes .first: cell4"):
        encode(adata, folder)


@pytest.mark.parametrize("setting", [dict(max_seq_len=1), dict(batch_size=0), dict(dtype="float8")])
def test_impossible_settings_are_refused(folder, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        sc.Encoder(folder, device="cpu", **setting)


def test_names_and_columns_that_do_not_fit_the_counts_are_refused(folder):
    encoder = sc.Encoder(folder, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="one per row and one per column"):
        encoder.encode(np.ones((2, 3)), np.arange(3), ["a"])
