"""The published table from results made by hand: its forms, marks, rows that are not there, the paper's numbers."""

import pytest

from scf_fast.errors import InputError
from scf_fast.evaluation.published_table import SYSTEMS, make_system_tables, system_tables_as_json
from scf_fast.evaluation.report_html import table_html
from scf_fast.evaluation.results import (
    BySet,
    Matcher,
    PairMeasures,
    Quality,
    QualityQuantiles,
    QualityResult,
    RejectionResult,
    Results,
    Score,
    TemplateResult,
    VerificationResult,
    Weighting,
)
from scf_fast.objectives import Objective

AVERAGE = Matcher(Weighting.AVERAGE, Score.COSINE)
POOLED = {
    Objective.SCF: Matcher(Weighting.KAPPA, Score.COSINE),
    Objective.PFE_VMF: Matcher(Weighting.KAPPA, Score.COSINE),
    Objective.SCF_GAUSSIAN: Matcher(Weighting.PRECISION, Score.COSINE),
    Objective.PFE: Matcher(Weighting.PRECISION, Score.COSINE),
}
LIKELIHOOD = {
    Objective.SCF: Matcher(Weighting.KAPPA_IMAGES, Score.VMF),
    Objective.PFE_VMF: Matcher(Weighting.KAPPA_IMAGES, Score.VMF),
    Objective.SCF_GAUSSIAN: Matcher(Weighting.PRECISION_IMAGES, Score.MLS),
    Objective.PFE: Matcher(Weighting.PRECISION_IMAGES, Score.MLS),
}


def templates(name, fars, average, system=None, pooled=None, likelihood=None):
    """Results of a protocol, one rate for each FAR and way to compare templates."""
    by_matcher = {AVERAGE: dict(zip(fars, average))}
    if system is not None:
        by_matcher[POOLED[system]] = dict(zip(fars, pooled))
        by_matcher[LIKELIHOOD[system]] = dict(zip(fars, likelihood or pooled))
    return Results(templates=BySet(name, {name: TemplateResult(4, 2, 1, 1, by_matcher)}))


def ijb(name, average, system=None, pooled=None, likelihood=None):
    return templates(
        name, ("1e-03", "1e-04", "1e-05"), (0.99, *average), system, pooled and (0.99, *pooled), likelihood
    )


@pytest.fixture
def blocks():
    average = {"IJB-B": (0.942, 0.8933), "IJB-C": (0.956, 0.9315)}
    return {
        "ArcFace": {
            None: [ijb(name, rates) for name, rates in average.items()],
            Objective.SCF: [
                ijb("IJB-B", average["IJB-B"], Objective.SCF, (0.95, 0.90), (0.99, 0.96, 0.91)),
                ijb("IJB-C", average["IJB-C"], Objective.SCF, (0.96, 0.93)),
            ],
            Objective.PFE: [ijb("IJB-B", average["IJB-B"], Objective.PFE, (0.943, 0.90001))],
        },
        "mine": {None: [ijb("IJB-B", (0.5, 0.25))]},
    }


def cells(table):
    return [[column.values.get(row) for column in table.columns] for row in table.rows()]


def test_rows_and_columns_are_those_of_the_published_table(blocks):
    tables = make_system_tables(blocks)
    assert [table.key for table in tables] == ["templates", "templates_likelihood"]
    assert [column.title for column in tables[0].columns] == [
        "IJB-B 1e-05",
        "IJB-B 1e-04",
        "IJB-C 1e-05",
        "IJB-C 1e-04",
    ]
    rows = [row[0] for row in tables[0].as_table().rows]
    assert rows == [name for backbone in blocks for name in (backbone, "+ PFE-G", "+ PFE-v", "+ SCF-G", "+ SCF")]
    nothing = [None] * 4
    assert cells(tables[0]) == [
        [0.8933, 0.942, 0.9315, 0.956],
        [0.90001, 0.943, None, None],
        nothing,
        nothing,
        [0.90, 0.95, 0.93, 0.96],
        [0.25, 0.5, None, None],
        *[nothing] * 4,
    ]
    assert cells(tables[1])[4] == [0.91, 0.96, 0.93, 0.96]


def test_the_best_of_each_backbone_stands_out(blocks):
    table = make_system_tables(blocks)[0].as_table()
    # 90.00 and 90.001 look alike, so both are the best; where a backbone has one row, no one is.
    assert table.best == {(1, 1), (4, 1), (4, 2), (0, 3), (4, 4)}
    assert table.rows[1][1:] == ["90.00", "94.30", "–", "–"] and table.rows[2][1:] == ["–"] * 4


def test_text(blocks):
    lines = make_system_tables(blocks)[0].as_table().text().splitlines()
    assert lines[0] == "The published table: templates"
    assert lines[2:9] == [
        "TAR [%] @ FAR  IJB-B 1e-05  IJB-B 1e-04  IJB-C 1e-05  IJB-C 1e-04",
        "-------------  -----------  -----------  -----------  -----------",
        "ArcFace             89.33        94.20        93.15*       95.60",
        "+ PFE-G             90.00*       94.30            –            –",
        "+ PFE-v                 –            –            –            –",
        "+ SCF-G                 –            –            –            –",
        "+ SCF               90.00*       95.00*       93.00        96.00*",
    ]
    assert lines[-3] == "" and lines[-2].startswith("By cosine. The backbone averages") and max(map(len, lines)) <= 100


def test_markdown_and_the_report(blocks):
    table = make_system_tables(blocks)[0].as_table()
    assert "| + SCF         |   **90.00** |   **95.00** |       93.00 |   **96.00** |" in table.markdown()
    page = table_html(table)
    assert page.count("<b>") == 5 and "<td><b>95.00</b></td>" in page and "<td class=word>+ SCF-G</td>" in page


