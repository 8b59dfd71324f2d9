"""Count matrices of any size and format, read in blocks of cells; what their rows and columns are called.

    open_counts(path, "rna" | "atac") -> Counts          .h5ad, 10x multiome .h5, .h5mu
    Counts.blocks(rows) -> (slice of rows, csr (b, n) float32), ...

Raw counts are taken from the first place that holds non-negative integers: X, layers["counts"], raw, a
single layer whose name contains "counts". Chromosomes are called chr1 whether the file says chr1 or 1;
intervals are 0-based and half-open; a peak is called chrom:start-end whatever its file calls it.

Memory is bounded by one block of cells: rows of a CSR matrix are contiguous on disk (so are the cells of a
10x file), rows of a dense one are sliced, and a CSC matrix is sorted once, in chunks, into a nameless
temporary file below OUT_DIR (`Spool`) that disappears with the process.

Gene accessibility is cells x peaks times `gene_peak_weights` (P, G); its docstring has the equation.
"""
import contextlib
import gzip
import os
import re
import tempfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

import config

PROBE = 1 << 18             # stored values looked at to decide which place of a file holds counts
CHUNK = 1 << 22             # stored values held in memory while a CSC matrix is sorted
MAX_PEAK_WIDTH = 10_000     # bp; intervals wider than this in the median are genes, not peaks
MIN_WEIGHT = 1e-3           # a peak that would count for less is left out of a gene's accessibility
ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}")
TYPES = {"rna": ("gene expression", "gex", "rna"), "atac": ("peaks", "atac", "chromatin accessibility")}
WHAT = {"rna": "cells x genes", "atac": "cells x peaks"}
FLAG = {"rna": "--rna", "atac": "--atac"}

# Chromosome ends in bp: chr1 .. chr22, chrX, chrY.
_NAMES = [f"chr{i}" for i in [*range(1, 23), "X", "Y"]]
CHROM_SIZES = {
    "GRCh38": dict(zip(_NAMES, (
        248956422, 242193529, 198295559, 190214555, 181538259, 170805979, 159345973, 145138636, 138394717,
        133797422, 135086622, 133275309, 114364328, 107043718, 101991189, 90338345, 83257441, 80373285,
        58617616, 64444167, 46709983, 50818468, 156040895, 57227415))),
    "GRCh37": dict(zip(_NAMES, (
        249250621, 243199373, 198022430, 191154276, 180915260, 171115067, 159138663, 146364022, 141213431,
        135534747, 135006516, 133851895, 115169878, 107349540, 102531392, 90354753, 81195210, 78077248,
        59128983, 63025520, 48129895, 51304566, 155270560, 59373566))),
}
BUILDS = {"grch38": "GRCh38", "hg38": "GRCh38", "grch37": "GRCh37", "hg19": "GRCh37", "hs37d5": "GRCh37",
          "grcm39": "GRCm39", "mm39": "GRCm39", "grcm38": "GRCm38", "mm10": "GRCm38"}


# --- a matrix on disk, by rows ------------------------------------------------------------------------------

class Spool:
    """A CSR matrix that grows row by row in a nameless temporary file below OUT_DIR.

    Only the row pointers are in memory; the operating system removes the file when the process ends, however
    it ends. 8 bytes per stored value on disk.
    """

    def __init__(self, n_columns):
        os.makedirs(config.OUT_DIR, exist_ok=True)
        self.n_columns = n_columns
        self.indptr = np.zeros(1, np.int64)
        self._indices, self._data = (tempfile.TemporaryFile(dir=config.OUT_DIR) for _ in range(2))

    def __len__(self):
        return len(self.indptr) - 1

    def append(self, block):
        """Add the rows of a csr matrix (b, n_columns)."""
        self.write(self.indptr[-1], block.indices, block.data)
        self.indptr = np.concatenate([self.indptr, self.indptr[-1] + block.indptr[1:]])

    def write(self, at, indices, data):
        for file, values, dtype in ((self._indices, indices, np.int32), (self._data, data, np.float32)):
            file.seek(4 * int(at))
            file.write(np.ascontiguousarray(values, dtype).data)

    def values(self, start, stop):
        """Column indices and values of the stored entries start .. stop."""
        for file in (self._indices, self._data):
            file.flush()
            file.seek(4 * int(start))
        count = int(stop - start)
        return np.fromfile(self._indices, np.int32, count), np.fromfile(self._data, np.float32, count)

    def read(self, a, b):
        """Rows a .. b as csr (b - a, n_columns)."""
        indices, data = self.values(self.indptr[a], self.indptr[b])
        return sp.csr_matrix((data, indices, self.indptr[a:b + 1] - self.indptr[a]), (b - a, self.n_columns))

    def blocks(self):
        """(slice of rows, csr), ... over all rows, BLOCK_ROWS at a time."""
        for a in range(0, len(self), config.BLOCK_ROWS):
            b = min(a + config.BLOCK_ROWS, len(self))
            yield slice(a, b), self.read(a, b)

    def write_npz(self, f):
        """Write what scipy.sparse.load_npz reads, without holding the matrix."""
        def member(name, shape, dtype, parts):
            with archive.open(name + ".npy", "w", force_zip64=True) as out:
                descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(out, header)
                for part in parts:
                    out.write(np.ascontiguousarray(part, dtype).data)

        nnz = int(self.indptr[-1])
        pieces = [(s, min(s + CHUNK, nnz)) for s in range(0, nnz, CHUNK)]
        wide = np.int64 if nnz > np.iinfo(np.int32).max else np.int32      # scipy wants one type for both
        with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            member("indices", (nnz,), wide, (self.values(*p)[0] for p in pieces))
            member("data", (nnz,), np.float32, (self.values(*p)[1] for p in pieces))
            member("indptr", self.indptr.shape, wide, [self.indptr])
            member("shape", (2,), np.int64, [np.array([len(self), self.n_columns])])
            member("format", (), "S3", [np.array(b"csr")])


