import argparse
import os

import pytest
import torch

from scf_fast import inference, inference_arguments
from scf_fast.inference_arguments import add_inference_arguments, inference_options
from scf_fast.pipelines.sources.base import EncodedImages


@pytest.mark.parametrize("word, current", [("cuda:1", "cuda:1"), ("cuda", "cuda:0"), ("cpu", None), (None, None)])
def test_chosen_gpu_becomes_the_current_one(monkeypatch, word, current):
    """What goes to the current GPU unless told otherwise would else take memory on the first, and wait for it."""
    chosen, empty = [], torch.empty
    devices = {"cuda": "cuda:0"}  # as PyTorch completes it

    class OnGpu:
        def __init__(self, device):
            self.device = torch.device(devices.get(device, device))

    monkeypatch.setattr(
        torch, "empty", lambda *size, device=None, **rest: OnGpu(device) if device else empty(*size, **rest)
    )
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    parser = argparse.ArgumentParser()
    add_inference_arguments(parser)
    options = inference_options(parser.parse_args([] if word is None else ["--device", word]))
    assert chosen == ([] if current is None else [torch.device(current)])
    assert options.device == (None if word is None else torch.device(devices.get(word, word)))


def test_word_that_is_no_device_is_refused(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=inference_arguments.usable_device)
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "gpu"])
    assert "must be a device that PyTorch can use here, such as cpu or cuda:0, got 'gpu'" in capsys.readouterr().err


def test_workers_by_default_follow_the_cores(monkeypatch):
    seen = []

    class Loaded(Exception):
        pass

    def make_loader(*arguments, num_workers, **rest):
        seen.append(num_workers)
        raise Loaded

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr(inference, "make_loader", make_loader)
    parser = argparse.ArgumentParser()
    add_inference_arguments(parser)
    for words in ([], ["--num-workers", "3"]):
        decoding = inference_options(parser.parse_args(words)).decoding
        embedder = type("Embedder", (), {"normalization": "published", "device": torch.device("cpu")})()
        with pytest.raises(Loaded):
            next(inference.load_batches(embedder, EncodedImages([]), [], decoding))
    assert seen == [11, 3]
