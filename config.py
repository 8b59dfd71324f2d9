"""Every path and number of Effendi, and the two things all scripts share: settings and clean errors.

Read as config.NAME when used; never `from config import NAME`, and never as a default argument, since
both freeze the value before an override arrives.

    python train_vf.py --set VF_EPOCHS=5 --set DEVICE=cpu      (wins over EFFENDI_VF_EPOCHS=5)

None means "choose for me": the choice is printed with its reason when it is made.
"""
import argparse
import ast
import difflib
import os
import sys
import traceback
import typing

# --- where, on what, and how repeatable ---------------------------------------------------------------
OUT_DIR: str = "effendi_output"
SEED: int = 0
DEVICE: str | None = None               # None = cuda, else mps, else cpu; the identifiable model is fitted on the CPU
                                        # unless this says cuda
THREADS: int | None = None              # CPU threads; None = as many as the machine has cores
DEBUG: bool = False                     # True = show the traceback behind an error message
BLOCK_ROWS: int = 2048                  # cells read from disk at a time; bounds the memory of Stage 0

# --- input files (None = simulated data with known delays) -----------------------------------------------
RNA_FILE: str | None = None             # cells x genes, raw counts (.h5ad)
ATAC_FILE: str | None = None            # cells x peaks (.h5ad)
MULTIOME_FILE: str | None = None        # both: 10x filtered_feature_bc_matrix.h5, or .h5mu
UNPAIRED_RNA_FILE: str | None = None    # an atlas, whose cells are never paired: RNA for the delays of Stage 2,
UNPAIRED_ATAC_FILE: str | None = None   # ATAC for the readout of Stage 1
GTF_FILE: str | None = None             # gene positions, when the files hold none
TRUTH_FILE: str | None = None           # planted delays of simulated data (truth.csv), for validation only
# obs column that says which batch a cell belongs to: counts are thinned until every gene and peak has the same mean in
# all batches. Only for batches that hold the same mixture of cells, never for time points. None = no correction
BATCH: str | None = None
GENOME_FILE: str | None = None          # FASTA or .2bit of the peaks' build, for HyenaDNA

# --- the embedded default: what run.py simulates without data -----------------------------------------------
SIM_CELLS: int = 3000
SIM_GENES: int = 400
SIM_LINEAGES: int = 3
SIM_KERNEL: str = "exp"                 # exp (first-order lag), shift (pure delay) or gamma
SIM_DEPTH: str = "deep"                 # deep, shallow, or ATAC counts a cell in the peaks of the genes

# --- choice of genes and peaks -----------------------------------------------------------------------------
N_HVG: int = 2000                       # highly variable genes kept (scanpy, seurat flavour)
MIN_GENE_CELLS: int = 10                # a gene seen in fewer cells is left out
# ATAC peaks kept: None = open in >= 10 % of cells, relaxed until at least MIN_PEAKS remain;
# 0 = all; N = the N most variable
ATAC_TOP_PEAKS: int | None = None
MIN_PEAKS: int = 2000                   # never let the automatic filter keep fewer than this
GENE_WINDOW: int = 100_000              # bp beyond the gene body whose peaks count for the gene, if it is the nearest
# bp over which a distal peak's weight falls by e; 2 to 100 kb were compared by how well change in accessibility
# follows change in expression on a real time course (Spearman 0.63 at 2 kb, 0.647 at 5, 0.655 at 50, 0.64 at 100)
GENE_DECAY: float = 50_000.0
PEAKS_PER_GENE: int = 8                 # peaks of a gene that may count differently, strongest first; 0 = none
MIN_PAIRED_CELLS: int = 50              # fewer shared barcodes than this is an error

