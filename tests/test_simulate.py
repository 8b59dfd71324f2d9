import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.integrate import solve_ivp
from scipy.special import gammainc
from scipy.stats import gamma, spearmanr

import simulate
from simulate import GRID, Options, Population, lag

SMALL = dict(cells=400, genes=40, seed=3)


def population(**options):
    return Population(Options(**({"genes": 30, "seed": 1} | options)))


def linked(sim):
    return (sim.peaks.gene != "").to_numpy()


def same(a, b):
    return a.X.shape == b.X.shape and (a.X != b.X).nnz == 0


@pytest.fixture(scope="module")
def kind():
    return simulate.simulate(**SMALL)


# --- kernels ---------------------------------------------------------------------------------------------

def test_the_exp_kernel_solves_its_differential_equation():
    pop = population(kernel="exp")
    for lineage in (0, 2):
        y0 = pop.drive(np.zeros((1, 1)), lineage)[0]

        def slope(t, y, lineage=lineage):
            return (pop.drive(np.array([[t]]), lineage)[0] - y) / pop.tau

        ode = solve_ivp(slope, (0, 6), y0, t_eval=pop.t, rtol=1e-8, atol=1e-9, max_step=0.05)
        # the drive is linear between grid points: curvature of a switch (width >= 0.12) times step^2 / 8
        np.testing.assert_allclose(pop.delayed(lineage, pop.tau), ode.y.T, atol=3e-5)


def test_the_shift_kernel_is_the_drive_tau_earlier():
    pop = population(kernel="shift")
    g, t = 4, np.array([0.1, 1.7, 3.0, 5.9])
    want = [pop.drive(np.array([[max(x - pop.tau[g], 0)]]), 1)[0, g] for x in t]
    got = pop.expression(t, np.ones(4, int))[:, g]
    # linear between grid points
    np.testing.assert_allclose((got - pop.baseline[g]) / pop.amplitude[g], want, atol=1e-4)


@pytest.mark.parametrize("shape", [1, 2, 3])
def test_the_gamma_kernel_has_mean_tau_and_the_gamma_step_response(shape):
    t, tau = np.linspace(0, 40, 8001), np.array([0.3, 2.0])
    y = np.repeat((t > 0).astype(float)[:, None], 2, axis=1)
    for _ in range(shape):
        y = lag(y, tau / shape, t[1])
    np.testing.assert_allclose(np.trapezoid(1 - y, t, axis=0), tau, atol=t[1])      # area over the response = mean
    np.testing.assert_allclose(y, gammainc(shape, t[:, None] * shape / tau), atol=0.02)  # the step is one ramp wide


@pytest.mark.parametrize("kernel, shape", [("exp", 1), ("gamma", 2), ("gamma", 3)])
def test_expression_is_the_drive_averaged_over_the_kernel(kernel, shape):
    pop, rank = population(kernel=kernel, shape=shape), (np.arange(4000) + 0.5) / 4000
    ages = gamma.ppf(rank[:, None], shape, scale=pop.tau / shape)       # (4000, G) equally likely delays
    for i in (200, 700, GRID):
        want = pop.drive(pop.t[i] - ages, 1).mean(0)
        np.testing.assert_allclose(pop.delayed(1, pop.tau)[i], want, atol=1e-3)     # midpoint rule in rank


def test_a_constant_drive_stays_constant_and_another_past_decays_exactly():
    y = lag(np.ones((101, 1)), np.array([0.5]), 0.01, before=np.array([3.0]))
    np.testing.assert_allclose(y[:, 0], 1 + 2 * np.exp(-np.linspace(0, 1, 101) / 0.5), atol=1e-12)


# --- population ------------------------------------------------------------------------------------------------

def test_lineages_are_equal_in_the_trunk_and_differ_after_it():
    pop = population()
    at = int(2.0 / 6.0 * GRID)
    for grid in (pop.rna_grid, pop.atac_grid):
        assert (grid[0, :at + 1] == grid[1, :at + 1]).all()
        assert np.abs(grid[0, -1] - grid[1, -1]).max() > 0.1 * grid.mean()


