"""What several GPUs and nodes would do: bytes of the real collectives, counted on CPU ranks, and a model that goes on
from there.

    python -m bench.scaling [--out DIR] [--ranks 2] [--measure_only] [--images_per_second 5000] [--inter_gb_per_s 50]
    ...

Measured: a launch of `--ranks` processes on this machine takes steps of both stages under each ZeRO stage; every
collective that reaches the process group is counted with its payload. The model predicts the same counts from shapes;
both are printed, so that one sees how far to trust it. Also measured: the classifier's step with its communication
beside the computation, against the same with every collective waited for at once.

Modeled, not measured: images a second of stage 1 on 8 to 512 GPUs with 1 M to 29 M identities, from the assumptions
that are printed.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measuring.environment import DEVICE, RESULTS, device_slug, environment
from bench.measuring.results import table
from bench.measuring.roofline import FLOAT, margin_softmax, network_counts
from bench.measuring.timing import write_json

NETWORK, CONFIDENCE_NET, Z_DIM, CLASSES, BATCH, STEPS = "ir_tiny", "conv", 32, 1000, 16, 3
OVERLAP_CLASSES, OVERLAP_BATCH, OVERLAP_ROUNDS = 20_000, 256, 7
GPUS, IDENTITIES = (8, 16, 32, 64, 128, 256, 512), (1_000_000, 4_000_000, 10_000_000, 29_000_000)


# ---- measured


# What the names of PyTorch's operators begin with.
_KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
}


class CountedCollectives(TorchDispatchMode):
    """Payload bytes of every collective by kind: what is reduced, gathered in all, scattered in all or sent to
    everyone.
    """

    def __init__(self):
        super().__init__()
        self.payload = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            kind = next((kind for prefix, kind in _KINDS.items() if name.startswith(prefix)), None)
            if kind is not None:
                sides = [
                    sum(
                        tensor.nbytes
                        for tensor in torch.utils._pytree.tree_leaves(side)
                        if isinstance(tensor, torch.Tensor)
                    )
                    for side in args[:2]
                ]
                self.payload[kind] += max(sides)
        return func(*args, **(kwargs or {}))


def on_the_wire(payload, ranks):
    """Bytes that each rank sends, with ring algorithms."""
    share = (ranks - 1) / ranks
    factor = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "broadcast": 1.0, "reduce": share}
    return sum(factor[kind] * nbytes for kind, nbytes in payload.items())


def counted_steps(engine, take, loss_of):
    """{kind: payload bytes} of one optimizer step, the mean of STEPS after a first one."""
    for step in range(STEPS + 1):
        with CountedCollectives() if step else contextlib.nullcontext() as counted:
            engine.backward(loss_of())
            take()
        if step == 0:
            total = Counter()
        else:
            total.update(counted.payload)
    return {kind: nbytes // STEPS for kind, nbytes in total.items()}


def measure_stage1(zero_stage, runtime):
    from scf_fast.config import BackboneConfig
    from scf_fast.engine.class_centers import ClassCenters
    from scf_fast.engine.engine import Engine
    from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
    from scf_fast.networks.backbones import Backbone
    from scf_fast.pipelines.face_template import FACE_SIZE

    config = BackboneConfig(
        data="-",
        output_dir="-",
        network=NETWORK,
        z_dim=Z_DIM,
        batch_size=BATCH,
        zero_stage=zero_stage,
    )
    backbone = Backbone(NETWORK, Z_DIM)
    engine = Engine(
        backbone,
        build_optimizer(OptimizerRule.SGD, backbone.parameters(), config, runtime.device),
        config,
        runtime,
        "fp32",
    )
    centers = ClassCenters(CLASSES, Z_DIM, config, runtime)
    images = torch.randn(BATCH // runtime.world_size, 3, FACE_SIZE, FACE_SIZE)
    labels = torch.arange(BATCH // runtime.world_size)

    def loss_of():
        return centers.loss(engine(images)[0], labels)[0]

    counts = counted_steps(engine, lambda: centers.step(engine.step()), loss_of)
    engine.close()
    return counts


def measure_stage2(zero_stage, runtime):
    from scf_fast.config import ConfidenceConfig
    from scf_fast.engine.engine import Engine
    from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
    from scf_fast.kernels import scf_loss
    from scf_fast.networks.backbones import BACKBONES
    from scf_fast.networks.confidence import build_confidence_net

    config = ConfidenceConfig(
        data="-",
        output_dir="-",
        saved_bkb="-",
        saved_fc="-",
        batch_size=BATCH,
        zero_stage=zero_stage,
    )
    architecture, rows = BACKBONES[NETWORK], BATCH // runtime.world_size
    net = build_confidence_net(CONFIDENCE_NET, architecture.widths[-1], architecture.map_size)
    engine = Engine(
        net, build_optimizer(OptimizerRule.ADAM, net.parameters(), config, runtime.device), config, runtime, "fp32"
    )
    convf = torch.randn(rows, architecture.widths[-1], architecture.map_size, architecture.map_size)
    features, centers, labels = torch.randn(rows, Z_DIM), torch.randn(CLASSES, Z_DIM), torch.arange(rows)
    counts = counted_steps(engine, lambda: engine.step(), lambda: scf_loss(features, engine(convf), centers, labels))
    engine.close()
    return counts


def measure_overlap(runtime):
    """Median seconds of the classifier's forward and backward pass, with its communication beside the computation and
    without.
    """
    from scf_fast.config import BackboneConfig
    from scf_fast.engine import class_centers

    config = BackboneConfig(data="-", output_dir="-", z_dim=512, batch_size=OVERLAP_BATCH)
    centers = class_centers.ClassCenters(OVERLAP_CLASSES, 512, config, runtime)
    rows = OVERLAP_BATCH // runtime.world_size
    features, labels = torch.randn(rows, 512, requires_grad=True), torch.arange(rows)
    start = class_centers._started

    def start_and_wait(*arguments):
        result = start(*arguments)()
        return lambda: result

    ways, seconds = {"beside": start, "in turn": start_and_wait}, {"beside": [], "in turn": []}
    for round_ in range(OVERLAP_ROUNDS + 1):
        for name, way in ways.items():
            class_centers._started = way
            torch.distributed.barrier()
            began = time.perf_counter()
            centers.loss(features, labels)[0].backward()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    class_centers._started = start
    return {name: statistics.median(values) for name, values in seconds.items()}


def work(folder):
    """One rank; rank 0 writes what it counted."""
    from scf_fast import distributed

    runtime = distributed.start()
    found = {
        "stage 1": {zero: measure_stage1(zero, runtime) for zero in (0, 1, 2, 3)},
        "stage 2": {zero: measure_stage2(zero, runtime) for zero in (0, 1, 2, 3)},
        "overlap": measure_overlap(runtime),
    }
    if runtime.is_main:
        write_json(folder / "counted.json", found)
    distributed.finish()
    distributed.leave(0)


def measure(ranks):
    """What `work` has written, of a launch of so many ranks on the CPU.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            "-m",
            "bench.scaling",
            "--worker",
            folder,
        ]
        environ = {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore::FutureWarning",
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
        }
        if subprocess.run(command, cwd=Path(__file__).parents[2], env=environ).returncode:
            raise RuntimeError(f"a launch of {ranks} ranks failed, see above")
        return json.loads((Path(folder) / "counted.json").read_text())


