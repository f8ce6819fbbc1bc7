"""Where things that can be made again are kept, and files written whole or not at all."""

import os
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """`TOKENLOOM_CACHE`, else ~/.cache/tokenloom: datasets, trained models, compiled programs."""
    return Path(os.environ.get("TOKENLOOM_CACHE") or "~/.cache/tokenloom").expanduser()


def write_text(path: Path, text: str) -> None:
    """Writes `path` so that it holds the old text or the new one, whatever fails; OSError does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
