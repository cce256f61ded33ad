"""What every benchmark shares: a fixed seed, and the versions in the JSON that pytest-benchmark writes."""

from typing import Any

import pytest
import torch

from bench.side_by_side import machine


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Called by pytest-benchmark."""
    machine_info["gas_triton"] = machine()
