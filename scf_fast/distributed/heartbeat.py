"""Signs of life: a rank that dies, hangs or is cut off ends the whole launch, within a stated time, by name.

Each rank writes its beat into the store, with how far its main thread has come. Rank 0 reads all beats; the others read
rank 0's and the verdict. Whoever finds a rank lost writes the verdict, and every rank ends. A rank is lost when

    its process is gone                     seen by the ranks of its node, within a few seconds
    it reports its own failure              at once
    its beat has stopped for ``timeout``    stopped, or cut off from the network
    it holds up the others for 10 times     its main thread is stuck: in a read, in a lock, in the device; 60 times
    ``timeout``                             outside of steps (start, checkpoint, validation, export)

Two threads do this beside the main one, which may be inside a collective operation that never returns. One talks to the
store, and may hang with the network; the other only looks at the clock.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from scf_fast.distributed.meeting import Meeting, Member, spans

log = logging.getLogger(__name__)

FAILED = 1  # exit status of a launch that has lost a rank
STUCK_IN_STEP, STUCK_ELSEWHERE = 10, 60  # times ``timeout``
_LONGEST_INTERVAL = 2.0  # seconds between beats
_CLOCK_SECONDS = 0.25
_SAY_SECONDS = 3.0  # that the last line may take
_QUIET_SECONDS = 1.0  # before ranks end that leave the line to the first of their node
_BROKEN_SECONDS = 5.0  # that a closed connection to the store may be the end of a launch that is done
_LEAVE_SECONDS = 5.0  # that rank 0 waits at the end for the last beats of the others
_VERDICT = "verdict"
UNWATCHED = "work without marks"  # phase of a program that says nothing of its progress: it may last for hours


@dataclass
class _Seen:
    """What rank 0 knows of a rank, and since when (seconds of the monotonic clock)."""

    beats: int
    beats_since: float
    marks: int
    marks_since: float
    phase: str
    is_step: bool
    is_done: bool = False


class Heart:
    """The signs of life of this rank, and its view of the others; see the module.

    Args:
        timeout: seconds without a beat after which a rank is lost.
        leave: ends the process with a status; of tests another function.
    """

    def __init__(self, meeting: Meeting, timeout: float, leave: Callable[[int], Any] = os._exit):
        self._meeting, self._timeout, self._leave = meeting, timeout, leave
        self._rank = meeting.place.rank
        self._interval = min(_LONGEST_INTERVAL, timeout / 10)
        self._beats = 0
        self._progress = (0, UNWATCHED, False)  # marks, phase, whether that is a step
        self._verdict: dict[str, Any] | None = None
        self._is_leaving = False
        self._main_is_done = False
        self._ended = threading.Event()
        now = time.monotonic()
        self._last_contact = now
        self._broken_since: float | None = None  # the connection to the store
        self._own = _Seen(0, now, 0, now, UNWATCHED, False)
        self._seen = {
            member.rank: _Seen(-1, now, 0, now, UNWATCHED, False)
            for member in meeting.members
            if member.rank != self._rank
        }
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._beat, "heartbeat"), (self._watch, "heartbeat-clock"))
        ]

    def start(self) -> None:
        """Begins; every rank has to."""
        # A client of its own: the process group's may be waiting.
        self._store = dist.TCPStore(
            self._meeting.address,
            self._meeting.port,
            self._meeting.place.world_size,
            False,
            timedelta(seconds=max(1.0, self._timeout)),
            wait_for_workers=False,
        )
        for thread in self._threads:
            thread.start()

    def mark(self, phase: str, is_step: bool = False) -> None:
        """Notes that the main thread has come to another phase; all ranks come to the same ones in the same order.

        Args:
            phase: in words, for the message about a rank that stays in it.
            is_step: whether it is short, as a step is.
        """
        self._progress = (self._progress[0] + 1, phase, is_step)

    def report_failure(self, reason: str, status: int) -> None:
        """Tells the other ranks that this one ends with an error."""
        self._is_leaving = True
        self._judge(f"{self._meeting.own} has ended: {reason}", status, self._rank)
        if self._rank == 0:
            self._ended.wait(3 * self._interval)  # the store ends with this process

    @property
    def longest_wait(self) -> float:
        """Seconds after which a rank that is lost has been found."""
        return self._timeout + 4 * self._interval + 4 * _QUIET_SECONDS

    def wait_for_verdict(self, seconds: float) -> None:
        """Returns after this time; if the failure that this rank has met is another rank's, the process ends before."""
        self._ended.wait(seconds)

    def stop(self) -> None:
        """Ends the watch; every rank has to, at the end of its work. Rank 0 waits for the others, a few seconds."""
        self._is_leaving = True
        if self._rank == 0:
            deadline = time.monotonic() + _LEAVE_SECONDS
            while not all(seen.is_done for seen in self._seen.values()) and time.monotonic() < deadline:
                if self._ended.wait(self._interval / 10):
                    break
        self._ended.set()
        self._threads[0].join(2 * self._interval)

    # -- the thread that talks to the store

    def _beat(self) -> None:
        try:
            while not self._ended.wait(self._interval if self._rank or not self._is_leaving else self._interval / 10):
                self._exchange()
            self._exchange()
        except dist.DistError:
            pass  # at the end, when rank 0 may be gone

    def _exchange(self) -> None:
        try:
            self._beats += 1
            self._store.set(f"beat/{self._rank}", self._encode())
            for member in self._meeting.neighbors:
                self._look_for(member)
            if self._store.check([_VERDICT]):
                self._verdict = json.loads(self._store.get(_VERDICT))
            ranks = list(self._seen) if self._rank == 0 else [0]
            for rank in ranks if self._all_have_begun(ranks) else []:
                self._note(rank, json.loads(self._store.get(f"beat/{rank}")))
            self._last_contact, self._broken_since = time.monotonic(), None
        except dist.DistError as error:
            if self._ended.is_set():
                raise
            if isinstance(error, dist.DistNetworkError) and self._broken_since is None:
                self._broken_since = time.monotonic()

    def _all_have_begun(self, ranks: list[int]) -> bool:
        return self._store.check([f"beat/{rank}" for rank in ranks])

    def _encode(self) -> str:
        marks, phase, is_step = self._progress
        return json.dumps([self._beats, marks, phase, is_step, self._is_leaving])

    def _note(self, rank: int, beat: list[Any]) -> None:
        beats, marks, phase, is_step, is_done = beat
        seen, now = self._seen[rank], time.monotonic()
        if beats != seen.beats:
            seen.beats, seen.beats_since = beats, now
        if marks != seen.marks:
            seen.marks, seen.marks_since, seen.phase, seen.is_step = marks, now, phase, is_step
        seen.is_done = is_done
        if rank == 0 and is_done:
            self._main_is_done = True

    def _look_for(self, member: Member) -> None:
        """Finds a rank of this node whose process is gone."""
        if member.rank == self._rank or self._is_leaving or self._main_is_done:
            return
        try:
            os.kill(member.pid, 0)
            with open(f"/proc/{member.pid}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[0] != b"Z":
                    return
        except PermissionError:
            return
        except OSError:
            pass
        key = f"beat/{member.rank}"
        if self._store.check([key]) and json.loads(self._store.get(key))[-1]:
            return  # it was done
        self._judge(f"{member} (pid {member.pid}) has ended before its work was done", FAILED, member.rank)

    def _judge(self, message: str, status: int, rank: int) -> None:
        """Writes the verdict, unless there is one."""
        verdict = json.dumps({"message": message, "status": status, "rank": rank})
        try:
            self._verdict = json.loads(self._store.compare_set(_VERDICT, "", verdict))
        except dist.DistError:
            self._verdict = json.loads(verdict)

    # -- the thread that looks at the clock

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(_CLOCK_SECONDS):
            now = time.monotonic()
            if now - before > 1 + 4 * _CLOCK_SECONDS:
                self._forgive(now - before)  # it was this process that stood still
            before = now
            if self._verdict is not None:
                self._end(self._verdict)
                return
            if self._main_is_done:
                continue
            found = self._find_lost(now)
            if found is not None:
                message, rank, in_store = found
                verdict = {"message": message, "status": FAILED, "rank": rank}
                if in_store:
                    # The store may hang, and the other thread with it.
                    threading.Thread(target=self._judge, args=(message, FAILED, rank), daemon=True).start()
                    self._ended.wait(_QUIET_SECONDS)
                self._end(verdict)
                return

    def _forgive(self, seconds: float) -> None:
        self._last_contact += seconds
        for seen in self._seen.values():
            seen.beats_since += seconds
            seen.marks_since += seconds

    def _find_lost(self, now: float) -> tuple[str, int, bool] | None:
        """Returns what has happened, to which rank, and whether the store is there to tell the others."""
        keeper = self._meeting.members[0]
        if self._broken_since is not None and now - self._broken_since > min(_BROKEN_SECONDS, self._timeout):
            return f"{keeper} (pid {keeper.pid}), where the store is, has closed the connection: it has ended", 0, False
        if now - self._last_contact > self._timeout:
            return (
                f"{keeper} (pid {keeper.pid}), where the store is, has not answered {self._meeting.own} for "
                f"{now - self._last_contact:.0f} s: it is stopped or dead, or the network between them is down",
                0,
                False,
            )
        lost = [
            rank
            for rank, seen in self._seen.items()
            if (self._rank == 0 or rank == 0) and not seen.is_done and now - seen.beats_since > self._timeout
        ]
        if lost:
            longest = max(now - self._seen[rank].beats_since for rank in lost)
            return (
                f"no sign of life for {longest:.0f} s from {self._name(lost)}: stopped or dead, or cut off from the "
                "network",
                lost[0],
                True,
            )
        return self._find_stuck(now) if self._rank == 0 and not self._is_leaving else None

    def _name(self, ranks: list[int]) -> str:
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self._meeting.members[rank].host, []).append(rank)
        return ", ".join(
            f"rank{'s' * (len(found) > 1)} {spans(found)} on {host}"
            + (f" (pid {self._meeting.members[found[0]].pid})" if len(found) == 1 else "")
            for host, found in hosts.items()
        )

    def _find_stuck(self, now: float) -> tuple[str, int, bool] | None:
        """Finds the ranks that are behind all others, and have been for too long. Rank 0 counts too."""
        marks, phase, is_step = self._progress
        if marks != self._own.marks:
            self._own = _Seen(0, now, marks, now, phase, is_step)
        everybody = {0: self._own, **{rank: seen for rank, seen in self._seen.items() if not seen.is_done}}
        least = min(seen.marks for seen in everybody.values())
        behind = [rank for rank, seen in everybody.items() if seen.marks == least]
        first = everybody[behind[0]]
        since = max(everybody[rank].marks_since for rank in behind)
        if first.phase == UNWATCHED:
            return None
        limit = self._timeout * (STUCK_IN_STEP if first.is_step else STUCK_ELSEWHERE)
        if now - since <= limit:
            return None
        if len(behind) == len(everybody):
            who, hint = "all ranks have", "; if it is the network, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME may help"
        else:
            who, hint = f"{self._name(behind)} {'have' if len(behind) > 1 else 'has'}", ", and the others wait"
        return f"{who} been in one place ({first.phase}) for {now - since:.0f} s{hint}", behind[0], True

    def _end(self, verdict: dict[str, Any]) -> None:
        """Ends the process; the first rank of each node says why."""
        if self._ended.is_set():
            return
        if self._is_leaving and verdict["rank"] == self._rank:
            return  # the main thread is telling its error
        speaker = threading.Thread(target=self._say, args=(verdict,), daemon=True)
        speaker.start()
        speaker.join(_SAY_SECONDS)  # the log may lie on what is cut off, and the main thread may hold its lock
        self._leave(verdict["status"])

    def _say(self, verdict: dict[str, Any]) -> None:
        if self._meeting.is_first_on_node or verdict["rank"] in (m.rank for m in self._meeting.neighbors[:1]):
            way = "; the run ends here, --resume goes on from the newest checkpoint"
            text = "%s" + way * (verdict["status"] == FAILED)
            log.critical(text, verdict["message"], extra={"event": "rank_lost"})
        else:
            time.sleep(_QUIET_SECONDS)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
