"""The evaluations: what each embeds, and what it makes of the embeddings of one model."""

import abc
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from scf_fast.errors import InputError
from scf_fast.evaluation import datasets, plots, protocols, report
from scf_fast.evaluation.datasets import PairSet, Subjects, TemplateSet
from scf_fast.evaluation.embeddings import EmbeddingStore
from scf_fast.kernels import pool_templates
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery


@dataclass
class Measured:
    """What one model gave: an entry of results.json, and figures."""

    results: dict = field(default_factory=dict)
    figures: dict[str, bytes] = field(default_factory=dict)  # PNG by file name; see report.FIGURES
    notes: list[str] = field(default_factory=list)  # what was left out and why
    files: dict[str, str] = field(
        default_factory=dict
    )  # text by the name of a file that belongs into the report folder

    def add(self, other: "Measured") -> None:
        self.results |= other.results
        self.figures |= other.figures
        self.notes += other.notes
        self.files |= other.files


class Evaluation(abc.ABC):
    """One kind of measurement on data that is open and checked.

    Attributes:
        sources: (ImageSource, description) of everything it embeds.
        needs_kappa: whether nothing is left of it without kappa; else what needs kappa is left out.
    """

    sources: list
    needs_kappa = False

    @abc.abstractmethod
    def measure(self, store: EmbeddingStore) -> Measured:
        """Measures the store's model."""


def _headline(kind: str, summaries: dict[str, dict], first: str) -> dict:
    """Several data sets' results in one: those of `first` at the top, with its name as `kind`, and the "others" by
    name.
    """
    return (
        {kind: first}
        | summaries[first]
        | {"others": {name: summary for name, summary in summaries.items() if name != first}}
    )


class Verification(Evaluation):
    """Accuracy, TAR at FAR, equal error rate and area under the ROC of pair sets, by cosine and by Eqn (13).

    The set named 'clean', else the first by name, gives the numbers at the top of "verification".
    """

    def __init__(self, sets: dict[str, PairSet]):
        self._sets = sets
        self._first = "clean" if "clean" in sets else next(iter(sets))
        self.sources = [(pairs.source, name) for name, pairs in sets.items()]

    def measure(self, store):
        summaries, curves = {}, {}
        for name, pairs in self._sets.items():
            scores = protocols.score_verification_set(
                store.load(pairs.source, name), store.embedder.radius, store.embedder.device
            )
            summaries[name] = protocols.summarize_verification(scores, pairs.same)
            for label, values in zip((report.COSINE, report.VMF), scores):
                if values is not None:
                    curves[name, label] = plots.roc_points(values, pairs.same)
        drawn = {f"pairs-{name}.txt": pairs for name, pairs in self._sets.items() if pairs.drawn}
        return Measured(
            {"verification": _headline("set", summaries, self._first)},
            {report.ROC: plots.plot_roc("Verification", curves), report.DET: plots.plot_det("Verification", curves)},
            [f"{pairs.drawn}; a report keeps them in {file}, which --data takes." for file, pairs in drawn.items()],
            {file: pairs.as_list() for file, pairs in drawn.items()},
        )


class Templates(Evaluation):
    """1:1 and, where the protocol has the files, 1:N of template sets, pooled every way, by cosine and by Eqn (13)."""

    def __init__(self, sets: dict[str, TemplateSet]):
        self._sets = sets
        self.sources = [(templates.source, name) for name, templates in sets.items()]

    def measure(self, store):
        one_to_one, one_to_many, quality, figures, notes = {}, {}, {}, {}, []
        for number, (name, templates) in enumerate(self._sets.items()):
            embeddings = store.load(templates.source, name)
            protocol, same = templates.protocol, templates.protocol.pair_labels
            tables = {
                "images": len(protocol.names),
                "templates": len(protocols.template_ids(protocol)),
                "genuine_pairs": int(np.count_nonzero(same)),
                "impostor_pairs": int(np.count_nonzero(~same)),
            }
            searched, curves = {}, {}
            for pooling_name, pooling in protocols.pool_every_way(embeddings, protocol, store.embedder.device):
                for suffix, score, values in zip(
                    ("", "_vmf"),
                    (report.COSINE, report.VMF),
                    protocols.score_templates(pooling, protocol, store.embedder.radius),
                ):
                    if values is None:
                        continue
                    tables[pooling_name + suffix] = protocols.tar_table(values, same)
                    curves[report.POOLINGS[pooling_name], score] = plots.roc_points(values, same)
                    if templates.galleries:
                        searched[pooling_name + suffix] = _identify(
                            pooling, templates, store.embedder.radius, "vmf" if suffix else "cosine"
                        )
                    if templates.galleries and (pooling_name, suffix) == ("kappa_images", "_vmf"):
                        histogram = _score_histogram(pooling, templates)
                        searched["comparisons"] = histogram.summary()
                        figures[report.numbered(report.SCORES, number)] = plots.plot_scores(
                            f"All comparisons of 1:N, {name}", histogram
                        )
            one_to_one[name] = tables
            figures[report.numbered(report.TEMPLATES, number)] = plots.plot_roc(
                f"Template verification, {name}", curves
            )
            if searched:
                one_to_many[name] = _gallery_counts(templates) | searched
            else:
                notes.append(
                    f"{name} has no 1:N files (meta/*_1N_gallery_*.csv, meta/*_1N_probe_mixed.csv), so identification "
                    "is left out."
                )
            if "detector" not in protocols.pooling_weights(embeddings, protocol):
                notes.append(f"All detector scores of {name} are equal, so pooling by them is left out.")
            quality[name] = protocols.summarize_quality(embeddings, templates.severity)
        first = next(iter(self._sets))
        results = {
            "templates": _headline("protocol", one_to_one, first),
            "template_quality": _headline("protocol", quality, first),
        }
        if one_to_many:
            results["identification"] = _headline("protocol", one_to_many, next(iter(one_to_many)))
        return Measured(results, figures, notes)


