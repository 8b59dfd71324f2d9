"""Fixtures that every test file shares."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"         # tiny tensors: a second thread only waits, here and in the child processes

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import config  # noqa: E402


@pytest.fixture(autouse=True)
def settings(tmp_path):
    """Every test starts from config.py's defaults, writes below its own folder, and leaves the defaults behind."""
    before = config.snapshot()
    config.OUT_DIR = str(tmp_path / "out")
    config.DEVICE = "cpu"
    yield config
    for name, value in before.items():
        setattr(config, name, value)
