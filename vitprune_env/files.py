"""Tensors and JSON values on disk: one safetensors file each, with a JSON header, written atomically and durably.

Nothing is ever unpickled. Every file names its kind and format and holds a checksum, so that a foreign or damaged one
is refused with a message. If writing is interrupted (SIGKILL, a full disk, a power cut), the old file stays as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitprune_env.errors import CheckpointError, SettingsError, StorageError

try:
    __version__ = version("vitprune-env")
except PackageNotFoundError:  # not installed, only on the path
    __version__ = "unknown"

FORMAT = 1
HEADER = "vitprune_env"
CHECKSUM = "sha256"  # in the metadata of a file; weight files of others have none
OURS = {HEADER, "architecture"}  # of these keys of the metadata our files have one
OWN = {*OURS, "format", "img_size", "num_classes", "class_names", "global_pool", "options"}  # and no others
LOCK = ".lock"
SUFFIX = ".vitprune.tmp"  # of temporary files
PROBE, PROBE_BYTES = ".writable", 1 << 16
PathLike = str | os.PathLike[str]


def save_state(state: Mapping[str, Any], path: PathLike, kind: str = "training") -> Path:
    """Write a tree of dicts and lists with tensors and JSON values at its leaves.

    Args:
        state: the tree.
        path: file name, customarily ending in `.safetensors`.
        kind: name of this kind of file; `load_state` must be given the same.

    Returns:
        The path.
    """
    tensors: dict[str, Tensor] = {}
    header = {"kind": kind, "tree": _strip(state, "", tensors)}
    return write_file(Path(path), tensors, header)


def load_state(path: PathLike, kind: str = "training") -> dict[str, Any]:
    """Read what `save_state` wrote; tensors come back on the CPU, tuples as lists.

    Raises:
        CheckpointError: if the file is missing, damaged, or something else.
    """
    tensors, header = read_file(Path(path), kind)
    try:
        return _graft(header["tree"], tensors)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: a {kind} state whose content does not fit together ({error})") from error


def _strip(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors by references; dicts become lists of pairs, because JSON keys are strings."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"items": [[key, _strip(value, f"{name}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_strip(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _graft(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_strip`."""
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _graft(value, tensors) for key, value in tree["items"]}
    if isinstance(tree, list):
        return [_graft(value, tensors) for value in tree]
    return tree


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file with a checksum of tensors and metadata; the same bytes for the same values."""
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"format": "pt", **metadata}
    content = save(own, {**metadata, CHECKSUM: checksum(own, metadata)})
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes it in random order
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of tensors on the CPU, their names, types and shapes, and of the metadata of their file."""
    shapes = {name: (str(value.dtype), list(value.shape)) for name, value in sorted(tensors.items())}
    found = sha256(json.dumps([sorted(metadata.items()), shapes]).encode())
    for name in shapes:
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: if it cannot be read, or is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got something unreadable ({error})") from error
    written = metadata.pop(CHECKSUM, None)
    if written is not None and (written != checksum(tensors, metadata) or not _is_plain(path)):
        raise CheckpointError(f"{path}: expected what was written, got a damaged file (its checksum differs)")
    if OURS & metadata.keys() and (other := metadata.keys() - OWN):
        raise CheckpointError(f"{path}: expected what was written, got a damaged file (it holds {sorted(other)})")
    return tensors, metadata


def _is_plain(path: Path) -> bool:
    """Whether the header of a file is as `encode` writes it, to the last space: another would be read alike."""
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    return text.rstrip(b" ") == json.dumps(json.loads(text), separators=(",", ":")).encode()


def write_file(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> Path:
    """Write a safetensors file with a JSON header, see `replace_file`.

    Args:
        path: file name; its folder is made.
        tensors: what to keep, by name.
        header: JSON values, with a `"kind"` that `read_file` checks; a `"format"` in it replaces `FORMAT`.

    Returns:
        The path.

    Raises:
        StorageError: if it cannot be written.
    """
    header = {"format": FORMAT, "versions": versions(), **header}
    return replace_file(path, encode(tensors, {HEADER: json.dumps(header)}))


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file atomically: during and after a crash the path holds the old content or the new, never a mixture.

    The content goes to a temporary file beside it, which is flushed to the disk and renamed; then the folder is
    flushed. Without the first flush a renamed file could be empty after a power cut.

    Args:
        path: file name; its folder is made.
        content: the new content.

    Returns:
        The path.

    Raises:
        StorageError: if the file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: could not be written ({error.strerror or error}); what was there is kept"
        ) from error
    return path


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut; systems that cannot open folders (Windows) do not need it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prepare_folder(folder: Path) -> None:
    """Make a folder, check that files can be written there, and remove temporary files of killed processes.

    Raises:
        StorageError: if nothing can be written there.
    """
    try:
        replace_file(folder / PROBE, bytes(PROBE_BYTES)).unlink()
        for leftover in folder.glob(f".*{SUFFIX}"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"output: expected a folder that can be written, got {folder} ({_reason(error)})") from error


def make_way(folder: Path, results: Sequence[str], overwrite: bool) -> None:
    """Refuse a folder that holds a run, or remove the files that say so.

    Args:
        folder: of a run that is not to go on with what is there.
        results: names of files that a run leaves there.
        overwrite: whether the run may be replaced.

    Raises:
        SettingsError: for a folder with a run that may not be replaced.
    """
    found = [folder / name for name in results if (folder / name).exists()]
    if found and not overwrite:
        raise SettingsError(
            f"output: expected a folder without a run, got {folder}, which holds {found[0].name}; resume=True goes on "
            "with the run, overwrite=True replaces it"
        )
    for path in found:
        path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the same folder of results; the lock goes when its process does.

    Raises:
        StorageError: if another process holds it, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"output: expected a folder of this run alone, got {folder}, which another process writes to"
        ) from error
    except OSError as error:
        raise StorageError(f"output: expected a folder that can be written, got {folder} ({_reason(error)})") from error
    try:
        yield
    finally:
        lock.release()


def _reason(error: OSError) -> str:
    """The system's message, without the sentence that `replace_file` puts around it."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return cause.strerror or str(cause)


def read_file(
    path: Path, kind: str, formats: Mapping[int, Collection[str]] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `write_file` wrote.

    Args:
        path: file name.
        kind: what the file must be.
        formats: the formats that are read, each with the kinds that it has; None: `FORMAT` with `kind`.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another kind or format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a {kind} file, found none")
    tensors, metadata = read_tensors(path)
    if HEADER not in metadata:
        raise CheckpointError(f"{path}: expected a file written by vitprune_env, got one without its header")
    try:
        header = dict(json.loads(metadata[HEADER]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a JSON object as header, got something damaged ({error})") from error
    formats = {FORMAT: (kind,)} if formats is None else formats
    found, known = header.get("format"), sorted({name for kinds in formats.values() for name in kinds})
    if header.get("kind") not in known:
        raise CheckpointError(f"{path}: expected a {kind} file, got a {header.get('kind')} file")
    if found not in list(formats) or header["kind"] not in formats[found]:
        expected = " or ".join(map(str, sorted(formats)))
        raise CheckpointError(f"{path}: expected format {expected}, got {found}; made by another version")
    return tensors, header


def versions() -> dict[str, str]:
    """Versions of this package, torch and timm."""
    return {"vitprune_env": __version__, "torch": torch.__version__, "timm": timm.__version__}
