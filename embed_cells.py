"""New cells through a stored encoder: the same embedding that Stage 0 gave the cells it was fitted on.

    transform_rna(counts, encoder)    pca, scgpt      ->  z_R    (N, 512)
    transform_atac(counts, encoder)   lsi, hyenadna   ->  z_ATAC (N, 256)

counts is an open file (effendi_loader.open_counts), encoder what rna_encoder.pt or atac_encoder.pt holds (also inside
effendi.pt). Genes and peaks are found by name. scGPT needs its weights again (SCGPT_MODEL_DIR), and they must be the
same ones. HyenaDNA does not: the embeddings of the peaks, and how a cell is made of them, are stored.

    cell c = (sum_p a_cp (E_p - common) / sum_p a_cp - mean) axes       a_cp = idf_p if peak p is open in c, else 0
"""
import numpy as np
import scipy.sparse as sp
from tqdm import tqdm

import config
import effendi_loader as loader
import linear_encoder
import scgpt_encoder

MIN_SHARED = 0.5            # share of an encoder's genes or peaks that a new file must have
FIX = {"genes": "Name the genes as the training data did: human symbols.",
       "peaks": "Count the fragments of the new cells on the peaks of the training data."}


def transform_rna(counts, encoder):
    return _transform(counts, encoder, "genes", config.DIM)


def transform_atac(counts, encoder):
    return _transform(counts, encoder, "peaks", config.HYENADNA_D_MODEL)


def _transform(counts, encoder, what, width):
    """Embeddings (N, width), float32, of all cells of the file, read in blocks."""
    wanted = encoder[what]
    pick, missing = loader.selection(counts.features.index, wanted)
    if missing:
        text = (f"{counts.path} lacks {len(missing):,} of the {len(wanted):,} {what} that the {encoder['encoder']} "
                f"encoder reads (first: {', '.join(missing[:3])})")
        if len(missing) > (1 - MIN_SHARED) * len(wanted):
            raise ValueError(f"{text}.\n  {FIX[what]}")
        print(text + "; they count as zero")
    transform, z = block_transform(encoder), np.empty((counts.n_cells, width), np.float32)
    with tqdm(total=counts.n_cells, unit="cell", desc=encoder["encoder"], leave=False, disable=None) as bar:
        for at, block in counts.blocks():
            depth = np.asarray(block.sum(axis=1)).ravel()
            z[at] = linear_encoder.pad(transform(sp.csr_matrix(block @ pick), counts.names[at], depth), width)
            bar.update(at.stop - at.start)
    return z


def block_transform(encoder):
    """The function (counts (b, F) csr, names (b,), depth (b,)) -> z (b, k) of an encoder; loads what it needs once.

    Columns are the encoder's genes or peaks in its order; depth counts all genes of a cell.
    """
    if encoder["encoder"] == "pca":
        return lambda counts, names, depth: linear_encoder.pca_transform(counts, depth, encoder)
    if encoder["encoder"] == "lsi":
        return lambda counts, names, depth: linear_encoder.lsi_transform(counts, encoder)
    if encoder["encoder"] == "scgpt":
        scgpt, tokens = open_scgpt(encoder), np.asarray(encoder["tokens"])
        return lambda counts, names, depth: scgpt.encode(counts, tokens, names)
    table = peak_table(encoder)
    mean, axes = np.asarray(encoder["mean"]), np.asarray(encoder["axes"])

    def from_peaks(counts, names, depth):
        z = (peak_means((counts > 0) @ table) - mean) @ axes
        return np.where(np.isnan(z), 0, z)              # no open peak: the mean cell
    return from_peaks


# --- scGPT ----------------------------------------------------------------------------------------------------

def open_scgpt(encoder):
    """The scGPT of a stored encoder, from SCGPT_MODEL_DIR; ValueError if the weights there are others."""
    device = config.DEVICE or scgpt_encoder.pick_device()
    scgpt = scgpt_encoder.Encoder(config.SCGPT_MODEL_DIR, int(encoder["max_seq_len"]), config.SCGPT_BATCH_SIZE, device,
                                  encoder["fast_transformer"], encoder["dtype"], int(encoder["seed"]))
    if scgpt.facts()["weights"] != encoder["weights"]:
        raise ValueError(f"{config.SCGPT_MODEL_DIR}/best_model.pt is not the scGPT with which the training cells were "
                         "embedded.\n  Set SCGPT_MODEL_DIR to the folder of that model.")
    return scgpt


# --- HyenaDNA: from peaks to cells ----------------------------------------------------------------------------

def fit_peak_means(blocks, peak_embeddings, names):
    """The encoder dictionary whose transform gives hyenadna_encoder.cell_embeddings(blocks, peak_embeddings).

    blocks  function that starts a pass over the cells: csr (b, P), ...; two passes
    """
    import hyenadna_encoder as hyenadna

    names = list(names)
    weights = hyenadna.inverse_frequency(blocks, len(names))
    common = np.average(peak_embeddings.astype(np.float64), axis=0, weights=weights)
    encoder = dict(encoder="hyenadna", peaks=names, peak_embeddings=peak_embeddings, weights=weights,
                   common=common)
    table = peak_table(encoder)
    half = np.random.default_rng(config.SEED).random(len(table)) < 0.5
    moments, total, n = np.zeros((2 * len(common) + 1,) * 2), np.zeros(len(common)), 0
    for block in blocks():
        is_open = sp.csc_matrix(block) > 0
        sums = [is_open[:, side] @ table[side] for side in (half, ~half)]                   # (b, D + 1) each
        one, two, both = (peak_means(s) for s in (*sums, sums[0] + sums[1]))
        rows = np.column_stack([np.ones(len(one)), one, two])
        rows = rows[np.isfinite(rows).all(axis=1)]
        moments += rows.T @ rows
        both = both[np.isfinite(both[:, 0])]
        total, n = total + both.sum(axis=0), n + len(both)
    return dict(encoder, mean=total / max(n, 1), axes=hyenadna.agreement_axes(moments))


def peak_table(encoder):
    """[weighted embedding without the common part, weight] of every peak, (P, D + 1) float64."""
    weights = np.asarray(encoder["weights"])
    centred = np.asarray(encoder["peak_embeddings"]) - np.asarray(encoder["common"])
    return np.column_stack([centred * weights[:, None], weights])


def peak_means(sums):
    """Weighted means (b, D) from sums of rows of peak_table; nan where no peak is open."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, :-1] / sums[:, -1:]
