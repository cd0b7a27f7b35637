import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.image_list import ListIndex


def make(folder, lines, names=()):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "list.txt").write_bytes("".join(lines).encode())
    return folder / "list.txt"


def test_paths_with_spaces_and_labels(tmp_path):
    names = ["a/1.jpg", "b c/größe 2.jpg", "3.png"]
    path = make(tmp_path, [f"{names[0]} 5\n", "\n", f"  {names[1]}\t 0 \r\n", f"{tmp_path / names[2]} 2"], names)
    source = open_source(path)
    assert isinstance(source, ListIndex) and source.labels.tolist() == [5, 0, 2] and source.num_classes == 6
    assert [source.encoded(i).tobytes().decode() for i in range(3)] == names
    assert source.name(1) == str(tmp_path / names[1])
    assert pickle.loads(pickle.dumps(source)).encoded(2).tobytes() == b"3.png"


def test_root(tmp_path):
    (tmp_path / "data").mkdir()
    path = make(tmp_path, ["x.jpg 0\n"])
    (tmp_path / "data" / "x.jpg").write_bytes(b"face")
    assert open_source(path, root=tmp_path / "data").encoded(0).tobytes() == b"face"
    with pytest.raises(
        ValueError,
        match=r"list\.txt names .*x\.jpg first, and there is no such file, nor 0 others that it names; give the folder",
    ):
        open_source(path)


def test_lst_of_mxnet(tmp_path):
    """Lines as `im2rec --list --recursive` writes them, shuffled, the second with two labels."""
    path = make(tmp_path, [], ["a 5/0.jpg", "5"]).with_suffix(".lst")
    path.write_text("17\t3.000000\ta 5/0.jpg\n5\t5.000000\t1.500000\t5\n\n")
    source = open_source(path)
    assert isinstance(source, ListIndex) and source.labels.tolist() == [3, 5]
    assert [source.encoded(i).tobytes() for i in range(2)] == [b"a 5/0.jpg", b"5"]


@pytest.mark.parametrize(
    "line", ["a.jpg 0", "1\ta.jpg\t0", "1\t0.5\ta.jpg", "1\tnan\ta.jpg", "1\tinf\ta.jpg", "1\t2.0", "1\t-1.0\ta.jpg"]
)
def test_bad_lines_of_a_lst_are_named(tmp_path, line):
    (tmp_path / "train.lst").write_text(f"0\t0.0\ta.jpg\n{line}\n")
    with pytest.raises(
        ValueError,
        match=r"train\.lst line 2 (must be number, label and path, separated by tabs, with a whole|has label -1)",
    ):
        open_source(tmp_path / "train.lst")


def test_some_files_may_be_missing(tmp_path):
    source = open_source(make(tmp_path, ["gone.jpg 0\n", "here.jpg 0\n"], ["here.jpg"]))
    assert source.encoded(1).tobytes() == b"here.jpg"
    with pytest.raises(ValueError, match=r"cannot read image .*gone\.jpg: No such file"):
        source.encoded(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg", r"line 2 must be `path label` with a whole number as label, got 'a\.jpg'"),
        ("a.jpg 1.5", "line 2 must be"),
        ("a.jpg one", "line 2 must be"),
        ("a.jpg -1", r"line 2 has label -1; a label must lie in 0\.\."),
        ("a.jpg 99999999999", "line 2 has label 99999999999"),
        ("x" * 200000, "line 2 must be"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        open_source(make(tmp_path, ["ok.jpg 0\n", line + "\n"]))


def test_empty_and_changed_list(tmp_path):
    with pytest.raises(ValueError, match="it holds no image"):
        open_source(make(tmp_path, ["\n"]))
    assert len(open_source(make(tmp_path, ["a.jpg 0\n"], ["a.jpg"]))) == 1
    assert len(open_source(make(tmp_path, ["a.jpg 0\n", "a.jpg 1\n"]))) == 2


@pytest.mark.parametrize("name, first", [("list.txt", b"a.jpg 0\n"), ("list.lst", b"7\t0.0\ta.jpg\n")])
@given(content=st.one_of(st.binary(max_size=60), st.text("0123456789.-\t\n eainf", max_size=40).map(str.encode)))
def test_any_bytes_are_a_list_or_a_value_error(tmp_path_factory, name, first, content):
    path = tmp_path_factory.mktemp("list") / name
    path.write_bytes(first + content)
    path.with_name("a.jpg").write_bytes(b"a")
    try:
        source = ListIndex.open(path)
    except ValueError as error:
        assert name in str(error)
    else:
        assert source.name(0).endswith("a.jpg") and all(isinstance(source.name(i), str) for i in range(len(source)))
