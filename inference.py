"""A trained model on new cells: delays and expression without retraining, and the flow run backward.

    z_A = AlignMLP(encode(ATAC))        with the encoder that is stored in effendi.pt
    tau, y_hat                          as in training, for the training genes or for given gene embeddings
    reverse_ode:   z_A ~ phi_(-tau_bar)(z_R)                            both for OBJECTIVE specification only
    scRNA_to_tau:  RNA alone -> z_A by the reversed flow -> tau

New genes (--new-genes) are embedded by the encoder that is stored with the model: a gene's embedding is how it
follows the components of the stored PCAs in the new cells, so that old and new genes share one space.

Reads   effendi.pt, new cells (.h5ad, 10x .h5, .h5mu)
Writes  inference.h5ad (X the RNA counts if given; obsm z_atac, z_A, phi_tau_z_A; layers tau, y_hat),
        inference_tau.csv (one row per gene: tau; tau_low, tau_high; cell_sd; identifiable; trained; with RNA: spearman
        of y_hat and counts). Interval and identifiable of a trained gene are those of training; a new gene's interval
        is that of its posterior, without refits, and whether it is identifiable is not judged; without accessibility
        it gets what its embedding says, and no interval.
Run     python inference.py --model effendi_output/effendi.pt --atac new_atac.h5ad --rna new_rna.h5ad --out new_output
"""
import functools
import time

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

import anchored
import artifacts
import config
import effendi_loader as loader
import embed_cells
import linear_encoder
from chromatin import Peaks
from effendi import AnchoredEffendi, Effendi, add_genes

MODELS = {"specification": Effendi, "anchored": AnchoredEffendi}
ARGUMENTS = {
    "--model": dict(required=True, metavar="PT", help="effendi.pt of a finished run"),
    "--atac": dict(dest="ATAC_FILE", metavar="H5AD", help="cells x peaks, counts"),
    "--rna": dict(dest="RNA_FILE", metavar="H5AD", help="cells x genes, raw counts (optional; adds new genes)"),
    "--multiome": dict(dest="MULTIOME_FILE", metavar="FILE", help="10x .h5 or .h5mu instead of the two"),
    "--gtf": dict(dest="GTF_FILE", metavar="GTF", help="gene positions, if the files hold none"),
    "--new-genes": dict(action="store_true", help="also genes of the RNA file that the model was not trained on"),
}


def load_effendi(file):
    """(model in eval mode, everything else in effendi.pt) ; ValueError for a file of another kind."""
    saved = artifacts.read_weights(file)
    needed = {"objective", "args", "state_dict", "genes", "gene_emb", "atac_encoder", "judged", "meaning",
              "gene_window", "peaks_per_gene", "positions"}
    if not isinstance(saved, dict) or not needed <= set(saved):
        raise ValueError(f"{file} is a .pt file, but not an effendi.pt of this version: it lacks "
                         f"{', '.join(sorted(needed - set(saved)))}.\n  Give the effendi.pt that train_delay.py wrote.")
    model = MODELS[saved["objective"]](**saved["args"])
    try:
        model.load_state_dict(saved["state_dict"])
    except RuntimeError as err:
        raise ValueError(f"{file} holds weights of another architecture: {str(err).splitlines()[-1].strip()}\n"
                         "  It was written by another version of Effendi; train it again.") from err
    return model.eval(), saved


@torch.no_grad()
def predict(model, z_atac, gene_emb, device, batch=128):
    """All cells, batch by batch: {"z_A", "z_integrated" (N, D), "tau", "y_hat" (N, G)} as numpy arrays."""
    gene_emb = torch.as_tensor(gene_emb).to(device)
    model.to(device)
    parts = {"z_A": [], "z_integrated": [], "tau": [], "y_hat": []}
    for start in tqdm(range(0, len(z_atac), batch), desc="predict", unit="batch", leave=False, disable=None):
        out = model(torch.from_numpy(z_atac[start:start + batch]).to(device), gene_emb)
        for name, kept in parts.items():
            kept.append(out[name].cpu().numpy())
    return {name: np.concatenate(kept) for name, kept in parts.items()}


