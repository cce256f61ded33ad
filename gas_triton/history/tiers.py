"""Tiers: where the tables of histories live, and which of them fits."""

from __future__ import annotations

import torch

from gas_triton.history.files import TableFolder
from gas_triton.history.memories import FileMemory, HostMemory, free_host_bytes, gib

__all__ = [
    "TIERS",
    "FileMemory",
    "HostMemory",
    "TableFolder",
    "choose_tier",
    "free_device_bytes",
    "free_host_bytes",
]

TIERS = ("auto", "device", "pinned", "file")

# Of the free memory, what tables may take: activations, gradients and staged rows need the rest of the device.
DEVICE_SHARE = 0.5
HOST_SHARE = 0.8


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a device; None if unknown."""
    if device.type == "cpu":
        return free_host_bytes()
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return None


def choose_tier(
    nbytes: int, device: torch.device, free_device: int | None = None, free_host: int | None = None
) -> tuple[str, str]:
    """The fastest tier in which tables fit and leave room.

    The device if they take at most half of its free memory; else, with a CUDA device, pinned memory if they take at
    most 80% of the free host memory; else files.

    Args:
        nbytes: of all tables.
        device: where the model is.
        free_device: bytes free on the device, measured if None.
        free_host: bytes free on the host, measured if None.

    Returns:
        The tier, and why in one sentence.
    """
    if free_device is None:
        known = device.type == "cpu" and free_host is not None
        free_device = free_host if known else free_device_bytes(device)
    tables = f"the tables take {gib(nbytes)}"
    if free_device is None:
        return "device", f"{tables}; how much memory is free on {device} is unknown"
    on_device = f"half of the {gib(free_device)} free on {device}"
    if nbytes <= free_device * DEVICE_SHARE:
        return "device", f"{tables}, at most {on_device}"
    if device.type != "cuda":
        return "file", f"{tables}, more than {on_device}"
    if free_host is None:
        free_host = free_host_bytes()
    if free_host is None:
        return "file", f"{tables}, more than {on_device}; how much host memory is free is unknown"
    on_host = f"{HOST_SHARE:.0%} of the {gib(free_host)} of free host memory"
    if nbytes <= free_host * HOST_SHARE:
        return "pinned", f"{tables}, more than {on_device} but at most {on_host}"
    return "file", f"{tables}, more than {on_device} and more than {on_host}"
