"""Output of a run: log lines, progress bar, metrics, TensorBoard, and one JSON line for every event."""

import json
import logging.handlers
import re
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from scf_fast.command import LineFormatter
from scf_fast.distributed import Runtime
from scf_fast.run.line_files import LineHandler, StepLines, forget_after
from scf_fast.run.timing import rate_text

log = logging.getLogger(__name__)

LOG_FILE, EVENTS_FILE, METRICS_FILE = "log.txt", "events.jsonl", "metrics.jsonl"
_NOT_SHOWN = re.compile(r"(^|/)(neg_|log_iv)|_p\d\d$")  # in the log's lines
_LINE_SECONDS = 10.0  # between log lines where there is no progress bar
_EXTRA = ("step", "images", "seconds", "counts", "rates", "signal")


class _EventHandler(LineHandler):
    """Writes every log record as a JSON object: time (seconds since 1970), level, event, message, and the fields of
    ``_EXTRA`` that the record has.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "event": getattr(record, "event", "log"),
            "message": record.getMessage(),
            **{key: getattr(record, key) for key in _EXTRA if hasattr(record, key)},
        }
        if record.exc_info:
            fields["error"] = repr(record.exc_info[1])
        return json.dumps(fields)


# Holds what is logged before the run's folder is there.
_early = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)


def set_up_logging(is_main: bool) -> None:
    """Sends log lines to stderr; from the other ranks errors alone, what they know of broken images, and whom they wait
    for.
    """
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setFormatter(LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    # A full disk must not fill the terminal with tracebacks of lines it could not take.
    logging.raiseExceptions = False
    _early.buffer.clear()
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=level, force=True, handlers=[to_terminal, _early])
    for speaker in ("scf_fast.pipelines.loading.broken", "scf_fast.distributed"):
        logging.getLogger(speaker).setLevel(logging.INFO if is_main else logging.WARNING)


def log_to_files(folder: Path) -> None:
    """Writes what has been logged, and will be, into the run's files too."""
    root = logging.getLogger()
    for handler in (LineHandler(folder / LOG_FILE), _EventHandler(folder / EVENTS_FILE)):
        handler.setFormatter(root.handlers[0].formatter)
        for record in _early.buffer:
            handler.handle(record)
        root.addHandler(handler)
    root.removeHandler(_early)


def _note_end_of_thread(died: threading.ExceptHookArgs) -> None:
    """Leaves out the traceback where TensorBoard's writing thread ends: its next value says why, in one line."""
    if not type(died.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(died)


class Reporter:
    """Shows and stores the progress of a run on the main rank; silent on the others."""

    def __init__(
        self, folder: Path, runtime: Runtime, total_images: int, done_images: int, first_step: int, tensorboard: bool
    ):
        self.is_main = runtime.is_main
        self._started, self._start_images, self._done, self._total = (
            time.monotonic(),
            done_images,
            done_images,
            total_images,
        )
        if not self.is_main:
            return
        forget_after(folder / METRICS_FILE, first_step)
        self._metrics = StepLines(folder / METRICS_FILE)
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _note_end_of_thread
            self._writer = SummaryWriter(str(folder / "runs"), purge_step=first_step + 1)
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_images,
            initial=done_images,
            unit="img",
            unit_scale=True,
            smoothing=0.1,
            dynamic_ncols=True,
            disable=not self._interactive,
        )
        self._last_line = 0.0

    @property
    def images_per_second(self) -> float:
        """Rate since the start of this run, time for checkpoints included."""
        return (self._done - self._start_images) / max(time.monotonic() - self._started, 1e-9)

    def advance(self, images: int) -> None:
        self._done += images
        if self.is_main:
            self._bar.update(images)

    def metrics(self, step: int, values: dict[str, float], rate: float, distributions: dict[str, torch.Tensor]) -> None:
        """Reports one log point: the step's means over ranks, its learning rate and, in stage 2, kappa or precision of
        this rank's images.
        """
        if not self.is_main:
            return
        for name, distribution in distributions.items():
            distribution = distribution.float()
            quantiles = torch.quantile(distribution, distribution.new_tensor([0.05, 0.5, 0.95])).tolist()
            values.update({f"{name}_p{share}": value for share, value in zip(("05", "50", "95"), quantiles)})
        speed = self.images_per_second
        record = {"step": step, **values, "lr": rate, "images_per_second": speed}
        self._metrics.add(record)
        self._to_tensorboard(step, record, distributions)
        shown = {name: f"{value:.4g}" for name, value in values.items() if not _NOT_SHOWN.search(name)}
        shown["lr"] = f"{rate:.3g}"
        self._bar.set_postfix(shown, refresh=False)
        if not self._interactive and (time.monotonic() - self._last_line > _LINE_SECONDS or self._done == self._total):
            self._last_line = time.monotonic()
            left = (self._total - self._done) / max(speed, 1e-9)
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            log.info(
                "step %d  %3.0f %%  %s img/s  %s left  %s",
                step,
                100 * self._done / self._total,
                rate_text(speed),
                tqdm.format_interval(left),
                text,
                extra={"event": "progress", "step": step},
            )

    def _to_tensorboard(self, step: int, record: dict, distributions: dict[str, torch.Tensor]) -> None:
        if not self._writer:
            return
        try:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)
            for name, distribution in distributions.items():
                owner, slash, quantity = name.rpartition("/")
                self._writer.add_histogram(f"{owner}{slash}log_{quantity}", distribution.float().log(), step)
        except Exception as error:  # what its writing thread died of, as a rule a full disk
            log.warning("TensorBoard files end here (%s); %s goes on", str(error).splitlines()[0], METRICS_FILE)
            self._writer = None

    def sync(self) -> None:
        """Waits until metrics and log are on the disk: they belong to a checkpoint."""
        if self.is_main:
            self._metrics.sync()
            for handler in logging.getLogger().handlers:
                if isinstance(handler, LineHandler):
                    handler.sync()

    def close(self) -> None:
        if self.is_main:
            self._bar.close()
            self._metrics.close()
            if self._writer:
                self._writer.close()
