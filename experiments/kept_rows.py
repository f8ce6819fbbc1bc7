"""The rows of a long generation, kept as they come, so that one that was stopped goes on.

`WORKDIR/rows.jsonl` has one JSON object a row, in order. A run appends the rows of a batch when it
is done; one that is started again answers what is not there yet.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from models import distributed, files
from training import checkpoints

FILE = "rows.jsonl"


@dataclasses.dataclass(frozen=True)
class KeptRows:
    """What was there when the directory was opened, and where more goes.

    Attributes:
      lines: in every process of a job, those that are whole.
      file: the first process appends to it; None in the others, and where nothing is kept.
    """

    lines: list[str]
    file: TextIO | None

    def append(self, lines: Sequence[str]) -> None:
        """Keeps further rows, which are on the disk on return.

        Raises:
          InputError: the disk is full, or another system call failed.
        """
        if self.file is None:
            return
        with checkpoints.disk_errors("cannot write rows", self.file.name):
            self.file.write("".join(line + "\n" for line in lines))
            self.file.flush()
            os.fsync(self.file.fileno())


@contextlib.contextmanager
def opened(
    workdir: str | os.PathLike[str] | None, settings: Mapping[str, Any], batch_size: int, rows: int
) -> Iterator[KeptRows]:
    """Holds `workdir` and says what it has.

    Args:
      workdir: created where missing; None to keep nothing.
      settings: everything that determines the rows, as JSON can hold it.
      batch_size: rows that are decoded together: of an incomplete batch nothing is taken over.
      rows: how many there will be in all.

    Raises:
      InputError: a directory that is in use, or has rows of other settings.
    """
    if workdir is None:
        yield KeptRows([], None)
        return
    path = Path(workdir) / FILE
    with checkpoints.lock(workdir), contextlib.ExitStack() as stack:
        checkpoints.claim(workdir, settings)

        def read() -> list[str]:
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            whole = len(lines) if len(lines) >= rows else len(lines) // batch_size * batch_size
            with checkpoints.disk_errors("cannot write rows", path):
                files.write_text(path, "".join(line + "\n" for line in lines[:whole]))
            return lines[:whole]

        lines = distributed.first(read)
        file = stack.enter_context(path.open("a")) if distributed.is_first() else None
        yield KeptRows(lines, file)