def test_latex(blocks):
    blocks = {"arc_face & co": blocks["ArcFace"]}
    lines = make_system_tables(blocks)[0].as_table().latex().splitlines()
    assert lines[1:4] == [
        r"\begin{tabular}{lrrrr}",
        r"\hline",
        r"TAR [\%] @ FAR & IJB-B 1e-05 & IJB-B 1e-04 & IJB-C 1e-05 & IJB-C 1e-04 \\",
    ]
    assert r"arc\_face \& co & 89.33 & 94.20 & \textbf{93.15} & 95.60 \\" in lines
    assert r"+ PFE-v & -- & -- & -- & -- \\" in lines and lines[-1] == r"\end{tabular}"


def test_json(blocks):
    table = system_tables_as_json(make_system_tables(blocks))["templates"]
    assert table["rows"][1] == {
        "backbone": "ArcFace",
        "system": "PFE-G",
        "objective": "pfe",
        "values": [0.90001, 0.943, None, None],
        "best": [True, False, False, False],
    }
    assert len(table["rows"]) == 10 and table["rows"][0]["system"] is None and len(table["columns"]) == 4


def test_the_papers_numbers_stand_beside_ours(blocks):
    table = make_system_tables(blocks, with_published=True)[0]
    titles = [column.title for column in table.columns]
    assert titles[:4] == ["IJB-B 1e-05", "IJB-B 1e-05, paper", "IJB-B 1e-04", "IJB-B 1e-04, paper"] and len(titles) == 8
    rows = table.as_table().rows
    published = [row[2::2] for row in rows[:5]]  # as the seed's README has them
    assert published == [
        ["89.33", "94.20", "93.15", "95.60"],
        ["89.55", "94.30", "92.95", "95.32"],
        ["–"] * 4,
        ["89.52", "94.24", "93.85", "95.33"],
        ["90.68", "94.74", "94.04", "96.09"],
    ]
    assert all(row[2::2] == ["–"] * 4 for row in rows[5:])
    assert table.as_table().best >= {(4, 2), (4, 4), (4, 6), (4, 8)}


def test_the_papers_numbers_beside_another_data_set():
    blocks = {"cosface": {None: [templates("mine", ("1e-01", "1e-02"), (0.9, 0.8))]}}
    (table, likelihood) = make_system_tables(blocks, with_published=True)
    assert table.as_table().header[1:] == [
        "mine 1e-02",
        "mine 1e-01",
        *(f"IJB-{letter} 1e-0{power}, paper" for letter in "BC" for power in (5, 4)),
    ]
    assert table.as_table().rows[4][1:] == ["–", "–", "91.02", "94.95", "94.78", "96.22"]
    assert len(likelihood.columns) == 2


def test_the_papers_numbers_need_a_backbone_of_its_own(blocks):
    with pytest.raises(InputError, match=r"--with-published: .*cosface and arcface, and --backbone mine; name one so"):
        make_system_tables({"mine": blocks["mine"]}, with_published=True)


def test_small_sets_show_the_lowest_rates_that_they_allow():
    fars = ("1e-01", "1e-02", "1e-03", "1e-04")
    (table, _) = make_system_tables({"b": {None: [templates("tiny", fars, (1, 0.9, 0.8, 0.7))]}})
    assert [column.title for column in table.columns] == ["tiny 1e-04", "tiny 1e-03", "tiny 1e-02"]


def rejection(quality, area, correlation, name="mixed"):
    quantiles = QualityResult({quality: QualityQuantiles(1, 2, 3, correlation)})
    areas = {Quality.FEATURE_NORM: 0.13, Quality.RANDOM: 0.155} | {quality: area}
    return Results(rejection=RejectionResult(name, Score.COSINE, 0.3, None, areas, {}, quantiles))


def test_risk_by_the_confidence_of_each_system():
    block = {
        None: [rejection(Quality.FEATURE_NORM, 0.12, -0.53), rejection(Quality.FEATURE_NORM, 0.2, None, "real")],
        Objective.PFE: [rejection(Quality.PRECISION, 0.119, -0.4)],
        Objective.SCF: [rejection(Quality.KAPPA, 0.108, -0.86), rejection(Quality.KAPPA, 0.21, None, "real")],
    }
    (table,) = make_system_tables({"b": block})
    shown = table.as_table()
    assert table.key == "risk" and shown.header[1:] == ["mixed, area", "mixed, Spearman", "real, area"]
    assert shown.rows == [
        ["b", "0.12000", "-0.5300", "0.20000"],
        ["+ PFE-G", "0.11900", "-0.4000", "–"],
        ["+ PFE-v", "–", "–", "–"],
        ["+ SCF-G", "–", "–", "–"],
        ["+ SCF", "0.10800", "-0.8600", "0.21000"],
    ]
    assert shown.best == {(4, 1), (4, 2), (0, 3)} and "0.15500 on mixed, 0.15500 on real" in shown.about


def test_verification_by_the_likelihood_of_each_system():
    def verified(**accuracies):
        by_score = {Score[score]: PairMeasures(accuracy, 0, 0, 0, {}) for score, accuracy in accuracies.items()}
        return Results(verification=BySet("lfw", {"lfw": VerificationResult(10, by_score)}))

    block = {
        None: [verified(COSINE=0.99)],
        Objective.SCF_GAUSSIAN: [verified(COSINE=0.99, MLS=0.991)],
        Objective.PFE_VMF: [verified(COSINE=0.99, VMF=0.995)],
    }
    (table,) = make_system_tables({"b": block})
    assert [row[1] for row in table.as_table().rows] == ["99.00", "–", "99.50", "99.10", "–"]
    assert [system for _, system in table.rows()] == list(SYSTEMS)
