"""The choice of a tier."""

import pytest
import torch

from gas_triton.history import tiers
from gas_triton.history.tiers import TIERS, choose_tier, free_device_bytes, free_host_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30


@pytest.mark.parametrize(
    "nbytes, device, free_device, free_host, tier, why",
    [
        (
            10 * GIB,
            CUDA,
            20 * GIB,
            0,
            "device",
            "the tables take 10.0 GiB, at most half of the 20.0 GiB free on cuda:0",
        ),
        (
            10 * GIB + 1,
            CUDA,
            20 * GIB,
            100 * GIB,
            "pinned",
            "the tables take 10.0 GiB, more than half of the 20.0 GiB free on cuda:0 but at most 80% of the 100.0 GiB "
            "of free host memory",
        ),
        (80 * GIB, CUDA, 20 * GIB, 100 * GIB, "pinned", "80.0 GiB"),
        (80 * GIB + 1, CUDA, 20 * GIB, 100 * GIB, "file", "and more than 80% of the 100.0 GiB of free host memory"),
        (5 * GIB, CPU, None, 10 * GIB, "device", "the tables take 5.0 GiB, at most half of the 10.0 GiB free on cpu"),
        (
            5 * GIB + 1,
            CPU,
            None,
            10 * GIB,
            "file",
            "the tables take 5.0 GiB, more than half of the 10.0 GiB free on cpu",
        ),
        (4 * GIB, CPU, 6 * GIB, 100 * GIB, "file", "more than half of the 6.0 GiB"),
        (2**20, CUDA, 2**21, None, "device", "the tables take 1.0 MiB, at most half of the 2.0 MiB free on cuda:0"),
        (
            GIB,
            torch.device("meta"),
            None,
            None,
            "device",
            "the tables take 1.0 GiB; how much memory is free on meta is",
        ),
    ],
)
def test_choice_of_a_tier(nbytes: int, device: torch.device, free_device, free_host, tier: str, why: str) -> None:
    chosen, reason = choose_tier(nbytes, device, free_device, free_host)
    assert chosen == tier
    assert chosen in TIERS[1:]
    assert why in reason


def test_choice_measures_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    assert free_device_bytes(CUDA) == 4 * GIB
    assert choose_tier(2 * GIB, CUDA)[0] == "device"
    free = free_host_bytes()
    assert free is not None
    assert choose_tier(2 * GIB + 1, CUDA, free_host=2 * GIB)[0] == "file"
    assert choose_tier(free // 4, CPU)[0] == "device"
    assert choose_tier(free, CPU)[0] == "file"
    assert free_device_bytes(torch.device("meta")) is None


def test_choice_where_free_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "free_host_bytes", lambda: None)
    assert choose_tier(GIB, CPU) == ("device", "the tables take 1.0 GiB; how much memory is free on cpu is unknown")
    tier, why = choose_tier(GIB, CUDA, free_device=GIB)
    assert tier == "file"
    assert "how much host memory is free is unknown" in why
