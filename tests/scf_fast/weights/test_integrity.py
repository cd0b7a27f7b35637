"""Weight files that are not as they were written, or ask for more than they hold."""

import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scf_fast.errors import InputError
from scf_fast.weights.contents import Facts, Weights
from scf_fast.weights.files import load_tensor_file, save_torch_file
from scf_fast.weights.integrity import DamagedFileError, check_archive, checksum_of, not_finite
from scf_fast.weights.reading import read_weights
from scf_fast.weights.writing import write_weights


@pytest.fixture
def centers():
    return torch.randn(40, 16, generator=torch.Generator().manual_seed(0))


def flipped_bits(path, count):
    """Writes the file with one bit flipped, at places all over it, once after the other."""
    content = path.read_bytes()
    for bit in np.linspace(0, 8 * len(content) - 1, count).astype(int):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        yield bit
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_flipped_bit_is_used(suffix, centers, tmp_path):
    path = tmp_path / f"fc{suffix}"
    weights = Weights("made here")
    weights.class_centers, weights.facts = centers, Facts(normalization="insightface")
    write_weights(weights, path, "safetensors" if suffix == ".safetensors" else "scf_fast")
    found = 0
    for _ in flipped_bits(path, 300):
        try:
            assert torch.equal(read_weights(path).class_centers, centers)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
    assert found > 200
    read = read_weights(path)
    assert torch.equal(read.class_centers, centers) and read.facts.normalization == "insightface"


def test_a_damaged_directory_of_an_archive_is_said_to_be_damaged(centers, tmp_path):
    """Every third of its bits, and a lost end: zipfile has five kinds of errors for them, an OSError among them."""
    path = tmp_path / "fc.pth"
    save_torch_file({"weight": centers}, path)
    content, refused = path.read_bytes(), 0
    for bit in range(8 * content.index(b"PK\1\2"), 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            check_archive(path)
        except DamagedFileError as error:
            assert "is damaged: " in str(error)
            refused += 1
    assert refused > 200
    path.write_bytes(content[:-30])
    with pytest.raises(DamagedFileError, match="is damaged: File is not a zip file"):
        check_archive(path)


def test_a_flipped_weight_is_said_to_be_damaged(centers, tmp_path):
    path = tmp_path / "fc.pth"
    centers[0, 0] = 0.25
    save_torch_file({"weight": centers}, path)
    content = bytearray(path.read_bytes())
    content[content.index(centers.numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(content)
    assert torch.load(path)["weight"].abs().max() > 1e9  # what torch.load takes for a weight
    with pytest.raises(InputError, match=r"fc.pth: is damaged: Bad CRC-32 for file .*; copy or download it again"):
        read_weights(path)


def test_files_without_checksums_are_read(centers, tmp_path):
    """Those of other programs' safetensors, of older PyTorch, and of torch.save where it was told to make none."""
    save_file({"weight": centers}, tmp_path / "other.safetensors")
    torch.save({"weight": centers}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": centers}, tmp_path / "none.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for path in tmp_path.iterdir():
        assert torch.equal(read_weights(path).class_centers, centers)


def deflate(path):
    """Compresses the records of an archive, as somebody might who packs it again."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_files_that_ask_for_memory_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1, 1).expand(1 << 22, 1 << 10)}, tmp_path / "wide.pth")
    torch.save({"weight": torch.zeros(1 << 13, 1 << 12)}, tmp_path / "bomb.pth")
    deflate(tmp_path / "bomb.pth")
    assert all(path.stat().st_size < 1 << 20 for path in tmp_path.iterdir())
    nested = b"\x80\x02" + b"}X\x01\x00\x00\x00x" * 100_000 + b"}" + b"s" * 100_000 + b"."
    with zipfile.ZipFile(tmp_path / "deep.pth", "w") as archive:
        for name, content in (("data.pkl", nested), ("version", "3\n"), ("byteorder", "little")):
            archive.writestr(f"archive/{name}", content)
    for name, reason in (
        ("wide", r"has 'weight' of \[4194304, 1024\], 17180 MB, of which 0.000 MB are stored"),
        ("bomb", "has 0.1 MB but expands to 134 MB, which no weights do"),
        ("deep", "is nested more than 32 levels deep"),
    ):
        with pytest.raises(InputError, match=rf"^file .*{name}\.pth: {reason}"):
            read_weights(tmp_path / f"{name}.pth")


def test_compressed_weights_and_shared_ones_are_read(centers, tmp_path):
    save_torch_file(
        {"state_dict_softmax_fc": {"weight": centers}, "again": centers[:3], "scale": torch.ones(1)}, tmp_path / "a.pth"
    )
    deflate(tmp_path / "a.pth")
    assert torch.equal(load_tensor_file(tmp_path / "a.pth", "file")["again"], centers[:3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, centers, tmp_path):
    centers[3, 5] = value
    save_torch_file({"weight": centers}, tmp_path / "fc.pth")
    with pytest.raises(InputError, match="must be finite, and 1 of the 640 values of the class centers are NaN"):
        read_weights(tmp_path / "fc.pth")


def test_what_is_finite_in_every_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64):
        tensors = {"a": torch.ones(3).to(dtype), "none": torch.ones(0).to(dtype)}
        assert not_finite(tensors) is None and checksum_of(tensors) != checksum_of({"a": torch.ones(3).to(dtype)})
    assert not_finite({"a": torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)}) is not None
