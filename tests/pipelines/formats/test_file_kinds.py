"""Files of all kinds, made here by other programs' writers, are known for what they are."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.file_kinds import Wanted, recognize, recognize_bytes, refusal
from scf_fast.pipelines.formats.recordio import RecordWriter
from scf_fast.pipelines.formats.tfrecord import pack_record


def tar_of(name=b"a.cls", content=b"0"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name.decode())
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zip_of(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


def saved(save, *arguments):
    file = io.BytesIO()
    save(*arguments, file)
    return file.getvalue()


def image_of(form):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, form)
    return file.getvalue()


def record_file(folder):
    with RecordWriter(folder / "x.rec", folder / "x.idx") as writer:
        writer.write_image(1, 0.0, b"image")
    return (folder / "x.rec").read_bytes()


def onnx_model():
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    return helper.make_model(graph, producer_name="pytorch").SerializeToString()


def parquet():
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), file)
    return file.getvalue()


def arrow():
    import pyarrow

    file = io.BytesIO()
    with pyarrow.ipc.new_file(file, pyarrow.schema([("a", pyarrow.int64())])):
        pass
    return file.getvalue()


def safetensors_file():
    import safetensors.torch

    return safetensors.torch.save({"a": torch.ones(2)})


def torchscript():
    return torch.jit.script(torch.nn.PReLU()).save_to_buffer()


def old_torch():
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 174\n"
ARCFACE = b"from easydict import EasyDict as edict\n\nconfig = edict()\nconfig.margin_list = (1.0, 0.5, 0.0)\n"
TEXT = "a/0.jpg 0\nb/1.jpg 1\n"
KINDS = {  # content -> name, and what a message about data or a checkpoint must say to do
    "empty": (b"", "empty file"),
    "gzip tar": (gzip.compress(tar_of()), "a tar archive compressed by gzip"),
    "gzip tfrecord": (gzip.compress(pack_record(b"image", 1)), "a TFRecord file compressed by gzip"),
    "gzip text": (gzip.compress(TEXT.encode()), "a file compressed by gzip"),
    "bzip2": (bz2.compress(tar_of()), "a tar archive compressed by bzip2"),
    "xz": (lzma.compress(tar_of()), "a tar archive compressed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + os.urandom(40), "compressed by zstd"),
    "zip": (zip_of("faces/a/0.jpg"), "a zip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "a 7-Zip archive"),
    "tar": (tar_of(), "a tar archive"),
    "parquet": (parquet(), "Parquet"),
    "arrow": (arrow(), "Arrow"),
    "onnx": (onnx_model(), "an ONNX model"),
    "html": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "web page"),
    "html with a mark": (b"\xef\xbb\xbf<HTML>", "web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "lfs": (LFS, "Git LFS"),
    "annex": (b"/annex/objects/SHA256E-s100--aa.pth\n", "git-annex"),
    "torch": (saved(torch.save, {"a": torch.ones(2)}), "a PyTorch checkpoint"),
    "torch of old": (old_torch(), "a PyTorch checkpoint"),
    "torchscript": (torchscript(), "TorchScript"),
    "safetensors": (safetensors_file(), "safetensors"),
    "mxnet": (struct.pack("<QQ", 0x112, 0) + bytes(24), "MXNet weights"),
    "python": (ARCFACE, "Python source"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "json": (json.dumps({"a": [1]}).encode(), "JSON"),
    "json list": (b'\n[{"path": "a.jpg", "label": 3},', "JSON"),  # longer than what is looked at
    "numpy": (saved(lambda a, f: np.save(f, a), np.ones(3)), "a NumPy array"),
    "npz": (saved(lambda a, f: np.savez(f, a=a), np.ones(3)), "NumPy arrays (.npz)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), "a Python pickle"),
    "pickle of Python 2": (pickle.dumps([1, 2], protocol=0), "a Python pickle"),
    "tfrecord": (pack_record(b"image", 1), "a TFRecord file"),
    "lmdb": (bytes(16) + b"\xde\xc0\xef\xbe" + bytes(4000), "LMDB"),
    "sqlite": (b"SQLite format 3\0" + bytes(80), "SQLite"),
    "matlab": (b"MATLAB 5.0 MAT-file, Platform: GLNXA64", "MATLAB"),
    "elf": (b"\x7fELF\2\1\1" + bytes(40), "ELF"),
    "video": (b"\0\0\0\x20ftypisom" + bytes(20), "a video"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC image"),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(20), "an AVIF image"),
    **{form: (image_of(form), f"{'a' if form != 'AVIF' else 'an'} {form}") for form in ("JPEG", "PNG", "GIF", "TIFF")},
    "webp": (image_of("WEBP"), "a WebP image"),
    "bmp": (image_of("BMP"), "a BMP image"),
    "ppm": (image_of("PPM"), "a PNM image"),
    "utf-16": (TEXT.encode("utf-16"), "text in UTF-16"),
    "utf-16 without a mark": (TEXT.encode("utf-16-le"), "text in UTF-16"),
    "utf-16 big endian": (TEXT.encode("utf-16-be"), "text in UTF-16"),
    "utf-32": (TEXT.encode("utf-32"), "text in UTF-32"),
    "noise": (np.random.default_rng(0).bytes(3000), "binary data of no known kind"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name, tmp_path):
    content, expected = KINDS[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    assert expected in recognize(path).name
    for wanted in Wanted:
        said = refusal(path, wanted)
        if name == "noise" and wanted is not Wanted.FOLDER:
            assert said is None
        else:
            assert said.startswith("is ") and "; " in said and said.isprintable() and "weights_only" not in said


def test_kinds_that_need_a_folder(tmp_path):
    (tmp_path / "x").write_bytes(record_file(tmp_path))
    assert recognize(tmp_path / "x") is file_kinds.RECORDIO
    # The names in it as torch.export.save of PyTorch 2.13 writes them; exporting a program would take seconds.
    (tmp_path / "y").write_bytes(zip_of("y/archive_format", "y/models/model.json", "y/data/weights/weight_0"))
    assert recognize(tmp_path / "y") is file_kinds.EXPORTED
    if features.check("avif"):
        assert recognize_bytes(image_of("AVIF")).name == "an AVIF image"
    assert recognize(tmp_path) is file_kinds.FOLDER and recognize("/dev/null") is file_kinds.SPECIAL
    os.mkfifo(tmp_path / "pipe")
    assert recognize(tmp_path / "pipe") is file_kinds.SPECIAL  # and nobody waits
    assert refusal(tmp_path / "missing", Wanted.DATA) is None


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "\ufeff" + TEXT,
        TEXT.replace("\n", "\r\n"),
        "人/脸.jpg 0\n",
        "[1]/a.jpg 0\n",
        "{a}.jpg 0\n",
        "import/a.jpg 0\n",
        "P6/a.jpg 0\n",
        "PK/a.jpg 0\n",
        "BM1/a.jpg 0\n",
        "a b 1\n" * 5 + "\0.png 0\n",
        "0",
    ],
)
def test_lists_are_text(text):
    assert recognize_bytes(text.encode(), "list.txt") is file_kinds.TEXT
    assert recognize_bytes(text.encode("gbk", "replace"), "list.txt").is_text


def test_suffixes_tell_text_from_text():
    assert recognize_bytes(b"lr: 0.1\n", "a.yaml") is file_kinds.YAML
    assert recognize_bytes(b"x = 1\n", "a.py") is file_kinds.PYTHON
    assert recognize_bytes(b"#!/bin/sh\n", "a") is file_kinds.SCRIPT


def test_every_beginning_of_every_kind_is_some_kind():
    for content, _ in KINDS.values():
        for length in [*range(40), 257, 262, 300]:
            kind = recognize_bytes(content[:length], size=len(content) or 1)
            assert kind.name and kind.advice(Wanted.DATA)


def test_a_small_file_that_would_uncompress_to_a_large_one_costs_nothing(tmp_path):
    bomb = tmp_path / "bomb.gz"
    with gzip.open(bomb, "wb") as file:
        for _ in range(8):
            file.write(bytes(1 << 20))
    assert "compressed by gzip" in recognize(Path(bomb)).name
