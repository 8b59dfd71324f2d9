"""Stage 0: from count matrices to the embeddings and tables that every later stage reads.

    rna     log-normalise, choose genes, embed the cells        z_R (N_r, 512), gene counts (N_r, G)
    atac    choose peaks, embed the cells                       z_ATAC (N_a, 256)
    genes   accessibility of the chosen genes and their peaks, embeddings of the genes
                                                                (N_a, G), (N_a, C), (G, 512); after the other two

The cells of a modality are rows of one array: those of the paired file (source "paired"), then those of the atlas,
if one is given (source "atlas", names "atlas:barcode"). Pairing comes later, by barcode, among the paired.

scGPT reads all genes of its vocabulary in a cell; the genes to model are the highly variable ones among them.
HyenaDNA reads the sequences of the kept peaks. Both embed in shards of EMB_SHARD_ROWS cells or peaks, kept below
OUT_DIR/shards until the stage is done, so that a stopped run goes on where it was. torchrun shares the shards among
its processes (on several machines OUT_DIR must be a folder that all of them see); the arrays are the same.

Reads   --rna/--atac or --multiome, --unpaired-rna/--unpaired-atac; each file twice, in blocks of BLOCK_ROWS cells
        scgpt: the folder SCGPT_MODEL_DIR;  hyenadna: the folder HYENADNA_MODEL_DIR, --genome
Writes  rna    effendi_rna_emb.npy, effendi_rna_obs.csv (.pkl for notebooks), genes.csv, gene_expression.npz,
               rna_encoder.pt
        atac   effendi_atac_emb.npy, effendi_atac_obs.csv (.pkl), peaks.csv, peak_embeddings.npy, atac_encoder.pt
        genes  gene_accessibility.npz, gene_peaks.npz, gene_peaks.csv, gene_embeddings.npy, gene_encoder.pt (the last
               for the PCA encoder)
Run     python precompute_embeddings.py rna --rna rna.h5ad --max-cells 200000
        torchrun --nproc_per_node=2 precompute_embeddings.py atac --atac atac.h5ad --genome hg38.fa
"""
import contextlib
import datetime
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import tqdm

import artifacts
import config
import effendi_loader as loader
import embed_cells
import linear_encoder
import scgpt_encoder

RANK = 50                   # components of PCA and LSI; more are mostly noise in data of this kind
HVG_CELLS = 10_000          # cells on which scanpy chooses the genes; all, if there are no more
MIN_OPEN = 0.10             # share of cells in which the automatic filter wants a peak open
RESERVED = ["source", "n_counts", "barcode"]     # names of obs columns that are our own
SHIFT = 50_000              # bp; promoters moved this far should hold fewer peaks than promoters do

RNA_FILES = ("effendi_rna_emb.npy", "effendi_rna_obs.csv", "effendi_rna_obs.pkl", "genes.csv", "gene_expression.npz",
             "rna_encoder.pt")
ATAC_FILES = ("effendi_atac_emb.npy", "effendi_atac_obs.csv", "effendi_atac_obs.pkl", "peaks.csv",
              "peak_embeddings.npy", "atac_encoder.pt")
GENE_FILES = ("gene_accessibility.npz", "gene_peaks.npz", "gene_peaks.csv", "gene_embeddings.npy")
PCA_GENE_FILES = ("gene_encoder.pt",)
WEIGHTS = {                 # encoder -> (setting with its folder, files it needs, each under one of several names)
    "scgpt": ("SCGPT_MODEL_DIR", (("args.json",), ("vocab.json",), ("best_model.pt",))),
    "hyenadna": ("HYENADNA_MODEL_DIR", (("config.json",), ("model.safetensors", "weights.ckpt"))),
}
READS = {                   # encoder -> settings that change its embeddings
    "scgpt": ("SCGPT_MAX_SEQ_LEN", "SCGPT_USE_FAST_TRANSFORMER", "EMB_DTYPE"),
    "hyenadna": ("HYENADNA_REVERSE_COMPLEMENT", "EMB_DTYPE"),
}
PROBES = 64                 # sequences on which HyenaDNA's dtype is chosen


# --- the cells of one modality ------------------------------------------------------------------------------

def input_files(modality):
    """{"paired": path, "atlas": path or None} of a modality, from the settings."""
    single = {"rna": config.RNA_FILE, "atac": config.ATAC_FILE}[modality]
    atlas = {"rna": config.UNPAIRED_RNA_FILE, "atac": config.UNPAIRED_ATAC_FILE}[modality]
    if single and config.MULTIOME_FILE:
        raise ValueError(f"--{modality} and --multiome both give the {modality} counts.\n  Give one of them.")
    paired = single or config.MULTIOME_FILE
    if not paired:
        raise ValueError(f"no {modality} file.\n  Give --{modality} FILE, or --multiome FILE for both modalities.")
    return must_exist({"paired": paired, "atlas": atlas})


def must_exist(files):
    for path in filter(None, files.values()):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} not found.\n  Check the path, and that it is a file.")
    return files


