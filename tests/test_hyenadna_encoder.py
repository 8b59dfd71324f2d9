"""HyenaDNA against the published equations, evaluated directly in float64, and what a user can get wrong."""
import copy
import json
import os
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import config

pytest.importorskip("transformers")
import hyenadna_encoder as hd
from hyenadna_encoder import HyenaDNA, HyenaDNAConfig, cell_embeddings, encode_sequences, load_model, peak_sequences

SMALL = dict(d_model=32, n_layer=2, d_inner=64, max_seq_len=2050, filter_order=16)
IDS = {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}


# --- random weights in the released formats ------------------------------------------------------------------

def released_weights(d_model, n_layer, d_inner, max_seq_len, filter_order, emb_dim=5, seed=0):
    """{name below "backbone": float32 tensor} with the names, shapes and rough sizes of the release."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, sd=0.3, mean=0.0):
        return mean + sd * torch.randn(*shape, generator=g)

    t = torch.linspace(0, 1, max_seq_len)
    w = 2 * np.pi * torch.arange(max_seq_len) / max_seq_len
    bands = torch.linspace(1e-4, (emb_dim - 1) // 2 - 1, (emb_dim - 1) // 2)
    z = torch.cat([t[:, None], torch.cos(w[:, None] * bands), -torch.sin(w[:, None] * bands)], dim=1)
    out = {"embeddings.word_embeddings.weight": normal(16, d_model, sd=1),
           "ln_f.weight": normal(d_model, mean=1), "ln_f.bias": normal(d_model)}
    for i in range(n_layer):
        f = "mixer.filter_fn."
        layer = {
            "norm1.weight": normal(d_model, mean=1), "norm1.bias": normal(d_model),
            "norm2.weight": normal(d_model, mean=1), "norm2.bias": normal(d_model),
            "mixer.in_proj.weight": normal(3 * d_model, d_model, sd=d_model**-0.5),
            "mixer.in_proj.bias": normal(3 * d_model),
            "mixer.short_filter.weight": normal(3 * d_model, 1, 3, sd=0.5),
            "mixer.short_filter.bias": normal(3 * d_model),
            "mixer.out_proj.weight": normal(d_model, d_model, sd=d_model**-0.5), "mixer.out_proj.bias": normal(d_model),
            f + "bias": normal(d_model, sd=1),
            f + "implicit_filter.0.weight": normal(filter_order, emb_dim, sd=0.5),
            f + "implicit_filter.0.bias": normal(filter_order),
            f + "implicit_filter.1.freq": normal(1, filter_order, mean=10, sd=0.5),
            f + "implicit_filter.2.weight": normal(filter_order, filter_order, sd=0.5 * filter_order**-0.5),
            f + "implicit_filter.2.bias": normal(filter_order),
            f + "implicit_filter.4.weight": normal(filter_order, filter_order, sd=0.5 * filter_order**-0.5),
            f + "implicit_filter.4.bias": normal(filter_order),
            f + "implicit_filter.6.weight": normal(d_model, filter_order, sd=0.2 * filter_order**-0.5),
            f + "pos_emb.z": z[None].clone(), f + "pos_emb.t": t[None, :, None].clone(),
            f + "modulation.deltas": torch.linspace(np.log(1e-2) / 1.5, np.log(1e-2) / 0.3, d_model)[None, None],
            "mlp.fc1.weight": normal(d_inner, d_model, sd=d_model**-0.5), "mlp.fc1.bias": normal(d_inner),
            "mlp.fc2.weight": normal(d_model, d_inner, sd=d_inner**-0.5), "mlp.fc2.bias": normal(d_model),
        }
        out |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    return {name: value.float() for name, value in out.items()}


def write_hf(folder, shape=SMALL, weights=None, **fields):
    """The -hf release: config.json, model.safetensors (hyena.backbone..., lm_head), and code that must not run."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    weights = weights or released_weights(**shape)
    state = {"hyena.backbone." + name: value.contiguous() for name, value in weights.items()}
    state["lm_head.weight"] = torch.zeros(16, shape["d_model"])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="hyenadna", architectures=["HyenaDNAForCausalLM"], vocab_size=12, pad_vocab_size_multiple=8,
        emb_dim=5, hyena_order=2, short_filter_order=3, num_inner_mlps=2, layer_norm_epsilon=1e-5, use_bias=True,
        train_freq=True, activation_freq=10, pad_token_id=4, tie_word_embeddings=False, torch_dtype="float32",
        auto_map={"AutoModel": "modeling_hyena.HyenaDNAModel", "AutoConfig": "configuration_hyena.HyenaConfig"})
        | shape | fields))
    return folder


