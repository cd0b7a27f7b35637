"""Files of every program come back as timings; compare tells a change from noise; the report says what is not there."""

import json
import random
import re
from pathlib import Path

import pytest

from bench import compare, report
from bench.measuring.results import by_device, read, table

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    "date": "2026-01-02",
    "device": "cpu",
    "cpu": "A",
    "threads": 1,
    "torch": "2",
    "commit": "c",
    "command": "python -m bench.suite",
}
FLOORS = {
    "copy_bytes_per_second": 1e10,
    "flops_per_second": {"float32": 1e11, "bfloat16": 2e11},
    "launch_seconds": 1e-6,
}


def samples(median, spread, count=50, seed=0):
    rng = random.Random(seed)
    return [median * rng.gauss(1, spread) for _ in range(count)]


def suite_file(path, section="scf_loss", ours=1e-3, baseline=2e-3, spread=0.02, seed=0, **more):
    records = [
        {
            "work": "scf_loss, B = 4",
            "way": way,
            "seconds": samples(seconds, spread, seed=seed),
            "floor_seconds": 1e-4,
            "bound": "memory",
            "per_second": 4 / seconds,
            "unit": "images",
        }
        for way, seconds in (("scf_fast", ours), ("published", baseline))
    ]
    records.append({"work": "scf_loss, B = 4", "way": "peer", "not_measured": "not installed"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "section": section,
                "environment": ENVIRONMENT | more,
                "machine": FLOORS,
                "complete": True,
                "records": records,
            }
        )
    )
    return str(path)


@pytest.mark.parametrize(
    "ours, baseline, spread, status",
    [
        (1.0e-3, 2e-3, 0.02, 0),
        (1.2e-3, 2e-3, 0.02, 1),
        (1.03e-3, 2e-3, 0.001, 0),
        (0.7e-3, 2e-3, 0.02, 0),
        (1.2e-3, 2e-3, 0.9, 0),
        (1e-3, 4e-3, 0.02, 0),
    ],
)
def test_compare_tells_a_change_from_noise(ours, baseline, spread, status, tmp_path):
    """In turn: the same, slower, slower within the tolerance, faster, slower within the noise, only the baseline
    slower.
    """
    old, new = (
        suite_file(tmp_path / "old.json", spread=spread),
        suite_file(tmp_path / "new.json", ours=ours, baseline=baseline, spread=spread, seed=1),
    )
    assert compare.main([old, new]) == status


def test_compare_says_what_changed(tmp_path, capsys):
    compare.main(
        [suite_file(tmp_path / "old.json"), suite_file(tmp_path / "new.json", ours=1.5e-3, baseline=3e-3, seed=1)]
    )
    printed = capsys.readouterr().out
    assert (
        printed.count("slower |") == 2 and "1 of our 1 cases are slower" in printed and "baselines take 1.5" in printed
    )


@pytest.mark.parametrize(
    "more, content, message",
    [
        ({"cpu": "B"}, None, "one cpu, got 'A' and 'B'"),
        ({"threads": 2}, None, "one threads, got 1 and 2"),
        ({}, "{", "must be a JSON file"),
        ({}, json.dumps({"environment": ENVIRONMENT, "records": []}), "cases in common"),
    ],
)
def test_compare_refuses_what_does_not_compare(more, content, message, tmp_path, capsys):
    old, new = suite_file(tmp_path / "old.json"), suite_file(tmp_path / "new.json", **more)
    if content:
        (tmp_path / "new.json").write_text(content)
    with pytest.raises(SystemExit) as error:
        compare.main([old, new])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_every_format_is_read(tmp_path):
    stats = {"median": 0.5, "q1": 0.4, "q3": 0.6, "rounds": 16}
    contents = {
        "pytest": {
            "machine_info": ENVIRONMENT,
            "benchmarks": [{"group": "w", "name": "test[eager]", "extra_info": {"way": "eager"}, "stats": stats}],
        },
        "claims": {"environment": ENVIRONMENT, "cases": [{"work": "w", "seconds": {"eager": [0.5] * 4}}]},
        "throughput": {
            "environment": ENVIRONMENT,
            "networks": ["n"],
            "confidence_net": "conv",
            "epoch_batch": 8,
            "results": {
                "n": {"steps": {"4": {"published": [8.0, 8.0, 8.0, 8.0, 4.0]}}, "epochs": {"ours": [16.0, 16.0]}}
            },
        },
    }
    found = {}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        found[name] = read(tmp_path / f"{name}.json").timings
    assert [(t.work, t.way, t.median, t.low, t.high) for t in found["pytest"]] == [
        ("w", "eager", 0.5, pytest.approx(0.4215), pytest.approx(0.5785))
    ]
    assert [(t.work, t.way, t.median, t.low) for t in found["claims"]] == [("w", "eager", 0.5, None)]
    assert [(t.work, t.median, t.low, t.ours) for t in found["throughput"]] == [
        ("stage 2 step, n, conv, B = 4", 0.5, 0.5, False),
        ("stage 2 epoch, n, conv, B = 8", 0.5, None, True),
    ]


