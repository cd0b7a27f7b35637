"""The engine on one and two ranks: every ZeRO stage, with and without offload, in float32 and float16, against plain
PyTorch.
"""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scf_fast.config import ConfidenceConfig
from scf_fast.distributed import Runtime
from scf_fast.engine.deepspeed_config import deepspeed_config, load_deepspeed_config, resolve_precision
from scf_fast.engine.deepspeed_internals import DeepSpeedInternals
from scf_fast.engine.loss_scale import LossScaler
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
from scf_fast.errors import InputError
from scf_fast.kernels import scf_loss
from scf_fast.networks.confidence import MLPConfidence

ROOT = Path(__file__).resolve().parents[3]
STEPS, BATCH, CHANNELS, MAP, CLASSES, WIDTH = 10, 24, 4, 3, 7, 16
CASES = [
    {"zero_stage": stage, "offload_optimizer": offload}
    for stage in range(4)
    for offload in ("none", "cpu")[: 1 + (stage > 0)]
]
CASES += [{"zero_stage": stage, "gradient_accumulation_steps": 2, "max_grad_norm": 1e-3} for stage in (0, 2)]
CASES += [{"zero_stage": stage, "precision": "fp16"} for stage in range(4)]
GRADIENTS = (math.inf, 3.0, math.nan, 0.125)  # the first step's is not finite: the optimizer has no state yet
NOT_FINITE = [
    (
        rule,
        {"zero_stage": stage, "precision": precision, "max_grad_norm": 0.0, "max_grad_clip": 0.25, "weight_decay": 0.0},
    )
    for stage in range(4)
    for rule, precision in (("sgd", "fp16"), ("adam", "fp16"), ("sgd", "fp32"), ("adam", "bf16"))
]
# Each value is finite, the sum of squares is not in float32.
OVERFLOWING = [
    {**options, "max_grad_norm": norm, "weight_decay": 0.0, "lr": 1.0} for options in CASES[:7] for norm in (0.0, 1.0)
]
TOO_LARGE = 2.0**18  # a loss scale whose gradients no float16 holds


def make_config(**options):
    return ConfidenceConfig(
        **{
            "data": "-",
            "output_dir": "-",
            "saved_bkb": "-",
            "saved_fc": "-",
            "batch_size": BATCH,
            "lr": 1e-2,
            "max_grad_norm": 1.0,
            "precision": "fp32",
            **options,
        }
    )


def make_net():
    torch.manual_seed(0)
    return MLPConfidence(CHANNELS, MAP)


def make_batch(step):
    """(features, convf, class centers, labels) of a whole step."""
    generator = torch.Generator().manual_seed(step)
    centers = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    features = centers[labels] + torch.randn(BATCH, WIDTH, generator=generator)
    return features, torch.randn(BATCH, CHANNELS, MAP, MAP, generator=generator), centers, labels


def train(options, runtime):
    """Losses of a run, averaged over ranks, and the loss scales if there are any."""
    from scf_fast.distributed import average_over_ranks
    from scf_fast.engine.engine import Engine

    config, net = make_config(**options), make_net()
    engine = Engine(
        net,
        build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device),
        config,
        runtime,
        config.precision,
    )
    if engine.loss_scaler:
        engine.loss_scaler.load_state_dict({"scale": TOO_LARGE, "good_steps": 1999})
    losses, scales, parts = [], [], runtime.world_size * config.gradient_accumulation_steps
    for step in range(STEPS):
        features, convf, centers, labels = make_batch(step)
        total = torch.zeros(())
        for part in range(
            runtime.rank * config.gradient_accumulation_steps, (runtime.rank + 1) * config.gradient_accumulation_steps
        ):
            rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
            loss = scf_loss(features[rows], engine(convf[rows]), centers, labels[rows], radius=1.0)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / config.gradient_accumulation_steps
        losses.append(average_over_ranks(total).item())
        if engine.loss_scaler:
            scales.append(engine.loss_scaler.scale)
    engine.close()
    return losses, scales


