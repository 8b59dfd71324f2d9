"""scGPT cell and gene embeddings from the released checkpoint folder, in plain PyTorch.

    token_j = LN(E[gene_j]) + V(bin_j)            first token: E[<cls>] with value pad_value
    bin_j   = quantile bin of the cell's non-zero counts, 1 .. n_bins - 1
    z_R     = h / |h|,   h = Transformer(token_0 .. token_L)[0]        post-norm, no positions
    e_g     = LN(E[g])

The folder holds args.json, vocab.json and best_model.pt. The weights load strictly: what the encoder needs
must be there with the right shape, and nothing unknown may be left over. Preprocessing is that of the
published `embed_data`, whose two random choices (ties of the binning; which genes stay when a cell has more
than max_seq_len - 1) are here a hash of (seed, cell name, gene): a cell gets the same tokens in any batch,
in any order of cells and of genes.

Exact shortcuts: the value encoder sees only n_bins values, so it is a table; the last layer is evaluated for
the <cls> token alone; cells are batched by length, so that almost nothing is padding.

Shapes  counts (N, n_vars) -> z_R (N, 512) float32 of unit length; G names -> e_g (G', 512), G' matched genes
Ref     Cui et al. 2024, scGPT: toward building a foundation model for single-cell multi-omics using
        generative AI, Nature Methods; Vaswani et al. 2017 (attention); Steele et al. 2014 (SplitMix64).
"""
import contextlib
import copy
import hashlib
import json
import pickle
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import artifacts
import config

FILES = ("args.json", "vocab.json", "best_model.pt")
SPECIAL = ("<pad>", "<cls>", "<eoc>")
MAX_TOKENS = 1200                   # length the model was trained with
MIN_GENES = 100                     # fewer matched genes than this is a wrong file, not a small panel
MIN_COSINE = 0.9999                 # bfloat16 is used only if every probe cell agrees this well
BATCH_CELLS = {"cuda": 64, "mps": 16, "cpu": 8}     # cells of full length at once; short cells: more
NAME_COLUMNS = ("gene_name", "gene_symbol", "symbol", "feature_name")
# Parts of a checkpoint that play no role before the cell embedding: training heads, batch labels of decoders.
HEADS = ("decoder.", "cls_decoder.", "mvc_decoder.", "flag_encoder.", "batch_encoder.",
         "grad_reverse_discriminator.")


# --- the network -----------------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.Wqkv = nn.Linear(dim, 3 * dim)         # rows: all queries, all keys, all values
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, lengths, mask, cls_only, fast):
        B, L, D = x.shape
        W, b = self.Wqkv.weight, self.Wqkv.bias
        x = x.to(W.dtype)
        q = F.linear(x[:, :1] if cls_only else x, W[:D], b[:D])                     # (B, Lq, D)
        kv = F.linear(x, W[D:], b[D:]).view(B, L, 2, self.heads, -1)
        q = q.view(B, q.shape[1], self.heads, -1).transpose(1, 2)                   # (B, H, Lq, D / H)
        k, v = kv.permute(2, 0, 3, 1, 4)                                            # (B, H, L, D / H) each
        out = attend(q, k, v, lengths, mask, fast)                                  # (B, H, Lq, D / H)
        return self.out_proj(out.transpose(1, 2).flatten(2))                        # (B, Lq, D)


