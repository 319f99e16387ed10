"""A folder of generated arrays, so that data that takes minutes to make is made once."""

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


class CacheError(OSError):
    """The cache folder cannot be written."""


def cache_folder(folder: Path | str | None = None) -> Path:
    """`folder`, else the environment's FLARE_JAX_CACHE, else the platform's cache of the user."""
    if folder is None:
        folder = os.environ.get("FLARE_JAX_CACHE") or None
    if folder is not None:
        return Path(folder).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flare_jax"


def cached(
    generate: Callable[[], Arrays],
    name: str,
    parameters: Mapping[str, object],
    *,
    folder: Path | str | None = None,
) -> Arrays:
    """The arrays of `generate()`, from the cache if they are there, else made and kept.

    The file is named by `name` and a digest of `parameters`: everything the arrays depend on, the
    version of the generator included, as plain JSON values. It is written beside its place and
    renamed, so that no reader sees half of it. A damaged file is made again, with a note in the
    log.

    Raises:
      CacheError: the folder cannot be made or written, or its disk is full. Whether it can be
        written is tried before anything is generated.
    """
    text = json.dumps(dict(parameters), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = cache_folder(folder)
    path = folder / f"{name}-{digest}.npz"
    if path.exists():
        arrays = _load(path, text)
        if arrays is not None:
            return arrays
        log.warning("cache file %s is damaged: generating its data again", path)
    _attempt(folder, lambda: _save(path, {}, text, keep=False))
    arrays = generate()
    _attempt(folder, lambda: _save(path, arrays, text))
    return arrays


def _load(path: Path, text: str) -> Arrays | None:
    """Arrays of a cache file, or None if it is damaged or made from other parameters."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}  # checks the CRC of each
    except Exception:  # zip, zlib and the array format have errors of their own
        return None
    return arrays if str(arrays.pop("parameters", "")) == text else None


def _save(path: Path, arrays: Arrays, text: str, keep: bool = True) -> None:
    """Writes `arrays` to a temporary file and renames it to `path`, or deletes it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, parameters=np.array(text), **arrays)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _attempt(folder: Path, write: Callable[[], None]) -> None:
    """Runs `write`; a refusal of the system becomes an error that says where and what to do."""
    try:
        write()
    except OSError as e:
        raise CacheError(
            e.errno,
            f"cannot write to the cache folder {folder}: {e.strerror or e}. Free some space or "
            "choose another folder, as argument or in the environment variable FLARE_JAX_CACHE",
        ) from e