class Steep(torch.autograd.Function):
    """x, with a gradient of ``factor`` in place of 1."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def train_on_gradients(rule, options, runtime):
    """The weight after steps on GRADIENTS, and which of them were applied; the losses are finite."""
    from scf_fast.engine.engine import Engine

    config, net = make_config(**options), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    engine = Engine(
        net,
        build_optimizer(OptimizerRule(rule), net.parameters(), config, runtime.device),
        config,
        runtime,
        config.precision,
    )
    if engine.loss_scaler:
        engine.loss_scaler.load_state_dict({"scale": 2.0**10, "good_steps": 0})  # under which 3 is no overflow
    applied = []
    for gradient in GRADIENTS:
        engine.backward(Steep.apply(engine(torch.ones(1, 1)).float(), gradient).sum())
        applied.append(engine.step())
    weight = engine.full_state_dict()["weight"].item()
    engine.close()
    return weight, applied


def train_on_large_gradients(options, runtime):
    """Two weights after a step of SGD on gradients of 3e19."""
    from scf_fast.engine.engine import Engine

    config, net = make_config(**options), torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    optimizer = build_optimizer(OptimizerRule.SGD, net.parameters(), config, runtime.device)
    engine = Engine(net, optimizer, config, runtime, config.precision)
    engine.backward(Steep.apply(engine(torch.ones(1, 2)).float(), 3e19).sum())
    assert engine.step()
    weights = engine.full_state_dict()["weight"].flatten().tolist()
    engine.close()
    return weights


def work(folder):
    """Runs on each rank of a launch; rank 0 writes down the results."""
    from scf_fast import distributed

    runtime = distributed.start()
    jobs = [(train, (options,)) for options in CASES] + [(train_on_gradients, case) for case in NOT_FINITE]
    jobs += [(train_on_large_gradients, (options,)) for options in OVERFLOWING]
    results = [None] * len(jobs)
    # fp16 last: DeepSpeed remembers it, and would give every later engine of the process a loss scale.
    for number in sorted(range(len(jobs)), key=lambda number: jobs[number][1][-1].get("precision") == "fp16"):
        function, arguments = jobs[number]
        results[number] = function(*arguments, runtime)
    if runtime.is_main:
        (folder / f"{runtime.world_size}.json").write_text(json.dumps(results))
    distributed.finish()
    distributed.leave(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks):
    """Results of each case, on one rank and on two."""
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in (1, 2):
        run_ranks(world_size, __file__, folder)
    return {world_size: json.loads((folder / f"{world_size}.json").read_text()) for world_size in (1, 2)}


def plain_losses(max_grad_norm=1.0, skipped=()):
    """The same run without an engine, and without the optimizer in some steps."""
    config, net, losses = make_config(), make_net(), []
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    for step in range(STEPS):
        features, convf, centers, labels = make_batch(step)
        loss = scf_loss(features, net(convf), centers, labels, radius=1.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), max_grad_norm)
        if step not in skipped:
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(map(str, options.values())) for options in CASES])
def test_every_zero_stage_trains_what_one_process_does(case, world_size, results):
    options, (losses, scales) = CASES[case], results[world_size][case]
    if options.get("precision") == "fp16":
        skipped = [
            step for step, (before, after) in enumerate(zip([TOO_LARGE, *scales], scales)) if after == before / 2
        ]
        assert 0 in skipped and len(skipped) < STEPS - 2
        assert losses == pytest.approx(plain_losses(skipped=skipped), rel=1e-3, abs=5e-4)
    else:
        expected = plain_losses(options.get("max_grad_norm", 1.0))
        assert expected[-1] < 0.7 * expected[0]
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", range(len(OVERFLOWING)))
def test_gradients_whose_squares_overflow_are_no_reason_to_skip(case, world_size, results):
    options, weights = OVERFLOWING[case], results[world_size][len(CASES) + len(NOT_FINITE) + case]
    expected = 1 - math.sqrt(0.5) if options["max_grad_norm"] else -3e19
    assert weights == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "case",
    range(len(NOT_FINITE)),
    ids=[f"{rule} {options['precision']} {options['zero_stage']}" for rule, options in NOT_FINITE],
)
def test_a_gradient_that_is_not_finite_changes_nothing(case, world_size, results):
    """And --max_grad_clip clips the others without the loss scale."""
    rule, options = NOT_FINITE[case]
    weight, applied = results[world_size][len(CASES) + case]
    assert applied == [False, True, False, True]
    plain, config = torch.nn.Parameter(torch.ones(1, 1)), make_config(**options)
    optimizer = (
        torch.optim.SGD([plain], config.lr, momentum=0.9) if rule == "sgd" else torch.optim.Adam([plain], config.lr)
    )
    for gradient in (0.25, 0.125):
        plain.grad = torch.full_like(plain, gradient)
        optimizer.step()
    assert weight == pytest.approx(plain.item(), rel=1e-6)


def test_loss_scale_follows_torchs_own_rule():
    """On the same history of overflows as a torch.amp.GradScaler."""
    told, ours, theirs = [], LossScaler(), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    ours.on_change(told.append)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for step in range(4100):
        overflow = step in (3, 4, 2500)
        theirs.scale(weight.sum() * (float("inf") if overflow else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(overflow)
        assert told[-1] == ours.scale == theirs.get_scale()
    assert ours.scale == 2.0**14
    again = LossScaler()
    again.load_state_dict(ours.state_dict())
    assert (again.scale, again.good_steps) == (ours.scale, ours.good_steps)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such switch")
def test_freed_memory_is_not_mapped_in_again():
    """By page faults of a process that takes and frees 40 MB again and again."""
    code = """if True:
        import resource, sys, torch
        from scf_fast.engine.engine import keep_freed_memory
        if sys.argv[1] == "keep":
            keep_freed_memory()
        for turn in range(32):
            if turn == 8:  # the heap has grown
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(10_000_000)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    keep, give = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("keep", "give")
    )
    assert keep < give / 3