def csr_from_csc(group, shape):
    """A Spool holding a CSC group (data, indices, indptr) of the given shape (cells, columns) by rows.

    Rows fall into buckets of at most CHUNK stored values. Pass 1 counts the values of each row; pass 2 reads
    the columns in order and appends every value to its bucket on disk; then each bucket is sorted by row.
    Both sorts are stable, so that columns end up ascending within a row.
    """
    indices, data, colptr = group["indices"], group["data"], group["indptr"][:].astype(np.int64)
    spool, nnz = Spool(shape[1]), len(indices)
    counts = np.zeros(shape[0], np.int64)
    for s in range(0, nnz, CHUNK):
        counts += np.bincount(indices[s:s + CHUNK], minlength=shape[0])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    bucket_of = indptr[:-1] // CHUNK                                         # (cells,), ascending
    first_row = np.flatnonzero(np.diff(bucket_of, prepend=-1))               # first row of every bucket
    bucket_of = np.searchsorted(first_row, np.arange(shape[0]), side="right") - 1
    bounds = indptr[np.append(first_row, shape[0])]
    cursor = bounds[:-1].copy()
    with tempfile.TemporaryFile(dir=config.OUT_DIR) as row_file:
        for s in range(0, nnz, CHUNK):
            e = min(s + CHUNK, nnz)
            rows = indices[s:e].astype(np.int32)
            order = np.argsort(bucket_of[rows], kind="stable")
            cols = (np.searchsorted(colptr, np.arange(s, e), side="right") - 1)[order]
            rows, values = rows[order], data[s:e][order]
            edges = np.searchsorted(bucket_of[rows], np.arange(len(first_row) + 1))
            for k, (i, j) in enumerate(zip(edges, edges[1:])):
                spool.write(cursor[k], cols[i:j], values[i:j])
                row_file.seek(4 * int(cursor[k]))
                row_file.write(rows[i:j].data)
                cursor[k] += j - i
        for start, stop in zip(bounds, bounds[1:]):
            row_file.seek(4 * int(start))
            order = np.argsort(np.fromfile(row_file, np.int32, int(stop - start)), kind="stable")
            cols, values = spool.values(start, stop)
            spool.write(start, cols[order], values[order])
    spool.indptr = indptr
    return spool


