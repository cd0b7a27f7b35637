"""Trains SCF, SCF-G, PFE-G and PFE-v on one backbone, evaluates them, and writes the published table.

    python -m scf_fast.table --data DATA --saved_bkb B --saved_fc F --out OUT [--eval DATA...] [flags of train.py]

One feature cache serves all. On one device there are two trainings, one after the other: SCF with SCF-G, and PFE-G with
PFE-v; each reads a batch once for both of its nets. On four GPUs or more there are four at the same time, on two or
three GPUs two. A call that was interrupted goes on where it stopped; trainings that are done are not repeated.

Flags of train.py hold for all four as far as they concern them: --batch_size and --normalizer for SCF and SCF-G,
--pair_batch for PFE, --variance for the Gaussians. --pair_config takes a recipe of other settings for PFE-G and PFE-v.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scf_fast import command_line
from scf_fast.command import Parser, print_lines, run, split_commas
from scf_fast.distributed import launcher
from scf_fast.errors import InputError
from scf_fast.objectives import Density, Objective
from scf_fast.steps import Step, module_command, run_steps
from scf_fast.weights.reading import read_weights

Values = dict[str, Any]  # options of train.py by name, as scf_fast.command_line.parse_values gives them
_OWN = {
    "objective": "the table has all of them; --models OUT_OF_ANOTHER_RUN leaves one out",
    "output_dir": "--out is where everything goes",
    "resume": "an interrupted call always goes on",
    "overwrite": "give another --out, or delete it",
}
# saved_fc is for pairs too: it notes the pixel convention, on which the cache depends.
_CENTERS_ONLY = ("partial_identities", "batch_size", "published_checkpoints")
_QUIET = {"PYTHONWARNINGS": "ignore::FutureWarning"}


@dataclass(frozen=True)
class Training:
    """One run of train.py.

    Attributes:
        objectives: trained together, on the same batches.
        folder: of its output.
        devices: GPUs by number; none on a machine without.
    """

    objectives: tuple[Objective, ...]
    folder: Path
    devices: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """Names in the paper's table."""
        return " and ".join(objective.title for objective in self.objectives)

    @property
    def models(self) -> list[Path]:
        """The folders of the models that it writes."""
        several = len(self.objectives) > 1
        return [self.folder / objective.value if several else self.folder for objective in self.objectives]

    def values(self, shared: Values, for_pairs: Values) -> Values:
        """Returns the options of this run.

        Args:
            shared: of all runs; those that do not concern this one are left out.
            for_pairs: of PFE-G and PFE-v, on top.
        """
        is_pairwise = self.objectives[0].is_pairwise
        left_out = {"gpu_ids", *(_CENTERS_ONLY if is_pairwise else ("pair_batch",))}
        if Objective.SCF not in self.objectives:
            left_out.add("normalizer")
        if all(objective.density is Density.VMF for objective in self.objectives):
            left_out.add("variance")
        values = {name: value for name, value in shared.items() if name not in left_out}
        values |= for_pairs if is_pairwise else {}
        names = tuple(objective.value for objective in self.objectives)
        return {**values, "stage": "confidence", "objective": names, "output_dir": str(self.folder), "resume": True}

    def step(self, values: Values) -> Step:
        """Returns the step that trains, from :meth:`values`."""
        arguments = as_flags(values)

        def command() -> list[str]:
            if len(self.devices) > 1:
                return [*launcher(devices=self.devices), *arguments]
            return module_command("train", *arguments)

        environment = {"CUDA_VISIBLE_DEVICES": str(self.devices[0])} if len(self.devices) == 1 else {}
        return Step(self.folder.name, f"training: {self.title}", command, _QUIET | environment, arguments)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Returns options of train.py as words of its command line."""
    words = []
    for name, value in values.items():
        if value is None or value == ():
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def plan_trainings(objectives: Sequence[Objective], devices: Sequence[int], out: Path) -> list[Training]:
    """Returns the runs that train these objectives.

    Objectives against class centers share a run, and so do those against images, unless there is a GPU for each. A
    folder that was begun with runs of one kind goes on with them on any number of devices.

    Args:
        devices: GPUs by number; none on a machine without. With fewer than runs, each run has all of them.
    """
    groups = [tuple(o for o in objectives if o.is_pairwise is is_pairwise) for is_pairwise in (False, True)]
    groups = [group for group in groups if group]
    shares = len(devices) < len(objectives)
    if any((out / _folder_name(group)).exists() for group in groups if len(group) > 1):
        shares = True
    elif any((out / objective.value).exists() for group in groups if len(group) > 1 for objective in group):
        shares = False
    if not shares:
        groups = [(objective,) for group in groups for objective in group]
    each = len(devices) // len(groups)
    return [
        Training(group, out / _folder_name(group), tuple(devices[i * each : (i + 1) * each] if each else devices))
        for i, group in enumerate(groups)
    ]


def _folder_name(group: Sequence[Objective]) -> str:
    return "+".join(objective.value for objective in group)


def devices_for(values: Values) -> list[int]:
    """Returns the GPUs to use, by the machine's numbers: those of ``--gpu_ids``, or all that this process may use."""
    if not values.get("cuda", True):
        return []
    if values.get("gpu_ids"):
        return [int(number) for number in split_commas(values["gpu_ids"])]
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [int(word) for word in named.split(",") if word.strip().isdigit()]
    return numbers[:count] if len(numbers) >= count else list(range(count))


