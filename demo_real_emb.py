"""The real thing: scGPT and HyenaDNA on the 10x PBMC 10k multiome data, steps 0 to 11 of the specification.

Downloads what is missing (config.DOWNLOADS, about 1.2 GB: the data, hg38, both models), checks it, goes on where a
download stopped, and then runs the stages as run.py does. --multiome, --genome, --scgpt, --hyenadna name local files.
Ends with the specification's table of results, beside the same numbers from an untrained model.

Reads   downloads/ and weights/, or the paths given
Writes  those two folders (what was missing), and what the stages write
Run     python demo_real_emb.py
        python demo_real_emb.py --multiome m.h5 --genome hg38.fa --scgpt scGPT_human --hyenadna hyenadna-small-32k
"""
import hashlib
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import artifacts
import config
import effendi_loader
import inference
import precompute_embeddings
import scgpt_encoder
import train_delay
import train_vf
import validate
from slice_w2 import random_directions

SETTING = {"multiome": "MULTIOME_FILE", "genome": "GENOME_FILE", "scgpt": "SCGPT_MODEL_DIR",
           "hyenadna": "HYENADNA_MODEL_DIR"}
NAMED = 5                   # genes named at either end of tau


# --- what has to be there -----------------------------------------------------------------------------------

def fetch_missing(given):
    """Point the settings at the data, the genome and the models; download what is neither given nor there.

    given   {"multiome", "genome", "scgpt", "hyenadna": path or None}
    """
    for which, path in given.items():
        if path and not Path(path).exists():
            raise FileNotFoundError(f"{path} not found (--{which}).\n  Check the path, or leave --{which} out to "
                                    "download it.")
        if path:
            setattr(config, SETTING[which], str(path))
    wanted = [(folder_of(which) / name, link, size, checksum) for which, name, link, size, checksum in config.DOWNLOADS
              if not given[which]]
    missing = [entry for entry in wanted if not entry[0].is_file()]
    check_disk(missing)
    for file, link, _, checksum in wanted:
        if file.is_file():
            verify(file, checksum)
        else:
            download(file, link, checksum, missing)
    for which, name, *_ in config.DOWNLOADS:
        if not given[which] and which in ("multiome", "genome"):
            setattr(config, SETTING[which], str(folder_of(which) / name))


def folder_of(which):
    return Path(config.snapshot()[SETTING[which]] if which in ("scgpt", "hyenadna") else config.DOWNLOAD_DIR)


def check_disk(missing):
    """OSError if the missing files do not fit on their disks."""
    need = {}
    for file, _, size, _ in missing:
        folder = next(parent for parent in file.absolute().parents if parent.exists())
        partial = part_of(file).stat().st_size if part_of(file).exists() else 0
        need.setdefault(os.stat(folder).st_dev, [folder, 0])[1] += max(0, size - partial)
    for folder, size in need.values():
        free = shutil.disk_usage(folder).free
        if free < 1.05 * size:              # some sizes are approximate
            raise OSError(f"the downloads need {size / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free.\n"
                          "  Make room, or put them elsewhere: --set DOWNLOAD_DIR=FOLDER, SCGPT_MODEL_DIR, "
                          "HYENADNA_MODEL_DIR.")


def part_of(file):
    """Where a download grows until it is whole."""
    return file.with_name(file.name + ".part")


def download(file, link, checksum, missing):
    """Fetch one file, whole and verified or not at all; OSError that names all `missing` files if it cannot be had."""
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")    # it would print the checksums that verify() keeps
    print(f"downloading {link}")
    try:
        pooch.retrieve(link, checksum, fname=file.name, path=file.parent,
                       downloader=lambda url, output, _: resume(url, part_of(file), output))
    except ValueError as err:
        raise ValueError(f"{link} is not the file it should be: {err}\n  It was thrown away. Run the command again; if "
                         "it stays so, the link serves another version.") from err
    except (requests.RequestException, OSError) as err:
        lines = [f"  {entry[0]}\n      from {entry[1]}" for entry in missing if not entry[0].is_file()]
        raise OSError(f"{link} cannot be downloaded: {str(err)[:200]}\n  Run the command again: a download goes on "
                      "where it stopped. Without a network, put these files there\n  (or name yours with --multiome, "
                      "--genome, --scgpt, --hyenadna):\n" + "\n".join(lines)) from err
    verify(file, checksum)