class Layer(nn.Module):
    """x <- LN(x + attention(x)); x <- LN(x + W2 relu(W1 x)). The running sum stays in float32."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, lengths, mask, cls_only=False, fast=False):
        attended = self.self_attn(x, lengths, mask, cls_only, fast)
        x = self.norm1((x[:, :1] if cls_only else x) + attended)
        hidden = self.linear1(x.to(self.linear1.weight.dtype)).relu_()
        return self.norm2(x + self.linear2(hidden))

    def linears_to(self, dtype):
        for part in (self.self_attn.Wqkv, self.self_attn.out_proj, self.linear1, self.linear2):
            part.to(dtype)
        return self


def attend(q, k, v, lengths, mask=None, fast=False):
    """softmax(q k' / sqrt(d)) v, each cell over its own tokens only.

    q (B, H, Lq, d), k, v (B, H, L, d), lengths (B,) int list, mask (B, 1, 1, L) True at real tokens or None if
    nothing is padded -> (B, H, Lq, d). What stands at padding is arbitrary but finite; no token attends to it.
    """
    if q.device.type != "cpu":
        return attend_padded(q, k, v, mask, fast)
    out = torch.zeros_like(q)               # exact lengths: neither padding nor a mask to pay for
    kernel = sdpa_in_blocks if q.dtype == torch.bfloat16 else F.scaled_dot_product_attention
    for i, n in enumerate(lengths):
        out[i, :, :n] = kernel(q[i:i + 1, :, :n], k[i:i + 1, :, :n], v[i:i + 1, :, :n])[0]
    return out


def attend_padded(q, k, v, mask, fast):
    """All cells in one kernel; without padding no mask, since the fastest kernels take none."""
    if not (fast and q.device.type == "cuda"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused, set_priority=True):
        half = (t.to(torch.bfloat16) for t in (q, k, v))
        return F.scaled_dot_product_attention(*half, attn_mask=mask).to(q.dtype)


def sdpa_in_blocks(q, k, v, scores=2**19):
    """Attention of one cell as two plain products per head and block of queries, (1, H, L, d) each.

    On a CPU without matrix units PyTorch's fused kernel runs bfloat16 at float32 speed, while the plain
    product is twice as fast. A block's scores (1 MB) stay in the cache.
    """
    q, k, v = (q * q.shape[-1] ** -0.5).contiguous()[0], k.contiguous()[0], v.contiguous()[0]
    out = torch.empty_like(q)
    rows = max(16, scores // k.shape[1])
    for h in range(len(q)):
        for start in range(0, q.shape[1], rows):
            part = slice(start, start + rows)
            out[h, part] = (q[h, part] @ k[h].T).softmax(-1) @ v[h]
    return out[None]


class GeneEncoder(nn.Module):
    def __init__(self, n_tokens, dim):
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, dim)
        self.enc_norm = nn.LayerNorm(dim)


class ValueEncoder(nn.Module):
    """V(b) = LN(W2 relu(W1 b)); b is a bin number or pad_value."""

    def __init__(self, dim):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(1, dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, b):
        return self.norm(self.linear2(self.linear1(b[:, None]).relu()))             # (n,) -> (n, D)


class ScGPT(nn.Module):
    """The part of scGPT that leads to the cell embedding. Parameter names are those of the released file."""

    def __init__(self, n_tokens, dim, heads, hidden, n_layers, pad_value=-2, n_bins=51):
        super().__init__()
        self.dim, self.pad_value, self.n_bins = dim, pad_value, n_bins
        self.encoder = GeneEncoder(n_tokens, dim)
        self.value_encoder = ValueEncoder(dim)
        self.transformer_encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(dim, heads, hidden) for _ in range(n_layers))})

    def gene_table(self, ids=slice(None)):
        """e_g: the embedding table followed by its layer norm, (n, D)."""
        return self.encoder.enc_norm(self.encoder.embedding.weight[ids])

    def value_table(self):
        """V at pad_value (row 0) and at bins 1 .. n_bins - 1 (rows of that number), (n_bins, D)."""
        values = torch.arange(self.n_bins, dtype=torch.float32, device=self.encoder.embedding.weight.device)
        values[0] = self.pad_value
        return self.value_encoder(values)


# --- reading the released folder ---------------------------------------------------------------------------------

def read_folder(model_dir):
    """(ScGPT on the CPU, vocabulary {token: id}) of a released folder; ValueError if anything does not fit."""
    folder = Path(model_dir)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}.\n  scGPT needs {', '.join(FILES)} in one folder. Download the "
            "whole-human model and set SCGPT_MODEL_DIR,\n  or use --set RNA_ENCODER=pca.")
    args = read_args(folder / "args.json")
    vocab = read_vocab(folder / "vocab.json")
    state = read_state(folder / "best_model.pt")
    table = state.get("encoder.embedding.weight")
    if table is not None and len(table) != len(vocab):
        raise ValueError(f"{folder}/vocab.json names {len(vocab)} tokens, but best_model.pt has {len(table)} "
                         "embeddings.\n  The two belong to different models: take both from one download.")
    model = ScGPT(len(vocab), args["embsize"], args["nheads"], args["d_hid"], args["nlayers"],
                  args.get("pad_value", -2), args.get("n_bins", 51))
    load_strictly(model, state, folder)
    return model.eval().requires_grad_(False), vocab


def read_json(path):
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is not readable JSON ({err}).\n  Truncated? Download it again.") from err
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table.\n  Download it again.")
    return content


def read_args(path):
    args = read_json(path)
    missing = [name for name in ("embsize", "nheads", "d_hid", "nlayers") if not isinstance(args.get(name), int)]
    if missing:
        raise ValueError(f"{path} does not give {', '.join(missing)} as a number.\n  It is not the args.json of an "
                         "scGPT checkpoint.")
    wanted = {"input_emb_style": "continuous", "cell_emb_style": "cls", "pre_norm": False, "pad_token": "<pad>"}
    for name, value in wanted.items():
        if args.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {args[name]!r}, this encoder reads {value!r}.\n  It is another "
                             "architecture; use one of the released scGPT models (whole-human by default).")
    if args["embsize"] % args["nheads"]:
        raise ValueError(f"{path}: embsize {args['embsize']} is no multiple of nheads {args['nheads']}.\n"
                         "  Download it again.")
    return args


def read_vocab(path):
    """{token: id} with ids 0 .. n - 1; special tokens that the file lacks follow at the end, as published."""
    vocab = read_json(path)
    if sorted(vocab.values(), key=str) != sorted(range(len(vocab)), key=str):
        raise ValueError(f"{path}: the {len(vocab)} ids are not 0 .. {len(vocab) - 1}, each once.\n"
                         "  Truncated or edited? Download it again.")
    for token in SPECIAL:
        vocab.setdefault(token, len(vocab))
    return vocab


def read_state(path):
    """Named tensors of best_model.pt in the flash-attn layout, heads left out. Never unpickles code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as err:
        first = (str(err).splitlines() or [type(err).__name__])[0]
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) cannot be read as weights: {first[:150]}\n"
                         "  Truncated, or not a plain checkpoint. Download it again.") from err
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{path} is not a plain dictionary of tensors.\n  Use the released best_model.pt.")
    state = {name.replace("in_proj_", "Wqkv."): t for name, t in state.items() if not name.startswith(HEADS)}
    bad = [name for name, t in state.items() if not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"{path}: {len(bad)} tensors hold nan or infinite values (first: {bad[0]}).\n"
                         "  Download it again.")
    return state


