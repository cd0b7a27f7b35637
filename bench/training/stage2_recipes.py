"""Steps and seconds of stage 2 to the final loss of the published recipe: its own, the same from a better start,
``confidence_fast.yaml``, and what else could limit convergence: that recipe with a warm-up, at a constant rate, with
larger batches at the same and at a higher rate, and with averaged weights.

    python -m bench.stage2_recipes [--tiny] [--saved_bkb FILE --saved_fc FILE --data PATH] [--out DIR]

Same net, normalizer (exact), seeds and features in memory; the loss is that of people held out. The published recipe is
30 epochs of Adam at 3e-5, halved every second epoch, from PyTorch's start; where its steps are few, it ends far from
the optimum.
The exit status is 1 if ``confidence_fast.yaml`` needs more than a tenth of its steps with any seed.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import yaml

import scf_fast
from bench.measuring.environment import environment
from bench.measuring.results import add_out_argument, write_json
from bench.measuring.tables import markdown_table
from bench.training.stage2_features import Features, compute, draw
from bench.training.stage2_robustness import Training
from bench.training.stage2_slopes import CHOSEN, Variant
from scf_fast.command import Parser, run

EPOCHS, LR = 30, 3e-5  # of the published recipe
FAST = "confidence_fast"
_FAST = Path(scf_fast.__file__).parent / "recipes" / "confidence_fast.yaml"
_LOOKS = 4  # at the loss of people held out, in an epoch


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        schedule: of the rate: half every second epoch, along a cosine to 0, or constant.
        warmup: share of the steps over which the rate rises from 0.
        batches: that are joined to one.
        averaging: decay of the exponential moving average of the weights that are judged; 0 is none.
    """

    name: str
    variant: Variant
    epochs: int
    lr: float
    schedule: Literal["halved", "cosine", "constant"] = "halved"
    warmup: float = 0.0
    batches: int = 1
    averaging: float = 0.0

    def factor(self, step: int, per_epoch: int) -> float:
        """Returns the share of the rate at a step, counted from 0."""
        steps = self.epochs * per_epoch
        rise = min(1.0, (step + 1) / (self.warmup * steps)) if self.warmup else 1.0
        if self.schedule == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * step / steps))
        return rise * (1.0 if self.schedule == "constant" else 0.5 ** (step // per_epoch // 2))


@dataclass(frozen=True)
class Outcome:
    """One training.

    Attributes:
        loss: of people held out, at the end.
        reached: (step, seconds without the looks at the loss) at which it is first as low as the published recipe's at
            its end; None: never.
    """

    features: str
    net: str
    recipe: str
    seed: int
    steps: int
    loss: float
    reached: tuple[int, float] | None


def recipes() -> list[Recipe]:
    """Returns the recipes, the published one first."""
    fast = yaml.safe_load(_FAST.read_text())
    assert fast["lr_scheduler"] == "Cosine", "as this program has it"
    way = replace(CHOSEN, max_step=fast["max_first_step"])
    recipe = Recipe(FAST, way, fast["epochs"], fast["lr"], "cosine")
    return [
        Recipe("published", Variant("published", start=None), EPOCHS, LR),
        Recipe("published, auto start", Variant("auto"), EPOCHS, LR),
        recipe,
        replace(recipe, name="fast, warm-up", warmup=0.1),
        replace(recipe, name="fast, constant rate", schedule="constant"),
        replace(recipe, name="fast, batch x 4", batches=4),
        replace(
            recipe,
            name="fast, batch x 4, rate x 4",
            batches=4,
            lr=4 * recipe.lr,
            variant=replace(way, max_step=4 * way.max_step),
        ),
        replace(recipe, name="fast, averaged weights", averaging=0.9),
        replace(recipe, name="fast, constant rate, averaged weights", schedule="constant", averaging=0.9),
    ]


class _Average:
    """Exponential moving average of parameters, the first steps of which weigh as the later ones."""

    def __init__(self, parameters: Sequence[torch.Tensor], decay: float):
        self._parameters, self._decay, self._weight = list(parameters), decay, 0.0
        self._sums = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def add(self) -> None:
        """Takes the parameters as they are."""
        self._weight = self._decay * self._weight + 1 - self._decay
        torch._foreach_lerp_(self._sums, self._parameters, 1 - self._decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average in the place of the parameters."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, torch._foreach_div(self._sums, self._weight))
        yield
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, kept)


def train(
    recipe: Recipe, train_set: Features, held_out: Features, net: str, seed: int, batch: int
) -> list[tuple[int, float, float]]:
    """Returns (step, seconds, loss of people held out) along a training."""
    training = Training(train_set, net, "exact", recipe.variant, recipe.lr, seed)
    (group,) = training.optimizer.param_groups
    rate, count = group["lr"], len(train_set.labels)
    batch *= recipe.batches
    average = _Average(training.parameters, recipe.averaging) if recipe.averaging else None
    per_epoch, seconds, found = count // batch, 0.0, []
    for step in range(recipe.epochs * per_epoch):
        epoch, number = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        group["lr"] = rate * recipe.factor(step, per_epoch)
        began = time.perf_counter()
        training.step(order[number * batch : (number + 1) * batch])
        if average:
            average.add()
        seconds += time.perf_counter() - began
        if (step + 1) % max(per_epoch // _LOOKS, 1) == 0 or number == per_epoch - 1:
            with average.applied() if average else contextlib.nullcontext():
                found.append((step + 1, seconds, training.evaluate(held_out)[0]))
    return found


def compare(name: str, features: Features, net: str, seed: int, batch: int) -> list[Outcome]:
    """Trains by every recipe on the same people."""
    train_set, held_out = features.split()
    train_set = train_set.rows(torch.randperm(len(train_set.labels), generator=torch.Generator().manual_seed(0)))
    outcomes, target = [], None
    for recipe in recipes():
        found = train(recipe, train_set, held_out, net, seed, batch)
        target = found[-1][2] if target is None else target
        reached = next(((step, round(seconds, 3)) for step, seconds, loss in found if loss <= target), None)
        outcomes.append(Outcome(name, net, recipe.name, seed, found[-1][0], round(found[-1][2], 3), reached))
    return outcomes


def measure(options: argparse.Namespace) -> int:
    """Trains, prints and writes; returns the exit status."""
    torch.set_num_threads(1)
    if options.saved_bkb:
        name, features = "backbone", compute(options.saved_bkb, options.saved_fc, options.data, options.images)
    else:
        name, features = f"drawn, d = {options.dim}", draw(options.dim, 16, options.people, 20)
    outcomes: list[Outcome] = []
    file = options.out / f"stage2_recipes{'-backbone' if options.saved_bkb else ''}.json"
    for net in options.nets:
        for seed in range(options.seeds):
            outcomes += compare(name, features, net, seed, options.batch)
            content = {"section": "stage2_recipes", "environment": environment("cpu"), "batch": options.batch}
            write_json(file, content | {"outcomes": [asdict(outcome) for outcome in outcomes]})
    head = ["features", "net", "recipe", "seed", "steps", "final loss", "published final loss after steps, seconds"]
    rows = [[*list(asdict(o).values())[:-1], "never" if o.reached is None else o.reached] for o in outcomes]
    print(markdown_table(head, rows))
    published = {(o.net, o.seed): o.steps for o in outcomes if o.recipe == "published"}
    late = [
        outcome
        for outcome in outcomes
        if outcome.recipe == FAST
        and (outcome.reached is None or outcome.reached[0] > published[outcome.net, outcome.seed] / 10)
    ]
    return 1 if late else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.stage2_recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saved_bkb", help="backbone of stage 1; default: drawn features")
    parser.add_argument("--saved_fc", help="its class centers")
    parser.add_argument("--data", help="its images")
    parser.add_argument("--images", type=int, default=2560, help="the first images of --data")
    parser.add_argument("--dim", type=int, default=512, help="of drawn features")
    parser.add_argument("--people", type=int, default=200, help="of drawn features, 20 images each")
    parser.add_argument("--nets", type=lambda text: tuple(text.split(",")), default=("mlp", "conv"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="few images and one seed, to try it out")
    add_out_argument(parser)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.dim, options.people, options.seeds, options.batch, options.nets = 32, 20, 1, 64, ("mlp",)
    if options.saved_bkb and not (options.saved_fc and options.data):
        parser.error("--saved_bkb must come with --saved_fc and --data")
    return run(parser.prog, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