class Cells:
    """The cells of one modality over its files, with one list of genes or peaks.

    sources   [(source, Counts, rows used of it, columns of the shared features)]
    obs       (N) names and plain columns, source      features  (F) table of what all files have
    """

    def __init__(self, modality, files, max_cells=None):
        self.modality, self.files, self.max_cells = modality, files, max_cells
        opened = {source: loader.open_counts(path, modality, config.GTF_FILE)
                  for source, path in self.files.items() if path}
        for counts in opened.values():
            print("\n".join(counts.notes))
        self.features = opened["paired"].features
        if "atlas" in opened:
            self._share_features(opened)
        self.sources = []
        for source, counts in opened.items():
            columns = None if len(opened) == 1 else counts.features.index.get_indexer(self.features.index)
            self.sources.append((source, counts, fewest_by_hash(counts.names, max_cells), columns))
        self._name_cells()
        self.batch, self.shares = None, None
        if config.BATCH is not None:
            self._level_batches()

    def _share_features(self, opened):
        paired, atlas = opened["paired"], opened["atlas"]
        what = loader.WHAT[self.modality].split()[-1]
        loader.check_builds(self.files["paired"], paired.build, self.files["atlas"], atlas.build)
        shared = paired.features.index.isin(atlas.features.index)
        print(f"{shared.sum():,} {what} are in both {self.modality} files; {(~shared).sum():,} only in the paired one, "
              f"{len(atlas.features) - shared.sum():,} only in the atlas are left out")
        if shared.mean() < 0.5:
            raise ValueError(f"{self.files['atlas']} has {shared.sum():,} of the {len(shared):,} {what} of "
                             f"{self.files['paired']}.\n  An atlas must be counted on the same {what}: "
                             "count its fragments on the peaks of the paired file, or use the same gene names.")
        self.features = paired.features[shared]

    def _name_cells(self):
        tables = []
        for source, counts, rows, _ in self.sources:
            plain = counts.obs.iloc[rows].select_dtypes(include=["number", "bool", "object", "string", "category"])
            plain = plain.drop(columns=RESERVED, errors="ignore")
            index = plain.index if source == "paired" else "atlas:" + plain.index
            tables.append(plain.set_axis(index).assign(source=source))
        self.obs = pd.concat(tables).rename_axis("barcode")
        self.obs = self.obs[["source", *self.obs.columns.drop("source")]]
        for name in self.obs.select_dtypes(exclude="number"):                   # True beside nothing is text
            self.obs[name] = self.obs[name].astype("string").astype(object).where(self.obs[name].notna(), None)

    def _level_batches(self):
        """Batch of every cell (N,) and the shares (B, F) of its counts that it keeps; one pass over the files."""
        where = " and ".join(str(path) for path in self.files.values() if path)
        if config.BATCH in RESERVED:
            raise ValueError(f"BATCH={config.BATCH}: Effendi writes a column of that name itself.\n"
                             "  Rename the column in your files.")
        if config.BATCH not in self.obs:
            raise ValueError(f"{where}: no column {config.BATCH!r} in obs (BATCH={config.BATCH}); there are: "
                             f"{', '.join(self.obs.columns.drop('source')) or 'none'}.\n"
                             "  Name the column that says which batch a cell belongs to, in both modalities.")
        values = self.obs[config.BATCH]
        if values.isna().any():
            raise ValueError(f"{where}: cell {self.obs.index[values.isna()][0]} has no {config.BATCH}.\n"
                             "  Every cell needs its batch.")
        batch, labels = pd.factorize(values.astype(str), sort=True)
        sizes = np.bincount(batch)
        if len(labels) < 2:
            raise ValueError(f"{where}: all cells have {config.BATCH} {labels[0]}; there is nothing to level.\n"
                             "  Leave BATCH=None, or name another column.")
        if sizes.min() < config.MIN_PAIRED_CELLS:
            raise ValueError(f"{where}: {config.BATCH} {labels[sizes.argmin()]} has {sizes.min()} cells.\n"
                             f"  A batch needs MIN_PAIRED_CELLS={config.MIN_PAIRED_CELLS} to be told from the others.")
        totals = np.zeros((len(labels), len(self.features)))
        for at, block in self.blocks(what="batches"):
            of_batch = sp.csr_matrix((np.ones(len(batch[at])), (batch[at], np.arange(len(batch[at])))),
                                     (len(labels), len(batch[at])))
            totals += (of_batch @ block).toarray()
        self.shares = loader.batch_shares(totals)
        self.batch = batch
        print(f"{self.modality}: {len(labels)} batches by {config.BATCH} ({', '.join(f'{n:,}' for n in sizes)} cells), "
              f"taken to hold the same mixture of cells; {1 - (self.shares * totals).sum() / totals.sum():.0%} of the "
              "counts are left out to level them"
              + (" (no difference beyond that of counting)" if (self.shares == 1).all() else ""))

    def blocks(self, columns=None, what=None):
        """(slice of the N cells, csr (b, F)), ...; columns (indices of features) narrows it; what names the bar."""
        bar = tqdm(total=len(self.obs), unit="cell", desc=f"{self.modality}: {what}", leave=False,
                   disable=True if what is None else None)
        with bar:
            for at, block in self.read(0, len(self.obs), columns):
                yield at, block
                bar.update(at.stop - at.start)

    def read(self, a, b, columns=None):
        """The same for the cells a .. b alone."""
        first = 0
        for _, counts, rows, shared in self.sources:
            level = self.shares is not None
            pick = columns if shared is None or level else shared if columns is None else shared[columns]
            skipped = max(a - first, 0)
            for at, block in counts.blocks(rows[skipped:max(b - first, 0)]):
                mine = slice(first + skipped + at.start, first + skipped + at.stop)
                if level:
                    block = block if shared is None else block[:, shared]
                    block = loader.thin(block, self.shares, self.batch[mine], self.modality + self.obs.index[mine])
                yield mine, block if pick is None else block[:, pick]
            first += len(rows)

    def keep(self, mask):
        """Go on with the cells of the mask (N,)."""
        first, sources = 0, []
        for source, counts, rows, columns in self.sources:
            sources.append((source, counts, rows[mask[first:first + len(rows)]], columns))
            first += len(rows)
        self.sources, self.obs = sources, self.obs[mask]
        self.batch = None if self.batch is None else self.batch[mask]


def fewest_by_hash(names, n):
    """Rows (ascending) of the n names with the smallest hashes: RNA and ATAC choose the same cells."""
    if n is None or n >= len(names):
        return np.arange(len(names))
    return np.sort(np.argsort(pd.util.hash_array(names.astype(object)), kind="stable")[:n])


