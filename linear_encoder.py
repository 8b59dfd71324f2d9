"""The embedded encoders: PCA of expression, LSI of accessibility, both fitted in a few passes over blocks.

    PCA   x = log(1 + T c / d),  z = s (x - mean) V              c counts of a cell, d its depth, T the median depth
    LSI   x = log(1 + 1e4 o_p / |o| * N / df_p),  z = x V / |x V|    o open (0/1) peaks of a cell, df_p cells open at p

V (features, k) are the leading eigenvectors of X^T X, X (cells, features) centred for PCA and not for LSI.
`leading_eigenvectors` finds them by block Lanczos: one product X^T (X Q) a pass, accumulated over blocks, so
memory is that of a block plus (features, passes * (k + 10)). It starts from random vectors over the features and
sees the cells only through X^T X: their order and the size of the blocks do not matter. The sign of every column
of V makes its largest entry positive.

Shapes  counts csr (b, features), depth (b,) -> z (b, k).  `pad` makes them (b, 512) or (b, 256) with zeros.
Units   PCA: s is one number that makes the mean squared norm of the fitted cells 1, so distances keep their
        proportions and z has the size of an L2-normalised scGPT embedding. LSI: every cell has norm 1.
        LSI components that follow depth (|correlation with log |o|| > 0.75) are left out.
Ref     Halko, Martinsson & Tropp 2011, Finding structure with randomness; Musco & Musco 2015, Randomized block
        Krylov methods; Cusanovich et al. 2015 (LSI); Stuart et al. 2021, Signac (this TF-IDF).

`blocks` is always a function that starts a new pass: fit_pca's yields (counts, depth), fit_lsi's counts.
Encoders are dictionaries of plain values and arrays; as tensors, from a .pt, they work the same.
"""
import hashlib

import numpy as np

DEPTH_CORRELATION = 0.75
SMALLEST = 1e-6             # singular values below this share of the first are numerical zero


def leading_eigenvectors(product, n, k, seed=0, passes=5, oversample=10):
    """The k largest eigenvalues and eigenvectors (n, k) of a symmetric positive semidefinite A (n, n).

    product(Q) = A Q is called `passes` times with at most k + oversample columns, fewer if they span R^n before.
    """
    from threadpoolctl import threadpool_limits

    # These matrices are thin: more BLAS threads save nothing, cost seconds where cores are shared, and would make
    # the last bits depend on their number.
    with threadpool_limits(1, "blas"):
        values, vectors = _block_lanczos(product, n, min(k, n), seed, passes, oversample)
    return np.maximum(values, 0), signed(vectors)


def signed(vectors):
    """Eigenvectors (n, k), which have no sign of their own, with that which makes the largest entry positive."""
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def _block_lanczos(product, n, k, seed, passes, oversample):
    """Ritz values (k,), largest first, and Ritz vectors (n, k) of A in the span of Q, A Q, A^2 Q, ..."""
    rng = np.random.default_rng(seed)
    width = min(k + oversample, n)
    q = np.linalg.qr(rng.standard_normal((n, width)))[0]
    basis, projected = q, np.zeros((0, 0))                  # (n, m), basis^T A basis (m, m)
    for i in range(passes):
        z = product(q)                                      # (n, width)
        column = basis.T @ z                                # (m, width)
        old, m = len(projected), basis.shape[1]
        grown = np.zeros((m, m))
        grown[:old, :old] = projected
        grown[:, old:] = column
        grown[old:, :] = column.T                           # A is symmetric
        projected = grown
        room = min(width, n - m)
        if i + 1 == passes or room == 0:
            break
        # Twice, because the first pass leaves round-off along the basis where A has low rank.
        q = z[:, :room]
        for _ in range(2):
            q = np.linalg.qr(q - basis @ (basis.T @ q))[0]
        basis = np.hstack([basis, q])
    values, vectors = np.linalg.eigh((projected + projected.T) / 2)
    top = np.argsort(values)[::-1][:k]
    return values[top], basis @ vectors[:, top]


def pad(z, width):
    """Zeros on the right up to `width` columns, float32."""
    return np.pad(np.asarray(z, np.float32), ((0, 0), (0, width - z.shape[1])))


def space(encoder):
    """Hash of a fitted embedding, 16 hex digits: equal only for equal vectors of equal features."""
    digest = hashlib.blake2b(digest_size=8)
    for key in sorted(encoder):
        value = encoder[key]
        array = np.asarray(value) if not isinstance(value, (str, list)) else None
        digest.update(key.encode() + (str(value).encode() if array is None else array.tobytes()))
    return digest.hexdigest()


# --- expression ---------------------------------------------------------------------------------------------

def log_normalise(counts, depth, target):
    """log(1 + target c / depth), csr like counts. A cell without depth stays zero."""
    x = counts.astype(np.float64)
    scale = target / np.maximum(np.asarray(depth, float), 1e-12)
    x.data = np.log1p(x.data * np.repeat(scale, np.diff(x.indptr)))
    return x