class _Rows:
    """Rows of one HDF5 matrix: a csr or csc group, or a dense data set."""

    def __init__(self, node, layout, shape):
        self.node, self.layout, self.shape = node, layout, tuple(int(n) for n in shape)
        self._spool = None
        if layout == "csr":
            self.indptr = node["indptr"][:].astype(np.int64)

    def probe(self):
        """Some stored values, to see whether these are counts."""
        if self.layout == "dense":
            return self.node[:max(1, PROBE // self.shape[1])].ravel()
        data = self.node["data"]
        return np.concatenate([data[:PROBE], data[max(PROBE, len(data) - PROBE):]])

    def read(self, a, b):
        if self.layout == "dense":
            return sp.csr_matrix(self.node[a:b].astype(np.float32))
        if self.layout == "csc":
            self._spool = self._spool or csr_from_csc(self.node, self.shape)
            return self._spool.read(a, b)
        s, e = int(self.indptr[a]), int(self.indptr[b])
        data, indices = self.node["data"][s:e].astype(np.float32), self.node["indices"][s:e]
        if len(indices) and (indices.min() < 0 or indices.max() >= self.shape[1]):
            raise ValueError(f"a column index lies outside 0 .. {self.shape[1] - 1}: the file is damaged.\n"
                             "  Write it again from its source.")
        return sp.csr_matrix((data, indices, self.indptr[a:b + 1] - s), (b - a, self.shape[1]))


def values_problem(values):
    """Why these values cannot be counts, or ''."""
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.number):
        return f"values of type {values.dtype}"
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        return "NaN or infinite values"
    if (values < 0).any():
        return f"negative values such as {values[values < 0][0]:g}"
    fraction = values != np.rint(values)
    return f"non-integer values such as {values[fraction][0]:g}" if fraction.any() else ""


# --- a count matrix with names ------------------------------------------------------------------------------

class Counts:
    """Raw counts of one modality in one file.

    names     (n_cells,) barcodes            obs   table of the file, index names
    features  table, index gene symbol or peak name; genes: gene_id, chrom, start, end, strand (NaN where
              unknown); peaks: chrom, start, end
    place     where in the file the counts are: "X", "layers['counts']", ...
    build     "GRCh38", ... or None            sizes {chromosome: bp} or {}            notes  lines to print
    """

    def __init__(self, path, modality, rows, place, obs, features, columns, build=None, sizes=None, notes=()):
        self.path, self.modality, self.place, self.obs, self.features = path, modality, place, obs, features
        self.names, self.n_cells = obs.index.to_numpy(str), len(obs)
        self.build, self.sizes, self.notes = build, sizes or {}, list(notes)
        self._rows, self._columns = rows, columns

    def blocks(self, rows=None):
        """(slice of `rows`, csr (b, n features) float32), ...; rows ascending, None = all. Values are checked."""
        rows = np.arange(self.n_cells) if rows is None else np.asarray(rows)
        first = 0
        while first < len(rows):
            last = int(np.searchsorted(rows, rows[first] + config.BLOCK_ROWS))
            with _reading(self.path):
                block = self._rows.read(int(rows[first]), int(rows[last - 1]) + 1)
            self._check(block, int(rows[first]))
            if len(rows[first:last]) != block.shape[0]:
                block = block[rows[first:last] - rows[first]]
            if self._columns is not None:
                block = block[:, self._columns]
            block.sum_duplicates()
            block.eliminate_zeros()
            yield slice(first, last), block
            first = last

    def _check(self, block, first_row):
        problem = values_problem(block.data)
        if problem:
            cells = np.split(block.data, block.indptr[1:-1])
            name = self.names[first_row + next(i for i, values in enumerate(cells) if values_problem(values))]
            raise ValueError(f"{self.path}: {self.place} has {problem}, first in cell {name}.\n"
                             f"  {FLAG[self.modality]} needs raw counts: non-negative integers.")


def open_counts(path, modality, gtf=None):
    """The counts of one modality ("rna" or "atac") of a .h5ad, 10x .h5 or .h5mu file, recognised by content."""
    file = _open(path)
    with _reading(path):
        if "matrix" in file:
            group, table = file["matrix"], _tenx
        elif "mod" in file:
            names = {"rna": ("rna", "gex"), "atac": ("atac", "peaks")}[modality]
            mod = next((m for m in file["mod"] if m.lower() in names), None)
            if mod is None:
                raise ValueError(f"{path} has no {modality} modality; it has: {', '.join(file['mod']) or 'none'}.\n"
                                 f"  Effendi looks for one called {' or '.join(names)}.")
            group, table = file["mod"][mod], _anndata
        elif {"obs", "var"} <= set(file):
            group, table = file, _anndata
        else:
            raise ValueError(f"{path} is HDF5, but no .h5ad, .h5mu or 10x matrix; it holds: {', '.join(file)}.\n"
                             "  Give a file written by anndata, mudata or Cell Ranger ARC.")
        rows, place, obs, var, uns = table(path, modality, group)
    notes = [f"{Path(path).name}: counts from {place}"]
    columns = _columns_of(path, modality, var)
    if columns is not None:
        notes.append(f"{Path(path).name}: {len(columns):,} of {len(var):,} features are {WHAT[modality].split()[-1]}")
        var = var.iloc[columns]
    if min(len(obs), len(var)) == 0:
        raise ValueError(f"{path} is empty: {len(obs)} cells, {len(var)} {WHAT[modality].split()[-1]}.\n"
                         "  Check the filtering that wrote it.")
    _refuse_duplicates(path, "cell names", obs.index, "give every barcode its own name (add the sample to it)")
    build, sizes = _genome(uns, var)
    features = _genes(path, var, gtf, notes) if modality == "rna" else _peaks(path, var, notes)
    _check_intervals(path, modality, features, sizes, build)
    return Counts(path, modality, rows, place, obs, features, columns, build, sizes, notes)


def _open(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found.\n  Check the path, and that it is a file.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file ({Path(path).stat().st_size:,} bytes).\n"
                         "  Effendi reads .h5ad, .h5mu and 10x .h5; write it as one of them, or download it again.")
    with _reading(path):
        return h5py.File(path, "r")


@contextlib.contextmanager
def _reading(path):
    """Turn what a damaged file makes HDF5 and anndata raise into a message."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, KeyError, RuntimeError, AttributeError, TypeError) as err:
        raise ValueError(f"{path} cannot be read: {str(err).splitlines()[0]}\n"
                         "  The file is truncated or damaged; copy it again, and compare its size.") from err
    except ValueError as err:
        if str(path) in str(err):
            raise
        raise ValueError(f"{path}: {err}") from err


def _anndata(path, modality, group):
    """Rows, place, obs, var and uns of an AnnData group; the first place with counts is taken."""
    from anndata.io import read_elem

    layers = group.get("layers", {})
    others = [k for k in layers if "counts" in k.lower() and k != "counts"]
    places = {"X": ("X", "var")}
    if "counts" in layers:
        places["layers['counts']"] = ("layers/counts", "var")
    if "raw" in group:
        places["raw"] = ("raw/X", "raw/var")
    if len(others) == 1:
        places[f"layers['{others[0]}']"] = (f"layers/{others[0]}", "var")
    obs, tried = _frame(read_elem(group["obs"])), []
    n_obs = len(obs)
    for place, (where, var_key) in places.items():
        if where not in group:
            continue
        var = _frame(read_elem(group[var_key]))
        rows = _matrix(path, group[where])
        if rows.shape != (n_obs, len(var)):
            raise ValueError(f"{path}: {place} is {rows.shape}, but {n_obs} cells and {len(var)} features are named.\n"
                             "  Write it again from its source.")
        problem = values_problem(rows.probe()) if min(rows.shape) else ""
        if not problem:
            uns = group.get("uns", {})
            return rows, place, obs, var, {k: read_elem(uns[k]) for k in ("genome", "chrom_sizes") if k in uns}
        tried.append(f"{place} has {problem}")
    raise ValueError(f"{path}: no raw counts: {'; '.join(tried) or 'neither X, layers nor raw'}.\n"
                     f"  {FLAG[modality]} needs non-negative integers in X, layers['counts'] or raw.")


def _frame(table):
    if not isinstance(table, pd.DataFrame):
        raise ValueError("obs or var is not a table; write the file again with a current anndata")
    table.index = table.index.astype(str)
    return table


def _matrix(path, node):
    """_Rows of an AnnData matrix, old or new encoding."""
    if isinstance(node, h5py.Dataset):
        if node.ndim != 2:
            raise ValueError(f"{path}: {node.name} is not a matrix (shape {node.shape}).\n  Write it again.")
        return _Rows(node, "dense", node.shape)
    kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))
    kind = str(kind.decode() if isinstance(kind, bytes) else kind)[:3]
    if kind not in ("csr", "csc"):
        raise ValueError(f"{path}: {node.name} is of kind '{kind}'; Effendi reads csr, csc and dense matrices.\n"
                         "  Write it again with anndata.")
    return _Rows(node, kind, node.attrs["shape"] if "shape" in node.attrs else node.attrs["h5sparse_shape"])


def _tenx(path, modality, group):
    """The same of a 10x group: features x cells by columns, which is cells x features by rows."""
    features = group["features"]
    var = {key: features[key].asstr()[:] for key in ("id", "name", "feature_type", "interval", "genome")
           if key in features}
    var = pd.DataFrame({"gene_id": var["id"], "feature_types": var["feature_type"],
                        **{k: var[k] for k in ("interval", "genome") if k in var}}, index=var["name"])
    obs = pd.DataFrame(index=group["barcodes"].asstr()[:])
    rows = _Rows(group, "csr", group["shape"][:][::-1])
    problem = values_problem(rows.probe())
    if problem:
        raise ValueError(f"{path}: matrix has {problem}.\n  {FLAG[modality]} needs raw counts: non-negative integers.")
    return rows, "matrix", obs, var, {}


def _columns_of(path, modality, var):
    """Columns of the modality where the file says which feature is which; None = all of them."""
    types = var["feature_types"].astype(str) if "feature_types" in var else pd.Series(dtype=str)
    mine = types.str.lower().isin(TYPES[modality]).to_numpy()
    if not types.str.lower().isin(TYPES["rna"] + TYPES["atac"]).any() or mine.all():
        return None
    if not mine.any():
        raise ValueError(f"{path} has no {WHAT[modality].split()[-1]}, only features of type "
                         f"{', '.join(types.unique()[:5])}.\n  {FLAG[modality]} needs {WHAT[modality]}, and --multiome "
                         "a file with both. Are --rna and --atac swapped?")
    return np.flatnonzero(mine)


def _refuse_duplicates(path, what, index, fix):
    repeated = index[index.duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{path}: {len(repeated):,} duplicate {what} (first: {', '.join(map(str, repeated[:3]))}).\n"
                         f"  Names must be unique: {fix}.")


# --- genes and peaks ----------------------------------------------------------------------------------------

def chromosome(names):
    """chr1 for 1, chrM for MT; other names unchanged. A Series in, a Series out."""
    names = names.astype("string")
    bare = names.str.fullmatch(r"\d{1,2}|[XYMW]|MT|Z").fillna(False).astype(bool)
    return names.mask(bare, "chr" + names).replace("chrMT", "chrM").astype(object)


def parse_peaks(names):
    """Table chrom, start, end of peak names in any notation; NaN where a name cannot be read.

    chr1:100-600   chr1-100-600   chr1_100_600   1:100-600
    """
    parts = pd.Series(names, dtype=str).str.extract(r"^(.+?)[:_-](-?\d+)[_-](-?\d+)$")
    return pd.DataFrame({"chrom": chromosome(parts[0]).to_numpy(), "start": pd.to_numeric(parts[1]).to_numpy(),
                         "end": pd.to_numeric(parts[2]).to_numpy()}, index=pd.Index(names))


def _column(var, *names):
    lower = {str(c).lower(): c for c in var.columns}
    return next((var[lower[n]] for n in names if n in lower), None)


def _positions(var):
    """chrom, start, end from columns or 10x intervals, or None."""
    chrom = _column(var, "chrom", "chromosome", "chr", "seqname", "seqnames")
    chrom = None if chrom is None else chrom.astype(object).where(~chrom.isin(["", ".", "NA", "nan", "None"]))
    start, end = _column(var, "start", "chromstart"), _column(var, "end", "chromend", "stop")
    if chrom is not None and start is not None and end is not None:
        table = pd.DataFrame({"chrom": chromosome(chrom), "start": pd.to_numeric(start, errors="coerce"),
                              "end": pd.to_numeric(end, errors="coerce")}, index=var.index)
        known = table.notna().all(axis=1)
        table.loc[~known, ["start", "end"]] = np.nan
        table["chrom"] = table["chrom"].where(known)
        return table
    if "interval" in var:
        table = parse_peaks(var["interval"].to_numpy(str))
        return table.set_axis(var.index)
    return None


def _looks_like_peaks(names):
    return parse_peaks(names[:1000])["start"].notna().mean() > 0.5


def _genes(path, var, gtf, notes):
    """Gene table of a var table: symbols as index, identifiers, positions."""
    if _looks_like_peaks(var.index):
        raise ValueError(f"{path}: names such as {var.index[0]} are peaks, but this file was given as {FLAG['rna']} "
                         f"({WHAT['rna']}).\n  Are --rna and --atac swapped?")
    index = var.index.to_series()
    symbols = _column(var, "gene_name", "gene_symbol", "symbol", "feature_name")
    is_ensembl = index.str.match(ENSEMBL).mean() > 0.5
    if is_ensembl and symbols is not None:
        symbols = symbols.astype(object)
        unnamed = symbols.isna() | (symbols.astype(str).str.strip() == "")
        notes.append(f"{Path(path).name}: gene symbols from column '{symbols.name}'"
                     + (f"; {unnamed.sum():,} without one keep their identifier" if unnamed.any() else ""))
        symbols = symbols.mask(unnamed, index).astype(str)
    else:
        symbols = index
    ids = index if is_ensembl else _column(var, "gene_id", "gene_ids", "ensembl_id")
    genes = pd.DataFrame({"gene_id": "" if ids is None else ids.astype(str).to_numpy()}, index=symbols.to_numpy(str))
    genes.index = _unique_symbols(path, genes, notes)
    where = gtf_positions(gtf, genes) if gtf else _positions(var)
    for key in ("chrom", "start", "end"):
        genes[key] = np.nan if where is None else where[key].to_numpy()
    strand = where["strand"] if gtf else _column(var, "strand")
    genes["strand"] = np.nan if strand is None else pd.Series(strand).astype(str).replace(
        {"1": "+", "-1": "-", "1.0": "+", "-1.0": "-"}).where(lambda s: s.isin(["+", "-"])).to_numpy()
    genes[["chrom", "strand"]] = genes[["chrom", "strand"]].astype(object)
    return genes


def _unique_symbols(path, genes, notes):
    """Symbols; where several identifiers share one, all but the smallest carry theirs: SYMBOL_ENSG..."""
    names = genes.index.to_series().reset_index(drop=True)
    ids = genes["gene_id"].reset_index(drop=True)
    shared = names.duplicated(keep=False)
    if not shared.any():
        return genes.index
    if ids[shared].eq("").any() or ids[shared].duplicated().any():
        _refuse_duplicates(path, "gene names", genes.index, "tell them apart by a column gene_id, or merge them")
    keep = ids.groupby(names).transform("min") == ids
    notes.append(f"{Path(path).name}: {(~keep).sum()} genes share the symbol of another and are called "
                 f"SYMBOL_identifier (first: {names[~keep].iloc[0]})")
    renamed = pd.Index(names.where(keep, names + "_" + ids))
    _refuse_duplicates(path, "gene names", renamed, "rename them")
    return renamed


def gtf_positions(path, genes):
    """chrom, start, end, strand of every gene from the 'gene' lines of a GTF (plain or .gz).

    A gene is found by its identifier without version, else by its symbol (the first line that has it).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found.\n  Check --gtf.")
    with open(path, "rb") as f:
        opener = gzip.open if f.read(2) == b"\x1f\x8b" else open
    wanted_ids = set(genes["gene_id"].str.split(".").str[0]) - {""}
    wanted = {"gene_id": wanted_ids, "gene_name": set(genes.index)}
    found, lines = {"gene_id": {}, "gene_name": {}}, 0
    try:
        with opener(path, "rt") as f:
            for line in f:
                part = line.split("\t")
                if len(part) < 9 or part[2] != "gene":
                    continue
                lines += 1
                place = (part[0], int(part[3]) - 1, int(part[4]), part[6])      # GTF is 1-based, end included
                for key, value in re.findall(r'(gene_id|gene_name) "([^"]+)"', part[8]):
                    value = value.split(".")[0] if key == "gene_id" else value
                    if value in wanted[key]:
                        found[key].setdefault(value, place)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, ValueError) as err:
        raise ValueError(f"{path} cannot be read as GTF: {err}.\n  Give an Ensembl, GENCODE or 10x genes.gtf.") from err
    if lines == 0:
        raise ValueError(f"{path} has no 'gene' lines.\n  Give an Ensembl, GENCODE or 10x genes.gtf.")
    ids = genes["gene_id"].str.split(".").str[0]
    rows = [found["gene_id"].get(i) or found["gene_name"].get(s, (np.nan,) * 4) for i, s in zip(ids, genes.index)]
    table = pd.DataFrame(rows, columns=["chrom", "start", "end", "strand"], index=genes.index)
    table["chrom"] = chromosome(table["chrom"])
    return table


