"""Adapters trained at one granularity against adapters trained at any: accuracy over reduction."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from decoding.dynamic_vocabulary import merging
from experiments import results
from experiments.dynamic_parts import Setting
from models import files
from models.lora import LoraConfig
from training import artifacts, granularity, merged_classifier, optimizers, passages
from training.fitting import TrainConfig
from training.granularity import Granularity
from training.merged_classifier import Reader, Task


def measure(setting: Setting, config: ConfigDict) -> dict[str, Any]:
    """Trains the arms of `config.adapters` and scores each over granularities.

    An arm is a label, a provider and a granularity; the budget of a fixed one is given as a share
    of the relative reduction. Runs are kept by a hash of all that determines them.
    """
    how = config.adapters
    cut = {"characters": how.characters, "seed": config.seed}
    learn = passages.of_packages(
        setting.splits[config.data.train_split], how.packages, most=how.train_passages, **cut
    )
    held = [document for split in config.data.splits for document in setting.splits[split]]
    test = passages.of_packages(held, how.packages, most=how.test_passages, **cut)
    train = TrainConfig(
        setting.model,
        optimizers.from_fields(**how.optimizer),
        num_steps=how.num_steps,
        batch_size=how.batch_size,
        sequence_length=how.tokens,
        checkpoint_every=how.num_steps,
        seed=config.seed,
    )

    def reader(provider: str, capacity: int) -> Reader:
        tokens = lambda text: [setting.source.tokens[i] for i in setting.source.encode(text)]  # noqa: E731
        cache = setting.cache(provider, capacity)()
        return Reader(tokens, setting.valid, cache, length=how.tokens, side=how.side)

    plain = reader("fvt", 10_000)
    sample = learn[: how.curve_batches * how.batch_size]
    lengths = granularity.curve(
        [
            plain.tokens([p.text for p in sample[at : at + how.batch_size]])
            for at in range(0, len(sample), how.batch_size)
        ],
        setting.valid,
    )
    budgets = [merging.merges_for(lengths, lengths[-1], share) for share in how.shares]
    found: dict[str, Any] = {"lengths": lengths, "classes": list(how.packages), "arms": {}}
    found["passages"] = {"train": len(learn), "test": len(test)}
    for arm in how.arms:
        if arm.provider not in setting.providers:
            logging.warning("%s: there is no provider %r", arm.label, arm.provider)
            continue
        fixed = merging.merges_for(lengths, lengths[-1], arm.share)
        law = Granularity(arm.kind, merges=fixed, bins=how.bins, full=how.full)
        task = Task(
            len(how.packages), LoraConfig(**how.lora), law, how.pooling, how.side, how.capacity
        )
        identity = {"provider": setting.identities[arm.provider], "passages": _digest(learn)}
        run = {"train": dataclasses.asdict(train), "task": dataclasses.asdict(task), **identity}
        done = merged_classifier.train(
            train, task, setting.params, reader(arm.provider, how.capacity), learn,
            granularity.bins_of(lengths, law),
            workdir=files.cache_root() / "merged_adapters" / artifacts.digest(run),
            identity=identity, description=arm.label,
        )  # fmt: skip
        scores = merged_classifier.evaluate(
            train, task, setting.params, done.state.params,
            functools.partial(reader, arm.provider, how.evaluation_capacity), test, budgets,
        )  # fmt: skip
        at = merging.reductions([score.length for score in scores], scores[-1].length)
        found["arms"][arm.label] = [
            {**dataclasses.asdict(score), "relative": r.relative, "absolute": r.absolute}
            for score, r in zip(scores, at, strict=True)
        ]
        logging.info("%s: %s", arm.label, [f"{score.accuracy:.3f}" for score in scores])
    return found


def _digest(learn: Sequence[passages.Passage]) -> str:
    return artifacts.digest({"passages": [tuple(passage) for passage in learn]})


def summarise(
    found: Mapping[str, Any], config: ConfigDict
) -> tuple[dict[str, Any], list[results.Claim]]:
    """A chart, and what is claimed of granularities that are sampled."""
    how = config.adapters
    arms = found["arms"]
    chart = {
        "title": "Accuracy of adapters over granularity",
        "x_label": "relative reduction",
        "y_label": "accuracy",
        "series": [
            {
                "label": label,
                "x": [p["relative"] for p in points],
                "y": [p["accuracy"] for p in points],
            }
            for label, points in arms.items()
        ],
    }
    spread = {
        label: max(p["accuracy"] for p in points) - min(p["accuracy"] for p in points)
        for label, points in arms.items()
    }
    claims = []
    for sampled, fixed in _known(how.flatter, arms):
        claims.append(
            results.at_least(
                f"adapters: spread of accuracy, {fixed} less {sampled}",
                spread[fixed] - spread[sampled], 0.0,
            )
        )  # fmt: skip
    for better, worse in _known(how.better_at_word_level, arms):
        claims.append(
            results.at_least(
                f"adapters: accuracy at word level, {better} less {worse}",
                arms[better][-1]["accuracy"] - arms[worse][-1]["accuracy"], 0.0,
            )
        )  # fmt: skip
    for (label,) in _known([(label,) for label in how.keeps], arms):
        points = arms[label]
        claims.append(
            results.at_least(
                f"adapters: {label}, accuracy at word level ({points[-1]['absolute']:.0%} shorter) "
                "less that of no merges",
                points[-1]["accuracy"] - points[0]["accuracy"], -0.02,
            )
        )  # fmt: skip
    return {"adapters": chart}, claims


def _known(groups: Sequence[Sequence[str]], arms: Mapping[str, Any]) -> list[Sequence[str]]:
    """Those whose arms were all trained."""
    return [group for group in groups if all(label in arms for label in group)]