class TrainingSettings:
    """Something that only the training code knows, as in the Lightning file."""

    def __init__(self):
        self.lr = 6e-4


def write_ckpt(folder, shape=SMALL, weights=None, wrapped=False):
    """The original release: nested config.json, weights.ckpt with model.backbone... and the training's own objects."""
    folder.mkdir(exist_ok=True)
    weights = dict(weights or released_weights(**shape))
    for name in [n for n in weights if n.endswith("implicit_filter.1.freq")]:       # listed once per use
        weights |= {name.replace("filter.1.", f"filter.{k}."): weights[name] for k in (3, 5)}
    rename = (lambda n: n.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer.")) if wrapped else str
    state = {"model.backbone." + rename(name): value for name, value in weights.items()}
    state |= {"model.lm_head.weight": torch.zeros(16, shape["d_model"]), "decoder.0.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": TrainingSettings()}, folder / "weights.ckpt")
    (folder / "config.json").write_text(json.dumps(dict(
        d_model=shape["d_model"], n_layer=shape["n_layer"], d_inner=shape["d_inner"], vocab_size=12,
        pad_vocab_size_multiple=8, residual_in_fp32=True, embed_dropout=0.1,
        layer=dict(_name_="hyena", emb_dim=5, filter_order=shape["filter_order"], l_max=shape["max_seq_len"], w=10,
                   modulate=True, local_order=3))))
    return folder


# --- the published equations, one sum at a time, float64 --------------------------------------------------------