def _peaks(path, var, notes):
    """Peak table of a var table: chrom, start, end; index chrom:start-end."""
    named, columns = parse_peaks(var.index), _positions(var)
    unread = named["start"].isna()
    if not unread.any():
        peaks = named
    elif columns is not None and columns.notna().all().all() and \
            (columns["end"] - columns["start"]).median() <= MAX_PEAK_WIDTH:
        peaks = columns
    else:
        genes = unread.mean() > 0.5
        first = var.index[unread.to_numpy().argmax()]
        raise ValueError(f"{path}: {unread.sum():,} of {len(var):,} names such as {first} are no peaks, "
                         f"but this file was given as {FLAG['atac']} ({WHAT['atac']}).\n"
                         + ("  Are --rna and --atac swapped? " if genes else "  ")
                         + "Peaks are called chr1:100-600, or have columns chrom, start, end.")
    peaks = peaks.astype({"start": np.int64, "end": np.int64})
    chrom, start, end = (peaks[key].astype(str) for key in ("chrom", "start", "end"))
    peaks.index = pd.Index(chrom + ":" + start + "-" + end)
    renamed = (peaks.index != var.index).sum()
    if renamed:
        notes.append(f"{Path(path).name}: {renamed:,} peaks are called differently here "
                     f"({var.index[0]} is {peaks.index[0]})")
    _refuse_duplicates(path, "peaks", peaks.index, "merge them, adding up their counts")
    return peaks


