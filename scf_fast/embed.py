"""Computes directions and confidences of images: ``python -m scf_fast.embed IMAGES... --model M --out FILE``.

The images are aligned faces; those of another size than 112 x 112 are resized whole. OUT.npz holds mu (N, d) float32,
the confidence (N,) float32 and path (N,); OUT.parquet holds the same columns and needs the extra ``embed`` (pyarrow).
The confidence of SCF and PFE-v is kappa; that of SCF-G and PFE-G is precision, 1 / variance (over several dimensions
the mean), beside log_variance (N,) or (N, d) float32. A backbone alone gives no confidence. Images that cannot be read
or decoded have no row: FILE.left_out.txt lists them with the reasons; --strict makes the first one an error.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scf_fast.command import Parser, log_to_terminal, print_lines, run
from scf_fast.errors import InputError
from scf_fast.inference import Embedder, Embeddings, InferenceOptions, embed_batches, open_embedder
from scf_fast.inference_arguments import add_inference_arguments, find_images, inference_options
from scf_fast.model import confidence_of
from scf_fast.pipelines.formats.atomic_file import atomic_output, write_text
from scf_fast.pipelines.sources.base import ImageFiles
from scf_fast.pipelines.sources.image_names import list_skipped
from scf_fast.pipelines.text import is_utf8, printable


def embed_images(embedder: Embedder, source: ImageFiles, options: InferenceOptions) -> Embeddings:
    """Embeds all images of a source in order, under a progress bar.

    Returns:
        Embeddings whose ``left_out`` says which images could not be read or decoded.
    Raises:
        InputError: an image gives unusable numbers, or with ``options.strict`` cannot be decoded (the message names
            it); or none can be decoded.
    """
    left_out: dict[int, str] | None = None if options.strict else {}
    embeddings = Embeddings.allocate(len(source), embedder.embedding_dim, embedder.outputs, embedder.density)
    batches = np.split(np.arange(len(source)), range(options.batch_size, len(source), options.batch_size))
    with tqdm(total=len(source), desc="embedding", unit=" images", mininterval=1) as progress:
        for requested, (indices, batch) in zip(
            batches, embed_batches(embedder, source, batches, options.decoding, left_out)
        ):
            embeddings.write_rows(indices, batch)
            progress.update(len(requested))
    embeddings.leave_out(dict(sorted((left_out or {}).items())))
    if len(embeddings.left_out) == len(source):
        raise InputError(f"none of the {len(source)} images can be decoded, the first: {embeddings.left_out[0]}")
    embeddings.check_usable(source)
    return embeddings


def write_embeddings(path: Path, embeddings: Embeddings, image_paths: list[Path]) -> None:
    """Writes mu, the confidence and log variances if there are any, and the paths, in the format of the suffix: .npz or
    .parquet. Where a path is not UTF-8, those in .parquet are binary; in .npz they are as os.fsdecode gives them.
    """
    columns = {"mu": embeddings.mu.numpy()}
    if embeddings.prediction is not None:
        confidence = confidence_of(embeddings.prediction, embeddings.density)
        columns[embeddings.density.confidence_name] = confidence.numpy()
    if embeddings.log_variance is not None:
        columns["log_variance"] = embeddings.log_variance.numpy()
    columns["path"] = np.array(list(map(str, image_paths)))
    with atomic_output(path) as file:
        if path.suffix == ".npz":
            np.savez(file, **columns)  # type: ignore[arg-type]  # NumPy 2 types its own keywords there
            return
        import pyarrow
        import pyarrow.parquet

        def column(values: np.ndarray) -> Any:
            if values.ndim == 1:
                return values
            return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])

        names, mu = columns.pop("path").tolist(), columns.pop("mu")
        if any(not is_utf8(name) for name in names):
            paths = pyarrow.array(list(map(os.fsencode, names)), pyarrow.binary())
        else:
            paths = pyarrow.array(names, pyarrow.string())
        others = {name: column(values) for name, values in columns.items()}
        pyarrow.parquet.write_table(pyarrow.table({"path": paths, **others, "mu": column(mu)}), file)


def _check_output(path: Path) -> None:
    if path.suffix not in (".npz", ".parquet"):
        raise InputError(f"--out must end in .npz or .parquet, got {path}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--out {path}: parquet needs pyarrow, which cannot be imported ({error}); install the extra that has "
                "it (pip install '.[embed]' in the checkout), or write .npz"
            ) from error


def _parser() -> Parser:
    parser = Parser(
        prog="python -m scf_fast.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGES", help="image files, or folders of them, searched at any depth"
    )
    parser.add_argument(
        "--model", required=True, metavar="M", help="output folder of a run, or weight files of any family"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("embeddings.npz"),
        metavar="FILE",
        help=".npz or .parquet (default: %(default)s)",
    )
    add_inference_arguments(parser)
    return parser


def _embed(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    _check_output(out)
    found, options = find_images(arguments.images), inference_options(arguments)
    embedder = open_embedder(arguments.model, options)
    began = time.perf_counter()
    embeddings = embed_images(embedder, ImageFiles(found.paths), options)
    images_per_second = len(found.paths) / (time.perf_counter() - began)
    kept = np.array([i for i in range(len(embeddings)) if i not in embeddings.left_out], dtype=np.int64)
    shown = embeddings.select(kept) if embeddings.left_out else embeddings
    write_embeddings(out, shown, [found.paths[i] for i in kept.tolist()])
    listed = out.with_name(f"{out.name}.left_out.txt")
    listed.unlink(missing_ok=True)  # of an earlier call
    without = "" if embedder.objective is not None else f"; no kappa: {arguments.model} is a backbone alone"
    if embeddings.left_out:
        write_text(listed, "".join(f"{printable(reason)}\n" for reason in embeddings.left_out.values()))
        without += f"; {len(embeddings.left_out)} images left out, listed with the reasons in {listed}"
    without += list_skipped(found.skipped)
    print_lines(f"{out}: {len(kept)} images, {images_per_second:.0f} images/s{without}")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    log_to_terminal()
    return run(parser.prog, lambda: _embed(options))


if __name__ == "__main__":
    sys.exit(main())