def test_accessibility_moves_exactly_in_the_genes_marked_as_changing(kind):
    pop = kind.population
    t, l = np.tile(np.linspace(0, 6, 50), 3), np.repeat([0, 1, 2], 50)
    a = pop.accessibility(t, l)
    spread = (a.max(0) - a.min(0)) / a.mean(0)
    changes = kind.truth.changes.to_numpy()
    assert (spread[~changes] < 1e-6).all() and (spread[changes] > 0.15).all()
    assert 0 < (~changes).sum() < 0.3 * len(changes)


def test_truth_reproduces_expression(kind):
    pop, truth = kind.population, kind.truth
    mean = pop.expression(kind.cells.time, kind.cells.lineage)
    lagged = pop.at(pop.driven(truth.tau.to_numpy()), kind.cells.time, kind.cells.lineage)
    np.testing.assert_allclose(mean, truth.amplitude.to_numpy() * lagged + truth.baseline.to_numpy(), rtol=1e-5)


def test_the_total_of_a_cell_hardly_depends_on_time():
    pop = population(genes=2000)
    for grid in (pop.rna_grid, pop.atac_grid):
        total = grid.sum(axis=2)
        assert total.std() / total.mean() < 0.06    # random genes: about 0.5 / sqrt(effective number of genes)


def test_delays_span_the_range_asked_for():
    tau = population(genes=500, tau_min=0.2, tau_max=2.0).tau
    assert 0.2 <= tau.min() < 0.22 and 1.85 < tau.max() <= 2.0
    assert abs(np.log(tau).mean() - np.log(0.2 * 2.0) / 2) < 4 * np.log(10) / np.sqrt(12 * 500)


# --- counts ----------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_data_and_another_does_not(kind):
    again, other = simulate.simulate(**SMALL), simulate.simulate(**SMALL | {"seed": 4})
    assert same(kind.rna, again.rna) and same(kind.atac, again.atac)
    pd.testing.assert_frame_equal(kind.truth, again.truth)
    pd.testing.assert_frame_equal(kind.cells, again.cells)
    assert not same(kind.rna, other.rna)


def test_another_cell_seed_keeps_the_genes_and_draws_new_cells(kind):
    second = simulate.simulate(**SMALL, cell_seed=99)
    pd.testing.assert_frame_equal(kind.truth, second.truth)
    pd.testing.assert_frame_equal(kind.peaks, second.peaks)
    assert not set(kind.cells.index) & set(second.cells.index)
    assert not np.isin(kind.cells.time, second.cells.time).any()


@pytest.mark.parametrize("depth, want", [("shallow", 170), ("deep", 680), (300, 300)])
def test_depth_is_as_asked(depth, want):
    sim = simulate.simulate(1000, 100, depth=depth, seed=2, size_sd=0.0)
    atac, rna = sim.atac.X[:, linked(sim)].sum() / 1000, sim.rna.X.sum() / 1000
    drift = 0.02        # the population mean is exact over an even grid of times, 1,000 cells are a sample of it
    assert abs(atac / (want / 4) - 1) < drift + 4 / np.sqrt(want * 250)
    assert abs(rna / (1.5 * want / 4) - 1) < drift + 4 / np.sqrt(want * 375)


def test_totals_over_all_peaks_and_genes_are_as_asked():
    sim = simulate.simulate(300, 200, peaks=2000, atac_total=200, rna_total=150, seed=1, lineages=10)
    assert sim.atac.shape == (300, 2000) and set(sim.cells.lineage) == set(range(10))
    assert abs(sim.atac.X.sum() / 300 / 200 - 1) < 0.08 and abs(sim.rna.X.sum() / 300 / 150 - 1) < 0.08


