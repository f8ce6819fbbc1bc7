"""Runs an experiment from a config: trains what is missing, decodes, compares, reports.

    python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/quickstart

The work directory receives `config.json`, `results.json`, TensorBoard events and `report.html`. It
belongs to one config: another one is refused. Trained base models are cached elsewhere and shared.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from experiments import cli
from models.errors import InputError, check_choice

FLAGS = flags.FlagValues()
_CONFIG = cli.define_config(
    FLAGS, "Config file, optionally with a preset: experiments/configs/x.py:preset."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of this run's results.", flag_values=FLAGS
)
_FRESH = flags.DEFINE_bool(
    "fresh", False, "Remove results of an earlier run in --workdir first.", flag_values=FLAGS
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "Directory for a trace of one warm call of each method.", flag_values=FLAGS
)
_JOB = cli.define_cluster(FLAGS)

# What a run leaves in its work directory, and all that --fresh removes.
_OUTPUTS = (
    "config.json", "results.json", "report.html", "speed.png", "tensorboard", "metrics.jsonl",
    "images.png", "n_shot", "variant",
)  # fmt: skip


def experiments() -> dict[str, Callable[[ConfigDict, Path], dict[str, Any]]]:
    """Kinds of experiment by the name that `config.experiment` gives."""
    from experiments import (
        comparison,
        dynamic_tokenization,
        hierarchical,
        image_generation,
        image_speculation,
        lexinvariance,
        next_word,
        token_editing,
        tokenizer_transfer,
        word_encoding,
    )

    return {
        "comparison": comparison.run,
        "dynamic_tokenization": dynamic_tokenization.run,
        "hierarchical": hierarchical.run,
        "image_generation": image_generation.run,
        "image_speculation": image_speculation.run,
        "lexinvariance": lexinvariance.run,
        "next_word": next_word.run,
        "token_editing": token_editing.run,
        "tokenizer_transfer": tokenizer_transfer.run,
        "word_encoding": word_encoding.run,
    }


def execute(config: ConfigDict, workdir: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Runs the experiment of `config` in `workdir` and returns its results.

    Of several processes all do the same: they train together, each decodes on its own devices,
    and the first one writes.

    Raises:
      InputError: a work directory in use or of another config, or bad values in the config.
    """
    from experiments import report, results
    from models import distributed
    from training import checkpoints, metric_writers

    kinds = experiments()
    check_choice("config.experiment", config.experiment, kinds)
    with checkpoints.lock(workdir):
        if fresh:
            distributed.first(lambda: _remove_outputs(workdir))
        plain = json.loads(config.to_json())  # to_dict leaves configs inside tuples as they are
        checkpoints.claim(workdir, plain)
        found = results.header(config.name, plain)
        found |= kinds[config.experiment](config, workdir)
        if not distributed.is_first():
            return found
        results.write(workdir, found)
        writer = metric_writers.create_writer(workdir)
        for step, record in enumerate(found["runs"]):
            writer.write_scalars(step, results.scalars(record))
        writer.write_texts(0, {"results": report.markdown_table(found["runs"])})
        writer.close()
        report.write(workdir)
    return found


def _remove_outputs(workdir: Path) -> None:
    for name in _OUTPUTS:
        target = workdir / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise InputError(f"--{'config' if _CONFIG.value is None else 'workdir'}: missing")
    workdir = Path(_WORKDIR.value)
    with _JOB():
        from experiments import profiling
        from models import distributed

        profile = Path(_PROFILE.value) if _PROFILE.value else None
        with profiling.asked(profile):
            found = execute(_CONFIG.value, workdir, fresh=_FRESH.value)
        if distributed.is_first():
            _show(found, workdir)


def _show(found: dict[str, Any], workdir: Path) -> None:
    from experiments import records

    print(records.table(found["runs"]))
    for run in found["runs"]:
        if "quality" in run:
            print(run["label"], *(f"{name} {value:.4g}" for name, value in run["quality"].items()))
    for claim in found["claims"]:
        mark = "held" if claim.held else "NOT HELD"
        print(f"[{mark}] {claim.name}: {claim.measured:.4g} (bound {claim.bound})")
    logging.info("%.0f s in all", found["seconds"])
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
