"""Options and fixtures that every test may use."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which has to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `HYPOTHESIS_PROFILE=nightly`, or --hypothesis-profile nightly, looks for longer.
hypothesis.settings.register_profile("default", max_examples=100, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gas_triton")
    group.addoption(
        "--require-optional",
        action="store_true",
        help="fail, instead of skip, a test whose optional package is not installed",
    )
    group.addoption(
        "--data-root",
        default=os.environ.get("GAS_TRITON_DATA"),
        help="folder with the real graphs, Cora.npz among them (default: $GAS_TRITON_DATA)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # the tensors here are tiny: more threads only wait for each other
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root(pytestconfig: pytest.Config) -> Path:
    """The folder with the real graphs. One that was named but lacks them is an error, not a skip."""
    option = pytestconfig.getoption("--data-root")
    if not option:
        pytest.skip("set GAS_TRITON_DATA or --data-root to the folder with Cora.npz")
    root = Path(option).expanduser()
    if not (root / "Cora.npz").is_file():
        pytest.fail(f"--data-root (or GAS_TRITON_DATA) is {root}, which has no Cora.npz", pytrace=False)
    return root


@pytest.fixture(scope="session")
def import_optional(pytestconfig: pytest.Config) -> Callable[[str, str], ModuleType]:
    """``import_optional("ogb", "pyg")``: the module, or a skip that names the extra which installs it."""

    def load(name: str, extra: str) -> ModuleType:
        # Only a package that is absent skips: one that is there but broken should show.
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
        reason = f"needs {name}: pip install 'gas-triton[{extra}]', or `make interop`"
        if pytestconfig.getoption("--require-optional"):
            pytest.fail(f"--require-optional: {reason}", pytrace=False)
        pytest.skip(reason)

    return load


@pytest.fixture(scope="session")
def torch_sparse(import_optional: Callable[[str, str], ModuleType]) -> ModuleType:
    return import_optional("torch_sparse", "sparse")


@pytest.fixture(scope="session")
def torch_geometric(import_optional: Callable[[str, str], ModuleType]) -> ModuleType:
    return import_optional("torch_geometric", "pyg")


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """Let ``torch.empty`` give NaN (the largest value for integers), so that an output never written shows.

    Not for every test: it switches torch to deterministic algorithms, which is not how users run.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