def load_strictly(model, state, folder):
    """Copy the weights; ValueError unless names and shapes are exactly those of the model."""
    want = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in state.items()}
    shapes = [f"{name} {have[name]} instead of {shape}" for name, shape in want.items()
              if have.get(name, shape) != shape]
    faults = {"missing": [name for name in want if name not in have],
              "unknown": [name for name in have if name not in want], "of another shape": shapes}
    lines = [f"  {len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
             for what, names in faults.items() if names]
    if lines:
        raise ValueError(f"{folder}/best_model.pt is not the scGPT encoder that {folder}/args.json describes.\n"
                         + "\n".join(lines) + "\n  Take both files from one download of a released scGPT model.")
    model.load_state_dict(state)


# --- gene names --------------------------------------------------------------------------------------------------

class Match(NamedTuple):
    """Which gene is which token."""
    ids: np.ndarray         # (G,) int64, -1 where the vocabulary has no such gene
    matched: list           # names with a token, in their order
    missing: list           # names without
    renamed: dict           # name -> token, where the two differ


def match_genes(gene_names, vocab, gene_ids=None):
    """Look names up as they are; what is left by gene_ids, without an Ensembl version, in upper case (C1ORF112).

    gene_ids  a second name of each gene (Ensembl id or symbol), as a list beside gene_names or a dictionary
    A token that some gene has under its exact name is never given to another gene, and Actb or actb1 never
    becomes ACTB: those are other species, of which human data sets hold a few genes from mixed experiments.
    """
    names = [str(name) for name in gene_names]
    if gene_ids is None:
        others = [None] * len(names)
    elif isinstance(gene_ids, dict):
        others = [gene_ids.get(name) for name in names]
    else:
        others = list(gene_ids)
        if len(others) != len(names):
            raise ValueError(f"match_genes: {len(names)} gene names but {len(others)} gene ids; give one per gene.")
    taken = {name for name in names if name in vocab} | set(SPECIAL)
    spellings = loose_spellings(vocab)
    ids, renamed = np.full(len(names), -1, np.int64), {}
    for i, (name, other) in enumerate(zip(names, others)):
        token = name if name in vocab and name not in SPECIAL else None
        if token is None:
            token = other_spelling(name, other, vocab, spellings)
            if token is None or token in taken:
                continue
            taken.add(token)
            renamed[name] = token
        ids[i] = vocab[token]
    return Match(ids, [n for n, i in zip(names, ids) if i >= 0], [n for n, i in zip(names, ids) if i < 0], renamed)


