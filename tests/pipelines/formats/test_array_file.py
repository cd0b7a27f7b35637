import numpy as np
import pytest

from scf_fast.pipelines.formats.array_file import map_arrays, write_arrays


def test_arrays_come_back_mapped(tmp_path):
    arrays = {
        "a": np.arange(5),
        "empty": np.empty((0, 3), np.float32),
        "b": np.array([[1.5, 2], [3, 4]], np.float32)[:, ::-1],
        "c": np.uint8([7]),
    }
    write_arrays(tmp_path / "x", {"what": "größe", "n": 3}, arrays)
    meta, found = map_arrays(tmp_path / "x")
    assert meta == {"what": "größe", "n": 3} and list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert (
            found[name].dtype == array.dtype and not found[name].flags.writeable and found[name].ctypes.data % 64 == 0
        )


def test_damaged_arrays_are_noticed(tmp_path):
    path = tmp_path / "x"
    write_arrays(path, {"n": 1}, {"a": np.arange(9), "b": np.uint8([1])})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"x is (no file of arrays, or )?damaged; delete it"):
            map_arrays(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="delete it"):
            map_arrays(path)
    with pytest.raises(FileNotFoundError):
        map_arrays(tmp_path / "none")
