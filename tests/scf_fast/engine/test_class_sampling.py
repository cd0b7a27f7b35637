"""Which classes take part in a batch, and what it costs the host to know."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scf_fast.config import BackboneConfig
from scf_fast.distributed import Runtime
from scf_fast.engine.class_centers import ClassCenters
from scf_fast.engine.class_sampling import ClassSelection, sampled_classes
from scf_fast.engine.host_copy import HostCopy
from scf_fast.pipelines.loading.base import Batch
from scf_fast.stages.backbone import BackboneStage

CPU = torch.device("cpu")


def test_samples_depend_on_seed_draw_and_class_alone():
    drawn = torch.stack([sampled_classes(0, 20_000, 0.3, 7, draw, CPU) for draw in range(40)])
    assert torch.equal(drawn[5, 1234:9000], sampled_classes(1234, 9000, 0.3, 7, 5, CPU))
    assert not torch.equal(drawn[0], sampled_classes(0, 20_000, 0.3, 8, 0, CPU))
    sigma = (0.3 * 0.7 / 20_000) ** 0.5
    assert ((drawn.float().mean(1) - 0.3).abs() < 5 * sigma).all()
    assert ((drawn.float().mean(0) - 0.3).abs() < 6 * (0.3 * 0.7 / 40) ** 0.5).all()  # no class is favored over draws
    both = (drawn[:-1] & drawn[1:]).float().mean(1)  # nor does one draw tell of the next
    assert ((both - 0.09).abs() < 6 * sigma).all()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("start", "stop"), [(0, 40), (17, 29), (5, 6), (11, 11)])
def test_rows_are_the_drawn_classes_and_the_labels_own(start, stop, rate):
    """Also where this rank has no class, none takes part, or all do."""
    labels = torch.tensor([3, 17, 17, 28, 29, -1, 40, 5])
    drawn = sampled_classes(start, stop, rate, 7, 2, CPU).tolist()
    expected = [i for i in range(start, stop) if drawn[i - start] or i in labels.tolist()]
    selection = ClassSelection.of_sample(labels, start, stop, rate, 7, 2)
    assert (selection.rows() + start).tolist() == expected
    position = [expected.index(label) if label in expected else -1 for label in labels.tolist()]
    assert selection.position.tolist() == position
    whole = ClassSelection.of_all(labels, start, stop)
    assert whole.rows() is None
    assert whole.position.tolist() == [i - start if start <= i < stop else -1 for i in labels.tolist()]


class Waits(TorchDispatchMode):
    """Names the operations for whose result, or its shape, the host waits on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or name in ("nonzero", "masked_select", "_local_scalar_dense", "unique_dim", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_host_waits_for_nothing_once_the_backbone_runs(smoothing):
    """From the launch of the backbone to the loss; a wait there leaves the GPU idle between the two."""
    config = BackboneConfig(
        data="-", output_dir="-", z_dim=5, batch_size=6, sample_rate=0.3, label_smoothing=smoothing, precision="fp32"
    )
    stage, waits, calls = BackboneStage(config, SimpleNamespace(num_classes=40)), Waits(), []
    stage.centers = ClassCenters(40, 5, config, Runtime(0, 1, CPU))

    def engine(images):
        calls.append(list(waits.found))
        waits.found.clear()
        return images.flatten(1), None

    engine.learning_rate = 0.1
    images, labels = torch.randn(6, 5, requires_grad=True), torch.arange(6)
    with waits:
        result = stage.loss(engine, Batch(images, labels, labels))
    assert (calls, waits.found) == ([[]], [])
    result.loss.backward()
    assert result.loss.isfinite() and images.grad.any()


def test_a_host_copy_has_the_values_of_its_time():
    values = torch.tensor([1, 2])
    copy = HostCopy(values)
    values.zero_()
    assert copy.tolist() == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_host_copy_waits_for_nothing_that_comes_after_it():
    values = torch.tensor([1, 2], device="cuda")
    HostCopy(values).tolist()  # the first pinned memory takes its time
    torch.cuda.synchronize()
    copy = HostCopy(values)
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    values.zero_()
    began = time.perf_counter()
    assert copy.tolist() == [1, 2]
    assert time.perf_counter() - began < 0.2
    torch.cuda.synchronize()
