"""Training after a tokeniser was exchanged: from several starts, and on a variant of the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import results, transfer_parts
from experiments.transfer_parts import HYPERNETWORK, Setting
from models import files, token_tables
from models.tokenizer import Tokenizer
from training import (
    batches,
    hypernetwork_recipes,
    metric_writers,
    retokenized,
    tokenizer_transfer,
)
from training.fitting import TrainConfig
from training.hypernetwork_losses import BaseModel

Found = dict[str, Any]


def n_shot(setting: Setting) -> Found:
    """Section 6.10: training that goes on from the hypernetwork's start and from heuristics'."""
    how = setting.config.n_shot
    form = setting.form(how.target)
    curves: dict[str, dict[str, list[float]]] = {}
    for arm in (HYPERNETWORK, *how.heuristics):
        swapped = setting.swap(form, arm)
        predicting = None
        if arm == HYPERNETWORK:
            predicting = retokenized.Predicting(
                *setting.hypernetwork,
                source=setting.base.source,
                surfaces=tokenizer_transfer.surfaces_of(
                    setting.base, form, setting.hypernetwork[0]
                ).ids,
                specials=np.array(sorted(form.specials.values()), np.int32),
            )
        start = setting.measure(swapped).bits_per_byte
        directory = setting.workdir / "n_shot" / arm
        _continue(setting, swapped, how, directory, predicting)
        lines = metric_writers.read_metrics(directory / metric_writers.METRICS_FILE)
        at = [(line["step"], line["eval_bits_per_byte"]) for line in lines if "eval_loss" in line]
        curves[arm] = {
            "x": [0.0, *(float(step) for step, _ in at)],
            "y": [start, *(bits for _, bits in at)],
        }
    mine = curves[HYPERNETWORK]
    own = setting.measure(setting.base).bits_per_byte
    claims = []
    for arm in how.heuristics:
        ahead = np.array(curves[arm]["y"]) - np.array(mine["y"])
        claims.append(
            results.at_least(
                f"n-shot on {how.target}: bits a byte of {arm} less the hypernetwork's, least over "
                "the curve",
                float(ahead.min()),
                0.0,
            )
        )
    claims.append(
        results.at_least(
            "share of the zero-shot gap that training on closes",
            (mine["y"][0] - mine["y"][-1]) / max(mine["y"][0] - own, 1e-9),
            0.3,
        )
    )
    figure = {
        "title": f"Training goes on in {how.target}",
        "x_label": f"steps of {how.batch_size} x {how.sequence_length} tokens",
        "y_label": "bits a byte",
        "series": [{"label": arm, **curve} for arm, curve in curves.items()],
    }
    return {"curves": curves, "claims": claims, "figures": {"n-shot": figure}}


def _continue(
    setting: Setting,
    model: BaseModel,
    how: ConfigDict,
    directory: Path,
    predicting: retokenized.Predicting | None = None,
    dataset: str = "",
    dataset_options: Mapping[str, Any] | None = None,
) -> Any:
    """Parameters after further training in the model's tokeniser."""
    data = setting.config.data
    chosen = dataset or data.dataset
    options = data.dataset_options.to_dict() if not dataset else dict(dataset_options or {})
    rate = how.rate if predicting is not None else how.get("heuristic_rate", how.rate)
    config = TrainConfig(
        model=model.config,
        optimizer=retokenized.optimizer(rate),
        num_steps=how.steps,
        batch_size=how.get("batch_size", 8),
        sequence_length=how.get("sequence_length", 64),
        compute_dtype=how.get("compute_dtype", "float32"),
        log_every=max(1, how.steps // 10),
        eval_every=how.get("eval_every", how.steps),
        checkpoint_every=how.steps,
        seed=setting.config.seed,
    )
    tokenizer = Tokenizer(model.form.backend, model.config)
    source = batches.TokenizedDocuments(
        transfer_parts.documents(chosen, data.train_split, options), tokenizer
    )

    def evaluate(params: Any) -> dict[str, float]:
        bits = setting.measure(model._replace(params=params)).bits_per_byte
        return {"eval_loss": bits, "eval_bits_per_byte": bits}

    return retokenized.train(
        config,
        model.params,
        train_batches=batches.train_batches(
            source,
            batch_size=config.batch_size,
            seq_len=config.sequence_length,
            seed=config.seed,
        ),
        evaluate=evaluate if not dataset else None,
        workdir=directory,
        predicting=predicting,
        identity={"dataset": chosen, "options": options, "start": setting.identity},
        description=f"n-shot: {directory.name}",
    )


def variant(setting: Setting) -> Found:
    """Section 6.11: a fine-tuned model takes over the tables that its base was given."""
    how = setting.config.variant
    form, data = setting.form(how.target), setting.config.data
    if how.directory:
        directory = hypernetwork_recipes.resolve(how.directory, files.cache_root())
        tuned = hypernetwork_recipes.load_base(directory, setting.config.pre_tokenization).params
        dataset, options = data.dataset, data.dataset_options.to_dict()
    else:
        dataset, options = how.dataset, how.dataset_options.to_dict()
        place = setting.workdir / "variant"
        tuned = _continue(setting, setting.base, how, place, None, dataset, options)
    texts = transfer_parts.windows(
        dataset, data.split, options, count=data.windows, characters=data.characters,
        seed=setting.config.seed,
    )  # fmt: skip
    swapped = setting.swap(form, HYPERNETWORK)
    rows = {
        "base": setting.measure(setting.base, texts).bits_per_byte,
        "variant": setting.measure(setting.base._replace(params=tuned), texts).bits_per_byte,
        "base, swapped": setting.measure(swapped, texts).bits_per_byte,
    }
    for share in how.shares:
        params = token_tables.transfer_to_variant(setting.base.params, swapped.params, tuned, share)
        moved = setting.measure(swapped._replace(params=params), texts)
        rows[f"variant, swapped, lambda {share:g}"] = moved.bits_per_byte
    label = f"variant, swapped, lambda {how.shares[0]:g}"
    claim = results.at_least(
        f"{dataset}: bits a byte of the swapped base less the swapped variant's",
        rows["base, swapped"] - rows[label],
        0.0,
    )
    return {"bits_per_byte": rows, "claims": [claim], "figures": {}}