# --- encoders --------------------------------------------------------------------------------------------------
RNA_ENCODER: str | None = None          # None = scgpt if its weights are there, else pca
ATAC_ENCODER: str | None = None         # None = hyenadna if weights and a genome are there, else lsi
SCGPT_MODEL_DIR: str = "weights/scGPT_human"
HYENADNA_MODEL_DIR: str = "weights/hyenadna-small-32k-seqlen-hf"
# scGPT tokens per cell: None = min(n_vars + 1, 1200); 300 = fast; 1200 = full precision
SCGPT_MAX_SEQ_LEN: int | None = None
SCGPT_USE_FAST_TRANSFORMER: bool = False    # True = fused attention kernels where the device has them
SCGPT_BATCH_SIZE: int | None = None     # None = 64 on CUDA, 16 on MPS, 8 on CPU
HYENADNA_BATCH_SIZE: int | None = None  # peaks at once: None = MPS 16, CUDA 64, CPU 8
EMB_DTYPE: str | None = None            # None = bfloat16 where faster and cosine >= 0.9999, else float32
EMB_SHARD_ROWS: int = 4096              # cells or peaks per resumable shard
HYENADNA_REVERSE_COMPLEMENT: bool = False   # True = mean of a peak and its reverse complement
DOWNLOAD_DIR: str = "downloads"         # demo_real_emb.py puts the 10x data and the genome here

# What demo_real_emb.py fetches when it is missing: (which, file, link, bytes, checksum). The models' files go to
# SCGPT_MODEL_DIR and HYENADNA_MODEL_DIR, the others to DOWNLOAD_DIR. Where no checksum is published (None), the first
# download writes its own beside the file (FILE.sha256), and later runs are held to it; its bytes are approximate.
DOWNLOADS = (
    ("multiome", "10k_PBMC_Multiome_nextgem_Chromium_X_filtered_feature_bc_matrix.h5",
     "https://cf.10xgenomics.com/samples/cell-arc/2.0.0/10k_PBMC_Multiome_nextgem_Chromium_X/"
     "10k_PBMC_Multiome_nextgem_Chromium_X_filtered_feature_bc_matrix.h5", 170_000_000, None),
    # The same bases as hg38.fa.gz, readable at random without unpacking; checksum from UCSC's md5sum.txt.
    ("genome", "hg38.2bit", "https://hgdownload.soe.ucsc.edu/goldenPath/hg38/bigZips/hg38.2bit", 835_393_456,
     "md5:dcc3ea27079aa6dc3f9deccd7275e0f8"),
    # A public copy of the whole-human model; the authors' own lies in a Google Drive folder, linked from
    # https://github.com/bowang-lab/scGPT, that only a browser can open.
    ("scgpt", "args.json", "https://czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/args.json",
     2_000, None),
    ("scgpt", "vocab.json", "https://czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/vocab.json",
     1_500_000, None),
    ("scgpt", "best_model.pt", "https://czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/best_model.pt",
     210_000_000, None),
    # The commit is the one in hyenadna_encoder.REVISIONS.
    ("hyenadna", "config.json", "https://huggingface.co/LongSafari/hyenadna-small-32k-seqlen-hf/resolve/"
     "8fe770c78eb13fe33bf81501612faeddf4d6f331/config.json", 2_000, None),
    ("hyenadna", "model.safetensors", "https://huggingface.co/LongSafari/hyenadna-small-32k-seqlen-hf/resolve/"
     "8fe770c78eb13fe33bf81501612faeddf4d6f331/model.safetensors", 30_000_000, None),
)

# --- shapes (specification) ------------------------------------------------------------------------------------
DIM: int = 512                          # latent dimension
HYENADNA_D_MODEL: int = 256             # width of the ATAC embedding
ALIGN_HIDDEN: int = 512
VF_HIDDEN: int = 128
TAU_HIDDEN: int = 128
TAU_MOD_SCALE: float = 0.1              # amplitude of the cell-specific part of tau
DEC_HIDDEN: int = 256

