"""A synthetic face data set in the file formats real ones are shipped in: `python -m scf_fast.pipelines.synthetic OUT`.

    OUT/train/            train.rec, train.idx, property as MS1M and Glint360K ship them; severity.csv (record_id,label,severity)
    OUT/verification/     clean.bin, mixed.bin as insightface ships lfw.bin; clean.csv, mixed.csv (image,identity,severity)
    OUT/templates/        meta/ and loose_crop/ as IJB-C, 1:1 and 1:N; severity.csv (name,identity,severity)
    OUT/contact_sheet.png what the pictures look like
    OUT/manifest.json     parameters and counts, written last: where it lies, the set is complete

Picture number `index` of an identity is a pure function of (seed, split, identity, index): neither the number of
identities, of pictures or of processes, nor the place where a run was interrupted changes it. The same versions of
NumPy and Pillow on the same kind of processor give the same bytes.

Training identities are 0..N-1, their class labels; evaluation identities are N..N+E-1. Severities are those of
`scf_fast.pipelines.synthetic.degradations`: uniform in [0, 0.1] for 40 % of the training pictures and in [0, 1] for the
others, 0 in `clean`, uniform in [0, 1] in `mixed` and in the templates.
"""

import argparse
import csv
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery, write_template_protocol
from scf_fast.pipelines.evaluation_sets.verification_set import write_verification_set
from scf_fast.pipelines.formats.atomic_file import atomic_output
from scf_fast.pipelines.formats.recordio import RecordWriter, write_property
from scf_fast.pipelines.synthetic.degradations import KINDS, degrade, draw_amounts
from scf_fast.pipelines.synthetic.faces import IMAGE_SIZE, Face, Identity, Variation, render_face

FORMAT = 2  # of the folder and of the pictures: raise it with any change that alters either

