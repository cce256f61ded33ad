"""Every example runs, shortened, and gives what it says."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from gas_triton.datasets import generate

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: object) -> str:
    """What an example prints, run as its users run it."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error::UserWarning",
    }
    # interpreted kernels would be slow, and are not what a user without a GPU runs
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, printed: str) -> list[float]:
    """The numbers that the group of a pattern finds; at least one."""
    found = [float(number) for number in re.findall(pattern, printed)]
    assert found, f"{pattern} is not in\n{printed}"
    return found


@pytest.fixture(scope="module")
def small_cora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small generated graph under the name of Cora, with bags of words."""
    folder = tmp_path_factory.mktemp("data")
    data = generate(num_nodes=600, num_edges=3600, num_classes=7, seed=1)
    masks = {name: getattr(data, name).numpy() for name in ("train_mask", "val_mask", "test_mask")}
    is_of_class = torch.arange(70) % 7 == data.y[:, None]
    words = (torch.rand(600, 70, generator=torch.Generator().manual_seed(0)) < 0.05 + 0.2 * is_of_class).float().numpy()
    np.savez(folder / "Cora.npz", edge_index=data.edge_index.numpy(), x=words, y=data.y.numpy(), **masks)
    return folder


def test_every_example_is_tested_and_in_the_table() -> None:
    files = {file.name for file in EXAMPLES.glob("*.py")}
    assert files
    assert files == set(re.findall(r'run_example\("(\w+\.py)"', Path(__file__).read_text()))
    assert files == set(re.findall(r"^\| \[`(\w+\.py)`\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_docstrings_say_how_and_what(file: Path) -> None:
    docstring = compile(file.read_text(), file.name, "exec").co_consts[0]
    assert f"    python examples/{file.name}" in docstring
    assert re.search(r"\d", docstring.split("prints", 1)[1])


def test_cora_gcn_learns(small_cora: Path) -> None:
    printed = run_example("cora_gcn.py", "--root", small_cora, "--epochs", 50)
    assert "600 nodes, 3600 edges, 70 features, 7 classes" in printed
    assert numbers(r"test accuracy ([\d.]+)%", printed)[-1] > 2 * 100 / 7


def test_cora_gcn_on_cora(data_root: Path) -> None:
    printed = run_example("cora_gcn.py", "--root", data_root, "--epochs", 50)
    assert 78.0 < numbers(r"test accuracy ([\d.]+)%", printed)[-1] < 86.0


def test_gcn2_deep_takes_less_memory_and_learns(small_cora: Path) -> None:
    printed = run_example("gcn2_deep.py", "--root", small_cora, "--layers", 4, "--epochs", 40)
    (full,) = numbers(r"full-batch step +([\d.]+) MiB", printed)
    (step,) = numbers(r"step with histories +([\d.]+) MiB", printed)
    assert full > 2 * step > 0
    (tables,) = numbers(r"tables of histories +([\d.]+) MiB", printed)
    # three tables of 64 floats, and the step at which each row was pushed
    assert tables == pytest.approx(3 * 600 * (64 * 4 + 4) / 2**20, abs=0.05)
    assert numbers(r"test accuracy ([\d.]+)%", printed)[-1] > 2 * 100 / 7


def test_gin_lipschitz_compares_both() -> None:
    printed = run_example("gin_lipschitz.py", "--nodes", 1000, "--epochs", 6)
    assert len(numbers(r"strength ([\d.]+): ", printed)) == 2
    assert min(numbers(r"test accuracy ([\d.]+)%", printed)) > 2 * 100 / 6
    without, penalised = numbers(r"output ([\d.]+)% off", printed)
    assert 0 < penalised < without


@pytest.mark.interop
@pytest.mark.usefixtures("torch_geometric")
def test_pyg_autoscale_gives_what_pyg_gives() -> None:
    printed = run_example("pyg_autoscale.py", "--nodes", 1000, "--epochs", 3)
    assert "Autoscaled(GATConv" in printed
    differences = numbers(r"difference of a logit ([\d.e+-]+)", printed)
    assert len(differences) == 2
    assert max(differences) < 1e-5
    ours, theirs = (numbers(rf"{name} ([\d.]+)%", printed) for name in ("test accuracy", "of PyG"))
    assert ours == pytest.approx(theirs, abs=0.2)
    assert ours[-1] > ours[0]


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("int8", 1)])
def test_histories_in_a_file_are_there(tmp_path: Path, dtype: str, width: int) -> None:
    arguments = ["--nodes", 2000, "--epochs", 2, "--dtype", dtype, "--folder", tmp_path]
    printed = run_example("histories_in_a_file.py", *arguments)
    assert [(tmp_path / f"{name}.table").stat().st_size for name in ("conv2", "conv3")] == [2000 * 256 * width] * 2
    # eight steps an epoch, two layers that read a history
    assert re.search(r"in 32 pulls", printed)
    assert re.search(r"in 32 pushes", printed)
    assert numbers(r"test accuracy ([\d.]+)%", printed)[0] > 2 * 100 / 16


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    printed = run_example("resume.py", "--nodes", 1000, "--epochs", 4, "--folder", tmp_path)
    losses = re.findall(r"epoch +(\d+)  loss ([\d.]+)", printed)
    whole, stopped, resumed = losses[:4], losses[4:6], losses[6:]
    assert len(set(whole)) == 4
    assert stopped + resumed == whole
    assert "resumed after epoch 2" in printed
    assert "equal bit for bit: True" in printed
    assert list(tmp_path.glob("checkpoint/gas-checkpoint-*/manifest.json"))


def test_diagnostics_shows_what_helps() -> None:
    printed = run_example("diagnostics.py", "--nodes", 1000, "--epochs", 3)
    # the settings stand in the order in which they get better
    random, metis, larger = numbers(r"cosine (-?[\d.]+)\n", printed)[:3]
    assert -1.0 <= random < metis < larger <= 1.0
    assert "Theorem 2" in printed


@pytest.mark.interop
def test_diagnostics_draws(tmp_path: Path, import_optional: Callable[[str, str], ModuleType]) -> None:
    import_optional("matplotlib", "plot")
    from matplotlib import image

    file = tmp_path / "diagnosis.png"
    run_example("diagnostics.py", "--nodes", 500, "--epochs", 1, "--figure", file)
    pixels = torch.from_numpy(image.imread(file))
    assert pixels.size(0) > 300
    assert pixels.size(1) > 300
    assert pixels.std() > 0.05
