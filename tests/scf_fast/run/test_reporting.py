"""Log lines of a run: one a record, whatever is in the names."""

import json
import logging
import re

import pytest

from scf_fast.run.reporting import EVENTS_FILE, LOG_FILE, log_to_files, set_up_logging
from scf_fast.run.timing import rate_text


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    yield root
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], logging.raiseExceptions = handlers, raises
    root.setLevel(level)


def test_a_folder_named_with_a_newline_forges_no_log_line(tmp_path, root_logger, capsys):
    name = "faces\n12:00:00 done: 100 steps\x1b[1A\udcff"
    set_up_logging(True)
    logging.getLogger("scf_fast.a").warning("broken image: %s", name)  # before the run's folder is there
    log_to_files(tmp_path)
    logging.getLogger("scf_fast.a").error(f"and {name}")
    shown = r"faces\n12:00:00 done: 100 steps\x1b[1A\xff"
    for text in (capsys.readouterr().err, (tmp_path / LOG_FILE).read_text(encoding="utf-8")):
        first, second = text.splitlines()
        assert re.fullmatch(r"\d\d:\d\d:\d\d broken image: (.*)", first)[1] == shown
        assert re.fullmatch(r"\d\d:\d\d:\d\d and (.*)", second)[1] == shown
    events = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert [event["message"] for event in events] == [f"broken image: {name}", f"and {name}"]


@pytest.mark.parametrize(
    ("rate", "text"), [(0.034, "0.034"), (0.5, "0.5"), (9.96, "10"), (12.4, "12"), (1234.5, "1234")]
)
def test_a_slow_rate_is_no_zero(rate, text):
    assert rate_text(rate) == text
