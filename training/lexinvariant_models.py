"""Lexinvariant models, their baselines and probes by name: trained once, kept by a hash.

`ensure('prose_lexinvariant')` returns a directory with config.json, model.safetensors,
training_summary.json and, for models of text, a tokeniser: one that `experiments.generate
--method=lexinvariant` opens. The hash covers all fields of the recipe, the data's content, the
model that a probe reads, and `CODE_VERSION`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from models import decipher_probe, files
from models import random_embeddings as lex
from models.decipher_probe import DecipherProbeConfig
from models.errors import check_choice
from models.random_embeddings import LexinvariantConfig
from training import artifacts, checkpoints, lexinvariant, loop, metric_writers, symbol_data
from training import decipher_probe as probe_training
from training.base_models import SUMMARY_FILE
from training.fitting import TrainConfig
from training.lexinvariant import Cipher
from training.optimizers import AdafactorConfig, MuonConfig, OptimizerConfig
from training.symbol_data import LanguageData, TextData

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LexinvariantModel:
    """The recipe of a model.

    Attributes:
      data: what it learns.
      train: the run; the vocabulary and end of text are filled in from the data.
      cipher: see `training.lexinvariant.Cipher`.
      eval_batches: batches that an evaluation reads.
    """

    data: TextData | LanguageData
    train: TrainConfig
    cipher: Cipher = dataclasses.field(default_factory=Cipher)
    eval_batches: int = 8


@dataclasses.dataclass(frozen=True)
class ProbeModel:
    """The recipe of a probe.

    Attributes:
      model: the lexinvariant model that it reads: a recipe, whose data it learns on.
      num_steps, batch_size, sequence_length: of its training.
      optimizer: of its training.
      eval_batches: batches that an evaluation reads.
    """

    model: str
    num_steps: int = 10_000
    batch_size: int = 64
    sequence_length: int = 256
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, warmup_steps=50)
    )
    eval_batches: int = 8


def _model(
    layers: int, width: int, heads: int, *, context: int, table: str = "gaussian"
) -> LexinvariantConfig:
    return LexinvariantConfig(
        vocab_size=2,  # filled in from the data
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=4 * width,
        max_position=context,
        activation="gelu",
        gated_mlp=False,
        table=table,
    )


def _markov(table: str, steps: int, **cipher: Any) -> LexinvariantModel:
    """A language of six symbols. A plateau at ln 6 lasts for a thousand steps or more."""
    train = TrainConfig(
        model=_model(2, 32, 2, context=64, table=table),
        optimizer=MuonConfig(learning_rate=1e-2, warmup_steps=100, weight_decay=0.01),
        num_steps=steps,
        batch_size=32,
        sequence_length=32,
        log_every=100,
        eval_every=500,
        checkpoint_every=500,
    )
    return LexinvariantModel(LanguageData(), train, Cipher(**cipher))


# A tenth of the standard library's source is about as much text as its docstrings.
_PROSE = TextData("stdlib_docstrings")
_CODE = TextData("stdlib_code", train_split="train[:15%]")


def _characters(data: TextData, table: str, **cipher: Any) -> LexinvariantModel:
    """A small model of characters, the same one for every table and cipher."""
    train = TrainConfig(
        model=_model(2, 48, 2, context=512, table=table),
        optimizer=MuonConfig(learning_rate=5e-3, warmup_steps=100, weight_decay=0.01),
        num_steps=1500,
        batch_size=8,
        sequence_length=128,
        log_every=50,
        eval_every=500,
        checkpoint_every=250,
    )
    return LexinvariantModel(data, train, Cipher(**cipher))


def _published(data: TextData, table: str, **cipher: Any) -> LexinvariantModel:
    """150M parameters (12 layers, 1024 wide), Adafactor, 250k steps of 64 rows of 512 tokens."""
    train = TrainConfig(
        model=_model(12, 1024, 8, context=512, table=table),
        optimizer=AdafactorConfig(
            learning_rate=0.01, final_fraction=0.1, warmup_steps=10_000, weight_decay=0.0
        ),
        num_steps=250_000,
        batch_size=64,
        sequence_length=512,
        compute_dtype="bfloat16",
        remat=True,
        log_every=100,
        eval_every=5000,
        checkpoint_every=5000,
    )
    if data.tokens not in symbol_data.CHARACTERS:
        cipher = {"draw": "permutations", **cipher}
    return LexinvariantModel(data, train, Cipher(**cipher), eval_batches=64)


_PUBLISHED = {
    "pile": TextData("text_files", {"files": "data/pile/**/*.txt"}, tokens="ascii"),
    "github": TextData("text_files", {"files": "data/github/**/*.txt"}, tokens="ascii"),
    "wiki": TextData("wiki40b/en", tokens="ascii"),
    # With T5's tokeniser of 32k pieces one table a step serves all rows, each under a permutation.
    "pile_t5": TextData("text_files", {"files": "data/pile/**/*.txt"}, tokens="checkpoints/t5"),
}

RECIPES: dict[str, LexinvariantModel | ProbeModel] = {
    "markov_lexinvariant": _markov("gaussian", 6000),
    "markov_standard": _markov("learned", 500),
    **{
        f"markov_semi_{percent:03d}": _markov("learned", 500, permuted=percent / 100)
        for percent in (0, 20, 50, 100)
    },
    "prose_lexinvariant": _characters(_PROSE, "gaussian"),
    "prose_standard": _characters(_PROSE, "learned"),
    "prose_probe": ProbeModel(
        "prose_lexinvariant", num_steps=500, batch_size=8, sequence_length=128
    ),
    "code_lexinvariant": _characters(_CODE, "gaussian"),
    "code_standard": _characters(_CODE, "learned"),
    "prose_semi_020": _characters(_PROSE, "learned", permuted=0.2),
    # The published setting, for data of your own.
    **{
        f"{name}_{kind}": _published(data, table, **cipher)
        for name, data in _PUBLISHED.items()
        for kind, table, cipher in (
            ("lexinvariant", "gaussian", {}),
            ("standard", "learned", {}),
            ("semi_020", "learned", {"permuted": 0.2}),
        )
    },
    "pile_probe": ProbeModel("pile_lexinvariant", sequence_length=512),
}


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The recipe called `name`, with dotted fields replaced, as {'train.num_steps': 20}.

    Raises:
      InputError: an unknown name or field, naming the nearest.
    """
    check_choice("lexinvariant model", name, RECIPES)
    return artifacts.replace_fields(RECIPES[name], overrides or {})


