"""Command line of the evaluation; exit status 2 on input that cannot be evaluated."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from scf_fast import distributed
from scf_fast.arguments import add_loading_arguments
from scf_fast.errors import InputError
from scf_fast.evaluation import datasets, report
from scf_fast.evaluation.embeddings import EmbeddingStore
from scf_fast.evaluation.evaluate import (
    Evaluation,
    Identification,
    Risk,
    Templates,
    Verification,
    everything,
    measure_all,
)
from scf_fast.inference import Embedder, default_device
from scf_fast.model import SCF

_EPILOG = """\
Embeddings are kept in --cache by model and data: what an interrupted run has computed is not computed again, and one command uses what another
has left. Under `torchrun` or `deepspeed` the ranks share the work. With --out, the tables, figures and numbers go into a report folder:
report.html (one file, needs no network), report.md and results.json; tables always go to standard output.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.evaluation",
        epilog=_EPILOG,
        description="Verification, templates, identification and rejection with SCF models: what kappa is for.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str, open_data) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=_EPILOG
        )
        sub.add_argument(
            "--model",
            required=True,
            nargs="+",
            metavar="[NAME=]M",
            help="output folder of a run, or weight files of any family, of a "
            "backbone alone too: then what needs kappa is left out; several are shown side by side",
        )
        sub.add_argument("--out", type=Path, required=name == "report", help="report folder")
        sub.add_argument("--overwrite", action="store_true", help="replace another report in OUT")
        sub.add_argument(
            "--cache", type=Path, help="folder of the embeddings (default: evaluation_features beside the model)"
        )
        add_loading_arguments(sub)
        sub.set_defaults(open_data=open_data)
        return sub

    verify = command(
        "verify",
        "10-fold accuracy, EER, AUC and TAR at FAR of verification sets, by cosine and by Eqn (13)",
        _open_verify,
    )
    verify.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        help=".bin files as insightface ships lfw.bin, text files of lines `path path label`, "
        "folders of .bin files, or folders with one folder of images for each identity; aligned faces",
    )
    verify.add_argument(
        "--pairs",
        type=int,
        default=6000,
        metavar="N",
        help="pairs to draw of identity folders, a multiple of 20 (default: %(default)s)",
    )
    verify.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another seed draws other pairs (default: %(default)s)"
    )
    ijb = command("ijb", "IJB-B and IJB-C: templates pooled every way, 1:1 and 1:N", _open_ijb)
    ijb.add_argument("--data", required=True, nargs="+", type=Path, help="folders as released: meta/ and loose_crop/")
    identify = command("identify", "closed- and open-set search of probes in a gallery", _open_identify)
    for flag, what in (
        ("--gallery", "enrolled faces; a subject's are pooled"),
        ("--probe", "faces to search for, each on its own"),
    ):
        identify.add_argument(
            flag,
            required=True,
            type=Path,
            help=f"{what}: a folder with one folder a subject, or a list of lines `path label`",
        )
    risk = command(
        "risk", "error versus reject by kappa, feature norm, detector score, at random and by an oracle", _open_risk
    )
    risk.add_argument("--data", required=True, type=Path, help="one verification set, or one folder in IJB's layout")
    risk.add_argument(
        "--far",
        type=float,
        help="false accept rate on all pairs that fixes the threshold (default: the equal error rate)",
    )
    risk.add_argument(
        "--score", default="cosine", choices=("cosine", "vmf"), help="vmf is Eqn (13) (default: %(default)s)"
    )
    for sub in ijb, risk:
        sub.add_argument(
            "--no-align",
            "--no_align",
            dest="align",
            action="store_false",
            help="the crops of an IJB folder are aligned 112 x 112 faces already",
        )
    full = command("report", "all that a folder allows, with figures", _open_report)
    full.add_argument(
        "--data",
        required=True,
        type=Path,
        help="folder with verification/*.bin, templates/ in IJB's layout, or both, as "
        "`python -m scf_fast.pipelines.synthetic` writes them; or one in IJB's layout itself",
    )
    return parser


def _open_verify(options) -> list[Evaluation]:
    return [Verification(datasets.open_pair_sets(options.data, options.pairs, options.seed))]


