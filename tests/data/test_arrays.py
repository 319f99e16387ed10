import h5py
import numpy as np
import pytest
import scipy.io

from flare_jax.data.arrays import DataFileError, array_shape, read_array

COEFF = np.arange(2 * 3 * 4, dtype=np.float64).reshape(2, 3, 4)


def save_mat5(path, **arrays):
    scipy.io.savemat(path, arrays, do_compression=True)


def save_mat73(path, **arrays):
    """As MATLAB writes it: a 512-byte text header, then HDF5 with the axes reversed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for key, array in arrays.items():
            file[key] = array.T
        file.create_group("#refs#")
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def save_npz(path, **arrays):
    np.savez(path, **arrays)


SAVE = [(save_mat5, "a.mat"), (save_mat73, "a.mat"), (save_npz, "a.npz")]
every_format = pytest.mark.parametrize("save, name", SAVE, ids=["mat5", "mat73", "npz"])


@every_format
def test_axes_come_in_matlab_order(tmp_path, save, name):
    save(tmp_path / name, coeff=COEFF, other=np.ones(3))
    assert array_shape(tmp_path / name, "coeff") == COEFF.shape
    assert np.array_equal(read_array(tmp_path / name, "coeff", ndim=3), COEFF)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_shape_is_read_without_values(tmp_path, save):
    rng = np.random.default_rng(0)
    save(tmp_path / "a.npz", coeff=rng.normal(size=(9, 20, 20)), sol=rng.normal(size=(9, 20, 20)))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for place in (len(data) // 4, len(data) * 3 // 4):  # within the values of both
        data[place : place + 100] = bytes(100)
    (tmp_path / "a.npz").write_bytes(data)
    assert array_shape(tmp_path / "a.npz", "coeff") == (9, 20, 20)
    with pytest.raises(DataFileError, match="damaged"):
        read_array(tmp_path / "a.npz", "coeff")


@every_format
def test_index_is_numpy_indexing(tmp_path, save, name):
    save(tmp_path / name, coeff=COEFF)
    index = (slice(1), slice(None, None, 2))
    assert np.array_equal(read_array(tmp_path / name, "coeff", index=index), COEFF[index])


@every_format
def test_missing_key_lists_the_keys(tmp_path, save, name):
    save(tmp_path / name, coeff=COEFF, sol=COEFF)
    with pytest.raises(DataFileError, match="no array 'u', it has coeff, sol"):
        read_array(tmp_path / name, "u")


@every_format
@pytest.mark.parametrize("part", [0.0, 0.1, 0.9])
def test_truncated_file_is_named(tmp_path, save, name, part):
    path = tmp_path / name
    save(path, coeff=np.random.default_rng(0).normal(size=(9, 20, 20)))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(DataFileError, match=r"a\.(mat|npz) .*damaged, cut short"):
        read_array(path, "coeff")


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_located(tmp_path, save, name, bad):
    array = COEFF.copy()
    array[1, 2, 0] = bad
    save(tmp_path / name, coeff=array)
    with pytest.raises(DataFileError, match=r"NaN or infinity, first at \(1, 2, 0\)"):
        read_array(tmp_path / name, "coeff")


@every_format
def test_wrong_rank_states_the_shape(tmp_path, save, name):
    save(tmp_path / name, coeff=COEFF[0])
    with pytest.raises(DataFileError, match=r"3 axes, its shape is \(3, 4\)"):
        read_array(tmp_path / name, "coeff", ndim=3)


def test_text_is_refused(tmp_path):
    save_mat5(tmp_path / "a.mat", coeff="words")
    with pytest.raises(DataFileError, match="real numbers"):
        read_array(tmp_path / "a.mat", "coeff")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.mat"):
        read_array(tmp_path / "nothing.mat", "coeff")