# ---- modeled


def network_payload(zero_stage, parameters):
    """{kind: payload bytes} of one optimizer step of a network under ZeRO, all in float32.

    ZeRO 3 gathers the weights for each pass. A network as small as the one that is counted it keeps from one to the
    other: one gather less.
    """
    size = FLOAT * parameters
    if zero_stage == 0:
        return {"all_reduce": size}
    if zero_stage == 3:
        return {"all_gather": 2 * size, "reduce_scatter": size}
    return {"all_reduce": size, "all_gather": size}


def classifier_payload(batch, width):
    """The same of the sharded class centers: it does not depend on how many identities there are."""
    return {
        "all_gather": batch * (FLOAT * width + 8),
        "all_reduce": 6 * FLOAT * batch,
        "reduce_scatter": FLOAT * batch * width,
    }


def predicted(stage, zero_stage):
    _, parameters, _, net_parameters = network_counts(NETWORK, CONFIDENCE_NET, Z_DIM)
    payload = Counter(network_payload(zero_stage, parameters if stage == "stage 1" else net_parameters))
    if stage == "stage 1":
        payload.update(classifier_payload(BATCH, Z_DIM))
    return dict(payload)


@dataclass(frozen=True)
class Assumptions:
    """None of these has been measured here."""

    network: str = "ir_100"
    images_per_second: float = (
        5000.0  # of one GPU's backbone in stage 1, forward, backward and update: what is aimed at
    )
    batch: int = 128  # images a GPU
    width: int = 512
    zero_stage: int = 1
    tflops: float = (
        500.0  # of the margin softmax's products: the rate of one large product over the 1.6 that is aimed at
    )
    copy_gb_per_s: float = 4300.0
    gpu_gb: float = 141.0
    gpus_a_node: int = 8
    intra_gb_per_s: float = 450.0  # each way, a GPU, inside a node
    inter_gb_per_s: float = 50.0  # each way, a GPU, between nodes
    latency_us: float = 20.0  # of a collective in a node; the same again for every doubling of nodes
    hidden: float = 0.6  # share of the backbone's step beside which its gradients can be reduced


