"""Class centers on one, two and three ranks, against each other and against a dense layer under torch.optim.SGD."""

import functools
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from scf_fast.config import BackboneConfig
from scf_fast.distributed import Runtime
from scf_fast.engine import class_centers as class_centers_module
from scf_fast.engine.class_centers import ClassCenters, rows_of
from scf_fast.engine.class_sampling import sampled_classes
from scf_fast.stages.backbone import BackboneStage
from scf_fast.weights.reading import read_weights

ONE_RANK = Runtime(0, 1, torch.device("cpu"))
STEPS, BATCH, CLASSES, WIDTH, CLIP = 12, 12, 11, 5, 0.5
SCENARIOS = {
    "plain": {},
    "unfused": {"fused_center_update": False},
    "accumulated": {"gradient_accumulation_steps": 2},
    "smoothed": {"label_smoothing": 0.1, "margin_gradient": "straight_through"},
    "sampled": {"sample_rate": 0.4},
    "sampled and accumulated": {"sample_rate": 0.4, "gradient_accumulation_steps": 2, "classes": 40},
    "fewer classes than ranks": {"classes": 2, "max_grad_clip": 0.05},
    "bf16 momentum": {"centers_state": "bf16"},
}


def make_config(**options):
    return BackboneConfig(
        **{
            "data": "-",
            "output_dir": "-",
            "z_dim": WIDTH,
            "batch_size": BATCH,
            "lr": 0.002,
            "scale": 8.0,
            "seed": 3,
            **options,
        }
    )


def images(step, classes, rank=0, world_size=1):
    """A rank's share of one step's images, here vectors, and labels."""
    generator = torch.Generator().manual_seed(step)
    x, labels = torch.randn(BATCH, 6, generator=generator), torch.randint(classes, (BATCH,), generator=generator)
    return tuple(t.chunk(world_size)[rank] for t in (x, labels))


def backbone():
    layer = torch.nn.Linear(6, WIDTH, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(1))
    return layer


def train(options, rank=0, world_size=1):
    """Losses and final class centers of a linear backbone, its gradients averaged over ranks as the engine does."""
    classes = options.get("classes", CLASSES)
    config = make_config(**{key: value for key, value in options.items() if key != "classes"})
    parts = config.gradient_accumulation_steps
    centers = ClassCenters(classes, WIDTH, config, Runtime(rank, world_size, torch.device("cpu")))
    layer, losses = backbone(), []
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    for step in range(STEPS):
        x, labels = images(step, classes, rank, world_size)
        total = 0.0
        for part_x, part_labels in zip(x.chunk(parts), labels.chunk(parts)):
            loss, _ = centers.loss(layer(part_x), part_labels)
            (loss / parts).backward()
            total += loss.item() / parts
        if world_size > 1:
            torch.distributed.all_reduce(layer.weight.grad)
            layer.weight.grad /= world_size
        optimizer.step()
        optimizer.zero_grad()
        centers.step()
        losses.append(total)
    return losses, centers


@functools.cache
def one_rank(name):
    losses, centers = train(SCENARIOS[name])
    return losses, centers.weight


def with_prelu():
    return torch.nn.Sequential(backbone(), torch.nn.PReLU())  # 30 weights and 1: no ZeRO partition divides them evenly


