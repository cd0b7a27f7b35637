"""What a file is, by its bytes: for messages where something else was expected, and for files with unusual names.

    recognize(path)           the kind of a file
    refusal(path, wanted)     what a message says of a file that is not what was wanted; None where it can say nothing

A file is read as far as it takes to tell, and nothing in it is run. Sources: the formats' own documents for their first
bytes; for ONNX its onnx.proto (ModelProto), for MXNet ndarray.cc (kMXAPINDArrayListMagic), for LMDB mdb.c (MDB_MAGIC).
"""

import bz2
import json
import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import BinaryIO

from scf_fast.pipelines.aliases import StrPath
from scf_fast.pipelines.formats.tfrecord import HEADER_BYTES, example_bytes

_START = 1 << 16  # bytes looked at
_INNER = 1 << 12  # bytes uncompressed to see what was compressed
_MOST_MEMBERS = 100_000  # of a zip archive, whose directory is read


class Wanted(Enum):
    """What a file is given as; the value says what to give."""

    DATA = (
        "give a .rec, .tar or .tfrecord file, a list with lines `path label`, or a folder with a folder of images for "
        "each identity"
    )
    TEXT = "give a text file in UTF-8"
    FOLDER = "give --data the folder that has them"
    PAIRS = "give a .bin as insightface ships lfw.bin, or a text file with lines `path path label`"
    WEIGHTS = "give a state_dict that torch.save has written, or a .safetensors file"
    RECIPE = "give a YAML file with lines `key: value`, such as those in scf_fast/recipes"
    JSON = "give a JSON file"
    IMAGE = "convert it to JPEG or PNG"


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: with its article, as in "is a gzip archive".
        remedy: what to do, whatever it is wanted for; empty: give something else.
        remedies: what to do where that is another thing.
        is_text: whether a reader of text may go on with it.
    """

    name: str
    remedy: str = ""
    remedies: Mapping[Wanted, str] = field(default_factory=dict)
    is_text: bool = False

    def advice(self, wanted: Wanted) -> str:
        """Returns what to do."""
        return self.remedies.get(wanted) or self.remedy or wanted.value


_AGAIN = "download or copy it again"
_AS_WEIGHTS = "give it as the model or as --saved_bkb; " + Wanted.DATA.value
_AS_DATA = "give it with --data; " + Wanted.WEIGHTS.value

TEXT = FileKind("text", is_text=True)
BINARY = FileKind("binary data of no known kind", remedies={Wanted.WEIGHTS: _AGAIN})
FOLDER = FileKind("a folder")
SPECIAL = FileKind("no regular file")
EMPTY = FileKind("an empty file", _AGAIN)
HTML = FileKind("a web page (HTML), as a download that needs a login leaves it", "download the file itself")
XML = FileKind("XML, as a server sends it for an error", "download the file itself")
GIT_LFS = FileKind("a pointer of Git LFS and not the file itself", "fetch the file: git lfs pull")
GIT_ANNEX = FileKind("a pointer of git-annex and not the file itself", "fetch the file: git annex get FILE")
UTF_16 = FileKind("text in UTF-16", "save it in UTF-8: iconv -f UTF-16 -t UTF-8 FILE")
UTF_32 = FileKind("text in UTF-32", "save it in UTF-8: iconv -f UTF-32 -t UTF-8 FILE")
JSON = FileKind("JSON text", is_text=True)
YAML = FileKind(
    "YAML text", remedies={Wanted.DATA: "a recipe is given with --config; " + Wanted.DATA.value}, is_text=True
)
PYTHON = FileKind(
    "Python source, such as a configuration of arcface_torch",
    remedies={Wanted.RECIPE: "it is never run: write its values into a recipe, a YAML file with lines `key: value`"},
    is_text=True,
)
SCRIPT = FileKind("a script", is_text=True)
RECORDIO = FileKind("an MXNet RecordIO file", remedies={Wanted.WEIGHTS: _AS_DATA})
TFRECORD = FileKind("a TFRecord file", remedies={Wanted.WEIGHTS: _AS_DATA})
TAR = FileKind("a tar archive", "unpack it (tar -xf FILE) and give what is in it", {Wanted.DATA: Wanted.DATA.value})
TORCH = FileKind("a PyTorch checkpoint", remedies={Wanted.DATA: _AS_WEIGHTS})
TORCHSCRIPT = FileKind(
    "a TorchScript program",
    remedies={
        Wanted.DATA: _AS_WEIGHTS,
        Wanted.WEIGHTS: "save its weights alone: torch.save(torch.jit.load(FILE).state_dict(), OUT)",
    },
)
EXPORTED = FileKind(
    "an exported PyTorch program (.pt2)",
    remedies={Wanted.WEIGHTS: "save its weights alone: torch.save(torch.export.load(FILE).state_dict, OUT)"},
)
SAFETENSORS = FileKind("a safetensors file", remedies={Wanted.DATA: _AS_WEIGHTS, Wanted.WEIGHTS: _AGAIN})
ONNX = FileKind("an ONNX model", remedies={Wanted.WEIGHTS: "give the PyTorch checkpoint that it was exported from"})
MXNET = FileKind(
    "a file of MXNet weights (.params)",
    remedies={Wanted.WEIGHTS: "give the PyTorch checkpoint of the same model, as insightface releases it too"},
)
NUMPY = FileKind(
    "a NumPy array",
    remedies={Wanted.WEIGHTS: "class centers: torch.save(torch.from_numpy(numpy.load(FILE)), OUT)"},
)
NUMPY_ZIP = FileKind(
    "an archive of NumPy arrays (.npz)",
    remedies={Wanted.WEIGHTS: "save them by name: torch.save({key: torch.from_numpy(value) ...}, OUT)"},
)
PICKLE = FileKind(
    "a Python pickle",
    remedies={
        Wanted.DATA: "a verification set such as lfw.bin belongs to `python -m scf_fast.evaluation verify`; "
        + Wanted.DATA.value,
        Wanted.WEIGHTS: "code in it is never run: save its tensors alone with torch.save",
    },
)
ZIP = FileKind("a zip archive", "unpack it (unzip FILE -d FOLDER) and give what is in it")

_JPEG, _PNG, _GIF = FileKind("a JPEG image"), FileKind("a PNG image"), FileKind("a GIF image")
_WEBP, _TIFF = FileKind("a WebP image"), FileKind("a TIFF image")
_BMP, _PNM = FileKind("a BMP image"), FileKind("a PNM image")
IMAGES = (_JPEG, _PNG, _GIF, _WEBP, _TIFF, _BMP, _PNM)  # those that are read here

_SIMPLE: tuple[tuple[int, bytes, FileKind], ...] = (  # byte at which it stands, bytes, kind
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("a 7-Zip archive", "unpack it (7z x FILE) and give what is in it")),
    (0, b"Rar!\x1a\x07", FileKind("a RAR archive", "unpack it (unrar x FILE) and give what is in it")),
    (0, b"\x1f\x9d", FileKind("a file compressed by compress (.Z)", "uncompress it: gunzip -k FILE")),
    (0, b"\x28\xb5\x2f\xfd", FileKind("a file compressed by zstd", "uncompress it: zstd -d FILE")),
    (0, b"\x04\x22\x4d\x18", FileKind("a file compressed by lz4", "uncompress it: lz4 -d FILE")),
    (0, b"PAR1", FileKind("an Apache Parquet table")),
    (0, b"ARROW1", FileKind("an Apache Arrow table")),
    (0, b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file, as Keras and MATLAB write it")),
    (0, b"MATLAB 5.0 MAT-file", FileKind("a MATLAB file")),
    (0, b"SQLite format 3\0", FileKind("an SQLite database")),
    (16, b"\xde\xc0\xef\xbe", FileKind("an LMDB database")),
    (0, b"%PDF-", FileKind("a PDF document")),
    (0, b"\x7fELF", FileKind("a program or library (ELF)")),
    (0, b"GGUF", FileKind("a GGUF model")),
    (4, b"TFL3", FileKind("a TensorFlow Lite model")),
    (0, b"\x93NUMPY", NUMPY),
    (0, b"\x0a\x23\xd7\xce", RECORDIO),
    (0, b"\x12\x01\0\0\0\0\0\0", MXNET),
    (257, b"ustar", TAR),
    (0, b"version https://git-lfs.github.com/spec/", GIT_LFS),
    (0, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", TORCH),  # its format until PyTorch 1.6
    (0, b"\xff\xd8\xff", _JPEG),
    (0, b"\x89PNG\r\n\x1a\n", _PNG),
    (0, b"GIF8", _GIF),
    (8, b"WEBP", _WEBP),
    (0, b"II*\0", _TIFF),
    (0, b"MM\0*", _TIFF),
    (0, b"II+\0", FileKind("a BigTIFF image")),
    (0, b"8BPS", FileKind("a Photoshop image")),
    (0, b"\0\0\0\x0cjP  \r\n", FileKind("a JPEG 2000 image")),
    (0, b"\xff\x0a", FileKind("a JPEG XL image")),
    (0, b"\0\0\0\x0cJXL ", FileKind("a JPEG XL image")),
    (8, b"AVI ", FileKind("a video (AVI)")),
    (0, b"\x1aE\xdf\xa3", FileKind("a video (Matroska or WebM)")),
)
_BRANDS = {  # of the ISO media format, in which phones write images and videos
    b"avif": FileKind("an AVIF image"),
    b"avis": FileKind("an AVIF image"),
    **{brand: FileKind("a HEIC image") for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")},
}
_VIDEO = FileKind("a video (MP4 or QuickTime)")
_COMPRESSED = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
_UNCOMPRESS = {"gzip": "gunzip -k FILE", "bzip2": "bunzip2 -k FILE", "xz": "unxz -k FILE"}
_IS_PYTHON = re.compile(
    rb"^(from [\w.]+ import |import [\w.]+\s*$|def \w+\(|class \w+[(:]|config(\.\w+)*\s*=)", re.MULTILINE
)
_IS_PICKLE = re.compile(rb"\x80[\2-\5]|\([dl]p\d+\n|\(S'|c\w+\n\w+\n")  # of protocols 2 to 5, and of 0, which is text
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # of ASCII, which no text has; escape codes may be in a log
_MOST_CONTROL = 0.07  # share of them: of random bytes they are 0.11, of a list with a damaged line next to none
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2}  # of ONNX: number -> wire type
_GRAPH = 7


def recognize(path: StrPath) -> FileKind:
    """Returns what a file is.

    Raises:
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would wait for its writer forever
        return FOLDER if os.path.isdir(path) else SPECIAL
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_START)
        return _zip_kind(file) if start[:4] in (b"PK\3\4", b"PK\5\6") else recognize_bytes(start, path, size)


