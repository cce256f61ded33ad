"""Files that `train` writes besides checkpoints: found unwritable early, and a trace whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gas_triton.memory import without_log

__all__ = ["check_output", "trace"]


@contextmanager
def trace(file: str | os.PathLike[str], device: torch.device) -> Iterator[None]:
    """Writes a Chrome trace of the block, if it ends well."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with without_log(), torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        yield
    # beside it first: the profiler does not say that it could not write
    draft = Path(f"{os.fspath(file)}.part")
    try:
        profiler.export_chrome_trace(str(draft))
        with open(draft, "rb") as written:
            written.seek(-64, os.SEEK_END)
            is_whole = written.read().rstrip().endswith(b"}")
        if not is_whole:
            raise OSError(f"{draft} is not whole")
        os.replace(draft, file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(f"the trace was not written to {file}: {error}") from error


def check_output(name: str, file: Path) -> None:
    """Raises ValueError or OSError, before anything is trained, if `file` cannot be written; `name` is the argument."""
    if not file.parent.is_dir() or file.is_dir():
        raise ValueError(f"{name} must name a file in a folder that exists, got {file}")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        message = f"{name}: the folder {file.parent} cannot be written ({error.strerror})"
        raise OSError(error.errno, message) from error
