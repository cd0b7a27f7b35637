"""A model in the formats of other programs: `python -m scf_fast.export MODEL OUT.onnx|OUT.pt2|OUT.safetensors`.

    .onnx         images -> mu (B, d), kappa (B,); any batch size; opset 18 unless asked otherwise. Needs the extra `export`.
    .pt2          the same as a program of torch.export: torch.export.load(OUT).module()(images)
    .safetensors  the weights with radius and pixel convention, as SCF.from_checkpoint reads them

A backbone alone has one output, its features (B, d), unnormalized, as insightface's own tools take them.
images are (B, 3, 112, 112) float32 RGB scaled as the model says, or, with --preprocess, (B, 112, 112, 3) uint8 RGB.
Programs hold the backbone with every BatchNorm folded, in float32. Before the command says that it is done, the file
has been read back and its output compared with PyTorch's.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.arguments import add_normalization_argument
from scf_fast.errors import InputError
from scf_fast.model import SCF
from scf_fast.networks.frozen import FoldedBackbone
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.weights.contents import Facts, Weights
from scf_fast.weights.writing import write_weights

TOLERANCE = 1e-4  # of mu absolutely, of kappa, or the length of features, relatively
SUFFIXES = (".onnx", ".pt2", ".safetensors")
_OPSET = 18
_ONE_FILE = 2_000_000_000  # bytes of weights: a protobuf message, and so an .onnx file, ends at 2^31
_CHECKED_BATCHES = (1, 5)


class ServedModel(nn.Module):
    """images -> (mu, kappa), or of a backbone alone the features, for export: folded backbone, and preprocessing where
    it belongs inside.

    Args:
        model: left as it is, on the CPU.
        preprocess: take (B, 112, 112, 3) uint8 instead of (B, 3, 112, 112) normalized float32.
    """

    def __init__(self, model: SCF, preprocess: bool = False):
        super().__init__()
        self.backbone, self.confidence_net = FoldedBackbone(model.backbone), model.confidence_net
        self._preprocessing = Preprocessing(model.normalization) if preprocess else None
        self.eval()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        if self._preprocessing is not None:
            images = self._preprocessing.normalize(images)
        features, convf = self.backbone(images)
        return features if self.confidence_net is None else (F.normalize(features), self.confidence_net(convf).exp())


def outputs(model: SCF) -> list[str]:
    """Names of what its program gives."""
    return ["features"] if model.confidence_net is None else ["mu", "kappa"]


def export(model: SCF, out: Path, *, preprocess: bool = False, opset: int = _OPSET) -> None:
    """Writes a model to `out`, in the format of its suffix, and compares what comes back with the model.

    Args:
        model: on the CPU.
        out: replaced if it exists, once the check has passed. Beside an .onnx of more than 2 GB of weights they lie in
            OUT.onnx.data.
        preprocess: images come as uint8; see the module.
        opset: of ONNX.
    Raises:
        ValueError: unknown suffix, a package is missing, or the file does not give the model's output.
    """
    check_request(out, preprocess)
    write, run = {
        ".onnx": (_write_onnx, _run_onnx),
        ".pt2": (_write_program, _run_program),
        ".safetensors": (_write_weights, _run_weights),
    }[out.suffix]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        aside = Path(folder) / out.name
        write(model, aside, preprocess, opset)
        _compare(model, run(aside), preprocess, out)
        for path in sorted(Path(folder).iterdir(), reverse=True):  # the file itself comes last, after its data
            os.replace(path, out.with_name(path.name))


def check_request(out: Path, preprocess: bool) -> None:
    """Raises:
    ValueError: what `export` raises before it does anything.
    """
    if out.suffix not in SUFFIXES:
        raise InputError(f"OUT must end in {', '.join(SUFFIXES)}, got {out}")
    if out.suffix == ".safetensors" and preprocess:
        raise InputError("--preprocess belongs to .onnx and .pt2: a .safetensors file holds weights and no program")
    if out.suffix == ".onnx":
        missing = [
            package for package in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(package) is None
        ]
        if missing:
            raise InputError(
                f"{out}: ONNX needs {' and '.join(missing)}; install the extra that has them: pip install '.[export]' "
                "in the checkout"
            )


def _example(preprocess: bool, count: int) -> torch.Tensor:
    """Random pixels: every channel and position differs."""
    pixels = torch.randint(
        256, (count, FACE_SIZE, FACE_SIZE, 3), generator=torch.Generator().manual_seed(count), dtype=torch.uint8
    )
    return pixels if preprocess else Preprocessing().normalize(pixels).contiguous()


def _program(model: SCF, preprocess: bool) -> tuple[nn.Module, tuple, dict]:
    """Module, arguments and dynamic shapes for torch.export."""
    return ServedModel(model, preprocess), (_example(preprocess, 2),), {"images": {0: torch.export.Dim("batch", min=1)}}


def _write_program(model, path, preprocess, opset):
    module, arguments, shapes = _program(model, preprocess)
    torch.export.save(torch.export.export(module, arguments, dynamic_shapes=shapes), path)


def _run_program(path):
    return torch.export.load(path).module()


def _write_onnx(model, path, preprocess, opset):
    # It warns that operators of torchvision are not there; there are none in these networks.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    module, arguments, shapes = _program(model, preprocess)
    program = torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=opset,
        input_names=["images"],
        output_names=outputs(model),
        verbose=False,
    )
    facts = {"radius": model.radius, "normalization": "none: uint8 RGB" if preprocess else model.normalization}
    program.model.metadata_props["scf_fast"] = json.dumps(facts)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    program.save(str(path), external_data=weights > _ONE_FILE)


def _run_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images):
        found = tuple(map(torch.from_numpy, session.run(None, {"images": np.ascontiguousarray(images.numpy())})))
        return found if len(found) > 1 else found[0]

    return run


def _write_weights(model, path, preprocess, opset):
    net_state = None if model.confidence_net is None else model.confidence_net.state_dict()
    weights = Weights(
        str(path),
        backbone=model.backbone.state_dict(),
        confidence_net=net_state,
        facts=Facts(radius=model.radius, normalization=model.normalization),
    )
    write_weights(weights, path, "safetensors")


def _run_weights(path):
    return _answer(SCF.from_checkpoint(path, backbone_alone=True))


def _answer(model: SCF) -> Callable:
    """What its program is to give."""
    return (lambda images: model.embed(images)[0]) if model.confidence_net is None else model


def _direction_and_size(found: tuple[torch.Tensor, torch.Tensor] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and kappa; of features their directions and lengths."""
    return (F.normalize(found), torch.linalg.vector_norm(found, dim=1)) if isinstance(found, torch.Tensor) else found


