"""How ranks find each other, and one line for each thing in the way. Ranks are threads here."""

import dataclasses
import logging
import socket

import pytest

from scf_fast import distributed
from scf_fast.distributed import meeting as meeting_module
from scf_fast.distributed import network
from scf_fast.distributed.meeting import Meeting, Member, choose_interface, meet, spans
from scf_fast.errors import InputError


def test_ranks_meet_whoever_comes_first(place, meet_all):
    port = distributed.free_port()
    met = meet_all([place(rank, 3, port) for rank in (2, 1, 0)])
    assert [one.own.rank for one in met] == [2, 1, 0]
    assert met[0].members == met[2].members and [m.rank for m in met[0].members] == [0, 1, 2]
    assert [one.is_first_on_node for one in met] == [False, False, True] and met[0].num_nodes == 1
    assert {str(member) for member in met[0].members} == {f"rank {rank} on {socket.gethostname()}" for rank in range(3)}
    assert choose_interface(met[0]) == "lo"


def test_ranks_that_do_not_come_are_named_on_every_node(place, meet_all, monkeypatch, caplog):
    monkeypatch.setattr(meeting_module, "_SPEAK_SECONDS", 0.2)
    caplog.set_level(logging.WARNING)
    port = distributed.free_port()
    main, other = meet_all([place(0, 4, port), place(2, 4, port)], seconds=1)
    host = socket.gethostname()
    assert str(main) == str(other)
    assert f"ranks 1, 3 of 4 have not joined at MASTER_ADDR=127.0.0.1, port {port}, within 1 s" in str(main)
    assert f"here: 0, 2 on {host}; start the other nodes too" in str(main)
    assert f"waiting for ranks 1, 3 of 4; here: 0, 2 on {host}" in caplog.text


def test_rank_0_that_does_not_come_is_named(place, monkeypatch, caplog):
    monkeypatch.setattr(meeting_module, "_SPEAK_SECONDS", 0.2)
    with pytest.raises(
        InputError, match=r"rank 0 has not been reached from .* within 1 s \(Connection refused\); check"
    ):
        meet(place(1, 2, distributed.free_port()), 0.6)
    assert "waits for rank 0 at 127.0.0.1" in caplog.text
    with pytest.raises(InputError, match="the launcher of rank 0 has not been reached"):
        meet(place(0, 2, distributed.free_port(), has_agent=True), 0.1)


def test_an_address_that_does_not_resolve_is_one_line(place, monkeypatch):
    monkeypatch.setattr(network, "_RESOLVE_SECONDS", 0.0)
    wrong = dataclasses.replace(place(0, 2, 1234), master_address="no.such.host.invalid")
    with pytest.raises(InputError, match=r"MASTER_ADDR=no.such.host.invalid does not resolve on .*; give a name"):
        meet(wrong, 1)


def test_a_port_in_use_is_one_line(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"MASTER_PORT={port} is in use on .*give each launch its own"):
            meet(place(0, 2, port), 1)


def test_two_processes_of_one_rank_are_found(place, meet_all):
    port = distributed.free_port()
    found = meet_all([place(0, 3, port), place(1, 3, port), place(1, 3, port)], seconds=1)
    texts = [str(error) for error in found]
    assert sum("RANK=1 has joined already" in text for text in texts) == 1
    assert sum("rank 2 of 3 have not joined" in text for text in texts) == 2


def test_nodes_of_one_name_are_told_apart(place):
    """As containers are that all have the name of their image."""
    members = [Member(rank, 1, f"node{rank // 2}", "box", f"10.0.0.{rank // 2}") for rank in range(4)]
    told = meeting_module._told_apart(members)
    assert [member.host for member in told] == ["box (10.0.0.0)"] * 2 + ["box (10.0.0.1)"] * 2
    found = Meeting(place(2, 4, 1), told, None, "10.0.0.0", 1)
    assert found.is_first_on_node and [m.rank for m in found.neighbors] == [2, 3] and found.num_nodes == 2


def test_numbers_in_words():
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and spans([3]) == "3"
