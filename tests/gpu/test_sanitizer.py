"""Our kernels under compute-sanitizer, on small shapes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
PROGRAM = Path(__file__).parents[1] / "small_shapes.py"


OPTIONS = {
    "memcheck": ["--kernel-name", "kns=adakv"],
    "racecheck": ["--kernel-name", "kns=adakv"],
    "synccheck": ["--kernel-name", "kns=adakv", "--num-cuda-barriers", "65536"],
    "initcheck": [],  # it has to see torch's kernels write, too
}


@pytest.mark.parametrize("tool", OPTIONS)
def test_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *OPTIONS[tool]]
    result = subprocess.run(
        [*command, sys.executable, str(PROGRAM)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