@torch.no_grad()
def _compare(model: SCF, run: Callable, preprocess: bool, out: Path) -> None:
    for count in _CHECKED_BATCHES:
        images = _example(preprocess, count)
        normalized = Preprocessing(model.normalization).normalize(images) if preprocess else images
        (mu, size), (expected_mu, expected_size) = (
            _direction_and_size(run(images)),
            _direction_and_size(_answer(model)(normalized)),
        )
        error = max((mu - expected_mu).abs().max().item(), (size / expected_size - 1).abs().max().item())
        if not error <= TOLERANCE:  # NaN is no agreement
            raise InputError(
                f"{out}: its output differs from PyTorch's by {error:.1e} with {count} images, more than "
                f"{TOLERANCE:.0e}, so it is not "
                "kept; try another --opset or format"
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scf_fast.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="output folder of a run, or weight files of any family")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write; its suffix says the format")
    parser.add_argument(
        "--preprocess", action="store_true", help="take uint8 RGB images (B, 112, 112, 3) and scale them inside"
    )
    add_normalization_argument(parser)
    parser.add_argument("--opset", type=int, default=_OPSET, help="of ONNX (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    options = parser.parse_args(arguments)
    try:
        check_request(options.out, options.preprocess)
        if options.out.exists() and not options.overwrite:
            raise InputError(f"{options.out}: exists; give another name, or --overwrite")
        model = SCF.from_checkpoint(options.model, normalization=options.normalization, backbone_alone=True)
        export(model, options.out, preprocess=options.preprocess, opset=options.opset)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.out.suffix == ".safetensors":
        what = f"weights, {model.normalization} scaling"
    else:
        scaled = f"(B, 3, {FACE_SIZE}, {FACE_SIZE}) float32 RGB, {model.normalization} scaling"
        takes = f"(B, {FACE_SIZE}, {FACE_SIZE}, 3) uint8 RGB" if options.preprocess else scaled
        what = f"{takes} -> {' and '.join(outputs(model))}" + (
            f", opset {options.opset}" if options.out.suffix == ".onnx" else ""
        )
    print(f"{options.out}: {what}; output within {TOLERANCE:.0e} of PyTorch's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