def scan(cells, known=None):
    """One pass: drops cells without counts; depth (N,), counts and cells per feature (F,), a sample of cells.

    The sample, csr (at most HVG_CELLS, F), is for the choice of genes. Every value is checked on the way.
    known   mask (F,) of the features that the encoder reads, None = all: a cell without them is dropped too
    """
    n_features = len(cells.features)
    depth, readable = np.zeros(len(cells.obs)), np.zeros(len(cells.obs))
    totals, n_cells, sample = np.zeros(n_features), np.zeros(n_features, np.int64), []
    wanted = np.zeros(len(depth), bool)
    wanted[fewest_by_hash(cells.obs.index.to_numpy(str), HVG_CELLS)] = True
    for at, block in cells.blocks(what="reading"):
        depth[at] = np.asarray(block.sum(axis=1)).ravel()
        readable[at] = depth[at] if known is None else block @ known.astype(np.float32)
        totals += np.bincount(block.indices, block.data, n_features)
        n_cells += np.bincount(block.indices, minlength=n_features)
        if cells.modality == "rna" and wanted[at].any():
            sample.append(block[wanted[at] & (readable[at] > 0)])
    empty = readable == 0
    if empty.all():
        raise ValueError(f"{cells.files['paired']}: every count is zero.\n  Check the step that wrote it.")
    if empty.any():
        names, of = cells.obs.index[empty], "" if known is None else " of a gene that the encoder knows"
        print(f"{empty.sum():,} cells without a single {cells.modality} count{of} are left out (first: {names[0]})")
        cells.keep(~empty)
    cells.obs["n_counts"] = depth[~empty].astype(np.int64)
    cells.obs = cells.obs[["source", "n_counts", *cells.obs.columns.drop(["source", "n_counts"])]]
    return totals, n_cells, sp.vstack(sample).tocsr() if sample else None, int(empty.sum())


def check_inputs(max_cells=None):
    """What only both modalities together can show: pairing and genome build. Reads names and positions, no counts.

    Does nothing while only one modality is given; the other stages check again on what was embedded.
    """
    if not ((config.RNA_FILE and config.ATAC_FILE) or config.MULTIOME_FILE):
        return
    rna_path, atac_path = input_files("rna")["paired"], input_files("atac")["paired"]
    rna, atac = loader.open_counts(rna_path, "rna", config.GTF_FILE), loader.open_counts(atac_path, "atac")
    obs = [pd.DataFrame({"source": "paired"}, index=c.names[fewest_by_hash(c.names, max_cells)]) for c in (rna, atac)]
    loader.pair(*obs)
    loader.check_builds(rna_path, rna.build, atac_path, atac.build)
    loader.check_genome(rna.features, atac.features, config.GENE_WINDOW, f"{rna_path} and {atac_path}")


# --- which genes, which peaks, which encoder ----------------------------------------------------------------

def choose_genes(features, n_cells, sample):
    """Mask (F,) of the genes to model: seen in MIN_GENE_CELLS cells, and the N_HVG most variable of those."""
    seen = n_cells >= config.MIN_GENE_CELLS
    print(f"{(~seen).sum():,} of {len(seen):,} genes are seen in fewer than {config.MIN_GENE_CELLS} cells and left out")
    if not seen.any():
        raise ValueError(f"no gene is seen in MIN_GENE_CELLS={config.MIN_GENE_CELLS} cells.\n"
                         "  Try --set MIN_GENE_CELLS=1, or check the matrix.")
    if seen.sum() <= config.N_HVG:
        print(f"all {seen.sum():,} remaining genes are kept (N_HVG={config.N_HVG:,})")
        return seen
    import anndata
    import scanpy

    data = anndata.AnnData(sample[:, seen], var=pd.DataFrame(index=features.index[seen]))
    scanpy.pp.normalize_total(data)
    scanpy.pp.log1p(data)
    scanpy.pp.highly_variable_genes(data, n_top_genes=config.N_HVG, flavor="seurat")
    chosen = seen.copy()
    chosen[seen] = data.var["highly_variable"].to_numpy()
    print(f"{chosen.sum():,} highly variable genes of {seen.sum():,} (scanpy, seurat flavour, on {data.n_obs:,} cells)")
    return chosen


def choose_peaks(peaks, n_cells, n):
    """Mask (P,) of the peaks to embed, and the reason in words; ATAC_TOP_PEAKS as in config.py."""
    share = n_cells / n
    top = config.ATAC_TOP_PEAKS
    if top == 0:
        return np.ones(len(peaks), bool), "ATAC_TOP_PEAKS=0: all"
    if top is not None and top < 0:
        raise ValueError(f"ATAC_TOP_PEAKS={top}: None, 0 (all) or a number of peaks.")
    if top is not None:
        # An open/closed peak varies by p (1 - p); ties go by name, so that the order in the file does not matter.
        order = np.lexsort((peaks.index.to_numpy(str), -n_cells, -share * (1 - share)))
        mask = np.zeros(len(peaks), bool)
        mask[order[:top]] = True
        return mask, f"ATAC_TOP_PEAKS={top}: the most variable"
    often = share >= MIN_OPEN
    if (n_cells > 0).sum() <= config.MIN_PEAKS:
        return n_cells > 0, f"automatic: all that are open, no more than MIN_PEAKS={config.MIN_PEAKS:,}"
    if often.sum() >= config.MIN_PEAKS:
        return often, f"automatic: open in at least {MIN_OPEN:.0%} of the cells"
    limit = np.sort(n_cells)[::-1][config.MIN_PEAKS - 1]            # peaks tied with the last one stay too
    return n_cells >= limit, (f"automatic: only {often.sum():,} are open in {MIN_OPEN:.0%} of the cells, so the limit "
                              f"is lowered to {limit / n:.2%} to keep MIN_PEAKS={config.MIN_PEAKS:,}")


