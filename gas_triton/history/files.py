"""The folder that the tables of a file tier are in."""

from __future__ import annotations

import copy
import errno
import fcntl
import glob
import json
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch

from gas_triton.history.memories import FileMemory, bytes_of

FORMAT = "gas_triton table"
VERSION = 1


class TableFolder:
    """The folder of a file tier: the files of every table, a header for each, and a lock.

    Table NAME has a file NAME.KEY for each tensor and the header NAME.json, which says what the files hold, whether
    they changed since the last flush, and the state that was given to it.

    Args:
        path: the folder, created if missing and locked until `close`. None makes a temporary one, in $TMPDIR or
            /var/tmp, that is removed by `close` and at exit. The kernel frees the space of its tables even if the
            process is killed.
        reopen: continue with the tables that the folder holds.

    Raises:
        ValueError: the folder holds tables and `reopen` is False, or `reopen` without a path.
        RuntimeError: the folder is in use.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, reopen: bool = False) -> None:
        if path is None and reopen:
            raise ValueError("reopen=True needs the path of the folder that holds the tables, got None")
        self.temporary = path is None
        self.reopen = reopen
        # names of the tables that were there before
        self.reopened: set[str] = set()
        self._headers: dict[str, dict[str, Any]] = {}
        self._memories: dict[str, dict[str, FileMemory]] = {}
        try:
            self.path = make_temporary() if path is None else Path(path).absolute()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            where = "a temporary folder" if path is None else Path(path).absolute()
            reason = "it is a file" if path is not None and Path(path).is_file() else error.strerror
            raise OSError(
                error.errno,
                f"the file tier cannot use {where} ({reason}): give the path of a folder that can be written",
            ) from error
        try:
            self._take(lock)
            found = tables_in(self.path)
            if found and not reopen:
                raise ValueError(
                    f"{self.path} already holds the tables {', '.join(found)}: pass reopen=True (gas-triton train: "
                    "--resume) to continue with them, or delete the folder"
                )
        except BaseException:
            os.close(lock)
            raise
        self._owner = os.getpid()
        self._release = weakref.finalize(self, release, lock, self.path if self.temporary else None, os.getpid())

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            whose = "this process" if owner == str(os.getpid()) else "process"
            raise RuntimeError(
                f"{self.path} is in use by {whose} {owner}: give every process a folder of its own, or wait for it"
            ) from None
        except OSError as error:
            raise OSError(
                error.errno,
                f"the file system of {self.path} cannot lock files ({error.strerror}): give a folder on a local disk",
            ) from error
        content = os.pread(lock, 32, 0).strip()
        if content and not content.isdigit():
            raise ValueError(f"{self.path / 'lock'} is not the lock of a history folder: give another folder")
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    def create(
        self, name: str, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], about: dict[str, Any]
    ) -> dict[str, FileMemory]:
        """Makes a table, zero, or opens the one that the folder has.

        All space is taken now, so that a full disk is an error here and not a crash when a row is written.

        Args:
            name: of the table; any characters.
            tensors: shape and dtype of each of its tensors, by key; keys are identifiers.
            about: what a table must agree on to be continued; goes through JSON.

        Returns:
            The memory of each tensor.

        Raises:
            ValueError: files of the table are there but cannot be continued, or not to be; nothing is written then.
            OSError: the disk is full, or cannot be written; no file of the table is left then.
        """
        self._check_open()
        if name in self._headers:
            raise ValueError(f"{self.path} has a table {name!r} already")
        for key in tensors:
            if not key.isidentifier() or key == "json":
                raise ValueError(f"{name}: keys of tensors must be identifiers other than json, got {key!r}")
        files = {key: self.path / f"{file_name(name)}.{key}" for key in tensors}
        expected: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "byteorder": sys.byteorder,
            "tensors": {
                key: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
                for key, (shape, dtype) in tensors.items()
            },
            "about": json.loads(json.dumps(about)),
        }
        there = [path for path in (self._header_path(name), *files.values()) if path.exists()]
        if there and not (self.reopen and self._header_path(name).exists()):
            raise ValueError(
                f"{there[0]} exists and is not a table to continue with: delete it, or give another folder"
            )
        if there:
            header = self._read_header(name, expected)
            for key, path in files.items():
                want = bytes_of(*tensors[key])
                found = path.stat().st_size if path.exists() else None
                if found != want:
                    has = "is missing" if found is None else f"has {found} bytes"
                    raise ValueError(f"{path} {has}, expected {want} bytes: delete the incomplete table {name!r}")
        else:
            header = expected | {"clean": False, "state": None}
        memories = self._map(name, files, tensors, None if there else header)
        self._headers[name], self._memories[name] = header, memories
        if there:
            self.reopened.add(name)
        return dict(memories)

    def _map(
        self,
        name: str,
        files: dict[str, Path],
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
        new: dict[str, Any] | None,
    ) -> dict[str, FileMemory]:
        """Maps a table's files; makes them first, and the header, if there is a `new` one."""
        sizes = {key: bytes_of(*tensors[key]) for key in files}
        free = shutil.disk_usage(self.path).free
        made = []
        try:
            if new is not None:
                # Asking for more would fill the disk, for everyone, before it fails.
                if sum(sizes.values()) > free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                # First, so that a process killed in between leaves files that are known as an incomplete table.
                made.append(self._header_path(name))
                self._write_header(name, new)
            for key, path in files.items():
                # An old file is whole, but a copy of one may have holes where it has zeros.
                if new is None and path.stat().st_blocks * 512 >= sizes[key]:
                    continue
                flags = os.O_RDWR | os.O_CLOEXEC | (0 if new is None else os.O_CREAT | os.O_EXCL)
                descriptor = os.open(path, flags, 0o666)
                if new is not None:
                    made.append(path)
                try:
                    os.posix_fallocate(descriptor, 0, sizes[key])
                finally:
                    os.close(descriptor)
            memories = {key: FileMemory(path, *tensors[key]) for key, path in files.items()}
        except BaseException as error:
            for path in made:
                path.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno,
                f"{name}: the file tier needs {sum(sizes.values())} bytes in {self.path}, where {free} are free "
                f"({error.strerror}): make room, or give another folder",
            ) from error
        if self.temporary:
            # Without a name the space goes with the last user, even one that is killed.
            for path in files.values():
                path.unlink()
        return memories

    def _read_header(self, name: str, expected: dict[str, Any]) -> dict[str, Any]:
        path = self._header_path(name)
        try:
            header = json.loads(path.read_bytes())
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"{path} is not the header of a history table: give another folder")
        for field, want in expected.items():
            if header.get(field) != want:
                raise ValueError(
                    f"{path}: {field} is {header.get(field)!r}, expected {want!r}: use the model, graph and dtype that "
                    "the table was made for, or delete the folder"
                )
        if not isinstance(header.get("clean"), bool) or not isinstance(header.get("state"), dict | None):
            raise ValueError(f"{path} is damaged: it does not say whether the table is complete")
        return header

    def read_state(self, name: str) -> dict[str, Any] | None:
        """The state given to the last flush; None if the table is new or was marked dirty since."""
        header = self._header(name)
        return copy.deepcopy(header["state"]) if header["clean"] else None

    def mark_dirty(self, name: str) -> None:
        """Says on disk that the table does not have its last state any more. Call it before the first change."""
        self._check_owner()
        header = self._header(name)
        if header["clean"]:
            self._write_header(name, dirty := header | {"clean": False, "state": None})
            self._headers[name] = dirty

    def flush(self, name: str, state: dict[str, Any]) -> None:
        """Returns when the table is on the disk, together with `state`.

        Args:
            name: of the table.
            state: what `read_state` will give; goes through JSON.
        """
        self._check_owner()
        header = self._header(name) | {"clean": True, "state": json.loads(json.dumps(state))}
        for memory in self._memories[name].values():
            memory.flush()
        self._write_header(name, header)
        self._headers[name] = header

    def discard(self) -> None:
        """Removes the tables that were made since the folder was opened, and unlocks it."""
        for name in set(self._headers) - self.reopened:
            for path in self.path.glob(f"{glob.escape(file_name(name))}.*"):
                path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Unlocks the folder, and removes a temporary one. Does not flush, and leaves the memories to their owners."""
        self._release()
        self._headers.clear()
        self._memories.clear()

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(
                f"the tables in {self.path} belong to process {self._owner}, of which this is a fork: give the fork "
                "histories of its own"
            )

    def _check_open(self) -> None:
        if not self._release.alive:
            raise RuntimeError(f"the folder {self.path} is closed")

    def _header(self, name: str) -> dict[str, Any]:
        self._check_open()
        if name not in self._headers:
            raise ValueError(f"{self.path} has no table {name!r} open, only {list(self._headers)}")
        return self._headers[name]

    def _header_path(self, name: str) -> Path:
        return self.path / f"{file_name(name)}.json"

    def _write_header(self, name: str, header: dict[str, Any]) -> None:
        path = self._header_path(name)
        # No table has a file of this name: ~ is in no key.
        draft = path.with_name(path.name + "~")
        try:
            with open(draft, "wb") as file:
                file.write(json.dumps(header, indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(error.errno, f"{path} cannot be written ({error.strerror}): make room") from error
            raise
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def file_name(table: str) -> str:
    """A table's name as that of a file: all but letters, digits and _.-~ become %XX."""
    return quote(table, safe="")


def tables_in(path: Path) -> list[str]:
    """Names of the tables that a folder holds."""
    start = json.dumps({"format": FORMAT}, indent=1)[:-2].encode()
    found = []
    for header in path.glob("*.json"):
        if header.is_file():
            with open(header, "rb") as file:
                if file.read(len(start)) == start:
                    found.append(unquote(header.name.removesuffix(".json")))
    return sorted(found)


def make_temporary() -> Path:
    """A new folder for large files."""
    return Path(tempfile.mkdtemp(prefix="gas_triton_", dir=large_file_folder()))


def large_file_folder() -> Path:
    """Where large temporary files are made: $TMPDIR, or /var/tmp."""
    # Not tempfile's own default: /tmp is in memory on many systems, where a file tier would save none.
    place = os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK | os.X_OK) else None)
    return Path(place or tempfile.gettempdir())


def release(lock: int, temporary: Path | None, owner: int) -> None:
    """Unlocks a folder and removes it if it is temporary, unless this process is a fork of the owner."""
    if os.getpid() != owner:
        return
    os.ftruncate(lock, 0)
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    # By hand: a forked process has the lock too, and would keep it as long as it runs.
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)
