"""Results of an evaluation: typed, with the form that results.json keeps them in.

The keys of results.json are an interface: earlier reports and their readers depend on them.
"""

import enum
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from scf_fast.held_out import Reliability
from scf_fast.objectives import Density, Objective

REJECTED_FRACTIONS = (0.0, 0.1, 0.2, 0.5)  # of the pairs, at which results.json and the table give the error
Rates = dict[str, float]  # by a rate written as '1e-03', or by a rank


class Score(enum.Enum):
    """A similarity of two faces; the value is what ``--score`` calls it."""

    COSINE = "cosine"
    VMF = "vmf"  # Eqn (13), Li et al., CVPR 2021
    MLS = "mls"  # Eqn (3), Shi and Jain, ICCV 2019

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        return _SCORE_LABELS[self]

    @property
    def suffix(self) -> str:
        """End of this score's keys in results.json."""
        return "" if self is Score.COSINE else f"_{self.value}"


_SCORE_LABELS = {Score.COSINE: "cosine", Score.VMF: "Eqn (13)", Score.MLS: "mutual likelihood"}


class Weighting(enum.Enum):
    """How the images of a template are weighted; the value is the key in results.json."""

    AVERAGE = "average"
    NORM = "norm"
    DETECTOR = "detector"
    NORM_DETECTOR = "norm_detector"
    KAPPA = "kappa"
    KAPPA_IMAGES = "kappa_images"
    PRECISION = "precision"
    PRECISION_IMAGES = "precision_images"

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        return _WEIGHTING_LABELS[self]


_WEIGHTING_LABELS = {
    Weighting.AVERAGE: "average",
    Weighting.NORM: "norm-weighted",
    Weighting.DETECTOR: "detector-weighted",
    Weighting.NORM_DETECTOR: "norm × detector",
    Weighting.KAPPA: "κ, Eqn (14)",
    Weighting.KAPPA_IMAGES: "κ, Eqn (14), every image",
    Weighting.PRECISION: "1/σ², fusion",
    Weighting.PRECISION_IMAGES: "1/σ², fusion, every image",
}


@dataclass(frozen=True)
class Matcher:
    """A way to compare templates: how they are pooled, and by which score."""

    weighting: Weighting
    score: Score

    @property
    def key(self) -> str:
        """Key in results.json."""
        return self.weighting.value + self.score.suffix


MATCHERS = tuple(Matcher(weighting, score) for weighting in Weighting for score in Score)


class Quality(enum.Enum):
    """A measure that images or pairs are ranked by; the value is the key in results.json."""

    KAPPA = "kappa"
    PRECISION = "precision"  # 1 / variance; over several dimensions the mean
    FEATURE_NORM = "feature_norm"
    DETECTOR = "detector"
    RANDOM = "random"
    ORACLE = "oracle"

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        return _QUALITY_LABELS[self]


_QUALITY_LABELS = {
    Quality.KAPPA: "κ",
    Quality.PRECISION: "1/σ²",
    Quality.FEATURE_NORM: "feature norm",
    Quality.DETECTOR: "detector score",
    Quality.RANDOM: "random",
    Quality.ORACLE: "oracle",
}


@dataclass(frozen=True)
class DensityMeasures:
    """What is measured of the models of one density, beside what every backbone has."""

    score: Score  # the likelihood
    by_media: Weighting  # by confidence, the images of a medium averaged first
    every_image: Weighting  # by confidence, over all images
    quality: Quality  # the confidence

    @property
    def pooled(self) -> Matcher:
        """The cosine of templates pooled by confidence, a row of the published table."""
        return Matcher(self.by_media, Score.COSINE)

    @property
    def likelihood(self) -> Matcher:
        """The likelihood of templates pooled as its derivation has it."""
        return Matcher(self.every_image, self.score)


DENSITY_MEASURES = {
    Density.VMF: DensityMeasures(Score.VMF, Weighting.KAPPA, Weighting.KAPPA_IMAGES, Quality.KAPPA),
    Density.GAUSSIAN: DensityMeasures(Score.MLS, Weighting.PRECISION, Weighting.PRECISION_IMAGES, Quality.PRECISION),
}


class Section(Protocol):
    """Anything that has a form in results.json."""

    def as_json(self) -> dict[str, Any]: ...


SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class BySet(Generic[SectionT]):
    """Results of several data sets, one of which gives the numbers at the top of the section."""

    first: str
    sets: dict[str, SectionT]  # by the name of the data set

    def as_json(self, name_key: str) -> dict[str, Any]:
        """Returns the first set's results with its name under `name_key`, and the "others" by name."""
        others = {name: section.as_json() for name, section in self.sets.items() if name != self.first}
        return {name_key: self.first} | self.sets[self.first].as_json() | {"others": others}

    def in_order(self) -> dict[str, SectionT]:
        """Returns all sets by name, the first one first."""
        return {self.first: self.sets[self.first]} | self.sets


@dataclass(frozen=True)
class PairMeasures:
    """Verification by one score."""

    accuracy: float  # mean over ten folds
    accuracy_std: float  # over ten folds
    equal_error_rate: float
    area_under_roc: float
    tar_at_far: Rates


@dataclass(frozen=True)
class VerificationResult:
    """Verification of P pairs of images; without a confidence by cosine alone."""

    pairs: int
    by_score: dict[Score, PairMeasures]

    def as_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"pairs": self.pairs}
        for score, measures in self.by_score.items():
            suffix = score.suffix
            result |= {
                f"accuracy{suffix}": measures.accuracy,
                f"accuracy{suffix}_std": measures.accuracy_std,
                f"eer{suffix}": measures.equal_error_rate,
                f"auc{suffix}": measures.area_under_roc,
                f"tar_at_far{suffix}": measures.tar_at_far,
            }
        return result


@dataclass(frozen=True)
class TemplateResult:
    """1:1 verification of templates."""

    images: int
    templates: int
    genuine_pairs: int
    impostor_pairs: int
    tar_at_far: dict[Matcher, Rates]

    def as_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "templates": self.templates,
            "genuine_pairs": self.genuine_pairs,
            "impostor_pairs": self.impostor_pairs,
        } | {matcher.key: rates for matcher, rates in self.tar_at_far.items()}


@dataclass(frozen=True)
class SearchResult:
    """Searches of a gallery by one matcher."""

    searches: int
    mated: int  # searches whose subject is enrolled
    rank: Rates  # share of the mated searches with the mate among the best `rank`
    tpir_at_fpir: Rates

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ScoreHistogram:
    """Likelihoods of every probe with every gallery entry (nats); Eqn (13) as log likelihood ratio against chance."""

    edges: np.ndarray  # (B + 1,) float64
    impostor: np.ndarray  # (B,) int64 comparisons of two subjects
    genuine: np.ndarray  # (B,) int64 comparisons of one
    score: Score = Score.VMF

    def as_json(self) -> dict[str, Any]:
        return {
            "low": float(self.edges[0]),
            "high": float(self.edges[-1]),
            "genuine": self.genuine.tolist(),
            "impostor": self.impostor.tolist(),
            "score": self.score.label,
        }


@dataclass(frozen=True)
class IdentificationResult:
    """1:N search."""

    galleries: list[str]
    enrolled: int  # subjects
    searches: int
    by_matcher: dict[Matcher, SearchResult]
    comparisons: ScoreHistogram | None  # None without a confidence

    def as_json(self) -> dict[str, Any]:
        return (
            {"galleries": self.galleries, "enrolled": self.enrolled, "searches": self.searches}
            | {matcher.key: result.as_json() for matcher, result in self.by_matcher.items()}
            | ({} if self.comparisons is None else {"comparisons": self.comparisons.as_json()})
        )


@dataclass(frozen=True)
class QualityQuantiles:
    """Distribution of one measure of quality over the images of a set."""

    p05: float
    median: float
    p95: float
    severity_spearman: float | None  # rank correlation with the known severity; None: not known, or constant


@dataclass(frozen=True)
class QualityResult:
    """Distribution of the measures of quality over the images of a set."""

    measures: dict[Quality, QualityQuantiles]
    reliability: Reliability | None = None  # of kappa; None: it has no kappa, or too few images show one person

    def as_json(self) -> dict[str, Any]:
        reliability = {} if self.reliability is None else {"reliability": self.reliability.as_json()}
        return {quality.value: asdict(quantiles) for quality, quantiles in self.measures.items()} | reliability