def other_spelling(name, other, vocab, spellings):
    for text in filter(None, (other and str(other), name)):
        bare = re.sub(r"^(ENSG\d+)\.\d+$", r"\1", text)
        for candidate in (text, bare, spellings.get(bare)):
            if candidate in vocab:
                return candidate
    return None


def loose_spellings(vocab):
    """{spelling: token} for upper case, R's dots for hyphens (HLA.A) and unversioned Ensembl ids, if unambiguous."""
    found = {}
    for token in vocab:
        upper = token.upper()
        for text in {upper, upper.replace("-", "."), re.sub(r"^(ENSG\d+)\.\d+$", r"\1", upper)}:
            found.setdefault(text, set()).add(token)
    return {text: tokens.pop() for text, tokens in found.items() if len(tokens) == 1}


# --- a cell's tokens -----------------------------------------------------------------------------------------------

def cell_keys(cell_names, seed):
    """A 64-bit key per cell from (seed, name), (N,) uint64."""
    digests = (hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=8).digest() for name in cell_names)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def draws(keys, ids, stream):
    """Uniform numbers in [0, 1), a SplitMix64 hash of (cell key, token id, stream): no state, no order.

    stream  0 = ties of the binning, 1 = which genes of a long cell are kept
    """
    z = keys + (2 * ids.astype(np.uint64) + np.uint64(stream + 1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def bin_values(values, rand, n_bins=51):
    """Quantile bins 1 .. n_bins - 1 of a cell's positive values; a value on several edges falls among them by rand.

        edges = quantiles of values at 0, 1/(n_bins - 2), .., 1       low, high = edges below, edges up to the value
        bin   = ceil(rand (low - high) + high)

    values (n,) float32, rand (n,) in [0, 1) -> (n,) int. Counts are few distinct integers, so the edges are
    searched once per integer.
    """
    ranked = np.sort(values)
    place = (len(values) - 1) * np.linspace(0, 1, n_bins - 1)
    below = place.astype(np.intp)
    a, b = ranked[below], ranked[np.minimum(below + 1, len(values) - 1)]
    # Both forms of the interpolation, as numpy.quantile has them: edges must be equal to the last bit, since a
    # value on an edge is a tie and a value beside it is not.
    part, rise = place - below, b - a
    edges = np.where(part < 0.5, a + rise * part, b - rise * (1 - part))
    top = ranked[-1]
    if top <= 4096 and np.array_equal(ranked, np.trunc(ranked)):
        whole, steps = values.astype(np.intp), np.arange(int(top) + 1)
        high, low = np.searchsorted(edges, steps, "right")[whole], np.searchsorted(edges, steps, "left")[whole]
    else:
        high, low = np.searchsorted(edges, values, "right"), np.searchsorted(edges, values, "left")
    return np.ceil(rand * (low - high) + high).astype(np.int64)


def tokenize(counts, ids, keys, max_tokens, n_bins=51):
    """Genes and bins of some cells, <cls> not included.

    counts (n, G) canonical CSR without stored zeros, ids (G,) tokens of its columns, keys (n,) from cell_keys
    -> [(tokens (L_i,), bins (L_i,)), ...], L_i <= max_tokens - 1
    """
    rows = np.repeat(keys, np.diff(counts.indptr))
    tokens = ids[counts.indices]
    ties = draws(rows, tokens, 0)
    values = counts.data.astype(np.float32)
    cells = []
    for i, (start, stop) in enumerate(zip(counts.indptr[:-1], counts.indptr[1:])):
        cell = tokens[start:stop]
        bins = bin_values(values[start:stop], ties[start:stop], n_bins)
        if len(cell) >= max_tokens:
            kept = np.argpartition(draws(keys[i], cell, 1), max_tokens - 2)[:max_tokens - 1]
            cell, bins = cell[kept], bins[kept]
        cells.append((cell, bins))
    return cells


# --- the encoder ---------------------------------------------------------------------------------------------------

class Encoder:
    """A loaded scGPT that turns blocks of counts into cell embeddings.

    max_seq_len           tokens per cell with <cls>; None = min(n_vars + 1, 1200)
    batch_size            cells of full length at once (more of shorter ones); None = 64 CUDA, 16 MPS, 8 CPU
    use_fast_transformer  attention by the fused bfloat16 kernels of CUDA even when the rest is float32
    dtype                 "float32", "bfloat16", or None: chosen at the first block by choose_dtype()
    seed                  enters the hash that breaks ties of the binning and picks the genes of long cells
    """

    def __init__(self, model_dir, max_seq_len=None, batch_size=None, device=None, use_fast_transformer=False,
                 dtype=None, seed=0):
        if dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; use 'float32', 'bfloat16' or None (chosen by a check).")
        for name, value, least in (("max_seq_len", max_seq_len, 2), ("batch_size", batch_size, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; use at least {least}, or None.")
        self.model_dir, self.seed, self.max_seq_len = Path(model_dir), seed, max_seq_len
        self.device = torch.device(device or pick_device())
        self.batch_size = batch_size or BATCH_CELLS.get(self.device.type, 8)
        self.fast, self.why = use_fast_transformer, "as set"
        self.model, self.vocab = read_folder(model_dir)
        self.model.to(self.device)
        with torch.inference_mode():
            self.genes, self.values = self.model.gene_table(), self.model.value_table()     # (V, D), (n_bins, D)
        self.layers, self.dtype = None, None
        if dtype:
            self._use(dtype)

    def match(self, gene_names, gene_ids=None, min_genes=MIN_GENES):
        """match_genes() on this vocabulary; ValueError below min_genes."""
        found = match_genes(gene_names, self.vocab, gene_ids)
        where = f"{self.model_dir}/vocab.json"
        if len(found.matched) < min_genes:
            foreign = [name for name in found.missing if name.upper() in self.vocab]
            fix = (f"{len(foreign)} would match in upper case (first: {foreign[0]}) and look like another species: "
                   "map them to human orthologues." if len(foreign) > len(found.ids) / 2 else
                   "Give human gene symbols as names, or in a column " + ", ".join(NAME_COLUMNS) + ".")
            raise ValueError(
                f"{where}: only {len(found.matched)} of {len(found.ids)} genes are in the vocabulary (at least "
                f"{min_genes} needed; first missing: {', '.join(found.missing[:3])}).\n  {fix}")
        return found

    def gene_embeddings(self, ids):
        """e_g of token ids, (n, D) float32."""
        with torch.inference_mode():
            return self.genes[torch.as_tensor(ids, device=self.device)].float().cpu().numpy()

    def encode(self, counts, gene_ids, cell_names, progress=None):
        """Cell embeddings of one block, (n, D) float32, rows of unit length.

        counts      (n, n_vars) raw counts, CSR (or anything csr_matrix takes)
        gene_ids    (n_vars,) token of each column, -1 = not in the vocabulary: Encoder.match(...).ids
        cell_names  (n,) barcodes, which seed a cell's random choices
        progress    called with the number of cells just done
        """
        gene_ids, cell_names = np.asarray(gene_ids), list(map(str, cell_names))
        counts = self._clean(counts, gene_ids, cell_names)
        ids, keys = gene_ids[gene_ids >= 0], cell_keys(cell_names, self.seed)
        longest = self.max_seq_len or min(len(gene_ids) + 1, MAX_TOKENS)
        if self.dtype is None:
            self.choose_dtype(counts, ids, keys, longest)
        lengths = np.minimum(np.diff(counts.indptr) + 1, longest)
        out = torch.empty(len(keys), self.model.dim, device=self.device)
        with torch.inference_mode():
            for batch in batches_by_length(lengths, self.batch_size * longest):
                cells = tokenize(counts[batch], ids, keys[batch], longest, self.model.n_bins)
                out[self._send(batch)] = self._cls(*self._inputs(cells))
                if progress:
                    progress(len(batch))
            return F.normalize(out, dim=1).cpu().numpy()

    def choose_dtype(self, counts, ids, keys, longest, cells=4):
        """Take bfloat16 if it is faster on this device and the embeddings of a few cells agree; say why."""
        if self.device.type == "mps":
            return self._use("float32", "MPS")
        if not len(keys):
            return None
        probe = np.linspace(0, len(keys) - 1, min(cells, len(keys))).astype(int)
        inputs = self._inputs(tokenize(counts[probe], ids, keys[probe], longest, self.model.n_bins))
        seconds, z = {}, {}
        for dtype in ("float32", "bfloat16"):
            self._use(dtype)
            with torch.inference_mode():
                self._timed(inputs)                                 # first call: kernels are loaded
                seconds[dtype], z[dtype] = min((self._timed(inputs) for _ in range(2)), key=lambda pair: pair[0])
        cosine = F.cosine_similarity(z["float32"].float(), z["bfloat16"].float()).min().item()
        gain = seconds["float32"] / seconds["bfloat16"]
        good = cosine >= MIN_COSINE and gain > 1
        return self._use("bfloat16" if good else "float32",
                         f"bfloat16 is {gain:.1f}x as fast with cosine >= {cosine:.6f} to float32")

    def facts(self):
        """What determines the embeddings, for a record beside them."""
        return dict(encoder="scgpt", weights=artifacts.hash_file(self.model_dir / "best_model.pt"),
                    dtype=self.dtype, dtype_why=self.why, max_seq_len=self.max_seq_len, seed=self.seed,
                    fast_transformer=self.fast, device=str(self.device))

    def _use(self, dtype, why="as set"):
        kind = getattr(torch, dtype)
        layers = self.model.transformer_encoder["layers"]
        if kind != torch.float32:
            layers = [copy.deepcopy(layer).linears_to(kind) for layer in layers]
        self.layers, self.dtype, self.why = list(layers), dtype, why

    def _clean(self, counts, gene_ids, cell_names):
        """The matched columns as canonical CSR of positive values; ValueError for what cannot be embedded."""
        counts = sp.csr_matrix(counts)
        if counts.shape != (len(cell_names), len(gene_ids)):
            raise ValueError(f"Encoder.encode: counts are {counts.shape}, but there are {len(cell_names)} cell names "
                             f"and {len(gene_ids)} gene ids; give one per row and one per column.")
        counts = counts[:, np.flatnonzero(gene_ids >= 0)]
        counts.sum_duplicates()
        counts.eliminate_zeros()
        if not np.all(counts.data > 0) or not np.all(np.isfinite(counts.data)):
            raise ValueError("Encoder.encode: the expression values hold negative, nan or infinite entries.\n"
                             "  scGPT needs raw counts (in X or layers['counts']).")
        empty = np.flatnonzero(np.diff(counts.indptr) == 0)
        if len(empty):
            raise ValueError(f"{len(empty)} cells express none of the {counts.shape[1]} matched genes (first: "
                             f"{cell_names[empty[0]]}).\n  Their embedding would mean nothing. Leave them out.")
        return counts

    def _inputs(self, cells):
        """Padded tensors with <cls> first: tokens (B, L), bins (B, L), lengths (B,) as a list."""
        lengths = [len(tokens) + 1 for tokens, _ in cells]
        ids = np.full((len(cells), max(lengths)), self.vocab["<pad>"])
        bins = np.zeros(ids.shape, np.int64)            # row 0 of the value table: pad_value
        ids[:, 0] = self.vocab["<cls>"]
        for i, (tokens, values) in enumerate(cells):
            ids[i, 1:lengths[i]], bins[i, 1:lengths[i]] = tokens, values
        return self._send(ids), self._send(bins), lengths

    def _send(self, array):
        """To the device; from pinned memory on CUDA, so that the next batch is prepared while this one runs."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else \
            tensor.to(self.device)

    def _cls(self, ids, bins, lengths):
        """Output at <cls>, (B, D) float32, before normalisation."""
        x = F.embedding(ids, self.genes).add_(F.embedding(bins, self.values))       # (B, L, D)
        mask = (ids != self.vocab["<pad>"])[:, None, None] if min(lengths) < ids.shape[1] else None
        for layer in self.layers[:-1]:
            x = layer(x, lengths, mask, fast=self.fast)
        return self.layers[-1](x, lengths, mask, cls_only=True, fast=self.fast)[:, 0]

    def _timed(self, inputs):
        start = time.perf_counter()
        z = self._cls(*inputs).cpu()                    # the copy waits for the device
        return time.perf_counter() - start, z


def pick_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def batches_by_length(lengths, tokens):
    """Index arrays that cover all cells, longest first, each at most `tokens` tokens when padded to its longest."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, tokens // lengths[order[start]])
        yield order[start:stop]
        start = stop


# --- what the scripts call -----------------------------------------------------------------------------------------

def encode_rna(adata, model_dir, max_seq_len=None, batch_size=None, device=None, use_fast_transformer=False,
               dtype=None, seed=0, gene_ids=None, layer=None, block_rows=2048, progress=True):
    """scGPT embeddings of all cells, (N, D) float32, read in blocks, so a backed AnnData stays on disk.

    layer     None = layers["counts"] if there is one, else X
    gene_ids  second names of the genes, see match_genes
    The other arguments are those of Encoder.
    """
    encoder = Encoder(model_dir, max_seq_len or min(adata.n_vars + 1, MAX_TOKENS), batch_size, device,
                      use_fast_transformer, dtype, seed)
    found = encoder.match(best_names(adata, encoder.vocab), gene_ids)
    print(f"scGPT: {len(found.matched)} of {adata.n_vars} genes in the vocabulary ({len(found.renamed)} under another "
          f"spelling), {encoder.max_seq_len} tokens per cell at most, {encoder.device}")
    layer = layer or ("counts" if "counts" in adata.layers else None)
    matrix = adata.layers[layer] if layer else adata.X
    out = np.empty((adata.n_obs, encoder.model.dim), np.float32)
    with tqdm(total=adata.n_obs, unit="cell", desc="scGPT", disable=not progress) as bar:
        for start in range(0, adata.n_obs, block_rows):
            block = slice(start, min(start + block_rows, adata.n_obs))
            out[block] = encoder.encode(matrix[block], found.ids, adata.obs_names[block], bar.update)
    print(f"scGPT: {encoder.dtype} ({encoder.why})")
    return out


def best_names(adata, vocab):
    """The names or the symbol column of the genes, whichever the vocabulary knows best."""
    choices = [adata.var_names] + [adata.var[name] for name in NAME_COLUMNS if name in adata.var]
    return list(max(choices, key=lambda names: sum(str(name) in vocab for name in names)))


def gene_embeddings(gene_names, model_dir, gene_ids=None):
    """e_g of the genes that the vocabulary has: (array (G', D) float32, their names, the missing names)."""
    encoder = Encoder(model_dir, device="cpu", dtype="float32")
    found = encoder.match(gene_names, gene_ids, min_genes=1)
    return encoder.gene_embeddings(found.ids[found.ids >= 0]), found.matched, found.missing


def save_gene_embeddings(gene_names, model_dir, path, gene_ids=None, **record):
    """Write e_g of the matched genes to path (.npy), with its record; returns the names of its rows.

    record  further entries of the record (a stage passes key=...)
    """
    encoder = Encoder(model_dir, device="cpu", dtype="float32")
    found = encoder.match(gene_names, gene_ids, min_genes=1)
    array = encoder.gene_embeddings(found.ids[found.ids >= 0])
    weights = encoder.facts()["weights"]
    with out_folder(Path(path).parent):
        artifacts.save_array(Path(path).name, array, found.matched, **dict(
            dict(stage="gene_embeddings", encoder="scgpt", weights=weights), **record),
            genes=found.matched, missing=found.missing, renamed=found.renamed)
    if found.missing:
        print(f"{Path(path).name}: {len(found.missing)} of {len(found.ids)} genes are not in the scGPT vocabulary "
              f"({', '.join(found.missing[:3])}{', ...' if len(found.missing) > 3 else ''}).\n  They are left out; "
              f"{len(found.matched)} remain. Listed in {Path(path).name}.json under \"missing\".")
    return found.matched


@contextlib.contextmanager
def out_folder(folder):
    """Artifacts are written below OUT_DIR; the specification's call names a whole path instead."""
    before, config.OUT_DIR = config.OUT_DIR, str(folder)
    try:
        yield
    finally:
        config.OUT_DIR = before