def test_counts_have_the_planted_means_and_poisson_spread():
    sim = simulate.simulate(2000, 40, seed=3, batches=1)
    pop, c = sim.population, sim.cells
    for counts, mean, size in (
            (sim.rna.X.toarray(), pop.expression(c.time, c.lineage), c.rna_size),
            (gene_counts(sim), pop.accessibility(c.time, c.lineage), c.atac_size)):
        mean = mean * size.to_numpy()[:, None]
        z = (counts.sum(0) - mean.sum(0)) / np.sqrt(mean.sum(0))
        assert np.abs(z).max() < 4.5
        assert abs(((counts - mean)**2 / mean).mean() - 1) < 0.03      # 80,000 terms of variance about 2 to 4


def gene_counts(sim):
    at = linked(sim)
    gene = sim.truth.index.get_indexer(sim.peaks.gene[at])
    return np.stack([np.asarray(sim.atac.X[:, at][:, gene == g].sum(1)).ravel() for g in range(len(sim.truth))], axis=1)


def test_counts_of_a_gene_are_dealt_to_its_peaks_by_weight():
    sim = simulate.simulate(3000, 5, seed=1)
    total = np.asarray(sim.atac.X.sum(0)).ravel()
    for gene in sim.truth.index:
        at = (sim.peaks.gene == gene).to_numpy()
        share = total[at] / total[at].sum()
        assert np.abs(share - sim.peaks.weight[at]).max() < 4 * np.sqrt(0.25 / total[at].sum())


def test_counts_are_sparse_whole_numbers(kind):
    for data in (kind.rna, kind.atac):
        assert data.X.format == "csr" and data.X.dtype == np.float32 and data.X.has_canonical_format
        assert (data.X.data > 0).all() and (data.X.data == np.round(data.X.data)).all()


# --- genome ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"sequences": True}, {"spacing": 50_000, "genes": 300}])
def test_peaks_and_genes_lie_in_order_apart_and_inside_their_chromosomes(options):
    sim = simulate.simulate(**SMALL | {"cells": 5} | options)
    o, peaks = sim.population.o, sim.peaks
    length = {f"chr{c + 1}": n * o.spacing for c, n in enumerate(simulate.chromosomes(o))}
    for table in (peaks, sim.truth):
        assert (table.start >= 0).all() and (table.start < table.end).all()
        assert (table.end <= table.chrom.map(length)).all()
    assert peaks.index.is_unique and sim.truth.index.is_unique and sim.rna.obs_names.is_unique
    for _, p in peaks.groupby("chrom", sort=False):
        assert (p.start.to_numpy()[1:] >= p.end.to_numpy()[:-1]).all()
    assert list(peaks.index[:1]) == [f"{peaks.chrom.iloc[0]}:{peaks.start.iloc[0]}-{peaks.end.iloc[0]}"]


