"""Files that are not what was expected, through every command and reader that a file comes in by."""

import gzip
import io
import tarfile

import pytest
import torch

from scf_fast import checkpoints, command_line, train
from scf_fast.command import INPUT_ERROR
from scf_fast.engine.deepspeed_config import load_deepspeed_config
from scf_fast.evaluation.__main__ import main as evaluate
from scf_fast.evaluation.datasets import read_pair_list
from scf_fast.evaluation.quality import read_severity
from scf_fast.pipelines import convert, index
from scf_fast.pipelines.evaluation_sets.template_protocol import read_template_protocol
from scf_fast.pipelines.evaluation_sets.verification_set import read_verification_set
from scf_fast.pipelines.formats.recordio import read_num_classes
from scf_fast.weights.reading import read_weights

ARCFACE = b"from easydict import EasyDict as edict\n\nconfig = edict()\nconfig.network = 'r50'\n"


def archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    return file.getvalue()


def scripted():
    return torch.jit.script(torch.nn.PReLU()).save_to_buffer()


FILES = {  # name -> content, what a message calls it
    "data.tar.gz": (archive(), "a tar archive compressed by gzip; uncompress it (gunzip -k FILE)"),
    "data.zip": (b"PK\5\6" + bytes(18), "a zip archive; unpack it"),
    "data.parquet": (b"PAR1" + bytes(40), "an Apache Parquet table"),
    "model.mlmodel.onnx": (b"\x08\x08\x12\x07pytorch\x3a\x80\x01" + bytes(128), "an ONNX model"),
    "shard.tfrecord.gz": (gzip.compress(bytes(99)), "a file compressed by gzip; uncompress it"),
    "page.html": (b"<!doctype html><html>Sign in", "a web page (HTML)"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
    "r50.py": (ARCFACE, "Python source, such as a configuration of arcface_torch"),
    "r50.params": (b"\x12\x01" + bytes(60), "a file of MXNet weights"),
    "script.pt": (scripted(), "a TorchScript program"),
    "wide.txt": ("a.jpg 0\n".encode("utf-16"), "text in UTF-16; save it in UTF-8"),
    "scan.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF document"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def message(call):
    """The line that a command prints, or what a reader raises."""
    with pytest.raises(ValueError) as raised:
        call()
    return str(raised.value)


READERS = {
    "recipe": command_line.load_recipe,
    "--deepspeed_config": load_deepspeed_config,
    "weights": lambda path: read_weights(path, "--saved_bkb"),
    "data": index.open_source,
    "data, several": lambda path: index.open_source([path]),
    "pairs": lambda path: read_pair_list(path),
    "verification set": read_verification_set,
    "template protocol": read_template_protocol,
    "property": read_num_classes,
    "severity": lambda path: read_severity(path, "name", ["a"]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reader", READERS)
def test_readers_say_what_a_file_is(reader, name, folder):
    path, kind = folder / name, FILES[name][1]
    said = message(lambda: READERS[reader](path if "tion" in reader or "pairs" in reader else str(path)))
    assert name in said and said.isprintable() and "weights_only" not in said and len(said) < 700
    if name.endswith(".py") and reader in ("pairs", "property", "severity", "data", "data, several"):
        assert "line 1 must be" in said or "must hold" in said or "must have the columns" in said
    else:
        assert kind.partition(";")[0] in said and kind.partition("; ")[2] in said


def test_a_list_of_python_source_is_said_to_be_one(folder):
    said = message(lambda: index.open_source(folder / "r50.py"))
    assert "line 1 must be `path label`" in said and "the file is Python source" in said


def commands(path, folder):
    model, out = str(folder / "none.pt"), str(folder / "out")
    recipe = ["--data", str(folder), "--output_dir", out]
    return {
        "index": (index.main, [path]),
        "convert": (convert.main, [path, out, "--to", "tar"]),
        "checkpoints inspect": (checkpoints.main, ["inspect", path]),
        "checkpoints convert": (checkpoints.main, ["convert", path, out, "--to", "tface"]),
        "verify": (evaluate, ["verify", "--data", path, "--model", model]),
        "identify": (evaluate, ["identify", "--gallery", path, "--probe", path, "--model", model]),
        "ijb": (evaluate, ["ijb", "--data", path, "--model", model]),
        "risk": (evaluate, ["risk", "--data", path, "--model", model]),
        "report": (evaluate, ["report", "--data", path, "--out", out, "--model", model]),
        "train, recipe": (train.main, ["--config", path, *recipe]),
    }


@pytest.mark.parametrize("name", ["data.tar.gz", "page.html", "model.mlmodel.onnx", "scan.pdf"])
def test_commands_end_with_what_the_file_is(name, folder, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    kind = FILES[name][1].partition(";")[0]
    for what, (main, arguments) in commands(str(folder / name), folder).items():
        assert main(arguments) == INPUT_ERROR, what
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error[:-1].isprintable() and kind in error and "; " in error, (what, error)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("flag", ["--model", "--backbone", "--saved_fc", "--saved_bkb"])
def test_no_checkpoint_gets_the_advice_to_run_what_is_in_it(flag, tmp_path):
    for name, content in {**{key: value for key, (value, _) in FILES.items()}, "noise": b"\x80\x02\xff" * 99}.items():
        (tmp_path / name).write_bytes(content)
        said = message(lambda: read_weights(tmp_path / name, flag))  # noqa: B023 -- called at once
        assert said.startswith(f"{flag} {tmp_path / name}: is ") and "weights_only" not in said and "False" not in said