# --- training (specification) ------------------------------------------------------------------------------------
N_PROJ_W2: int = 200                    # directions per sliced-W2 estimate
VF_EPOCHS: int = 50
VF_LR: float = 1e-3
STAGE1_EPOCHS: int = 10                 # Stage 2.1, v_theta frozen
STAGE2_EPOCHS: int = 40                 # Stage 2.2, v_theta at STAGE2_LR_VF
STAGE1_LR: float = 1e-3
STAGE2_LR_VF: float = 1e-6
BATCH_SIZE: int = 128
W_ODE: float = 1.0
W_RECON: float = 0.5
W_TAU: float = 0.01
W_REVERSE: float = 0.1
EXPLODE_NORM: float = 50.0              # gradient clipping threshold
N_STEPS: int = 200                      # Euler steps of a Stage 2 trajectory
N_STEPS_BAR: int = 20                   # Euler steps to tau_bar and back, in L_reverse and Stage 1
TAU_MAX: float | None = None            # end of the trajectory; None = the largest tau of the batch
HELD_OUT: float = 0.1                   # share of cells held out of the gradients, to choose and to report by

# --- the model ----------------------------------------------------------------------------------------------------
# "anchored" = each gene read from its own chromatin at its own delay: tau is determined by the data (DESIGN.md);
# "specification" = the losses and readout as specified, under which it is not
OBJECTIVE: str = "anchored"
KERNEL: str | None = None               # exp, shift or gamma; None = exp or shift, as held-out cells prefer
MEMBERS: int | None = None              # fits from different weights and held-out cells, averaged; None = 2, or 4
                                        # below 2,000 paired cells
ANCHOR_STEPS: int = 800                 # Stage 1: at most so many steps; held-out cells choose
ANCHOR_CELLS: int = 50_000              # Stage 1 sees at most so many ATAC cells, seeded choice
RNA_ONLY_CELLS: int = 20_000            # Stage 2.1: cells without ATAC that join the E-steps, at most; 0 = none
EM_EPOCHS: int = 20                     # Stage 2.1: expectation-maximisation
MIN_ACCESS: int = 20                    # accessible counts below which a gene has no readout of its own
CELL_GROUPS: int = 12                   # Stage 2.2: groups of cells whose delays may differ; 1 = none
BOOTSTRAP: int = 20                     # Stage 2.2: refits of both stages behind the intervals; 0 = posterior alone
WORKERS: int | None = None              # processes for fits and refits; None = one a core, two on a GPU


CHOICES = {"OBJECTIVE": ("anchored", "specification"), "KERNEL": (None, "exp", "shift", "gamma"),
           "SIM_KERNEL": ("exp", "shift", "gamma")}
MAY_BE_ZERO = {"SEED", "GENE_WINDOW", "MIN_GENE_CELLS", "MIN_PEAKS", "MIN_ACCESS", "ATAC_TOP_PEAKS", "PEAKS_PER_GENE",
               "RNA_ONLY_CELLS", "BOOTSTRAP", "STAGE1_EPOCHS", "STAGE2_EPOCHS", "TAU_MOD_SCALE", "W_ODE", "W_RECON",
               "W_TAU", "W_REVERSE"}


def override(name, text):
    """Set one constant from text, if config.py declares the name, the type fits and the value can be meant."""
    hints = typing.get_type_hints(sys.modules[__name__])
    if name not in hints:
        near = difflib.get_close_matches(name.upper(), hints, n=1)
        raise ValueError(f"no setting {name} in config.py" + (f"; did you mean {near[0]}?" if near else ""))
    allowed = typing.get_args(hints[name]) or (hints[name],)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    if type(value) not in allowed and str in allowed:
        value = text
    if type(value) not in allowed:
        kinds = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
        raise ValueError(f"{name}={text!r} is {type(value).__name__}, but config.py declares {kinds}")
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name}={text!r} is unknown; choose one of {', '.join(map(str, CHOICES[name]))}")
    if type(value) in (int, float) and not (value > 0 or value == 0 and name in MAY_BE_ZERO):
        raise ValueError(f"{name}={text!r}: give a number above 0" + ", or 0" * (name in MAY_BE_ZERO))
    if name == "HELD_OUT" and value > 0.5:
        raise ValueError(f"{name}={text!r}: give a share of the cells, at most 0.5")
    globals()[name] = value


