"""The models that the published table compares: which backbone each is of, and their measurements."""

from collections.abc import Sequence
from pathlib import Path

from scf_fast.errors import InputError
from scf_fast.evaluation.comparison import Comparison, name_models
from scf_fast.evaluation.evaluate import Evaluation, all_evaluations
from scf_fast.evaluation.published_table import SYSTEMS, Blocks, System
from scf_fast.evaluation.report import ModelReport
from scf_fast.inference import InferenceOptions
from scf_fast.objectives import Objective
from scf_fast.weights.digest import digest_weights
from scf_fast.weights.files import MODEL_FILE
from scf_fast.weights.reading import read_noted_facts, read_weights

Systems = dict[str, dict[System, str]]  # paths of the models by backbone and system; that of None is the backbone's


def match_systems(backbones: Sequence[str], models: Sequence[str], normalization: str | None = None) -> Systems:
    """Returns the models of each backbone, by the weights of the backbone that a model's file holds.

    Args:
        backbones: ``NAME=PATH`` or ``PATH`` of weight files of any family.
        models: paths of models; a folder that holds a run of several objectives stands for all of them.
        normalization: pixel convention of backbones whose files state none; None: as their family has it.
    Raises:
        InputError: files cannot be read, a model's backbone is none of these or takes other pixels, or two models are
            of one objective and backbone.
    """
    systems: Systems = {}
    by_digest: dict[str, str] = {}
    pixels: dict[str, str] = {}
    for name, path in name_models(list(backbones), "--backbone").items():
        weights = read_weights(path, "--backbone")
        digest = digest_weights(weights.require_backbone())
        if digest in by_digest:
            raise InputError(
                f"--backbone {name} and {by_digest[digest]} hold the same weights; the table has each once, leave one "
                "out"
            )
        by_digest[digest] = name
        systems[name] = {None: path}
        weights.facts = read_noted_facts(weights, path) if normalization is None else weights.facts
        pixels[name] = weights.facts.normalization or normalization or weights.normalization
    for path in (part for spec in models for part in _expand(spec)):
        weights = read_weights(path, "--models")
        weights.require_confidence_net()
        backbone = by_digest.get(digest_weights(weights.require_backbone()))
        if backbone is None:
            raise InputError(
                f"--models {path}: its backbone is none of --backbone {', '.join(systems)}, so it belongs to no row; "
                "give the backbone that it was trained on (with --finetune_bkb it has its own), or leave it out"
            )
        own = weights.facts.normalization or normalization or weights.normalization
        if own != pixels[backbone]:
            raise InputError(
                f"--models {path} was trained with {own} pixels, and --backbone {backbone} takes {pixels[backbone]} "
                f"ones as far as its files say; give --normalization {own}"
            )
        other = systems[backbone].setdefault(weights.objective, path)
        if other != path:
            raise InputError(
                f"--models {other} and {path} are both {weights.objective.title} on {backbone}, and the table has one "
                "row for it; leave one out"
            )
    return systems


def _expand(spec: str) -> list[str]:
    """Returns the models of the objectives of a run in one folder; otherwise what was given."""
    folder = Path(spec)
    if (folder / MODEL_FILE).exists():
        return [spec]
    found = [folder / objective.value for objective in Objective if (folder / objective.value / MODEL_FILE).exists()]
    return list(map(str, found)) or [spec]


def open_evaluations(data: Sequence[Path]) -> dict[str, list[Evaluation]]:
    """Opens what each data folder allows, by the folder.

    Raises:
        InputError: as in all_evaluations; or two folders have data sets of one name.
    """
    opened: dict[str, list[Evaluation]] = {}
    seen: dict[str, Path] = {}
    for path in data:
        evaluations = all_evaluations(path, for_table=True)
        for name in {source.name for evaluation in evaluations for source in evaluation.sources}:
            if name in seen:
                raise InputError(
                    f"--data {seen[name]} and {path} both have a data set {name}, which the table could not tell "
                    "apart; give each a call of its own"
                )
            seen[name] = path
        opened[str(path)] = evaluations
    return opened


def measure_systems(
    systems: Systems, data: dict[str, list[Evaluation]], inference: InferenceOptions, cache: Path | None
) -> tuple[Blocks, dict[str, ModelReport]]:
    """Measures every system on all data.

    Args:
        data: from :func:`open_evaluations`.
        cache: folder of the embeddings; None: beside each model.
    Returns:
        The results, and the reports by a name of model and, where there are several, data folder; on ranks other than 0
        no reports.
    Raises:
        InputError: a model cannot be used, or an image cannot be decoded.
    """
    rows = [(backbone, system) for backbone in systems for system in SYSTEMS if system in systems[backbone]]
    names = {row: row[0] if row[1] is None else f"{row[0]} + {row[1].title}" for row in rows}
    models = {names[row]: systems[row[0]][row[1]] for row in rows}
    one_backbone = [[names[row] for row in rows if row[0] == backbone] for backbone in systems]
    measured = Comparison([], models, inference, cache).measure_groups(list(data.values()), one_backbone)
    if not measured:
        return {}, {}
    blocks: Blocks = {backbone: {} for backbone in systems}
    reports: dict[str, ModelReport] = {}
    for backbone, system in rows:
        name = names[backbone, system]
        blocks[backbone][system] = [report.measured.results for report in measured[name]]
        for folder, report in zip(data, measured[name]):
            reports[name if len(data) == 1 else f"{name}, {folder}"] = report
    return blocks, reports
