"""HyenaDNA: peaks per second against a plain reading of the reference, and whether its cells separate.

Speed    random weights of the released size; the same weights, sequences and machine for both. The plain reading:
         float32, the filter made anew for every batch, FFT of twice the length, [SEP] appended and left padding
         to the longest of the batch as by the released tokenizer, batches in file order.
         Rounds alternate between the two, and the best round of each counts, so a busy machine hurts both alike.
Purity   simulated cells whose lineage peaks share motifs: share of a cell's 15 nearest neighbours of its own
         lineage (chance = 1 / lineages), with and without weighting, centring and scaling, beside LSI.

Run      python benchmarks/bench_hyenadna.py --threads 1            about 2 minutes
         python benchmarks/bench_hyenadna.py --purity --seeds 3     about 3 minutes
"""
import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hyenadna_encoder import (  # noqa: E402
    TOKENS,
    HyenaDNA,
    HyenaDNAConfig,
    cell_embeddings,
    default_batch_size,
    encode_sequences,
)

PAD, SEP = 4, 1


# --- the plain reading -----------------------------------------------------------------------------------------

def plain_filter(w, length):
    z, t = w["pos_emb.z"][:, :length], w["pos_emb.t"][:, :length]
    for k in (0, 2, 4):
        z = F.linear(z, w[f"implicit_filter.{k}.weight"], w[f"implicit_filter.{k}.bias"])
        z = torch.sin(w["implicit_filter.1.freq"] * z)
    return (F.linear(z, w["implicit_filter.6.weight"]) * (torch.exp(-t * w["modulation.deltas"].abs()) + 0.05))[0].T


def plain_mixer(w, x):
    length = x.shape[1]
    u = F.linear(x, w["in_proj.weight"], w["in_proj.bias"]).transpose(1, 2)
    u = F.conv1d(u, w["short_filter.weight"], w["short_filter.bias"], padding=2, groups=u.shape[1])[..., :length]
    x0, x1, v = u.chunk(3, dim=1)
    v = v * x1
    filter_weights = below(w, "filter_fn.")
    h = torch.fft.rfft(plain_filter(filter_weights, length), n=2 * length)
    y = torch.fft.irfft(torch.fft.rfft(v, n=2 * length) * h, n=2 * length)[..., :length]
    y = y + v * filter_weights["bias"][:, None]
    return F.linear((y * x0).transpose(1, 2), w["out_proj.weight"], w["out_proj.bias"])