def from_args(doc, argv=None, arguments=None):
    """Apply EFFENDI_NAME variables, then --set NAME=VALUE and --out DIR. A stage calls this first.

    arguments  {"--flag": add_argument keywords} for what only this script takes. An argument whose dest is
               a setting's name (dest="RNA_FILE") sets that setting.
    Returns the parsed arguments. A wrong setting ends with exit status 2 and the nearest name.
    """
    # Progress and choices must reach a log file as they happen, and stderr's bars must not overtake them.
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when a GPU starts; for make_repeatable
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, options in (arguments or {}).items():
        parser.add_argument(flag, **options)
    parser.add_argument("--out", metavar="DIR", help="folder for everything written (effendi_output)")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="any setting of config.py")
    args = parser.parse_args(argv)
    hints = typing.get_type_hints(sys.modules[__name__])
    env = [f"{k[8:]}={v}" for k, v in sorted(os.environ.items()) if k.startswith("EFFENDI_")]
    pair = ""
    try:
        for pair in env + args.set:
            name, _, text = pair.partition("=")
            override(name, text)
    except ValueError as err:
        parser.error(f"{pair}: {err}")
    if args.out:
        globals()["OUT_DIR"] = args.out
    for name, value in vars(args).items():
        if name in hints and value is not None:
            globals()[name] = value
    return args


def processes(pieces, device=None):
    """How many processes independent pieces of work get; at most two by themselves where they share a GPU's memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    usual = THREADS or cores
    if device is not None and device.type == "cuda":
        usual = min(usual, 2)
    return max(1, min(WORKERS or usual, pieces))


def pick_device():
    """The torch device of this run; printed once with its reason. Also sets the number of CPU threads."""
    import torch
    if THREADS:
        torch.set_num_threads(THREADS)
    if DEVICE:
        name, why = DEVICE, "as set"
    elif torch.cuda.is_available():
        name, why = "cuda", "an NVIDIA GPU is there"
    elif torch.backends.mps.is_available():
        name, why = "mps", "Apple silicon"
    else:
        name, why = "cpu", f"no GPU; {torch.get_num_threads()} threads"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ValueError(f"DEVICE={name!r} cannot be used here: {str(err).splitlines()[0]}\n"
                         "  Leave DEVICE=None for the best that is there, or set cpu.") from err
    print(f"device: {device} ({why}), float32")
    return device


def fit_device():
    """Where the identifiable model is fitted: the CPU, unless DEVICE itself asks for an NVIDIA GPU.

    The fits are small, and need float64, which Apple's GPUs lack.
    """
    import torch
    return pick_device() if DEVICE and DEVICE.startswith("cuda") else torch.device("cpu")


def make_repeatable(device):
    """From here on sums on a GPU come in the same order every time, or warn that they cannot."""
    import torch
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False     # a help against bugs that costs time


def snapshot():
    """All settings as a plain dictionary, for the records."""
    return {k: globals()[k] for k in typing.get_type_hints(sys.modules[__name__])}


def _fail(message):
    if DEBUG:
        traceback.print_exc()
    print(f"\nerror: {message}", file=sys.stderr)
    if not DEBUG:
        print("  (--set DEBUG=True shows where in the code)", file=sys.stderr)
    sys.exit(2)


def script(main):
    """Run a script's main(); what a user can cause ends with exit status 2 and the message alone.

    ValueError and OSError carry messages written for the user (which file, what is wrong, the fix);
    FloatingPointError is a diverged training. Anything else is a bug and keeps its traceback.
    """
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as err:
        _fail(err)
    except RuntimeError as err:
        if type(err).__name__ != "OutOfMemoryError":        # torch's, which not every script imports
            raise
        _fail(f"the GPU's memory ran out: {str(err).splitlines()[0]}\n  Run the same command again with smaller "
              "batches, fewer processes (--set WORKERS=1) or on the CPU (--set DEVICE=cpu). Finished work is kept.")
    except KeyboardInterrupt:
        print("\ninterrupted: finished work is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
