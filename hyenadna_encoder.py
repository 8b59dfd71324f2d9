"""HyenaDNA: peak sequences -> peak embeddings (P, 256) -> cell embeddings z_ATAC (N, 256), for inference.

One block, tokens 0 .. L-1, width D = 256, order 2 (every convolution is causal and acts on one channel):

    [x0 x1 v]  = s * (W_in norm1(r) + b_in)            s has 3 taps per channel
    y          = x0 (h * (x1 v) + d x1 v)              h has L taps, d is the filter's bias
    r         <- r + W_out y + b_out
    r         <- r + W_2 gelu(W_1 norm2(r) + b_1) + b_2
    h(t)       = MLP_sin(z_t) (exp(-|delta| t / (M - 1)) + 0.05)      M = max_seq_len
    z_t        = [t / (M - 1), cos(f w_t), -sin(f w_t)],  w_t = 2 pi t / M
    embedding  = mean over the nucleotides of norm_f(r)

    cell c     = sum_p a_cp E_p / sum_p a_cp           a_cp = idf_p if peak p is open in c, else 0

h(t) does not depend on L, so it is computed once per length, not per batch, and d joins it as h(0) += d.
No special token is added: the released tokenizer appends [SEP] (id 1), which no nucleotide can see,
because the model is causal, and which the mean would leave out. Padding goes to the right for the same
reason; on the left, as the released tokenizer puts it, it would change every embedding.

Shapes  ids (B, L) -> (B, L, 256); sequences (P) -> (P, 256); cells x peaks (N, P) -> (N, 256).
Dtypes  float32; bfloat16, if asked for, in the dense layers only (residual, norms, FFT stay float32).
Ref     Nguyen et al. 2023, HyenaDNA (arXiv 2306.15794); Poli et al. 2023, Hyena Hierarchy (2302.10866).
"""
import hashlib
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.linalg
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

import config
import linear_encoder

# The commits whose weights and config this module was written for; a hub name without one is refused.
REVISIONS = {
    "LongSafari/hyenadna-tiny-1k-seqlen-hf": "e8c1effa8673814e257e627d2e1eda9ea5a373f6",
    "LongSafari/hyenadna-small-32k-seqlen-hf": "8fe770c78eb13fe33bf81501612faeddf4d6f331",
    "LongSafari/hyenadna-medium-160k-seqlen-hf": "7ebf71773d22c0ede2cc55cb2be15ee8c289e1ce",
}
SAFE = "LongSafari/hyenadna-small-32k-seqlen-hf (config.json and model.safetensors)"

PAD, UNKNOWN = 4, 6
TOKENS = np.full(256, UNKNOWN, dtype=np.uint8)
for _base, _id in zip("ACGTN", range(7, 12)):
    TOKENS[ord(_base)] = TOKENS[ord(_base.lower())] = _id     # the genome's soft mask is not a token
COMPLEMENT = str.maketrans("ACGTacgt", "TGCAtgca")
MAX_LOST = 0.01                 # share of the peaks that may lie outside the genome before it is another build


# --- the architecture --------------------------------------------------------------------------------------

class HyenaDNAConfig(PretrainedConfig):
    """The fields of the released config.json that shape the model; any other field is kept and ignored."""
    model_type = "hyenadna"

    def __init__(self, d_model=256, n_layer=4, d_inner=None, vocab_size=12, pad_vocab_size_multiple=8,
                 max_seq_len=32770, emb_dim=5, filter_order=64, num_inner_mlps=2, hyena_order=2,
                 short_filter_order=3, activation_freq=10, layer_norm_epsilon=1e-5, initializer_range=0.02,
                 **kwargs):
        self.d_model, self.n_layer, self.d_inner = d_model, n_layer, d_inner or 4 * d_model
        self.vocab_size, self.pad_vocab_size_multiple = vocab_size, pad_vocab_size_multiple
        self.max_seq_len, self.emb_dim, self.filter_order = max_seq_len, emb_dim, filter_order
        self.num_inner_mlps, self.hyena_order = num_inner_mlps, hyena_order
        self.short_filter_order, self.activation_freq = short_filter_order, activation_freq
        self.layer_norm_epsilon, self.initializer_range = layer_norm_epsilon, initializer_range
        super().__init__(**kwargs)


