"""A model, not a measurement, of stage 1 on many GPUs: images a second from shapes and stated assumptions."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from bench.measuring.roofline import FLOAT, margin_softmax
from bench.training.collectives import BATCH, CONFIDENCE_NET, NETWORK, Z_DIM, Payload, on_the_wire
from scf_fast.networks.flops import network_counts

GPUS, IDENTITIES = (8, 16, 32, 64, 128, 256, 512), (1_000_000, 4_000_000, 10_000_000, 29_000_000)


def network_payload(zero_stage: int, parameters: int) -> Payload:
    """Returns the payload of one optimizer step of a network under ZeRO, all in float32.

    ZeRO 3 gathers the weights for each pass. Those of a network as small as the counted one it keeps between the
    passes, which spares one gather.
    """
    size = FLOAT * parameters
    if zero_stage == 0:
        return {"all_reduce": size}
    if zero_stage == 3:
        return {"all_gather": 2 * size, "reduce_scatter": size}
    return {"all_reduce": size, "all_gather": size}


def classifier_payload(batch: int, width: int) -> Payload:
    """Returns the payload of one step of the sharded class centers; it does not depend on the number of identities."""
    return {
        "all_gather": batch * (FLOAT * width + 8),
        "all_reduce": 6 * FLOAT * batch,
        "reduce_scatter": FLOAT * batch * width,
    }


def predicted(stage: str, zero_stage: int) -> Payload:
    """Returns the payload that the model gives for the steps that ``collectives`` counts."""
    _, parameters, _, net_parameters = network_counts(NETWORK, CONFIDENCE_NET, Z_DIM)
    payload: Counter[str] = Counter(network_payload(zero_stage, parameters if stage == "stage 1" else net_parameters))
    if stage == "stage 1":
        payload.update(classifier_payload(BATCH, Z_DIM))
    return dict(payload)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of the model; none of them has been measured here."""

    network: str = "ir_100"
    images_per_second: float = 5000.0  # aim for one GPU's backbone in stage 1: forward, backward and update
    batch: int = 128  # images on each GPU
    width: int = 512
    zero_stage: int = 1
    tflops: float = 500.0  # of the margin softmax's products: the rate of one large product over the aim of 1.6
    copy_gb_per_s: float = 4300.0
    gpu_gb: float = 141.0
    gpus_a_node: int = 8
    intra_gb_per_s: float = 450.0  # of one GPU in each direction, inside a node
    inter_gb_per_s: float = 50.0  # of one GPU in each direction, between nodes
    latency_us: float = 20.0  # of a collective in a node; as much again for every doubling of nodes
    hidden: float = 0.6  # share of the backbone's step during which its gradients can be reduced


def step_seconds(gpus: int, identities: int, a: Assumptions) -> dict[str, float]:
    """Returns the seconds of each part of one step, and of the "total"."""
    bandwidth = 1e9 * (a.intra_gb_per_s if gpus <= a.gpus_a_node else a.inter_gb_per_s)
    latency = 1e-6 * a.latency_us * (1 + max(0, (gpus // a.gpus_a_node - 1).bit_length()))
    _, parameters, _, _ = network_counts(a.network, None, a.width)
    backbone = a.batch / a.images_per_second
    local = -(-identities // gpus)
    products = margin_softmax(a.batch * gpus, local, a.width, "bfloat16").flop / (1e12 * a.tflops)
    update = 5 * FLOAT * local * a.width / (1e9 * a.copy_gb_per_s)
    gradients = network_payload(a.zero_stage, parameters)
    weights = {kind: gradients.pop(kind) for kind in ("all_gather",) if kind in gradients}
    reduced = on_the_wire(gradients, gpus) / bandwidth + latency
    gathered = on_the_wire(weights, gpus) / bandwidth + latency * len(weights)
    classifier = classifier_payload(a.batch * gpus, a.width)
    scattered = on_the_wire({"reduce_scatter": classifier.pop("reduce_scatter")}, gpus) / bandwidth + latency
    parts = {
        "backbone": backbone,
        "margin softmax": products,
        "center update": update,
        "gradients, not hidden": max(0.0, reduced - a.hidden * backbone),
        "weights gathered": gathered,
        "classifier's gathers and sums": on_the_wire(classifier, gpus) / bandwidth + 4 * latency,
        # A quarter of the products (the class centers' gradient) and the update run beside it.
        "classifier's scatter, not hidden": max(0.0, scattered - products / 4 - update),
    }
    return parts | {"total": sum(parts.values())}


def model(assumptions: Assumptions) -> list[dict[str, Any]]:
    """Returns a row for each number of identities and GPUs, as it stands in the JSON file.

    ``efficiency`` compares with as many single GPUs that have no classifier to share.
    """
    rows: list[dict[str, Any]] = []
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