def direct_evaluation(weights, sequence, n_layer=2, **_):
    """Mean hidden state (D,) of one sequence: no FFT, no batching, no torch."""
    p = {name: value.double().numpy() for name, value in weights.items()}
    r = p["embeddings.word_embeddings.weight"][[IDS.get(base, 6) for base in sequence.upper()]]       # (L, D)
    for i in range(n_layer):
        w = {name.removeprefix(f"layers.{i}."): value for name, value in p.items() if name.startswith(f"layers.{i}.")}
        r = r + direct_mixer(w, norm(r, w["norm1.weight"], w["norm1.bias"]))
        inner = norm(r, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        r = r + inner @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return norm(r, p["ln_f.weight"], p["ln_f.bias"]).mean(axis=0)


def norm(x, weight, bias):
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * weight + bias


def direct_mixer(w, x):
    length, width = x.shape
    u = x @ w["mixer.in_proj.weight"].T + w["mixer.in_proj.bias"]
    padded = np.vstack([np.zeros((2, u.shape[1])), u])
    taps = w["mixer.short_filter.weight"][:, 0]
    u = sum(padded[k:k + length] * taps[:, k] for k in range(3)) + w["mixer.short_filter.bias"]
    gate_out, gate_in, v = u[:, :width], u[:, width:2 * width], u[:, 2 * width:]
    v = v * gate_in
    f = {name.removeprefix("mixer.filter_fn."): value for name, value in w.items()}
    z, t = f["pos_emb.z"][0, :length], f["pos_emb.t"][0, :length]
    for k in (0, 2, 4):
        z = z @ f[f"implicit_filter.{k}.weight"].T + f[f"implicit_filter.{k}.bias"]
        z = np.sin(f["implicit_filter.1.freq"] * z)
    h = (z @ f["implicit_filter.6.weight"].T) * (np.exp(-t * np.abs(f["modulation.deltas"][0])) + 0.05)
    y = v * w["mixer.filter_fn.bias"]
    for lag in range(length):               # y(s) += h(lag) v(s - lag)
        y[lag:] += h[lag] * v[:length - lag]
    return (y * gate_out) @ w["mixer.out_proj.weight"].T + w["mixer.out_proj.bias"]


def random_sequence(length, seed=0, letters="ACGT"):
    return "".join(np.random.default_rng(seed).choice(list(letters), length))


SEQUENCES = [random_sequence(n, seed=n, letters="ACGTNacgtnR") for n in
             (1, 2, 3, 5, 16, 31, 127, 500, 501, 751, 1000, 1021, 1999, 2000)]


@pytest.fixture(autouse=True)
def narrow_model(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "HYENADNA_D_MODEL", SMALL["d_model"])
    monkeypatch.setattr(config, "OUT_DIR", str(tmp_path / "out"))


@pytest.fixture(scope="module")
def expected():
    weights = released_weights(**SMALL)
    return np.array([direct_evaluation(weights, s, **SMALL) for s in SEQUENCES])


@pytest.fixture
def model(tmp_path):
    return load_model(write_hf(tmp_path / "hf"))


# --- parity --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("release", ["hf", "ckpt", "ckpt of a run with checkpointing"])
def test_embeddings_equal_the_direct_evaluation_for_every_length_and_release(tmp_path, expected, release):
    folder = tmp_path / "weights"
    write_hf(folder) if release == "hf" else write_ckpt(folder, wrapped="checkpointing" in release)
    got = encode_sequences(SEQUENCES, load_model(folder))
    # The bound; the final norm makes entries of size 1, and float32 sums of 2,000 leave about 1e-6.
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


def test_the_released_width_agrees_too(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HYENADNA_D_MODEL", 256)
    shape = dict(d_model=256, n_layer=4, d_inner=1024, max_seq_len=32770, filter_order=64)
    weights = released_weights(**shape, seed=1)
    model = load_model(write_hf(tmp_path / "full", shape, weights))
    assert sum(p.numel() for p in model.parameters()) + 16 * 256 == 3_281_664      # published, with its lm_head
    sequences = [random_sequence(n, n, "ACGTNacgt") for n in (1, 33, 501, 1501)]
    want = [direct_evaluation(weights, s, n_layer=4) for s in sequences]
    np.testing.assert_allclose(encode_sequences(sequences, model), want, atol=1e-5, rtol=0)


def test_position_features_made_here_are_those_of_the_release():
    made, released = hd.position_features(2050, 5), released_weights(**SMALL)
    for name in "zt":
        torch.testing.assert_close(made[name], released[f"layers.0.mixer.filter_fn.pos_emb.{name}"], atol=1e-6, rtol=0)


def test_bfloat16_layers_change_embeddings_little(model):
    sequences = [random_sequence(300, seed) for seed in range(8)]
    a, b = encode_sequences(sequences, model), encode_sequences(sequences, model, dtype="bfloat16")
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.9999            # the bound above which EMB_DTYPE = None may choose it
    assert not np.array_equal(a, b)


# --- batches, padding, cache ---------------------------------------------------------------------------------------

def test_right_padding_does_not_leak_into_the_real_tokens(model):
    ids = torch.tensor([[IDS[b] for b in random_sequence(200)]])
    padded = torch.cat([ids, torch.full((1, 57), hd.PAD)], dim=1)
    torch.testing.assert_close(model(padded)[:, :200], model(ids), atol=1e-5, rtol=0)    # another FFT length


def test_an_embedding_does_not_depend_on_the_other_sequences_of_its_batch(model):
    sequences = [random_sequence(n, n) for n in (40, 300, 41, 299, 300, 7)]
    alone = np.vstack([encode_sequences([s], model) for s in sequences])
    for batch_size in (2, 3, 64):
        np.testing.assert_allclose(encode_sequences(sequences, model, batch_size=batch_size), alone, atol=1e-5, rtol=0)


def test_held_filters_give_the_same_result_and_are_remade_when_weights_change(model):
    s = [random_sequence(100)]
    first = encode_sequences(s, model)
    assert np.array_equal(encode_sequences(s, model), first)
    bf16 = encode_sequences(s, model, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    fresh = HyenaDNA(model.config)
    fresh.load_state_dict(model.state_dict())
    assert np.array_equal(encode_sequences(s, model), encode_sequences(s, fresh))
    assert not np.array_equal(encode_sequences(s, model, dtype=torch.bfloat16), bf16)


def test_soft_masked_bases_count_as_bases_and_unknown_letters_as_the_unknown_token(model):
    s = random_sequence(60)
    assert np.array_equal(encode_sequences([s.lower()], model), encode_sequences([s], model))
    assert np.array_equal(encode_sequences(["ACRYA"], model), encode_sequences(["AC??A"], model))
    assert not np.allclose(encode_sequences(["ACRYA"], model), encode_sequences(["ACNNA"], model))


def test_averaging_with_the_reverse_complement_makes_both_strands_equal(model):
    a, b = encode_sequences(["AACCGTNACG", "CGTNACGGTT"], model, reverse_complement=True)
    np.testing.assert_allclose(a, b, atol=1e-6)       # the same two terms, added in the other order
    assert not np.allclose(*encode_sequences(["AACCGTNACG", "CGTNACGGTT"], model), atol=1e-3)


def test_batches_cover_every_row_once_and_bound_the_bases_in_memory():
    lengths = np.array([5, 30_000, 7, 500, 500, 20_000, 1])
    batches = list(hd._batches(lengths, 4))
    assert sorted(np.concatenate(batches)) == list(range(7))
    assert all(len(b) == 1 or lengths[b].max() * len(b) <= 4 * 2048 for b in batches)


@pytest.mark.parametrize("bad", ["", "A" * 2051])
def test_empty_and_overlong_sequences_are_refused(model, bad):
    with pytest.raises(ValueError, match="1 to 2,050"):
        encode_sequences(["ACGT", bad], model)


def test_dtype_is_chosen_with_a_reason(model):
    dtype, why = hd.choose_dtype(model, [random_sequence(64, k) for k in range(4)])
    assert dtype in (torch.float32, torch.bfloat16) and why.startswith(str(dtype).removeprefix("torch."))


# --- loading -----------------------------------------------------------------------------------------------

def test_a_saved_model_reloads_to_the_same_embeddings(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    where = {"architectures": None, "_name_or_path": None}
    assert again.config.to_dict() | where == model.config.to_dict() | where
    assert np.array_equal(encode_sequences(SEQUENCES[:8], again), encode_sequences(SEQUENCES[:8], model))


def test_no_code_of_the_model_folder_runs(tmp_path):
    folder = write_hf(tmp_path / "hf")
    for name in ("modeling_hyena.py", "configuration_hyena.py", "tokenization_hyena.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_model(folder)
    assert not (tmp_path / "ran").exists()


class Command:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", ["os.system", "subprocess.call", "eval"])
def test_a_checkpoint_that_holds_a_command_never_runs_it(tmp_path, call):
    import subprocess

    folder, mark = write_ckpt(tmp_path / "ckpt"), tmp_path / "ran"
    command = {"os.system": Command(os.system, f"touch {mark}"),
               "subprocess.call": Command(subprocess.call, ["touch", str(mark)]),
               "eval": Command(eval, f"open({str(mark)!r}, 'w')")}[call]
    content = torch.load(folder / "weights.ckpt", weights_only=False)
    torch.save(content | {"callbacks": command}, folder / "weights.ckpt")
    if call == "os.system":                 # torch refuses the module outright
        with pytest.raises(ValueError, match="would run code(.|\n)*safetensors"):
            load_model(folder)
    else:                                   # replaced by an object that does nothing
        load_model(folder)
    assert not mark.exists()


def test_a_plain_pickle_is_refused_with_the_safe_alternative(tmp_path):
    folder = write_ckpt(tmp_path / "ckpt")
    (folder / "weights.ckpt").write_bytes(pickle.dumps({"state_dict": TrainingSettings()}))
    with pytest.raises(ValueError, match="safetensors release instead"):
        load_model(folder)


def edited(change):
    weights = released_weights(**SMALL)
    change(weights)
    return weights


@pytest.mark.parametrize("write", [write_hf, write_ckpt])
@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("layers.1.mlp.fc2.bias"), r"1 missing \(backbone.layers.1.mlp.fc2.bias\)"),
    (lambda w: w.update({"layers.1.attn.weight": torch.zeros(2)}), r"1 unexpected \(.*layers.1.attn.weight\)"),
    (lambda w: w.update({"ln_f.bias": torch.zeros(33)}), r"1 of another shape \(backbone.ln_f.bias\)"),
    (lambda w: w.pop("layers.0.mixer.filter_fn.implicit_filter.1.freq"), "missing .*freq"),
])
def test_weights_that_are_missing_left_over_or_misshaped_are_named(tmp_path, write, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path / "w", weights=edited(change)))


@pytest.mark.parametrize("write, name", [(write_hf, "model.safetensors"), (write_ckpt, "weights.ckpt")])
def test_truncated_weights_are_an_error_that_names_the_file(tmp_path, write, name):
    folder = write(tmp_path / "w")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match=name):
        load_model(folder)


