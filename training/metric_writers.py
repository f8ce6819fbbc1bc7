"""Metric writers: the log, TensorBoard event files and `metrics.jsonl`, behind clu's interface."""

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import clu
import numpy as np
from absl import logging

# `clu.metric_writers/__init__.py` imports TensorFlow for a writer that is not used here, and
# TensorFlow is no dependency: where it is missing, a bare package takes that file's place.
if "clu.metric_writers" not in sys.modules and importlib.util.find_spec("tensorflow") is None:
    _package = types.ModuleType("clu.metric_writers")
    _package.__path__ = [f"{path}/metric_writers" for path in clu.__path__]
    _package.__spec__ = importlib.machinery.ModuleSpec("clu.metric_writers", None, is_package=True)
    sys.modules["clu.metric_writers"] = clu.metric_writers = _package

# tensorboardX imports torch where it is installed, two seconds for a type annotation.
_hiding_torch = "torch" not in sys.modules
if _hiding_torch:
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    if _hiding_torch:
        del sys.modules["torch"]

from clu.metric_writers import (  # noqa: E402
    async_writer,
    interface,
    logging_writer,
    multi_writer,
)

METRICS_FILE = "metrics.jsonl"
Scalars = Mapping[str, interface.Scalar]
Arrays = Mapping[str, interface.Array]


class TensorBoardWriter(interface.MetricWriter):
    """Writes TensorBoard event files with tensorboardX, on the calling thread."""

    def __init__(self, directory: str | os.PathLike[str], *, first_step: int = 0) -> None:
        """Begins a new event file.

        Args:
          directory: where event files lie; those of earlier runs stay.
          first_step: TensorBoard drops what earlier files hold from this step on.
        """
        path = pathlib.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        # Two files begun in one second would otherwise share a name.
        unique = f".{os.getpid()}.{len(list(path.glob('events.*')))}"
        self._writer = EventsWriter(str(path / "events"), unique)
        if first_step:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=first_step, session_log=start))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._write(Event(step=step, summary=summary.scalar(name, np.asarray(value))))

    def write_images(self, step: int, images: Arrays) -> None:
        """Images [H, W, C] or [N, H, W, C]; uint8 in 0..255, or floats in 0..1."""
        for name, image in images.items():
            array = np.asarray(image)
            for index, one in enumerate(array if array.ndim == 4 else [array]):
                tag = f"{name}/{index}" if array.ndim == 4 else name
                written = summary.image(tag, one, dataformats="HWC")
                self._write(Event(step=step, summary=written))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._write(Event(step=step, summary=summary.text(name, text)))

    def write_histograms(
        self, step: int, arrays: Arrays, num_buckets: Mapping[str, int] | None = None
    ) -> None:
        for name, array in arrays.items():
            buckets = (num_buckets or {}).get(name, 30)
            counted = summary.histogram(name, np.asarray(array), bins=buckets)
            self._write(Event(step=step, summary=counted))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Flat hyperparameters: strings, booleans and numbers; anything else as its text."""
        plain = {
            name: value if isinstance(value, str | bool | int | float) else str(value)
            for name, value in hparams.items()
        }
        for written in summary.hparams(plain, {}):
            self._write(Event(summary=written))

    def _unsupported(self, *args: Any, **kwargs: Any) -> None:
        logging.log_first_n(
            logging.WARNING, "TensorBoardWriter: raw summaries, videos and audio are left out", 1
        )

    write_summaries = write_videos = write_audios = _unsupported

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class JsonLinesWriter(interface.MetricWriter):
    """Appends scalars to a file, one JSON object a line: `{"step": 10, "loss": 2.5}`.

    Numbers are written so that they read back bit for bit (float32 included). Everything that
    is not a scalar is left to the other writers.
    """

    def __init__(self, path: str | os.PathLike[str], *, first_step: int = 0) -> None:
        """Opens the file, dropping lines of `first_step` and later, which will come again."""
        self._path = pathlib.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [line for line in read_metrics(self._path) if line["step"] < first_step]
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
            with temporary.open("w") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        self._file = self._path.open("a")

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        values = {name: np.asarray(value).item() for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    write_summaries = write_images = write_videos = write_audios = _ignore
    write_texts = write_histograms = write_hparams = _ignore

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a killed process left half is dropped."""
    lines = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def create_writer(
    workdir: str | os.PathLike[str], *, first_step: int = 0, silent: bool = False
) -> interface.MetricWriter:
    """The writer of a run: log, `workdir/tensorboard` and `workdir/metrics.jsonl`.

    Values are written by a background thread, in order; `flush` waits for it. An error there is
    raised by the next call.

    Args:
      workdir: of the run, created where missing.
      first_step: what earlier runs wrote at this step and later is dropped: a resumed run
        passes the step it goes on with, so that its curve has no duplicates.
      silent: write nothing, as all processes of a run but the first.
    """
    if silent:
        return multi_writer.MultiWriter([])
    workdir = pathlib.Path(workdir)
    writers = [
        logging_writer.LoggingWriter(),
        TensorBoardWriter(workdir / "tensorboard", first_step=first_step),
        JsonLinesWriter(workdir / METRICS_FILE, first_step=first_step),
    ]
    return async_writer.AsyncWriter(multi_writer.MultiWriter(writers))
