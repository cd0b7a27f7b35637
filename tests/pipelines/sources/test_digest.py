"""The digests are kept in files: each is held against its definition, written out."""

import hashlib
import os

import numpy as np
import pytest

from scf_fast.pipelines.sources.base import EncodedImages, ImageFiles, SelectedImages
from scf_fast.pipelines.sources.digest import (
    content_digest,
    fingerprint_of_files,
    fingerprint_of_folders,
    sampled_digest,
)


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_sample_of_a_source():
    images = [b"%d" % i for i in range(10)]
    source = EncodedImages(images, labels=np.arange(10)[::-1])
    labels = source.labels.astype("<i8").tobytes()
    assert sampled_digest(source, images=4) == sha256(labels, b"0", b"3", b"6", b"9")
    assert sampled_digest(source, images=64) == sha256(labels, *images)
    assert sampled_digest(EncodedImages([]), images=4) == sha256()


def test_content_of_a_source(tmp_path):
    assert content_digest(EncodedImages([b"one", b"two"]), "settings") == sha256(b"one", b"two", b"settings")
    path = tmp_path / "ann" / "1.jpg"
    path.parent.mkdir()
    path.write_bytes(b"face")
    os.utime(path, ns=(5, 7))
    files = ImageFiles([path])
    assert content_digest(files, "s") == sha256(b"ann/1.jpg 4 7\n", b"s")
    assert content_digest(SelectedImages(files, [0]), "s") == sha256(b"face", b"s")


def test_fingerprint_of_files(tmp_path):
    paths = [tmp_path / f"{number:03d}" for number in range(130)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number * 3000)
        os.utime(path, ns=(5, 10**9 + number))
    printed = {int(129 * i / 63) for i in range(64)}
    parts = []
    for number, path in enumerate(paths):
        content = path.read_bytes()
        parts.append(f"{path.name}\0{len(content)} {10**9 + number}\0".encode())
        parts += [content[:4096]] if number in printed else []
    assert fingerprint_of_files(paths) == sha256(*parts)
    with pytest.raises(ValueError, match=r"cannot open .*none: No such file or directory; check the path"):
        fingerprint_of_files([tmp_path / "none"])


def test_fingerprint_of_folders(tmp_path):
    folder = os.fsencode(tmp_path)
    os.utime(folder, ns=(5, 9))
    assert fingerprint_of_folders([folder, folder + b"/none"], True) == sha256(b"True", b"9 ", b"gone ")
