"""Checkpoints: a folder with the state of a run and its histories, replaced as a whole or not at all.

    folder/gas-checkpoint-000012/manifest.json   what there is, with sizes and check sums
                                 state.pt        what torch.save holds: parameters, optimizer, generators
                                 tensor-0.bin    one raw file for each tensor of the histories

A save writes a hidden sibling, flushes it to the disk and renames it; only then is the one before it removed. So a
folder needs room for two. Whatever has a number is complete, and the highest number counts.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from gas_triton.graph import Graph
from gas_triton.history import Histories

__all__ = ["checksum", "has_checkpoint", "load_checkpoint", "lock_folder", "save_checkpoint", "write_checkpoint"]

FORMAT = "gas_triton checkpoint"
VERSION = 1
_PIECE = 64 * 2**20
_COMPLETE = re.compile(r"gas-checkpoint-(\d{6,})")
_LEFTOVER = re.compile(r"\.gas-checkpoint-\d{6,}\.(writing|removing)")


def save_checkpoint(
    folder: str | os.PathLike[str], state: Mapping[str, Any], histories: Mapping[str, Any] | None = None
) -> Path:
    """Saves a state and histories into a folder, in place of what it held.

    Killed at any moment, it leaves a folder that loads: the checkpoint before it or this one. Tables are written piece
    by piece, never copied as a whole.

    Args:
        folder: made if it is not there; other files in it are left alone.
        state: what `torch.save` can hold and `torch.load(weights_only=True)` gives back.
        histories: a `Histories`, or what its `state_dict` gave; None saves none.

    Returns:
        The folder of this checkpoint, inside `folder`.

    Raises:
        TypeError: a value that could not be read back.
        OSError: no room, no permission, `folder` is a file, or another save is writing there. The checkpoint that was
            there is intact.
    """
    with lock_folder(folder):
        return write_checkpoint(folder, state, histories)


def load_checkpoint(
    folder: str | os.PathLike[str], histories: Histories | None = None, graph: Graph | None = None
) -> dict[str, Any]:
    """Reads the newest checkpoint of a folder; all files are checked before anything is written.

    Args:
        folder: as in `save_checkpoint`.
        histories: are given the rows of the checkpoint, in place; None leaves those unread.
        graph: the graph that will be trained on, whose row order the histories must have.

    Returns:
        The state, with tensors on the CPU.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a file that is missing, damaged, of another program or of a newer version, or histories that do not
            fit, as `Histories.load_state_dict` says.
    """
    folder = Path(folder)
    while True:
        newest = _newest(folder)
        if newest is None:
            what = "is a file, not a folder with a checkpoint" if os.path.isfile(folder) else "holds no checkpoint"
            raise FileNotFoundError(f"{folder} {what}")
        try:
            return _load(newest, histories, graph)
        except (OSError, ValueError, RuntimeError):
            # a save that ended meanwhile has removed the files
            if _newest(folder) == newest:
                raise


def has_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether `load_checkpoint` would find a checkpoint."""
    return _newest(Path(folder)) is not None


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes from saving into a folder, which is made if it is not there.

    Raises:
        OSError: another process saves there, or the folder cannot be written.
    """
    if not os.fspath(folder):
        raise ValueError("folder must name a folder, got ''")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".gas-checkpoint.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = "it is a file" if os.path.exists(folder) and not os.path.isdir(folder) else error.strerror
        raise OSError(error.errno, f"checkpoints cannot be saved in {folder}: {reason}") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, f"another process saves checkpoints in {folder}") from None
        yield
    finally:
        os.close(file)


def write_checkpoint(
    folder: str | os.PathLike[str], state: Mapping[str, Any], histories: Mapping[str, Any] | None = None
) -> Path:
    """`save_checkpoint` for a caller that holds `lock_folder`."""
    folder = Path(folder)
    tables = histories.state_dict() if isinstance(histories, Histories) else histories
    _check(state, tables)
    newest = _newest(folder)
    number = 1 if newest is None else _number(newest) + 1
    final = folder / f"gas-checkpoint-{number:06d}"
    temporary = folder / f".{final.name}.writing"
    try:
        _remove_others(folder, newest)
        temporary.mkdir()
        _write(temporary, state, tables)
        os.rename(temporary, final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(error.errno, _not_saved(folder, error, state, tables, newest)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _remove_others(folder, final)
    return final


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the values of some tensors, read piece by piece."""
    crc = 0
    for tensor in tensors:
        for piece in _pieces(tensor):
            crc = zlib.crc32(piece, crc)
    return crc


# --- writing ----------------------------------------------------------------------------------------------------------


