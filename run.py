"""The whole pipeline: two data files in, tau_g out.

    simulate (only without data) -> embeddings -> Stage 1 -> Stage 2 -> validation -> report

Finished stages are recognised by the content of their inputs and by their settings, and skipped; unfinished
training goes on from its last epoch. Run the same command again after any interruption.

Run     python run.py                                               simulated data with known delays
        python run.py --rna rna.h5ad --atac atac.h5ad               your data
        python run.py --multiome filtered_feature_bc_matrix.h5      10x multiome, or .h5mu
        python run.py --rna … --atac … --unpaired-rna a.h5ad --unpaired-atac b.h5ad     and an atlas
"""
import fcntl
import os
import shutil
import time

import artifacts
import config
import precompute_embeddings
import report
import simulate
import train_delay
import train_vf
import validate
import workers

ARGUMENTS = {
    "--rna": dict(dest="RNA_FILE", metavar="H5AD", help="cells x genes, raw counts"),
    "--atac": dict(dest="ATAC_FILE", metavar="H5AD", help="cells x peaks, counts"),
    "--multiome": dict(dest="MULTIOME_FILE", metavar="FILE", help="10x .h5 or .h5mu with both modalities"),
    "--unpaired-rna": dict(dest="UNPAIRED_RNA_FILE", metavar="H5AD", help="more RNA cells, for Stage 2's delays"),
    "--unpaired-atac": dict(dest="UNPAIRED_ATAC_FILE", metavar="H5AD", help="more ATAC cells, for Stage 1"),
    "--gtf": dict(dest="GTF_FILE", metavar="GTF", help="gene positions, if the files hold none"),
    "--genome": dict(dest="GENOME_FILE", metavar="FASTA", help="genome of the peaks, for HyenaDNA"),
    "--truth": dict(dest="TRUTH_FILE", metavar="CSV", help="planted delays, for simulated data"),
}


def check_files():
    """Refuse a combination of inputs that cannot be meant, before anything is written."""
    pair = (config.RNA_FILE, config.ATAC_FILE)
    if config.MULTIOME_FILE and any(pair):
        raise ValueError("--multiome holds both modalities: give either it, or --rna and --atac.")
    if not config.MULTIOME_FILE and any(pair) and not all(pair):
        missing = "--atac" if config.RNA_FILE else "--rna"
        raise ValueError(f"{missing} is missing: Stage 2 needs RNA and ATAC of the same cells.\n"
                         "  Give both files, or --multiome FILE, or neither for simulated data.")
    if (config.UNPAIRED_RNA_FILE or config.UNPAIRED_ATAC_FILE) and not (config.MULTIOME_FILE or all(pair)):
        raise ValueError("an unpaired atlas alone is not enough: Stage 2 needs paired cells.\n"
                         "  Add --rna and --atac, or --multiome.")
    for name in (*(a["dest"] for a in ARGUMENTS.values()),):
        file = getattr(config, name)
        if file and not os.path.isfile(file):
            raise FileNotFoundError(f"{file} not found ({name}).\n"
                                    f"  Check the path; relative paths start at {os.getcwd()}.")
    if config.TRUTH_FILE:
        simulate.read_truth(config.TRUTH_FILE)


def simulate_input():
    """Write the embedded default's data into OUT_DIR/simulated and point the settings at it."""
    settings = ("SIM_CELLS", "SIM_GENES", "SIM_LINEAGES", "SIM_KERNEL", "SIM_DEPTH")
    key = artifacts.stage_key("simulate", {}, settings)
    folder = artifacts.path("simulated")
    if artifacts.is_done(key, "simulated.txt") and folder.is_dir():
        print("simulate: up to date")
    else:
        start = time.time()
        tmp = artifacts.path("simulated.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        data = simulate.simulate(config.SIM_CELLS, config.SIM_GENES, config.SIM_LINEAGES, config.SIM_KERNEL,
                                 config.SIM_DEPTH, config.SEED)
        simulate.write(data, tmp)
        artifacts.path("simulated.txt.json").unlink(missing_ok=True)        # no record may outlive its data
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
        text = (f"{data.rna.n_obs} cells, {data.rna.n_vars} genes, {data.atac.n_vars} peaks, {config.SIM_LINEAGES} "
                f"lineages, kernel {config.SIM_KERNEL}, depth {config.SIM_DEPTH}, seed {config.SEED}")
        artifacts.save_text("simulated.txt", text + "\n", stage="simulate", key=key,
                            seconds=round(time.time() - start, 1))
        print(f"simulate: {text} -> {folder}")
    config.RNA_FILE, config.ATAC_FILE = str(folder / "rna.h5ad"), str(folder / "atac.h5ad")
    config.TRUTH_FILE = str(folder / "truth.csv")


def lock_folder():
    """One run per output folder; the lock goes with the process, however it ends."""
    os.makedirs(config.OUT_DIR, exist_ok=True)
    lock = open(artifacts.path(".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing {config.OUT_DIR}.\n  Wait for it, or use another --out.") from None
    return lock


def train():
    """Stages 0 to 2 on the files that the settings name; finished stages are left as they are."""
    precompute_embeddings.check_inputs()
    if config.OBJECTIVE == "anchored" and not os.path.exists(artifacts.path("gene_tau_estimates.csv")):
        workers.get_ready(config.processes(2))              # beside Stage 0
    precompute_embeddings.rna()
    precompute_embeddings.atac()
    precompute_embeddings.genes()
    train_vf.run()
    train_delay.run()


def main(argv=None):
    config.from_args(__doc__, argv, ARGUMENTS)
    check_files()
    lock = lock_folder()
    start = time.time()
    if not (config.RNA_FILE or config.MULTIOME_FILE):
        print("no data given: simulating a multiome data set with known delays")
        simulate_input()
    train()
    validate.run()
    report.run()
    lock.close()
    print(f"run: {time.time() - start:.0f} s -> {config.OUT_DIR}/gene_tau_estimates.csv, report.html")


if __name__ == "__main__":
    config.script(main)
