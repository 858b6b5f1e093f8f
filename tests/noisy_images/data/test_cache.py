"""Files that speed up the next start."""

import os

import numpy as np
import pytest

from examples.noisy_images.data import cache


def test_cache_is_whole_or_absent(tmp_path):
    path = tmp_path / "cache.npz"
    assert cache.read_cached_arrays(path, "a") is None
    assert cache.write_cached_arrays(path, {"fingerprint": np.array("a"), "x": np.arange(3)})
    assert cache.read_cached_arrays(path, "a")["x"].tolist() == [0, 1, 2]
    assert cache.read_cached_arrays(path, "b") is None
    assert os.listdir(tmp_path) == ["cache.npz"]
    path.write_bytes(path.read_bytes()[:-40])
    assert cache.read_cached_arrays(path, "a") is None
    # A folder that cannot be made: its name is a file's.
    (tmp_path / "no").touch()
    with pytest.warns(UserWarning, match="cannot keep the cache"):
        assert not cache.write_cached_arrays(tmp_path / "no" / "cache.npz", {})
