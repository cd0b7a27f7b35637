"""Files of every program, old and new, come back as timings; the committed ones say where they come from."""

import json
import re
from pathlib import Path

import pytest

from bench.measuring.results import by_device, read, write_json
from bench.measuring.tables import markdown_table

ROOT = Path(__file__).parents[3]


def test_every_format_is_read(tmp_path, measured_on):
    stats = {"median": 0.5, "q1": 0.4, "q3": 0.6, "rounds": 16}
    contents = {
        "pytest": {
            "machine_info": measured_on,
            "benchmarks": [{"group": "w", "name": "test[eager]", "extra_info": {"way": "eager"}, "stats": stats}],
        },
        "claims": {"environment": measured_on, "cases": [{"work": "w", "seconds": {"eager": [0.5] * 4}}]},
        "throughput": {
            "environment": measured_on,
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


def test_the_newest_of_each_kind_counts(tmp_path, suite_file):
    suite_file(tmp_path / "cpu" / "scf_loss-2026-01-02.json")
    suite_file(tmp_path / "cpu" / "scf_loss-2026-03-04.json", date="2026-03-04")
    suite_file(tmp_path / "cpu" / "scf_loss-cpu-2026-02-04.json", date="2026-02-04")
    assert [file.environment["date"] for file in by_device(tmp_path)["cpu"]] == ["2026-03-04"]


def test_cells_without_a_number_say_so():
    assert markdown_table(["a", "b"], [[None, 0]]).splitlines()[-1] == "| not measured | 0 |"


def test_old_files_with_all_samples_read_as_their_summaries(tmp_path, suite_file):
    old = read(suite_file(tmp_path / "old.json", summarized=False)).timings
    new = read(suite_file(tmp_path / "new.json")).timings
    assert [(t.work, t.way, t.median, t.low, t.high) for t in old] == [
        (t.work, t.way, t.median, t.low, t.high) for t in new
    ]
    assert old[0].low < old[0].median < old[0].high


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


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_record_takes_a_line(tmp_path):
    """And so does any object that fits one; the content is that of json.dumps, numbers as keys included."""
    records = [{"work": "w" * 200, "seconds": {"median": 0.1}}, {"work": "v"}]
    content = {"short": {"a": [1, None]}, "records": records, "long": {4: "x" * 70, "other": "y" * 70}, "empty": {}}
    write_json(tmp_path / "a.json", content)
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert json.loads("\n".join(lines)) == json.loads(json.dumps(content))
    assert (
        ' "short": {"a": [1, null]},' in lines and '  {"work": "v"}' in lines and '  "4": "' + "x" * 70 + '",' in lines
    )
    assert len(lines) == 12
