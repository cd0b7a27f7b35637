"""The images of MXNet RecordIO files as a source."""

from pathlib import Path

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, IntArray, Progress
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.mapped_file import map_file
from scf_fast.pipelines.formats.recordio import Record, images_in, read_record, scan_image_records
from scf_fast.pipelines.sources.image_names import visible
from scf_fast.pipelines.sources.indexed import Scan, check_labels
from scf_fast.pipelines.sources.packed import PackedImages, as_lengths

_EXACT_LABELS = 1 << 24  # float32 holds every integer up to here


class RecordIndex(PackedImages):
    """The image records of a ``.rec``, in file order; made by ``RecordIndex.open(path)``.

    ``path`` is the file, or a folder: its ``train.rec``, or where there is none all its ``.rec`` files as parts of one
    set, in order of their names, labels as they stand. A ``property`` file beside them gives ``num_classes``; without
    one it is the largest label + 1. The index has 20 bytes an image. An ``.idx`` beside the file is not read: the file
    itself says where its records are.
    """

    FORMAT, KIND = "RecordIO", file_kinds.RECORDIO

    def encoded(self, i: int) -> ByteArray:
        return self._record(i).image

    def _name_in_file(self, i: int) -> str:
        return f"record {self._record(i).record_id}"

    @property
    def rec_paths(self) -> list[Path]:
        """The ``.rec`` files, in the order of the index."""
        return list(self._names)

    def offsets_in(self, rec_path: Path) -> IntArray:
        """Returns the bytes at which the image records of one of ``rec_paths`` start, (n,)."""
        file = self._names.index(rec_path)
        return self._offsets[self._first[file] : self._first[file + 1]]

    def _record(self, i: int) -> Record:
        stored = np.frombuffer(self._stored(i), dtype=np.uint8)
        try:
            return read_record(stored, 0)
        except InputError as error:
            raise InputError(
                f"{self._names[self._file_of(i)]} changed while in use, at byte {self._offsets[i]}: {error}"
            ) from error

    def _images_in(self, data: ByteArray, starts: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
        return images_in(data, starts, lengths)

    @classmethod
    def _beside(cls, path: Path) -> Path:
        first, *others = cls._files(path)
        return first.with_name("recordio.index" if others else f"{first.name}.index")

    @classmethod
    def _files(cls, path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        whole = path / "train.rec"
        return [whole] if whole.exists() else visible(path.glob("*.rec")) or [whole]

    @classmethod
    def _scan_file(cls, path: Path, progress: Progress) -> Scan:
        data = map_file(path)
        records = scan_image_records(data, progress)
        check_labels(
            records.labels, lambda i: f"record {read_record(data, int(records.offsets[i])).record_id}", _EXACT_LABELS
        )
        return Scan(
            {"offsets": records.offsets, "lengths": as_lengths(records.lengths), "labels": records.labels},
            {"empty images": records.num_empty},
        )
