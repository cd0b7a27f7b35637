"""The DeepSpeed configuration of a run: generated from its options, with the user's JSON on top."""

import difflib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from scf_fast.config import Config
from scf_fast.distributed import Runtime
from scf_fast.errors import InputError
from scf_fast.networks.precision import PRECISION_DTYPES, check_precision, dtype_name, has_bf16
from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.file_kinds import Wanted, refusal
from scf_fast.pipelines.formats.text_file import read_text
from scf_fast.pipelines.text import shorten, shown

# DeepSpeed ignores unknown top-level keys without a word, so a typing error would silently train something else.
_KNOWN_KEYS = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler zero_optimization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer fp16 bf16 amp torch_autocast data_types gradient_clipping
    prescale_gradients gradient_predivide_factor sparse_gradients communication_data_type
    seq_parallel_communication_data_type gradient_allreduce_op graph_harvesting dump_state steps_per_print
    wall_clock_breakdown memory_breakdown log_level flops_profiler tensorboard wandb comet
    csv_monitor comms_logger activation_checkpointing aio checkpoint data_efficiency curriculum_learning compile
    disable_allgather load_universal_checkpoint dataloader_drop_last use_data_before_expert_parallel_ timers nebula
    """.split()
)

# Keys that our own flags set, and the flags.
_OUR_KEYS = {
    **dict.fromkeys(("optimizer", "scheduler"), "our flags (--optimizer, --lr, --lr_scheduler ...)"),
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        "--batch_size and --gradient_accumulation_steps",
    ),
    **dict.fromkeys(("fp16", "bf16", "amp", "torch_autocast"), "--precision, which keeps parameters in float32"),
}

# DeepSpeed takes any value for these, and fails on it in a step, or takes it for another.
_SWITCHES = frozenset(
    """
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients sparse_gradients graph_harvesting
    dump_state wall_clock_breakdown memory_breakdown disable_allgather load_universal_checkpoint dataloader_drop_last
    use_data_before_expert_parallel_
    """.split()
)
_SMALLEST = {"gradient_clipping": 0.0, "gradient_predivide_factor": 1e-6, "steps_per_print": 1.0}


def resolve_precision(config: Config, device: torch.device) -> str:
    """Returns the precision of a run: ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Raises:
        InputError: the device does not have the one that was asked for.
    """
    check_precision(config.precision, device)
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"


def load_deepspeed_config(path: str) -> dict[str, Any]:
    """Reads a user's DeepSpeed JSON and checks its top-level keys.

    Raises:
        InputError: unreadable, no JSON object, an unknown top-level key, a key that belongs to our own flags, or a
            value that DeepSpeed cannot use.
    """
    try:
        values = json.loads(read_text(path, Wanted.JSON))
    except RecursionError:
        raise InputError(f"--deepspeed_config {path}: is nested too deep for JSON") from None
    except OSError as error:
        raise InputError(f"--deepspeed_config {path}: cannot be read ({error.strerror})") from None
    except InputError as error:
        raise InputError(f"--deepspeed_config {error}") from None
    except ValueError as error:
        what = refusal(path, Wanted.JSON, file_kinds.JSON) or f"is no valid JSON ({error})"
        raise InputError(f"--deepspeed_config {path}: {what}") from None
    if not isinstance(values, dict):
        raise InputError(f"--deepspeed_config {path}: must hold a JSON object, got {type(values).__name__}")
    for key in values:
        if key not in _KNOWN_KEYS:
            close = difflib.get_close_matches(key, _KNOWN_KEYS, n=1)
            raise InputError(
                f"--deepspeed_config {path}: DeepSpeed has no key {shown(key)} and would ignore it"
                f"{f'; did you mean {close[0]}?' if close else ''}"
            )
        if key in _OUR_KEYS:
            raise InputError(f"--deepspeed_config {path}: {key!r} is set by {_OUR_KEYS[key]}; leave it out")
    zero = values.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}) if isinstance(zero, dict) else None
    if not isinstance(offload, dict):
        raise InputError(
            f"--deepspeed_config {path}: 'zero_optimization', and 'offload_optimizer' in it, must be JSON objects"
        )
    # Memory and resume are planned by these two.
    if "stage" in zero:
        raise InputError(f"--deepspeed_config {path}: --zero_stage sets it; leave out 'stage'")
    if "device" in offload:
        raise InputError(f"--deepspeed_config {path}: --offload_optimizer sets it; leave out 'device'")
    _check_values(path, values)
    return values


def _check_values(path: str, values: dict[str, Any]) -> None:
    """Checks what DeepSpeed would trip over on each rank, once the run has begun.

    Raises:
        InputError: a value is of the wrong type or out of its range.
    """
    for name, value in _numbers(values):
        if not math.isfinite(value):
            raise InputError(f"--deepspeed_config {path}: {shown(name)} must be finite, got {value}")
    for key, value in values.items():
        if key in _SWITCHES and not isinstance(value, bool):
            raise InputError(f"--deepspeed_config {path}: {key!r} must be true or false, got {shown(value)}")
        least = _SMALLEST.get(key)
        if least is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not least <= value):
            raise InputError(
                f"--deepspeed_config {path}: {key!r} must be a number of at least {least:g}, got {shown(value)}"
            )
    from deepspeed.runtime.config import DeepSpeedConfig  # takes a second to import

    try:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **values})
    except Exception as error:  # of any type: as a rule DeepSpeed uses a value without looking at it
        raise InputError(f"--deepspeed_config {path}: DeepSpeed refuses it: {_reason(error)}") from error


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields the name and value of each number with a decimal point."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)


def _reason(error: Exception) -> str:
    """Returns an error of DeepSpeed in one line: of pydantic's, which key, why, and the value."""
    list_errors = getattr(error, "errors", None)
    if not callable(list_errors):
        return shorten(str(error) or type(error).__name__)
    found = list_errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}, got {shown(found.get('input'))}"