def test_the_newest_of_each_kind_counts(tmp_path):
    suite_file(tmp_path / "cpu" / "scf_loss-2026-01-02.json")
    suite_file(tmp_path / "cpu" / "scf_loss-2026-03-04.json", date="2026-03-04")
    suite_file(tmp_path / "cpu" / "scf_loss-cpu-2026-02-04.json", date="2026-02-04")
    assert [file.environment["date"] for file in by_device(tmp_path)["cpu"]] == ["2026-03-04"]


def test_cells_without_a_number_say_so():
    assert table(["a", "b"], [[None, 0]]).splitlines()[-1] == "| not measured | 0 |"


def test_report_has_tables_plots_and_empty_cells(tmp_path):
    folder = tmp_path / "results" / "cpu"
    suite_file(folder / "scf_loss.json", spread=0)
    suite_file(folder / "floors.json", section="floors")
    steps = [
        {
            "work": f"stage 1 step, ir_tiny, B = {batch}, C = 100",
            "way": way,
            "seconds": [0.1] * 5,
            "floor_seconds": 0.01,
            "bound": "compute",
            "per_second": rate,
            "unit": "images",
            "network": "ir_tiny",
            "batch": batch,
            "classes": 100,
            "peak_mib": 1.0,
        }
        for batch, way, rate in ((4, "scf_fast", 1000.0), (8, "scf_fast", 2000.0), (4, "dense", 500.0))
    ]
    heads = [
        {
            "work": "margin_softmax, C = 1000",
            "way": "scf_fast",
            "seconds": [1e-3] * 5,
            "classes": 1000,
            "batch": 10,
            "peak_mib": 2.0,
        }
    ]
    for section, records in (("stage1", steps), ("margin_softmax", heads)):
        (folder / f"{section}.json").write_text(
            json.dumps({"section": section, "environment": ENVIRONMENT, "complete": False, "records": records})
        )
    out = tmp_path / "RESULTS.md"
    assert report.main(["--results", str(tmp_path / "results"), "--out", str(out)]) == 0
    page = out.read_text()
    assert (
        "| scf_loss, B = 4 | 100 us, memory | 1 ms, 4,000 images/s (10.0 x) | 2 ms, 2,000 images/s (20.0 x) |" in page
    )
    assert "### Scoring\n\n| work | floor, bound |\n| --- | --- |\n| not measured | not measured |" in page
    assert "- peer, 1 case not measured: not installed" in page
    assert "No GPU has been at hand" in page and "| interrupted |" in page and str(tmp_path) not in page
    # MS1M: 30 epochs of 5.8 M images at 1/2000 s, and 1e-7 s for each identity beyond the 100 measured
    hours = 30 * 5.8e6 * (1 / 2000 + (85_742 - 100) * 1e-7) / 3600
    assert f"{hours:,.1f} (ir_tiny)" in page
    for name in ("throughput", "memory", "roofline", "speedups", "projection"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"(results/cpu/{name}.png)" in page


def test_report_of_nothing_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path)])
    assert "bench.suite writes them" in capsys.readouterr().err


def test_committed_results_say_where_they_come_from():
    """Device, versions, date, revision and command in every file, and no place on anybody's machine."""
    files = [file for found in by_device().values() for file in found]
    assert files
    for file in files:
        assert all(file.environment.get(name) for name in ("device", "torch", "date", "commit", "command")), (
            file.path.name
        )
        assert not re.search(r'"/[a-z]+/|/(home|root|tmp|mnt|scratch)/', json.dumps(file.content)), file.path.name
        assert not file.content.get("tiny"), file.path.name


def test_results_that_the_readmes_name_are_there():
    linked = [
        page.parent / link
        for page in (ROOT / "README.md", ROOT / "bench" / "README.md", ROOT / "bench" / "RESULTS.md")
        for link in re.findall(r"\]\(([^)#:]*results[^)]*)\)", page.read_text())
    ]
    missing = [path.name for path in linked if not path.exists()]
    assert len(linked) > 10 and not missing, (
        f"{missing}: after moving results run python -m bench.report, and mend the README's links"
    )
