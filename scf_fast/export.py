"""Exports a model in a format of other programs: ``python -m scf_fast.export MODEL OUT.onnx|OUT.pt2|OUT.safetensors``.

    .onnx         images -> mu (B, d) and confidence (B,), named kappa or, of Gaussians, precision (1 / variance); any
                  batch size; opset 18 or the one asked for, read back from the file; needs the extra `export`
    .pt2          the same as a program of torch.export: torch.export.load(OUT).module()(images)
    .safetensors  the weights with objective, radius and pixel convention, as SCF.from_checkpoint reads them

A backbone alone has one output, its features (B, d), unnormalized, as insightface's own tools take them.
Images are (B, 3, 112, 112) float32 RGB, scaled as the model says, or, with --preprocess, (B, 112, 112, 3) uint8 RGB.
Programs hold the backbone with every BatchNorm folded, in float32. Before the command says that it is done, the file
has been read back and its output compared with PyTorch's.
"""

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.command import Parser, print_lines, run
from scf_fast.errors import InputError
from scf_fast.inference_arguments import add_normalization_argument
from scf_fast.model import SCF, confidence_of
from scf_fast.networks.frozen import FoldedBackbone
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.formats.atomic_file import folder_aside, publish
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.weights.contents import Facts, Weights
from scf_fast.weights.writing import write_weights

TOLERANCE = 1e-4  # of mu absolutely; of the confidence, or of the length of features, relatively
_OPSET = 18
_ONE_FILE = 2_000_000_000  # bytes of weights: a protobuf message, and so an .onnx file, ends at 2^31
_CHECKED_BATCHES = (1, 5)
Output = tuple[torch.Tensor, torch.Tensor] | torch.Tensor  # mu (B, d) and confidence (B,); or features (B, d)
Program = Callable[[torch.Tensor], Output]


class ServedModel(nn.Module):
    """The program that is exported: images -> (mu, confidence), or the features of a backbone alone.

    Its backbone is folded; preprocessing is inside where it is asked for.

    Args:
        model: left as it is, on the CPU.
        preprocess: take (B, 112, 112, 3) uint8 instead of (B, 3, 112, 112) normalized float32.
    """

    def __init__(self, model: SCF, preprocess: bool = False):
        super().__init__()
        self.backbone, self.confidence_net = FoldedBackbone(model.backbone), model.confidence_net
        self._density = model.density
        self._preprocessing = Preprocessing(model.normalization) if preprocess else None
        self.eval()

    def forward(self, images: torch.Tensor) -> Output:
        if self._preprocessing is not None:
            images = self._preprocessing.normalize(images)
        features, convf = self.backbone(images)
        if self.confidence_net is None:
            return features
        return F.normalize(features), confidence_of(self.confidence_net(convf), self._density)


def output_names(model: SCF) -> list[str]:
    """Returns the names of a program's outputs."""
    return ["features"] if model.confidence_net is None else ["mu", model.density.confidence_name]


def export(model: SCF, out: Path, *, preprocess: bool = False, opset: int | None = None) -> None:
    """Writes a model to ``out``, in the format of its suffix, and compares what comes back with the model.

    Args:
        model: on the CPU.
        out: replaced if it exists, once the check has passed. With more than 2 GB of weights, those of an .onnx lie
            beside it in OUT.onnx.data.
        preprocess: images come as uint8; see the module.
        opset: of ONNX, and of no other format; None: 18.
    Raises:
        InputError: unknown suffix, a package is missing, the file is not in the opset asked for, or does not give the
            model's output.
    """
    check_request(out, preprocess, opset)
    form = _FORMATS[out.suffix]
    out.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(out) as folder:
        aside = folder / out.name
        form.write(model, aside, preprocess, _OPSET if opset is None else opset)
        _compare(model, form.load(aside), preprocess, out)
        for path in sorted(folder.iterdir(), reverse=True):  # the file itself comes last, after its data
            publish(path, out.with_name(path.name))