class Buffers(nn.Module):
    """Constants that the checkpoints hold under a name of their own."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Sine(nn.Module):
    def __init__(self, width, freq):
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, width), float(freq)))


class Cast:
    """A parameter in another dtype: cast once, and again only after it has changed."""

    def __init__(self):
        self.held = {}

    def __call__(self, p, dtype):
        if p.dtype == dtype:
            return p
        stamp = (p.data_ptr(), p._version, dtype)
        if self.held.get(id(p), (None,))[0] != stamp:
            self.held[id(p)] = stamp, p.detach().to(dtype)
        return self.held[id(p)][1]


class LongFilter(nn.Module):
    """The implicit filter h and its bias d, as the spectrum that the convolution multiplies with."""

    def __init__(self, c):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(c.d_model))
        widths = [c.emb_dim] + [c.filter_order] * (c.num_inner_mlps + 1)
        # One sine serves all layers; the checkpoints number it 1 and the linear layers 0, 2, 4, ...
        layers = {str(2 * i): nn.Linear(a, b) for i, (a, b) in enumerate(zip(widths, widths[1:]))}
        layers["1"] = Sine(c.filter_order, c.activation_freq)
        layers[str(2 * len(widths) - 2)] = nn.Linear(c.filter_order, c.d_model, bias=False)
        self.implicit_filter = nn.ModuleDict(layers)
        self.pos_emb = Buffers(**position_features(c.max_seq_len, c.emb_dim))
        slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
        self.modulation = Buffers(deltas=torch.linspace(slow, fast, c.d_model)[None, None])
        self.held = {}

    def taps(self, length):
        """h(0 .. length-1) with d in h(0), (D, length); float64, on the CPU because MPS has none."""
        p = {name: value.detach().cpu().double() for name, value in self.state_dict().items()}
        z, t = p["pos_emb.z"][0, :length], p["pos_emb.t"][0, :length]
        *inner, last = sorted(int(name) for name in self.implicit_filter if name != "1")
        for k in inner:
            z = F.linear(z, p[f"implicit_filter.{k}.weight"], p[f"implicit_filter.{k}.bias"])
            z = torch.sin(p["implicit_filter.1.freq"] * z)
        h = F.linear(z, p[f"implicit_filter.{last}.weight"]) * (torch.exp(-t * p["modulation.deltas"][0].abs()) + 0.05)
        h[0] += p["bias"]
        return h.T.contiguous()

    def spectrum(self, length, size):
        """rfft of the taps, (D, size // 2 + 1), held per length until a parameter changes."""
        stamp = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if self.held.get("stamp") != stamp or len(self.held) > 64:
            self.held = {"stamp": stamp}
        if length not in self.held:
            self.held[length] = torch.fft.rfft(self.taps(length), n=size).to(torch.complex64).to(self.bias.device)
        return self.held[length]


def position_features(length, width):
    """Time and complex exponentials as the original makes them: z (1, M, width), t (1, M, 1)."""
    t = torch.linspace(0, 1, length)[None, :, None]
    w = 2 * math.pi * torch.linspace(0, length - 1, length)[None, :, None] / length
    bands = (width - 1) // 2
    f = torch.linspace(1e-4, bands - 1, bands)[None, None]
    return {"z": torch.cat([t, torch.cos(f * w), -torch.sin(f * w)], dim=-1), "t": t}


class Mixer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.in_proj = nn.Linear(c.d_model, 3 * c.d_model)
        self.out_proj = nn.Linear(c.d_model, c.d_model)
        self.short_filter = nn.Conv1d(3 * c.d_model, 3 * c.d_model, c.short_filter_order, groups=3 * c.d_model,
                                      padding=c.short_filter_order - 1)
        self.filter_fn = LongFilter(c)

    def forward(self, x, cast):
        length = x.shape[1]
        u = dense(x, self.in_proj, cast).transpose(1, 2)                    # (B, 3 D, L)
        short = self.short_filter
        u = F.conv1d(u, cast(short.weight, x.dtype), cast(short.bias, x.dtype), padding=short.padding,
                     groups=short.groups)[..., :length]
        x0, x1, v = u.chunk(3, dim=1)                                       # (B, D, L) each
        size = scipy.fft.next_fast_len(2 * length - 1, real=True)           # no tap wraps around
        spectrum = torch.fft.rfft((x1 * v).float(), n=size) * self.filter_fn.spectrum(length, size)
        y = torch.fft.irfft(spectrum, n=size)[..., :length].to(x.dtype)
        return dense((x0 * y).transpose(1, 2), self.out_proj, cast)         # (B, L, D)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.d_model), nn.LayerNorm(c.d_model)
        self.mixer = Mixer(c)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.d_model, c.d_inner), "fc2": nn.Linear(c.d_inner, c.d_model)})

    def forward(self, r, cast, dtype):
        r = r + self.mixer(self.norm1(r).to(dtype), cast)
        inner = dense(self.norm2(r).to(dtype), self.mlp["fc1"], cast, gelu=True)
        return r + dense(inner, self.mlp["fc2"], cast)                      # float32 + bfloat16 = float32


