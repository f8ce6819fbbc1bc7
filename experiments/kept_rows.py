"""The rows of a long generation: shared out over processes, and kept so that it can go on.

`WORKDIR/rows.jsonl` has one JSON object a row, in order. A run appends the rows of a batch when it
is done; one that is started again answers what is not there yet.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jax.sharding import Mesh

from models import distributed, files
from training import checkpoints, loop

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


def rounds(
    numbers: Sequence[list[int]],
    begun: int,
    decode: Callable[[list[int]], list[dict[str, Any]]],
    mesh: Mesh | None,
    kept: KeptRows,
) -> Iterator[tuple[int, str]]:
    """Decodes and keeps batches; yields (row number, row as JSON) in order, in the first process.

    In a round each process decodes a batch of its own, and hands its rows to all. On a mesh of
    several processes all of them decode the same batch together.

    Args:
      numbers: row numbers of each batch.
      begun: the batch to begin with.
      decode: from row numbers to rows as JSON can hold them, a repeated one left out.
      mesh: that it decodes on; None for a device of its own.
      kept: where rows go.

    Raises:
      SystemExit: `training.loop.TERMINATED`, when one of several processes was sent SIGTERM.
    """
    together = mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1
    count, index = distributed.processes()
    count, index = (1, 0) if together else (count, index)
    for start in range(begun, len(numbers), count):
        own = numbers[start + index] if start + index < len(numbers) else None
        text = "\n".join(map(json.dumps, decode(own))) if own else ""
        shares = [text] if together else distributed.gather(text)
        lines = [line for share in shares for line in share.split("\n") if line]
        if distributed.is_first():
            kept.append(lines)
            yield from enumerate(lines, start=numbers[start][0])
        if distributed.preempted():
            raise SystemExit(loop.TERMINATED)
