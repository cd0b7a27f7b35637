"""The report shows what the files hold, and says what they do not."""

import json

from bench import report


def test_report_has_tables_plots_and_empty_cells(tmp_path, suite_file, measured_on):
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
            json.dumps({"section": section, "environment": measured_on, "complete": False, "records": records})
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
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "bench.suite writes them" in capsys.readouterr().err


def test_report_shows_what_instructions_allow(tmp_path, suite_file, measured_on):
    """Counts of sm_90 stand in the table, shares of every chip beside them, and spills in one line."""
    record = {
        "work": "margin statistics, float32, d = 512",
        "architecture": 90,
        "unit": "cosine",
        "instructions": 617.12,
        "beside": 105.1,
        "registers": 202,
        "occupancy": 0.125,
        "spilled": 0,
        "possible": {"H200": 0.83, "H100": 0.83},
    }
    spilling = record | {"architecture": 89, "spilled": 16, "possible": {"RTX 4090": 1.0}}
    folder = tmp_path / "results" / "cpu"
    suite_file(folder / "scf_loss.json", spread=0)
    content = {"section": "instructions", "environment": measured_on, "records": [spilling, record]}
    (folder / "instructions.json").write_text(json.dumps(content))
    out = tmp_path / "RESULTS.md"
    assert report.main(["--results", str(tmp_path / "results"), "--out", str(out)]) == 0
    page = out.read_text()
    row = "| margin statistics, float32, d = 512 | 617.1 per cosine | 105.1 | 202, 12% | 83% | 83% | "
    row += "not measured | 100% |"
    assert row in page
    assert "sm_89, sm_90; registers spill in margin statistics, float32, d = 512 on sm_89: 16 bytes." in page
