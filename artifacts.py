"""Files between the stages: written whole or not at all, described by a record, checked on reading.

    .npy  arrays            .npz  sparse matrices (scipy)      .csv  tables people open
    .pt   {"args", "state_dict", ...} of tensors and plain values, read with weights_only=True

Beside every file NAME stands NAME.json: the stage that wrote it, its settings, the hashes of its inputs,
the rows (how many, and a hash of their ids), versions, seconds, metrics. An array has no row names, so a
reader that joins two files compares the hashes of their ids: swapped rows are an error, not a worse result.

A stage is finished when each of its files has a record with the same key, and the key hashes the inputs
(by content), the settings that the stage reads, and its code: `is_done`. Unfinished training goes on from its last
checkpoint if that has the same key: `load_checkpoint`.
"""
import ast
import hashlib
import io
import json
import os
import pickle
import platform
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import config

# --- hashes ---------------------------------------------------------------------------------------------

def hash_file(path):
    """BLAKE2b of a file's content, 32 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hash_ids(ids):
    """Hash of a list of cell or gene names in their order, 32 hex digits."""
    return hashlib.blake2b("\n".join(map(str, ids)).encode(), digest_size=16).hexdigest()


def stage_key(stage, inputs, settings):
    """Hash of what a stage depends on.

    inputs    {name: path or None}: hashed by content
    settings  names of config settings that change the result, or {name: value}
    """
    if not isinstance(settings, dict):
        settings = {name: config.snapshot()[name] for name in settings}
    files = {name: hash_file(p) if p else None for name, p in inputs.items()}
    text = json.dumps([stage, code_hash(stage), files, settings, config.SEED], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def code_hash(stage):
    """Hash of the stage's script and of all modules of Effendi it imports, so that an update repeats what it changed.

    config.py and this file are left out: settings are hashed by value, and artifacts.py computes nothing.
    """
    folder = Path(__file__).parent
    script = stage if (folder / f"{stage}.py").exists() else "precompute_embeddings"
    found, left = {}, [script]
    while left:
        name = left.pop()
        source = folder / f"{name}.py"
        if name in found or name in ("config", "artifacts") or not source.exists():
            continue
        found[name] = hash_file(source)
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                left.append(node.module)
    return hash_ids(f"{name} {value}" for name, value in sorted(found.items()))


# --- writing ----------------------------------------------------------------------------------------------

def path(name):
    return Path(config.OUT_DIR) / name


def save(name, write, **record):
    """Write OUT_DIR/name through write(file), and OUT_DIR/name.json describing it.

    A stop at any point leaves the old pair, or a file without a record, which readers refuse.
    """
    target = path(name)
    meta = target.with_name(target.name + ".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _staged(target, write)            # if this fails, nothing has changed
    record = dict(file=name, bytes=new.stat().st_size, blake2b=hash_file(new), **record,
                  python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                  config=config.snapshot())
    new_meta = _staged(meta, lambda f: f.write(json.dumps(record, indent=1, default=_plain).encode()))
    meta.unlink(missing_ok=True)
    os.replace(new, target)                 # same folder: readers see the old file or the new one
    os.replace(new_meta, meta)


def _staged(target, write):
    tmp = target.with_name(target.name + ".tmp")
    with open(tmp, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())                # a rename must not overtake the data it names
    return tmp


def _plain(value):
    """JSON for numpy scalars and arrays in a record."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def save_array(name, array, ids, **record):
    """A .npy whose rows are named by ids."""
    save(name, lambda f: np.save(f, array), rows=len(array), shape=list(array.shape), ids=hash_ids(ids), **record)


def save_table(name, table, **record):
    """A .csv with its index as the first column, which names the rows. Columns of text are read as text again."""
    # An empty column is read as missing numbers, which anndata can write.
    text = [name for name, values in table.replace("", None).items() if pd.api.types.infer_dtype(values) == "string"]
    save(name, lambda f: f.write(table.to_csv().encode()), rows=len(table), ids=hash_ids(table.index), text=text,
         **record)


def save_model(name, payload, **record):
    """A .pt of plain values and tensors: loads with weights_only=True."""
    save(name, lambda f: torch.save(payload, f), **record)


def save_text(name, text, **record):
    save(name, lambda f: f.write(text.encode()), **record)


def remove(name):
    """Take away an artifact that no longer holds, record first."""
    path(name + ".json").unlink(missing_ok=True)
    path(name).unlink(missing_ok=True)


# --- reading ---------------------------------------------------------------------------------------------------

_RNA = "python precompute_embeddings.py rna --rna FILE"
_ATAC = "python precompute_embeddings.py atac --atac FILE"
MADE_BY = {         # how a file's name starts -> the command that makes it; the first match counts
    "effendi_rna_": _RNA, "genes.": _RNA, "gene_expression": _RNA, "rna_encoder": _RNA,
    "effendi_atac_": _ATAC, "peak": _ATAC, "atac_encoder": _ATAC,
    "gene_tau": "python train_delay.py", "gene_peak_weights": "python train_delay.py",
    "gene_": "python precompute_embeddings.py genes",
    "align_mlp": "python train_vf.py", "vector_field": "python train_vf.py",
    "effendi": "python train_delay.py",
}


