"""The evaluations: the images each of them embeds, and the measurements it makes of one model's embeddings."""

import abc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from scf_fast.errors import InputError
from scf_fast.evaluation import datasets, plots, protocols, quality
from scf_fast.evaluation.datasets import PairSet, Subjects, TemplateSet
from scf_fast.evaluation.embeddings import EmbeddingStore
from scf_fast.evaluation.left_out import usable_pairs, usable_subjects, usable_templates
from scf_fast.evaluation.likelihoods import COSINE, Faces, Likelihood, Similarity, likelihood_of
from scf_fast.evaluation.pair_scores import PairScores
from scf_fast.evaluation.results import (
    REJECTED_FRACTIONS,
    BySet,
    FigureKind,
    IdentificationResult,
    Matcher,
    Measured,
    Quality,
    Rates,
    RejectionResult,
    ReportFigure,
    Results,
    Score,
    ScoreHistogram,
    SearchResult,
    TemplateResult,
    Weighting,
)
from scf_fast.inference import Embeddings
from scf_fast.kernels import pool_templates
from scf_fast.objectives import Density
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery
from scf_fast.pipelines.formats.file_kinds import Wanted, refusal
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.sources.image_names import visible

_HISTOGRAMS = {Density.VMF: FigureKind.HISTOGRAM, Density.GAUSSIAN: FigureKind.PRECISION_HISTOGRAM}


@dataclass(frozen=True)
class NamedSource:
    """Images that an evaluation embeds."""

    images: ImageSource
    name: str  # for the progress bar


class Evaluation(abc.ABC):
    """One kind of measurement on data that are open and checked.

    Attributes:
        sources: everything it embeds.
        score: without which nothing is left of it; None: the likelihood of the model's density. Otherwise only what
            needs a confidence is left out for a backbone alone.
        draws: whether to draw figures.
    """

    sources: list[NamedSource]
    score: Score | None = Score.COSINE
    draws = True

    @abc.abstractmethod
    def measure(self, store: EmbeddingStore) -> Measured:
        """Measures the store's model."""


def measure_all(evaluations: list[Evaluation], store: EmbeddingStore) -> Measured:
    """Measures a store's model by each evaluation in turn."""
    measured = Measured()
    for evaluation in evaluations:
        measured.add(evaluation.measure(store))
    return measured


class Verification(Evaluation):
    """Accuracy, TAR at FAR, equal error rate and area under the ROC of pair sets, by cosine and by likelihood.

    The set named 'clean', or else the first one, gives the numbers at the top of "verification".
    """

    def __init__(self, sets: dict[str, PairSet]):
        self._sets = sets
        self._first = "clean" if "clean" in sets else next(iter(sets))
        self.sources = [NamedSource(pairs.source, name) for name, pairs in sets.items()]

    def measure(self, store: EmbeddingStore) -> Measured:
        summaries, curves = {}, {}
        notes: list[str] = []
        for name, given in self._sets.items():
            pairs, embeddings, found = usable_pairs(given, store.load(given.source, name))
            notes += found
            likelihood = likelihood_of(embeddings, store.embedder.radius)
            scores = protocols.score_verification_set(embeddings, likelihood, store.embedder.device)
            summaries[name] = protocols.summarize_verification(scores, pairs.same)
            notes += protocols.note_on_few_impostors(name, pairs.same)
            if self.draws:
                for score, values in scores.items():
                    curves[name, score.label] = plots.roc_points(values, pairs.same)
        figures = []
        if self.draws:
            figures = [
                ReportFigure(FigureKind.ROC, plots.plot_roc("Verification", curves)),
                ReportFigure(FigureKind.DET, plots.plot_det("Verification", curves)),
            ]
        drawn = {f"pairs-{name}.txt": pairs for name, pairs in self._sets.items() if pairs.drawn}
        return Measured(
            Results(verification=BySet(self._first, summaries)),
            figures,
            notes
            + [f"{pairs.drawn}; a report keeps them in {file}, which --data takes." for file, pairs in drawn.items()],
            {file: pairs.as_list() for file, pairs in drawn.items()},
        )


