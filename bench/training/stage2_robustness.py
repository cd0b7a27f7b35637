"""Which learning rates train a confidence net, before and after: cached features, every start, slope and limit.

    python -m bench.stage2_robustness [--tiny] [--saved_bkb FILE --saved_fc FILE --data PATH] [--steps 100] [--out DIR]

Trains one net for each learning rate x net x normalizer x seed x variant (``bench.training.stage2_slopes``) on features
drawn with a known concentration or, with --saved_bkb, on those of a backbone, and says of each whether it

    diverged     the loss of held-out people is not finite, or the median kappa above 1e8
    collapsed    the median kappa is below 1e-3, below 1 % of the one that fits, or the same for all images
    trained      the loss of held-out people is below that of the best constant kappa
    unfinished   none of these

and how far that loss is from the best constant's. Also the bias of each slope: its best constant kappa over the exact
one's. The exit status is 1 if a cell of the chosen way has diverged or collapsed, or if one that trained before does
not train now.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import nn

from bench.measuring.environment import environment
from bench.measuring.results import add_out_argument, write_json
from bench.measuring.tables import markdown_table
from bench.training.stage2_features import MAP_SIZE, Features, compute, draw
from bench.training.stage2_slopes import (
    CHOSEN,
    PUBLISHED_VARIANTS,
    TODAY,
    VARIANTS,
    Slope,
    Variant,
    global_norm,
    optimum,
    rate_limit,
)
from scf_fast.command import Parser, run
from scf_fast.kernels import scf_loss
from scf_fast.networks.confidence import LOG_KAPPA_FLOOR, ConfidenceNet, build_confidence_net

BATCH = 64
WEIGHT_DECAY = 5e-4
_REACH = 7.0  # of bounded log kappa around the start: a factor of 1000


@dataclass(frozen=True)
class Cell:
    """One training."""

    dim: int
    net: str
    normalizer: str
    variant: str
    lr: float
    seed: int
    verdict: str
    gain: float  # nats that the loss of held-out people is below that of the best constant kappa; NaN as None
    kappa: float  # median of held-out people
    seconds: float

    def as_record(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("gain", "kappa"):
            values[name] = float(f"{values[name]:.4g}") if math.isfinite(values[name]) else None
        return values | {"seconds": round(self.seconds, 2)}


class _Floor(torch.autograd.Function):
    """log(1e-6 + exp(raw)) with the gradient of raw."""

    @staticmethod
    def forward(ctx, raw):
        return torch.logaddexp(raw, raw.new_full((), LOG_KAPPA_FLOOR))

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Training:
    """A confidence net in training on features in memory."""

    def __init__(self, train: Features, net: str, normalizer: str, variant: Variant, lr: float, seed: int):
        self.train, self.normalizer, self.variant, self.seed = train, normalizer, variant, seed
        self.start = train.fitting_kappa if variant.start == "auto" else None
        torch.manual_seed(seed)
        self.net: ConfidenceNet = build_confidence_net(net, train.channels, MAP_SIZE, self.start)
        self.parameters = list(self.net.parameters())
        if variant.max_step:
            lr = min(lr, rate_limit(self.log_kappa, self.parameters, train.convf[:BATCH], variant.max_step))
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)

    def log_kappa(self, convf: torch.Tensor) -> torch.Tensor:
        """(N, C, 7, 7) -> (N,), with the floor of this variant in place of the net's own."""
        found: list[torch.Tensor] = []
        handle = cast(nn.Module, self.net._log_kappa).register_forward_hook(
            lambda module, inputs, output: found.append(output)
        )
        self.net(convf)
        handle.remove()
        raw = found[0].squeeze(-1)
        if self.variant.bounded:
            center = math.log(self.start or 1.0)
            raw = center + _REACH * torch.tanh((raw - center) / _REACH)
        if self.variant.floor_passes:
            return _Floor.apply(raw)
        return torch.logaddexp(raw, raw.new_full((), LOG_KAPPA_FLOOR))

    def step(self, rows: torch.Tensor) -> None:
        batch, variant = self.train.rows(rows), self.variant
        log_kappa = self.log_kappa(batch.convf)
        loss, terms = scf_loss(
            batch.mu, log_kappa, batch.centers, batch.labels, normalizer=self.normalizer, return_terms=True
        )
        if variant.slope is not Slope.EXACT:
            count = len(rows)
            log_kappa.register_hook(
                lambda slope: variant.slope.of(slope * count, terms.kappa, terms.cos, batch.dim) / count
            )
        gradients = list(torch.autograd.grad(loss, self.parameters))
        if variant.drops_overflow and not torch.nn.utils.get_total_norm(gradients).isfinite():
            return
        if variant.max_norm:
            torch._foreach_mul_(gradients, min(1.0, variant.max_norm / max(global_norm(gradients), 1e-300)))
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        self.optimizer.step()

    def run(self, steps: int) -> None:
        count = len(self.train.labels)
        for step in range(steps):
            epoch, batch = divmod(step, count // BATCH)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
            self.step(order[batch * BATCH : (batch + 1) * BATCH])

    @torch.no_grad()
    def evaluate(self, held_out: Features) -> tuple[float, torch.Tensor]:
        """Returns the loss and log kappa, (N,), of other people."""
        self.net.eval()
        log_kappa = self.log_kappa(held_out.convf)
        self.net.train()
        return _loss(held_out, log_kappa, self.normalizer), log_kappa


def _loss(features: Features, log_kappa: torch.Tensor, normalizer: str) -> float:
    return scf_loss(features.mu, log_kappa, features.centers, features.labels, normalizer=normalizer).item()


def best_constant(features: Features, normalizer: str) -> float:
    """Returns the log of the one kappa under which these images have the lowest loss."""
    grid = torch.linspace(math.log(1), math.log(1e5), 400)
    losses = [_loss(features, torch.full((len(features.labels),), value), normalizer) for value in grid.tolist()]
    return grid[torch.tensor(losses).argmin()].item()


def verdict(loss: float, log_kappa: torch.Tensor, constant: float, constant_loss: float) -> str:
    """Says what became of a training; the module's head has the words."""
    median = log_kappa.median().item()
    if not math.isfinite(loss) or median > math.log(1e8):
        return "diverged"
    if median < max(math.log(1e-3), constant + math.log(0.01)) or log_kappa.std() < 1e-3:
        return "collapsed"
    return "trained" if loss < constant_loss else "unfinished"


def grid(
    train: Features,
    held_out: Features,
    nets: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    steps: int,
    normalizers: Sequence[str],
    ways: Sequence[str],
) -> Iterator[Cell]:
    """Trains every cell on one set of features.

    Args:
        ways: titles of variants; empty: all.
    """
    for normalizer in normalizers:
        constant = best_constant(held_out, normalizer)
        constant_loss = _loss(held_out, torch.full((len(held_out.labels),), constant), normalizer)
        variants = VARIANTS if normalizer == "exact" else PUBLISHED_VARIANTS
        chosen = [variant for variant in variants if not ways or variant.title in ways]
        for net, variant, lr, seed in product(nets, chosen, rates, range(seeds)):
            began = time.perf_counter()
            training = Training(train, net, normalizer, variant, lr, seed)
            training.run(steps)
            loss, log_kappa = training.evaluate(held_out)
            yield Cell(
                train.dim,
                net,
                normalizer,
                variant.title,
                lr,
                seed,
                verdict(loss, log_kappa, constant, constant_loss),
                constant_loss - loss,
                log_kappa.median().exp().item(),
                time.perf_counter() - began,
            )


def biases(features: Features) -> dict[str, float]:
    """Returns for each slope its best constant kappa over the exact one's."""
    exact = optimum(Slope.EXACT, features.cos, features.dim)
    return {slope.name.lower(): round(optimum(slope, features.cos, features.dim) / exact, 4) for slope in Slope}


def table(cells: Sequence[Cell]) -> str:
    """Returns the verdicts: a row for each way, a column for each rate, all seeds in one field."""
    rates = sorted({cell.lr for cell in cells})
    rows: dict[tuple, dict[float, list[Cell]]] = {}
    for cell in cells:
        rows.setdefault((cell.dim, cell.net, cell.normalizer, cell.variant), {}).setdefault(cell.lr, []).append(cell)
    lines = [[*key, *(_field(found.get(lr, [])) for lr in rates)] for key, found in rows.items()]
    return markdown_table(["d", "net", "normalizer", "way", *(f"{lr:.0e}" for lr in rates)], lines)


def _field(cells: list[Cell]) -> str:
    """One field of the table: the worst gain where all seeds trained, else the number of seeds by verdict."""
    verdicts = [cell.verdict for cell in cells]
    if set(verdicts) == {"trained"}:
        return f"{min(cell.gain for cell in cells):.2f}"
    return ", ".join(f"{verdicts.count(name)} {name}" for name in sorted(set(verdicts)))


def regressions(cells: Sequence[Cell]) -> list[str]:
    """Returns what speaks against the chosen way."""
    found, before = [], {}
    for cell in cells:
        key = (cell.dim, cell.net, cell.normalizer, cell.lr, cell.seed)
        if cell.variant == TODAY.title:
            before[key] = cell.verdict
        if cell.variant == CHOSEN.title:
            if cell.verdict in ("diverged", "collapsed") or (before.get(key), cell.verdict) == (
                "trained",
                "unfinished",
            ):
                found.append(f"{key}: {cell.verdict}, before {before.get(key)}")
    return found


def measure(options: argparse.Namespace) -> int:
    """Trains the grid, prints and writes it, and returns the exit status."""
    torch.set_num_threads(1)  # the nets are small; other cores may train beside
    if options.saved_bkb:
        sets = {"backbone": compute(options.saved_bkb, options.saved_fc, options.data, options.images)}
    else:
        sets = {
            f"drawn, d = {dim}": draw(dim, options.channels, options.people, options.images_per_person)
            for dim in options.dims
        }
    cells: list[Cell] = []
    result: dict[str, Any] = {
        "section": "stage2_robustness",
        "environment": environment("cpu"),
        "steps": options.steps,
        "batch": BATCH,
        "slopes": {slope.name.lower(): slope.value for slope in Slope},
        "variants": [{**asdict(variant), "slope": variant.slope.name.lower()} for variant in VARIANTS],
        "features": {
            name: {"images": len(f.labels), "people": len(f.centers), "channels": f.channels, "dim": f.dim,
                   "fitting_kappa": round(f.fitting_kappa, 1), "bias": biases(f)}
            for name, f in sets.items()
        },
    }  # fmt: skip
    name = f"stage2_robustness{options.label and '-' + options.label}.json"
    for features in sets.values():
        train, held_out = features.split()
        sizes = (options.seeds, options.steps)
        for cell in grid(train, held_out, options.nets, options.rates, *sizes, options.normalizers, options.ways):
            cells.append(cell)
            if len(cells) % 20 == 0:
                write_json(options.out / name, result | {"cells": [cell.as_record() for cell in cells]})
    failures = regressions(cells)
    write_json(options.out / name, result | {"cells": [cell.as_record() for cell in cells], "against": failures})
    print(table(cells))
    for features_name, facts in result["features"].items():
        print(f"{features_name}: best constant kappa over the exact one's: {facts['bias']}")
    print("\n".join(failures))
    return 1 if failures else 0


def _numbers(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.stage2_robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--saved_bkb", help="backbone of stage 1; default: drawn features")
    parser.add_argument("--saved_fc", help="its class centers")
    parser.add_argument("--data", help="its images")
    parser.add_argument("--images", type=int, default=4096, help="the first images of --data")
    parser.add_argument("--dims", type=_numbers(int), default=(128, 512), help="of drawn features")
    parser.add_argument("--channels", type=int, default=16, help="of drawn feature maps")
    parser.add_argument("--people", type=int, default=80)
    parser.add_argument("--images_per_person", type=int, default=24)
    parser.add_argument("--nets", type=_numbers(str), default=("mlp", "conv"))
    parser.add_argument("--rates", type=_numbers(float), default=(1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--normalizers", type=_numbers(str), default=("exact", "published"))
    parser.add_argument("--ways", type=_numbers(str), default=(), help="such as before,chosen; default: all")
    parser.add_argument("--label", default="", help="put into the name of the file of results")
    parser.add_argument("--tiny", action="store_true", help="two rates, one seed and a few steps, to try it out")
    add_out_argument(parser)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.dims, options.nets, options.rates, options.seeds, options.steps = (32,), ("mlp",), (1e-4, 1e-1), 1, 12
        options.channels, options.people, options.images_per_person = 8, 12, 12
    if options.saved_bkb and not (options.saved_fc and options.data):
        parser.error("--saved_bkb must come with --saved_fc and --data")
    return run(parser.prog, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
