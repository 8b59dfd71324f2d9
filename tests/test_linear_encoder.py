"""PCA and LSI against dense linear algebra, and what must not change them."""
import numpy as np
import pytest
import scipy.sparse as sp

import linear_encoder as le

RNG = np.random.default_rng(0)


def clusters(n=300, features=80, kinds=6, depth=400, seed=0):
    """Counts of cells of a few kinds, csr (n, features): a spectrum with a gap, as in real data."""
    rng = np.random.default_rng(seed)
    profile = rng.gamma(0.3, size=(kinds, features)) + 0.02
    mean = profile[rng.integers(0, kinds, n)]
    mean = mean / mean.sum(axis=1, keepdims=True) * depth * rng.lognormal(0, 0.5, (n, 1))
    return sp.csr_matrix(rng.poisson(mean).astype(np.float32))


def in_blocks(counts, size=64, with_depth=True):
    depth = np.asarray(counts.sum(axis=1)).ravel()

    def blocks():
        for a in range(0, counts.shape[0], size):
            yield (counts[a:a + size], depth[a:a + size]) if with_depth else counts[a:a + size]
    return blocks


def pca_of(counts, k=8, size=64, **options):
    encoder = le.fit_pca(in_blocks(counts, size), [f"G{i}" for i in range(counts.shape[1])], 400.0, k, **options)
    return encoder, np.vstack([le.pca_transform(c, d, encoder) for c, d in in_blocks(counts, size)()])


def lsi_of(counts, k=8, size=64):
    blocks = in_blocks(counts, size, with_depth=False)
    encoder = le.fit_lsi(blocks, [f"P{i}" for i in range(counts.shape[1])], k)
    return encoder, np.vstack([le.lsi_transform(c, encoder) for c in blocks()])


def dense_log(counts, target=400.0):
    c = counts.toarray().astype(float)
    return np.log1p(target * c / c.sum(axis=1, keepdims=True))


# --- the eigensolver ------------------------------------------------------------------------------------------

def test_eigenvectors_of_a_small_matrix_are_exact():
    b = RNG.standard_normal((40, 30))
    a = b.T @ b
    values, vectors = le.leading_eigenvectors(lambda q: a @ q, 30, 5)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a)[::-1][:5], rtol=1e-10)     # the basis spans R^30: exact
    np.testing.assert_allclose(a @ vectors, vectors * values, atol=1e-8 * values[0])


def test_eigenvectors_of_a_matrix_of_low_rank_are_exact_and_orthonormal():
    b = RNG.standard_normal((4, 500))
    values, vectors = le.leading_eigenvectors(lambda q: b.T @ (b @ q), 500, 10)
    np.testing.assert_allclose(values[:4], np.linalg.eigvalsh(b @ b.T)[::-1], rtol=1e-10)
    assert (values[4:] < 1e-9 * values[0]).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(10), atol=1e-10)


def test_few_passes_suffice_when_the_spectrum_has_a_gap():
    u = np.linalg.qr(RNG.standard_normal((2000, 2000)))[0][:, :100]
    spectrum = np.r_[np.linspace(10, 5, 20), np.linspace(2, 0.1, 80)]
    calls = []

    def product(q):
        calls.append(q.shape)
        return u @ (spectrum[:, None] * (u.T @ q))

    values, _ = le.leading_eigenvectors(product, 2000, 20)
    assert calls == [(2000, 30)] * 5
    np.testing.assert_allclose(values, spectrum[:20], rtol=1e-6)        # (2 / 5)^(2 * 5 * 2) is 1e-8


def test_the_largest_entry_of_every_eigenvector_is_positive():
    b = RNG.standard_normal((50, 30))
    _, vectors = le.leading_eigenvectors(lambda q: b.T @ (b @ q), 30, 6)
    assert (vectors[np.abs(vectors).argmax(axis=0), np.arange(6)] > 0).all()


# --- PCA -------------------------------------------------------------------------------------------------------------

def test_pca_is_the_dense_singular_value_decomposition():
    counts = clusters()
    encoder, z = pca_of(counts, k=5)
    x = dense_log(counts)
    u, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(encoder["singular_values"], s[:5], rtol=1e-8)        # eigenvalues of X^T X in float64
    np.testing.assert_allclose(np.abs(z / encoder["scale"]), np.abs(u[:, :5] * s[:5]), atol=1e-6 * s[0])
    np.testing.assert_allclose(encoder["variance"], x.var(axis=0).sum(), rtol=1e-8)


def test_pca_centres_the_cells_and_their_mean_squared_norm_is_one():
    _, z = pca_of(clusters())
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose((z**2).sum(axis=1).mean(), 1, rtol=1e-9)


@pytest.mark.parametrize("embed", [pca_of, lsi_of])
def test_the_size_of_the_blocks_does_not_matter(embed):
    counts = clusters()
    small, large = embed(counts, size=7)[1], embed(counts, size=1000)[1]
    np.testing.assert_allclose(small, large, atol=1e-7)                 # order of float64 sums


@pytest.mark.parametrize("embed", [pca_of, lsi_of])
def test_permuted_cells_give_permuted_rows(embed):
    counts, order = clusters(), np.random.default_rng(1).permutation(300)
    np.testing.assert_allclose(embed(counts[order])[1], embed(counts)[1][order], atol=1e-7)     # order of the sums