class Templates(Evaluation):
    """1:1 and, where the protocol has the files, 1:N of template sets, pooled every way, by cosine and likelihood.

    Args:
        searches: False leaves 1:N out.
    """

    def __init__(self, sets: dict[str, TemplateSet], searches: bool = True):
        self._sets = sets if searches else {name: replace(given, galleries=[]) for name, given in sets.items()}
        self._searches = searches
        self.sources = [NamedSource(templates.source, name) for name, templates in sets.items()]

    def measure(self, store: EmbeddingStore) -> Measured:
        one_to_one, one_to_many, qualities = {}, {}, {}
        figures: list[ReportFigure] = []
        notes: list[str] = []
        for number, (name, given) in enumerate(self._sets.items()):
            templates, embeddings, found_broken = usable_templates(given, store.load(given.source, name))
            notes += found_broken
            likelihood = likelihood_of(embeddings, store.embedder.radius)
            found = _match_templates(embeddings, templates, likelihood, store.embedder.device, self.draws)
            one_to_one[name] = _template_result(templates, found.tar_at_far)
            if found.histogram is not None and self.draws:
                png = plots.plot_scores(f"All comparisons of 1:N, {name}", found.histogram)
                figures.append(ReportFigure(FigureKind.SCORES, png, number))
            if self.draws:
                png = plots.plot_roc(f"Template verification, {name}", found.curves)
                figures.append(ReportFigure(FigureKind.TEMPLATES, png, number))
            if templates.galleries:
                one_to_many[name] = IdentificationResult(
                    galleries=[gallery.name for gallery in templates.galleries],
                    enrolled=sum(len(gallery.gallery_ids) for gallery in templates.galleries),
                    searches=len(templates.galleries[0].probe_ids),
                    by_matcher=found.searches,
                    comparisons=found.histogram,
                )
            elif self._searches:
                notes.append(
                    f"{name} has no 1:N files (meta/*_1N_gallery_*.csv, meta/*_1N_probe_mixed.csv), so identification "
                    "is left out."
                )
            if Weighting.DETECTOR not in protocols.pooling_weights(embeddings, templates.protocol):
                notes.append(f"All detector scores of {name} are equal, so pooling by them is left out.")
            notes += protocols.note_on_few_impostors(name, templates.protocol.pair_labels)
            people = quality.people_of_templates(templates.protocol)
            qualities[name] = quality.summarize_quality(embeddings, templates.severity, people)
        first = next(iter(self._sets))
        results = Results(templates=BySet(first, one_to_one), template_quality=BySet(first, qualities))
        if one_to_many:
            results.identification = BySet(next(iter(one_to_many)), one_to_many)
        return Measured(results, figures, notes)


@dataclass(frozen=True)
class _TemplateMatches:
    """Every way to compare the templates of one set."""

    tar_at_far: dict[Matcher, Rates]
    curves: plots.Curves
    searches: dict[Matcher, SearchResult]  # empty where the set has no galleries
    histogram: ScoreHistogram | None


def _match_templates(
    embeddings: Embeddings,
    templates: TemplateSet,
    likelihood: Likelihood | None,
    device: torch.device,
    with_curves: bool,
) -> _TemplateMatches:
    """Compares the templates of a set every way, 1:1 and, where there are galleries, 1:N."""
    protocol, same = templates.protocol, templates.protocol.pair_labels
    tar_at_far, curves, searches, histogram = {}, {}, {}, None
    similarities: dict[Score, Similarity] = {Score.COSINE: COSINE}
    if likelihood is not None:
        similarities[likelihood.score] = likelihood
    for weighting, pooled in protocols.pool_every_way(embeddings, protocol, likelihood, device):
        for score, values in protocols.score_templates(pooled, protocol, likelihood).items():
            matcher = Matcher(weighting, score)
            tar_at_far[matcher] = protocols.tar_table(values, same)
            if with_curves:
                curves[weighting.label, score.label] = plots.roc_points(values, same)
            if templates.galleries:
                searches[matcher] = _search_galleries(pooled, templates, similarities[score])
        if templates.galleries and likelihood is not None and weighting is likelihood.measures.every_image:
            histogram = _histogram_of_comparisons(pooled, templates, likelihood)
    return _TemplateMatches(tar_at_far, curves, searches, histogram)