def check_request(out: Path, preprocess: bool, opset: int | None = None) -> None:
    """Checks a request before any work is done.

    Raises:
        InputError: unknown suffix, a package is missing, or the format has no preprocessing or no opset.
    """
    if out.suffix not in _FORMATS:
        raise InputError(f"OUT must end in {', '.join(_FORMATS)}, got {out}")
    if out.suffix == ".safetensors" and preprocess:
        raise InputError("--preprocess belongs to .onnx and .pt2: a .safetensors file holds weights and no program")
    if out.suffix != ".onnx" and opset is not None:
        raise InputError(f"--opset belongs to .onnx, and OUT is {out}; leave it out, or write .onnx")
    if out.suffix == ".onnx":
        missing = [
            package for package in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(package) is None
        ]
        if missing:
            raise InputError(
                f"{out}: ONNX needs {' and '.join(missing)}; install the extra that has them: pip install '.[export]' "
                "in the checkout"
            )


def _random_images(preprocess: bool, count: int) -> torch.Tensor:
    """Returns random pixels as the program takes them: every channel and position differs."""
    pixels = torch.randint(
        256, (count, FACE_SIZE, FACE_SIZE, 3), generator=torch.Generator().manual_seed(count), dtype=torch.uint8
    )
    return pixels if preprocess else Preprocessing().normalize(pixels).contiguous()


@dataclass(frozen=True)
class _Tracing:
    """Input of torch.export and of its ONNX exporter."""

    module: nn.Module
    arguments: tuple[torch.Tensor]
    dynamic_shapes: dict[str, Any]


def _prepare_tracing(model: SCF, preprocess: bool) -> _Tracing:
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    return _Tracing(ServedModel(model, preprocess), (_random_images(preprocess, 2),), shapes)


def _write_program(model: SCF, path: Path, preprocess: bool, opset: int) -> None:
    tracing = _prepare_tracing(model, preprocess)
    torch.export.save(
        torch.export.export(tracing.module, tracing.arguments, dynamic_shapes=tracing.dynamic_shapes), path
    )


def _load_program(path: Path) -> Program:
    return torch.export.load(path).module()


def _write_onnx(model: SCF, path: Path, preprocess: bool, opset: int) -> None:
    # It warns that operators of torchvision are not there; there are none in these networks.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    tracing = _prepare_tracing(model, preprocess)
    program = torch.onnx.export(
        tracing.module,
        tracing.arguments,
        dynamo=True,
        dynamic_shapes=tracing.dynamic_shapes,
        opset_version=opset,
        input_names=["images"],
        output_names=output_names(model),
        verbose=False,
    )
    assert program is not None  # as dynamo=True has it
    facts = {"radius": model.radius, "normalization": "none: uint8 RGB" if preprocess else model.normalization}
    if model.confidence_net is not None:
        facts["objective"] = model.objective.value
    program.model.metadata_props["scf_fast"] = json.dumps(facts)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    program.save(str(path), external_data=weights > _ONE_FILE)
    written = read_opset(path)
    if written != opset:
        raise InputError(
            f"--opset {opset}: PyTorch {torch.__version__} writes this model in opset {written} and cannot convert it; "
            f"give --opset {written}"
        )


def read_opset(path: Path) -> int:
    """Returns the opset that an .onnx file says it is in."""
    import onnx

    found = onnx.load(path, load_external_data=False)
    return next(entry.version for entry in found.opset_import if entry.domain in ("", "ai.onnx"))


def _load_onnx(path: Path) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no other common base
        raise InputError(
            f"{path.name}: onnxruntime {onnxruntime.__version__} cannot read it, so it cannot be compared with PyTorch "
            f"({str(error).splitlines()[0]}); give a lower --opset, or install a newer onnxruntime"
        ) from error

    def run_session(images: torch.Tensor) -> Output:
        first, *second = map(torch.from_numpy, session.run(None, {"images": np.ascontiguousarray(images.numpy())}))
        return (first, second[0]) if second else first

    return run_session