@pytest.mark.parametrize("fields, message", [
    (dict(model_type="bert"), "type 'bert'"), (dict(hyena_order=3), "order 3"),
    (dict(d_model=64), "HYENADNA_D_MODEL=64")])
def test_another_architecture_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_model(write_hf(tmp_path / "w", **fields))


def test_missing_files_and_folders_are_named_with_the_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match="Download LongSafari"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_model(tmp_path / "empty")
    folder = write_hf(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor weights.ckpt"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        load_model(folder)
    with pytest.raises(ValueError, match="known commit"):
        load_model("somebody/else")


def test_a_download_that_differs_from_its_checksum_is_refused(tmp_path):
    folder = write_hf(tmp_path / "hf")
    blob = tmp_path / ("0" * 64)
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    with pytest.raises(ValueError, match="SHA-256"):
        load_model(folder)


# --- peaks -> sequences ------------------------------------------------------------------------------------

GENOME = {"chr1": random_sequence(1000, 1, "ACGTacgtN"), "chr2": random_sequence(437, 2),
          "chrM": random_sequence(90, 3)}


def write_fasta(path, names=str):
    text = "".join(f">{names(name)} x\n" + "\n".join(s[i:i + 60] for i in range(0, len(s), 60)) + "\n"
                   for name, s in GENOME.items())
    if path.suffix == ".gz":
        bgzf = pytest.importorskip("Bio.bgzf")
        with bgzf.open(str(path), "wt") as f:
            f.write(text)
    else:
        path.write_text(text)
    return path


def write_2bit(path):
    """The format of UCSC in a few lines: header, index, and per chromosome the N and mask runs and packed bases."""
    import struct

    def runs(mask):
        edges = np.flatnonzero(np.diff(np.r_[0, mask, 0]))
        return edges[::2], edges[1::2] - edges[::2]

    records = []
    for s in GENOME.values():
        letters = np.array(list(s))
        n, masked = runs(np.char.upper(letters) == "N"), runs(np.char.islower(letters))
        code = np.array([{"T": 0, "C": 1, "A": 2, "G": 3, "N": 0}[b] for b in s.upper()])
        code = np.r_[code, np.zeros(-len(code) % 4, int)].reshape(-1, 4) @ [64, 16, 4, 1]
        blocks = b"".join(struct.pack("<I", len(a)) + np.r_[a, b].astype("<u4").tobytes() for a, b in (n, masked))
        records.append(struct.pack("<I", len(s)) + blocks + struct.pack("<I", 0) + code.astype(np.uint8).tobytes())
    offset = 16 + sum(5 + len(name) for name in GENOME)
    index = b""
    for name, record in zip(GENOME, records):
        index += struct.pack("<B", len(name)) + name.encode() + struct.pack("<I", offset)
        offset += len(record)
    path.write_bytes(struct.pack("<IIII", 0x1A412743, 0, len(GENOME), 0) + index + b"".join(records))
    return path


def table(*peaks):
    return pd.DataFrame(peaks, columns=["chrom", "start", "end"])


PEAKS = table(("chr1", 0, 60), ("chr2", 55, 300), ("chr1", 990, 1000), ("chrM", 5, 6))
WANTED = [GENOME[c][a:b].upper() for c, a, b in PEAKS.itertuples(index=False)]


@pytest.mark.parametrize("name", ["genome.fa", "genome.fa.gz", "genome.2bit"])
@pytest.mark.parametrize("peaks_say", ["chr1", "1"])
def test_sequences_come_upper_case_from_every_format_and_naming(tmp_path, name, peaks_say):
    if name.endswith(".2bit"):
        pytest.importorskip("py2bit")
    path = (write_2bit if name.endswith(".2bit") else write_fasta)(tmp_path / name)
    peaks = PEAKS if peaks_say == "chr1" else PEAKS.assign(chrom=["1", "2", "1", "MT"])
    before = set(tmp_path.iterdir())
    assert peak_sequences(peaks, path) == WANTED
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "out"}       # the index too goes to the output folder


