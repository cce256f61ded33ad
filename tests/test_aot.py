"""Every Triton kernel compiles for Ampere and Hopper without spills, with 16-byte row loads, in its registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "aot.py"
KERNELS = Path(__file__).parents[1] / "kernels"


def compile_all(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", ["80", "90"])
def test_no_kernel_spills_or_loads_narrowly(arch):
    found = compile_all(arch)
    wrong = [f"{row['kernel']}: {', '.join(row['wrong'])}" for row in found if row["wrong"]]
    assert not wrong, "\n".join(wrong)
    compiled = {row["function"] for row in found}
    defined = {
        line.removeprefix("def ").split("(")[0]
        for path in KERNELS.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert compiled == defined


def test_the_gate_finds_what_is_wrong():
    too_large, narrow = compile_all("--controls", "90")
    assert any("spills" in reason for reason in too_large["wrong"])
    assert any("row loads of 16 bytes" in reason for reason in narrow["wrong"])