@dataclass(frozen=True)
class TablePlan:
    """Everything that the command does.

    Attributes:
        out: folder of the runs, the cache and the table.
        values: options of train.py for all trainings.
        pair_values: other ones for PFE-G and PFE-v.
        trained: folders of models that are there already, by objective.
        evaluation_data: what `python -m scf_fast.evaluation table` takes; none: train alone.
        evaluation_flags: further words for it.
        name: of the backbone in the table.
    """

    out: Path
    values: Values
    pair_values: Values = field(default_factory=dict)
    trained: dict[Objective, str] = field(default_factory=dict)
    evaluation_data: Sequence[str | Path] = ()
    evaluation_flags: Sequence[str] = ()
    name: str = "backbone"

    def objectives(self) -> list[Objective]:
        """Returns what is left to train."""
        return [objective for objective in Objective if objective not in self.trained]

    def steps(self, devices: Sequence[int]) -> list[Step | Sequence[Step]]:
        """Returns the steps; all of them start modules of this package alone, so any current folder will do.

        Raises:
            InputError: an option cannot be used.
        """
        trainings = plan_trainings(self.objectives(), devices, self.out)
        shared = {"feature_cache": str(self.out / "feature_cache"), **self.values}
        settled = [training.values(shared, self.pair_values) for training in trainings]
        for values in settled:
            command_line.make_config(values)
        runs = [training.step(values) for training, values in zip(trainings, settled)]
        steps: list[Step | Sequence[Step]] = []
        if 1 < len(runs) <= len(devices):
            steps += [self._cache_step(shared, devices), runs]
        else:
            steps += runs
        if self.evaluation_data:
            models = [*self.trained.values(), *(str(path) for training in trainings for path in training.models)]
            steps.append(self._evaluation_step(models, settled))
        return steps

    def _cache_step(self, shared: Values, devices: Sequence[int]) -> Step:
        """Returns the step that fills the cache for runs that read it at the same time."""
        kept = {name: value for name, value in shared.items() if name not in ("feature_cache", "gpu_ids")}
        arguments = ["build", str(shared["feature_cache"]), *as_flags(kept)]

        def command() -> list[str]:
            return [*launcher(devices=devices, module="scf_fast.feature_cache"), *arguments]

        return Step("features", "features for all", command, _QUIET, arguments)

    def _evaluation_step(self, models: list[str], trained_with: list[Values]) -> Step:
        arguments = [
            *("table", "--data", *map(str, self.evaluation_data)),
            *("--backbone", f"{self.name}={self.values['saved_bkb']}", "--models", *models),
            *("--out", str(self.out / "table"), "--overwrite", *self.evaluation_flags),
        ]
        decided_by = [*arguments, *(word for values in trained_with for word in as_flags(values))]
        return Step("table", "the table", lambda: module_command("evaluation", *arguments), arguments=decided_by)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m scf_fast.table",
        description=__doc__,
        epilog="python -m scf_fast.train --help explains the flags of train.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the feature cache and the table")
    parser.add_argument(
        "--eval",
        dest="evaluation_data",
        nargs="+",
        default=[],
        metavar="DATA",
        help="folders for the table, as python -m scf_fast.evaluation table takes them; without, nothing is evaluated",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="M",
        help="models that are there already, trained on this backbone: they get their row and are not trained again",
    )
    parser.add_argument("--pair_config", metavar="FILE", help="recipe for PFE-G and PFE-v, over --config and the flags")
    parser.add_argument("--name", default="backbone", help="of the backbone in the table (default: %(default)s)")
    parser.add_argument("--eval_flip", action="store_true", help="evaluate with mirror images too, as insightface does")
    parser.add_argument(
        "--with_published", action="store_true", help="the paper's numbers beside these, for --name cosface or arcface"
    )
    return parser


