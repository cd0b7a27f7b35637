"""The images of MXNet RecordIO files as a source."""

import os
from pathlib import Path

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.recordio import images_in, read_record, scan_image_records
from scf_fast.pipelines.sources.indexed import PackedImages, as_lengths, check_labels

_EXACT_LABELS = 1 << 24  # float32 holds every integer up to here


class RecordIndex(PackedImages):
    """The image records of a `.rec`, in file order; made by `RecordIndex.open(path)`.

    `path` is the file, or a folder: its `train.rec`, or where there is none all its `.rec` files as parts of one set,
    in order of their names, labels as they stand. A `property` file beside them gives num_classes; without one it is
    the largest label + 1. The index has 20 bytes an image. A sibling `.idx` is not read: the file itself says where its
    records are.
    """

    FORMAT = "RecordIO"

    def encoded(self, i):
        return self._record(i).image

    def _name_in_file(self, i):
        return f"record {self._record(i).record_id}"

    @property
    def rec_paths(self):
        """The `.rec` files, in order."""
        return list(self._names)

    def offsets_in(self, rec_path):
        """(n,) int64, the bytes at which the image records of one of `rec_paths` start."""
        file = self._names.index(rec_path)
        return self._offsets[self._first[file] : self._first[file + 1]]

    def _record(self, i):
        stored = np.frombuffer(self._stored(i), dtype=np.uint8)
        try:
            return read_record(stored, 0)
        except ValueError as error:
            raise InputError(
                f"{self._names[self._file_of(i)]} changed while in use, at byte {self._offsets[i]}: {error}"
            ) from error

    def _images_in(self, data, starts, lengths):
        return images_in(data, starts, lengths)

    @classmethod
    def _beside(cls, path):
        files = cls._files(path)
        return Path(files[0]).with_name(f"{Path(files[0]).name if len(files) == 1 else 'recordio'}.index")

    @classmethod
    def _files(cls, path):
        if not path.is_dir():
            return [path]
        return (
            [path / "train.rec"]
            if (path / "train.rec").exists()
            else sorted(path.glob("*.rec")) or [path / "train.rec"]
        )

    @classmethod
    def _scan_file(cls, path, progress):
        data = (
            np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            if os.path.getsize(path)
            else np.empty(0, dtype=np.uint8)
        )
        records = scan_image_records(data, progress)
        check_labels(
            records.labels, lambda i: f"record {read_record(data, int(records.offsets[i])).record_id}", _EXACT_LABELS
        )
        return (
            {"offsets": records.offsets, "lengths": as_lengths(records.lengths), "labels": records.labels},
            {"empty images": records.num_empty},
        )
