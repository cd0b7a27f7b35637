"""The line that a run ends with: what it has done, and where its time went."""

import logging
from collections.abc import Mapping

from tqdm import tqdm

from scf_fast.engine.dropped import Dropped
from scf_fast.run.timing import Breakdown, rate_text

log = logging.getLogger(__name__)

_COUNT_NAMES = {
    Dropped.LOSS: "skipped_not_finite",
    Dropped.GRADIENT: "skipped_gradient_not_finite",
    Dropped.LOSS_SCALE: "skipped_by_loss_scale",
}


def log_summary(
    *,
    step: int,
    steps: int,
    stopped_by: str | None,
    dropped: Mapping[Dropped, int],
    broken_images: int,
    seconds: float,
    images_per_step: float,
    flop_per_image: int,
    peak_flops: float | None,
    clock: Breakdown,
    communication: float | None,
) -> None:
    """Logs the summary of a run, for people and as an event.

    Args:
        step: that the run has come to; ``steps`` of them since its start or resume, in ``seconds``.
        stopped_by: name of the signal that ended it; None at its end.
        dropped: steps that changed no weight, by their reason.
        broken_images: of all ranks.
        peak_flops: FLOP a second of all devices by their data sheet; None where it is not known.
        clock: where the time went.
        communication: share of a step; None where it was not measured.
    """
    counts = {"steps": steps, **{name: dropped[reason] for reason, name in _COUNT_NAMES.items()}}
    counts["broken_images"] = broken_images
    lost = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and name != "steps"]
    rate = steps * images_per_step / seconds
    flops = rate * flop_per_image
    share = flops / peak_flops if peak_flops else None
    log.info(
        "%s: %d steps in %s, %s img/s%s%s; %s%s",
        f"stopped by {stopped_by} after step {step}, --resume continues" if stopped_by else "done",
        steps,
        tqdm.format_interval(seconds),
        rate_text(rate),
        "" if share is None else f" ({100 * share:.0f} % of the device's peak)",
        "".join(f"; {', '.join(lost)}" if lost else ""),
        clock,
        "" if communication is None else f"; communication {100 * communication:.0f} % of a step, partly beside these",
        extra={
            "event": "stopped" if stopped_by else "done",
            "step": step,
            "counts": counts,
            "seconds": {part: round(value, 3) for part, value in clock.seconds.items()},
            "rates": {
                "images_per_second": rate,
                "flops": flops,
                "share_of_peak": share,
                "communication": communication,
            },
        },
    )