def _write_weights(model: SCF, path: Path, preprocess: bool, opset: int) -> None:
    net_state = None if model.confidence_net is None else model.confidence_net.state_dict()
    weights = Weights(
        str(path),
        backbone=model.backbone.state_dict(),
        confidence_net=net_state,
        facts=Facts(
            radius=model.radius,
            normalization=model.normalization,
            objective=None if model.confidence_net is None else model.objective.value,
        ),
    )
    write_weights(weights, path, "safetensors")


def _load_weights(path: Path) -> Program:
    return _expected_program(SCF.from_checkpoint(path, backbone_alone=True))


@dataclass(frozen=True)
class _Format:
    """Writes a model to a file, and loads the file as a program: ``write(model, path, preprocess, opset)``."""

    write: Callable[[SCF, Path, bool, int], None]
    load: Callable[[Path], Program]


_FORMATS = {  # by suffix
    ".onnx": _Format(_write_onnx, _load_onnx),
    ".pt2": _Format(_write_program, _load_program),
    ".safetensors": _Format(_write_weights, _load_weights),
}


def _expected_program(model: SCF) -> Program:
    """Returns a function of normalized images with the outputs that the exported program must have."""
    return (lambda images: model.embed(images)[0]) if model.confidence_net is None else model


def _direction_and_size(output: Output) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mu and confidence; of features, their directions and lengths."""
    if isinstance(output, torch.Tensor):
        return F.normalize(output), torch.linalg.vector_norm(output, dim=1)
    return output


@torch.no_grad()
def _compare(model: SCF, program: Program, preprocess: bool, out: Path) -> None:
    """Compares a program's output with the model's, on images in batch sizes that tracing has not seen."""
    for count in _CHECKED_BATCHES:
        images = _random_images(preprocess, count)
        normalized = Preprocessing(model.normalization).normalize(images) if preprocess else images
        mu, size = _direction_and_size(program(images))
        expected_mu, expected_size = _direction_and_size(_expected_program(model)(normalized))
        error = max((mu - expected_mu).abs().max().item(), (size / expected_size - 1).abs().max().item())
        if not error <= TOLERANCE:  # NaN is no agreement
            raise InputError(
                f"{out}: its output differs from PyTorch's by {error:.1e} with {count} images, more than "
                f"{TOLERANCE:.0e}, so it is not kept; try another --opset or format"
            )


def _parser() -> Parser:
    parser = Parser(
        prog="python -m scf_fast.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="output folder of a run, or weight files of any family")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write; its suffix selects the format")
    parser.add_argument(
        "--preprocess", action="store_true", help="take uint8 RGB images (B, 112, 112, 3) and scale them inside"
    )
    add_normalization_argument(parser)
    parser.add_argument(
        "--opset", type=int, help=f"of ONNX (default: {_OPSET}); refused where PyTorch cannot write the model in it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def _export(options: argparse.Namespace) -> None:
    check_request(options.out, options.preprocess, options.opset)
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out}: exists; give another name, or --overwrite")
    model = SCF.from_checkpoint(options.model, normalization=options.normalization, backbone_alone=True)
    export(model, options.out, preprocess=options.preprocess, opset=options.opset)
    if options.out.suffix == ".safetensors":
        content = f"weights, {model.normalization} scaling"
    else:
        if options.preprocess:
            images = f"(B, {FACE_SIZE}, {FACE_SIZE}, 3) uint8 RGB"
        else:
            images = f"(B, 3, {FACE_SIZE}, {FACE_SIZE}) float32 RGB, {model.normalization} scaling"
        opset = f", opset {read_opset(options.out)}" if options.out.suffix == ".onnx" else ""
        content = f"{images} -> {' and '.join(output_names(model))}{opset}"
    print_lines(f"{options.out}: {content}; output within {TOLERANCE:.0e} of PyTorch's")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: _export(options))


if __name__ == "__main__":
    sys.exit(main())