def test_a_genome_named_without_chr_serves_peaks_named_with_it(tmp_path):
    path = write_fasta(tmp_path / "g.fa", names=lambda n: {"chrM": "MT"}.get(n, n[3:]))
    assert peak_sequences(PEAKS, path) == WANTED


def test_a_few_peaks_past_the_end_are_filled_with_n_and_counted(tmp_path, capsys):
    lost = table(("chr2", 430, 447), ("chr2", -3, 4), ("chrUn_x", 5, 9))
    peaks = pd.concat([lost] + [PEAKS] * 100, ignore_index=True)
    got = peak_sequences(peaks, write_fasta(tmp_path / "g.fa"))
    assert got[:3] == [GENOME["chr2"][430:] + "N" * 10, "NNN" + GENOME["chr2"][:4], "NNNN"]
    assert got[3:] == WANTED * 100
    assert "3 of 403 peaks" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [("chr2", 400, 500), ("chr9", 1, 50)])
def test_another_genome_build_is_refused(tmp_path, lost):
    peaks = pd.concat([table(lost)] * 2 + [PEAKS] * 20, ignore_index=True)
    with pytest.raises(ValueError, match="2 of 82 peaks(.|\n)*another genome build"):
        peak_sequences(peaks, write_fasta(tmp_path / "g.fa"))