def _template_result(templates: TemplateSet, tar_at_far: dict[Matcher, Rates]) -> TemplateResult:
    protocol, same = templates.protocol, templates.protocol.pair_labels
    return TemplateResult(
        images=len(protocol.names),
        templates=len(protocols.template_ids(protocol)),
        genuine_pairs=int(np.count_nonzero(same)),
        impostor_pairs=int(np.count_nonzero(~same)),
        tar_at_far=tar_at_far,
    )


def _merge(galleries: list[Gallery]) -> Gallery:
    """Returns one gallery of everybody enrolled; all galleries of a protocol have the same probes."""
    return Gallery(
        "all",
        np.concatenate([gallery.gallery_ids for gallery in galleries]),
        np.concatenate([gallery.gallery_subjects for gallery in galleries]),
        galleries[0].probe_ids,
        galleries[0].probe_subjects,
    )


def _histogram_of_comparisons(pooled: Faces, templates: TemplateSet, likelihood: Likelihood) -> ScoreHistogram:
    """Counts the scores of every probe with every enrolled template, in all galleries."""
    everybody = _merge(templates.galleries)
    enrolled = protocols.template_rows(templates.protocol, everybody.gallery_ids)
    probes = protocols.template_rows(templates.protocol, everybody.probe_ids)
    return likelihood.count_comparisons(
        pooled.select(enrolled), everybody.gallery_subjects, pooled.select(probes), everybody.probe_subjects
    )


def _search_galleries(pooled: Faces, templates: TemplateSet, similarity: Similarity) -> SearchResult:
    """Computes rank rates in all galleries together, as insightface's protocol has them, and TPIR at FPIR as the mean
    over the galleries; in each, the probes whose subject is enrolled in another have no mate.
    """

    def search_one(gallery: Gallery) -> SearchResult:
        return protocols.summarize_searches(protocols.search_templates(pooled, templates.protocol, gallery, similarity))

    galleries = templates.galleries
    together = search_one(_merge(galleries))
    if len(galleries) == 1:
        return together
    each = [search_one(gallery).tpir_at_fpir for gallery in galleries]
    common = [fpir for fpir in each[0] if all(fpir in rates for rates in each)]
    mean_tpir = {fpir: float(np.mean([rates[fpir] for rates in each])) for fpir in common}
    return SearchResult(together.searches, together.mated, together.rank, mean_tpir)