def dense(x, layer, cast, gelu=False):
    """A linear layer in x's dtype, followed by gelu (tanh form) if asked for."""
    weight, bias = cast(layer.weight, x.dtype), cast(layer.bias, x.dtype)
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
            x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):      # not without AVX-512
        # The same sums, gelu applied while the tile is in cache: 1.4 times as fast as the two calls below.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh")
    x = F.linear(x, weight, bias)
    return F.gelu(x, approximate="tanh") if gelu else x


class HyenaDNA(PreTrainedModel):
    """ids (B, L) -> final hidden states (B, L, D), without gradients. Parameter names are the -hf release's."""
    config_class = HyenaDNAConfig
    base_model_prefix = "hyena"
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]      # predicts the next base; no part of the embedding

    def __init__(self, c):
        super().__init__(c)
        rows = -(-c.vocab_size // c.pad_vocab_size_multiple) * c.pad_vocab_size_multiple
        self.backbone = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"word_embeddings": nn.Embedding(rows, c.d_model)}),
            "layers": nn.ModuleList([Block(c) for _ in range(c.n_layer)]),
            "ln_f": nn.LayerNorm(c.d_model, eps=c.layer_norm_epsilon),
        })
        self.cast = Cast()
        self.post_init()

    @torch.no_grad()
    def forward(self, input_ids, dtype=torch.float32):
        r = self.backbone["embeddings"]["word_embeddings"](input_ids)
        for layer in self.backbone["layers"]:
            r = layer(r, self.cast, dtype)
        return self.backbone["ln_f"](r)


# --- loading weights -----------------------------------------------------------------------------------------