def test_what_is_no_genome_is_refused(tmp_path):
    import gzip

    with pytest.raises(FileNotFoundError, match="--genome"):
        peak_sequences(PEAKS, tmp_path / "none.fa")
    (tmp_path / "bad.2bit").write_bytes(b"no genome at all")
    with pytest.raises(ValueError, match="bad.2bit cannot be read"):
        peak_sequences(PEAKS, tmp_path / "bad.2bit")
    with gzip.open(tmp_path / "plain.fa.gz", "wt") as f:
        f.write(">chr1\nACGT\n")
    with pytest.raises(ValueError, match="bgzip"):
        peak_sequences(PEAKS, tmp_path / "plain.fa.gz")


def test_shards_are_the_rows_of_one_run_in_any_split(tmp_path, model, monkeypatch):
    monkeypatch.setattr(config, "EMB_SHARD_ROWS", 7)
    peaks, path = pd.concat([PEAKS] * 5, ignore_index=True), write_fasta(tmp_path / "g.fa")
    whole = dict(hd.embed_peaks(peaks, path, model))
    assert list(whole) == hd.shard_starts(20) == [0, 7, 14]
    (first, part), = hd.embed_peaks(peaks, path, model, starts=[7])
    assert first == 7 and np.array_equal(part, whole[7])
    np.testing.assert_allclose(np.vstack(list(whole.values())), encode_sequences(WANTED * 5, model), atol=1e-5)


