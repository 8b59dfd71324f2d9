"""One Stage 2 training step against a plain reading of the specification, which builds (B, G, 512).

Both start from the same weights and batch, run forward, the four losses and backward, each in a process of its
own; peak memory is the growth of the process's high-water mark over its size after one step of two cells and ten
genes, which loads what torch loads lazily.

Run     python benchmarks/bench_train.py                    B = 128, G = 1,654 and 30,000, about 2 minutes on 2 cores
Prints  seconds and peak memory of both, their ratios, and the largest difference of the outputs
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

from effendi import Effendi, delay_losses, reverse_loss  # noqa: E402

N_STEPS_BACK = 20


def batch(cells, genes):
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(cells, 256, generator=draw), torch.randn(cells, 512, generator=draw),
            torch.rand(cells, genes, generator=draw), torch.randn(genes, 512, generator=draw))


def effendi_step(model, z_atac, z_R, expression, gene_emb):
    with parametrize.cached():
        out = model(z_atac, gene_emb)
        losses = delay_losses(model, out, z_R, expression, N_STEPS_BACK)
        return out, total(losses)


def plain_step(model, z_atac, z_R, expression, gene_emb):
    """Trajectory, hidden state of every gene, mean, decoder: the specification line by line."""
    with parametrize.cached():
        z_A = model.align(z_atac)
        tau = model.tau_predictor(z_A, gene_emb)
        t_end = tau.detach().max()
        path = model.field.integrate(z_A, t_end, model.n_steps)                     # (S+1, B, D)
        hidden = interpolate(path, tau, t_end)                                      # (B, G, D)
        y_hat = model.decoder(hidden, gene_emb)
        tau_bar = tau.median()
        z_integrated = interpolate(path, tau_bar.expand(len(z_A), 1), t_end)[:, 0]
        out = dict(z_A=z_A, tau=tau, tau_bar=tau_bar, z_integrated=z_integrated, y_hat=y_hat)
        losses = dict(ode=(z_R - z_integrated).square().mean(), recon=(y_hat - expression).square().mean(),
                      tau=tau.abs().mean(), reverse=reverse_loss(model.field, z_A, z_integrated, tau_bar, N_STEPS_BACK))
        return out, total(losses)


def interpolate(path, tau, t_end):
    position = tau / t_end * (len(path) - 1)
    lower = position.detach().floor().long().clamp(max=len(path) - 2)
    share = (position - lower)[..., None]
    cells = torch.arange(tau.shape[0])[:, None]
    return path[lower, cells] * (1 - share) + path[lower + 1, cells] * share


def total(losses):
    return losses["ode"] + 0.5 * losses["recon"] + 0.01 * losses["tau"] + 0.1 * losses["reverse"]


def result_file(which):
    return Path(tempfile.gettempdir()) / f"effendi_bench_train_{which}.pt"


def measure(which, cells, genes, repeats):
    """In a fresh process: {"seconds", "mib", and a digest of the outputs}."""
    torch.manual_seed(0)
    model = Effendi()
    model.field.settle()
    model.eval()                                    # no dropout, so that the outputs can be compared
    step = {"effendi": effendi_step, "plain": plain_step}[which]
    step(model, *batch(2, 10))[1].backward()
    data = batch(cells, genes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out, loss = step(model, *data)
        loss.backward()
        times.append(time.perf_counter() - start)
        model.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.save({k: out[k].detach() for k in ("tau", "y_hat", "z_integrated")}, result_file(which))
    print(json.dumps(dict(seconds=min(times), mib=(peak - before) / 1024)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--genes", type=int, nargs="+", default=[1654, 30_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args.one[0], args.cells, int(args.one[1]), args.repeats)
    print(f"B = {args.cells}, {torch.get_num_threads()} threads, best of {args.repeats}")
    print(f"{'G':>8}{'':>10}{'seconds':>10}{'peak MiB':>10}")
    for genes in args.genes:
        rows = {}
        for which in ("plain", "effendi"):
            done = subprocess.run([sys.executable, __file__, "--one", which, str(genes), "--cells", str(args.cells),
                                   "--repeats", str(args.repeats)], capture_output=True, text=True)
            if done.returncode:
                print(f"{genes:>8}{which:>10}   did not finish (exit {done.returncode}): "
                      f"(B, G, 512) alone is {args.cells * genes * 512 * 4 / 2**30:.1f} GiB")
                continue
            rows[which] = json.loads(done.stdout.splitlines()[-1])
            print(f"{genes:>8}{which:>10}{rows[which]['seconds']:>10.3f}{rows[which]['mib']:>10.0f}")
        if len(rows) == 2:
            a, b = (torch.load(result_file(w), weights_only=True) for w in ("plain", "effendi"))
            gap = max((a[k] - b[k]).abs().max().item() for k in a)
            print(f"{genes:>8}{'ratio':>10}{rows['plain']['seconds'] / rows['effendi']['seconds']:>9.1f}x"
                  f"{rows['plain']['mib'] / rows['effendi']['mib']:>9.1f}x   largest difference {gap:.1e}")


if __name__ == "__main__":
    main()
