"""The checkout as a package: what git knows of it and does not ignore, and which revision it is.

A run that is launched elsewhere, or later, must not see edits made meanwhile. So launchers copy the
files first; `REVISION` beside them lets results name the commit where there is no git.
"""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from experiments import results
from models.errors import InputError

ROOT = Path(__file__).parents[1]


def files(root: Path = ROOT) -> list[Path]:
    """Files of a checkout, relative to it, in order: tracked ones and new ones not ignored.

    Raises:
      InputError: `root` is no git checkout.
    """
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise InputError(f"checkout: {root} is no git checkout; launch from one") from None
    names = sorted(set(filter(None, listed.split("\0"))))
    return [Path(name) for name in names if (root / name).is_file()]  # a deleted one is listed too


def snapshot(destination: Path, root: Path = ROOT) -> None:
    """Copies the checkout into `destination`, which is emptied first."""
    names = files(root)
    if destination.exists():
        shutil.rmtree(destination)
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, destination / name)
    (destination / results.REVISION_FILE).write_text(results.git_revision() + "\n")


def archive(path: Path, root: Path = ROOT) -> None:
    """Writes the checkout as a .tar.gz."""
    names = files(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    revision = (results.git_revision() + "\n").encode()
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            tar.add(root / name, arcname=str(name))
        entry = tarfile.TarInfo(results.REVISION_FILE)
        entry.size = len(revision)
        tar.addfile(entry, io.BytesIO(revision))


def inside(argument: str, root: Path = ROOT) -> str | None:
    """A config argument FILE[:PRESET] as a copy of the checkout has it; None if it is outside."""
    file, colon, preset = argument.partition(":")
    path = Path(file).resolve()
    if not path.is_relative_to(root.resolve()):
        return None
    return str(path.relative_to(root.resolve())) + colon + preset
