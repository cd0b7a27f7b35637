"""Ranks that are threads of this process."""

import threading

import pytest

from scf_fast.distributed.meeting import meet
from scf_fast.distributed.place import Place
from scf_fast.errors import InputError


def _place(rank, world_size, port, **more):
    return Place("variables", rank, world_size, master_address="127.0.0.1", master_port=port, **more)


def _meet_all(places, seconds=10.0):
    """Returns what each rank has met, or the error that it has."""
    found = [None] * len(places)

    def run(number):
        try:
            found[number] = meet(places[number], seconds)
        except InputError as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(scope="session")
def place():
    """``place(rank, world_size, port, **more)``: a place on this machine."""
    return _place


@pytest.fixture(scope="session")
def meet_all():
    """``meet_all(places, seconds=10.0)``: what each rank has met, or the error that it has."""
    return _meet_all