class Identification(Evaluation):
    """Closed- and open-set search of probe images in a gallery of subjects, each pooled from all of its images."""

    def __init__(self, gallery: Subjects, probe: Subjects):
        self._gallery, self._probe = gallery, probe
        self._gallery_source = NamedSource(gallery.source, "gallery")
        self._probe_source = NamedSource(probe.source, "probes")
        self.sources = [self._gallery_source, self._probe_source]
        if not np.isin(probe.names, gallery.names).any():
            raise InputError(
                f"none of the {len(np.unique(probe.names))} subjects of the probes is in the gallery, such as "
                f"{str(probe.names[0])!r}; take both from one set of names"
            )

    def measure(self, store: EmbeddingStore) -> Measured:
        loaded = store.load(self._gallery_source.images, self._gallery_source.name)
        enrolled_faces, gallery, notes = usable_subjects("gallery", self._gallery, loaded)
        loaded = store.load(self._probe_source.images, self._probe_source.name)
        probe_faces, probes, more_notes = usable_subjects("probes", self._probe, loaded)
        subjects, row = np.unique(enrolled_faces.names, return_inverse=True)
        # A number for every subject, enrolled or not.
        numbers = np.unique(np.concatenate([subjects, probe_faces.names]), return_inverse=True)[1]
        numbers, probe_subjects = np.split(numbers, [len(subjects)])
        device, index = store.embedder.device, torch.from_numpy(row)
        likelihood = likelihood_of(gallery, store.embedder.radius)
        searched = protocols.faces_of(probes, likelihood).to(device).as_float32()

        def search(enrolled: Faces, similarity: Similarity) -> SearchResult:
            return protocols.summarize_searches(
                protocols.search(enrolled, numbers, searched, probe_subjects, similarity)
            )

        average = Faces(pool_templates(gallery.mu, None, index, len(subjects))[0]).to(device)
        found = {Matcher(Weighting.AVERAGE, Score.COSINE): search(average, COSINE)}
        histogram, figures = None, []
        if likelihood is not None:
            enrolled = likelihood.pool(likelihood.faces_of(gallery), index, len(subjects)).to(device)
            for similarity in COSINE, likelihood:
                matcher = Matcher(likelihood.measures.by_media, similarity.score)
                found[matcher] = search(enrolled, similarity)
            histogram = likelihood.count_comparisons(enrolled, numbers, searched, probe_subjects)
            if self.draws:
                figures.append(ReportFigure(FigureKind.SCORES, plots.plot_scores("All comparisons of 1:N", histogram)))
        result = IdentificationResult(["gallery"], len(subjects), len(probes), found, histogram)
        return Measured(Results(identification=BySet("gallery", {"gallery": result})), figures, notes + more_notes)


@dataclass(frozen=True)
class _JudgedPairs:
    """Pairs of images or templates with everything that a rejection depends on."""

    scores: PairScores
    same: np.ndarray  # (P,) bool
    quality: dict[Quality, np.ndarray]  # (P,) each, of the lesser of the two


class Risk(Evaluation):
    """Error versus reject on one set, score and threshold fixed on all its pairs; and the quality of its images.

    Args:
        data: pairs of images, or of templates: these have the confidence that comes of pooling by it, the mean feature
            norm and the mean detector score. Without a confidence templates are averages.
        far: false accept rate of the threshold; None puts it at equal error rates.
        score: decides which pairs are accepted; None: the likelihood of the model's density.
    """

    def __init__(self, data: PairSet | TemplateSet, far: float | None = None, score: Score | None = Score.COSINE):
        self._data, self._far, self.score = data, far, score
        self.sources = [NamedSource(data.source, data.name)]

    def measure(self, store: EmbeddingStore) -> Measured:
        loaded = store.load(self._data.source, self._data.name)
        data, embeddings, notes = (
            usable_pairs(self._data, loaded)
            if isinstance(self._data, PairSet)
            else usable_templates(self._data, loaded)
        )
        likelihood, device = likelihood_of(embeddings, store.embedder.radius), store.embedder.device
        score = self.score
        if score is None:
            assert likelihood is not None  # as the attribute `score` demands
            score = likelihood.score
        if isinstance(data, PairSet):
            judged = _judge_pairs(data, embeddings, likelihood, device)
            people = quality.people_of_pairs(data.same)
        else:
            people = quality.people_of_templates(data.protocol)
            # The length of a sum over media is no concentration that a likelihood could take.
            judged = _judge_templates(data, embeddings, likelihood, device, by_media=score is Score.COSINE)
        values = judged.scores[score]
        rejection = quality.reject_by_quality(values, judged.same, judged.quality, self._far)
        result = RejectionResult(
            name=data.name,
            score=score,
            threshold=rejection.threshold,
            far=rejection.far,
            areas={order: curve.area for order, curve in rejection.curves.items()},
            errors={
                order: [curve.error_at(fraction) for fraction in REJECTED_FRACTIONS]
                for order, curve in rejection.curves.items()
            },
            images=quality.summarize_quality(embeddings, data.severity, people),
        )
        if not self.draws:
            return Measured(Results(rejection=result), notes=notes)
        figures = [ReportFigure(FigureKind.REJECT, plots.plot_rejection(rejection, score.label))]
        figures += self._quality_figures(data, embeddings, judged, result)
        if isinstance(data, PairSet):
            shown = plots.Confidence.of(embeddings)
            png = plots.plot_pairs(data.source, values, judged.same, shown, score.label)
            figures.append(ReportFigure(FigureKind.PAIRS, png))
        return Measured(Results(rejection=result), figures, notes)

    def _quality_figures(
        self, data: PairSet | TemplateSet, embeddings: Embeddings, judged: _JudgedPairs, result: RejectionResult
    ) -> list[ReportFigure]:
        """Draws the figures that need a confidence."""
        shown = plots.Confidence.of(embeddings)
        if shown is None:
            return []
        source, severity = data.source, data.severity
        pngs = {
            _HISTOGRAMS[embeddings.density]: plots.plot_confidence_histogram(
                plots.Confidence(judged.quality[shown.quality], shown.quality), judged.same
            ),
            FigureKind.FACES: plots.plot_faces(source, shown, severity),
        }
        if severity is not None:
            correlation = result.images.measures[shown.quality].severity_spearman
            pngs[FigureKind.SEVERITY] = plots.plot_severity(shown, severity, correlation)
        if result.images.reliability is not None:
            pngs[FigureKind.RELIABILITY] = plots.plot_reliability(result.images.reliability)
        return [ReportFigure(kind, png, confidence=shown.quality) for kind, png in pngs.items()]