@pytest.mark.parametrize("embed", [pca_of, lsi_of])
def test_the_same_data_give_the_same_bits_and_the_same_space(embed):
    (one, z_one), (two, z_two) = embed(clusters()), embed(clusters())
    assert np.array_equal(z_one, z_two)
    assert le.space(one) == le.space(two) != le.space(embed(clusters(seed=1))[0])


@pytest.mark.parametrize("embed", [pca_of, lsi_of])
def test_asking_for_more_components_than_there_are_gives_what_there_is(embed):
    encoder, z = embed(clusters(n=12, features=9), k=50)
    assert z.shape[1] <= 9 and np.isfinite(z).all() and len(encoder["singular_values"]) == z.shape[1]


def test_pca_does_not_see_depth():
    one = clusters()
    deep = one.copy() * 3                                               # three times the counts of the same cells
    encoder, z = pca_of(one)
    np.testing.assert_allclose(le.pca_transform(deep, np.asarray(deep.sum(axis=1)).ravel(), encoder), z, atol=1e-9)


def test_the_largest_entry_of_a_column_is_positive():
    v = np.array([[0.6, 0.1], [-0.5, -0.9], [0.5, 0.4]])
    for given in (v, -v, v * [1, -1]):
        np.testing.assert_array_equal(le.signed(given), v * [1, -1])


def test_identical_cells_cannot_be_embedded():
    with pytest.raises(ValueError, match="do not differ"):
        pca_of(sp.csr_matrix(np.ones((20, 5), np.float32)))


def test_a_gene_loading_is_its_correlation_with_the_component():
    counts = clusters()
    encoder, z = pca_of(counts, k=5)
    loadings = le.pca_gene_loadings(in_blocks(counts), z, encoder)
    x = dense_log(counts)
    want = [[np.corrcoef(x[:, g], z[:, j])[0, 1] for j in range(5)] for g in range(80)]
    np.testing.assert_allclose(loadings, want, atol=1e-8)               # streamed sums in float64
    assert ((loadings**2).sum(axis=1) <= 1 + 1e-9).all()


def test_a_gene_outside_the_fit_gets_the_loading_it_would_have_had_in_other_cells_too():
    counts = clusters(n=4000)
    encoder, z = pca_of(counts, k=4)
    known = le.pca_gene_loadings(in_blocks(counts), z, encoder)
    twin = counts[:, [3, 17]]                                           # two genes again, under another name
    depth = np.asarray(counts.sum(axis=1)).ravel()

    def half():
        yield twin[::2], depth[::2]
    again = le.pca_gene_loadings(half, z[::2], encoder)
    np.testing.assert_allclose(again, known[[3, 17]], atol=4 / np.sqrt(2000))       # 4 standard errors of a correlation


def test_a_gene_that_does_not_vary_has_loading_zero():
    counts = clusters()
    encoder, z = pca_of(counts)
    silent = sp.csr_matrix((300, 2), dtype=np.float32)
    assert not le.pca_gene_loadings(in_blocks(silent), z, encoder).any()


# --- LSI -------------------------------------------------------------------------------------------------------------

def test_lsi_is_the_dense_singular_value_decomposition_of_tf_idf():
    counts = clusters(depth=60)
    encoder, z = lsi_of(counts, k=5)
    is_open = (counts.toarray() > 0).astype(float)
    tf = is_open / is_open.sum(axis=1, keepdims=True)
    x = np.log1p(1e4 * tf * len(is_open) / is_open.sum(axis=0))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = [i for i in range(6) if i not in encoder["dropped"]][:5]
    np.testing.assert_allclose(encoder["singular_values"], s[kept], rtol=1e-8)
    want = u[:, kept] * s[kept]
    np.testing.assert_allclose(np.abs(z), np.abs(want / np.linalg.norm(want, axis=1, keepdims=True)), atol=1e-6)


def test_the_component_that_follows_depth_is_left_out():
    counts = clusters(n=500, features=300, depth=100)
    encoder, z = lsi_of(counts)
    assert encoder["dropped"] == [0]
    opened = np.diff(counts.indptr)
    assert np.abs(le.depth_correlation(z, opened)).max() < le.DEPTH_CORRELATION


def test_lsi_sees_open_peaks_and_not_how_many_fragments_lie_in_them():
    counts = clusters(depth=60)
    twice = counts.copy()
    twice.data[:] = 7
    np.testing.assert_array_equal(lsi_of(twice)[1], lsi_of(counts)[1])


def test_a_cell_has_norm_one_or_zero_when_nothing_is_open():
    counts = sp.vstack([clusters(), sp.csr_matrix((1, 80), dtype=np.float32)]).tocsr()
    norm = np.linalg.norm(lsi_of(counts)[1], axis=1)
    np.testing.assert_allclose(norm, np.r_[np.ones(300), 0], atol=1e-12)


def test_padding_adds_only_zeros():
    z = RNG.standard_normal((3, 4))
    wide = le.pad(z, 10)
    assert wide.shape == (3, 10) and wide.dtype == np.float32
    assert np.array_equal(wide[:, :4], z.astype(np.float32)) and not wide[:, 4:].any()
