"""Command line of the evaluation; exit status 2 on input that cannot be evaluated."""

import argparse
import sys
from pathlib import Path

import torch

from scf_fast.evaluation import report
from scf_fast.evaluation.evaluate import evaluate
from scf_fast.model import load_model

_DESCRIPTION = """\
Evaluate an SCF model: verification accuracy and TAR at FAR by cosine and by Eqn (13), templates pooled by average and by
kappa (Eqn (14)), kappa against known image severity, and error versus reject by kappa, feature norm and at random.
"""
_EPILOG = """\
DATA holds verification/*.bin (as insightface ships lfw.bin), templates/ (IJB layout: meta/*.txt and loose_crop/), or both, as
`python -m pipelines.synthetic DATA` writes them; the images are aligned 112 x 112 faces. OUT receives results.json, report.md and
the figures; tables go to standard output.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scf_fast.evaluation", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--model", required=True, type=Path, metavar="RUN", help="output folder of a stage-2 run, or its model file")
    parser.add_argument("--data", required=True, type=Path, help="folder with verification/ and templates/")
    parser.add_argument("--out", required=True, type=Path, help="report folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the report of another model or data set in OUT")
    parser.add_argument("--flip", action="store_true", help="embed mirror images too, as insightface does: features added, log kappa averaged")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=256, help="images at once (default: %(default)s)")
    parser.add_argument("--loader", default="auto", choices=("auto", "dali", "torch"), help="decoder: dali where installed, else torch")
    parser.add_argument("--num-workers", "--num_workers", type=int, default=2, help="decoding threads or processes (default: %(default)s)")
    return parser


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without CUDA
        raise argparse.ArgumentTypeError(f"must be a device that PyTorch can use here, such as cpu or cuda:0, got {text!r}") from error


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        report.check_folder(options.out, str(options.model), str(options.data), options.overwrite)
        model = load_model(options.model, options.device)
        results = evaluate(model, options.data, options.out, name=str(options.model), device=options.device, batch_size=options.batch_size,
                           backend=options.loader, num_workers=options.num_workers, flip=options.flip)
    except (ValueError, OSError) as error:
        print(f"{_parser().prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(report.tables(results))
    print(f"\nreport in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
