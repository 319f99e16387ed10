"""Arrays from files, by key: NumPy archives and MATLAB files of version 5 and version 7.3."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import scipy.io


class DataFileError(ValueError):
    """A data file is damaged or does not hold what it should."""


def read_array(
    path: Path | str, key: str, *, ndim: int | None = None, index: Sequence[slice] = ()
) -> np.ndarray:
    """Array `key` of a .npz or .mat file, cut to `index` and checked to be finite.

    Axes come in the order in which NumPy or MATLAB shows them: version 7.3 files are HDF5 and
    store them reversed, which is undone here. Of those files only the part that `index` names is
    read from disk; of the others the whole array.

    Args:
      path: the file.
      key: name of the array in it.
      ndim: number of axes it must have; None for any.
      index: one slice for each leading axis.

    Raises:
      FileNotFoundError: there is no such file.
      DataFileError: the file is damaged or cut short, has no such key (those it has are listed),
        or the array has the wrong rank, is not real or holds NaN or infinity.
    """
    path = Path(path)
    shape = array_shape(path, key)
    if ndim is not None and len(shape) != ndim:
        raise DataFileError(f"{path}: {key!r} must have {ndim} axes, its shape is {shape}")
    array = _guarded(path, lambda: _reader(path).read(path, key, tuple(index)))
    if array.dtype.kind not in "biuf":
        raise DataFileError(f"{path}: {key!r} must hold real numbers, it holds {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise DataFileError(f"{path}: {key!r} holds NaN or infinity, first at {where}")
    return array


def array_shape(path: Path | str, key: str) -> tuple[int, ...]:
    """Shape of array `key`, without reading its values; raises as `read_array` does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    shapes = _guarded(path, lambda: _reader(path).shapes(path, key))
    if key not in shapes:
        raise DataFileError(f"{path} has no array {key!r}, it has {', '.join(sorted(shapes))}")
    return shapes[key]


def _guarded(path, read):
    """`read()`; the many kinds of error that damaged files cause become one that names the file."""
    try:
        return read()
    except Exception as e:
        raise DataFileError(
            f"{path} ({path.stat().st_size} bytes) cannot be read, it is damaged, cut short or "
            f"not a {path.suffix} file: {e}"
        ) from e


def _reader(path):
    if path.suffix == ".npz":
        return _Npz
    return _Hdf5 if h5py.is_hdf5(path) else _Mat5


class _Npz:
    """NumPy archives. `shapes` of all readers are of each array, here None but for `key`."""

    @staticmethod
    def shapes(path, key):
        with zipfile.ZipFile(path) as file:
            names = [n.removesuffix(".npy") for n in file.namelist() if n.endswith(".npy")]
            shapes = dict.fromkeys(names)
            if key in shapes:
                with file.open(f"{key}.npy") as entry:  # unpacked no further than its header
                    shapes[key] = _npy_shape(entry)
            return shapes

    @staticmethod
    def read(path, key, index):
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return file[key][index]


def _npy_shape(file):
    one, two = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    return (one if np.lib.format.read_magic(file) == (1, 0) else two)(file)[0]


class _Mat5:
    """MATLAB files up to version 7."""

    @staticmethod
    def shapes(path, key):
        return {name: shape for name, shape, _ in scipy.io.whosmat(path)}

    @staticmethod
    def read(path, key, index):
        return scipy.io.loadmat(path, variable_names=[key])[key][index]


class _Hdf5:
    """MATLAB files of version 7.3, axes reversed."""

    @staticmethod
    def shapes(path, key):
        with h5py.File(path, "r") as file:
            return {k: v.shape[::-1] for k, v in file.items() if isinstance(v, h5py.Dataset)}

    @staticmethod
    def read(path, key, index):
        with h5py.File(path, "r") as file:
            whole = (slice(None),) * (file[key].ndim - len(index))
            return file[key][whole + index[::-1]].T