def recognize_bytes(start: bytes, name: StrPath = "", size: int | None = None) -> FileKind:
    """Returns what a file is that starts with these bytes.

    Args:
        name: of the file, whose suffix tells text from text.
        size: of the file in bytes, where it has more than these.
    """
    size = len(start) if size is None else size
    if not size:
        return EMPTY
    return _by_signature(start) or _by_structure(start, size) or _text_kind(start, os.path.splitext(name)[1].lower())


def refusal(path: StrPath, wanted: Wanted, *expected: FileKind) -> str | None:
    """Returns "is a zip archive; ..." with what to do, for a message about a file that could not be used.

    Args:
        expected: kinds of which the caller knows more: a damaged file of the kind that it should be is no surprise.
    Returns:
        None where the file cannot be read, or is as expected, or nothing that is known: the caller knows more then.
    """
    try:
        kind = recognize(path)
    except OSError:
        return None
    if kind in expected or (kind in (TEXT, BINARY) and wanted is not Wanted.FOLDER):
        return None
    return f"is {kind.name}; {kind.advice(wanted)}"


def _by_signature(start: bytes) -> FileKind | None:
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            return _compressed_kind(start, program)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return ZIP
    if start[4:8] == b"ftyp":
        return _BRANDS.get(start[8:12], _VIDEO)
    for at, magic, kind in _SIMPLE:
        if start.startswith(magic, at):
            return kind
    if start[:2] == b"BM" and start[6:10] == bytes(4):
        return _BMP
    return _PNM if re.match(rb"P[1-7]\s", start) else None