def _genome(uns, var):
    """Build label and chromosome ends, as far as the file tells."""
    label = uns.get("genome", var["genome"].iloc[0] if "genome" in var and len(var) else "")
    label = str(label.decode() if isinstance(label, bytes) else label)
    build = next((name for key, name in BUILDS.items() if key in label.lower()), None)
    sizes = {str(k): int(v) for k, v in dict(uns.get("chrom_sizes", {})).items()}
    return build, sizes or CHROM_SIZES.get(build, {})


def genome_sizes(fasta):
    """{chromosome: bp} from the .fai beside a FASTA, or {}."""
    index = Path(str(fasta) + ".fai")
    if not index.is_file():
        return {}
    lines = [line.split("\t") for line in index.read_text().splitlines()]
    return {str(chromosome(pd.Series([p[0]]))[0]): int(p[1]) for p in lines}


def _check_intervals(path, modality, features, sizes, build):
    """Intervals must be non-empty, start at 0 or later and end within their chromosome."""
    source = f"of {build}" if build else "that the file states"
    if modality == "atac" and config.GENOME_FILE:
        sizes, source = genome_sizes(config.GENOME_FILE) or sizes, f"in {config.GENOME_FILE}"
    known = features[features["start"].notna()]
    end = known["chrom"].map(sizes).astype(float)
    for wrong, why in ((known["start"] < 0, "start below 0"),
                       (known["end"] <= known["start"], "end at or before their start"),
                       (known["end"] > end, f"reach past the end {source} of their chromosome")):
        if wrong.any():
            name, first = known.index[wrong][0], known[wrong].iloc[0]
            where = f" at {first.chrom}:{first.start:.0f}-{first.end:.0f}" if modality == "rna" else ""
            limit = sizes.get(first.chrom, np.inf)
            where += f"; {first.chrom} ends at {limit}" if first.end > limit else ""
            raise ValueError(f"{path}: {wrong.sum():,} {WHAT[modality].split()[-1]} {why} (first: {name}{where}).\n"
                             "  Positions are 0-based, half-open; is this another genome build?")