def choose_encoder(setting, real, default):
    """Name of the encoder: the setting, or the real one if its weights are there; prints which and why."""
    values, folder_setting = config.snapshot(), WEIGHTS[real][0]
    chosen, folder, files = values[setting], values[folder_setting], weight_files(real)
    lacking = ", ".join(names[0] for names, path in zip(WEIGHTS[real][1], files) if path is None)
    no_genome = real == "hyenadna" and not config.GENOME_FILE
    if chosen is None:
        chosen = default if lacking or no_genome else real
        why = f"no {real} weights in {folder}" if lacking else f"{real} weights found in {folder}"
        print(f"{setting}: {chosen} ({why}{', but no GENOME_FILE' if no_genome and not lacking else ''})")
    if chosen not in (real, default):
        raise ValueError(f"{setting}={chosen!r} is unknown.\n  Choose {real} or {default}.")
    if chosen == real and lacking:
        raise ValueError(f"{setting}={real}, but {folder} lacks {lacking}.\n  Put the weights there, set "
                         f"{folder_setting}, or use --set {setting}={default}.")
    if chosen == real and no_genome:
        raise ValueError(f"{setting}={real} needs the sequences of the peaks, but GENOME_FILE is not set.\n  Give "
                         f"--genome FASTA (or .2bit) of the peaks' build, or use --set {setting}={default}.")
    if real == chosen == "hyenadna":
        must_exist({"genome": config.GENOME_FILE})
    return chosen


def weight_files(encoder):
    """Paths of an encoder's files, None where one is missing."""
    setting, files = WEIGHTS[encoder]
    paths = ([Path(config.snapshot()[setting]) / name for name in names] for names in files)
    return [next((path for path in some if path.is_file()), None) for some in paths]


# --- PCA and LSI --------------------------------------------------------------------------------------------

def embed_pca(cells, spool, genes):
    """z_R (N, k) of the cells and the encoder that made them. spool: counts (N, G) of the chosen genes."""
    depth = cells.obs["n_counts"].to_numpy()
    blocks = spooled(spool, "PCA", depth)
    encoder = linear_encoder.fit_pca(blocks, list(genes), float(np.median(depth)), RANK, config.SEED)
    z = np.vstack([linear_encoder.pca_transform(c, d, encoder) for c, d in blocks()])
    encoder["gene_loadings"] = linear_encoder.pca_gene_loadings(blocks, z, encoder)
    return z, encoder


def embed_lsi(spool, peaks):
    """z_ATAC (N, k), peak embeddings (P, k) and the encoder. spool: counts (N, P) of the chosen peaks."""
    blocks = spooled(spool, "LSI")
    encoder = linear_encoder.fit_lsi(blocks, list(peaks), RANK, config.SEED)
    if encoder["dropped"]:
        worst = encoder["depth_correlation"][encoder["dropped"]]
        print(f"LSI component {', '.join(str(i + 1) for i in encoder['dropped'])} follows the depth of the cells "
              f"(correlation {', '.join(f'{r:.2f}' for r in worst)}) and is left out")
    z = np.vstack([linear_encoder.lsi_transform(c, encoder) for c in blocks()])
    return z, encoder["components"].T, encoder


def spooled(spool, what, depth=None):
    """The function that starts a pass over the spool: yields counts, or (counts, depth)."""
    def blocks():
        with tqdm(total=len(spool), unit="cell", desc=what, leave=False, disable=None) as bar:
            for at, counts in spool.blocks():
                yield counts if depth is None else (counts, depth[at])
                bar.update(counts.shape[0])
    return blocks


def spool_columns(cells, columns):
    """Counts of the chosen genes or peaks (N, columns), on disk."""
    spool = loader.Spool(len(columns))
    for _, block in cells.blocks(columns, what="selecting"):
        spool.append(block)
    return spool


# --- scGPT and HyenaDNA, shard by shard ---------------------------------------------------------------------

def match_scgpt(cells):
    """(encoder dictionary without its dtype, mask (F,) of the genes it reads); nothing is embedded yet."""
    scgpt = scgpt_encoder.Encoder(config.SCGPT_MODEL_DIR, device="cpu", dtype="float32")
    if scgpt.model.dim != config.DIM:
        raise ValueError(f"{config.SCGPT_MODEL_DIR} has embeddings of width {scgpt.model.dim}, DIM is {config.DIM}.\n"
                         f"  Use the whole-human model, or --set DIM={scgpt.model.dim}.")
    found = scgpt.match(cells.features.index, list(cells.features["gene_id"].astype(str)))
    print(f"scGPT: {len(found.matched):,} of {len(found.ids):,} genes are in the vocabulary ({len(found.renamed):,} "
          "under another spelling)")
    known = found.ids >= 0
    length = config.SCGPT_MAX_SEQ_LEN or min(len(known) + 1, scgpt_encoder.MAX_TOKENS)
    return dict(encoder="scgpt", genes=found.matched, tokens=found.ids[known], max_seq_len=length, seed=config.SEED,
                weights=scgpt.facts()["weights"], fast_transformer=config.SCGPT_USE_FAST_TRANSFORMER), known


def embed_scgpt(cells, encoder, known, key):
    """z_R (N, 512) on disk, by all processes, and the encoder with its dtype. Only the first process gets z_R."""
    config.pick_device()
    n, columns = len(cells.obs), np.flatnonzero(known)
    names = cells.obs.index.str.removeprefix("atlas:")      # as in a file of its own, where inference meets them

    def encode(scgpt, a, b, progress=None):
        counts = sp.vstack([block for _, block in cells.read(a, b, columns)])
        return scgpt.encode(counts, encoder["tokens"], names[a:b], progress)

    def choose():
        scgpt = embed_cells.open_scgpt(dict(encoder, dtype=None))
        encode(scgpt, 0, min(4, n))
        return scgpt.dtype, scgpt.why

    encoder = dict(encoder, dtype=settled_dtype("rna", key, choose))
    scgpt, todo = embed_cells.open_scgpt(encoder), shards_to_do("rna", n, key)
    mine = sum(min(config.EMB_SHARD_ROWS, n - first) for first in todo)
    with tqdm(total=n, initial=n - mine, unit="cell", desc="scGPT") as bar:
        for first in todo:
            save_shard("rna", first, n, encode(scgpt, first, min(first + config.EMB_SHARD_ROWS, n), bar.update), key)
    return gather_shards("rna", n, config.DIM), encoder