def ensure(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """The directory of a named model or probe, which is trained first if it is not there yet.

    As `base_models.ensure`: the directory appears whole or not at all, callers wait for each
    other, and training that was killed goes on from its last checkpoint.

    Args:
      name: a key of `RECIPES`.
      cache_dir: where models and data are kept; None for `files.cache_root()`.
      overrides: see `recipe`; those of a probe prefixed with 'model_of.' are for its model.

    Raises:
      InputError: an unknown name or field; the disk is full; the loss is not finite.
      SystemExit: `training.loop.TERMINATED`, after SIGTERM.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    own, models = _split_overrides(overrides or {})
    chosen = recipe(name, own)
    parent, data = None, None
    if isinstance(chosen, ProbeModel):
        parent = ensure(chosen.model, cache_dir=cache, overrides=models)
        data = recipe(chosen.model, models).data
    else:
        data = chosen.data
    identity = {
        "recipe": dataclasses.asdict(chosen),
        "data": symbol_data.identity(data, cache),
        "model": parent and artifacts.content_hash(parent),
        "code_version": CODE_VERSION,
    }
    final = cache / "models" / f"{name}-{artifacts.digest(identity)}"

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        run = {"workdir": work / "run", "identity": identity, "description": name}
        if isinstance(chosen, ProbeModel):
            assert parent is not None
            trained = _make_probe(chosen, parent, data, cache, run, result)
        else:
            trained = _make_model(chosen, cache, run, result)
        _write_summary(name, identity, trained, work / "run", result)

    return artifacts.cached(final, make)


def _split_overrides(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    prefix = "model_of."
    models = {k.removeprefix(prefix): v for k, v in overrides.items() if k.startswith(prefix)}
    return {k: v for k, v in overrides.items() if not k.startswith(prefix)}, models


def complete(chosen: LexinvariantModel) -> LexinvariantConfig:
    """The architecture with what the data says: its vocabulary, and end of text as fixed."""
    model = chosen.train.model
    assert isinstance(model, LexinvariantConfig)
    size, ends = symbol_data.vocabulary(chosen.data)
    return dataclasses.replace(model, vocab_size=size, eos_token_ids=ends, fixed_ids=ends)


def _make_model(
    chosen: LexinvariantModel, cache: pathlib.Path, run: Mapping[str, Any], result: pathlib.Path
) -> loop.Result:
    model = complete(chosen)
    config = dataclasses.replace(chosen.train, model=model)
    train_batches, eval_batches = symbol_data.load_batches(
        chosen.data, model, cache, rows=config.batch_size, tokens=config.sequence_length,
        seed=config.seed, count=chosen.eval_batches,
    )  # fmt: skip
    trained = lexinvariant.train(
        config, chosen.cipher, train_batches=train_batches, eval_batches=eval_batches, **run
    )
    lex.save(result, model, trained.state.params)
    if isinstance(chosen.data, TextData):
        with checkpoints.disk_errors("cannot write the tokeniser", result):
            symbol_data.save_tokenizer(chosen.data, result)
    return trained


def _make_probe(
    chosen: ProbeModel,
    parent: pathlib.Path,
    data: TextData | LanguageData,
    cache: pathlib.Path,
    run: Mapping[str, Any],
    result: pathlib.Path,
) -> loop.Result:
    model, params = lex.load(parent)
    config = TrainConfig(
        model=model,
        optimizer=chosen.optimizer,
        num_steps=chosen.num_steps,
        batch_size=chosen.batch_size,
        sequence_length=chosen.sequence_length,
        eval_every=max(1, chosen.num_steps // 4),
        checkpoint_every=max(1, chosen.num_steps // 4),
    )
    train_batches, eval_batches = symbol_data.load_batches(
        data, model, cache, rows=config.batch_size, tokens=config.sequence_length,
        seed=config.seed, count=chosen.eval_batches,
    )  # fmt: skip
    probe = DecipherProbeConfig(model.vocab_size, model.embed_dim, model.embed_dim)
    trained = probe_training.train(
        config, probe, params, train_batches=train_batches, eval_batches=eval_batches, **run
    )
    decipher_probe.save(result, probe, trained.state.params)
    return trained


def _write_summary(
    name: str,
    identity: Mapping[str, Any],
    trained: loop.Result,
    run: pathlib.Path,
    result: pathlib.Path,
) -> None:
    """Records in `result` how a model came to be."""
    lines = metric_writers.read_metrics(run / metric_writers.METRICS_FILE)
    summary = {
        "name": name,
        **identity,
        "seconds": trained.seconds,
        **trained.metrics,
        "curve": [line for line in lines if "loss" in line],
        "evaluations": [line for line in lines if "eval_loss" in line],
    }
    with checkpoints.disk_errors("cannot write the summary", result):
        checkpoints.write_json(result / SUMMARY_FILE, summary)