def selection(have, want):
    """csr (have, want) that puts columns named `have` in the order `want`, and the wanted names that are missing.

    block @ selection has a zero column where a name is missing.
    """
    at = pd.Index(have).get_indexer(want)
    found = at >= 0
    ones = np.ones(found.sum(), np.float32)
    return (sp.csr_matrix((ones, (at[found], np.flatnonzero(found))), (len(have), len(want))),
            [name for name, there in zip(want, found) if not there])


# --- two modalities -----------------------------------------------------------------------------------------

def batch_shares(totals, least=20):
    """Share (B, F) of the counts of every gene or peak that each batch keeps, so that all have the same mean.

        f_bg = log(n_bg / sum_g n_bg) - its mean over batches       n (B, F) counts of the batch
        keep_bg = exp(min_b f'_bg - f'_bg),   f' = f v / (v + e),   e_bg = (1 - 2 / B) / n_bg + mean_b(1 / n_bg) / B
    e is the variance that counting alone gives f, v that of the true folds: the mean of f^2 - e over features with at
    least `least` counts in every batch, since e holds for those only. A feature with few counts is left nearly as it
    is, and all are where no feature has enough. Batches are taken to hold the same mixture of cells.
    Ref     Haghverdi et al. 2018, Nat Biotechnol 36:421 (batchelor); its rescaleBatches scales down to the same level
    """
    n = np.asarray(totals, np.float64) + 0.5
    fold = np.log(n / n.sum(1, keepdims=True))
    fold -= fold.mean(0)
    noise = (1 - 2 / len(n)) / n + (1 / n).mean(0) / len(n)
    deep = n.min(0) >= least
    variance = max(np.mean((fold**2 - noise)[:, deep]), 0.0) if deep.any() else 0.0
    fold *= variance / (variance + noise)
    return np.exp(fold.min(0) - fold).astype(np.float32)