def _open_ijb(options) -> list[Evaluation]:
    sets = [datasets.open_template_set(path, options.align) for path in options.data]
    if len({templates.name for templates in sets}) < len(sets):
        raise InputError(
            f"--data must hold different protocols, got {', '.join(templates.name for templates in sets)}; leave one "
            "out"
        )
    return [Templates({templates.name: templates for templates in sets})]


def _open_identify(options) -> list[Evaluation]:
    return [Identification(datasets.open_subjects(options.gallery), datasets.open_subjects(options.probe))]


def _open_risk(options) -> list[Evaluation]:
    if options.far is not None and not 0 <= options.far < 1:
        raise InputError(f"--far must lie in [0, 1), got {options.far}")
    if datasets.is_template_set(options.data):
        return [Risk(datasets.open_template_set(options.data, options.align), options.far, options.score)]
    sets = datasets.open_pair_sets([options.data])
    if len(sets) > 1:
        raise InputError(f"--data {options.data} holds {len(sets)} verification sets; give one of its files")
    return [Risk(*sets.values(), options.far, options.score)]


def _open_report(options) -> list[Evaluation]:
    return everything(options.data)


def _models(specs: list[str]) -> dict[str, str]:
    """Weight files by the name of the model, which is the last folder or file where none is given."""
    models = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or os.path.exists(spec):
            name, path = Path(spec.split(",")[0]).resolve().name, spec
        if name in models:
            raise InputError(f"two models are named {name}; give them names, as in --model first=PATH second=PATH")
        models[name] = path
    return models


def _cache(options, path: str) -> Path:
    if options.cache is not None:
        return options.cache
    first = Path(path.split(",")[0])
    return (first if first.is_dir() else first.parent) / "evaluation_features"


def _request(options, models: dict[str, str]) -> dict:
    """What decides the numbers, as results.json keeps it."""

    def plain(value):
        return (
            [str(item) for item in value]
            if isinstance(value, list)
            else str(value)
            if isinstance(value, Path)
            else value
        )

    deciding = (
        "data",
        "pairs",
        "seed",
        "gallery",
        "probe",
        "far",
        "score",
        "align",
        "flip",
        *(["normalization"] if options.normalization else []),
    )
    return {
        "command": options.command,
        "model": list(models.values()),
        **{key: plain(getattr(options, key)) for key in deciding if hasattr(options, key)},
    }


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    rank, world_size = distributed.environment()
    try:
        models = _models(options.model)
        request = _request(options, models)
        if options.out is not None:
            report.check_folder(options.out, request, options.overwrite)
        evaluations = options.open_data(options)
        if world_size > 1:
            distributed.start()
        results, figures, notes, files = {}, {}, [], {}
        for name, path in models.items():
            started = time.perf_counter()
            model = SCF.from_checkpoint(path, normalization=options.normalization, backbone_alone=True)
            embedder = Embedder(model, options.device or default_device(), options.precision, options.flip)
            if not embedder.gives_kappa and any(evaluation.needs_kappa for evaluation in evaluations):
                raise InputError(
                    f"--score vmf needs kappa, and --model {path} is a backbone alone; take --score cosine"
                )
            store = EmbeddingStore(
                embedder,
                _cache(options, path),
                batch_size=options.batch_size,
                loader=options.loader,
                num_workers=options.num_workers,
                rank=rank,
                world_size=world_size,
            )
            for source, description in (source for evaluation in evaluations for source in evaluation.sources):
                store.fill(source, description if len(models) == 1 else f"{name}: {description}")
            if world_size > 1:
                torch.distributed.barrier()
            if rank == 0:
                measured = measure_all(evaluations, store)
                results[name] = (
                    {"model": path} | measured.results | {"seconds": {"evaluation": time.perf_counter() - started}}
                )
                figures[name] = measured.figures
                without = (
                    []
                    if embedder.gives_kappa
                    else [f"{name} is a backbone alone ({embedder.normalization} pixels), so what needs κ is left out."]
                )
                notes = list(dict.fromkeys([*notes, *without, *measured.notes]))
                files |= measured.files
        if rank == 0:
            if options.out is not None:
                report.write_report(options.out, request, results, figures, notes, files)
            print(report.text(results, notes))
            if options.out is not None:
                print(f"\nreport: {options.out / report.HTML_FILE}")
    except (ValueError, OSError) as error:
        print(f"{_parser().prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if world_size > 1:
            distributed.finish()
    return 0


if __name__ == "__main__":
    distributed.leave(main())