def load_model(source=None, revision=None):
    """A released HyenaDNA in float32, ready for inference; every weight of the backbone present, none left over.

    source    folder with config.json and model.safetensors (-hf release) or weights.ckpt (original release), or
              a name on the hub; None = config.HYENADNA_MODEL_DIR
    revision  commit of a hub name; None = the one in REVISIONS
    No code of the repository is executed: only these three files are read.
    """
    source = str(source or config.HYENADNA_MODEL_DIR)
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(source, revision)
    c = _read_config(folder / "config.json")
    weights = next((folder / n for n in ("model.safetensors", "weights.ckpt") if (folder / n).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor weights.ckpt.\n"
                                f"  Download one of them from {SAFE} into it.")
    _check_blob(weights)
    model = _from_safetensors(folder, c) if weights.suffix == ".safetensors" else _from_checkpoint(weights, c)
    return model.requires_grad_(False).eval()


def _download(name, revision):
    """Folder in the hub's cache with the three files, at a pinned commit."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or (name not in REVISIONS and Path(name).parent.is_dir()):
        raise FileNotFoundError(f"{name} is not a folder.\n"
                                f"  Download {SAFE} into it, or --set HYENADNA_MODEL_DIR=FOLDER.")
    revision = revision or REVISIONS.get(name)
    if revision is None:
        raise ValueError(f"{name} is neither a folder nor a HyenaDNA release with a known commit "
                         f"({', '.join(REVISIONS)}).\n  Download {SAFE} and give its folder, or give revision=COMMIT.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=["config.json", "model.safetensors", "weights.ckpt"]))
    except Exception as err:                # the hub raises a dozen kinds; all mean that the files did not arrive
        raise OSError(f"{name} at {revision} could not be downloaded ({type(err).__name__}: {str(err)[:200]}).\n"
                      f"  Check the network, or put config.json and model.safetensors into a folder by hand and "
                      "--set HYENADNA_MODEL_DIR=FOLDER.") from err


def _check_blob(path):
    """The hub's cache names a large file by its SHA-256: compare, so that a damaged download is an error."""
    name = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != name:
            raise ValueError(f"{path} is damaged: SHA-256 {found}, the hub says {name}.\n"
                             "  Delete it and download it again.")


def _read_config(path):
    """HyenaDNAConfig from the config.json of either release; the original nests the mixer under "layer"."""
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found.\n  The folder needs config.json beside the weights; "
                                f"take both from {SAFE}.") from None
    except ValueError as err:
        raise ValueError(f"{path} is not readable JSON ({err}).\n  Download it again from {SAFE}.") from err
    layer = fields.pop("layer", None) or {}
    renamed = {"max_seq_len": "l_max", "emb_dim": "emb_dim", "filter_order": "filter_order", "hyena_order": "order",
               "num_inner_mlps": "num_inner_mlps"}
    fields |= {new: layer[old] for new, old in renamed.items() if old in layer}
    kind = fields.get("model_type", "hyenadna" if layer.get("_name_") == "hyena" else "unknown")
    if kind != "hyenadna" or "max_seq_len" not in fields or "d_model" not in fields:
        raise ValueError(f"{path} describes a model of type {kind!r}, not a HyenaDNA.\n  Use {SAFE}.")
    c = HyenaDNAConfig(**{k: v for k, v in fields.items() if k not in ("model_type", "auto_map", "architectures")})
    if (c.hyena_order, c.short_filter_order) != (2, 3) or c.emb_dim % 2 == 0 or c.d_model != config.HYENADNA_D_MODEL:
        raise ValueError(f"{path}: order {c.hyena_order}, short filter {c.short_filter_order}, emb_dim {c.emb_dim}, "
                         f"d_model {c.d_model}; needed are 2, 3, an odd number and {config.HYENADNA_D_MODEL}.\n"
                         f"  Use {SAFE}, or --set HYENADNA_D_MODEL={c.d_model} for a narrower release.")
    return c


def _from_safetensors(folder, c):
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()           # what it would print about keys is raised below
    logging.disable_progress_bar()
    try:
        model, found = HyenaDNA.from_pretrained(folder, config=c, local_files_only=True, use_safetensors=True,
                                                dtype=torch.float32, ignore_mismatched_sizes=True,
                                                output_loading_info=True)
    except Exception as err:                # safetensors and transformers have no common exception for a bad file
        raise ValueError(f"{folder}/model.safetensors cannot be read ({type(err).__name__}: {str(err)[:200]}): "
                         f"truncated or not safetensors.\n  Download it again from {SAFE}.") from err
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    unexpected = [k for k in found["unexpected_keys"] if not re.search(r"implicit_filter\.[1-9]\d*\.freq$", k)]
    _refuse_misfits(folder / "model.safetensors", found["missing_keys"], unexpected,
                    [k if isinstance(k, str) else k[0] for k in found["mismatched_keys"]])
    return model


def _from_checkpoint(path, c):
    """The original weights.ckpt: keys model.backbone...; ".layer" after mixer and mlp where it was checkpointed."""
    state = {re.sub(r"\.(mixer|mlp)\.layer\.", r".\1.", key).removeprefix("model."): value
             for key, value in _read_checkpoint(path).items() if key.startswith("model.backbone.")}
    # The one sine of a filter is listed once per use; keep the first.
    for key in [k for k in state if re.search(r"implicit_filter\.\d+\.freq$", k) and not k.endswith(".1.freq")]:
        first = state.get(re.sub(r"\d+\.freq$", "1.freq", key))
        if first is not None and torch.equal(first, state[key]):
            del state[key]
    model = HyenaDNA(c)
    want = model.state_dict()
    _refuse_misfits(path, want.keys() - state.keys(), state.keys() - want.keys(),
                    [k for k in want.keys() & state.keys() if want[k].shape != state[k].shape])
    model.load_state_dict(state)
    return model