def test_peaks_lie_near_their_gene_and_background_far_from_every_gene(kind):
    truth, peaks = kind.truth, kind.peaks
    tss = np.where(truth.strand == "+", truth.start, truth.end)
    middle = ((peaks.start + peaks.end) // 2).to_numpy()
    away = np.abs(middle[:, None] - tss) + 1e9 * (peaks.chrom.to_numpy()[:, None] != truth.chrom.to_numpy())
    own = truth.index.get_indexer(peaks.gene)
    at = own >= 0
    assert (away[at, own[at]] <= 81_000).all() and (away[~at].min(1) > 79_000).all()
    assert (away[(peaks.role == "promoter").to_numpy()].min(1) <= 400).all()
    assert set(np.bincount(own[at])) <= {3, 4, 5}
    np.testing.assert_allclose(peaks[at].groupby("gene").weight.sum(), 1)


def test_far_enhancers_lie_beside_the_neighbouring_gene_and_keep_their_own():
    sim = simulate.simulate(20, 200, seed=1, spacing=25_000, far=0.3)
    genes, peaks = sim.rna.var, sim.peaks
    enhancers = peaks[peaks.role == "enhancer"]
    tss = np.where(genes.strand == "+", genes.start, genes.end)
    own = genes.index.get_indexer(enhancers.gene)
    away = np.abs((enhancers.start + enhancers.end) / 2 - tss[own]) > 0.4 * 25_000
    assert 0.2 < away.mean() < 0.35 and peaks.index.is_unique           # the outermost genes have one neighbour
    assert (enhancers.chrom.to_numpy() == genes.chrom.to_numpy()[own]).all()


def test_peaks_of_like_programs_share_motifs_and_the_fasta_holds_the_genome(tmp_path):
    sim = simulate.simulate(**SMALL | {"cells": 20}, sequences=True)
    simulate.write(sim, tmp_path)
    text = (tmp_path / "genome.fa").read_text()
    records = {r.split("\n", 1)[0]: r.split("\n", 1)[1].replace("\n", "") for r in text.split(">")[1:]}
    assert {c: len(s) for c, s in records.items()} == {c: len(b) for c, b in sim.genome.items()}
    assert set(text) <= set(">chr0123456789\nACGT")
    module = simulate.module_of_programs(sim.population)[:, 0]
    common = {}
    for peak in sim.peaks[sim.peaks.gene != ""].itertuples():
        seq = records[peak.chrom][peak.start:peak.end]
        words = {seq[i:i + simulate.MOTIF] for i in range(len(seq) - simulate.MOTIF + 1)}
        key = module[sim.truth.index.get_loc(peak.gene)]
        common[key] = common.get(key, words) & words
    shared = list(common.values())
    assert all(shared) and len(shared) > 4
    assert not shared[0] & shared[1]


# --- files -----------------------------------------------------------------------------------------------------

def test_written_files_hold_what_a_user_has_and_no_truth(tmp_path):
    options = dict(cells=60, unpaired=30, doublets=0.1, splicing=True, collection_times=(0, 3), batch_effect=0.2)
    sim = simulate.simulate(**SMALL | options)
    simulate.write(sim, tmp_path)
    for name in ("rna", "atac", "unpaired_rna", "unpaired_atac"):
        data = anndata.read_h5ad(tmp_path / f"{name}.h5ad")
        assert same(data, getattr(sim, name))
        assert set(data.obs) == {"batch", "time_h"} and not data.uns and not data.obsm and not data.varm
        assert set(data.var) == ({"chrom", "start", "end"} | ({"strand"} if "rna" in name else set()))
        assert set(data.layers) == ({"spliced", "unspliced"} if "rna" in name else set())
    truth = pd.read_csv(tmp_path / "truth.csv", index_col="gene")
    assert {"tau", "has_link", "changes"} <= set(truth) and list(truth.index) == list(sim.rna.var_names)
    cells = pd.read_csv(tmp_path / "cells_truth.csv", index_col="barcode")
    assert list(cells.index) == list(sim.rna.obs_names) == list(sim.atac.obs_names)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_kind_file_has_no_column_for_cells(kind):
    assert kind.rna.obs.shape[1] == 0 and kind.atac.obs.shape[1] == 0 and kind.unpaired_rna is None


def test_unpaired_cells_are_new_ones_and_leave_the_paired_as_they_were(kind):
    sim = simulate.simulate(**SMALL, unpaired=50)
    assert same(sim.rna, kind.rna) and same(sim.atac, kind.atac)
    names = [*sim.rna.obs_names, *sim.unpaired_rna.obs_names, *sim.unpaired_atac.obs_names]
    assert len(names) == len(set(names)) == SMALL["cells"] + 100
    times = sim.unpaired_cells.groupby("sample").time
    assert not set(times.get_group("rna")) & set(times.get_group("atac"))


# --- unkind options: what they change, and that they change nothing else --------------------------------------------

@pytest.mark.parametrize("options, rna_same, atac_same", [
    (dict(lineage_delay=0.6), False, True), (dict(late=0.5), False, True), (dict(repressive=0.5), True, False),
    (dict(burn_in=0.5), False, True), (dict(ambient=0.2), False, True), (dict(noise=0.3), False, True),
    (dict(basal=1.0), False, True),
    (dict(unlinked=0.3), False, True), (dict(rna_total=50), False, True), (dict(peaks=400), True, False),
    (dict(splicing=True), True, True), (dict(kernel="shift"), False, True), (dict(programs=2), False, False),
    (dict(doublets=0.2), False, False), (dict(batch_effect=0.3), False, False), (dict(uneven=1.0), False, False)])
def test_an_option_changes_only_what_it_concerns(kind, options, rna_same, atac_same):
    sim = simulate.simulate(**SMALL | options)
    assert same(sim.rna, kind.rna) == rna_same and same(sim.atac, kind.atac) == atac_same
    pd.testing.assert_series_equal(sim.truth.changes, kind.truth.changes)
    keep = sim.truth.has_link
    pd.testing.assert_series_equal(sim.truth.tau[keep], kind.truth.tau[keep])
    assert list(sim.cells.index) == list(kind.cells.index)
    if "uneven" not in options:
        pd.testing.assert_frame_equal(sim.cells[["time", "lineage"]], kind.cells[["time", "lineage"]])


def test_lineage_delays_are_centred_and_reach_expression_only_after_the_branch(kind):
    sim = simulate.simulate(**SMALL, lineage_delay=0.6)
    deviation = np.log(sim.truth[[f"tau_lineage_{l}" for l in range(3)]].T / sim.truth.tau)
    np.testing.assert_allclose(deviation.mean(), 0, atol=1e-12)
    np.testing.assert_allclose(deviation.max() - deviation.min(), 1.2)
    pop, g = sim.population, 5
    end = pop.amplitude[g] * pop.driven(pop.tau_lineage[1])[1, -1, g] + pop.baseline[g]
    assert abs(pop.rna_grid[1, -1, g] / end - 1) < 1e-5
    at = int(2.0 / 6.0 * GRID)
    base = kind.population
    np.testing.assert_allclose(pop.rna_grid[:, :at] / pop.amplitude, base.rna_grid[:, :at] / base.amplitude, rtol=1e-4)


def test_repressive_enhancers_open_where_the_gene_closes():
    sim = simulate.simulate(50, 30, repressive=1.0, seed=2, flat=0.0)
    pop = sim.population
    unit = dict(zip(sim.peaks.index, pop.unit_of_peak))
    for gene, peaks in sim.peaks[sim.peaks.gene != ""].groupby("gene"):
        promoter, enhancer = (unit[peaks.index[peaks.role == r][0]] for r in ("promoter", "enhancer"))
        a, b = pop.atac_grid[0, :, promoter], pop.atac_grid[0, :, enhancer]
        assert a.std() < 1e-6 or np.corrcoef(a, b)[0, 1] < -0.999, gene


def test_late_enhancers_delay_the_drive_and_truth_says_so():
    pop = population(late=1.0, kernel="shift", late_by=1.0)
    promoter = pop.weight[0].sum(1)
    t = np.array([[3.3]])
    want = promoter * pop.programs(t, 1, 0) + (1 - promoter) * pop.programs(t - 1.0, 1, 0)
    np.testing.assert_allclose(pop.drive(t, 1), want)
    sim = simulate.simulate(**SMALL | {"cells": 5}, late=0.5)
    extra = sim.truth.tau_effective - sim.truth.tau
    late = sim.peaks[sim.peaks.late].groupby("gene").effect.sum()
    np.testing.assert_allclose(extra, late.reindex(sim.truth.index).fillna(0.0), atol=1e-12)


def test_unlinked_genes_do_not_follow_their_chromatin(kind):
    sim = simulate.simulate(**SMALL, unlinked=0.3)
    off = ~sim.truth.has_link.to_numpy()
    assert off.sum() == 12 and sim.truth.tau[off].isna().all()
    drive = [p.drive(p.t[:, None], 0) for p in (sim.population, kind.population)]
    assert (drive[0] == drive[1]).all(axis=0)[~off].all() and not (drive[0] == drive[1]).all(axis=0)[off].any()


def test_programs_differ_among_the_peaks_of_a_gene():
    sim = simulate.simulate(**SMALL | {"cells": 5}, programs=3)
    per_gene = sim.peaks[sim.peaks.gene != ""].groupby("gene").program.nunique()
    assert (per_gene >= 2).mean() > 0.6 and set(sim.peaks.program) == {0, 1, 2}


def test_burn_in_starts_from_another_state_and_forgets_it():
    steady, other = population(), population(burn_in=0.7)
    ratio = other.delayed(0, other.tau)[0] / steady.delayed(0, steady.tau)[0]
    assert 0.4 < np.log(ratio).std() < 1.1
    end = [p.delayed(0, p.tau)[-1, steady.tau < 0.5] for p in (steady, other)]
    np.testing.assert_allclose(*end, rtol=1e-3)         # exp(-6 / 0.5) of what was there is left


def test_ambient_rna_has_the_share_asked_for():
    """A gene silent in a cell gets counts there at the ambient share of the average."""
    options = dict(cells=2000, genes=60, seed=1, size_sd=0.0)
    clean, soup = simulate.simulate(**options), simulate.simulate(**options, ambient=0.25)
    pop, c = clean.population, clean.cells
    mean = pop.expression(c.time, c.lineage)
    average = pop.rna_grid.mean(axis=(0, 1))
    away = average / average.sum() * mean.sum(1, keepdims=True) - mean
    slope = ((soup.rna.X.toarray() - mean) * away).sum() / (away**2).sum()
    assert abs(slope - 0.25) < 4 * np.sqrt((mean * away**2).sum()) / (away**2).sum()


def test_doublets_are_as_many_as_asked_and_hold_two_cells():
    sim = simulate.simulate(1000, 100, doublets=0.1, seed=2, size_sd=0.0)
    two = sim.cells.doublet.to_numpy()
    assert two.sum() == 100
    for data in (sim.rna, sim.atac):
        total = np.asarray(data.X.sum(1)).ravel()
        assert abs(total[two].mean() / total[~two].mean() - 2) < 0.06


def test_batches_shift_genes_and_peaks_by_the_spread_asked_for():
    sim = simulate.simulate(4000, 150, batch_effect=0.4, seed=1)
    assert set(sim.rna.obs.batch) == {"b0", "b1"} and (sim.rna.obs.batch == sim.atac.obs.batch).all()
    first = (sim.rna.obs.batch == "b0").to_numpy()
    for data in (sim.rna, sim.atac):
        mean = [np.asarray(data.X[at].mean(0)).ravel() for at in (first, ~first)]
        assert abs(np.log(mean[0] / mean[1]).std() - 0.4 * np.sqrt(2)) < 0.12


def test_uneven_density_is_uneven():
    even, uneven = (simulate.simulate(3000, 2, uneven=u, seed=1).cells for u in (0, 1.0))
    count = [np.histogram(c.time, bins=12, range=(0, 6))[0] for c in (even, uneven)]
    assert count[0].max() / count[0].min() < 1.6 and count[1].max() / count[1].min() > 4


def test_noise_adds_the_squared_variation_asked_for():
    sim = simulate.simulate(3000, 60, noise=0.5, seed=1, size_sd=0.0)
    mean = sim.population.expression(sim.cells.time, sim.cells.lineage)
    extra = ((sim.rna.X.toarray() - mean)**2 - mean).sum() / (mean**2).sum()
    assert abs(extra - 0.5) < 0.06


def test_cells_of_a_time_course_lie_around_their_collection_time():
    sim = simulate.simulate(3000, 20, collection_times=(0, 1, 3, 6), hours_per_unit=1.5, seed=1)
    assert set(sim.rna.obs.time_h) == {0, 1, 3, 6}
    for hours, cells in sim.cells[sim.cells.time_h > 0].groupby("time_h"):
        assert abs(cells.time.mean() - hours / 1.5) < 0.05 and abs(cells.time.std() - 0.3) < 0.04
    np.testing.assert_allclose(sim.truth.tau_h, 1.5 * sim.truth.tau)


def test_unspliced_rna_is_what_spliced_rna_follows():
    pop = population(kernel="exp")
    u, s = pop.unspliced_grid() / simulate.UNSPLICED, pop.rna_grid
    slope = np.gradient(s[0].astype(float), pop.t, axis=0)
    np.testing.assert_allclose(pop.tau * slope[5:-5], (u[0] - s[0])[5:-5], atol=2e-3 * s.max())   # finite differences


@pytest.mark.parametrize("options, words", [
    (dict(kernel="box"), "kernel='box'"), (dict(depth="dense"), "depth='dense'"), (dict(doublet=0.1), "doublets"),
    (dict(basal=-1.0), "basal=-1"), (dict(ambient=1.5), "ambient=1.5"),
    (dict(lineages=1, lineage_delay=0.6), "two lineages"),
    (dict(peaks=10), "peaks=10"), (dict(collection_times=(0, 12)), "hours_per_unit"), (dict(t_branch=5.9), "t_branch"),
    (dict(noise=-1.0), "noise=-1.0"), (dict(cells=0), "cells=0"), (dict(tau_min=0.0), "tau_min")])
def test_a_wrong_option_is_named_with_what_to_give_instead(options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        simulate.simulate(**{"cells": 10, "genes": 20} | options)


def test_the_script_writes_a_data_set_and_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("config.OUT_DIR", "unused")
    simulate.main(["--out", str(tmp_path), "--cells", "30", "--genes", "20", "--depth", "100", "--seed", "5",
                   "--collection-times", "0,3", "--sequences"])
    assert "30 cells, 20 genes" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {
        "rna.h5ad", "atac.h5ad", "truth.csv", "cells_truth.csv", "peaks_truth.csv", "genome.fa"}
    want = simulate.simulate(30, 20, depth=100, seed=5, collection_times=(0, 3), sequences=True)
    assert same(anndata.read_h5ad(tmp_path / "rna.h5ad"), want.rna)


# --- the delays are there to be found ---------------------------------------------------------------------------

def likelihood(counts, size, signal):
    """Poisson log-likelihood of each gene under size (A signal + B), A and B >= 0 by reweighted least squares."""
    y, a, b = counts / size, counts.mean(0) / signal.mean(0), 0.1 * counts.mean(0)
    for _ in range(5):
        w = size / np.maximum(a * signal + b, 1e-6)
        sw, sx, sy = w.sum(0), (w * signal).sum(0), (w * y).sum(0)
        sxx, sxy = (w * signal**2).sum(0), (w * signal * y).sum(0)
        a = np.maximum((sw * sxy - sx * sy) / np.maximum(sw * sxx - sx**2, 1e-9), 1e-3)
        b = (sy - a * sx) / sw
        a, b = np.where(b < 1e-3, np.maximum((sxy - 1e-3 * sx) / sxx, 1e-3), a), np.maximum(b, 1e-3)
    mean = size * (a * signal + b)
    return (counts * np.log(mean) - mean).sum(0)


@pytest.mark.parametrize("kernel", ["exp", "shift", "gamma"])
def test_an_oracle_that_knows_the_time_finds_the_delays(kernel):
    sim = simulate.simulate(2000, 120, kernel=kernel, seed=11)
    pop, c = sim.population, sim.cells
    u = np.linspace(np.log(0.1), np.log(4), 15)
    fit = np.stack([likelihood(sim.rna.X.toarray(), c.rna_size.to_numpy()[:, None],
                               pop.at(pop.driven(np.full(120, tau)), c.time, c.lineage)) for tau in np.exp(u)])
    posterior = np.exp(fit - fit.max(0))
    estimate = (u[:, None] * posterior).sum(0) / posterior.sum(0)
    use = sim.truth.changes
    assert spearmanr(estimate[use], sim.truth.tau[use]).statistic > 0.9


def test_a_truth_needs_delays_and_takes_the_rest_for_granted(tmp_path):
    (tmp_path / "truth.csv").write_text("gene,tau\nA,0.5\n")
    truth = simulate.read_truth(tmp_path / "truth.csv")
    assert truth.loc["A", ["tau", "changes", "has_link"]].tolist() == [0.5, True, True]
    (tmp_path / "truth.csv").write_text("gene,delay\nA,0.5\n")
    with pytest.raises(ValueError, match="no column tau"):
        simulate.read_truth(tmp_path / "truth.csv")