def embed_peaks(peaks, key):
    """Embeddings (P, 256) of the peaks by HyenaDNA, by all processes, and facts of how. Only the first gets them."""
    import hyenadna_encoder as hyenadna

    model = hyenadna.load_model(config.HYENADNA_MODEL_DIR).to(config.pick_device())
    if first_process():
        hyenadna.peak_sequences(peaks.iloc[:0], config.GENOME_FILE)     # writes the index, which only one may do
    barrier()
    dtype = settled_dtype("atac", key, lambda: hyenadna.choose_dtype(model, random_sequences(peaks)))
    todo = shards_to_do("atac", len(peaks), key)
    for first, part in hyenadna.embed_peaks(peaks, config.GENOME_FILE, model, todo, dtype=dtype,
                                            reverse_complement=config.HYENADNA_REVERSE_COMPLEMENT):
        save_shard("atac", first, len(peaks), part, key)
    found = gather_shards("atac", len(peaks), config.HYENADNA_D_MODEL)
    return found, dict(model=artifacts.hash_file(weight_files("hyenadna")[1]), dtype=dtype,
                       reverse_complement=config.HYENADNA_REVERSE_COMPLEMENT)


def random_sequences(peaks):
    """Random bases in the lengths of PROBES peaks: they try the arithmetic before the genome is read."""
    rng, rows = np.random.default_rng(config.SEED), np.linspace(0, len(peaks) - 1, PROBES).astype(int)
    widths = (peaks["end"] - peaks["start"]).to_numpy()[rows]
    return ["".join(rng.choice(list("ACGT"), width)) for width in widths]


def embed_hyenadna(spool, peaks, peak_emb, facts):
    """z_ATAC (N, 256) on disk and the encoder, from the embeddings of the peaks."""
    blocks = spooled(spool, "HyenaDNA cells")
    encoder = embed_cells.fit_peak_means(blocks, np.asarray(peak_emb), peaks) | facts
    transform, z, first = embed_cells.block_transform(encoder), on_disk(len(spool), config.HYENADNA_D_MODEL), 0
    for counts in blocks():
        z[first:first + counts.shape[0]] = transform(counts, None, None)
        first += counts.shape[0]
    return z, encoder


def settled_dtype(what, key, choose):
    """"float32" or "bfloat16": EMB_DTYPE, or what the first process chooses once, for all shards of this key."""
    if config.EMB_DTYPE is not None:
        if config.EMB_DTYPE not in ("float32", "bfloat16"):
            raise ValueError(f"EMB_DTYPE={config.EMB_DTYPE!r}: use float32, bfloat16 or None (chosen by a check).")
        return config.EMB_DTYPE
    name = f"shards/{what}-dtype.txt"
    if first_process() and not artifacts.is_done(key, name):
        dtype, why = choose()
        artifacts.save_text(name, str(dtype).removeprefix("torch."), key=key, why=why)
    barrier()
    dtype = artifacts.path(name).read_text()
    print(f"embedding in {dtype} ({artifacts.record(name)['why'].removeprefix(f'{dtype}: ')})")
    return dtype


def shard_name(what, first, n):
    return f"shards/{what}-{first}-{min(first + config.EMB_SHARD_ROWS, n)}.npy"


def shards_to_do(what, n, key):
    """First rows of the shards that are not on disk yet and fall to this process."""
    every = range(0, n, config.EMB_SHARD_ROWS)
    todo = [first for first in every if not artifacts.is_done(key, shard_name(what, first, n))]
    if len(todo) < len(every):
        print(f"{len(every) - len(todo):,} of {len(every):,} shards are there already")
    barrier()                               # all have looked before the first one writes
    return todo[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]


def save_shard(what, first, n, z, key):
    artifacts.save_array(shard_name(what, first, n), z, range(first, first + len(z)), key=key)


def gather_shards(what, n, width):
    """All shards as one array (n, width) on disk, for the first process; None for the others."""
    barrier()
    if not first_process():
        return None
    z = on_disk(n, width)
    for first in range(0, n, config.EMB_SHARD_ROWS):
        z[first:first + config.EMB_SHARD_ROWS] = artifacts.load_array(shard_name(what, first, n), (None, width))
    return z


def drop_shards(what):
    """Remove the shards of a finished stage."""
    folder = artifacts.path("shards")
    for path in folder.glob(f"{what}-*"):
        path.unlink()
    with contextlib.suppress(OSError):      # the other stage's are still there, or there is no folder
        folder.rmdir()


def on_disk(n, width):
    """A float32 array (n, width) in a nameless file below OUT_DIR that disappears with the process."""
    with tempfile.TemporaryFile(dir=config.OUT_DIR) as f:
        return np.memmap(f, np.float32, "w+", shape=(n, width))


# --- several processes --------------------------------------------------------------------------------------

def first_process():
    return os.environ.get("RANK", "0") == "0"