def thin(block, keep, batch, names):
    """Binomial draw from the counts of a csr (b, F), in place: Poisson counts stay Poisson.

    keep (B, F) the share that each batch keeps, batch (b,) which one a cell belongs to, names (b,) of the cells. What a
    cell keeps depends on its name alone: every pass over a file, whatever its blocks, sees the same counts.
    """
    block.sort_indices()
    for i, name in enumerate(names):
        at = slice(block.indptr[i], block.indptr[i + 1])
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        block.data[at] = rng.binomial(block.data[at].astype(np.int64), keep[batch[i], block.indices[at]])
    block.eliminate_zeros()
    return block


def pair(rna_obs, atac_obs, say=print):
    """Rows (n,) of RNA and (n,) of ATAC that are the same cell: same barcode, both from the paired files.

    In the order of the RNA rows. ValueError when fewer than MIN_PAIRED_CELLS pair.
    """
    rna = rna_obs.index.where(rna_obs["source"] == "paired", "")
    atac = atac_obs.index.where(atac_obs["source"] == "paired", "")
    row_of = pd.Series(np.arange(len(atac)), index=atac).drop("", errors="ignore")
    rows_rna = np.flatnonzero(rna.isin(row_of.index) & (rna != ""))
    rows_atac = row_of.loc[rna[rows_rna]].to_numpy()
    alone = {"RNA": rna[(rna != "") & ~rna.isin(atac)], "ATAC": atac[(atac != "") & ~atac.isin(rna)]}
    lost = "; ".join(f"{len(names):,} in {kind} only (first: {names[0]})"
                     for kind, names in alone.items() if len(names))
    if len(rows_rna) < config.MIN_PAIRED_CELLS:
        raise ValueError(f"only {len(rows_rna)} cells are in both files, MIN_PAIRED_CELLS={config.MIN_PAIRED_CELLS}: "
                         f"{lost or 'each file is that small'}.\n  Cells are paired by their names. Make the barcodes "
                         "alike (suffix -1? sample prefix?), or check that both files are of one experiment.")
    say(f"{len(rows_rna):,} cells paired by barcode" + (f"; {lost}" if lost else ""))
    return rows_rna, rows_atac


def check_builds(path, build, other_path, other_build):
    """ValueError where two files state different genome builds."""
    if build and other_build and build != other_build:
        raise ValueError(f"{path} is of genome build {build}, {other_path} of {other_build}.\n"
                         "  Lift one over to the other; positions on two builds do not match.")


def check_genome(genes, peaks, window, what):
    """ValueError where the genes and peaks of `what` cannot be of one genome build."""
    known = genes[genes["start"].notna()]
    if len(known) == 0:
        raise ValueError(f"{what}: none of {len(genes):,} genes has a position, which their accessibility needs.\n"
                         "  Give --gtf FILE (of the peaks' genome build), or columns chrom, start, end, strand.")
    common = set(known["chrom"]) & set(peaks["chrom"])
    if not common:
        raise ValueError(f"{what} share no chromosome: genes on {', '.join(sorted(set(known['chrom']))[:3])}, peaks on "
                         f"{', '.join(sorted(set(peaks['chrom']))[:3])}.\n  Is one of them of another genome?")
    if gene_peak_weights(peaks, known, window, np.inf).nnz == 0:
        raise ValueError(f"{what}: no gene has a peak within {window:,} bp.\n"
                         "  Is one of them of another genome build?")