def train_without_deepspeed():
    """Returns what `train_under_deepspeed` must give: one rank, PyTorch's own clipping of the backbone's gradient."""
    config, module, losses = make_config(), with_prelu(), []
    centers = ClassCenters(CLASSES, WIDTH, config, ONE_RANK)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    for step in range(STEPS):
        x, labels = images(step, CLASSES)
        loss, _ = centers.loss(module(x), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_under_deepspeed(folder, zero_stage, first, last, rank, world_size):
    """Losses of steps first to last - 1, from the checkpoint in ``folder`` on where there is one, and a checkpoint at
    the end.
    """
    from scf_fast.engine.engine import Engine
    from scf_fast.run import checkpoints as run_checkpoints
    from scf_fast.run.run_state import RunState

    config = make_config(zero_stage=zero_stage, max_grad_norm=CLIP)
    runtime = Runtime(rank, world_size, torch.device("cpu"))
    module = with_prelu()
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    newest = run_checkpoints.newest_intact(folder)
    if newest:
        run_checkpoints.load_weights(module, newest)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    engine = Engine(module, optimizer, config, runtime, "fp32")
    centers = ClassCenters(CLASSES, WIDTH, config, runtime)
    if newest:
        assert newest.state.step == first
        run_checkpoints.load(engine, newest, centers)
    checkpoints = run_checkpoints.Checkpoints(folder, runtime, 2, False, False)
    checkpoints.resume_from(newest and newest.tag)
    losses = []
    for step in range(first, last):
        x, labels = images(step, CLASSES, rank, world_size)
        loss, _ = centers.loss(engine(x), labels)
        engine.backward(loss)
        centers.step(engine.step())
        losses.append(loss.item())
    state = RunState(last, {}, CLASSES, 0, None, [0.0, 0.0], world_size, engine.zero_stage)
    checkpoints.save(engine, state, centers)
    checkpoints.close()
    engine.close()
    return losses


def skipped_steps(runtime):
    """[backbone changed, class centers changed] in steps under fp16 whose loss scale is too large at first."""
    from scf_fast.engine.engine import Engine

    config = make_config(zero_stage=0, precision="fp16", max_grad_norm=1.0)
    module = backbone()
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=config.lr), config, runtime, "fp16")
    engine.loss_scaler.load_state_dict({"scale": 2.0**18, "good_steps": 0})
    centers, changes = ClassCenters(CLASSES, WIDTH, config, runtime, "fp16"), []
    for step in range(4):
        before = module.weight.detach().clone(), centers.weight.clone()
        x, labels = images(step, CLASSES, runtime.rank, runtime.world_size)
        loss, _ = centers.loss(engine(x).float(), labels)
        engine.backward(loss)
        centers.step(engine.step())
        changes.append([not torch.equal(*pair) for pair in zip(before, (module.weight, centers.weight))])
    engine.close()
    return changes


def work(folder):
    """Runs on each rank of a launch; rank 0 writes down the results."""
    from scf_fast import distributed

    runtime = distributed.start()
    rank, world_size = runtime.rank, runtime.world_size
    results = {}
    for name, options in SCENARIOS.items():
        results[name], centers = train(options, rank, world_size)
        centers.export(folder / f"{name} {world_size}.pth", {"epoch": 3})
    for stage, then in ((1, 0), (3, 2), (0, 3)):  # the second ZeRO stage is that of the launch that resumes
        if world_size == 3:
            results[f"zero {stage}"] = train_under_deepspeed(
                folder / f"zero{stage}", stage, 0, STEPS // 2, rank, world_size
            )
            results[f"zero {stage} on"] = train_under_deepspeed(
                folder / f"on{stage}", stage, 0, STEPS, rank, world_size
            )
        else:
            results[f"zero {stage}"] = train_under_deepspeed(
                folder / f"zero{stage}", then, STEPS // 2, STEPS, rank, world_size
            )
    if world_size == 2:
        results["fp16"] = skipped_steps(runtime)
    if rank == 0:
        (folder / f"{world_size}.json").write_text(json.dumps(results))
    distributed.finish()
    distributed.leave(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, run_ranks):
    """Folder with the results of three ranks and then of two."""
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in (3, 2):
        run_ranks(world_size, __file__, folder)
    return folder