def barrier():
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def processes():
    """Join the processes of torchrun, if it started this one. Only the first speaks; each takes its own GPU.

    They can join only once, so whoever runs several stages in one process holds this around all of them.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.distributed.is_initialized():
        yield
        return
    local, cuda = int(os.environ["LOCAL_RANK"]), config.DEVICE in (None, "cuda") and torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local + 1} has no GPU: there are {torch.cuda.device_count()}.\n  "
                             f"Use torchrun --nproc_per_node={torch.cuda.device_count()}, or --set DEVICE=cpu.")
        torch.cuda.set_device(local)
        config.DEVICE = f"cuda:{local}"
    # Shards take as long as they take; a day means that a process hangs.
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
    with contextlib.ExitStack() as stack:
        if not first_process():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    barrier()                               # nobody leaves before the first one has written
    torch.distributed.destroy_process_group()


# --- the three stages ---------------------------------------------------------------------------------------

def rna(max_cells=None):
    start = time.time()
    name = choose_encoder("RNA_ENCODER", "scgpt", "pca")
    files = input_files("rna")
    key = _key("rna", files, name, max_cells, ("N_HVG", "MIN_GENE_CELLS", "BATCH"))
    if artifacts.is_done(key, *RNA_FILES):
        drop_shards("rna")
        return print("precompute_embeddings rna: up to date")
    check_inputs(max_cells)
    cells = Cells("rna", files, max_cells)
    encoder, known = match_scgpt(cells) if name == "scgpt" else (None, None)
    totals, n_cells, sample, empty = scan(cells, known)
    chosen = choose_genes(cells.features, n_cells, sample)
    missing = [] if known is None else leave_out_unknown(cells.features, chosen, known)
    if name == "scgpt":
        z, encoder = embed_scgpt(cells, encoder, known, key)
    if not first_process():
        return None
    genes = gene_table(cells.features[chosen].assign(mean=totals[chosen] / len(cells.obs), n_cells=n_cells[chosen]))
    spool = spool_columns(cells, np.flatnonzero(chosen))
    if name == "pca":
        z, encoder = embed_pca(cells, spool, genes.index)
    facts = _facts("precompute_embeddings rna", key, start, encoder, cells, missing=missing, dropped=dict(
        cells_without_counts=empty, genes_not_chosen=int((~chosen).sum()),
        genes_without_position=list(genes.index[genes["start"].isna()])))
    _save_cells("rna", z, config.DIM, cells.obs, facts)
    artifacts.save("gene_expression.npz", spool.write_npz, rows=len(spool), shape=[len(spool), len(genes)],
                   ids=artifacts.hash_ids(cells.obs.index), columns=artifacts.hash_ids(genes.index), **facts)
    artifacts.save_model("rna_encoder.pt", as_tensors(encoder), **facts)
    artifacts.save_table("genes.csv", genes, **facts)
    drop_shards("rna")
    print(f"precompute_embeddings rna: {len(cells.obs):,} cells, {len(genes):,} genes, {name} {z.shape[1]} of "
          f"{config.DIM}, {time.time() - start:.0f} s -> {config.OUT_DIR}/effendi_rna_emb.npy")


def leave_out_unknown(features, chosen, known):
    """Clear the genes that scGPT has no embedding for in the mask `chosen` (F,); returns their names."""
    missing = list(features.index[chosen & ~known])
    chosen &= known
    if missing:
        print(f"{len(missing):,} of the chosen genes are not in the scGPT vocabulary ({', '.join(missing[:3])}, ...).\n"
              f"  They are left out; {chosen.sum():,} remain. Listed in genes.csv.json under \"missing\".")
    if not chosen.any():
        raise ValueError("none of the highly variable genes is in the scGPT vocabulary.\n  Raise N_HVG, or use "
                         "--set RNA_ENCODER=pca.")
    return missing


def gene_table(genes):
    genes = genes.rename_axis("gene").astype({"start": "Int64", "end": "Int64"})
    nowhere = genes.index[genes["start"].isna()]
    if len(nowhere):
        print(f"{len(nowhere):,} of {len(genes):,} genes have no position, so no accessibility "
              f"({', '.join(nowhere[:3])}, ...); --gtf FILE may add some")
    return genes


def atac(max_cells=None):
    start = time.time()
    name = choose_encoder("ATAC_ENCODER", "hyenadna", "lsi")
    files = input_files("atac")
    key = _key("atac", files, name, max_cells, ("ATAC_TOP_PEAKS", "MIN_PEAKS", "BATCH"))
    if artifacts.is_done(key, *ATAC_FILES):
        drop_shards("atac")
        return print("precompute_embeddings atac: up to date")
    check_inputs(max_cells)
    cells = Cells("atac", files, max_cells)
    _, n_cells, _, empty = scan(cells)
    kept, why = choose_peaks(cells.features, n_cells, len(cells.obs))
    print(f"{kept.sum():,} of {len(kept):,} peaks are embedded, {(~kept).sum():,} are not ({why})")
    peaks = cells.features.assign(n_cells=n_cells, kept=kept).rename_axis("peak")
    if name == "hyenadna":
        peak_emb, how = embed_peaks(peaks[kept], key)
    if not first_process():
        return None
    spool = spool_columns(cells, np.flatnonzero(kept))
    closed = int((np.diff(spool.indptr) == 0).sum())
    if closed:
        print(f"{closed:,} cells have none of these peaks open; their embedding is zero")
    if name == "hyenadna":
        z, encoder = embed_hyenadna(spool, peaks.index[kept], peak_emb, how)
    else:
        z, peak_emb, encoder = embed_lsi(spool, peaks.index[kept])
    facts = _facts("precompute_embeddings atac", key, start, encoder, cells, why=why, cells_without_kept_peaks=closed,
                   dropped=dict(cells_without_counts=empty, peaks_not_chosen=int((~kept).sum())))
    _save_cells("atac", z, config.HYENADNA_D_MODEL, cells.obs, facts)
    artifacts.save_array("peak_embeddings.npy", linear_encoder.pad(peak_emb, config.HYENADNA_D_MODEL),
                         peaks.index[kept], **facts)
    artifacts.save_model("atac_encoder.pt", as_tensors(encoder), **facts)
    artifacts.save_table("peaks.csv", peaks, **facts)
    drop_shards("atac")
    print(f"precompute_embeddings atac: {len(cells.obs):,} cells, {kept.sum():,} peaks, {name} {z.shape[1]} of "
          f"{config.HYENADNA_D_MODEL}, {time.time() - start:.0f} s -> {config.OUT_DIR}/effendi_atac_emb.npy")


def genes():
    """Accessibility (N_a, G) and embeddings (G, 512) of the genes `rna` chose, in the cells `atac` embedded."""
    start = time.time()
    if not first_process():
        return None
    of_rna, of_atac = artifacts.record("rna_encoder.pt"), artifacts.record("atac_encoder.pt")
    alone = not (config.ATAC_FILE or config.MULTIOME_FILE)
    files = must_exist(of_atac["inputs"]) if alone else input_files("atac")
    inputs = files | {name: artifacts.path(name) for name in ("genes.csv", "rna_encoder.pt", "effendi_atac_obs.csv")}
    key = artifacts.stage_key("genes", inputs, ("GENE_WINDOW", "GENE_DECAY", "PEAKS_PER_GENE", "BATCH"))
    pca = of_rna["encoder"] == "pca"
    if artifacts.is_done(key, *GENE_FILES, *(PCA_GENE_FILES if pca else ())):
        return print("precompute_embeddings genes: up to date")
    if not pca:
        same_scgpt(of_rna["how"]["weights"])
    table, obs = artifacts.load_table("genes.csv"), artifacts.load_table("effendi_atac_obs.csv")
    artifacts.same_rows("effendi_atac_emb.npy", "effendi_atac_obs.csv")
    cells = Cells("atac", files, of_atac["max_cells"])
    cells.keep(cells.obs.index.isin(obs.index))
    if list(cells.obs.index) != list(obs.index):
        raise ValueError(f"{cells.files['paired']} does not hold the cells of {artifacts.path('effendi_atac_obs.csv')}"
                         ".\n  Run again: python precompute_embeddings.py atac")
    loader.check_genome(table, cells.features, config.GENE_WINDOW, f"genes.csv and {cells.files['paired']}")
    near, shifted = (loader.promoter_share(cells.features, table, s) for s in (0, SHIFT))
    print(f"{near:.0%} of the genes with a position have a peak within 2 kb of their TSS; {shifted:.0%} have one "
          f"{SHIFT // 1000} kb away" + ("" if near > 1.2 * shifted else
          ". Promoters should stand out: are genes and peaks of one genome build?"))
    unknown = table["start"].notna() & ~table["strand"].isin(["+", "-"])
    if unknown.any():
        print(f"{unknown.sum():,} genes have no strand (10x files name none): their start is taken for the TSS, and "
              "distances of peaks are left empty. --gtf gives both.")
    spool, of_peaks, peaks = accessibility(cells, table)
    never = table.index[sum(np.bincount(block.indices, minlength=len(table)) for _, block in spool.blocks()) == 0]
    nowhere = table.index[table["start"].isna()]
    if len(never):
        first = f" (first: {', '.join(nowhere[:3])})" if len(nowhere) else ""
        print(f"accessibility is zero for {len(nowhere):,} genes without a position{first} and "
              f"{len(never) - len(nowhere):,} without an open peak nearby")
    facts = _facts("precompute_embeddings genes", key, start, {"encoder": of_atac["encoder"]}, cells,
                   metrics=dict(promoter_share=near, promoter_share_shifted=shifted),
                   genes_without_position=list(nowhere), genes_never_open=list(never.difference(nowhere)))
    embedded = embed_genes_pca(spool, obs, table, of_rna) if pca else None
    artifacts.save("gene_accessibility.npz", spool.write_npz, rows=len(spool), shape=[len(spool), len(table)],
                   ids=artifacts.hash_ids(obs.index), columns=artifacts.hash_ids(table.index), **facts)
    artifacts.save("gene_peaks.npz", of_peaks.write_npz, rows=len(of_peaks), shape=[len(of_peaks), len(peaks)],
                   ids=artifacts.hash_ids(obs.index), **facts)
    artifacts.save_table("gene_peaks.csv", peaks, **facts)
    if pca:
        emb, encoder, space = embedded
        facts |= dict(encoder="pca", space=space)
        artifacts.save_model("gene_encoder.pt", as_tensors(encoder), **facts)
        artifacts.save_array("gene_embeddings.npy", emb, table.index, **facts)
    else:
        save_scgpt_genes(table, facts)
        artifacts.remove(PCA_GENE_FILES[0])                 # of an earlier run with the PCA
    print(f"precompute_embeddings genes: {len(table):,} genes with {len(peaks):,} peaks in {len(obs):,} cells, "
          f"{time.time() - start:.0f} s -> {config.OUT_DIR}/gene_accessibility.npz, gene_peaks.npz, "
          "gene_embeddings.npy")


def accessibility(cells, table):
    """Gene accessibility (N_a, G) and what each peak of a gene contributes to it (N_a, C), both on disk, and these
    peaks as a table: counts of the peaks that all files have times the peak-gene weights."""
    weights = loader.gene_peak_weights(cells.features, table, config.GENE_WINDOW, config.GENE_DECAY)
    near = np.flatnonzero(np.diff(weights.indptr))
    weights, features = weights[near], cells.features.iloc[near]
    counts, access, totals = loader.Spool(len(near)), loader.Spool(len(table)), np.zeros(len(near))
    for _, block in cells.blocks(near, "gene accessibility"):
        counts.append(block)
        access.append((block @ weights).sorted_indices())
        totals += np.asarray(block.sum(0)).ravel()
    columns, gene, peak = loader.peaks_of_genes(weights, totals, config.PEAKS_PER_GENE)
    parts = loader.Spool(columns.shape[1])
    for _, block in counts.blocks():
        parts.append((block @ columns).sorted_indices())
    return access, parts, table_of_peaks(features, table, columns, totals, gene, peak)


def table_of_peaks(features, table, columns, totals, gene, peak):
    """gene_peaks.csv: the columns of gene_peaks.npz. A gene's weaker peaks are one row, named "others"."""
    one = np.where(peak < 0, 0, peak)
    middle = (features["start"].to_numpy() + features["end"].to_numpy())[one] / 2
    of_gene = table.iloc[gene]
    minus, known = (of_gene["strand"] == "-").to_numpy(), of_gene["strand"].isin(["+", "-"]).to_numpy()
    tss = np.where(minus, of_gene["end"], of_gene["start"])
    contribution = totals @ columns
    return pd.DataFrame(dict(
        peak=np.where(peak < 0, "others", features.index.to_numpy()[one]),
        tss_distance=np.where((peak < 0) | ~known, np.nan, np.where(minus, tss - middle, middle - tss)),
        share=(contribution / np.bincount(gene, contribution, len(table))[gene]).round(4)),
        index=pd.Index(of_gene.index, name="gene"))