def fit_pca(blocks, genes, target, n_components=50, seed=0, passes=5):
    """PCA of log-normalised counts of the named genes; target is the depth all cells are brought to."""
    total, square, n = 0.0, 0.0, 0
    for counts, depth in blocks():
        x = log_normalise(counts, depth, target)
        total, n = total + np.asarray(x.sum(axis=0)).ravel(), n + x.shape[0]
        square = square + np.asarray(x.power(2).sum(axis=0)).ravel()
    mean = total / n

    def product(q):
        """Xc^T Xc q without centring X: Xc q = X q - 1 (mean q), and as its columns sum to 0, Xc^T may be X^T."""
        out = 0.0
        for counts, depth in blocks():
            x = log_normalise(counts, depth, target)
            out = out + x.T @ (x @ q - mean @ q)
        return out

    k = min(n_components, len(genes), n - 1)
    values, vectors = leading_eigenvectors(product, len(genes), k, seed, passes)
    # Of cells that are all the same, rounding leaves some 1e-16 of the sum of squares, which depends on the processor.
    real = values > max(SMALLEST**2 * values[0], 1e-13 * square.sum())
    values, vectors = values[real], vectors[:, real]
    if len(values) == 0:
        raise ValueError("the cells do not differ in any gene: there is nothing to embed.\n"
                         "  Check that the counts are those of single cells.")
    return {"encoder": "pca", "genes": list(genes), "target": float(target), "mean": mean,
            "components": vectors.T.copy(), "singular_values": np.sqrt(values), "n_cells": n,
            "variance": float((square - n * mean**2).sum() / n), "scale": float((values.sum() / n) ** -0.5)}


def pca_transform(counts, depth, encoder):
    """z (b, k) of counts (b, genes of the encoder, in its order); depth (b,) counts of a cell over all its genes."""
    x = log_normalise(counts, depth, float(encoder["target"]))
    v, mean = np.asarray(encoder["components"]).T, np.asarray(encoder["mean"])
    return (x @ v - mean @ v) * float(encoder["scale"])


def pca_gene_loadings(blocks, scores, encoder):
    """How strongly each gene follows each component, (G, k): also for genes the PCA was not fitted on.

        loading[g, j] = b[g, j] sd(z_j) / sd(x_g)         b the least-squares coefficients of x_g on z

    x_g is log-normalised expression in the cells of `blocks` (counts (b, G), depth), z = scores (N, k) of the same
    cells in the same order, and sd(z_j) that of the cells the encoder was fitted on. On those it is the correlation
    of gene and component, and the squared norm of a row is the share of the gene's variance that z explains.
    A gene that does not vary has loading 0.
    """
    scores = np.asarray(scores, np.float64)
    scores = scores - scores.mean(axis=0)
    cross, total, square, first = 0.0, 0.0, 0.0, 0
    for counts, depth in blocks():
        x = log_normalise(counts, depth, float(encoder["target"]))
        cross = cross + x.T @ scores[first:first + x.shape[0]]              # (G, k); the mean of x drops out
        total, square = total + np.asarray(x.sum(axis=0)).ravel(), square + np.asarray(x.power(2).sum(axis=0)).ravel()
        first += x.shape[0]
    coefficients = cross @ np.linalg.pinv(scores.T @ scores, hermitian=True)
    sd_z = np.asarray(encoder["singular_values"]) * float(encoder["scale"]) / np.sqrt(int(encoder["n_cells"]))
    variance = square / first - (total / first) ** 2
    varies = variance > 1e-12
    return np.where(varies[:, None], coefficients * sd_z / np.sqrt(np.where(varies, variance, 1))[:, None], 0)


# --- accessibility ------------------------------------------------------------------------------------------

def tf_idf(counts, idf):
    """log(1 + 1e4 share of the cell's open peaks * idf), csr like counts."""
    x = counts.astype(np.float64)
    opened = np.diff(x.indptr)                              # (b,) open peaks; counts hold no stored zeros
    per_cell = 1e4 / np.maximum(opened, 1)
    x.data = np.log1p(np.repeat(per_cell, opened) * np.asarray(idf)[x.indices])
    return x


def fit_lsi(blocks, peaks, n_components=50, seed=0, passes=5):
    """LSI of the named peaks. One more component than asked is computed, since the first usually is depth."""
    df, depth = np.zeros(len(peaks)), []
    for counts in blocks():
        df += np.bincount(counts.indices, minlength=len(peaks))
        depth.append(np.diff(counts.indptr))
    depth = np.concatenate(depth)
    idf = len(depth) / np.maximum(df, 1)

    def product(q):
        out = 0.0
        for counts in blocks():
            x = tf_idf(counts, idf)
            out = out + x.T @ (x @ q)
        return out

    k = min(n_components + 1, len(peaks), len(depth))
    values, vectors = leading_eigenvectors(product, len(peaks), k, seed, passes)
    real = values > SMALLEST**2 * max(values[0], 1e-300)
    values, vectors = values[real], vectors[:, real]
    scores = np.vstack([tf_idf(counts, idf) @ vectors for counts in blocks()])
    follows = depth_correlation(scores, depth)
    kept = np.flatnonzero(np.abs(follows) <= DEPTH_CORRELATION)[:n_components]
    if len(kept) == 0:
        raise ValueError("every LSI component follows the depth of the cells: there is nothing else to embed.\n"
                         "  Check that the cells differ in their open peaks.")
    return {"encoder": "lsi", "peaks": list(peaks), "idf": idf, "components": vectors.T[kept].copy(),
            "singular_values": np.sqrt(values[kept]), "n_cells": len(depth), "depth_correlation": follows,
            "dropped": [int(i) for i in np.flatnonzero(np.abs(follows) > DEPTH_CORRELATION)]}


def depth_correlation(scores, depth):
    """Pearson correlation (k,) of each component with log depth, over cells that have any."""
    some = depth > 0
    y = np.log(depth[some])
    y, z = y - y.mean(), scores[some] - scores[some].mean(axis=0)
    norm = np.sqrt((z**2).sum(axis=0) * (y**2).sum())
    return np.divide(y @ z, norm, out=np.zeros(z.shape[1]), where=norm > 1e-12)


def lsi_transform(counts, encoder):
    """z (b, k) of counts (b, peaks of the encoder, in its order), norm 1; a cell with no open peak gets zeros."""
    z = tf_idf(counts, encoder["idf"]) @ np.asarray(encoder["components"]).T
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    return np.divide(z, norm, out=np.zeros_like(z), where=norm > 0)
