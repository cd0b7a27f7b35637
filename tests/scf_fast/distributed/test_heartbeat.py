"""A rank that is lost ends all ranks, by name and in time. Ranks are threads here."""

import dataclasses
import logging
import subprocess
import sys
import threading
import time

import pytest

from scf_fast import distributed
from scf_fast.distributed import heartbeat
from scf_fast.distributed.heartbeat import Heart

TIMEOUT = 1.0


class Ranks:
    """Hearts of several ranks, and the status that each has ended with."""

    def __init__(self, met):
        self.ended = {}
        self.hearts = [
            Heart(meeting, TIMEOUT, lambda status, rank=rank: self.ended.setdefault(rank, status))
            for rank, meeting in enumerate(met)
        ]
        for heart in self.hearts:
            heart.start()

    def wait(self, count, seconds=5.0):
        deadline = time.monotonic() + seconds
        while len(self.ended) < count and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self):
        threads = [threading.Thread(target=heart.stop) for heart in self.hearts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.fixture
def make_ranks(place, meet_all, monkeypatch):
    monkeypatch.setattr(heartbeat, "_QUIET_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "_LEAVE_SECONDS", 0.3)
    monkeypatch.setattr(heartbeat, "_CLOCK_SECONDS", 0.05)
    made = []

    def make(count, change=lambda meeting: meeting):
        port = distributed.free_port()
        made.append(Ranks([change(met) for met in meet_all([place(rank, count, port) for rank in range(count)])]))
        return made[-1]

    yield make
    for ranks in made:
        ranks.stop()


def silence(heart):
    """Stops a rank's beat, as SIGSTOP or a network that is down does."""
    heart._exchange = heart._find_lost = lambda *arguments: None


def test_ranks_that_live_are_left_alone(make_ranks):
    ranks = make_ranks(3)
    for _ in range(4):
        time.sleep(TIMEOUT / 2)
        for heart in ranks.hearts:
            heart.mark("step", is_step=True)
    began = time.monotonic()
    ranks.stop()
    assert ranks.ended == {} and time.monotonic() - began < TIMEOUT


def test_a_silent_rank_ends_the_others_in_time_by_name(make_ranks, caplog):
    ranks = make_ranks(3)
    time.sleep(0.3)
    began = time.monotonic()
    silence(ranks.hearts[2])
    ranks.wait(2)
    assert {rank: ranks.ended.get(rank) for rank in (0, 1)} == {0: 1, 1: 1}
    assert time.monotonic() - began < 2 * TIMEOUT
    name = ranks.hearts[0]._meeting.members[2]
    assert f"from {name} (pid {name.pid}): stopped or dead, or cut off" in caplog.text
    assert caplog.text.count("no sign of life") == 1  # one rank of a node says it


def test_rank_0_is_missed_by_all(make_ranks, caplog):
    ranks = make_ranks(3)
    time.sleep(0.3)
    silence(ranks.hearts[0])
    ranks.wait(2)
    assert set(ranks.ended) == {1, 2} and "no sign of life for 1 s from rank 0 on" in caplog.text


def test_a_rank_that_stays_in_a_step_is_told_from_those_that_wait_for_it(make_ranks, monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "STUCK_IN_STEP", 1)
    ranks = make_ranks(3)
    for step in range(3):
        for rank, heart in enumerate(ranks.hearts):
            heart.mark("waiting for data", is_step=True)
            if rank != 1 or step < 2:
                heart.mark(f"step {step}", is_step=True)
    ranks.wait(3)
    assert ranks.ended == {0: 1, 1: 1, 2: 1}
    assert "rank 1 on " in caplog.text and "has been in one place (waiting for data) for 1 s" in caplog.text


def test_outside_of_steps_the_ranks_have_longer(make_ranks, monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "STUCK_IN_STEP", 0.1)
    monkeypatch.setattr(heartbeat, "STUCK_ELSEWHERE", 1)
    ranks = make_ranks(2)
    time.sleep(1.5 * TIMEOUT)
    assert ranks.ended == {}  # a program that marks nothing may take as long as it likes
    for heart in ranks.hearts:
        heart.mark("checkpoint")
    time.sleep(TIMEOUT / 2)
    assert ranks.ended == {}
    ranks.wait(2)
    assert ranks.ended == {0: 1, 1: 1} and "all ranks have been in one place (checkpoint)" in caplog.text


def test_a_process_that_is_gone_is_seen_at_once(make_ranks, caplog):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    def change(meeting):
        members = [dataclasses.replace(m, pid=dead.pid) if m.rank == 2 else m for m in meeting.members]
        return dataclasses.replace(meeting, members=tuple(members))

    began = time.monotonic()
    ranks = make_ranks(3, change)
    ranks.wait(3)  # the thread that stands for the dead process hears of it too
    assert set(ranks.ended) == {0, 1, 2} and time.monotonic() - began < TIMEOUT
    assert f"rank 2 on {ranks.hearts[0]._meeting.members[2].host} (pid {dead.pid}) has ended before" in caplog.text


def test_a_rank_that_fails_takes_the_others_with_it_with_its_status(make_ranks, caplog):
    ranks = make_ranks(3)
    time.sleep(0.2)
    ranks.hearts[1].report_failure("--data x: cannot be read", 2)
    ranks.wait(2)
    assert ranks.ended == {0: 2, 2: 2} and "rank 1 on" in caplog.text and "--data x: cannot be read" in caplog.text


def test_a_launch_that_stood_still_as_a_whole_goes_on(make_ranks):
    """As under SIGSTOP and SIGCONT of a scheduler that suspends a job."""
    ranks = make_ranks(2)
    time.sleep(0.3)
    for heart in ranks.hearts:
        heart._last_contact -= 10
        for seen in heart._seen.values():
            seen.beats_since -= 10
        heart._forgive(10)
    time.sleep(0.5)
    assert ranks.ended == {}


def test_a_store_that_is_gone_is_the_end_of_rank_0(make_ranks, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(heartbeat, "_BROKEN_SECONDS", 0.2)
    ranks = make_ranks(2)
    time.sleep(0.3)
    other = ranks.hearts[1]

    def broken():
        raise heartbeat.dist.DistNetworkError("Connection reset by peer")

    class Broken:
        def __getattr__(self, name):
            return lambda *arguments: broken()

    other._store = Broken()
    ranks.wait(1)
    assert ranks.ended.get(1) == 1 and "has closed the connection: it has ended" in caplog.text


def test_a_log_that_cannot_be_written_holds_nobody(make_ranks, monkeypatch):
    """As one on a network disk that is cut off with the rest."""
    monkeypatch.setattr(heartbeat, "_SAY_SECONDS", 0.2)
    release = threading.Event()

    class Hanging(logging.Handler):
        def emit(self, record):
            release.wait(10)

    hanging = Hanging()
    logging.getLogger().addHandler(hanging)
    try:
        ranks = make_ranks(2)
        time.sleep(0.2)
        silence(ranks.hearts[1])
        ranks.wait(1, seconds=3 * TIMEOUT)
        assert ranks.ended.get(0) == 1
    finally:
        release.set()
        logging.getLogger().removeHandler(hanging)