def same_scgpt(weights):
    """ValueError unless SCGPT_MODEL_DIR holds the model (hash of its weights) that embedded the cells."""
    found = weight_files("scgpt")
    if None in found or artifacts.hash_file(found[-1]) != weights:
        raise ValueError(f"{config.SCGPT_MODEL_DIR} does not hold the scGPT that embedded the cells.\n"
                         "  Set SCGPT_MODEL_DIR to that model, or run again: python precompute_embeddings.py rna")


def save_scgpt_genes(table, facts):
    """gene_embeddings.npy from the scGPT that embedded the cells."""
    weights = artifacts.hash_file(weight_files("scgpt")[-1])
    facts = facts | dict(encoder="scgpt", space=linear_encoder.space({"weights": weights}), weights=weights)
    scgpt_encoder.save_gene_embeddings(list(table.index), config.SCGPT_MODEL_DIR, artifacts.path("gene_embeddings.npy"),
                                       list(table["gene_id"].fillna("").astype(str)), **facts)


def embed_genes_pca(spool, obs, table, of_rna):
    """Embeddings (G, 512) of the genes, the encoder of their accessibility, and the space of both halves.

    The encoder is the PCA of log-normalised accessibility, with the loadings of the genes on it.
    """
    depth = obs["n_counts"].to_numpy()
    blocks = spooled(spool, "PCA of gene accessibility", depth)
    encoder = linear_encoder.fit_pca(blocks, list(table.index), float(np.median(depth)), RANK, config.SEED)
    z = np.vstack([linear_encoder.pca_transform(c, d, encoder) for c, d in blocks()])
    encoder["gene_loadings"] = linear_encoder.pca_gene_loadings(blocks, z, encoder)
    emb = gene_embeddings(artifacts.load_model("rna_encoder.pt")["gene_loadings"], encoder["gene_loadings"])
    return emb, encoder, linear_encoder.space({"rna": of_rna["space"], "atac": linear_encoder.space(encoder)})