@torch.no_grad()
def reverse_ode(model, z_R, tau_bar, n_steps=200, explode_norm=50.0):
    """RNA states (B, D) carried back to the ATAC states they came from: (z_A (B, D), exploded (B,) bool).

    A state whose norm grows by more than explode_norm, or is not finite, has exploded.
    """
    z_A = model.field.flow(z_R, -tau_bar, n_steps)
    growth = z_A.norm(dim=1) / z_R.norm(dim=1).clamp_min(1e-6)
    return z_A, ~(torch.isfinite(z_A).all(dim=1) & (growth <= explode_norm))


@torch.no_grad()
def scRNA_to_tau(model, z_R, gene_emb, n_steps=200, explode_norm=50.0):
    """Delays (B, G) of cells of which only RNA is known, and which of them exploded on the way back.

    For models trained under OBJECTIVE specification, whose flow ends in the space of z_R.
    """
    if isinstance(model, AnchoredEffendi):
        raise ValueError("scRNA_to_tau: the anchored model's flow stays in the latent of chromatin, not of z_R.\n"
                         "  Give ATAC (inference.py), or a model trained with OBJECTIVE=specification.")
    tau_bar = model.tau_predictor(None, gene_emb).median()
    z_A, exploded = reverse_ode(model, z_R, tau_bar, n_steps, explode_norm)
    return model.tau_predictor(z_A, gene_emb), exploded


def gene_spearman(y_hat, counts, depth):
    """Spearman correlation of predicted and measured expression over cells, per gene (G,); nan if constant."""
    observed = counts.toarray() / np.maximum(depth, 1)[:, None]
    rho = np.full(counts.shape[1], np.nan)
    for g in np.flatnonzero((observed.std(0) > 0) & (y_hat.std(0) > 0)):
        rho[g] = spearmanr(y_hat[:, g], observed[:, g]).statistic
    return rho


# --- new cells ----------------------------------------------------------------------------------------------

def depth_of(counts):
    """Counts of each cell over all features of its file, (N,)."""
    return np.concatenate([np.asarray(block.sum(1)).ravel() for _, block in counts.blocks()])


def gather(counts, weights):
    """counts @ weights, (N, columns) CSR, block by block."""
    return sp.vstack([block @ weights for _, block in counts.blocks()]).tocsr()


class NewData:
    """A new data set seen by a stored model: embeddings, and counts and accessibility of the genes asked for.

    cells, z_atac (N, 256); with RNA only: rna, rows of the paired cells in each file, depth (N,)
    """

    def __init__(self, saved, atac, rna=None):
        self.saved, self.atac, self.rna = saved, atac, rna
        self.z_atac = embed_cells.transform_atac(atac, saved["atac_encoder"])
        self.cells = pd.Index(atac.names)
        if rna is not None:
            frames = [pd.DataFrame({"source": "paired"}, index=names) for names in (rna.names, atac.names)]
            self.rows_rna, self.rows_atac = loader.pair(*frames)
            self.depth = depth_of(rna)[self.rows_rna].astype(np.float32)
            self.z_atac, self.cells = self.z_atac[self.rows_atac], self.cells[self.rows_atac]

    @functools.cached_property
    def atac_depth(self):
        """ATAC counts of the paired cells (N,); only new genes need them, so known genes do not pay for the pass."""
        return depth_of(self.atac)[self.rows_atac]

    def counts(self, genes):
        """RNA counts of the paired cells (N, G); zero columns for genes the file lacks."""
        return gather(self.rna, loader.selection(self.rna.features.index, genes)[0])[self.rows_rna]

    def accessibility(self, genes):
        """Accessibility (N, G) of genes of the RNA file in the paired cells, as in training."""
        return gather(self.atac, self.peak_weights(genes))[self.rows_atac]

    def peaks(self, genes):
        """Their peaks in the paired cells, as in training, chromatin.Peaks; None if training weighed none."""
        most = self.saved["peaks_per_gene"]
        if most == 0:
            return None
        weights = self.peak_weights(genes)
        totals = sum(np.asarray(block.sum(0)).ravel() for _, block in self.atac.blocks())
        columns, gene, _ = loader.peaks_of_genes(weights, totals, most)
        return Peaks(gather(self.atac, columns)[self.rows_atac], gene)

    def peak_weights(self, genes):
        """gene_peak_weights (P, G): of genes of the training as there, of new ones beside all these and each other."""
        trained, weights = self.trained
        new = self.rna.features.loc[[g for g in genes if g not in trained.index], trained.columns]
        beside = pd.concat([trained, new])
        if len(new):
            among = loader.gene_peak_weights(self.atac.features, beside, *self.saved["gene_window"]).tocsc()
            weights = sp.hstack([weights, among[:, len(trained):]], "csc")
        return weights[:, beside.index.get_indexer(genes)].tocsr()

    @functools.cached_property
    def trained(self):
        """Positions of all genes of the training, and their gene_peak_weights on the new peaks."""
        table = pd.DataFrame(self.saved["positions"]).set_index("gene")
        return table, loader.gene_peak_weights(self.atac.features, table, *self.saved["gene_window"]).tocsc()


