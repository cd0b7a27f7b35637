"""The parser and the runner of commands, and every flag of every command in both spellings."""

import argparse
import importlib
import io
import sys

import pytest

from scf_fast import distributed, embed
from scf_fast.command import INPUT_ERROR, INTERRUPTED, TRACEBACK_VARIABLE, Parser, run
from scf_fast.errors import InputError

COMMANDS = [
    "scf_fast.centers_from_data",
    "scf_fast.checkpoints",
    "scf_fast.demo",
    "scf_fast.embed",
    "scf_fast.evaluation.__main__",
    "scf_fast.export",
    "scf_fast.feature_cache",
    "scf_fast.pipelines.convert",
    "scf_fast.pipelines.index",
    "scf_fast.pipelines.synthetic.__main__",
    "scf_fast.table",
    "scf_fast.train",
]


class Captured(BaseException):
    """Carries the parser out of a command that was about to use it."""

    def __init__(self, parser):
        self.parser = parser


def parsers_of(module, monkeypatch):
    """The parser of a command, and those of its subcommands."""

    def capture(self, args=None, namespace=None):
        raise Captured(self)

    with monkeypatch.context() as patch, pytest.raises(Captured) as captured:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        patch.setattr(sys, "argv", ["command"])
        importlib.import_module(module).main()
    parser = captured.value.parser
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(sub for action in commands for sub in action.choices.values())]


def parse_alone(parser, action, flag):
    """What a parser makes of one flag, with the first value that it takes."""
    for required in parser._actions:
        required.required = False
    values = [[]] if action.nargs == 0 else [[str(next(iter(action.choices)))]] if action.choices else []
    for value in values or [["1"], ["cpu"], ["0.5"]]:
        try:
            unset: list = []
            namespace, unknown = parser.parse_known_args([flag, *value], argparse.Namespace(**{action.dest: unset}))
        except SystemExit:
            continue
        if not unknown and getattr(namespace, action.dest) is not unset:
            return namespace
    return None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_known_in_both_spellings(command, monkeypatch):
    seen = 0
    for parser in parsers_of(command, monkeypatch):
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            for flag in action.option_strings:
                for spelled in "--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_"):
                    assert parse_alone(parser, action, spelled) is not None, f"{parser.prog} {spelled}"
                    seen += 1
    assert seen >= 2 or command.endswith("feature_cache")  # its flags are those of the training command


def test_values_and_words_after_the_flags_are_left_alone():
    parser = Parser()
    parser.add_argument("--a-b", nargs="?")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--a_b=c_d-e"]).a_b == "c_d-e"
    assert parser.parse_args(["--a_b", "c_d"]).a_b == "c_d"
    assert parser.parse_args(["--", "--a_b"]).words == ["--a_b"]


def test_the_parser_reports_errors_in_one_line(capsys):
    parser = Parser(prog="python -m command")
    parser.add_argument("--size", type=int)
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--size", "big"])
    assert exit.value.code == INPUT_ERROR
    assert capsys.readouterr().err == "python -m command: error: argument --size: invalid int value: 'big'\n"


def fail_with(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("error", [InputError("no\nsuch file"), OSError("no\nsuch file")])
def test_input_errors_are_one_line_and_status_2(error, capsys, monkeypatch):
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    assert run("python -m command", fail_with(error)) == INPUT_ERROR == 2
    assert capsys.readouterr().err == "python -m command: error: no\\nsuch file\n"
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(type(error)) as raised:
        run("python -m command", fail_with(error))
    assert raised.value is error


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), RuntimeError("a bug")])
def test_bugs_keep_their_traceback(error, monkeypatch):
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    with pytest.raises(type(error)) as raised:
        run("python -m command", fail_with(error))
    assert raised.value is error


def test_status_is_what_the_action_returns():
    assert run("command", lambda: None) == 0 and run("command", lambda: 7) == 7


def test_ctrl_c_is_no_traceback(capsys):
    assert run("command", fail_with(KeyboardInterrupt())) == INTERRUPTED == 130
    assert capsys.readouterr().err == "command: interrupted\n"


def test_rank_0_speaks_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("scf_fast.pipelines.command.time.sleep", waited.append)
    for rank, waits in ("0", []), ("1", [3.0]):
        monkeypatch.setenv("RANK", rank)
        assert run("command", fail_with(InputError("no"))) == INPUT_ERROR
        assert waited == waits


@pytest.mark.parametrize("command", COMMANDS)
def test_help_on_an_ascii_terminal(command, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(command).main()
    terminal.flush()
    assert ended.value.code in (None, 0) and len(terminal.buffer.getvalue()) > 200


@pytest.mark.parametrize("value", ["", " "])
def test_empty_variables_of_a_launcher_are_unset(value, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("scf_fast.pipelines.command.time.sleep", waited.append)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, value)
    assert run("command", lambda: print(distributed.environment())) == 0
    assert capsys.readouterr().out == "(0, 1)\n"
    monkeypatch.setenv("RANK", value)
    assert run("command", fail_with(InputError("no"))) == INPUT_ERROR and waited == []


def test_a_bug_in_a_command_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    (tmp_path / "face.png").touch()
    words = [str(tmp_path / "face.png"), "--model", "m", "--out", str(tmp_path / "out.npz")]
    monkeypatch.setattr(embed, "open_embedder", lambda *_: fail_with(ValueError("inside torch"))())
    with pytest.raises(ValueError, match="inside torch"):
        embed.main(words)
    monkeypatch.setattr(embed, "open_embedder", lambda *_: fail_with(InputError("m: is no checkpoint"))())
    assert embed.main(words) == INPUT_ERROR
    assert capsys.readouterr().err == "python -m scf_fast.embed: error: m: is no checkpoint\n"
