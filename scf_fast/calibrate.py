"""Fits one factor on kappa: ``python -m scf_fast.calibrate MODEL --data UNSEEN --output FILE``.

On unseen people kappa is too high by about one factor. It is found from their images alone, without class centers
(:mod:`scf_fast.held_out`), printed with the reliability of kappa before and after, and put into the last bias of the
confidence net, so that everything that reads the model has it: Eqn (13) of pairs, templates, exported programs. The
order of the images by kappa is the same as before.

--data are people that training has not seen; left out, they are those that the run has held out by --validation.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scf_fast.command import Parser, log_to_terminal, print_lines, run, split_paths
from scf_fast.config import load_saved
from scf_fast.errors import InputError
from scf_fast.held_out import Held, measure_reliability
from scf_fast.inference import Embedder, Embeddings, InferenceOptions, default_device, embed_batches
from scf_fast.inference_arguments import add_inference_arguments, inference_options
from scf_fast.model import SCF
from scf_fast.objectives import Density
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sampling.selection import hold_out_people
from scf_fast.pipelines.sources.base import ImageSource, SelectedImages
from scf_fast.run.same_inputs import is_data_of
from scf_fast.weights.reading import read_weights
from scf_fast.weights.writing import write_weights

_CONFIG = "config.yaml"  # beside a model that is still in its run


def choose_images(model: Path, data: str | None) -> tuple[ImageSource, np.ndarray]:
    """Returns a data set and which of its images are of people that the model has not been trained on, (N,) bool.

    Args:
        model: its run's configuration may lie beside it.
        data: the data set, or None for what the run held out.
    Raises:
        InputError: there are no such people.
    """
    saved_file = (model if model.is_dir() else model.parent) / _CONFIG
    saved = load_saved(saved_file) if saved_file.exists() else None
    trained_on = [] if saved is None else [Path(path).resolve() for path in split_paths(saved["data"])]
    if data is None:
        if saved is None:
            raise InputError(f"--data must be given: there is no {saved_file} that says what the model was trained on")
        data = saved["data"]
    source = open_source(list(split_paths(data)), None if saved is None else saved.get("dataroot"), None)
    given = {Path(path).resolve() for path in split_paths(data)}
    if not set(trained_on) & given and not is_data_of(saved_file.parent, source):  # which may have moved
        return source, np.ones(len(source), dtype=bool)
    assert saved is not None, "it has named the data"
    if not saved.get("validation"):
        raise InputError(
            f"--data {data}: the model was trained on these people, whose kappa needs no factor; give others, or train "
            "with --validation 0.01 to hold some out"
        )
    return source, hold_out_people(source.labels, saved["validation"], saved["seed"])


def embed(embedder: Embedder, source: ImageSource, images: np.ndarray, options: InferenceOptions) -> Held:
    """Embeds some images of a source under a progress bar.

    Args:
        images: (M,) positions.
    Raises:
        InputError: an image gives unusable numbers; or cannot be decoded, with ``options.strict``: otherwise it is left
            out, and the log names it.
    """
    left_out: dict[int, str] | None = None if options.strict else {}
    found = Embeddings.allocate(len(source), embedder.embedding_dim, True)
    batches = np.split(images, range(options.batch_size, len(images), options.batch_size))
    with tqdm(total=len(images), desc="embedding", unit=" images", mininterval=1) as progress:
        for indices, batch in embed_batches(embedder, source, batches, options.decoding, left_out):
            batch.check_usable(SelectedImages(source, indices.numpy()))
            found.write_rows(indices, batch)
            progress.update(len(batch))
    images = images[~np.isin(images, list(left_out or ()))]
    assert found.kappa is not None, "allocated with kappa"
    return Held(found.mu.numpy()[images], found.kappa[images].astype(np.float64), source.labels[images])


def calibrate(arguments: argparse.Namespace) -> None:
    """Fits, reports and writes."""
    if arguments.output.exists() and not arguments.overwrite:
        raise InputError(f"--output {arguments.output}: exists; give another name, or --overwrite")
    weights, options = read_weights(arguments.model, "model"), inference_options(arguments)
    weights.require_confidence_net()
    if weights.objective.density is not Density.VMF:
        raise InputError(
            f"{arguments.model}: is a model of {weights.objective.title}, which has a variance and no kappa to "
            "calibrate"
        )
    source, chosen = choose_images(Path(str(arguments.model).split(",")[0]), arguments.data)
    model = SCF.from_checkpoint(arguments.model, normalization=options.normalization)
    embedder = Embedder(model, options.device or default_device(), options.precision, options.flip)
    held = embed(embedder, source, np.flatnonzero(chosen), options)
    before = measure_reliability(held)
    after = measure_reliability(Held(held.mu, before.factor * held.kappa, held.labels))
    for name, found in (("before", before), ("after", after)):
        title = f"{name}: mean difference of cosine and A_d(kappa) by decile {found.error:.4f}"
        print_lines(title, *found.lines())
    assert model.confidence_net is not None, "required"
    net = model.confidence_net.cpu()
    net.multiply(before.factor)
    factor = before.factor * (weights.facts.kappa_factor or 1.0)
    weights.confidence_net = net.state_dict()
    weights.facts = dataclasses.replace(weights.facts, kappa_factor=factor)
    write_weights(weights, arguments.output, "safetensors" if arguments.output.suffix == ".safetensors" else "scf_fast")
    people = len(np.unique(held.labels))
    images = f"{len(held.labels)} images of {people} people"
    print_lines(f"{arguments.output}: kappa times {before.factor:.4g}, from {images}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scf_fast.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="output folder of a run, or weight files of any family")
    parser.add_argument("--data", metavar="PATH", help="images of people that training has not seen, of any kind")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the calibrated model")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    add_inference_arguments(parser)
    options = parser.parse_args(arguments)
    log_to_terminal()
    return run(parser.prog, lambda: calibrate(options))


if __name__ == "__main__":
    sys.exit(main())