def _gallery_counts(templates: TemplateSet) -> dict:
    galleries = templates.galleries
    return {
        "galleries": [gallery.name for gallery in galleries],
        "enrolled": sum(len(gallery.gallery_ids) for gallery in galleries),
        "searches": len(galleries[0].probe_ids),
    }


def _together(galleries) -> Gallery:
    enrolled = (
        np.concatenate([getattr(gallery, column) for gallery in galleries])
        for column in ("gallery_ids", "gallery_subjects")
    )
    return Gallery("all", *enrolled, galleries[0].probe_ids, galleries[0].probe_subjects)


def _score_histogram(pooling, templates) -> protocols.ScoreHistogram:
    """Of every probe with every enrolled template, in all galleries."""
    together = _together(templates.galleries)
    enrolled, probes = (
        protocols.template_rows(templates.protocol, ids) for ids in (together.gallery_ids, together.probe_ids)
    )
    return protocols.score_histogram(
        pooling.directions[enrolled],
        pooling.kappas[enrolled],
        together.gallery_subjects,
        pooling.directions[probes],
        pooling.kappas[probes],
        together.probe_subjects,
    )


def _identify(pooling, templates, radius, score) -> dict:
    """Rank rates in all galleries together, as insightface's protocol has them; TPIR at FPIR as the mean over the
    galleries, for each of which the probes of the others have no mate.
    """
    galleries, together = templates.galleries, _together(templates.galleries)
    summary = protocols.summarize_searches(
        protocols.search_templates(pooling, templates.protocol, together, radius, score)
    )
    if len(galleries) > 1:
        each = [
            protocols.summarize_searches(
                protocols.search_templates(pooling, templates.protocol, gallery, radius, score)
            )["tpir_at_fpir"]
            for gallery in galleries
        ]
        common = [fpir for fpir in each[0] if all(fpir in table for table in each)]
        summary["tpir_at_fpir"] = {fpir: float(np.mean([table[fpir] for table in each])) for fpir in common}
    return summary


class Identification(Evaluation):
    """Closed- and open-set search of probe images in a gallery of subjects, each pooled from all of its images."""

    def __init__(self, gallery: Subjects, probe: Subjects):
        self._gallery, self._probe = gallery, probe
        self.sources = [(gallery.source, "gallery"), (probe.source, "probes")]
        if not np.isin(probe.names, gallery.names).any():
            raise InputError(
                f"none of the {len(np.unique(probe.names))} subjects of the probes is in the gallery, such as "
                f"{str(probe.names[0])!r}; "
                "take both from one set of names"
            )

    def measure(self, store):
        gallery, probes = (store.load(*source) for source in self.sources)
        subjects, row = np.unique(self._gallery.names, return_inverse=True)
        numbers = np.unique(np.concatenate([subjects, self._probe.names]), return_inverse=True)[
            1
        ]  # of all subjects, enrolled or not
        numbers, probe_subjects = np.split(numbers, [len(subjects)])
        device, radius = store.embedder.device, store.embedder.radius
        probe_mu, figures = probes.mu.to(device), {}
        results = {"galleries": ["gallery"], "enrolled": len(subjects), "searches": len(probes.mu)}

        def enrol(weights):
            return (
                pooled.to(device)
                for pooled in pool_templates(gallery.mu, weights, torch.from_numpy(row), len(subjects))
            )

        def search_by_cosine(directions):
            return protocols.summarize_searches(
                protocols.search(directions, None, numbers, probe_mu, None, probe_subjects)
            )

        directions, _ = enrol(None)
        results["average"] = search_by_cosine(directions)
        if gallery.kappa is not None:
            directions, kappas = enrol(torch.from_numpy(gallery.kappa).float())
            probe_kappa = torch.from_numpy(probes.kappa).float().to(device)
            results["kappa"] = search_by_cosine(directions)
            results["kappa_vmf"] = protocols.summarize_searches(
                protocols.search(directions, kappas, numbers, probe_mu, probe_kappa, probe_subjects, radius)
            )
            histogram = protocols.score_histogram(directions, kappas, numbers, probe_mu, probe_kappa, probe_subjects)
            results["comparisons"] = histogram.summary()
            figures[report.SCORES] = plots.plot_scores("All comparisons of 1:N", histogram)
        return Measured({"identification": _headline("protocol", {"gallery": results}, "gallery")}, figures)


