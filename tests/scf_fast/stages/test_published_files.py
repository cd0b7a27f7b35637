import json
import math
import sys
import textwrap

import numpy as np
import pytest
import scipy.special
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from scf_fast import SCF, KLDiracVMF, SCFLoss
from scf_fast.command_line import parse
from scf_fast.distributed import launcher
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.stages.published_files import flag_notes

SCALARS = {
    "kappa",
    "total_loss",
    "neg_kappa_times_cos_theta",
    "neg_dim_scalar_times_log_kappa",
    "log_iv_kappa",
}  # of the published TensorBoard files
HPARAMS = """
    batch_size convf_dim cuda dataroot dataset epochs eval_batch_size finetune_bkb gamma gpu_ids lr
    lr_scheduler max_grad_clip max_grad_norm num_workers output_dir radius saved_bkb saved_fc seed step_size
    tensorboard z_dim
""".split()


class ScaledBessel(torch.autograd.Function):
    """I_v(z) exp(-z) by scipy, rounded to float32, with the derivative I_(v-1) - I_v (v + z)/z of the published
    code.
    """

    @staticmethod
    def forward(ctx, v, z):
        ctx.v = v
        ctx.save_for_backward(z)
        return torch.from_numpy(scipy.special.ive(v, z.detach().double().numpy())).to(z.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        return None, gradient * (ScaledBessel.apply(ctx.v - 1, z) - ScaledBessel.apply(ctx.v, z) * (ctx.v + z) / z)


def published_loss(mu, kappa, wc, d, r):
    """The published algorithm from its formula."""
    l1 = -kappa * (mu * wc).sum(dim=1, keepdim=True) / r
    l2 = -(d / 2 - 1) * torch.log(1e-6 + kappa)
    l3 = torch.log(1e-6 + ScaledBessel.apply(d / 2 - 1, kappa)) + kappa
    return l1 + l2 + l3 + d / 2 * math.log(2 * math.pi) + d * math.log(r), l1, l2, l3


class UncertaintyNet(nn.Module):
    """The published confidence net."""

    def __init__(self, convf_dim):
        super().__init__()
        self._log_kappa = nn.Sequential(
            nn.Linear(convf_dim, convf_dim // 2),
            nn.ReLU(),
            nn.Linear(convf_dim // 2, convf_dim // 4),
            nn.ReLU(),
            nn.Linear(convf_dim // 4, 1),
        )

    def forward(self, convf):
        return torch.log(1e-6 + torch.exp(self._log_kappa(convf)))


def case(d, kappas, r=64.0):
    generator = torch.Generator().manual_seed(0)
    mu = nn.functional.normalize(torch.randn(len(kappas), d, generator=generator))
    wc = r * nn.functional.normalize(mu + torch.randn(len(kappas), d, generator=generator) / d**0.5)
    return mu.requires_grad_(), torch.tensor(kappas)[:, None].requires_grad_(), wc.requires_grad_()


@pytest.mark.parametrize("d", [32, 512])
def test_kl_dirac_vmf_in_published_mode(d):
    arguments, others = case(d, [2.0, 30.0, 400.0, 5e3, 8e4]), case(d, [2.0, 30.0, 400.0, 5e3, 8e4])
    ours, theirs = KLDiracVMF(d, 64.0, normalizer="published")(*arguments), published_loss(*others, d, 64.0)
    for a, b in zip(ours, theirs):
        assert a.shape == (5, 1)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    ours[0].mean().backward()
    theirs[0].mean().backward()
    for a, b in zip(arguments, others):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_kl_dirac_vmf_is_exact_by_default():
    d, r = 64, 64.0
    kappas = [0.5, 20.0, 300.0, 600.0]
    mu, kappa, wc = case(d, kappas, r)
    losses, l1, l2, l3 = KLDiracVMF(d, r)(mu, kappa, wc)
    z = np.array(kappas)
    log_bessel = np.log(scipy.special.ive(d / 2 - 1, z)) + z
    cos = (mu * wc).sum(1).detach().double().numpy() / r
    expected = -z * cos - (d / 2 - 1) * np.log(z) + log_bessel + d / 2 * math.log(2 * math.pi) + d * math.log(r)
    np.testing.assert_allclose(losses.detach().numpy()[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(l3.detach().numpy()[:, 0], log_bessel, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        l1 + l2 + l3 + d / 2 * math.log(2 * math.pi) + d * math.log(r), losses, rtol=1e-5, atol=1e-3
    )
    losses.sum().backward()
    ratio = scipy.special.ive(d / 2, z) / scipy.special.ive(d / 2 - 1, z)
    np.testing.assert_allclose(kappa.grad.numpy()[:, 0], ratio - cos, atol=1e-5)
    with pytest.raises(ValueError, match="normalizer must be 'exact' or 'published', got 'none'"):
        KLDiracVMF(d, r, normalizer="none")


@pytest.mark.parametrize("d", [32, 512])
def test_200_steps_of_the_published_objective(d):
    """Confidence net, loss and L2 Adam of ours against plain PyTorch and scipy, on fixed features."""
    torch.manual_seed(0)
    count, batch, r = 96, 32, 64.0
    features, convf, centers = torch.randn(count, d), torch.randn(count, 4, 7, 7), torch.randn(6, d)
    labels = torch.randint(6, (count,))
    features = features + 3 * centers[labels] * torch.rand(count, 1)
    theirs, ours = UncertaintyNet(196), build_confidence_net("mlp", 4, 7)
    ours.load_state_dict(theirs.state_dict())
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=5e-4) for net in (theirs, ours)]
    loss_fn = SCFLoss(centers, radius=r, normalizer="published")
    wc = centers / centers.norm(dim=1, keepdim=True) * r
    curves = [[], []]
    for step in range(200):
        rows = torch.arange(batch) + batch * (step % (count // batch))
        mu = features[rows] / features[rows].norm(dim=1, keepdim=True)
        losses = [
            published_loss(mu, theirs(convf[rows].flatten(1)).exp(), wc[labels[rows]], d, r)[0].mean(),
            loss_fn(features[rows], ours(convf[rows]), labels[rows]),
        ]
        for loss, optimizer, curve in zip(losses, optimizers, curves):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    assert curves[0][-1] < curves[0][0] - 10  # it went somewhere


def test_scf_loss_module_keeps_its_centers_out_of_the_state_dict():
    loss_fn = SCFLoss(torch.randn(4, 16), reduction="none")
    assert not loss_fn.state_dict() and loss_fn.to(torch.bfloat16).class_centers.dtype == torch.bfloat16
    assert SCFLoss(torch.randn(4, 16), reduction="none")(
        torch.randn(3, 16), torch.zeros(3), torch.tensor([0, 3, 1])
    ).shape == (3,)


def published_run(folder, images=16, identities=4, z_dim=16):
    """A folder as users of the published code have it: list, images, checkpoints of stage 1."""
    (folder / "list").mkdir()
    (folder / "images").mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(images):
        path = folder / "images" / f"{i}.jpg"
        Image.fromarray(rng.integers(0, 255, (112, 112, 3), dtype=np.uint8)).save(path)
        lines.append(f"{path if i % 2 else path.relative_to(folder)} {i % identities}\n")
    (folder / "list" / "ms1m_list.txt").write_text("".join(lines))
    torch.manual_seed(0)
    torch.save(Backbone("ir_tiny", z_dim).state_dict(), folder / "B.pth")
    torch.save({"arc_face_state_dict": {"weight": torch.randn(identities, z_dim)}}, folder / "F.pth")
    return folder


def command(folder, epochs):
    """The published command, word for word after the launcher but for the sizes; of random class centers."""
    return f"""--dataset ms1m --seed 777 --gpu_ids 0,1 --batch_size 8 --output_dir {folder}/out
        --saved_bkb {folder}/B.pth --saved_fc {folder}/F.pth --num_workers 1 --epochs {epochs} --lr 3e-5
        --lr_scheduler StepLR --step_size 2 --gamma 0.5 --convf_dim 784 --z_dim 16 --radius 64
        --max_grad_clip 0 --max_grad_norm 0 --tensorboard --dataroot {folder} --initial_kappa none""".split()


def test_the_published_command_trains_resumes_and_leaves_published_files(tmp_path, run_command, fork_ranks):
    folder = published_run(tmp_path)
    status, output = run_command([*launcher(2), *command(folder, 1)])
    assert status == 0, output
    assert "--gpu_ids 0,1: the launcher chooses the GPUs" in output and output.count("normalizer: exact") == 1
    assert "pixels: published, as the published family is trained with" in output
    out = folder / "out"
    first = torch.load(out / "ckpts" / "ckpt_e1.pt")
    status, output = fork_ranks(2, *command(folder, 2), "--resume")
    assert status == 0 and "resumed at step 2" in output, output
    assert sorted(path.name for path in (out / "ckpts").iterdir()) == ["ckpt_e1.pt", "ckpt_e2.pt"]
    second = torch.load(out / "ckpts" / "ckpt_e2.pt")
    assert set(first) == set(second) == {"epoch", "global_step", "uncer_net_state_dict", "opt_state"}
    assert (first["epoch"], first["global_step"], second["epoch"], second["global_step"]) == (0, 1, 1, 3)
    hparams = json.loads((out / "hparams.json").read_text())
    assert list(hparams) == HPARAMS and (hparams["gpu_ids"], hparams["convf_dim"], hparams["eval_batch_size"]) == (
        "0,1",
        784,
        1,
    )
    assert (out / "hparams.json").read_text() == json.dumps(hparams, sort_keys=True, indent=4)
    events = EventAccumulator(str(out / "runs")).Reload()
    assert SCALARS <= set(events.Tags()["scalars"])

    net = UncertaintyNet(784)  # what the published code does with its checkpoint
    net.load_state_dict(second["uncer_net_state_dict"], strict=True)
    optimizer = torch.optim.Adam([{"params": net.parameters()}], lr=3e-5, weight_decay=5e-4)
    optimizer.load_state_dict(second["opt_state"])
    for parameter in net.parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 4 and state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    net(torch.randn(2, 784)).sum().backward()
    optimizer.step()

    images = torch.randn(2, 3, 112, 112)
    whole, parts = SCF.from_checkpoint(out), SCF.from_checkpoint(f"{folder}/B.pth,{out}/ckpts/ckpt_e2.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole(images), parts(images)))


def test_finetuning_trains_both_by_plain_python(tmp_path, fork_ranks):
    folder = published_run(tmp_path)
    flags = ["--finetune_bkb", "--no_cuda", "--eval_batch_size", 1, "--confidence_net", "conv", "--zero_stage", 0]
    status, output = fork_ranks(0, *command(folder, 1), *flags)
    assert status == 0, output
    assert "plain python trains on one GPU, the first of 0,1" in output and "--eval_batch_size has no effect" in output
    checkpoint, before = torch.load(folder / "out" / "ckpts" / "ckpt_e1.pt"), torch.load(folder / "B.pth")
    assert set(checkpoint) == {"epoch", "global_step", "uncer_net_state_dict", "opt_state", "backbone_state_dict"}
    after = checkpoint["backbone_state_dict"]
    assert list(after) == list(before)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == set(after)  # weights by the loss, statistics and their counters by the train mode
    model = SCF.from_checkpoint(folder / "out")
    assert all(torch.equal(value, after[key]) for key, value in model.backbone.state_dict().items())
    net = build_confidence_net("conv", 16, 7)
    parameters = [*Backbone("ir_tiny", 16).parameters(), *net.parameters()]
    torch.optim.Adam(parameters).load_state_dict(checkpoint["opt_state"])
    assert [state["exp_avg"].shape for state in checkpoint["opt_state"]["state"].values()] == [
        parameter.shape for parameter in parameters
    ]


def test_adam_state_is_that_of_plain_adam_under_every_zero_stage(tmp_path, run_ranks):
    """Two ranks with the same data are one process of plain PyTorch."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import sys
        import torch
        from scf_fast import distributed
        from scf_fast.config import ConfidenceConfig
        from scf_fast.networks.confidence import build_confidence_net
        from scf_fast.engine.engine import Engine
        from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
        from scf_fast.stages.published_files import adam_state_dict

        runtime = distributed.start()
        convf = torch.randn(4, 2, 7, 7, generator=torch.Generator().manual_seed(1))
        target = torch.tensor([1.0, 2.0, 0.0, -1.0])
        def loss(net):
            return ((net(convf) - target) ** 2).mean()
        for stage in (0, 1, 2, 3):
            options = {"data": "d", "output_dir": "o", "saved_bkb": "b", "saved_fc": "f", "batch_size": 8}
            config = ConfidenceConfig(**options, lr=1e-2, zero_stage=stage)
            torch.manual_seed(0)
            net, plain = build_confidence_net("mlp", 2, 7), build_confidence_net("mlp", 2, 7)
            plain.load_state_dict(net.state_dict())
            reference = torch.optim.Adam(plain.parameters(), lr=1e-2, weight_decay=5e-4)
            optimizer = build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device)
            engine = Engine(net, optimizer, config, runtime, "fp32")
            for _ in range(3):
                engine.backward(loss(engine))
                engine.step()
                reference.zero_grad()
                loss(plain).backward()
                reference.step()
            ours, theirs = adam_state_dict(engine), reference.state_dict()
            if runtime.is_main:
                assert ours["param_groups"] == theirs["param_groups"], (ours["param_groups"], theirs["param_groups"])
                assert ours["state"].keys() == theirs["state"].keys()
                for index, state in theirs["state"].items():
                    assert ours["state"][index].keys() == state.keys()
                    for key, value in state.items():
                        torch.testing.assert_close(
                            ours["state"][index][key], value, rtol=1e-4, atol=1e-7, msg=f"stage {stage} {index} {key}"
                        )
                print("stage", stage, "agrees", flush=True)
        engine.close()
        distributed.finish()
        distributed.leave(0)
        """)
    )
    output = run_ranks(
        2,
        tmp_path / "script.py",
    )
    assert [line for line in output.splitlines() if line.startswith("stage")] == [
        f"stage {stage} agrees" for stage in range(4)
    ]


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            lambda f: ["--saved_fc", f / "B.pth"],
            "must hold class centers, one (classes, width) tensor, but holds backbone ir_tiny",
        ),
        (lambda f: ["--saved_fc", f / "five.pth"], "has 4 identities but --saved_fc"),
        (lambda f: ["--saved_fc", f / "three.pth"], "only 3 class centers"),
        (lambda f: ["--saved_bkb", f / "module.pt"], "code from a checkpoint is never run"),
        (lambda f: ["--convf_dim", 25088], "--convf_dim must be 784"),
        (lambda f: ["--dataroot", f / "images"], "list/ms1m_list.txt; give --dataroot"),
        (lambda f: ["--data", f / "bad.txt"], "bad.txt line 1 must be `path label`"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change, expected, tmp_path, monkeypatch, capsys):
    from scf_fast import train

    folder = published_run(tmp_path)
    for name, count in (("three", 3), ("five", 5)):
        torch.save({"arc_face_state_dict": {"weight": torch.randn(count, 16)}}, folder / f"{name}.pth")
    torch.save(nn.Linear(2, 2), folder / "module.pt")
    (folder / "bad.txt").write_text("images/0.jpg\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*command(folder, 1), *change(folder)])])
    assert train.main() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("train.py: error: ") and expected in lines[-1] and "Traceback" not in "".join(lines), (
        lines
    )
    assert not (folder / "out").exists()


def test_notes_are_about_what_was_given():
    base = ["--data", "d", "--output_dir", "o", "--saved_bkb", "b", "--saved_fc", "f"]
    assert len(flag_notes(parse(base), False)) == 1
    assert flag_notes(parse([*base, "--normalizer", "published"]), False)[0].startswith("normalizer: published.")
    assert flag_notes(parse(["--stage", "backbone", "--data", "d", "--output_dir", "o"]), True) == []
    assert "deepspeed --include localhost:0,3 train.py" in flag_notes(parse([*base, "--gpu_ids", "0, 3"]), True)[0]