def _check_given(values: Values, source: str) -> Values:
    """Returns options of train.py without the stage.

    Raises:
        InputError: one of them is this command's own business, or the stage is another.
    """
    for name, reason in _OWN.items():
        if name in values:
            raise InputError(f"{source}--{name} cannot be given: {reason}")
    stage = values.get("stage", "confidence")
    if stage != "confidence":
        raise InputError(f"{source}--stage must be confidence, or left out, got {stage!r}: the table is of stage 2")
    return {name: value for name, value in values.items() if name != "stage"}


def _trained_models(models: Sequence[str]) -> dict[Objective, str]:
    """Returns models by objective.

    Raises:
        InputError: a file cannot be read or holds no confidence net, or two are of one objective.
    """
    found: dict[Objective, str] = {}
    for path in models:
        weights = read_weights(path, "--models")
        weights.require_confidence_net()
        other = found.setdefault(weights.objective, path)
        if other != path:
            raise InputError(f"--models {other} and {path} are both {weights.objective.title}; leave one out")
    return found


def plan(arguments: Sequence[str] | None = None) -> TablePlan:
    """Returns what a command line asks for.

    Raises:
        InputError: an unknown flag, or one that cannot be used.
    """
    options, flags = _parser().parse_known_args(arguments)
    values = _check_given(command_line.parse_values(flags), "")
    pair_values: Values = {}
    if options.pair_config:
        pair_values = _check_given(
            command_line.load_recipe(options.pair_config), f"--pair_config {options.pair_config}: "
        )
    if options.with_published and options.name.lower() not in ("cosface", "arcface"):
        raise InputError(f"--with_published: the paper has cosface and arcface, got --name {options.name}")
    given = {"--flip": options.eval_flip, "--with_published": options.with_published}
    return TablePlan(
        out=options.out,
        values=values,
        pair_values=pair_values,
        trained=_trained_models(options.models),
        evaluation_data=options.evaluation_data,
        evaluation_flags=[flag for flag, is_given in given.items() if is_given],
        name=options.name,
    )


def _make_table(arguments: Sequence[str] | None) -> int:
    table = plan(arguments)
    steps = table.steps(devices_for(table.values))
    table.out.mkdir(parents=True, exist_ok=True)
    status, seconds = run_steps(steps, table.out / "seconds.json")
    if status:
        return status
    print_lines("", f"seconds: {'  '.join(f'{name} {value:.0f}' for name, value in seconds.items())}")
    if not table.evaluation_data:
        print_lines("nothing is evaluated: give --eval DATA to the same command for the table")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run("python -m scf_fast.table", lambda: _make_table(arguments))


if __name__ == "__main__":
    sys.exit(main())