class Risk(Evaluation):
    """Error versus reject on one set, score and threshold fixed on all its pairs; and what kappa says of its images.

    Args:
        data: pairs of images, or of templates: these have the kappa of Eqn (14), the mean feature norm and the mean
            detector score. Without a kappa templates are averages.
        far: false accept rate of the threshold; None puts it at equal error rates.
        score: "cosine" or "vmf".
    """

    def __init__(self, data: PairSet | TemplateSet, far: float | None = None, score: str = "cosine"):
        self._data, self._far, self._score = data, far, score
        self.needs_kappa = score == "vmf"
        self.sources = [(data.source, data.name)]

    def measure(self, store):
        data = self._data
        embeddings = store.load(*self.sources[0])
        radius, device = store.embedder.radius, store.embedder.device
        if isinstance(data, PairSet):
            same = data.same
            scores = protocols.score_verification_set(embeddings, radius, device)
            quality = {
                name: protocols.lower_of_pair(values) for name, values in protocols.image_quality(embeddings).items()
            }
        else:
            same, protocol = data.protocol.pair_labels, data.protocol
            # The length of a sum over media is no concentration that Eqn (13) could take.
            weights = np.ones(len(protocol.names)) if embeddings.kappa is None else embeddings.kappa
            directions, kappas = protocols.pool_protocol(
                embeddings, protocol, weights, device, by_media=self._score == "cosine"
            )
            pooled = protocols.Pooling(directions, None if embeddings.kappa is None else kappas)
            scores = protocols.score_templates(pooled, protocol, radius)
            rows = protocols.template_rows(protocol, protocol.pair_template_ids).numpy()
            quality = {
                name: values[rows].min(axis=1)
                for name, values in protocols.template_quality(embeddings, protocol).items()
            }
        values, label = (scores.cosine, report.COSINE) if self._score == "cosine" else (scores.vmf, report.VMF)
        rejection = protocols.reject_by_quality(values, same, quality, self._far)
        summary = protocols.summarize_quality(embeddings, data.severity)
        figures = {report.REJECT: plots.plot_rejection(rejection, label)}
        if embeddings.kappa is not None:
            figures[report.HISTOGRAM] = plots.plot_kappa_histogram(quality["kappa"], same)
            figures[report.FACES] = plots.plot_faces(data.source, embeddings.kappa, data.severity)
            if data.severity is not None:
                figures[report.SEVERITY] = plots.plot_severity(
                    embeddings.kappa, data.severity, summary["kappa"]["severity_spearman"]
                )
        if isinstance(data, PairSet):
            figures[report.PAIRS] = plots.plot_pairs(data.source, values, same, embeddings.kappa, label)
        errors = {
            order: [curve.error_at(fraction) for fraction in report.REJECTED]
            for order, curve in rejection.curves.items()
        }
        return Measured(
            summary
            | {
                "reject_area": {order: curve.area for order, curve in rejection.curves.items()},
                "reject": {
                    "set": data.name,
                    "score": label,
                    "threshold": rejection.threshold,
                    "far": rejection.far,
                    "rejected": report.REJECTED,
                    "error": errors,
                },
            },
            figures,
        )


def everything(data: Path) -> list[Evaluation]:
    """What a data folder allows: verification of its `verification/*.bin` and templates of its `templates/` or of the
    folder itself; risk on the set named 'mixed', else on the first, else on the templates.

    Raises:
        ValueError: there is neither, or something in it is malformed.
    """
    has_pairs = any((data / "verification").glob("*.bin")) or any(data.glob("*.bin"))
    sets = datasets.open_pair_sets([data]) if has_pairs else {}
    folder = data / "templates" if datasets.is_template_set(data / "templates") else data
    templates = datasets.open_template_set(folder) if datasets.is_template_set(folder) else None
    if not sets and templates is None:
        raise InputError(f"{data} must hold verification/*.bin or templates/meta; give --data the folder that has them")
    evaluations: list[Evaluation] = [Verification(sets)] if sets else []
    if templates is not None:
        evaluations.append(Templates({templates.name: templates}))
    return [*evaluations, Risk(sets.get("mixed", next(iter(sets.values()))) if sets else templates)]


def measure_all(evaluations: list[Evaluation], store: EmbeddingStore) -> Measured:
    """Measures a store's model by each evaluation in turn."""
    measured = Measured()
    for evaluation in evaluations:
        measured.add(evaluation.measure(store))
    return measured