def _by_structure(start: bytes, size: int) -> FileKind | None:
    """Tells formats without a signature by what must hold of their first bytes."""
    if len(start) >= HEADER_BYTES and example_bytes(start[:HEADER_BYTES]) is not None:
        return TFRECORD
    if start[8:9] == b"{" and struct.unpack_from("<Q", start)[0] <= size - 8:
        return SAFETENSORS
    if _IS_PICKLE.match(start):
        return PICKLE
    return ONNX if _is_onnx(start, size) else None


def _compressed_kind(start: bytes, program: str) -> FileKind:
    """Returns the kind of a compressed file, with the name of what was compressed where that can be told."""
    try:
        if program == "gzip":
            inner = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, _INNER)
        elif program == "bzip2":
            inner = bz2.BZ2Decompressor().decompress(start, _INNER)
        else:
            inner = lzma.LZMADecompressor(memlimit=1 << 27).decompress(start, _INNER)
    except (zlib.error, lzma.LZMAError, OSError, ValueError):
        inner = b""
    kind = recognize_bytes(inner, size=1 << 62) if inner else BINARY
    what = "a file" if kind in (BINARY, TEXT) else kind.name
    return FileKind(f"{what} compressed by {program}", f"uncompress it ({_UNCOMPRESS[program]}) and give the result")