def test_muon_is_imported_without_the_compiler(monkeypatch):
    name = "deepspeed.runtime.zero.muon.original_muon"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    DeepSpeedInternals.leave_out_muon_compilation()
    assert not hasattr(sys.modules[name].zeropower_via_newtonschulz5, "_torchdynamo_orig_callable")
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"


def test_deepspeed_that_takes_steps_that_are_not_finite_is_refused(monkeypatch):
    from scf_fast.engine.engine import Engine

    monkeypatch.setattr("deepspeed.__version__", "0.19.7")
    with pytest.raises(ValueError, match=r"0\.19\.8 or newer is needed, this is 0\.19\.7"):
        Engine(make_net(), None, make_config(), Runtime(0, 1, torch.device("cpu")), "fp32")


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"train_batch_size": 80}, "'train_batch_size' is set by --batch_size"),
        ({"bf16": {"enabled": True}}, "'bf16' is set by --precision"),
        ({"zero_optimization": 3}, "must be JSON objects"),
        ({"zero_optimization": {"offload_optimizer": True}}, "must be JSON objects"),
        ({"zero_optimization": {"stage": 3}}, "--zero_stage sets it"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "--offload_optimizer sets it"),
    ],
)
def test_what_our_flags_say_is_no_business_of_a_deepspeed_file(content, expected, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=expected):
        load_deepspeed_config(tmp_path / "ds.json")


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"gradient_clipping": "x"}', "'gradient_clipping' must be a number of at least 0, got 'x'"),
        ('{"gradient_clipping": NaN}', "'gradient_clipping' must be finite, got nan"),
        ('{"gradient_clipping": -1}', "'gradient_clipping' must be a number of at least 0, got -1"),
        ('{"steps_per_print": true}', "'steps_per_print' must be a number of at least 1, got True"),
        (
            '{"zero_optimization": {"reduce_bucket_size": 1e999}}',
            "'zero_optimization.reduce_bucket_size' must be finite",
        ),
        (
            '{"zero_optimization": {"reduce_bucket_size": -1}}',
            "_bucket_size: Input should be greater than 0, got -1",
        ),
        ('{"zero_optimization": {"sub_group_size": "x"}}', "sub_group_size: Input should be a valid integer.*got 'x'"),
        ('{"zero_optimization": {"reduce_buckets": 5}}', "reduce_buckets: Extra inputs are not permitted"),
        ('{"prescale_gradients": "no"}', "'prescale_gradients' must be true or false, got 'no'"),
        ('{"flops_profiler": [1]}', "DeepSpeed refuses it: 'list' object"),
        ('{"tensorboard": {"enabled": "perhaps"}}', "tensorboard.enabled: .*valid boolean.*got 'perhaps'"),
        pytest.param('{"timers": ' + "[" * 100_000, "nested too deep", id="nested"),
    ],
)
def test_values_that_deepspeed_cannot_use_are_refused_before_the_run(content, expected, tmp_path):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(InputError, match=expected) as raised:
        load_deepspeed_config(tmp_path / "ds.json")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_offload_is_passed_on_and_needs_zero():
    generated = deepspeed_config(make_config(offload_optimizer="cpu"), Runtime(0, 1, torch.device("cpu")), "fp32")
    assert (
        generated["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        and not generated["zero_force_ds_cpu_optimizer"]
    )
    with pytest.raises(ValueError, match="--offload_optimizer must be none with --zero_stage 0"):
        make_config(offload_optimizer="cpu", zero_stage=0)


if __name__ == "__main__":
    work(Path(sys.argv[1]))


@pytest.mark.parametrize("capability, expected", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_emulated_bf16_is_not_taken(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert resolve_precision(make_config(precision="auto"), torch.device("cuda")) == expected
    if expected == "bf16":
        assert resolve_precision(make_config(precision="bf16"), torch.device("cuda")) == "bf16"
    else:
        with pytest.raises(
            ValueError, match=r"Tesla T4 with 7\.5, which would emulate .* take --precision fp16 or fp32"
        ):
            resolve_precision(make_config(precision="bf16"), torch.device("cuda"))
    assert resolve_precision(make_config(precision="fp16"), torch.device("cuda")) == "fp16"
    assert resolve_precision(make_config(precision="bf16"), torch.device("cpu")) == "bf16"
