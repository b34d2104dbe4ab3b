"""The generated parts of docs/ are up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_op_reference_is_current():
    script = ROOT / "docs" / "make_op_reference.py"
    done = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert done.returncode == 0, "docs/ops.md is out of date: run python docs/make_op_reference.py"
