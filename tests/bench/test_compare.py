"""compare tells a change from noise, and refuses files that cannot be compared."""

import json

import pytest

from bench import compare


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
def test_compare_tells_a_change_from_noise(ours, baseline, spread, status, tmp_path, suite_file):
    """In turn: the same, slower, slower within the tolerance, faster, slower within the noise, only the baseline
    slower.
    """
    old, new = (
        suite_file(tmp_path / "old.json", spread=spread),
        suite_file(tmp_path / "new.json", ours=ours, baseline=baseline, spread=spread, seed=1),
    )
    assert compare.main([old, new]) == status


def test_compare_says_what_changed(tmp_path, capsys, suite_file):
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
        ({}, {"records": []}, "cases in common"),
    ],
)
def test_compare_refuses_what_does_not_compare(more, content, message, tmp_path, capsys, suite_file, measured_on):
    old, new = suite_file(tmp_path / "old.json"), suite_file(tmp_path / "new.json", **more)
    if content:
        text = content if isinstance(content, str) else json.dumps({"environment": measured_on, **content})
        (tmp_path / "new.json").write_text(text)
    assert compare.main([old, new]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bench.compare: error: ") and message in error and error.count("\n") == 1


def test_old_files_with_all_samples_compare_with_new_ones(tmp_path, capsys, suite_file):
    old = suite_file(tmp_path / "old.json", summarized=False)
    assert compare.main([old, suite_file(tmp_path / "same.json")]) == 0
    assert capsys.readouterr().out.count("same |") == 2
    assert compare.main([old, suite_file(tmp_path / "new.json", ours=1.2e-3)]) == 1