class _Summed:
    """A file that counts and sums what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        nbytes = memoryview(data).nbytes
        self.size += nbytes
        return nbytes

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def _create(path: Path, entry: dict[str, Any]) -> Iterator[_Summed]:
    """A new file that is on the disk when the block ends; its size and sum go into `entry`."""
    with open(path, "wb") as file:
        out = _Summed(file)
        yield out
        file.flush()
        os.fsync(file.fileno())
    entry |= {"file": path.name, "size": out.size, "crc32": out.crc}


def _write(temporary: Path, state: Mapping[str, Any], tables: Mapping[str, Any] | None) -> None:
    content: dict[str, Any] = {"state": {}, "histories": None if tables is None else {}}
    try:
        with _create(temporary / "state.pt", content["state"]) as out:
            torch.save(dict(state), cast(BinaryIO, out))
        # what only a pickle could hold would be found out when it is needed
        torch.load(temporary / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise TypeError(f"state holds something that torch.load(weights_only=True) cannot read: {error}") from error
    count = 0
    for layer, values in (tables or {}).items():
        content["histories"][layer] = entries = {}
        for key, value in values.items():
            if not isinstance(value, Tensor):
                entries[key] = {"value": value}
                continue
            entries[key] = entry = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            with _create(temporary / f"tensor-{count}.bin", entry) as out:
                for piece in _pieces(value):
                    out.write(piece)
            count += 1
    manifest = {"format": FORMAT, "version": VERSION, "crc32": _content_sum(content), "content": content}
    with _create(temporary / "manifest.json", {}) as out:
        out.write((json.dumps(manifest, indent=1) + "\n").encode())
    _sync_folder(temporary)


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, about `_PIECE` at once, without a copy where they lie on the CPU in order."""
    tensor = tensor.detach()
    if tensor.is_contiguous() or tensor.dim() == 0:
        tensor = tensor.reshape(-1)
    rows = max(_PIECE // max(tensor[:1].nbytes, 1), 1)
    for start in range(0, tensor.size(0), rows):
        piece = tensor[start : start + rows].cpu().contiguous().reshape(-1)
        yield piece.view(torch.uint8).numpy().data


def _check(state: Mapping[str, Any], tables: Mapping[str, Any] | None) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping, got {type(state).__name__}")
    if tables is not None and not isinstance(tables, Mapping):
        raise TypeError(f"histories must be a Histories or its state_dict(), got {type(tables).__name__}")
    for layer, values in (tables or {}).items():
        if not isinstance(values, Mapping):
            raise TypeError(f"histories: {layer} must be a mapping of names to values, got {type(values).__name__}")
        for key, value in values.items():
            if value is not None and not isinstance(value, Tensor | bool | int | float | str):
                raise TypeError(
                    f"histories: {layer}'s {key} must be a tensor, number or str, got {type(value).__name__}"
                )


def _not_saved(
    folder: Path, error: OSError, state: Mapping[str, Any], tables: Mapping[str, Any] | None, newest: Path | None
) -> str:
    needed = (_nbytes(state) + _nbytes(tables)) / 2**20
    try:
        room = f"{needed:.1f} MiB are needed, {shutil.disk_usage(folder).free / 2**20:.1f} MiB are free"
    except OSError:
        room = f"{needed:.1f} MiB are needed"
    before = "there was none before" if newest is None else f"the one before, {newest.name}, is intact"
    return f"the checkpoint was not saved in {folder}: {error.strerror or error} ({room}); {before}"


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_nbytes, value))


def _remove_others(folder: Path, kept: Path | None) -> None:
    """Removes older checkpoints and what a killed save left; what cannot be removed is tried again by the next save."""
    for path in list(folder.iterdir()):
        if _COMPLETE.fullmatch(path.name) and kept is not None and _number(path) < _number(kept):
            # what has a number is complete, also when this is killed half-way
            hidden = path.with_name(f".{path.name}.removing")
            try:
                os.rename(path, hidden)
            except OSError:
                continue
            shutil.rmtree(hidden, ignore_errors=True)
        elif _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# --- reading ----------------------------------------------------------------------------------------------------------


def _newest(folder: Path) -> Path | None:
    try:
        found = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return None
    return max(found, key=_number, default=None)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _load(path: Path, histories: Histories | None, graph: Graph | None) -> dict[str, Any]:
    content = _read_manifest(path / "manifest.json")
    file = _check_file(path, content["state"])
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} cannot be read by torch {torch.__version__}: {error}") from error
    if histories is not None:
        if content["histories"] is None:
            raise ValueError(f"{path} holds no histories")
        histories.load_state_dict(
            {
                layer: {key: _read_value(path, entry) for key, entry in entries.items()}
                for layer, entries in content["histories"].items()
            },
            graph,
        )
    return state


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file.parent} is not a checkpoint of gas_triton: it has no {file.name}") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: expected JSON, got {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        given = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"{file} is not of a {FORMAT}: its format is {given!r}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{file} has format version {manifest.get('version')!r} but this gas_triton reads {VERSION}: use the "
            "gas_triton that wrote it, or a newer one"
        )
    expected, got = manifest.get("crc32"), _content_sum(manifest.get("content"))
    if expected != got:
        raise ValueError(f"{file} is damaged: expected check sum {expected}, got {got}")
    return manifest["content"]


def _content_sum(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _check_file(path: Path, entry: dict[str, Any]) -> Path:
    """The file of an entry, whose size and check sum are those of the manifest."""
    file = path / entry["file"]
    crc, buffer = 0, bytearray(min(_PIECE, max(entry["size"], 1)))
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            raise ValueError(f"{file} is damaged: expected {entry['size']} bytes, got {size}")
        with open(file, "rb", buffering=0) as data:
            while read := data.readinto(buffer):
                crc = zlib.crc32(memoryview(buffer)[:read], crc)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: expected {entry['size']} bytes") from None
    if crc != entry["crc32"]:
        raise ValueError(f"{file} is damaged: expected check sum {entry['crc32']}, got {crc}")
    return file


def _read_value(path: Path, entry: dict[str, Any]) -> Any:
    """A value of the manifest, or a tensor that maps its file, so that only what is copied from it takes memory."""
    if "value" in entry:
        return entry["value"]
    file = _check_file(path, entry)
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    if math.prod(shape) * dtype.itemsize != entry["size"]:
        raise ValueError(f"{file} has {entry['size']} bytes, which is not a {dtype} tensor of shape {shape}")
    if entry["size"] == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(file), shared=False, size=math.prod(shape), dtype=dtype).reshape(shape)
