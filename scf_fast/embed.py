"""Computes directions and confidences of images: ``python -m scf_fast.embed IMAGES... --model M --out FILE``.

The images are aligned faces; those of another size than 112 x 112 are resized whole. OUT.npz holds mu (N, d) float32,
the confidence (N,) float32 and path (N,); OUT.parquet holds the same columns and needs the extra ``embed`` (pyarrow).
The confidence of SCF and PFE-v is kappa; that of SCF-G and PFE-G is precision, 1 / variance (over several dimensions
the mean), beside log_variance (N,) or (N, d) float32. A backbone alone gives no confidence.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scf_fast.command import Parser, print_lines, run
from scf_fast.errors import InputError
from scf_fast.inference import Embedder, Embeddings, InferenceOptions, embed_batches, open_embedder
from scf_fast.inference_arguments import add_inference_arguments, find_images, inference_options
from scf_fast.model import confidence_of
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.sources.base import ImageFiles


def embed_images(embedder: Embedder, source: ImageFiles, options: InferenceOptions) -> Embeddings:
    """Embeds all images of a source in order, under a progress bar.

    Raises:
        InputError: an image cannot be decoded, or gives unusable numbers; the message names it.
    """
    embeddings = Embeddings.allocate(len(source), embedder.embedding_dim, embedder.outputs, embedder.density)
    batches = np.split(np.arange(len(source)), range(options.batch_size, len(source), options.batch_size))
    with tqdm(total=len(source), desc="embedding", unit=" images", mininterval=1) as progress:
        for indices, batch in embed_batches(embedder, source, batches, options.decoding):
            embeddings.write_rows(indices, batch)
            progress.update(len(batch))
    embeddings.check_usable(source)
    return embeddings


def write_embeddings(path: Path, embeddings: Embeddings, image_paths: list[Path]) -> None:
    """Writes mu, the confidence and log variances if there are any, and the paths, in the format of the suffix: .npz or
    .parquet.
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

        paths, mu = columns.pop("path").tolist(), columns.pop("mu")
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
    _check_output(arguments.out)
    paths, options = find_images(arguments.images), inference_options(arguments)
    embedder = open_embedder(arguments.model, options)
    began = time.perf_counter()
    embeddings = embed_images(embedder, ImageFiles(paths), options)
    images_per_second = len(paths) / (time.perf_counter() - began)
    write_embeddings(arguments.out, embeddings, paths)
    without = "" if embedder.objective is not None else f"; no kappa: {arguments.model} is a backbone alone"
    print_lines(f"{arguments.out}: {len(paths)} images, {images_per_second:.0f} images/s{without}")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: _embed(options))


if __name__ == "__main__":
    sys.exit(main())
