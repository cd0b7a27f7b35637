"""Command line of the evaluation."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from scf_fast import distributed
from scf_fast.command import Parser, log_to_terminal, print_lines, run
from scf_fast.errors import InputError
from scf_fast.evaluation import datasets
from scf_fast.evaluation.comparison import Comparison, name_models
from scf_fast.evaluation.evaluate import (
    Evaluation,
    Identification,
    Risk,
    Templates,
    Verification,
    all_evaluations,
)
from scf_fast.evaluation.published_table import TableFormat, check_published, make_system_tables, render
from scf_fast.evaluation.report import HTML_FILE, Report, Request, check_folder
from scf_fast.evaluation.results import Score
from scf_fast.evaluation.systems import match_systems, measure_systems, open_evaluations
from scf_fast.inference_arguments import add_inference_arguments, inference_options

_EPILOG = """\
Embeddings are kept in --cache by model and data: an interrupted run computes only what is missing, and one command uses
what another has left. Under `torchrun` or `deepspeed` the ranks share the work. With --out, tables, figures and numbers
go into a report folder: report.html (one file, needs no network), report.md and results.json. Tables always go to
standard output.
"""
_LIKELIHOOD = "auto"  # of --score
# Flags that decide the numbers, in the order that results.json keeps them in.
_DECIDING = (
    "backbone",
    "models",
    "data",
    "pairs",
    "seed",
    "gallery",
    "probe",
    "far",
    "score",
    "align",
    "with_published",
    "flip",
    "normalization",
)


def _open_verify(options: argparse.Namespace) -> list[Evaluation]:
    return [Verification(datasets.open_pair_sets(options.data, options.pairs, options.seed))]


def _open_ijb(options: argparse.Namespace) -> list[Evaluation]:
    sets = [datasets.open_template_set(path, options.align) for path in options.data]
    if len({templates.name for templates in sets}) < len(sets):
        raise InputError(
            f"--data must hold different protocols, got {', '.join(templates.name for templates in sets)}; leave one "
            "out"
        )
    return [Templates({templates.name: templates for templates in sets})]


def _open_identify(options: argparse.Namespace) -> list[Evaluation]:
    return [Identification(datasets.open_subjects(options.gallery), datasets.open_subjects(options.probe))]


def _open_risk(options: argparse.Namespace) -> list[Evaluation]:
    if options.far is not None and not 0 <= options.far < 1:
        raise InputError(f"--far must lie in [0, 1), got {options.far}")
    score = None if options.score == _LIKELIHOOD else Score(options.score)
    if datasets.is_template_set(options.data):
        return [Risk(datasets.open_template_set(options.data, options.align), options.far, score)]
    sets = list(datasets.open_pair_sets([options.data]).values())
    if len(sets) > 1:
        raise InputError(f"--data {options.data} holds {len(sets)} verification sets; give one of its files")
    return [Risk(sets[0], options.far, score)]


def _open_report(options: argparse.Namespace) -> list[Evaluation]:
    return all_evaluations(options.data)


_OPENERS: dict[str, Callable[[argparse.Namespace], list[Evaluation]]] = {
    "verify": _open_verify,
    "ijb": _open_ijb,
    "identify": _open_identify,
    "risk": _open_risk,
    "report": _open_report,
}
_SUMMARIES = {
    "verify": "10-fold accuracy, EER, AUC and TAR at FAR of verification sets, by cosine and by likelihood",
    "ijb": "IJB-B and IJB-C: templates pooled every way, 1:1 and 1:N",
    "identify": "closed- and open-set search of probes in a gallery",
    "risk": "error versus reject by confidence, feature norm, detector score, at random and by an oracle",
    "report": "everything that a folder allows, with figures",
    "table": "the published table: backbones and + PFE-G, + PFE-v, + SCF-G, + SCF on each, side by side",
}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m scf_fast.evaluation",
        epilog=_EPILOG,
        description="Verification, templates, identification and rejection: what a confidence is for. Likelihood and "
        "confidence are Eqn (13) and kappa for models of SCF and PFE-v, the mutual likelihood score and 1 / variance "
        "for those of SCF-G and PFE-G.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    subparsers = {}
    for name, summary in _SUMMARIES.items():
        description = summary[0].upper() + summary[1:] + "."
        subparsers[name] = commands.add_parser(name, help=summary, description=description, epilog=_EPILOG)
        _add_common_arguments(subparsers[name], out_required=name == "report", with_models=name != "table")
    _add_verify_arguments(subparsers["verify"])
    subparsers["ijb"].add_argument(
        "--data", required=True, nargs="+", type=Path, help="folders as released: meta/ and loose_crop/"
    )
    _add_identify_arguments(subparsers["identify"])
    _add_risk_arguments(subparsers["risk"])
    for name in "ijb", "risk":
        subparsers[name].add_argument(
            "--no-align",
            dest="align",
            action="store_false",
            help="the crops of an IJB folder are aligned 112 x 112 faces already",
        )
    subparsers["report"].add_argument(
        "--data",
        required=True,
        type=Path,
        help="folder with verification/*.bin, templates/ in IJB's layout, or both, as "
        "`python -m scf_fast.pipelines.synthetic` writes them; or a folder in IJB's layout itself",
    )
    _add_table_arguments(subparsers["table"])
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser, out_required: bool, with_models: bool) -> None:
    if with_models:
        parser.add_argument(
            "--model",
            required=True,
            nargs="+",
            metavar="[NAME=]M",
            help="output folder of a run, or weight files of any family, also of a backbone alone: then what needs a "
            "confidence is left out; several models are shown side by side",
        )
    parser.add_argument("--out", type=Path, required=out_required, help="report folder")
    parser.add_argument("--overwrite", action="store_true", help="replace another report in OUT")
    parser.add_argument(
        "--cache", type=Path, help="folder of the embeddings (default: evaluation_features beside the model)"
    )
    add_inference_arguments(parser)


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        help=".bin files as insightface ships lfw.bin, text files with lines `path path label`, folders of .bin files, "
        "or folders with one folder of images for each identity; aligned faces",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=6000,
        metavar="N",
        help="pairs to draw from identity folders, a multiple of 20 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another seed draws other pairs (default: %(default)s)"
    )


def _add_identify_arguments(parser: argparse.ArgumentParser) -> None:
    form = "a folder with one folder for each subject, or a list with lines `path label`"
    parser.add_argument("--gallery", required=True, type=Path, help=f"enrolled faces, pooled for each subject: {form}")
    parser.add_argument("--probe", required=True, type=Path, help=f"faces to search for, one by one: {form}")


def _add_risk_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, type=Path, help="one verification set, or one folder in IJB's layout")
    parser.add_argument(
        "--far",
        type=float,
        help="false accept rate on all pairs that fixes the threshold (default: the equal error rate)",
    )
    parser.add_argument(
        "--score",
        default=Score.COSINE.value,
        choices=[*(score.value for score in Score), _LIKELIHOOD],
        help="vmf is Eqn (13), for SCF and PFE-v; mls the mutual likelihood score, for SCF-G and PFE-G; auto the one "
        "that the model has (default: %(default)s)",
    )


def _add_table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, nargs="+", type=Path, help="folders, each of which as `report` takes it: IJBB IJBC"
    )
    parser.add_argument(
        "--backbone",
        required=True,
        nargs="+",
        metavar="[NAME=]B",
        help="backbones that rows begin with: output folders of stage 1, or weight files of any family",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="M",
        help="output folders of stage 2, or model files, of any of these backbones, which are told by the weights in "
        "the files; rows that are not there stay empty",
    )
    parser.add_argument(
        "--with-published", action="store_true", help="the paper's numbers beside those of cosface=B and arcface=B"
    )
    parser.add_argument(
        "--format",
        default=TableFormat.TEXT.value,
        choices=[table_format.value for table_format in TableFormat],
        help="of what is printed; the report folder has them all (default: %(default)s)",
    )


def _request(options: argparse.Namespace, models: dict[str, str] | None = None) -> Request:
    """Returns what decides the numbers, as results.json keeps it."""
    request: Request = {"command": options.command}
    if models is not None:
        request["model"] = list(models.values())
    for flag in _DECIDING:
        if hasattr(options, flag) and not (flag == "normalization" and options.normalization is None):
            value = getattr(options, flag)
            if isinstance(value, list):
                value = [str(item) for item in value]
            request[flag] = str(value) if isinstance(value, Path) else value
    return request


def _write_table(options: argparse.Namespace) -> None:
    request = _request(options)
    if options.out is not None:
        check_folder(options.out, request, options.overwrite)
    if options.with_published:
        check_published(list(name_models(options.backbone, "--backbone")))
    data = open_evaluations(options.data)
    systems = match_systems(options.backbone, options.models, options.normalization)
    blocks, reports = measure_systems(systems, data, inference_options(options), options.cache)
    if not reports:  # another rank reports
        return
    report = Report(request, reports, make_system_tables(blocks, options.with_published))
    if options.out is not None:
        report.write(options.out)
    print(render(report.system_tables, TableFormat(options.format)))
    if options.out is not None:
        print_lines("", f"report: {options.out / HTML_FILE}", file=sys.stderr)


def _evaluate(options: argparse.Namespace) -> None:
    models = name_models(options.model)
    request = _request(options, models)
    if options.out is not None:
        check_folder(options.out, request, options.overwrite)
    evaluations = _OPENERS[options.command](options)
    reports = Comparison(evaluations, models, inference_options(options), options.cache).measure()
    if not reports:  # another rank reports
        return
    report = Report(request, reports)
    if options.out is not None:
        report.write(options.out)
    print(report.as_text())
    if options.out is not None:
        print_lines("", f"report: {options.out / HTML_FILE}")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    log_to_terminal()
    return run(parser.prog, lambda: _write_table(options) if options.command == "table" else _evaluate(options))


if __name__ == "__main__":
    distributed.leave(main())