_NEAR_CLEAN_SHARE, _NEAR_CLEAN_SEVERITY = 0.4, 0.1
_FOLDS = 10
_VERIFICATION_IMAGES = 12  # pictures of an identity that the pairs of one verification set draw on
_GENUINE_PER_IDENTITY = 7.5  # pairs; as many impostor pairs: 3000 pairs for 200 identities
_TEMPLATES = 4  # of an identity
_TEMPLATE_IMAGES = (3, 8)  # fewest and most in a template
_TEMPLATE_MEDIA = (1, 3)  # fewest and most in a template
_IMPOSTORS_PER_IDENTITY = 500  # template pairs: enough for a false accept rate of 1e-4 with 200 identities
_IDENTITIES_PER_PART = 10
_SCENE = (
    "light_azimuth",
    "light_elevation",
    "light_strength",
    "gain",
    "warmth",
    "tint",
    "saturation",
    "background",
)  # one for all frames of a medium
# First word of each random stream after the seed. The order of draws inside a stream is part of the format.
_FACE, _TRAIN, _CLEAN, _MIXED, _TEMPLATE_PLAN, _TEMPLATE, _CLEAN_PAIRS, _MIXED_PAIRS, _TEMPLATE_PAIRS, _SHEET = range(
    10
)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What determines a set."""

    identities: int = 1000  # for training
    images_per_identity: int = 20  # for training
    eval_identities: int = 200  # never trained on; 0 leaves the evaluation sets out
    seed: int = 0

    def __post_init__(self):
        for name, least in (("identities", 1), ("images_per_identity", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.eval_identities and self.eval_identities < 2 * _FOLDS:
            raise InputError(
                f"eval_identities must be 0 or at least {2 * _FOLDS}, two for each of the {_FOLDS} folds, got "
                f"{self.eval_identities}"
            )


class Picture(NamedTuple):
    """One picture of a set."""

    encoded: bytes  # JPEG
    split: str  # train, clean, mixed or templates
    identity: int
    severity: float
    landmarks: np.ndarray  # (5, 2) pixels (x, y)
    template: int = 0  # of the identity
    medium: int = 0  # of the template


def _rng(seed, *stream):
    return np.random.default_rng([seed, *stream])


def make_face(seed: int, identity: int) -> Face:
    """The face of an identity number; any number from 0 on."""
    rng = _rng(seed, _FACE, identity)
    return Face(Identity.draw(rng), rng)


def _take(face, split, identity, rng, severity, scene=None, **place):
    variation = Variation.draw(rng)
    if scene:
        variation = dataclasses.replace(variation, **{name: getattr(scene, name) for name in _SCENE})
    pixels, landmarks = render_face(face, variation)
    encoded = degrade(pixels, draw_amounts(severity, rng), rng)
    return Picture(encoded, split, identity, severity, landmarks, **place)


def train_pictures(parameters: Parameters, identity: int):
    """Yield the training pictures of an identity."""
    face = make_face(parameters.seed, identity)
    for index in range(parameters.images_per_identity):
        rng = _rng(parameters.seed, _TRAIN, identity, index)
        near_clean, severity = rng.random() < _NEAR_CLEAN_SHARE, rng.random()
        yield _take(face, "train", identity, rng, severity * _NEAR_CLEAN_SEVERITY if near_clean else severity)


def evaluation_pictures(parameters: Parameters, identity: int):
    """Yield what the evaluation sets show of an identity: pictures for the pairs of clean.bin and mixed.bin, then its
    templates.

    The frames of one medium share light and background, not pose, expression or severity.
    """
    face = make_face(parameters.seed, identity)
    for split, stream in (("clean", _CLEAN), ("mixed", _MIXED)):
        for index in range(_VERIFICATION_IMAGES):
            rng = _rng(parameters.seed, stream, identity, index)
            yield _take(face, split, identity, rng, rng.random() if split == "mixed" else 0.0)
    for template in range(_TEMPLATES):
        plan = _rng(parameters.seed, _TEMPLATE_PLAN, identity, template)
        images, media = plan.integers(*_TEMPLATE_IMAGES, endpoint=True), plan.integers(*_TEMPLATE_MEDIA, endpoint=True)
        scenes = [Variation.draw(plan) for _ in range(media)]
        for index in range(images):
            rng = _rng(parameters.seed, _TEMPLATE, identity, template, index)
            medium = int(index * media // images)
            yield _take(
                face, "templates", identity, rng, rng.random(), scenes[medium], template=template, medium=medium
            )


_RENDERERS = {"train": train_pictures, "evaluation": evaluation_pictures}


class _Part(NamedTuple):
    """A few identities for training or for evaluation: the unit of work, and of what an interruption leaves in
    place.
    """

    group: str
    identities: range

    def path(self, out: Path) -> Path:
        return out / ".parts" / f"{self.group}-{self.identities.start:09d}.npz"

    def render(self, out: Path, parameters: Parameters) -> int:
        """Write the part and return its number of pictures."""
        pictures = [picture for identity in self.identities for picture in _RENDERERS[self.group](parameters, identity)]
        encoded, *columns = zip(*pictures)
        with atomic_output(self.path(out)) as file:
            np.savez(
                file,
                encoded=np.frombuffer(b"".join(encoded), np.uint8),
                sizes=[len(image) for image in encoded],
                **dict(zip(Picture._fields[1:], map(np.array, columns))),
            )
        return len(pictures)

    def load(self, out: Path):
        """Yield the part's pictures."""
        with np.load(self.path(out)) as stored:
            columns = {name: stored[name] for name in (*Picture._fields, "sizes")}
        ends = np.cumsum(columns.pop("sizes"))
        encoded = columns.pop("encoded").tobytes()
        for row, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            yield Picture(encoded[start:end], *(columns[name][row] for name in Picture._fields[1:]))

    def count(self, out: Path) -> int:
        with np.load(self.path(out)) as stored:
            return len(stored["sizes"])


def _parts(parameters):
    """Every part of a set, in the order of identities."""
    train, evaluation = parameters.identities, parameters.identities + parameters.eval_identities
    for group, first, last in (("train", 0, train), ("evaluation", train, evaluation)):
        for start in range(first, last, _IDENTITIES_PER_PART):
            yield _Part(group, range(start, min(start + _IDENTITIES_PER_PART, last)))


def _pictures(out, parameters, split):
    """All pictures of a split, in the order of identities."""
    group = "train" if split == "train" else "evaluation"
    for part in _parts(parameters):
        if part.group == group:
            yield from (picture for picture in part.load(out) if picture.split == split)


