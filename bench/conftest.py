"""What every benchmark shares: its cases, a fixed seed, and the versions in the JSON that pytest-benchmark writes."""

from typing import Any

import pytest
import torch

from bench.groups import Setting
from bench.side_by_side import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gas_triton bench")
    group.addoption("--bench-size", choices=["full", "quick", "tiny"], default="quick", help="which cases to run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`test_*(benchmark, case, way)` runs for each of the module's cases and ways."""
    if {"case", "way"} <= set(metafunc.fixturenames):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cases = metafunc.module.cases(Setting(device, size=metafunc.config.getoption("--bench-size")))
        # ways in the inner loop: the group that a case made is kept until the next case
        metafunc.parametrize("case", cases, ids=[case.title for case in cases], scope="module")
        metafunc.parametrize("way", metafunc.module.WAYS, scope="module")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Called by pytest-benchmark."""
    machine_info["gas_triton"] = machine()