def step_seconds(gpus, identities, a):
    """{part: seconds} of one step, and "total"."""
    bandwidth = 1e9 * (a.intra_gb_per_s if gpus <= a.gpus_a_node else a.inter_gb_per_s)
    latency = 1e-6 * a.latency_us * (1 + max(0, (gpus // a.gpus_a_node - 1).bit_length()))
    _, parameters, _, _ = network_counts(a.network, None, a.width)
    backbone = a.batch / a.images_per_second
    local = -(-identities // gpus)
    products = margin_softmax(a.batch * gpus, local, a.width, "bfloat16").flop / (1e12 * a.tflops)
    update = 5 * FLOAT * local * a.width / (1e9 * a.copy_gb_per_s)
    payload = network_payload(a.zero_stage, parameters)
    reduced = (
        on_the_wire({kind: size for kind, size in payload.items() if kind != "all_gather"}, gpus) / bandwidth + latency
    )
    gathered = on_the_wire(
        {kind: size for kind, size in payload.items() if kind == "all_gather"}, gpus
    ) / bandwidth + latency * ("all_gather" in payload)
    classifier = classifier_payload(a.batch * gpus, a.width)
    scattered = on_the_wire({"reduce_scatter": classifier.pop("reduce_scatter")}, gpus) / bandwidth + latency
    parts = {
        "backbone": backbone,
        "margin softmax": products,
        "center update": update,
        "gradients, not hidden": max(0.0, reduced - a.hidden * backbone),
        "weights gathered": gathered,
        "classifier's gathers and sums": on_the_wire(classifier, gpus) / bandwidth + 4 * latency,
        # a quarter of the products, the class centers' gradient, and the update run beside it
        "classifier's scatter, not hidden": max(0.0, scattered - products / 4 - update),
    }
    return parts | {"total": sum(parts.values())}


def model(assumptions):
    """[{gpus, identities, images_per_second, efficiency, centers_gb, fits, parts}]; efficiency against as many single
    GPUs with no classifier to share.
    """
    rows = []
    for identities in IDENTITIES:
        for gpus in GPUS:
            parts = step_seconds(gpus, identities, assumptions)
            rate = assumptions.batch * gpus / parts["total"]
            centers_gb = 2 * FLOAT * -(-identities // gpus) * assumptions.width / 1e9
            rows.append(
                {
                    "gpus": gpus,
                    "identities": identities,
                    "images_per_second": rate,
                    "efficiency": rate / (gpus * assumptions.images_per_second),
                    "centers_gb": centers_gb,
                    "fits": centers_gb < assumptions.gpu_gb,
                    "parts": parts,
                }
            )
    return rows


def overlap_line(measured):
    """What the classifier gains by communication beside computation, in a sentence."""
    overlap = measured["counted"]["overlap"]
    return (
        f"Classifier, {OVERLAP_CLASSES:,} identities, batch {OVERLAP_BATCH}: {1e3 * overlap['beside']:.1f} ms with "
        "communication beside the computation, "
        f"{1e3 * overlap['in turn']:.1f} ms in turn. Ranks of one machine share its cores and its memory; a network "
        "card would not."
    )


def assumptions_line(assumptions):
    """What the model rests on, in a paragraph."""
    return (
        "A model, not a measurement. Assumptions: "
        + ", ".join(f"{name} {value}" for name, value in assumptions.items())
        + ". Each cell: images/s of stage 1, share of what as many GPUs would do without communication and "
        "classifier, class centers and momentum a GPU."
    )


def volume_table(measured):
    """Markdown: bytes counted against the model's."""
    rows, ranks = [], measured["ranks"]
    for stage in ("stage 1", "stage 2"):
        for zero_stage, payload in measured["counted"][stage].items():
            model_bytes = on_the_wire(predicted(stage, int(zero_stage)), ranks)
            counted = on_the_wire(payload, ranks)
            kinds = ", ".join(f"{kind} {nbytes:,}" for kind, nbytes in sorted(payload.items()))
            rows.append(
                [stage, zero_stage, kinds, f"{counted:,.0f}", f"{model_bytes:,.0f}", f"{counted / model_bytes:.3f}"]
            )
    return table(["", "ZeRO", f"payload bytes a step, {ranks} ranks", "sent by a rank", "model", "ratio"], rows)


def model_table(rows):
    """Markdown: identities down, GPUs across."""
    cells = {(row["identities"], row["gpus"]): row for row in rows}
    return table(
        ["identities", *(f"{gpus} GPUs" for gpus in GPUS)],
        [
            [
                f"{identities / 1e6:g} M",
                *(
                    f"{c['images_per_second']:,.0f} img/s, {c['efficiency']:.0%}, {c['centers_gb']:.2g} GB"
                    if c["fits"]
                    else "does not fit"
                    for c in (cells[identities, gpus] for gpus in GPUS)
                ),
            ]
            for identities in IDENTITIES
        ],
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / device_slug(DEVICE),
        help="folder for the JSON file (default: bench/results/<device>)",
    )
    parser.add_argument(
        "--ranks", type=int, default=2, help="processes whose collectives are counted (default: %(default)s)"
    )
    parser.add_argument("--measure_only", action="store_true", help="leave the model out")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(
            f"--{name}", type=type(value), default=value, help="assumption of the model (default: %(default)s)"
        )
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker)
    measured = {"ranks": options.ranks, "counted": measure(options.ranks)}
    print(f"{volume_table(measured)}\n\n{overlap_line(measured)}")
    result = {"section": "scaling", "environment": environment(DEVICE), "measured": measured}
    if not options.measure_only:
        assumptions = Assumptions(**{name: getattr(options, name) for name in asdict(Assumptions())})
        result |= {"assumptions": asdict(assumptions), "model": model(assumptions)}
        print(f"\n{assumptions_line(result['assumptions'])}\n\n{model_table(result['model'])}")
    write_json(options.out / "scaling.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
