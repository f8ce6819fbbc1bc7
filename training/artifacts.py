"""What is trained once and kept: recipes, hashes, directories made by one process at a time."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from models import distributed
from models.errors import InputError, nearest
from training import checkpoints
from training.datasets import identity


def cached(final: pathlib.Path, make: Callable[[pathlib.Path, pathlib.Path], None]) -> pathlib.Path:
    """`final`, made by one process at a time where it is missing.

    `make(work, result)` fills the directory `result`, which is then renamed; what it leaves in
    the directory `work` is there again when it was killed and another process takes over. Of
    several processes of one job all make it together, and what the first one wrote is kept.
    """
    # The lock's own directory stays: removing it would race with a process about to open it.
    held = final.parent / ".work" / final.name
    work, result = held / "work", held / "result"
    _, index = distributed.processes()
    own = held / f"result.{index}" if index else result  # so that makers need not know

    def keep() -> None:
        with checkpoints.disk_errors("cannot keep the result", final.parent):
            result.rename(final)
        shutil.rmtree(work, ignore_errors=True)

    if not distributed.first(final.exists):
        with checkpoints.lock(held, wait=True):
            if not distributed.first(final.exists):
                shutil.rmtree(own, ignore_errors=True)
                make(work, own)
                distributed.barrier("made")  # another process may still read the work directory
                distributed.first(keep)
                if own != result:
                    shutil.rmtree(own, ignore_errors=True)
    return final


def digest(described: Mapping[str, Any]) -> str:
    """A name for what `described`, anything JSON can hold, says.

    Whether state is split over devices (`TrainConfig.fsdp`) is no part of it.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: kept(inner) for name, inner in value.items() if name != "fsdp"}
        return [kept(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return hashlib.sha256(json.dumps(kept(described), sort_keys=True).encode()).hexdigest()[:16]


def content_hash(directory: pathlib.Path) -> str:
    """A hash of a model directory's config and weights."""
    weights = sorted(path.name for path in directory.glob("*.safetensors"))
    return identity.digest_files((name, directory / name) for name in ("config.json", *weights))


def replace_fields(holder: Any, changes: Mapping[str, Any], inside: str = "") -> Any:
    """A copy of a dataclass with dotted fields changed, each level checked as a whole.

    Raises:
      InputError: an unknown field (of the holder called `inside`), naming the nearest.
    """
    known = [field.name for field in dataclasses.fields(holder)]
    here: dict[str, Any] = {}
    deeper: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        field, _, rest = path.partition(".")
        if field not in known or (rest and not dataclasses.is_dataclass(getattr(holder, field))):
            raise InputError(f"overrides: no field {inside + path!r}{nearest(field, known)}")
        if rest:
            deeper.setdefault(field, {})[rest] = value
        else:
            here[field] = value
    for field, inner in deeper.items():
        here[field] = replace_fields(getattr(holder, field), inner, f"{inside}{field}.")
    return dataclasses.replace(holder, **here)
