"""Traces of decoding calls that TensorBoard's profiler (XProf) and Perfetto open.

Only warm calls are traced: what they need is compiled before. docs/performance.md says how to read
a trace of a decoding loop.
"""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from models.errors import InputError

_NAMES_IN_KEY = "jax_compilation_cache_include_metadata_in_key"
_directory: contextvars.ContextVar[Path | None] = contextvars.ContextVar("profile", default=None)


@contextlib.contextmanager
def asked(directory: Path | None) -> Iterator[None]:
    """While this lasts, the first calls that `trace_once` is given are traced into `directory`.

    With None nothing is.
    """
    if directory is None:
        yield
        return
    # A cached program has the names that the code had when it was compiled.
    before = getattr(jax.config, _NAMES_IN_KEY)
    jax.config.update(_NAMES_IN_KEY, True)
    token = _directory.set(directory)
    try:
        yield
        if _directory.get() is not None:
            logging.warning("profile: nothing was traced, since nothing that is timed was run")
    finally:
        _directory.reset(token)
        jax.config.update(_NAMES_IN_KEY, before)


def trace_once(runs: Mapping[str, Callable[[], Any]]) -> None:
    """Traces one call of each, into a directory of its name; later calls of this trace nothing.

    Args:
      runs: what to call, by name; each must have been called before, and wait for its own result.
    """
    directory = _directory.get()
    if directory is None:
        return
    _directory.set(None)
    for name, run in runs.items():
        trace(directory / (re.sub(r"[^\w.=-]+", "_", name) or "run"), run)


def trace(directory: Path, run: Callable[[], Any]) -> None:
    """Traces one call. Raises InputError when `directory` cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"profile: cannot write to {directory} ({error.strerror})") from None
    with jax.profiler.trace(str(directory)):
        run()
