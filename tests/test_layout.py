"""The flat layout: imports point one way, and importing a module does nothing."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [
    {"config"},
    {"artifacts", "align_mlp", "slice_w2", "vector_field", "simulate", "workers"},
    {"effendi_loader", "chromatin", "linear_encoder"},
    {"delay_fit", "scgpt_encoder", "hyenadna_encoder"},
    {"anchored", "effendi", "embed_cells"},
    {"precompute_embeddings", "inference"},
    {"train_vf", "train_delay", "intervention"},
    {"validate", "report", "calibrate"},
    {"run", "demo_real_emb"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
MATH = {"align_mlp", "slice_w2", "vector_field", "chromatin", "delay_fit", "anchored", "effendi"}


def imports(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_levels(module):
    assert module in LEVEL, "give the new module its place in LEVELS"
    assert [name for name in imports(module) if LEVEL.get(name, -1) >= LEVEL[module]] == []


@pytest.mark.parametrize("module", sorted(MATH & set(MODULES)))
def test_the_mathematics_reads_no_settings_and_no_files(module):
    assert not {"config", "artifacts"} & set(imports(module))


def test_importing_every_module_prints_nothing_writes_nothing_and_loads_no_heavy_library(tmp_path):
    light = ", ".join(m for m in MODULES if m != "hyenadna_encoder")        # it subclasses transformers' model
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {light}\n"
            "assert not {'scanpy', 'anndata', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["run", "precompute_embeddings", "train_vf", "train_delay", "validate", "report",
                                    "inference", "simulate"])
def test_every_script_explains_itself(script):
    done = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--set NAME=VALUE" in done.stdout and "Run" in done.stdout


def test_nothing_reads_a_pickle_or_runs_code_from_a_model_repository():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                text = ast.unparse(node)
                if path.name == "workers.py" and text.startswith("pickle.loads("):
                    continue                                # what its own processes send each other, never a file
                assert not text.startswith(("pickle.load", "pd.read_pickle", "pandas.read_pickle")), path.name
                assert "trust_remote_code=True" not in text and "allow_pickle=True" not in text, f"{path.name}: {text}"
                if text.startswith("torch.load"):
                    assert "weights_only=True" in text, f"{path.name}: {text}"
