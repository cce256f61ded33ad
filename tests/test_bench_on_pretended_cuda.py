"""Every part of the benchmarks for GPUs on a pretended one: no tensor, index or generator is on the wrong device."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import numpy as np
import pytest
import torch

from bench.ceilings import measure_ceilings
from bench.groups import Row, Setting
from bench.runner import PARTS
from tests.pretend_cuda import pretended_cuda

# the first two take longest, and tests/test_correctness.py has the checks; a ceiling is no matter of devices
OTHERS = ("prefetch", "scale", "correctness", "ceilings")
NAMES = [name for name, entry in PARTS.items() if "cuda" in entry.devices and name not in OTHERS]


@pytest.mark.parametrize("name", NAMES)
def test_part_keeps_to_its_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torch_geometric") is not None:
        import torch_geometric.typing

        # a build for CPUs looks into tensors for itself
        monkeypatch.setattr(torch_geometric.typing, "WITH_TORCH_SCATTER", False)
    monkeypatch.setattr("bench.ceilings.SECONDS", 1e-4)
    module = importlib.import_module(PARTS[name].module)
    with warnings.catch_warnings(), pretended_cuda() as device:
        warnings.simplefilter("ignore")
        ceilings = measure_ceilings(device, 1 << 23)
        rows: list[Row] = module.measure(Setting(device, "tiny", 1e-4, ceilings))
    assert rows
    assert {row["missing"] for row in rows if row["way"] == "gas_triton" and "missing" in row} == set()


def test_pretended_device_refuses_what_a_gpu_would() -> None:
    with pretended_cuda() as device:
        there, here = torch.arange(6.0, device=device).view(3, 2), torch.ones(3, 2)
        index = torch.tensor([2, 0], device=device)
        assert there.device == torch.device("cuda", 0)
        assert there[index].tolist() == there[index.cpu()].tolist() == [[4.0, 5.0], [0.0, 1.0]]
        assert (there * torch.tensor(2.0)).cpu().tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
        for mixed in (
            lambda: there + here, lambda: here[index], lambda: there.index_select(0, index.cpu()),
            lambda: torch.cat([there, here]), lambda: there @ here.T,
            lambda: torch.rand(3, generator=torch.Generator(), device=device),
            lambda: torch.rand(3, generator=torch.Generator(device)),
        ):  # fmt: skip
            with pytest.raises(AssertionError, match=r"of the host|generator"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
