import errno
import logging

import numpy as np
import pytest

from flare_jax.data import cache
from flare_jax.data.cache import CacheError, cache_folder, cached

PARAMETERS = {"version": 1, "grid": 21}


class Counter:
    """Generates an array and counts how often it was asked to."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"u": np.arange(1000, dtype=np.float32)}


def test_second_call_reads_the_file(tmp_path):
    generate = Counter()
    one, two = (cached(generate, "darcy", PARAMETERS, folder=tmp_path) for _ in "12")
    assert generate.calls == 1
    assert one.keys() == two.keys() == {"u"} and np.array_equal(one["u"], two["u"])
    assert len(list(tmp_path.iterdir())) == 1  # no temporary file stays


def test_other_parameters_are_another_file(tmp_path):
    generate = Counter()
    for version in (1, 2):
        cached(generate, "darcy", PARAMETERS | {"version": version}, folder=tmp_path)
    assert generate.calls == 2


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "empty", "other", "method", "encrypted"]
)
def test_damaged_file_is_made_again(tmp_path, damage, caplog):
    generate = Counter()
    cached(generate, "darcy", PARAMETERS, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0xFF
    good = {"truncated": data[:middle], "flipped": data, "empty": b"", "other": b"PK words"}
    for name, place, value in (("method", 10, 99), ("encrypted", 8, 1)):  # of the first entry
        good[name] = bytearray(path.read_bytes())
        good[name][data.index(b"PK\x01\x02") + place] = value
    path.write_bytes(good[damage])
    with caplog.at_level(logging.WARNING):
        arrays = cached(generate, "darcy", PARAMETERS, folder=tmp_path)
    assert generate.calls == 2 and np.array_equal(arrays["u"], generate()["u"])
    assert "damaged" in caplog.text and str(path) in caplog.text
    assert cached(generate, "darcy", PARAMETERS, folder=tmp_path) and generate.calls == 3


def test_full_disk_names_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    with pytest.raises(CacheError, match=f"{tmp_path}: No space left.*FLARE_JAX_CACHE"):
        cached(Counter(), "darcy", PARAMETERS, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made_fails_before_generating(tmp_path):
    (tmp_path / "file").touch()
    generate = Counter()
    with pytest.raises(CacheError, match="file/folder"):
        cached(generate, "darcy", PARAMETERS, folder=tmp_path / "file" / "folder")
    assert generate.calls == 0


def test_folder_is_argument_then_environment_then_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLARE_JAX_CACHE", str(tmp_path / "b"))
    assert cache_folder(tmp_path / "a") == tmp_path / "a"
    assert cache_folder() == tmp_path / "b"
    monkeypatch.delenv("FLARE_JAX_CACHE")
    assert cache_folder().name == "flare_jax"
