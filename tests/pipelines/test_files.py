import pytest

from pipelines.files import atomic_output


def test_output_appears_when_closed_and_replaces(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        with atomic_output(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_exception_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_output(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