def new_genes(data):
    """Genes of the new RNA file, with a position and seen in MIN_GENE_CELLS cells, that the model does not know."""
    features = data.rna.features
    unknown = features.index[~features.index.isin(data.saved["genes"]) & features["start"].notna()]
    seen = np.asarray((data.counts(unknown) > 0).sum(0)).ravel() >= config.MIN_GENE_CELLS
    return list(unknown[seen])


def embed_genes(data, genes):
    """(embeddings (G, D), names) of those genes outside training that can be embedded as the training genes were.

    PCA: how a gene follows the components of the two stored PCAs in the new cells. scGPT: its entry in the vocabulary.
    """
    rna, access = data.saved["rna_encoder"], data.saved.get("gene_encoder")
    if rna["encoder"] == "scgpt":
        import scgpt_encoder
        emb, matched, missing = scgpt_encoder.gene_embeddings(genes, config.SCGPT_MODEL_DIR)
        if missing:
            print(f"{len(missing):,} of {len(genes):,} new genes are not in the scGPT vocabulary and are left out")
        return emb, matched
    half = data.saved["args"]["dim"] // 2
    scores = linear_encoder.pca_transform(data.counts(rna["genes"]), data.depth, rna)
    first = linear_encoder.pca_gene_loadings(lambda: [(data.counts(genes), data.depth)], scores, rna)
    known = [g for g in access["genes"] if g in data.rna.features.index]
    select, missing = loader.selection(known, access["genes"])
    if len(missing) > (1 - embed_cells.MIN_SHARED) * len(access["genes"]):
        raise ValueError(f"{data.rna.path} lacks {len(missing):,} of the {len(access['genes']):,} training genes, "
                         "relative to which new genes are embedded.\n  Run without --new-genes.")
    depth = data.atac_depth
    scores = linear_encoder.pca_transform((data.accessibility(known) @ select).tocsr(), depth, access)
    second = linear_encoder.pca_gene_loadings(lambda: [(data.accessibility(genes), depth)], scores, access)
    return np.sqrt(half) * np.hstack([linear_encoder.pad(part, half) for part in (first, second)]), genes


# --- results --------------------------------------------------------------------------------------------------

