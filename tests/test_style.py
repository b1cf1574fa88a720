"""The code obeys the rules in pyproject.toml; `ruff check --fix .` and `ruff format labutils tests` help."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", [["check", "."], ["format", "--check", "labutils", "tests"]], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff", reason="ruff is not installed here")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