def regions(genes, promoter=2_000):
    """Gene body joined with +-promoter bp around the TSS, (G,) starts and (G,) ends.

    Without a strand either end may be the TSS, and both get the promoter.
    """
    start, end = genes["start"].to_numpy(float), genes["end"].to_numpy(float)
    plus, minus = (genes["strand"] != "-").to_numpy(), (genes["strand"] != "+").to_numpy()
    low = np.where(plus, start - promoter, np.minimum(start, end - promoter))
    high = np.where(minus, end + promoter, np.maximum(end, start + promoter))
    return low, high


def gene_peak_weights(peaks, genes, window, decay):
    """How much each peak counts for each gene, csr (P, G).

        w[p, g] = 1                   if p overlaps the body of g or +-2 kb around its TSS
                  exp(-d / decay)     if it lies d bp outside, d <= window and w >= MIN_WEIGHT
                  0                   otherwise, for a gene without a position, and where p is nearer to another of
                                      these genes

    The accessibility of the genes in counts C (cells, P) is then C w: whole counts from a gene's own peaks plus
    fractions from distal ones. Where genes lie close, a window of many kb holds more of its neighbours' peaks than of
    its own. A peak at the same distance of several genes, such as inside of all of them, counts for each.
    Ref     McLean et al. 2010, GREAT (regulatory domains that end at the neighbours); Granja et al. 2021, ArchR
    """
    low, high = regions(genes)
    row, col, weight = [], [], []
    for chrom, members in genes.assign(_at=np.arange(len(genes))).groupby("chrom")["_at"]:
        on = np.flatnonzero((peaks["chrom"] == chrom).to_numpy())
        on = on[np.argsort(peaks["start"].to_numpy()[on], kind="stable")]
        if len(on) == 0:
            continue
        start, end = peaks["start"].to_numpy()[on], peaks["end"].to_numpy()[on]
        widest = (end - start).max()
        for g in members:
            near = slice(*np.searchsorted(start, [low[g] - window - widest, high[g] + window + 1]))
            distance = np.maximum(0, np.maximum(low[g] - end[near], start[near] - high[g]))
            w = np.exp(-distance / decay)
            use = (distance <= window) & (w >= MIN_WEIGHT)
            row.append(on[near][use])
            col.append(np.full(use.sum(), g))
            weight.append(w[use])
    if not row:
        return sp.csr_matrix((len(peaks), len(genes)), dtype=np.float32)
    row, col, weight = (np.concatenate(part) for part in (row, col, weight))
    largest = np.zeros(len(peaks))
    np.maximum.at(largest, row, weight)
    nearest = weight == largest[row]                        # weights fall with distance, unless decay is inf
    parts = weight[nearest].astype(np.float32), (row[nearest], col[nearest])
    return sp.csr_matrix(parts, shape=(len(peaks), len(genes)))


def peaks_of_genes(weights, totals, most):
    """The `most` peaks that contribute most to the accessibility of each gene, and all its others as one.

    weights (P, G) as gene_peak_weights gives them, totals (P,) counts of the peaks
    -> csr (P, C) that turns counts into contributions, gene (C,) and peak (C,), -1 where several are taken together;
    genes in order, a gene's strongest peak first. The contributions of a gene's peaks add up to its accessibility.
    """
    entries = weights.tocoo()
    found = np.asarray(totals)[entries.row] > 0
    peak, gene, weight = entries.row[found], entries.col[found], entries.data[found]
    order = np.lexsort((peak, -weight * np.asarray(totals)[peak], gene))
    peak, gene, weight = peak[order], gene[order], weight[order]
    rank = pd.Series(gene).groupby(gene).cumcount().to_numpy()
    number = np.cumsum(rank <= most) - 1                    # of the column
    columns = int(number[-1]) + 1 if len(number) else 0
    alone = np.bincount(number, minlength=columns) == 1
    starts = np.flatnonzero(rank <= most)
    return (sp.csr_matrix((weight, (peak, number)), (len(totals), columns)), gene[starts],
            np.where(alone, peak[starts], -1))


def promoter_share(peaks, genes, shift=0):
    """Share of genes (with a position) that have a peak within 2 kb of their TSS moved by shift bp."""
    known = genes[genes["start"].notna()]
    tss = np.where(known["strand"] == "-", known["end"], known["start"]) + shift
    points = known.assign(start=tss, end=tss + 1)
    return float((np.diff(gene_peak_weights(peaks, points, 0, np.inf).tocsc().indptr) > 0).mean())