def gene_embeddings(expression, accessible):
    """Embeddings (G, 512) from loadings (G, k) on the PCA of expression and on that of gene accessibility.

        e_g = sqrt(DIM / 2) [ loadings of expression, 0 ... | loadings of accessibility, 0 ... ]

    Loadings are correlations, so each half has norm sqrt(256) R, R^2 the share of the gene's variance that the
    components explain. The norm is at most sqrt(512), what the layer norm of the scGPT gene encoder gives.
    """
    half = config.DIM // 2
    return np.sqrt(half) * np.hstack([linear_encoder.pad(x, half) for x in (expression, accessible)]).astype(np.float32)


# --- records ------------------------------------------------------------------------------------------------

def _key(modality, files, encoder, max_cells, settings):
    values = config.snapshot()
    files = dict(files, gtf=config.GTF_FILE if modality == "rna" else None)
    if encoder in WEIGHTS:
        files |= {path.name: path for path in weight_files(encoder)}
    if encoder == "hyenadna":
        files["genome"] = config.GENOME_FILE
    chosen = {name: values[name] for name in (*settings, *READS.get(encoder, ()), "DIM", "HYENADNA_D_MODEL")}
    return artifacts.stage_key(modality, files, dict(chosen, encoder=encoder, max_cells=max_cells))


def _facts(stage, key, start, encoder, cells, **more):
    """What every record of a stage says."""
    singular = encoder.get("singular_values")
    plain = {k: v for k, v in encoder.items() if k != "encoder" and isinstance(v, (str, int, bool))}
    metrics = dict(more.pop("metrics", {}), cells=len(cells.obs), features=len(cells.features))
    if singular is not None:
        metrics["singular_values"] = np.asarray(singular).round(4)
    return dict(stage=stage, key=key, seconds=round(time.time() - start, 1), encoder=encoder["encoder"],
                space=linear_encoder.space(encoder), how=plain, metrics=metrics, inputs=cells.files,
                max_cells=cells.max_cells, place={source: counts.place for source, counts, *_ in cells.sources}, **more)


def _save_cells(modality, z, width, obs, facts):
    """The embedding, padded with zeros to its width row by row, and the table of the cells."""
    def write(f):
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(z), width)}
        np.lib.format.write_array_header_1_0(f, header)
        for first in range(0, len(z), config.BLOCK_ROWS):
            f.write(linear_encoder.pad(z[first:first + config.BLOCK_ROWS], width).data)

    artifacts.save(f"effendi_{modality}_emb.npy", write, rows=len(z), shape=[len(z), width],
                   ids=artifacts.hash_ids(obs.index), **facts)
    artifacts.save_table(f"effendi_{modality}_obs.csv", obs, **facts)
    artifacts.save(f"effendi_{modality}_obs.pkl", lambda f: obs.to_pickle(f), rows=len(obs), **facts)


def as_tensors(encoder):
    """The encoder as plain values and tensors, for a .pt that loads with weights_only=True."""
    return {key: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for key, value in encoder.items()}


def main(argv=None):
    def file(setting, text):
        return dict(dest=setting, metavar="FILE", help=text)

    args = config.from_args(__doc__, argv, {
        "stage": dict(choices=["rna", "atac", "genes"]),
        "--rna": file("RNA_FILE", "raw counts, cells x genes"), "--atac": file("ATAC_FILE", "cells x peaks"),
        "--multiome": file("MULTIOME_FILE", "both, a 10x .h5 or .h5mu"),
        "--unpaired-rna": file("UNPAIRED_RNA_FILE", "more RNA cells, for Stage 2's delays"),
        "--unpaired-atac": file("UNPAIRED_ATAC_FILE", "more ATAC cells, for Stage 1"),
        "--gtf": file("GTF_FILE", "gene positions (.gtf or .gtf.gz), instead of those in the file"),
        "--genome": file("GENOME_FILE", "FASTA or .2bit of the peaks' build, for HyenaDNA"),
        "--max-cells": dict(type=int, metavar="N", help="use N cells of each file, the same ones in both modalities"),
    })
    if args.max_cells is not None and args.max_cells < 2:
        raise ValueError(f"--max-cells {args.max_cells}: give 2 or more.")
    with processes():
        if args.stage == "genes":
            genes()
        else:
            {"rna": rna, "atac": atac}[args.stage](args.max_cells)


if __name__ == "__main__":
    config.script(main)