def _merge(base: dict, override: dict) -> dict:
    merged = dict(base)
    for key, value in override.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def _overlaps_reduction(config: Config, runtime: Runtime, zero_stage: int) -> bool:
    """Returns whether ZeRO sums gradients over ranks beside the backward pass.

    Under ZeRO 1 and 2 that costs waits of the host for the whole device in every backward pass. Where a backbone is
    trained the overlap is worth them; beside a confidence net they would wait for the next batch's frozen backbone,
    which runs ahead on a stream of its own. ZeRO 3 waits for no more with it than without.
    """
    if runtime.device.type != "cuda" or runtime.world_size == 1:
        return False
    return config.trains_backbone or zero_stage == 3


def deepspeed_config(config: Config, runtime: Runtime, precision: str) -> dict[str, Any]:
    """Returns the DeepSpeed configuration of a run, with the keys of ``--deepspeed_config`` on top.

    Mixed precision is autocast: parameters and BatchNorm statistics stay float32, and gradients are reduced in float32
    (``lower_precision_safe_modules``), so that every ZeRO stage trains the same.
    """
    zero_stage = config.zero_stage_on(runtime.world_size)
    generated: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size
        // (runtime.world_size * config.gradient_accumulation_steps),
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,  # DeepSpeed clips at 1.0 when the key is absent
        "zero_allow_untested_optimizer": True,  # SGD is elementwise, so it is safe on ZeRO's flat partitions
        # The bucket is allocated whole, twice with overlap: DeepSpeed's default of 500 million values would take more
        # than the network.
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": _overlaps_reduction(config, runtime, zero_stage),
            "reduce_bucket_size": 50_000_000,
        },
        # On by default, and then the host waits for all of the device's streams twice a step: nothing overlaps. The
        # run's own clock has the throughput.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if config.offload_optimizer != "none":
        generated["zero_optimization"]["offload_optimizer"] = {
            "device": config.offload_optimizer,
            "pin_memory": runtime.device.type == "cuda",
        }
        generated["zero_force_ds_cpu_optimizer"] = False  # torch's fused Adam works there too, without a compiler
    if precision != "fp32":
        generated["torch_autocast"] = {
            "enabled": True,
            "dtype": dtype_name(PRECISION_DTYPES[precision]),
            "lower_precision_safe_modules": [],
        }
    return _merge(generated, load_deepspeed_config(config.deepspeed_config)) if config.deepspeed_config else generated
