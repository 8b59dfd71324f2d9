"""Tiny data and random weights in the released formats, for the tests of the path with the real encoders."""
import struct

import h5py
import numpy as np
import scipy.sparse as sp
from test_hyenadna_encoder import SMALL, write_hf
from test_scgpt_encoder import DIM, write_folder

import simulate

CELLS, GENES = 80, 130
UNKNOWN = 4                 # genes that the vocabulary lacks


def make(folder, cells=CELLS):
    """Simulated multiome with a genome, and both models; returns {"rna", "atac", "genome", "scgpt", "hyenadna"}."""
    data = simulate.simulate(cells, GENES, 2, seed=1, sequences=True)
    simulate.write(data, folder)
    write_folder(folder / "scgpt", genes=list(data.rna.var_names[UNKNOWN:]))
    write_hf(folder / "hyenadna", SMALL)
    write_multiome(folder / "multiome.h5", data)
    return dict(rna=folder / "rna.h5ad", atac=folder / "atac.h5ad", genome=folder / "genome.fa",
                scgpt=folder / "scgpt", hyenadna=folder / "hyenadna", multiome=folder / "multiome.h5", data=data)


def settings(files):
    """--set flags of a run with both models; their width is 32, not that of the releases."""
    values = dict(DIM=DIM, HYENADNA_D_MODEL=SMALL["d_model"], SCGPT_MODEL_DIR=files["scgpt"], EMB_SHARD_ROWS=16,
                  HYENADNA_MODEL_DIR=files["hyenadna"], RNA_ENCODER="scgpt", ATAC_ENCODER="hyenadna", DEVICE="cpu",
                  ATAC_TOP_PEAKS=40, EMB_DTYPE="float32", GENE_DECAY=5000.0)
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def arguments(files, out):
    return ["--rna", str(files["rna"]), "--atac", str(files["atac"]), "--genome", str(files["genome"]),
            "--out", str(out), *settings(files)]


def write_multiome(path, data):
    """The data as Cell Ranger ARC writes filtered_feature_bc_matrix.h5: features x cells, genes before peaks."""
    counts = sp.hstack([data.rna.X, data.atac.X]).tocsr()
    genes, peaks = data.rna.var, data.atac.var_names
    where = genes["chrom"].astype(str) + ":" + genes["start"].astype(str) + "-" + genes["end"].astype(str)
    columns = {
        "id": [f"ENSG{i:011d}" for i in range(len(genes))] + list(peaks), "name": [*genes.index, *peaks],
        "feature_type": ["Gene Expression"] * len(genes) + ["Peaks"] * len(peaks),
        "interval": [*where, *peaks], "genome": ["GRCh38"] * counts.shape[1]}
    with h5py.File(path, "w") as f:
        group = f.create_group("matrix")
        group["barcodes"] = np.array(data.rna.obs_names, "S")
        group["shape"] = np.array(counts.shape[::-1], np.uint64)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name).astype(np.int64)
        features = group.create_group("features")
        for name, values in columns.items():
            features[name] = np.array(values, "S")


def write_random_2bit(path, sizes):
    """A genome of random bases without N: four bases a byte, so any bytes will do."""
    offset, rng = 16 + sum(5 + len(name) for name in sizes), np.random.default_rng(0)
    with open(path, "wb") as f:
        f.write(struct.pack("<IIII", 0x1A412743, 0, len(sizes), 0))
        for name, size in sizes.items():
            f.write(struct.pack("<B", len(name)) + name.encode() + struct.pack("<I", offset))
            offset += 16 + (size + 3) // 4
        for size in sizes.values():
            f.write(struct.pack("<IIII", size, 0, 0, 0) + rng.bytes((size + 3) // 4))
    return path