# --- peaks -> cells ----------------------------------------------------------------------------------------

def cells_and_peaks(seed=0, n=50, p=80, d=6):
    rng = np.random.default_rng(seed)
    x = sp.random(n, p, density=0.2, random_state=rng, data_rvs=lambda k: rng.integers(1, 5, k)).tocsr()
    return x, 3 + rng.normal(size=(p, d)).astype(np.float32)


@pytest.mark.parametrize("weighting", ["none", "tfidf"])
def test_a_cell_is_the_weighted_mean_of_its_open_peaks(weighting):
    x, peaks = cells_and_peaks()
    is_open = (x.toarray() > 0).astype(float)
    weights = np.log(1 + len(is_open) / is_open.sum(axis=0)) if weighting == "tfidf" else np.ones(80)
    want = (is_open * weights) @ peaks / (is_open @ weights)[:, None]
    got = cell_embeddings(lambda: [x[:13], x[13:40], x[40:]], peaks, weighting, centre=False, scale="none")
    np.testing.assert_allclose(got, want, atol=1e-6)          # float32 sums of 16 numbers near 3
    centred = cell_embeddings(lambda: [x], peaks, weighting, centre=True, scale="dimension")
    np.testing.assert_allclose(centred, (want - want.mean(0)) / want.std(0), atol=1e-5)
    scaled = cell_embeddings(lambda: [x], peaks, weighting, centre=False, scale="dimension")
    np.testing.assert_allclose(scaled, want / want.std(0), rtol=1e-5)


def test_a_large_common_part_does_not_drown_the_differences_between_cells():
    x, peaks = cells_and_peaks()
    near = cell_embeddings(lambda: [x], peaks.astype(np.float64), scale="dimension")
    far = cell_embeddings(lambda: [x], peaks.astype(np.float64) + 1e4, scale="dimension")
    np.testing.assert_allclose(far, near, atol=1e-5)          # sums in float32 would be wrong by 1e-7 x 1e4 / sd


def test_agreement_finds_the_small_axis_of_the_cell_type_under_large_chance():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    peaks = rng.normal(size=(400, 8)) * [10, 10, 10, 1, 1, 1, 1, 1] @ turn
    kind = np.repeat([False, True], 150)
    signed = peaks @ np.linalg.svd(peaks)[2][-1] > 0          # cells of a kind open peaks on one side of the last axis
    rate = np.where(kind[:, None] == signed[None], 0.15, 0.09)
    x = sp.csr_matrix(rng.random(rate.shape) < rate)
    z = cell_embeddings(lambda: [x[:100], x[100:]], peaks)
    found = abs(np.corrcoef(z[:, 0], kind)[0, 1])
    plain = cell_embeddings(lambda: [x], peaks, scale="dimension")
    others = max(abs(np.corrcoef(column, kind)[0, 1]) for column in plain.T)
    assert found > 0.7 > 0.5 > others
    assert z.std(axis=0).argmax() == 0      # best axis first


def test_a_cell_without_open_peaks_gets_the_mean_and_is_counted(capsys):
    x, peaks = cells_and_peaks()
    x = x.tolil()
    x[4] = 0
    for scale in ("agreement", "dimension", "none"):
        z = cell_embeddings(lambda: [x.tocsr()], peaks, scale=scale)
        assert np.abs(z[4]).max() < 1e-5 and np.isfinite(z).all()
        assert "1 of 50 cells" in capsys.readouterr().out


def test_unknown_choices_are_refused():
    x, peaks = cells_and_peaks()
    with pytest.raises(ValueError, match="tfidf"):
        cell_embeddings(lambda: [x], peaks, weighting="idf")
    with pytest.raises(ValueError, match="agreement"):
        cell_embeddings(lambda: [x], peaks, scale=True)


def test_the_config_keeps_released_fields_and_fills_the_inner_width():
    c = HyenaDNAConfig(d_model=128, activation_freq=10)
    assert c.d_inner == 512 and c.activation_freq == 10 and copy.deepcopy(c).to_dict() == c.to_dict()