def _render_parts(out, parameters, workers):
    parts = list(_parts(parameters))
    finished = [part for part in parts if part.path(out).exists()]
    missing = [part for part in parts if not part.path(out).exists()]
    per_template_identity = _TEMPLATES * sum(_TEMPLATE_IMAGES) / 2
    expected = round(
        parameters.identities * parameters.images_per_identity
        + parameters.eval_identities * (2 * _VERIFICATION_IMAGES + per_template_identity)
    )
    reused = sum(part.count(out) for part in finished)
    with tqdm(total=expected, initial=reused, unit=" images", desc="rendering", smoothing=0.1) as progress:
        for count in _run(missing, out, parameters, min(workers, len(missing))):
            progress.update(count)
        progress.total = progress.n  # the sizes of templates are random, so the total was an expectation
        progress.refresh()


def _run(parts, out, parameters, workers):
    """Render parts, yielding the number of pictures in each as it is done."""
    if workers <= 1:
        for part in parts:
            yield part.render(out, parameters)
        return
    # An interrupt reaches every process of the terminal: workers ignore it and finish the part they are at.
    ignore_interrupts = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), **ignore_interrupts) as pool:
        try:
            for future in as_completed([pool.submit(part.render, out, parameters) for part in parts]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits for the parts that are under way, which stay
            raise


def _write_csv(path, header, rows):
    with atomic_output(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        text.flush()
        text.detach()


def _write_train(out, parameters):
    folder = out / "train"
    images, total = parameters.images_per_identity, parameters.identities * parameters.images_per_identity
    severities = []
    with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
        writer.write_header_record(total, parameters.identities)
        for record_id, picture in enumerate(_pictures(out, parameters, "train"), start=1):
            writer.write_image(record_id, int(picture.identity), picture.encoded)
            severities.append((record_id, picture.identity, f"{picture.severity:.6f}"))
        for identity in range(parameters.identities):
            first = 1 + identity * images
            writer.write_identity_record(total + 1 + identity, first, first + images - 1)
    write_property(folder, parameters.identities, IMAGE_SIZE, IMAGE_SIZE)
    _write_csv(folder / "severity.csv", ("record_id", "label", "severity"), severities)
    return total


def _fold_pairs(rng, identities, genuine):
    """`genuine` different pairs of one identity and as many of two, as ((identity, index), (identity, index)), out of
    one fold.
    """
    own = list(itertools.combinations(range(_VERIFICATION_IMAGES), 2))
    shares = np.bincount(np.resize(rng.permutation(len(identities)), genuine), minlength=len(identities))
    for identity, share in zip(identities, shares):
        for which in rng.choice(len(own), share, replace=False):
            yield (identity, own[which][0]), (identity, own[which][1])
    seen = set()
    while len(seen) < genuine:
        two = rng.choice(len(identities), 2, replace=False)
        pair = tuple(
            (identities[who], int(index)) for who, index in zip(sorted(two), rng.integers(_VERIFICATION_IMAGES, size=2))
        )
        if pair not in seen:
            seen.add(pair)
            yield pair


def _write_verification(out, parameters, split):
    """Pairs fold by fold, so that consecutive tenths of the file are its folds; no identity is in two of them."""
    pool = {
        identity: list(group)
        for identity, group in itertools.groupby(
            _pictures(out, parameters, split), lambda picture: int(picture.identity)
        )
    }
    rng = _rng(parameters.seed, _CLEAN_PAIRS if split == "clean" else _MIXED_PAIRS)
    genuine = int(_GENUINE_PER_IDENTITY * parameters.eval_identities / _FOLDS)
    pairs = []
    for fold in np.array_split(rng.permutation(list(pool)), _FOLDS):
        pairs += _fold_pairs(rng, fold.tolist(), genuine)
    pictures = [pool[identity][index] for pair in pairs for identity, index in pair]
    write_verification_set(
        out / "verification" / f"{split}.bin",
        [picture.encoded for picture in pictures],
        [a[0] == b[0] for a, b in pairs],
    )
    _write_csv(
        out / "verification" / f"{split}.csv",
        ("image", "identity", "severity"),
        ((position, picture.identity, f"{picture.severity:.6f}") for position, picture in enumerate(pictures)),
    )
    return len(pairs)


def _template_pairs(rng, eval_identities):
    """All genuine pairs of templates and a random choice of impostor pairs, shuffled: (P, 2) template ids from 1, (P,)
    bool.
    """
    count = eval_identities * _TEMPLATES
    first, second = np.triu_indices(count, 1)
    same = first // _TEMPLATES == second // _TEMPLATES
    impostors = np.flatnonzero(~same)
    chosen = rng.choice(impostors, min(len(impostors), _IMPOSTORS_PER_IDENTITY * eval_identities), replace=False)
    order = rng.permutation(np.concatenate([np.flatnonzero(same), chosen]))
    return np.stack([first[order], second[order]], axis=1) + 1, same[order]


def _galleries(eval_identities):
    """1:N as IJB-C has it: the first template of each identity is enrolled, in G1 or G2 in turn; the others are
    searched for in both.
    """
    ids = np.arange(eval_identities * _TEMPLATES).reshape(eval_identities, _TEMPLATES) + 1
    subjects = np.arange(eval_identities) + 1
    probes, probe_subjects = ids[:, 1:].ravel(), np.repeat(subjects, _TEMPLATES - 1)
    return [
        Gallery(name, ids[start::2, 0], subjects[start::2], probes, probe_subjects)
        for start, name in enumerate(("G1", "G2"))
    ]


def _write_templates(out, parameters):
    """One template protocol. Landmarks are the true ones; there is no detector, so every score is 1."""
    pictures = list(_pictures(out, parameters, "templates"))
    names = [f"{number}.jpg" for number in range(1, len(pictures) + 1)]
    identity, template, medium = np.array(
        [(picture.identity, picture.template, picture.medium) for picture in pictures]
    ).T
    template_ids = (identity - parameters.identities) * _TEMPLATES + template + 1
    media_ids = np.unique(template_ids * (_TEMPLATE_MEDIA[1] + 1) + medium, return_inverse=True)[1] + 1
    pairs, same = _template_pairs(_rng(parameters.seed, _TEMPLATE_PAIRS), parameters.eval_identities)
    write_template_protocol(
        out / "templates",
        "synthetic",
        names=names,
        images=[picture.encoded for picture in pictures],
        template_ids=template_ids,
        media_ids=media_ids,
        landmarks=np.stack([picture.landmarks for picture in pictures]),
        detector_score=np.ones(len(names)),
        pair_template_ids=pairs,
        pair_labels=same,
        galleries=_galleries(parameters.eval_identities),
    )
    _write_csv(
        out / "templates" / "severity.csv",
        ("name", "identity", "severity"),
        ((name, picture.identity, f"{picture.severity:.6f}") for name, picture in zip(names, pictures)),
    )
    return {
        "images": len(names),
        "templates": int(template_ids.max()),
        "media": int(media_ids.max()),
        "pairs": len(same),
        "genuine_pairs": int(same.sum()),
    }


def contact_sheet(seed: int, identities, variations: int = 4, severities=(0.2, 0.4, 0.6, 0.8, 1.0)) -> Image.Image:
    """One row an identity: clean pictures, then one picture at increasing severity of one random mixture."""
    gap, head = 6, 40
    width = variations * IMAGE_SIZE + 2 * gap + len(severities) * IMAGE_SIZE
    sheet = Image.new("RGB", (width + gap, head + len(identities) * IMAGE_SIZE + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    draw.text((gap, 12), "one identity a row: pose, expression and light vary", "black", font)
    lefts = [gap + column * IMAGE_SIZE for column in range(variations)]
    for severity in severities:
        lefts.append(lefts[-1] + IMAGE_SIZE + (gap if len(lefts) == variations else 0))
        draw.text((lefts[-1] + 10, 12), f"severity {severity:g}", "black", font)
    for row, identity in enumerate(identities):
        face = make_face(seed, identity)
        rngs = [_rng(seed, _SHEET, identity, column) for column in range(variations)]
        clean = [render_face(face, Variation.draw(rng))[0] for rng in rngs]
        mixture = draw_amounts(1.0, rngs[0])
        cells = [degrade(pixels, np.zeros(len(KINDS)), rngs[0]) for pixels in clean]
        cells += [degrade(clean[0], severity * mixture, rngs[0]) for severity in severities]
        for left, cell in zip(lefts, cells):
            sheet.paste(Image.open(io.BytesIO(cell)), (left, head + row * IMAGE_SIZE))
    return sheet


def _claim(out, parameters, overwrite):
    """Make `out` ours to write for these parameters. Returns whether it already holds the complete set."""
    wanted = {"format": FORMAT, **dataclasses.asdict(parameters)}
    manifest, note = out / "manifest.json", out / ".parts" / "parameters.json"
    if overwrite:
        for ours in ("manifest.json", ".parts", "train", "verification", "templates", "contact_sheet.png"):
            path = out / ours
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    held = next((path for path in (manifest, note) if path.exists()), None)
    if held is None:
        if not overwrite and out.exists() and any(out.iterdir()):
            raise InputError(
                f"{out} must be empty or hold a synthetic set, and holds other files: choose another folder, or pass "
                "--overwrite"
            )
        with atomic_output(note) as file:
            file.write(json.dumps({"parameters": wanted}).encode())
        return False
    try:
        found = json.loads(held.read_text())["parameters"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{held} is damaged: choose another folder, or pass --overwrite to make the set anew"
        ) from error
    if found != wanted:
        raise InputError(
            f"{out} holds another synthetic set ({_differences(found, wanted)}): choose another folder, or pass "
            "--overwrite"
        )
    return held == manifest


def _differences(found, wanted):
    return ", ".join(
        f"{name} is {found.get(name)} there and {value} here"
        for name, value in wanted.items()
        if found.get(name) != value
    )


def write_synthetic_set(out, parameters: Parameters, *, workers: int | None = None, overwrite: bool = False) -> dict:
    """Write a set, or complete one that was interrupted, or leave a complete one as it is.

    Args:
        out: folder, made if missing.
        parameters: what the set is made of.
        workers: processes; None takes one for each core this process may use.
        overwrite: remove a set of other parameters, and write into a folder that holds other files.
    Returns:
        The manifest.
    Raises:
        ValueError: the folder holds something else, and `overwrite` is not given.
    """
    out = Path(out)
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    if not _claim(out, parameters, overwrite):
        _render_parts(out, parameters, workers or len(os.sched_getaffinity(0)))
        counts = {"train": {"images": _write_train(out, parameters), "identities": parameters.identities}}
        if parameters.eval_identities:
            counts["verification"] = {
                split: {"pairs": _write_verification(out, parameters, split)} for split in ("clean", "mixed")
            }
            counts["templates"] = _write_templates(out, parameters)
        first_shown = parameters.identities if parameters.eval_identities else 0
        with atomic_output(out / "contact_sheet.png") as file:
            contact_sheet(parameters.seed, range(first_shown, first_shown + 7)).save(file, "PNG")
        manifest = {
            "parameters": {"format": FORMAT, **dataclasses.asdict(parameters)},
            "counts": counts,
            "versions": {"numpy": np.__version__, "pillow": PIL.__version__},
        }
        with atomic_output(out / "manifest.json") as file:
            file.write(json.dumps(manifest, indent=2).encode())
    shutil.rmtree(out / ".parts", ignore_errors=True)
    return json.loads((out / "manifest.json").read_text())


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.pipelines.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Parameters()
    parser.add_argument(
        "out", metavar="OUT", help="folder to write; an interrupted set is completed, a complete one is left as it is"
    )
    parser.add_argument(
        "--identities",
        type=int,
        metavar="N",
        default=defaults.identities,
        help="training identities (default %(default)s)",
    )
    parser.add_argument(
        "--images-per-identity",
        type=int,
        metavar="M",
        default=defaults.images_per_identity,
        help="training pictures of each (default %(default)s)",
    )
    parser.add_argument(
        "--eval-identities",
        type=int,
        metavar="E",
        default=defaults.eval_identities,
        help="further identities for the evaluation sets, 0 for none (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", default=defaults.seed, help="another seed, other faces (default %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="W", help="processes (default: one a core); the pictures do not depend on it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace whatever set OUT holds")
    options = parser.parse_args(arguments)
    try:
        parameters = Parameters(options.identities, options.images_per_identity, options.eval_identities, options.seed)
        manifest = write_synthetic_set(options.out, parameters, workers=options.workers, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenExecutor as error:
        print(
            f"error: {error} (out of memory? try fewer --workers); the same command goes on with what lies in "
            f"{options.out}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what lies in {options.out}", file=sys.stderr)
        return 130
    print(f"{options.out}: {json.dumps(manifest['counts'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
