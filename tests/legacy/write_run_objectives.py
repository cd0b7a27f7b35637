"""Writes what the version that knows several objectives left on disk: a stage 2 of `--objective pfe,pfe_vmf` that was
cut off, beside the folders of write_run_0428aba.py, whose backbone, data and cache it has.

    python tests/legacy/write_run_0428aba.py OUT --rec FILE
    python tests/legacy/write_run_objectives.py OUT --rec FILE

    OUT/pairs     two confidence nets on two ranks with ZeRO 2, dead while it wrote the checkpoint of step 7

What is new since 0428aba: options in config.yaml; `objective`, `patience`, `slope` and the learning rate's limit in
state.json, and a third number in its `epoch_loss`; one `optimizer_steps` in the ranks' files; batches of groups; a
folder for each objective, with `objective` and `warning` in its files.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch
import write_run_0428aba as first
from write_run_0428aba import BATCH_SIZE, NORMALIZATION, RADIUS, RANKS, RUN_SEED, SKIPPED, STEP, trained

OBJECTIVES, GROUPS, IMAGES = ("pfe", "pfe_vmf"), 8, 4
LR, LIMIT, GAMMA = 0.01, 1e-3, 0.5  # the rate is the limit's, halved after the first epoch
LOSSES = 200.0  # the sum over the two steps of epoch 2
WARNING = "all images have the same kappa or precision: the confidence net has died"
FLAGS = f"""--stage confidence --objective {",".join(OBJECTIVES)} --pair_batch {GROUPS},{IMAGES} --confidence_net conv
--precision fp32 --radius {RADIUS} --normalization {NORMALIZATION} --lr {LR} --lr_scheduler StepLR --step_size 1
--gamma {GAMMA}""".split()
_DEAL, _GROUPS = 5, 6  # random streams of an epoch


class Content(first.Content):
    """Draws the values of the run.

    Attributes:
        nets, earlier_nets: state_dict of both nets by objective, after steps 6 and 4.
        net: that of the module that holds both, after step 6; earlier_net likewise.
        exp_avg, exp_avg_sq: parameter of it -> its moments in Adam.
    """

    def __init__(self, rec: str | Path, seed: int = 0):
        super().__init__(rec, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.earlier_nets = {name: first._draw_confidence_net(generator, 4) for name in OBJECTIVES}
        self.nets = {name: first._draw_confidence_net(generator, STEP) for name in OBJECTIVES}
        self.earlier_net, self.net = _joined(self.earlier_nets), _joined(self.nets)
        normal, uniform = first._normal, first._uniform
        self.exp_avg = {name: 1e-3 * normal(generator, value.shape) for name, value in trained(self.net).items()}
        self.exp_avg_sq = {name: 1e-7 + 1e-6 * uniform(generator, value.shape) for name, value in self.exp_avg.items()}

    def groups(self, step: int) -> list[list[int]]:
        """Returns the groups of a step, counted from 1, over all ranks: images of one person each.

        Raises:
            ValueError: people have numbers of images that leave other groups.
        """
        labels = self.records.labels
        epoch, batch = divmod(step - 1, len(labels) // BATCH_SIZE)
        order = _shuffled(epoch, _DEAL, len(labels))
        dealt = []
        for person in sorted(set(labels.tolist())):
            own = [image for image in order if labels[image] == person]
            if len(own) % IMAGES:
                raise ValueError(f"person {person} must have a multiple of {IMAGES} images; take another file")
            dealt += [own[at : at + IMAGES] for at in range(0, len(own), IMAGES)]
        turn = _shuffled(epoch, _GROUPS, len(dealt))
        return [dealt[number] for number in turn[batch * GROUPS : (batch + 1) * GROUPS]]

    def images(self, step: int) -> list[int]:
        return [image for group in self.groups(step) for image in group]


def _shuffled(epoch, stream, count):
    return np.argsort(first._splitmix64(first._stream_key(RUN_SEED, epoch, stream), np.arange(count))).tolist()


def _joined(nets):
    return {f"{name}.{key}": value for name, net in nets.items() for key, value in net.items()}


def write_checkpoint(folder: Path, progress: dict, state: dict, moments: dict[str, dict]) -> None:
    """Writes the folder of one checkpoint."""
    folder.mkdir(parents=True)
    shared = {"optimizer_steps": progress["step"] - SKIPPED, "loss_scaler": {}, "skipped_steps": SKIPPED}
    files = {}
    for rank in range(RANKS):
        random = {"cpu": torch.Generator().manual_seed(1000 * (rank + 1)).get_state()}
        content = {"pieces": first.pieces_of(rank, state, moments), "shared": shared, "random": random}
        if rank == 0:
            content["buffers"] = {name: value for name, value in state.items() if name not in trained(state)}
        path = folder / f"rank{rank}.pt"
        first.save(content, path)
        files[path.name] = [path.stat().st_size, zlib.crc32(path.read_bytes())]
    complete = {**progress, "world_size": RANKS, "zero_stage": 2, "objective": [*OBJECTIVES], "patience": None}
    (folder / "state.json").write_text(json.dumps({**complete, "slope": "bounded", "files": files}, indent=1))


def write_run(folder: Path, root: Path, content: Content) -> None:
    """Writes the output folder of the run.

    Args:
        root: has the folders of the first script.
    """
    folder.mkdir(parents=True)
    changes = {"stage": "confidence", "data": str(root / "data"), "saved_bkb": str(root / "stage1" / "backbone.pth")}
    changes |= {"objective": [*OBJECTIVES], "variance": "scalar", "pair_batch": [GROUPS, IMAGES], "update_rule": "adam"}
    changes |= {"initial_kappa": "auto", "slope": "bounded", "max_first_step": 4.0, "validation": 0.0, "patience": 0}
    changes |= {"confidence_net": "conv", "precision": "fp32", "radius": RADIUS, "normalization": NORMALIZATION}
    changes |= {"lr": LR, "lr_scheduler": "StepLR", "step_size": 1, "gamma": GAMMA, "max_grad_norm": 0.0}
    first.write_config(folder, {**changes, "feature_cache": str(root / "cache_bf16")})
    moments = {"exp_avg": content.exp_avg, "exp_avg_sq": content.exp_avg_sq}
    common = {"schedule": {"limit": LIMIT}, "num_classes": first.CLASSES, "num_images": len(content.records.labels)}
    earlier = {"step": 4, **common, "metric": 100.0, "epoch_loss": [0.0, 0.0, 0.0]}
    newest = {"step": STEP, **common, "metric": None, "epoch_loss": [LOSSES, 2.0, 2.0]}
    for progress, state in ((earlier, content.earlier_net), (newest, content.net)):
        write_checkpoint(folder / "checkpoints" / f"step{progress['step']:08d}", progress, state, moments)
    (folder / "checkpoints" / "latest").write_text(f"step{STEP:08d}")
    first.write_half_checkpoint(folder / "checkpoints" / f"step{STEP + 1:08d}")
    for name, net in content.earlier_nets.items():  # of the end of epoch 1
        own = folder / name
        own.mkdir()
        said = {"objective": name, "epoch": 0, "global_step": 3, **({"warning": WARNING} if name == "pfe" else {})}
        first.save({"uncer_net_state_dict": net, **said}, own / "confidence.pth")
        model = {"format": "scf_fast model", "backbone_state_dict": content.backbone, "uncer_net_state_dict": net}
        first.save({**model, "radius": RADIUS, "normalization": NORMALIZATION, **said}, own / "scf_model.pt")
    record = {"total_loss": 100.0, "pfe/total_loss": 60.0, "pfe_vmf/total_loss": 40.0, "images_per_second": 70.0}
    metrics = [{**record, "lr": LIMIT * (1 if step <= 4 else GAMMA)} for step in range(1, first.STEPS + 1)]
    first.write_logs(folder, "confidence", 1.0, metrics, content)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that write_run_0428aba.py has written")
    parser.add_argument("--rec", metavar="FILE", type=Path, required=True, help="the images, a train.rec of 128")
    parser.add_argument("--seed", type=int, default=0, help="of the values, as for the first script [%(default)s]")
    options = parser.parse_args(arguments)
    try:
        root = options.out.resolve()
        write_run(root / "pairs", root, Content(options.rec, options.seed))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