def resume(link, part, output):
    """Continue the download into `part`, then make it `output`. Servers without ranges start over."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(link, headers=headers, stream=True, timeout=60) as answer:
        if answer.status_code == 416:       # nothing lies beyond what is there: it is whole, or of another version
            return os.replace(part, output)
        answer.raise_for_status()
        have = have if answer.status_code == 206 else 0
        total = have + int(answer.headers.get("Content-Length", 0))
        with open(part, "ab" if have else "wb") as f, tqdm(total=total or None, initial=have, unit="B", unit_scale=True,
                                                           desc=part.stem) as bar:
            for chunk in answer.iter_content(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
    return os.replace(part, output)


def verify(file, checksum):
    """ValueError unless the file has its checksum: the published one, else the one noted when it first arrived."""
    note = file.with_name(file.name + ".sha256")
    if checksum is None and not note.exists():
        note.write_text(f"{digest(file, 'sha256')}  {file.name}\n")
        print(f"{file.name}: no checksum is published; its own is noted in {note}, and it is held to that from now on")
        return
    kind, wanted = checksum.split(":") if checksum else ("sha256", note.read_text().split()[0])
    found = digest(file, kind)
    if found != wanted:
        raise ValueError(f"{file} is damaged: {kind} {found}, expected {wanted}.\n  Delete it"
                         f"{'' if checksum else f' and {note.name}'}, and run the command again.")


def digest(file, kind):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, kind).hexdigest()


# --- the steps ------------------------------------------------------------------------------------------------

def run_steps(max_cells=None):
    """Steps 0 to 11; returns the rows of the table of results."""
    import anndata

    chosen = dict(batch=config.HYENADNA_BATCH_SIZE, peaks=config.ATAC_TOP_PEAKS, seq_len=config.SCGPT_MAX_SEQ_LEN,
                  dtype=config.EMB_DTYPE, objective=config.OBJECTIVE)
    print("Step 0: Auto-detect settings → " + ", ".join(f"{name}={'auto' if value is None else value}"
                                                        for name, value in chosen.items()))
    opened = {kind: effendi_loader.open_counts(config.MULTIOME_FILE, kind) for kind in ("rna", "atac")}
    print(f"Step 1: Load 10X Multiome ({opened['rna'].n_cells:,} cells, {len(opened['rna'].features):,} genes, "
          f"{len(opened['atac'].features):,} peaks)")
    precompute_embeddings.check_inputs(max_cells)
    precompute_embeddings.rna(max_cells)
    genes = artifacts.load_table("genes.csv")
    missing = artifacts.record("genes.csv")["missing"]
    print(f"Step 2: RNA embeddings with scGPT → {shape('effendi_rna_emb.npy')} ✓")
    print(f"Step 3: HVG selection → {len(genes) + len(missing)} genes")
    emb, *_ = scgpt_encoder.gene_embeddings(list(genes.index), config.SCGPT_MODEL_DIR)
    print(f"Step 4: Gene embeddings from scGPT → {emb.shape} matched genes")
    precompute_embeddings.atac(max_cells)
    kept = artifacts.load_table("peaks.csv")["kept"]
    print(f"Step 5: ATAC filtering → {len(kept):,} → {kept.sum():,} peaks")
    print(f"Step 6: ATAC embeddings with HyenaDNA → {shape('effendi_atac_emb.npy')} ✓")
    precompute_embeddings.genes()
    print("Step 7: Align RNA + ATAC: ", end="")
    effendi_loader.pair(*(artifacts.load_table(f"effendi_{kind}_obs.csv") for kind in ("rna", "atac")))
    train_vf.run()
    stage1 = stage1_results()
    print(f"Step 7.5: Stage 1 — Train Vector Field → {stage1['text']}")
    train_delay.run()
    model, saved = inference.load_effendi(artifacts.path("effendi.pt"))
    print(f"Step 8: Model forward pass → Effendi ready ({sum(p.numel() for p in model.parameters()):,} parameters)")
    cells = anndata.read_h5ad(artifacts.path("effendi.h5ad"))
    print(f"Step 9: Cell-specific τ → {cells.layers['tau'].shape} ✓")
    control, name = validate.control_model(model, saved["objective"])
    outputs = [forward(m, cells, saved["gene_emb"]) for m in (model, control)]
    print("Step 10: Full forward pass → " + ", ".join(f"{key} {outputs[0][key].shape}" for key in (
        "z_A", "z_integrated", "y_hat")))
    print("Step 11: Tau analysis")
    return results(stage1, model, control, name, outputs, cells, saved)


def shape(name):
    return tuple(artifacts.record(name)["shape"])


def forward(model, cells, gene_emb):
    return inference.predict(model, np.asarray(cells.obsm["z_atac"]), gene_emb, config.pick_device())


def stage1_results():
    """{"text", "sw2": (trained, untrained)} of Stage 1; no SW2 where the objective trains no flow on it."""
    if config.OBJECTIVE != "specification":
        nll = ", ".join(f"{x:.4f}" for x in artifacts.record("train_vf_curve.csv")["metrics"]["held_out_nll"])
        return dict(text=f"readouts of accessibility, held out {nll} nats an entry (SW2 belongs to "
                         "OBJECTIVE=specification)", sw2=None)
    curve = artifacts.load_table("train_vf_curve.csv")
    z_atac = artifacts.load_array("effendi_atac_emb.npy", (None, config.HYENADNA_D_MODEL))
    z_R = artifacts.load_array("effendi_rna_emb.npy", (None, config.DIM))
    torch.manual_seed(config.SEED)          # the weights, held-out cells and directions with which train_vf began
    untrained = train_vf.FlowToRNA(z_atac.shape[1], z_R.shape[1], config.ALIGN_HIDDEN, config.VF_HIDDEN)
    rng = torch.Generator().manual_seed(config.SEED)
    atac, rna = train_vf.split(z_atac, rng)[1], train_vf.split(z_R, rng)[1]
    n = min(train_vf.EVAL_CELLS, len(atac), len(rna))
    directions = random_directions(z_R.shape[1], config.N_PROJ_W2, rng)
    start = train_vf.evaluate(untrained, atac[:n], rna[:n], directions)
    first, last = curve.iloc[0], curve.iloc[-1]
    return dict(text=f"SW2={last.sw2:.3f} (after the first epoch {first.sw2:.3f}), Rev={last.reverse:.1e}",
                sw2=(last.sw2, start["sw2"]))


def results(stage1, model, control, name, outputs, cells, saved):
    """Rows (metric, value, value of the control) of the specification's table."""
    n, z = len(cells), torch.from_numpy(np.asarray(cells.obsm["z_A"][:1000], np.float32))
    rev = [validate.check_model_health(m.cpu(), z, saved["gene_emb"])["rev_err"] for m in (model, control)]
    tau = [out["tau"] for out in outputs]
    ranked = artifacts.load_table("gene_tau_estimates.csv").sort_values("tau").index
    print(f"  shortest delay: {', '.join(ranked[:NAMED])}\n  longest delay:  {', '.join(ranked[::-1][:NAMED])}")
    sw2 = [f"{value:.3f}" for value in stage1["sw2"]] if stage1["sw2"] else ["not trained on"] * 2
    return [("Metric", "Value", name),
            ("RNA embeddings", f"{shape('effendi_rna_emb.npy')} via scGPT", ""),
            ("ATAC embeddings", f"{shape('effendi_atac_emb.npy')} via HyenaDNA", ""),
            ("Stage 1 SW2", *sw2),
            ("Rev error", *(f"{value:.1e}" for value in rev)),
            ("τ_g range", *(f"{t.mean(0).min():.3f} – {t.mean(0).max():.3f}" for t in tau)),
            ("Gene-wise variation", *(f"{spread(t.mean(0)):.1%}" for t in tau)),
            ("Cell-wise variation", *(f"{np.mean([spread(gene) for gene in t.T]):.1%}" for t in tau)),
            ("Cells, genes", f"{n:,}, {cells.n_vars:,}", "")]