class Inert:
    """Stands for every object of a checkpoint that is not a tensor or a plain value: holds and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _read_checkpoint(path):
    """state_dict of a Lightning checkpoint, read with weights_only=True.

    Beside the weights it pickles settings and optimizer objects, which weights_only refuses. They are replaced
    by name: nothing that the file names is imported or called. What is still refused is an error.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(_empty_dict if name == "collections.defaultdict" else Inert, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    except Exception as err:                # a damaged or hostile file can fail in any way
        raise ValueError(f"{path} cannot be read as plain weights ({type(err).__name__}: {str(err)[:200]}).\n"
                         f"  It is truncated, or would run code. Use the safetensors release instead: {SAFE}.") from err


def _empty_dict(*args):
    return {}


def _refuse_misfits(path, missing, unexpected, misshaped):
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    found = [f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
             for kind, keys in kinds.items() if keys]
    if found:
        raise ValueError(f"{path} does not fit the HyenaDNA that config.json beside it describes: weights "
                         f"{'; '.join(found)}.\n  The two come from different models, or the file is incomplete. "
                         f"Take both from {SAFE}.")


# --- sequences -> embeddings ----------------------------------------------------------------------------------

def encode_sequences(sequences, model, reverse_complement=False, batch_size=None, device=None, dtype=None, bar=None):
    """Embeddings (P, D), float32: the mean of the final hidden states over the nucleotides of each sequence.

    sequences           (P) strings of any case and length; ACGTN, anything else is the unknown token
    reverse_complement  average with the embedding of the opposite strand
    batch_size          sequences at once; None = config.HYENADNA_BATCH_SIZE, else MPS 16, CUDA 64, CPU 8
    device              None = where the model is
    dtype               of the dense layers: None = float32, or bfloat16 (torch dtype or its name)
    bar                 tqdm bar to advance by the sequences done
    Sorted by length, so batches hold equal lengths where there are any; the rest is padded on the right.
    """
    if reverse_complement:
        ends = [s.translate(COMPLEMENT)[::-1] for s in sequences]
        return (encode_sequences(sequences, model, False, batch_size, device, dtype, bar)
                + encode_sequences(ends, model, False, batch_size, device, dtype)) / 2
    model.to(device or model.device).eval()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    ids = [TOKENS[np.frombuffer(s.encode("ascii", "replace"), dtype=np.uint8)] for s in sequences]
    lengths = np.array([len(i) for i in ids], dtype=np.int64)
    longest = model.config.max_seq_len
    bad = np.flatnonzero((lengths == 0) | (lengths > longest))
    if len(bad):
        raise ValueError(f"sequence {bad[0]} has {lengths[bad[0]]:,} bases; HyenaDNA takes 1 to {longest:,} "
                         f"({len(bad):,} such sequences).\n  Remove empty peaks, and split or narrow the longest.")
    out = np.empty((len(ids), model.config.d_model), dtype=np.float32)
    for rows in _batches(lengths, batch_size or default_batch_size(model.device)):
        out[rows] = _encode_batch([ids[i] for i in rows], lengths[rows], model, dtype)
        if bar is not None:
            bar.update(len(rows))
    return out


def default_batch_size(device):
    return config.HYENADNA_BATCH_SIZE or {"cuda": 64, "mps": 16}.get(torch.device(device).type, 8)


def _batches(lengths, size, tokens=2048):
    """Arrays of rows, sorted by length: at most size rows, size * tokens bases, and a quarter of padding.

    The bases bound memory. The padding costs time, and precision too: the rounding of an FFT is as large at the
    first token as at the last, so 2,000 tokens of padding behind one base cost it a digit.
    """
    order = np.argsort(lengths, kind="stable")
    first = 0
    while first < len(order):
        rows = order[first:first + size]
        bases = lengths[rows] * np.arange(1, len(rows) + 1)
        n = max(1, ((bases <= size * tokens) & (lengths[rows] <= 1.25 * lengths[rows[0]])).sum())
        yield rows[:n]
        first += n


def _encode_batch(ids, lengths, model, dtype):
    width = int(lengths.max())
    if lengths.min() < width:               # few different widths, so that few filters have to be made
        width = min(-(-width // 16) * 16, model.config.max_seq_len)
    padded = np.full((len(ids), width), PAD, dtype=np.int64)
    for row, tokens in zip(padded, ids):
        row[:len(tokens)] = tokens
    hidden = model(torch.from_numpy(padded).to(model.device), dtype)            # (B, L, D)
    n = torch.from_numpy(lengths).to(model.device)[:, None]
    real = torch.arange(width, device=model.device)[None] < n                   # (B, L)
    return ((hidden * real[..., None]).sum(dim=1) / n).cpu().numpy()


def choose_dtype(model, sequences):
    """(dtype, why) for EMB_DTYPE = None: bfloat16 if faster here and to a cosine of 0.9999 the same, else float32.

    The cosine is the smallest over the given sequences (64 will do), of the embeddings minus their mean: the raw
    ones share nearly everything, and what sets cells apart is in the rest.
    """
    x, w = torch.randn(2048, 256, device=model.device), torch.randn(1024, 256, device=model.device)
    seconds = {dtype: _seconds(lambda d=dtype: F.linear(x.to(d), w.to(d))) for dtype in (torch.float32, torch.bfloat16)}
    speed = seconds[torch.float32] / seconds[torch.bfloat16]
    if speed < 1.3:
        return torch.float32, f"float32: bfloat16 is only {speed:.1f} times as fast on {model.device}"
    a, b = (encode_sequences(sequences, model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    cosine = ((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()
    fine = cosine >= 0.9999
    return (torch.bfloat16 if fine else torch.float32,
            f"{'bfloat16' if fine else 'float32'}: bfloat16 agrees to a cosine of {cosine:.6f} on {len(a)} sequences, "
            f"and its matrix product is {speed:.1f} times as fast on {model.device}")


def _seconds(run, repeats=5):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run().sum().item()                  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def embed_peaks(peaks, genome, model, starts=None, **options):
    """Shards (first row, embeddings (rows, D)) of a peak table, in order, with a progress bar.

    peaks    DataFrame with chrom, start, end (0-based half-open), in the order of the result
    starts   first rows of the shards to compute; None = all of shard_starts(len(peaks)). Leave out what is
             already on disk (resuming) or what another process does (torchrun)
    options  of encode_sequences
    """
    every = shard_starts(len(peaks))
    starts = every if starts is None else starts
    fetch = _fetcher(peaks, genome)
    sizes = {first: min(config.EMB_SHARD_ROWS, len(peaks) - first) for first in every}
    todo = sum(sizes[first] for first in starts)
    with tqdm(total=len(peaks), initial=len(peaks) - todo, unit="peak", desc="HyenaDNA") as bar:
        for first in starts:
            rows = peaks.iloc[first:first + sizes[first]]
            yield first, encode_sequences(fetch(rows), model, bar=bar, **options)


def shard_starts(n_peaks):
    return list(range(0, n_peaks, config.EMB_SHARD_ROWS))


# --- peaks -> sequences -----------------------------------------------------------------------------------------

def peak_sequences(peaks, genome):
    """The (P) upper-case sequences of peaks (DataFrame: chrom, start, end; 0-based half-open) in a genome file.

    genome   FASTA, plain or bgzip (.fa, .fa.gz), or .2bit. chr1 and 1, chrM and MT mean the same.
    What lies outside the genome reads as N and is counted on the screen; an error above 1 % of the peaks.
    """
    return _fetcher(peaks, genome)(peaks)


def outside(peaks, lengths):
    """Masks (P,) of the peaks on a chromosome that the genome lacks, and past the end of one that it has."""
    ends = peaks["chrom"].astype(str).map(_aliases(lengths)).map(lengths)
    absent = ends.isna().to_numpy()
    past = (~absent & ((peaks["end"].to_numpy() > ends.to_numpy()) | (peaks["start"].to_numpy() < 0)))
    return absent, past


def _aliases(names):
    """Every accepted spelling -> the genome's own name."""
    plain = {}
    for name in names:
        bare = re.sub(r"^chr", "", name, flags=re.IGNORECASE)
        for other in {"M": ("M", "MT"), "MT": ("M", "MT")}.get(bare, (bare,)):
            plain |= {spelling: name for spelling in (other, "chr" + other) if spelling not in names}
    return plain | {name: name for name in names}


def _fetcher(peaks, genome):
    """Checks the whole table against the genome once; returns rows -> sequences."""
    lengths, read = _open_genome(Path(genome))
    absent, past = outside(peaks, lengths)
    lost = absent | past
    if lost.any():
        row = peaks.iloc[int(np.flatnonzero(lost)[0])]
        what = (f"{lost.sum():,} of {len(lost):,} peaks are not in {genome}: {absent.sum():,} on a chromosome that it "
                f"does not have, {past.sum():,} past the end of one (first: {row.chrom}:{row.start}-{row.end})")
        if lost.mean() > MAX_LOST:
            raise ValueError(f"{what}.\n  It is another genome build. Give the build on which the peaks were called "
                             "(hg38 for most human data) with --genome FASTA.")
        print(f"{what}; the missing bases read as N")
    names = _aliases(lengths)

    def fetch(rows):
        out = []
        for chrom, start, end in zip(rows["chrom"].astype(str), rows["start"], rows["end"]):
            name = names.get(chrom)
            left, right = max(int(start), 0), min(int(end), lengths.get(name, 0))
            inside = read(name, left, right).upper() if left < right else ""
            out.append("N" * (min(left, int(end)) - int(start)) + inside.ljust(int(end) - min(left, int(end)), "N"))
        return out

    return fetch


def _open_genome(path):
    """({chromosome: length}, read(chromosome, start, end)) of a FASTA or 2bit file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found.\n  Give the genome of the peaks' build with --genome FASTA.")
    try:
        return _open_2bit(path) if path.suffix == ".2bit" else _open_fasta(path)
    except Exception as err:                # each reader raises kinds of its own, down to a bare Exception
        raise ValueError(f"{path} cannot be read as a genome ({type(err).__name__}: {str(err)[:200]}).\n"
                         "  Needed: FASTA, plain or compressed with bgzip (gzip alone cannot be read at random: "
                         "gunzip it, or gunzip and bgzip), or .2bit.") from err


def _open_fasta(path):
    import pyfaidx

    # An index beside the genome is used; a new one goes to the output folder, the only place we write to.
    beside = path.with_name(path.name + ".fai").is_file()
    folder = path.parent if beside else Path(config.OUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    fasta = pyfaidx.Fasta(str(path), as_raw=True, indexname=str(folder / (path.name + ".fai")),
                          gzi_indexname=str(folder / (path.name + ".gzi")))
    lengths = {name: len(fasta[name]) for name in fasta.keys()}
    return lengths, lambda name, start, end: fasta[name][start:end]


def _open_2bit(path):
    import py2bit

    genome = py2bit.open(str(path))
    return dict(genome.chroms()), genome.sequence


# --- peak embeddings -> cell embeddings ---------------------------------------------------------------------------

def cell_embeddings(blocks, peak_embeddings, weighting="tfidf", centre=True, scale="agreement"):
    """Cell embeddings (N, D), float32: weighted mean of the embeddings of a cell's open peaks.

    blocks      function without arguments that gives the csr blocks (n, P) of the cells in order (called twice, and
                once more for "tfidf"). Any count above 0 is an open peak
    weighting   "tfidf": a_cp = log(1 + N / n_p), n_p cells with peak p open (the term frequency divides out of a
                mean); "none": 1
    centre      subtract the mean over cells ("agreement" always does)
    scale       "none"; "dimension": divide each dimension by its standard deviation; "agreement": rotate to the
                axes on which two halves of a cell's peaks agree best, each scaled by how well (agreement_axes)
    A cell without open peaks gets the mean of the others (0 when centred) and is counted on the screen.
    """
    if scale not in ("agreement", "dimension", "none"):
        raise ValueError(f"scale={scale!r}; known are agreement, dimension, none.")
    fit = fit_peak_means(blocks, peak_embeddings, weighting)
    table, mean = peak_table(peak_embeddings, fit["weights"], fit["common"]), fit["mean"]
    z = np.concatenate([peak_means((block > 0) @ table).astype(np.float32) for block in blocks()])
    empty = np.isnan(z[:, 0])
    if empty.any():
        print(f"{empty.sum():,} of {len(z):,} cells have none of the {len(table):,} peaks open; "
              "they get the mean cell")
    z[empty] = mean
    if scale == "agreement":
        return ((z - mean) @ fit["axes"]).astype(np.float32)
    sd = z.std(axis=0, dtype=np.float64) if scale == "dimension" else np.ones(len(mean))
    return ((z - mean if centre else z + fit["common"]) / np.where(sd > 0, sd, 1)).astype(np.float32)


def fit_peak_means(blocks, peak_embeddings, weighting="tfidf"):
    """What makes cells of open peaks: {weights (P,), common (D,), mean (D,), axes (D, D)}, float64.

        z = (sum_p a_cp (E_p - common) / sum_p a_cp - mean) axes        a_cp = weights_p if peak p is open in c, else 0
    blocks and weighting as in cell_embeddings; one pass over the cells, and one before it for "tfidf".
    """
    if weighting not in ("tfidf", "none"):
        raise ValueError(f"weighting={weighting!r}; known are tfidf, none.")
    weights = inverse_frequency(blocks, len(peak_embeddings)) if weighting == "tfidf" else np.ones(len(peak_embeddings))
    # All peaks embed almost alike: the common part is taken out before the sums, so rounding leaves the rest.
    common = np.average(peak_embeddings.astype(np.float64), axis=0, weights=weights)
    table = peak_table(peak_embeddings, weights, common)
    half = np.random.default_rng(config.SEED).random(len(table)) < 0.5
    moments, total, n = np.zeros((2 * len(common) + 1,) * 2), np.zeros(len(common)), 0
    for block in blocks():
        is_open = sp.csc_matrix(block) > 0
        sums = [is_open[:, side] @ table[side] for side in (half, ~half)]                    # (n, D + 1) each
        one, two, both = (peak_means(s) for s in (*sums, sums[0] + sums[1]))
        rows = np.column_stack([np.ones(len(one)), one, two])
        rows = rows[np.isfinite(rows).all(axis=1)]
        moments += rows.T @ rows
        both = both[np.isfinite(both[:, 0])]
        total, n = total + both.sum(axis=0), n + len(both)
    return dict(weights=weights, common=common, mean=total / max(n, 1), axes=agreement_axes(moments))


def peak_table(peak_embeddings, weights, common):
    """[weighted embedding without the common part, weight] of every peak, (P, D + 1) float64."""
    return np.column_stack([(peak_embeddings - common) * weights[:, None], weights])


def peak_means(sums):
    """Weighted means (n, D) from sums (n, D + 1) of rows of peak_table; nan where no peak is open."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, :-1] / sums[:, -1:]


def inverse_frequency(blocks, n_peaks):
    """log(1 + N / n_p), (P,); n_p counts the cells in which peak p is open."""
    counts, n_cells = np.zeros(n_peaks), 0
    for block in blocks():
        counts += np.bincount(block.indices[block.data > 0], minlength=n_peaks)
        n_cells += block.shape[0]
    return np.log1p(n_cells / np.maximum(counts, 1))


def agreement_axes(moments, most=64, ridge=0.05):
    """Matrix (D, D) to axes that tell cells apart, best first, from the moments of two halves of their peaks.

        S q = rho (T + ridge mean(T)) q        S covariance across the halves, T mean covariance within one
        axes = q max(rho, 0)                   rho: share of an axis's variance that both halves show

    The halves share the cell but no peak, so chance in which peaks were caught has rho = 0, however large it is
    (base composition makes it large); what a cell type changes has rho > 0, however small.
    Solved in the largest principal axes of T, at most one per 10 cells, each first scaled to variance 1.
    moments   (2 D + 1, 2 D + 1) sums of products of [1, half one, half two]
    """
    n, sums = max(moments[0, 0], 1), moments[0, 1:]
    cov = moments[1:, 1:] / n - np.outer(sums, sums) / n**2
    d = len(cov) // 2
    within, across = (cov[:d, :d] + cov[d:, d:]) / 2, (cov[:d, d:] + cov[d:, :d]) / 2
    variance, principal = np.linalg.eigh(within)
    k = max(min(most, int(n) // 10, int((variance > variance[-1] * 1e-13).sum())), 1)
    white = principal[:, -k:] / np.sqrt(np.maximum(variance[-k:], np.finfo(float).tiny))     # (D, k)
    rho, q = scipy.linalg.eigh(white.T @ across @ white / (1 + ridge))
    axes = np.zeros((d, d))
    axes[:, :k] = linear_encoder.signed(white @ q * np.maximum(rho, 0))[:, ::-1]
    return axes