def results(folder, world_size):
    return json.loads((folder / f"{world_size}.json").read_text())


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", SCENARIOS)
def test_any_number_of_ranks_trains_the_same(name, world_size, ranks):
    if (
        name == "sampled and accumulated"
    ):  # ranks cut micro-batches differently: other classes are a micro-batch's own, so other sets are drawn
        assert results(ranks, world_size)[name] == pytest.approx(one_rank(name)[0], rel=0.2)
        return
    losses, weight = one_rank(name)
    if name == "bf16 momentum":  # what is rounded up depends on how the rows are shared out
        assert results(ranks, world_size)[name] == pytest.approx(losses, rel=2e-3)
        return
    assert results(ranks, world_size)[name] == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(
        read_weights(ranks / f"{name} {world_size}.pth").require_class_centers(), weight, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_three_ranks_stop_and_two_go_on(zero_stage, ranks):
    """Under another ZeRO stage, too: the losses are those of three ranks that never stopped."""
    whole = results(ranks, 3)[f"zero {zero_stage} on"]
    assert whole == pytest.approx(train_without_deepspeed(), rel=1e-5)
    assert results(ranks, 3)[f"zero {zero_stage}"] == whole[: STEPS // 2]
    assert results(ranks, 2)[f"zero {zero_stage}"] == pytest.approx(whole[STEPS // 2 :], rel=1e-5)


def test_class_centers_skip_the_steps_that_the_loss_scale_makes_the_engine_skip(ranks):
    changes = results(ranks, 2)["fp16"]
    assert changes[0] == [False, False] and changes[-1] == [True, True]
    assert all(backbone_changed == centers_changed for backbone_changed, centers_changed in changes)


def dense_losses(margin, label_smoothing, clip):
    """The same training with all logits, CosFace's margin, autograd and torch.optim.SGD."""
    config = make_config()
    layer = backbone()
    weight = ClassCenters(CLASSES, WIDTH, config, ONE_RANK).weight.clone().requires_grad_()
    optimizer = torch.optim.SGD(
        [*layer.parameters(), weight], lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    losses = []
    for step in range(STEPS):
        x, labels = images(step, CLASSES)
        cos = F.normalize(layer(x)) @ F.normalize(weight).t()
        loss = F.cross_entropy(
            config.scale * (cos - margin * F.one_hot(labels, CLASSES)), labels, label_smoothing=label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        if clip:
            weight.grad.clamp_(-clip, clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused_center_update": False},
        {"gradient_accumulation_steps": 3},
        {"label_smoothing": 0.2},
        {"max_grad_clip": 0.02},
    ],
)
def test_one_rank_trains_as_a_dense_layer(options):
    losses, _ = train({"margins": (1.0, 0.0, 0.3), **options})
    assert losses == pytest.approx(
        dense_losses(0.3, options.get("label_smoothing", 0), options.get("max_grad_clip", 0)), rel=1e-5
    )


def test_fused_update_is_the_same_to_the_bit():
    assert torch.equal(one_rank("plain")[1], one_rank("unfused")[1])


@pytest.mark.parametrize("num_classes, world_size", [(10, 3), (2, 5), (1, 1), (7, 7), (1001, 8)])
def test_rows_of_all_ranks_are_all_rows(num_classes, world_size):
    bounds = [rows_of(rank, world_size, num_classes) for rank in range(world_size)]
    assert (
        bounds[0][0] == 0 and bounds[-1][1] == num_classes and all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    )
    sizes = [stop - start for start, stop in bounds]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_class_centers_start_the_same_at_any_world_size():
    config = make_config()
    whole = ClassCenters(9001, 4, config, ONE_RANK).weight
    parts = [ClassCenters(9001, 4, config, Runtime(rank, 3, torch.device("cpu"))).weight for rank in range(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.std().item() == pytest.approx(0.01, rel=0.02) and not torch.equal(whole[:4096], whole[4096:8192])


def test_sampling_keeps_the_own_classes_and_leaves_the_others_alone():
    config = make_config(sample_rate=0.2, scale=8.0, margins=(1.0, 0.0, 0.3))
    centers = ClassCenters(50, WIDTH, config, ONE_RANK)
    centers.momentum.fill_(0.5)
    before = centers.weight.clone()
    x, labels = torch.randn(6, WIDTH, requires_grad=True), torch.tensor([3, 17, 3, 42, 8, 29])
    active = sampled_classes(0, 50, 0.2, 3, 0, before.device)
    active[labels] = True
    cos = F.normalize(x) @ F.normalize(before).t() - 0.3 * F.one_hot(labels, 50)
    expected = F.cross_entropy((8.0 * cos).masked_fill(~active, -torch.inf), labels)
    loss, _ = centers.loss(x, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal((centers.weight != before).any(1), active) and torch.equal(
        (centers.momentum != 0.5).any(1), active
    )


def test_gradient_of_features_is_on_its_way_before_the_last_class_centers_change(monkeypatch):
    centers = ClassCenters(20_000, WIDTH, make_config(), ONE_RANK)  # three blocks
    before, unchanged = centers.weight.clone(), []

    def start(gradient, world_size):
        unchanged.append((centers.weight == before).all(1))
        return lambda: unchanged.append((centers.weight == before).all(1)) or gradient

    monkeypatch.setattr(class_centers_module, "_start_reduce_scatter", start)
    x = torch.randn(8, WIDTH, requires_grad=True)
    centers.loss(x, torch.arange(8))[0].backward()
    at_start, at_wait = unchanged
    assert at_start[-100:].all() and not at_start.all() and not at_wait.any() and x.grad.any()


def test_stochastic_rounding_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    between = torch.tensor([1 + 1 / 512, -3 - 1 / 1024, 1e-20, 5e20]).repeat_interleave(20_000).view(4, -1)
    rounded = class_centers_module._stochastic_bfloat16(between.clone(), generator)
    for exact, values in zip(between[:, 0], rounded):
        neighbors = values.unique().double()
        assert len(neighbors) == 2 and neighbors[0] <= exact <= neighbors[1]
        gap = neighbors[1] - neighbors[0]
        assert abs(values.double().mean() - exact) < 5 * 0.5 * gap / len(values) ** 0.5
    exact = torch.tensor([0.0, -1.5, torch.inf, 2.0**-126])
    assert torch.equal(class_centers_module._stochastic_bfloat16(exact.clone(), generator).float(), exact)


@pytest.mark.parametrize("options", [{}, {"fused_center_update": False}, {"sample_rate": 0.5}])
def test_bf16_momentum_trains_as_float32_and_goes_on_to_the_bit(options, tmp_path):
    expected, _ = train(options)
    losses, centers = train({"centers_state": "bf16", **options})
    assert centers.momentum.dtype == torch.bfloat16 and centers.weight.dtype == torch.float32
    assert losses != expected and losses == pytest.approx(expected, rel=1e-3)
    torch.save(centers.state(), tmp_path / centers.file_name(0))
    loaded = ClassCenters(CLASSES, WIDTH, centers.config, ONE_RANK)
    loaded.load(tmp_path, written_by=1)
    for one in (centers, loaded):
        x, labels = images(STEPS, CLASSES)
        one.loss(backbone()(x), labels)[0].backward()
        one.step()
    assert torch.equal(centers.weight, loaded.weight) and torch.equal(centers.momentum, loaded.momentum)


def test_an_update_in_pieces_is_the_same(monkeypatch):
    monkeypatch.setattr(class_centers_module, "_UPDATE_ROWS", 4)
    for name in ("plain", "sampled", "unfused"):
        assert torch.equal(train(SCENARIOS[name])[1].weight, one_rank(name)[1])


def test_threshold_reaches_the_backward_pass(monkeypatch):
    seen, honest = [], class_centers_module.margin_softmax_gradients
    monkeypatch.setattr(
        class_centers_module,
        "margin_softmax_gradients",
        lambda *a, skip_below, **k: seen.append(skip_below) or honest(*a, **k),
    )
    for options in ({}, {"skip_below": 2.0**-12}):
        centers = ClassCenters(CLASSES, WIDTH, make_config(**options), ONE_RANK)
        centers.loss(torch.randn(2, WIDTH, requires_grad=True), torch.tensor([0, 1]))[0].backward()
    assert seen == [0.0, 2.0**-12]


def test_a_skipped_step_changes_nothing():
    centers = ClassCenters(CLASSES, WIDTH, make_config(fused_center_update=False), ONE_RANK)
    before = centers.weight.clone()
    x, labels = torch.randn(4, WIDTH, requires_grad=True), torch.tensor([0, 1, 2, 3])
    centers.loss(x, labels)[0].backward()
    centers.step(applied=False)
    assert torch.equal(centers.weight, before)
    centers.loss(x, labels)[0].backward()
    centers.step()
    once = centers.weight.clone()
    other = ClassCenters(CLASSES, WIDTH, make_config(), ONE_RANK)
    other.loss(x, labels)[0].backward()
    assert torch.equal(once, other.weight) and not torch.equal(once, before)


def test_loss_scale_does_not_reach_the_class_centers():
    grads = []
    for factor in (1.0, 2.0**16):
        centers = ClassCenters(CLASSES, WIDTH, make_config(fused_center_update=False), ONE_RANK)
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (factor * centers.loss(x, torch.tensor([0, 1, 2, 3]))[0]).backward()
        centers.step()
        grads.append((centers.weight, x.grad / factor))
    assert all(map(torch.equal, *grads))


def test_checkpoint_and_export_hold_every_row(tmp_path):
    centers = ClassCenters(CLASSES, WIDTH, make_config(), ONE_RANK)
    centers.momentum.normal_()
    torch.save(centers.state(), tmp_path / centers.file_name(0))
    loaded = ClassCenters(CLASSES, WIDTH, make_config(seed=4), ONE_RANK)
    loaded.load(tmp_path, written_by=1)
    assert torch.equal(loaded.weight, centers.weight) and torch.equal(loaded.momentum, centers.momentum)
    part = ClassCenters(CLASSES, WIDTH, make_config(seed=4), Runtime(1, 2, torch.device("cpu")))
    part.load(tmp_path, written_by=1)
    assert torch.equal(part.momentum, centers.momentum[6:])
    with pytest.raises(ValueError, match=r"class_centers_rank1\.pt: cannot be read"):
        loaded.load(tmp_path, written_by=2)
    with pytest.raises(ValueError, match="11 identities, width 5, but this run has 12"):
        ClassCenters(12, WIDTH, make_config(), ONE_RANK).load(tmp_path, written_by=1)
    centers.export(tmp_path / "fc.pth", {"epoch": 3})
    assert (
        torch.equal(read_weights(tmp_path / "fc.pth").require_class_centers(), centers.weight)
        and torch.load(tmp_path / "fc.pth")["epoch"] == 3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class_centers_rank0.pt", "fc.pth"]


@pytest.mark.parametrize("label", [CLASSES, -2])
def test_label_out_of_range_gives_nan(label):
    centers = ClassCenters(CLASSES, WIDTH, make_config(), ONE_RANK)
    assert centers.loss(torch.randn(2, WIDTH), torch.tensor([0, label]))[0].isnan()
    assert centers.loss(torch.randn(2, WIDTH), torch.tensor([0, -1]))[0].isfinite()


def test_embeddings_that_are_not_numbers_give_nan():
    centers = ClassCenters(CLASSES, WIDTH, make_config(), ONE_RANK)
    features = torch.randn(2, WIDTH)
    features[1, 3] = torch.nan
    assert centers.loss(features, torch.tensor([0, 1]))[0].isnan()


@pytest.mark.parametrize("margins", [(1.0, 3.2, 0.0), (0.9, 0.5, 0.0), (1.0, -0.1, 0.0)])
def test_margins_that_do_not_fall_with_the_angle_are_refused_before_training(margins):
    with pytest.raises(ValueError, match="so that the target falls with the angle"):
        BackboneStage(make_config(margins=margins), SimpleNamespace(num_classes=CLASSES))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"skip_below": 1.0}, r"--skip_below must be in \[0, 1\)"),
        ({"skip_below": -0.1}, r"--skip_below must be in \[0, 1\)"),
        ({"centers_state": "fp16"}, "--centers_state must be one of fp32, bf16"),
        ({"sample_rate": 0.0}, r"--sample_rate must be in \(0, 1\]"),
        ({"sample_rate": 1.5}, r"--sample_rate must be in \(0, 1\]"),
        ({"label_smoothing": 1.0}, r"--label_smoothing must be in \[0, 1\)"),
        ({"fused_center_update": True, "gradient_accumulation_steps": 2}, "--fused_center_update must be off"),
        ({"fused_center_update": True, "precision": "fp16", "zero_stage": 0}, "--fused_center_update must be off"),
    ],
)
def test_bad_flags(options, match):
    with pytest.raises(ValueError, match=match):
        make_config(**options)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