def record(name):
    """The record of an artifact; FileNotFoundError with the command that makes it."""
    meta = path(name + ".json")
    if not path(name).exists() or not meta.exists():
        maker = next((cmd for start, cmd in MADE_BY.items() if name.startswith(start)), "python run.py")
        why = "not found" if not path(name).exists() else "has no record beside it (an interrupted write)"
        raise FileNotFoundError(f"{path(name)} {why}.\n  Make it with: {maker}   (or everything with: python run.py)")
    try:
        return json.loads(meta.read_text())
    except json.JSONDecodeError as err:
        raise ValueError(f"{meta} is not readable JSON ({err}).\n  Delete it and run the stage again.") from err


def existing(name):
    """Path of an artifact that has its record, for hashing as an input."""
    record(name)
    return path(name)


def load_array(name, shape):
    """A .npy of the given shape as float32, Effendi's one precision; None in shape accepts any size."""
    meta = record(name)
    _check_bytes(name, meta)
    array = np.load(path(name), allow_pickle=False)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape)):
        want = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise ValueError(f"{path(name)} has shape {array.shape}, expected {want}.\n"
                         "  It was made with other settings; make it again, or use another --out.")
    return array.astype(np.float32, copy=False)


def load_sparse(name):
    _check_bytes(name, record(name))
    return sp.load_npz(path(name)).tocsr()


def load_table(name):
    meta = record(name)
    _check_bytes(name, meta)
    kinds = {0: str, **dict.fromkeys(meta.get("text", ()), str)}                # a sample "01" is not the number 1
    # Only an empty field is missing: "NA" and "nan" are names that genes and samples really have.
    return pd.read_csv(path(name), index_col=0, dtype=kinds, keep_default_na=False, na_values=[""])


def load_model(name):
    """The dictionary of a .pt."""
    _check_bytes(name, record(name))
    return read_weights(path(name))


def read_weights(file):
    """Tensors and plain values of a .pt file. Nothing in it is executed (weights_only=True)."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} not found.\n  Give the path of a .pt file that Effendi wrote.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as err:
        raise ValueError(f"{file} is not a weights file that can be read safely (weights_only): "
                         f"{str(err).splitlines()[0]}\n  It is truncated or holds code. Make it again.") from err


def _check_bytes(name, meta):
    size = path(name).stat().st_size
    if size != meta["bytes"]:
        raise ValueError(f"{path(name)} has {size} bytes, its record says {meta['bytes']}: truncated or replaced.\n"
                         "  Delete it and run the stage again.")


def same_rows(*names, field="ids"):
    """Raise unless the artifacts describe the same rows in the same order (or columns, field="columns")."""
    records = {name: record(name) for name in names}
    first = names[0]
    for name, meta in records.items():
        if meta[field] != records[first][field]:
            raise ValueError(f"{path(first)} and {path(name)} do not describe the same rows in the same order\n"
                             f"  ({records[first]['rows']} and {meta['rows']} rows). They come from different runs: "
                             "make both again, or use another --out.")


def made_with(name, **settings):
    """Raise unless the artifact was made under these settings."""
    made = record(name)["config"]
    for setting, value in settings.items():
        if made.get(setting) != value:
            raise ValueError(f"{path(name)} was made with {setting}={made.get(setting)}, not {value}.\n"
                             f"  Give --set {setting}={made.get(setting)}, or make it again.")


# --- finished, unfinished --------------------------------------------------------------------------------------

def is_done(key, *names):
    """True if every file is there, whole, and written under this key."""
    for name in names:
        try:
            meta = record(name)
            _check_bytes(name, meta)
        except (FileNotFoundError, ValueError):
            return False
        if meta.get("key") != key:
            return False
    return True


def training_state(modules, optimiser, rng, **plain):
    """All that the next epoch depends on, the global generators that dropout draws from included."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return dict(plain, modules=[m.state_dict() for m in modules], optimiser=optimiser.state_dict(),
                rng=rng.get_state(), torch_rng=torch.get_rng_state(), cuda_rng=cuda)


def restore_training(state, modules, optimiser, rng):
    for module, saved in zip(modules, state["modules"], strict=True):
        module.load_state_dict(saved)
    optimiser.load_state_dict(state["optimiser"])
    rng.set_state(state["rng"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def save_checkpoint(name, key, state):
    """Training state (tensors and plain values) of an unfinished stage, replaced as a whole."""
    target = path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(_staged(target, lambda f: torch.save({"key": key, "state": state}, f)), target)


def load_checkpoint(name, key):
    """The state saved under this key, or None: another key means other inputs or settings."""
    target = path(name)
    if not target.exists():
        return None
    saved = torch.load(io.BytesIO(target.read_bytes()), map_location="cpu", weights_only=True)
    return saved["state"] if saved["key"] == key else None


def drop_checkpoint(name):
    path(name).unlink(missing_ok=True)
