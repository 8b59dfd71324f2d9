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
    return _peak_transform(encoder)


def _peak_transform(encoder):
    """block_transform of HyenaDNA. Spelled out, since hyenadna_encoder would load transformers, not needed here."""
    weights, common, mean, axes = (np.asarray(encoder[name]) for name in ("weights", "common", "mean", "axes"))
    table = np.column_stack([(np.asarray(encoder["peak_embeddings"]) - common) * weights[:, None], weights])

    def from_peaks(counts, names, depth):
        sums = (counts > 0) @ table                         # (b, D + 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            z = (sums[:, :-1] / sums[:, -1:] - mean) @ axes
        return np.where(np.isnan(z), 0, z)                  # no open peak: the mean cell
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

    return dict(encoder="hyenadna", peaks=list(names), peak_embeddings=peak_embeddings,
                **hyenadna.fit_peak_means(blocks, peak_embeddings))