def _zip_kind(file: BinaryIO) -> FileKind:
    """Tells what PyTorch and NumPy write as zip archives from other ones."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()[:_MOST_MEMBERS]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ZIP
    ends = {name.partition("/")[2] for name in names}
    if "constants.pkl" in ends or any(end.startswith("code/") for end in ends):
        return TORCHSCRIPT
    if "archive_format" in ends or any(name.endswith("exported_program.json") for name in names):
        return EXPORTED
    if "data.pkl" in ends:
        return TORCH
    return NUMPY_ZIP if names and all(name.endswith(".npy") for name in names) else ZIP


def _is_onnx(start: bytes, size: int) -> bool:
    """Tells whether these are fields of ONNX's ModelProto, from the first on to the graph."""
    at, seen = 0, 0
    while at < len(start):
        tag, at = _varint(start, at)
        number, wire = tag >> 3, tag & 7
        if _MODEL_FIELDS.get(number) != wire or (not seen and number != 1):
            return False
        seen += 1
        value, at = _varint(start, at)
        if wire == 2:
            if number == _GRAPH:
                return seen > 1 and 0 < value <= size - at
            at += value
    return False


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns (number, place after it); a number that is cut off, or longer than 64 bits, is 0."""
    value = 0
    for count, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, at + count + 1
    return 0, len(data)


def _text_kind(start: bytes, suffix: str) -> FileKind:
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return UTF_32
    halves = start[: len(start) & ~1]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(halves) >= 8 and _alternates(halves)):
        return UTF_16
    if len(_CONTROL.findall(start)) > _MOST_CONTROL * len(start):
        return BINARY
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text[:1024].lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return HTML
    if lower.startswith(b"<?xml"):
        return HTML if b"<html" in lower else XML
    if b"/annex/objects/" in text[:512] and len(start) < 1024:
        return GIT_ANNEX
    if suffix == ".py" or _IS_PYTHON.search(text[:8192]):
        return PYTHON
    if text.startswith(b"#!"):
        return SCRIPT
    if _is_json(text):
        return JSON
    return YAML if suffix in (".yaml", ".yml") else TEXT


def _alternates(halves: bytes) -> bool:
    """Tells UTF-16 without a mark: of letters of ASCII, every other byte is zero."""
    return (not any(halves[1::2]) and b"\0" not in halves[::2]) or (not any(halves[::2]) and b"\0" not in halves[1::2])


def _is_json(text: bytes) -> bool:
    if text[:1] not in (b"{", b"["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        # Cut off after what was read, or damaged; a list of images may start with such a letter, but not go on so.
        return len(text) > 1 and re.match(rb'[{\[]\s*("[^"]*"\s*[:,]|[{\[])', text) is not None
    return True