@dataclass(frozen=True)
class RejectionResult:
    """Error versus reject on one set, and the quality of its images."""

    name: str  # of the set
    score: Score
    threshold: float
    far: float | None  # where the threshold was put on all pairs; None: at equal error rates
    areas: dict[Quality, float]  # under the curves, by rejection order
    errors: dict[Quality, list[float]]  # at REJECTED_FRACTIONS
    images: QualityResult

    def as_json(self) -> dict[str, Any]:
        return self.images.as_json() | {
            "reject_area": {order.value: area for order, area in self.areas.items()},
            "reject": {
                "set": self.name,
                "score": self.score.label,
                "threshold": self.threshold,
                "far": self.far,
                "rejected": REJECTED_FRACTIONS,
                "error": {order.value: errors for order, errors in self.errors.items()},
            },
        }


@dataclass
class Results:
    """Everything measured of one model; a section that was not measured is None.

    Attributes:
        objective: of the model; without meaning for a backbone alone.
    """

    verification: BySet[VerificationResult] | None = None
    templates: BySet[TemplateResult] | None = None
    template_quality: BySet[QualityResult] | None = None
    identification: BySet[IdentificationResult] | None = None
    rejection: RejectionResult | None = None
    objective: Objective = Objective.SCF

    def add(self, other: "Results") -> None:
        """Takes over the sections that the other has."""
        for section in fields(self):
            if section.name != "objective" and getattr(other, section.name) is not None:
                setattr(self, section.name, getattr(other, section.name))

    def as_json(self) -> dict[str, Any]:
        """Returns the model's entry in results.json; an entry without "objective" is of SCF, or of a backbone alone."""
        result: dict[str, Any] = {}
        if self.objective is not Objective.SCF:
            result["objective"] = self.objective.value
        if self.verification is not None:
            result["verification"] = self.verification.as_json("set")
        if self.templates is not None:
            result["templates"] = self.templates.as_json("protocol")
        if self.template_quality is not None:
            result["template_quality"] = self.template_quality.as_json("protocol")
        if self.identification is not None:
            result["identification"] = self.identification.as_json("protocol")
        if self.rejection is not None:
            result |= self.rejection.as_json()
        return result


class FigureKind(enum.Enum):
    """A kind of figure, in the order of the report; the value is the stem of its file name."""

    ROC = "roc"
    DET = "det"
    TEMPLATES = "templates"
    SCORES = "scores"
    REJECT = "reject"
    SEVERITY = "severity"
    RELIABILITY = "reliability"
    HISTOGRAM = "kappa_histogram"
    PRECISION_HISTOGRAM = "precision_histogram"
    FACES = "faces"
    PAIRS = "pairs"

    @property
    def is_wide(self) -> bool:
        """True for a figure that takes a row of the page for itself."""
        return self in (FigureKind.FACES, FigureKind.PAIRS)


_FIGURE_TITLES = {
    FigureKind.ROC: "Verification ROC",
    FigureKind.DET: "Detection error trade-off",
    FigureKind.TEMPLATES: "Template verification ROC",
    FigureKind.SCORES: "Scores of all comparisons",
    FigureKind.REJECT: "Error versus reject",
    FigureKind.SEVERITY: "{} against known severity",
    FigureKind.RELIABILITY: "Reliability of {}",
    FigureKind.HISTOGRAM: "{} of genuine and impostor pairs",
    FigureKind.PRECISION_HISTOGRAM: "{} of genuine and impostor pairs",
    FigureKind.FACES: "Faces by {}",
    FigureKind.PAIRS: "Best and worst pairs",
}
FIGURE_FILE = re.compile(rf"(model\d+-)?({'|'.join(kind.value for kind in FigureKind)})(-\d+)?\.png")


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report."""

    kind: FigureKind
    png: bytes
    number: int = 0  # of the data set, where there may be several figures of a kind
    confidence: Quality = Quality.KAPPA  # that it shows, if it shows one

    @property
    def title(self) -> str:
        """Title in the report."""
        return _FIGURE_TITLES[self.kind].format(self.confidence.label)

    @property
    def file_name(self) -> str:
        """File name in the report of a single model."""
        return f"{self.kind.value}.png" if self.number == 0 else f"{self.kind.value}-{self.number + 1}.png"


@dataclass
class Measured:
    """Everything that the evaluations give for one model."""

    results: Results = field(default_factory=Results)
    figures: list[ReportFigure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out and why
    files: dict[str, str] = field(default_factory=dict)  # further files of the report folder: text by file name

    def add(self, other: "Measured") -> None:
        """Takes over what another evaluation has measured."""
        self.results.add(other.results)
        self.figures += other.figures
        self.notes += other.notes
        self.files |= other.files
