"""Several models on the same evaluations: all ranks embed, rank 0 measures."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from scf_fast import distributed
from scf_fast.command import split_paths
from scf_fast.errors import InputError
from scf_fast.evaluation.embeddings import EmbeddingStore
from scf_fast.evaluation.evaluate import Evaluation, measure_all
from scf_fast.evaluation.report import ModelReport
from scf_fast.evaluation.results import DENSITY_MEASURES, Score
from scf_fast.inference import InferenceOptions, open_embedder
from scf_fast.objectives import Objective


@dataclass(frozen=True)
class Comparison:
    """Models and what is measured of them."""

    evaluations: list[Evaluation]
    models: dict[str, str]  # weight files by the name of the model
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    cache: Path | None = None  # folder of the embeddings; None: evaluation_features beside each model

    def measure(self) -> dict[str, ModelReport]:
        """Measures every model; returns the reports by name on rank 0, and nothing on other ranks.

        Under a launcher it joins the process group, and leaves it at the end.

        Raises:
            InputError: a model cannot be read or used, or an image cannot be decoded.
        """
        return {name: reports[0] for name, reports in self.measure_groups([self.evaluations]).items()}

    def measure_groups(
        self, groups: list[list[Evaluation]], one_backbone: list[list[str]] | None = None
    ) -> dict[str, list[ModelReport]]:
        """Does what :meth:`measure` does for several groups of evaluations, each with a report of its own.

        Args:
            one_backbone: names of models with the same backbone and pixel convention: it then runs once for all of
                them. By default each model is taken to have its own.
        """
        rank, world_size = distributed.environment()
        sharing = one_backbone or [[name] for name in self.models]
        if world_size > 1:
            distributed.start()
        try:
            reports: dict[str, list[ModelReport]] = {}
            for names in sharing:
                reports |= self._measure_models(names, groups, rank, world_size)
        finally:
            if world_size > 1:
                distributed.finish()
        return reports if rank == 0 else {}

    def _measure_models(
        self, names: list[str], groups: list[list[Evaluation]], rank: int, world_size: int
    ) -> dict[str, list[ModelReport]]:
        """Fills the stores of models on one backbone on all ranks, and measures each group on rank 0."""
        stores: dict[str, EmbeddingStore] = {}
        started = time.perf_counter()
        for name in names:
            path = self.models[name]
            embedder = open_embedder(path, self.inference)
            for evaluation in (evaluation for group in groups for evaluation in group):
                _check_score(evaluation.score, embedder.objective, path)
            stores[name] = EmbeddingStore(
                embedder,
                _beside(path) / "evaluation_features" if self.cache is None else self.cache,
                batch_size=self.inference.batch_size,
                decoding=self.inference.decoding,
                rank=rank,
                world_size=world_size,
                strict=self.inference.strict,
            )
        what = "" if len(self.models) == 1 else f"{names[0]}: "
        if len(names) > 1:
            what = f"{names[0]} and {len(names) - 1} on it: "
        first, *others = stores.values()
        for source in (source for group in groups for evaluation in group for source in evaluation.sources):
            first.fill(source.images, what + source.name, others)
        if world_size > 1:
            dist.barrier()
        embedding_seconds = (time.perf_counter() - started) / len(names)
        reports: dict[str, list[ModelReport]] = {}
        for name, store in stores.items():
            reports[name] = []
            for group in groups:
                started = time.perf_counter()
                measured = measure_all(group if rank == 0 else [], store)
                if store.embedder.objective is not None:
                    measured.results.objective = store.embedder.objective
                else:
                    note = (
                        f"{name} is a backbone alone ({store.embedder.normalization} pixels), so what needs κ is left "
                        "out."
                    )
                    measured.notes.insert(0, note)
                seconds = embedding_seconds / len(groups) + time.perf_counter() - started
                reports[name].append(ModelReport(self.models[name], measured, seconds))
        return reports


_NEEDS = {Score.VMF: "kappa", Score.MLS: "variances", None: "a confidence"}  # by a score, or that of the density


def _check_score(score: Score | None, objective: Objective | None, path: str) -> None:
    """
    Raises:
        InputError: a model of the objective, or a backbone alone, does not have the score, or one at all where it is
            None.
    """
    own = None if objective is None else DENSITY_MEASURES[objective.density].score
    if score is Score.COSINE or (own is not None and score in (None, own)):
        return
    asked = "auto" if score is None else score.value
    has, others = "is a backbone alone", "cosine"
    if objective is not None and own is not None:
        has, others = f"is one of {objective.title}", f"{own.value}, auto or cosine"
    raise InputError(f"--score {asked} needs {_NEEDS[score]}, and --model {path} {has}; take --score {others}")


def name_models(specs: list[str], flag: str = "--model") -> dict[str, str]:
    """Returns weight files by the name of the model.

    Args:
        specs: ``PATH`` or ``NAME=PATH``; without a name the path's last folder or file is the name. A path is what
            :meth:`scf_fast.model.SCF.from_checkpoint` takes.
        flag: that they are from, for messages.
    Raises:
        InputError: two models have the same name.
    """
    models: dict[str, str] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or os.path.exists(spec):
            name, path = Path(split_paths(spec)[0]).resolve().name, spec
        if name in models:
            raise InputError(f"two models are named {name}; give them names, as in {flag} first=PATH second=PATH")
        models[name] = path
    return models


def _beside(path: str) -> Path:
    """Returns the folder of a model's first file."""
    first = Path(split_paths(path)[0])
    return first if first.is_dir() else first.parent
