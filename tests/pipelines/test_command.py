import errno
import getpass
import os
import tempfile

import pytest

from scf_fast.pipelines.command import (
    INPUT_ERROR,
    INTERRUPTED,
    TRACEBACK_VARIABLE,
    Parser,
    run,
    split_commas,
    split_paths,
)
from scf_fast.pipelines.errors import InputError


def test_flags_take_hyphens_and_underscores():
    parser = Parser(prog="prog")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--num_workers", type=int)
    parser.add_argument("rest", nargs="*")
    for arguments in (
        ["--batch-size", "3", "--num_workers", "4"],
        ["--batch_size", "3", "--num-workers", "4"],
        ["--batch_size=3", "--num-workers=4"],
    ):
        options = parser.parse_args(arguments)
        assert (options.batch_size, options.num_workers) == (3, 4)
    assert parser.parse_args(["--", "--batch_size"]).rest == ["--batch_size"]


def test_a_user_without_a_name_gets_one(monkeypatch):
    """A container may run under a number that is in no list of users; PyTorch asks for the name."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert run("prog", lambda: getpass.getuser() == f"uid{os.getuid()}") is True
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.delenv("LOGNAME")
    assert run("prog", lambda: getpass.getuser() == "somebody" and "LOGNAME" not in os.environ) is True


def test_a_full_disk_may_be_one_with_too_many_files(capsys):
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    assert run("prog", fail) == INPUT_ERROR
    assert "No space left on device: 'file'; free some space, or, where `df -i`" in capsys.readouterr().err


def test_without_a_temporary_folder_the_error_says_what_helps(monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    assert run("prog", tempfile.gettempdir) == INPUT_ERROR
    error = capsys.readouterr().err
    assert error.endswith("; set TMPDIR to a folder that can be written\n") and error.count("\n") == 1


def test_errors_of_arguments_are_one_line(capsys):
    parser = Parser(prog="prog")
    parser.add_argument("--n", type=int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--n", "x"])
    assert ended.value.code == INPUT_ERROR
    assert capsys.readouterr().err == "prog: error: argument --n: invalid int value: 'x'\n"


def fail_with(error):
    def action():
        raise error

    return action


def test_input_errors_are_one_line(capsys, monkeypatch):
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert run("prog", lambda: None) == 0 and run("prog", lambda: 7) == 7
    assert run("prog", fail_with(InputError("two\n lines"))) == INPUT_ERROR
    assert capsys.readouterr().err == "prog: error: two\\n lines\n"
    assert run("prog", fail_with(FileNotFoundError(2, "No such file", "a"))) == INPUT_ERROR
    assert capsys.readouterr().err == "prog: error: [Errno 2] No such file: 'a'\n"
    assert run("prog", fail_with(KeyboardInterrupt())) == INTERRUPTED
    assert capsys.readouterr().err == "prog: interrupted\n"


def test_bugs_keep_their_traceback(monkeypatch):
    with pytest.raises(ValueError, match="a bug"):
        run("prog", fail_with(ValueError("a bug")))
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(InputError):
        run("prog", fail_with(InputError("shown")))


def test_split(tmp_path, monkeypatch):
    assert split_commas(" a, b ,,c,") == ["a", "b", "c"] and split_commas("") == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x,y").touch()
    assert split_paths("x,y") == ("x,y",) and split_paths("x, z") == ("x", "z") and split_paths(",") == (",",)
    assert split_paths(tmp_path / "x,y") == (str(tmp_path / "x,y"),)