def results(model, data, extra, device):
    """(table, model output, genes) for the training genes and, after them, the extra ones."""
    saved = data.saved
    gene_emb, bounds = saved["gene_emb"], None
    if extra:
        new_emb, extra = embed_genes(data, extra)
        new_emb = torch.from_numpy(new_emb.astype(np.float32))
        if saved["objective"] == "anchored":
            known = [g for g in saved["genes"] if g in data.rna.features.index]
            both, at = [*known, *extra], pd.Index(saved["genes"]).get_indexer(known)
            cells = (part.toarray() for part in (data.accessibility(both), data.counts(both)))
            tensors = (torch.as_tensor(a, dtype=torch.float32) for a in (*cells, gene_emb, new_emb))
            model, *found = add_genes(model, torch.as_tensor(data.z_atac), torch.as_tensor(at), *tensors,
                                      data.peaks(both), config.MIN_ACCESS)
            guessed = int(found[1].isnan().all(0).sum())
            if guessed:
                print(f"{guessed:,} of {len(extra):,} new genes have fewer than MIN_ACCESS={config.MIN_ACCESS} "
                      "accessible counts, or known genes too few to place cells by: their tau is what embeddings say")
            bounds = torch.stack(anchored.intervals(*anchored.over_members(*found)), 1).exp().numpy()
        gene_emb = torch.cat([gene_emb, new_emb])
    genes = [*saved["genes"], *extra]
    out = predict(model, data.z_atac, gene_emb, device, config.BATCH_SIZE)
    judged = {name: value.numpy() for name, value in saved["judged"].items()}
    judged = pd.DataFrame(judged, index=saved["genes"]).astype({"identifiable": "boolean"}).reindex(genes)
    if bounds is not None and judged["tau_low"].notna().any():                  # none where the gate was closed
        judged.loc[extra, ["tau_low", "tau_high"]] = bounds
    table = pd.DataFrame(dict(
        tau=out["tau"].mean(0), tau_low=judged["tau_low"], tau_high=judged["tau_high"], cell_sd=out["tau"].std(0),
        identifiable=judged["identifiable"], trained=np.isin(genes, saved["genes"])),
        index=pd.Index(genes, name="gene"))
    if data.rna is not None:
        table["spearman"] = gene_spearman(out["y_hat"], data.counts(genes), data.depth)
    return table, out, genes


def write_h5ad(file, data, out, genes):
    import anndata
    shape = len(data.cells), len(genes)
    counts = data.counts(genes) if data.rna is not None else sp.csr_matrix(shape, dtype=np.float32)
    cells = anndata.AnnData(counts, obs=pd.DataFrame(index=data.cells), var=pd.DataFrame(index=genes))
    cells.obsm.update(z_atac=data.z_atac, z_A=out["z_A"], phi_tau_z_A=out["z_integrated"])
    cells.layers.update(tau=out["tau"], y_hat=out["y_hat"])
    cells.write_h5ad(file.name)


def main(argv=None):
    args = config.from_args(__doc__, argv, ARGUMENTS)
    start = time.time()
    if not (config.ATAC_FILE or config.MULTIOME_FILE):
        raise ValueError("no new cells: give --atac FILE (and --rna FILE), or --multiome FILE.")
    if args.new_genes and not (config.RNA_FILE or config.MULTIOME_FILE):
        raise ValueError("--new-genes needs the RNA of the new cells.\n  Add --rna FILE.")
    model, saved = load_effendi(args.model)
    device = config.pick_device()
    atac = loader.open_counts(config.ATAC_FILE or config.MULTIOME_FILE, "atac")
    rna_file = config.RNA_FILE or config.MULTIOME_FILE
    rna = loader.open_counts(rna_file, "rna", config.GTF_FILE) if rna_file else None
    data = NewData(saved, atac, rna)
    table, out, genes = results(model, data, new_genes(data) if args.new_genes else [], device)
    files = [config.ATAC_FILE, config.RNA_FILE, config.MULTIOME_FILE]
    facts = dict(stage="inference", model=artifacts.hash_file(args.model), inputs=files,
                 seconds=round(time.time() - start, 1))
    artifacts.save("inference.h5ad", lambda f: write_h5ad(f, data, out, genes), rows=len(data.cells), **facts)
    artifacts.save_table("inference_tau.csv", table, **facts)
    fit = f", median Spearman with RNA {table['spearman'].median():.2f}" if "spearman" in table else ""
    print(f"inference: {len(data.cells):,} cells, {len(genes):,} genes ({len(genes) - len(saved['genes']):,} new){fit} "
          f"-> {config.OUT_DIR}/inference_tau.csv, inference.h5ad")
    print(f"inference: of the training: {saved['meaning']}")


if __name__ == "__main__":
    config.script(main)
