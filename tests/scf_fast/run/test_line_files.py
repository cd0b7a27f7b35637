"""Files of lines on a full disk, after a kill, and damaged."""

import json
import logging
import resource

from scf_fast.run.line_files import LineHandler, StepLines, forget_after, read_steps


def steps_of(path):
    return [record["step"] for record in read_steps(path)[0]]


def test_lines_wait_for_room_and_come_once(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = StepLines(tmp_path / "m.jsonl")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        for step in range(10):
            lines.add({"step": step, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) < 10
    lines.add({"step": 99})
    lines.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert steps == [*range(10), 99]


def test_a_log_has_whole_lines_after_a_full_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = LineHandler(tmp_path / "log.txt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (25, before[1]))
    try:
        for number in range(3):
            handler.handle(logging.LogRecord("a", logging.INFO, "", 0, "ten characters %d", (number,), None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    handler.close()
    assert (tmp_path / "log.txt").read_text() == "".join(f"ten characters {number}\n" for number in range(3))


def test_a_line_cut_short_stays_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    lines = StepLines(path)
    lines.add({"step": 3})
    lines.sync()
    lines.close()
    assert read_steps(path) == ([{"step": 1}, {"step": 3}], 1)


def test_later_steps_are_forgotten_and_damaged_lines_are_not(tmp_path, caplog):
    """A flipped bit, and a block that a file system had not written."""
    path = tmp_path / "m.jsonl"
    written = [json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in range(100)]
    damaged = [*written]
    damaged[20] = bytes([damaged[20][0] ^ 1]) + damaged[20][1:]
    damaged[21] = b"\0" * len(damaged[21][:-1]) + b"\n"
    path.write_bytes(b"".join(damaged) + b'{"step": 100, "lo')
    forget_after(path, 49)
    assert path.read_bytes() == b"".join(damaged[:50])
    assert steps_of(path) == [*range(20), *range(22, 50)] and "2 damaged lines" in caplog.text
    caplog.clear()
    forget_after(path, 10)
    assert path.read_bytes() == b"".join(written[:11]) and not caplog.text
    forget_after(path, -1)
    assert path.read_bytes() == b""
    forget_after(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()
