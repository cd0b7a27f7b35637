"""Images -> direction mu and concentration kappa, as fast as the machine allows: `python -m scf_fast.embed IMAGES...
--model M --out FILE`.

The images are aligned faces; those of another size than 112 x 112 are resized whole. OUT.npz holds mu (N, d) float32,
kappa (N,) float32 and path (N,); OUT.parquet the same columns, which needs the extra `embed` (pyarrow). A backbone
alone gives no kappa.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from tqdm import tqdm

from scf_fast.arguments import add_loading_arguments, find_images
from scf_fast.errors import InputError
from scf_fast.inference import Embedder, check_usable, default_device, embed_batches, put, room_for
from scf_fast.model import SCF
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.sources.base import ImageFiles


def _write(path: Path, mu: np.ndarray, kappa: dict[str, np.ndarray], paths: list[str]) -> None:
    with atomic_output(path) as file:
        if path.suffix == ".npz":
            np.savez(file, mu=mu, **kappa, path=np.array(paths))
            return
        import pyarrow
        import pyarrow.parquet

        directions = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(mu.ravel()), mu.shape[1])
        pyarrow.parquet.write_table(pyarrow.table({"path": paths, **kappa, "mu": directions}), file)


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGES",
        help="image files, or folders of them, searched all the way down",
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
    add_loading_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        _check_output(options.out)
        paths = find_images(options.images)
        model = SCF.from_checkpoint(options.model, normalization=options.normalization, backbone_alone=True)
        embedder = Embedder(model, options.device or default_device(), options.precision, options.flip)
        source = ImageFiles(paths)
        features, log_kappa = embeddings = room_for(embedder, len(source))
        batches = np.split(np.arange(len(source)), range(options.batch_size, len(source), options.batch_size))
        began = time.perf_counter()
        with tqdm(total=len(source), desc="embedding", unit=" images", mininterval=1) as progress:
            for indices, *values in embed_batches(
                embedder, source, batches, loader=options.loader, num_workers=options.num_workers
            ):
                put(embeddings, indices, *values)
                progress.update(len(indices))
        seconds = time.perf_counter() - began
        check_usable(features, log_kappa, source, np.arange(len(source)))
        kappa = {"kappa": log_kappa.exp().numpy()} if embedder.gives_kappa else {}
        _write(options.out, F.normalize(features).numpy(), kappa, list(map(str, paths)))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    without = "" if embedder.gives_kappa else f"; no kappa: {options.model} is a backbone alone"
    print(f"{options.out}: {len(source)} images, {len(source) / seconds:.0f} images/s{without}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
