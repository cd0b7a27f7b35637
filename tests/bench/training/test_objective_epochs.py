import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_both_ways_train_every_objective_from_the_cache(tmp_path):
    words = "--network ir_tiny --images 192 --groups 4 --rounds 1 --out".split()
    others = ("TRITON_INTERPRET", "MASTER_PORT")  # an earlier test of this process may have joined a group
    environment = {name: value for name, value in os.environ.items() if name not in others}
    done = subprocess.run(
        [sys.executable, "-m", "bench.objective_epochs", *words, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "objective_epochs.json").read_text())["records"]
    assert [record["way"] for record in records] == ["ours, together", "ours, separately"]
    assert all(0 <= record["reading_seconds"] < record["median_seconds"] for record in records)