def _judge_pairs(
    data: PairSet, embeddings: Embeddings, likelihood: Likelihood | None, device: torch.device
) -> _JudgedPairs:
    scores = protocols.score_verification_set(embeddings, likelihood, device)
    lower = {measure: quality.lower_of_pair(values) for measure, values in quality.image_quality(embeddings).items()}
    return _JudgedPairs(scores, data.same, lower)


def _judge_templates(
    data: TemplateSet, embeddings: Embeddings, likelihood: Likelihood | None, device: torch.device, by_media: bool
) -> _JudgedPairs:
    protocol = data.protocol
    if likelihood is None:
        pooled = protocols.pool_protocol(embeddings, protocol, np.ones(len(protocol.names)), device)
    else:
        pooled = protocols.pool_by_confidence(embeddings, protocol, likelihood, device, by_media)
    rows = protocols.template_rows(protocol, protocol.pair_template_ids).numpy()
    lower = {
        measure: values[rows].min(axis=1)
        for measure, values in protocols.template_quality(embeddings, protocol, likelihood).items()
    }
    return _JudgedPairs(protocols.score_templates(pooled, protocol, likelihood), protocol.pair_labels, lower)


def all_evaluations(data: Path, for_table: bool = False) -> list[Evaluation]:
    """Opens every evaluation that a data folder allows.

    These are verification of its ``verification/*.bin``, templates of its ``templates/`` or of the folder itself, and
    risk on the set named 'mixed', or else on the first one, or else on the templates.

    Args:
        for_table: leaves out what the published table does not show: 1:N and figures.
    Raises:
        InputError: there is neither, or something in it is malformed.
    """
    has_pairs = any(visible([*(data / "verification").glob("*.bin"), *data.glob("*.bin")]))
    sets = datasets.open_pair_sets([data]) if has_pairs else {}
    folder = data / "templates" if datasets.is_template_set(data / "templates") else data
    templates = datasets.open_template_set(folder) if datasets.is_template_set(folder) else None
    evaluations: list[Evaluation] = [Verification(sets)] if sets else []
    if templates is not None:
        evaluations.append(Templates({templates.name: templates}, searches=not for_table))
    if sets:
        evaluations.append(Risk(sets.get("mixed", next(iter(sets.values())))))
    elif templates is not None:
        evaluations.append(Risk(templates))
    else:
        what = f" and {refusal(data, Wanted.FOLDER)}" if data.is_file() else "; " + Wanted.FOLDER.value
        raise InputError(f"{data} must hold verification/*.bin or templates/meta{what}")
    for evaluation in evaluations:
        evaluation.draws = not for_table
    return evaluations