def plain_forward(weights, ids, n_layer=4):
    r = weights["embeddings.word_embeddings.weight"][ids]
    for i in range(n_layer):
        w = below(weights, f"layers.{i}.")
        r = r + plain_mixer(below(w, "mixer."), F.layer_norm(r, r.shape[-1:], w["norm1.weight"], w["norm1.bias"]))
        inner = F.layer_norm(r, r.shape[-1:], w["norm2.weight"], w["norm2.bias"])
        inner = F.gelu(F.linear(inner, w["mlp.fc1.weight"], w["mlp.fc1.bias"]), approximate="tanh")
        r = r + F.linear(inner, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    return F.layer_norm(r, r.shape[-1:], weights["ln_f.weight"], weights["ln_f.bias"])


def below(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def plain_encode(sequences, weights, batch_size, device):
    out = []
    for first in range(0, len(sequences), batch_size):
        ids = [np.r_[TOKENS[np.frombuffer(s.encode(), np.uint8)], SEP] for s in sequences[first:first + batch_size]]
        width = max(map(len, ids))
        padded = np.array([np.r_[np.full(width - len(i), PAD), i] for i in ids])
        mask = torch.from_numpy(padded != PAD).to(device)[..., None]
        hidden = plain_forward(weights, torch.from_numpy(padded).to(device))
        out.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(out).numpy()


# --- speed ---------------------------------------------------------------------------------------------------------

def random_sequences(n, shortest, longest, rng):
    return ["".join(rng.choice(list("ACGT"), rng.integers(shortest, longest + 1))) for _ in range(n)]


def best_seconds(runs, rounds):
    """Smallest wall time of each run; the runs take turns."""
    best = [math.inf] * len(runs)
    for run in runs:
        run()
    for _ in range(rounds):
        for k, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[k] = min(best[k], time.perf_counter() - start)
    return best


def matmul_flops(dtype, device, n=4096, m=1024):
    """FLOP/s of a large product (n, m) @ (m, m)."""
    a, b = torch.randn(n, m, device=device).to(dtype), torch.randn(m, m, device=device).to(dtype)
    repeats = 200 if device.type == "cuda" else 4

    def run():
        for _ in range(repeats):
            c = a @ b
        c[0, 0].item()                      # waits for the device

    return 2 * n * m * m * repeats / best_seconds([run], 5)[0]


def dense_flops(c, n_bases):
    """Multiplications and additions of the dense layers; FFT and elementwise work count as nothing."""
    return n_bases * c.n_layer * 2 * (4 * c.d_model**2 + 2 * c.d_model * c.d_inner)


def speed(device, n_peaks, rounds):
    model = HyenaDNA(HyenaDNAConfig()).to(device).eval()
    weights = {name.removeprefix("backbone."): value for name, value in model.state_dict().items()}
    size, rng = default_batch_size(device), np.random.default_rng(0)
    peak = {dtype: matmul_flops(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    print(f"{device}, {torch.get_num_threads()} threads, batch {size}, best of {rounds} rounds of {n_peaks} peaks; "
          f"large matmul {peak[torch.float32] / 1e9:,.0f} GFLOP/s float32, {peak[torch.bfloat16] / 1e9:,.0f} bfloat16")
    print(f"{'bp':>9} {'':>10} {'peaks/s':>9} {'ratio':>6} {'GFLOP/s':>9} {'of matmul':>9}  "
          "cosine to float32 (centred)")
    for shortest, longest in ((500, 500), (501, 501), (1000, 1000), (300, 1000)):
        sequences = random_sequences(n_peaks, shortest, longest, rng)
        runs = {"plain": lambda s=sequences: plain_encode(s, weights, size, device)}
        for dtype in peak:
            name = str(dtype).removeprefix("torch.")
            runs[name] = lambda s=sequences, d=dtype: encode_sequences(s, model, dtype=d)
        with torch.no_grad():
            seconds = best_seconds(list(runs.values()), rounds)
        flops, reference = dense_flops(model.config, sum(map(len, sequences))), encode_sequences(sequences, model)
        for name, took in zip(runs, seconds):
            share = flops / took / peak[torch.bfloat16 if name == "bfloat16" else torch.float32]
            same = "" if name == "plain" else "{:.6f} ({:.4f})".format(*cosines(reference, runs[name]()))
            bp = f"{shortest}" if shortest == longest else f"{shortest}-{longest}"
            print(f"{bp:>9} {name:>10} {n_peaks / took:9.1f} {seconds[0] / took:6.2f} {flops / took / 1e9:9.1f} "
                  f"{share:9.0%}  {same}")


def cosines(a, b):
    """Smallest cosine between rows, raw and after subtracting the mean row."""
    def smallest(a, b):
        return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()

    return smallest(a, b), smallest(a - a.mean(0), b - b.mean(0))


# --- purity ----------------------------------------------------------------------------------------------------------

def simulate(rng, n_lineages=6, n_cells=600, n_own=150, n_shared=900, length=200, motif_length=10, copies=4):
    """(sequences (P), csr (N, P), lineage (N)): each lineage's own peaks carry its two motifs, mutated at 10 %."""
    bases = np.array(list("ACGT"))
    motifs = rng.integers(0, 4, (n_lineages, 2, motif_length))
    owner = np.r_[np.repeat(np.arange(n_lineages), n_own), np.full(n_shared, -1)]
    gc = rng.beta(12, 12, len(owner))                           # peaks differ in GC whatever their lineage
    sequences = []
    for k, share in zip(owner, gc):
        s = rng.choice(4, length, p=[(1 - share) / 2, share / 2, share / 2, (1 - share) / 2])
        for slot in rng.choice(length // motif_length, copies if k >= 0 else 0, replace=False) * motif_length:
            motif = motifs[k, rng.integers(2)]
            mutated = rng.random(motif_length) < 0.1
            s[slot:slot + motif_length] = np.where(mutated, rng.integers(0, 4, motif_length), motif)
        sequences.append("".join(bases[s]))
    lineage = rng.integers(0, n_lineages, n_cells)
    base = np.where(owner < 0, rng.beta(1, 4, len(owner)), 0.04)
    rate = np.where(lineage[:, None] == owner[None], 0.20, base[None])
    depth = rng.lognormal(0, 0.4, (n_cells, 1))
    return sequences, sp.csr_matrix(rng.random(rate.shape) < np.clip(rate * depth, 0, 0.95), dtype=np.float32), lineage


def neighbour_purity(z, labels, k=15):
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=k + 1).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    return (labels[found] == labels[:, None]).mean()


def lsi(x, n=30):
    from sklearn.decomposition import TruncatedSVD

    tf = sp.diags(1 / np.asarray(x.sum(1)).ravel()) @ x
    tfidf = (tf @ sp.diags(np.log1p(x.shape[0] / np.maximum(np.asarray(x.sum(0)).ravel(), 1)))).tocsr()
    tfidf.data = np.log1p(1e4 * tfidf.data)
    return TruncatedSVD(n, random_state=0).fit_transform(tfidf)[:, 1:]      # the first component is depth


def purity(device, seeds):
    table = {}

    def add(name, z, lineage):
        table.setdefault(name, []).append(neighbour_purity(z, lineage))

    for seed in range(seeds):
        torch.manual_seed(seed)
        model = HyenaDNA(HyenaDNAConfig()).to(device).eval()
        sequences, x, lineage = simulate(np.random.default_rng(seed))
        peaks = encode_sequences(sequences, model)
        for weighting, (centre, scale) in itertools.product(
                ("none", "tfidf"), ((False, "none"), (True, "none"), (True, "dimension"), (True, "agreement"))):
            z = cell_embeddings(lambda x=x: [x], peaks, weighting, centre, scale)
            name = f"HyenaDNA {weighting:6}{'centred' if centre else '':8}{scale}"
            add(name, z, lineage)
            if not centre or scale == "none":
                add(name + ", by angle", z / np.linalg.norm(z, axis=1, keepdims=True), lineage)
        rough = encode_sequences(sequences, model, dtype=torch.bfloat16)
        add("HyenaDNA tfidf centred agreement, bfloat16", cell_embeddings(lambda x=x: [x], rough), lineage)
        add("LSI", lsi(x), lineage)
        add("shuffled labels, LSI", lsi(x), np.random.default_rng(seed).permutation(lineage))
    print(f"15-nearest-neighbour purity, {len(lineage)} cells, {len(sequences)} peaks, {lineage.max() + 1} lineages, "
          f"random weights; mean and range over {seeds} seeds")
    for name, values in table.items():
        print(f"{name:44} {np.mean(values):.3f}  [{min(values):.3f}, {max(values):.3f}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="CPU threads (as many as cores)")
    parser.add_argument("--peaks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--purity", action="store_true", help="separation of simulated cells instead of speed")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    purity(args.device, args.seeds) if args.purity else speed(args.device, args.peaks, args.rounds)
