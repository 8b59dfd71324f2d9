"""scGPT cells per second against the published package: same machine, same run, same random weights and cells.

    python benchmarks/bench_scgpt.py [--device cpu|cuda|mps] [--cells N] [--threads N] [--batch-size N]

Released size (512 wide, 8 heads, 12 layers, 60,697 tokens). Three sets of cells: exactly 300 tokens, exactly
1,200 tokens, and cells of the lengths of real data (log-normal number of genes, median 900, cut at 1,200).
Timed is the whole way from counts to embeddings: binning, sampling, batches, network. The package runs its own
`get_batch_cell_embeddings` in float32 on a CPU (its flash-attn needs CUDA; there, float16 autocast).

FLOP/s are the useful ones, 2 (4 D^2 + 2 D d_hid) L + 4 D L^2 per layer and cell without padding, as a share of
one large matrix product of the same number format in the same run; the exact shortcuts of the encoder count as done.

Needs  pip install --no-deps scgpt==0.2.4; without it, only this encoder is timed.
"""
import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scgpt_encoder as sc  # noqa: E402

DIM, HEADS, HIDDEN, LAYERS, GENES = 512, 8, 512, 12, 60_694


def write_weights(folder):
    """A folder in the released format, weights as PyTorch initialises them."""
    torch.manual_seed(0)
    model = sc.ScGPT(GENES + 3, DIM, HEADS, HIDDEN, LAYERS)
    model.encoder.embedding.weight.data.uniform_(-0.1, 0.1)
    torch.save(model.state_dict(), folder / "best_model.pt")
    tokens = [*(f"GENE{i}" for i in range(GENES)), *sc.SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "args.json").write_text(json.dumps(dict(embsize=DIM, nheads=HEADS, d_hid=HIDDEN, nlayers=LAYERS,
                                                      n_layers_cls=3, dropout=0.2, pad_token="<pad>", pad_value=-2)))


def make_cells(expressed, rng, n_vars=20_000):
    """Cells with the given numbers of expressed genes and skewed counts."""
    columns = [np.sort(rng.choice(n_vars, n, replace=False)) for n in expressed]
    values = np.ceil(rng.lognormal(0, 1, sum(expressed))).astype(np.float32)
    counts = sp.csr_matrix((values, np.concatenate(columns), np.concatenate([[0], np.cumsum(expressed)])),
                           shape=(len(expressed), n_vars))
    return ad.AnnData(counts, obs=pd.DataFrame(index=[f"cell{i}" for i in range(len(expressed))]),
                      var=pd.DataFrame({"id_in_vocab": np.arange(n_vars)}, index=[f"GENE{i}" for i in range(n_vars)]))


class Vocab(dict):
    """Stands in for torchtext.vocab.Vocab, which cannot be installed beside a current PyTorch."""


def published(folder, device):
    """Function (cells, max_length, batch_size) -> embeddings of the published package, or None without it."""
    if importlib.util.find_spec("scgpt") is None:
        return None
    text = types.ModuleType("torchtext.vocab")
    text.Vocab, text.vocab = Vocab, None
    for name, content in {"torchtext": dict(vocab=text), "IPython": dict(get_ipython=None),
                          "datasets": dict(Dataset=None, load_dataset=None)}.items():
        sys.modules.setdefault(name, types.ModuleType(name))
        vars(sys.modules[name]).update(content)
    sys.modules["torchtext.vocab"] = text
    package = importlib.import_module("scgpt")
    vocab, configs = json.loads((folder / "vocab.json").read_text()), json.loads((folder / "args.json").read_text())
    model = package.model.TransformerModel(len(vocab), DIM, HEADS, HIDDEN, LAYERS, vocab=vocab, do_mvc=True,
                                           pad_value=-2, use_fast_transformer=device == "cuda")
    state = torch.load(folder / "best_model.pt", weights_only=True)
    package.utils.load_pretrained(model, state, verbose=False)
    model.to(device).eval()

    def run(cells, max_length, batch_size):
        with contextlib.redirect_stderr(io.StringIO()):
            return package.tasks.get_batch_cell_embeddings(cells, model=model, vocab=vocab, max_length=max_length,
                                                           batch_size=batch_size, model_configs=configs)
    return run


def useful_flops(lengths):
    L = np.asarray(lengths, float)
    return LAYERS * (2 * (4 * DIM**2 + 2 * DIM * HIDDEN) * L + 4 * DIM * L**2).sum()


def matmul_flops(device, dtype, n):
    """FLOP/s of an n x n matrix product, best of five."""
    a, times = torch.randn(n, n, device=device).to(dtype), []
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                    # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:])


def seconds(run, repeats):
    """Best time and last result; the machine may be shared."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return min(times), result


def line(name, what, lengths, spent, base, peak, cosine):
    rate = useful_flops(lengths) / spent
    print(f"{name:>16} {what:>10} {len(lengths) / spent:9.2f} {base / spent if base else float('nan'):7.2f} "
          f"{rate / 1e9:10.0f} {100 * rate / peak:8.0f} % {cosine:9.6f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=sc.pick_device())
    parser.add_argument("--cells", type=int, help="cells of 1,200 tokens (more of shorter ones); 5 on a CPU, else 512")
    parser.add_argument("--batch-size", type=int, help="of both; default 64 for the package, its own for the encoder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    n = args.cells or (5 if args.device == "cpu" else 512)
    rng = np.random.default_rng(0)
    sets = {"300 tokens": (300, np.full(4 * n, 299)), "1,200 tokens": (1200, np.full(n, 1199)),
            "real lengths": (1200, np.clip(rng.lognormal(np.log(900), 0.5, 2 * n), 200, 5000).astype(int))}
    size = 2048 if args.device == "cpu" else 8192
    peak = {d: matmul_flops(args.device, getattr(torch, d), size) for d in ("float32", "bfloat16")}
    print(f"{args.device}, {args.threads} CPU threads, torch {torch.__version__}; {size} x {size} product: "
          + ", ".join(f"{d} {p / 1e9:.0f} GFLOP/s" for d, p in peak.items()))
    print(f"{'cells':>16} {'':>10} {'cells/s':>9} {'ratio':>7} {'GFLOP/s':>10} {'of peak':>10} {'cosine':>9}")
    with tempfile.TemporaryDirectory() as tmp:
        write_weights(Path(tmp))
        package = published(Path(tmp), args.device)
        encoders = {d: sc.Encoder(tmp, batch_size=args.batch_size, device=args.device, dtype=d) for d in peak}
        for name, (longest, expressed) in sets.items():
            cells, lengths, base = make_cells(expressed, rng), np.minimum(expressed + 1, longest), None
            if package:
                base, z = seconds(lambda c=cells, m=longest: package(c, m, args.batch_size or 64), args.repeats)
                line(name, "published", lengths, base, base, peak["float32"], 1)
            exact = None
            for dtype, encoder in encoders.items():
                encoder.max_seq_len = longest
                spent, z = seconds(lambda e=encoder, c=cells: e.encode(c.X, c.var["id_in_vocab"], c.obs_names),
                                   args.repeats)
                exact = z if exact is None else exact
                line(name, dtype, lengths, spent, base, peak[dtype], (z * exact).sum(1).min())


if __name__ == "__main__":
    main()