def spread(values):
    """Standard deviation over the mean."""
    return float(np.std(values) / np.mean(values))


def print_results(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def main(argv=None):
    start = time.time()
    args = config.from_args(__doc__, argv, {
        "--multiome": dict(metavar="H5", help="filtered_feature_bc_matrix.h5 (downloaded if not given)"),
        "--genome": dict(metavar="FASTA", help="hg38, FASTA or .2bit (downloaded if not given)"),
        "--scgpt": dict(metavar="DIR", help="scGPT whole-human folder (downloaded if not given)"),
        "--hyenadna": dict(metavar="DIR", help="hyenadna-small-32k-seqlen-hf folder (downloaded if not given)"),
        "--max-cells": dict(type=int, metavar="N", help="use N of the cells, for a quick look"),
    })
    fetch_missing({which: getattr(args, which) for which in SETTING})
    config.RNA_ENCODER, config.ATAC_ENCODER = "scgpt", "hyenadna"
    rows = run_steps(args.max_cells)
    print_results(rows)
    seconds = time.time() - start
    artifacts.save_text("demo_results.txt", "\n".join("\t".join(row) for row in rows) + "\n", stage="demo_real_emb",
                        seconds=round(seconds, 1))
    print(f"demo_real_emb: steps 0 to 11, {seconds:.0f} s -> {config.OUT_DIR}/demo_results.txt")


if __name__ == "__main__":
    config.script(main)
