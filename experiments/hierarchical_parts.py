"""What measurements of models of words begin with: texts, trained models, passages; and tables.

See `experiments/hierarchical.py`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from ml_collections import ConfigDict

from experiments import results
from models import files, hierarchical
from models.config import TransformerConfig
from models.hierarchical import HierarchicalConfig
from training import compute, optimizers, text_models, text_scores
from training.datasets import registry
from training.text_models import TextModel
from training.text_scores import Passage, TextScores

WORDS, TOKENS = "HAT", "BPE"


class Trained(NamedTuple):
    """A model, where it lies and what its training left."""

    config: HierarchicalConfig | TransformerConfig
    params: Any
    directory: Path
    summary: dict[str, Any]


class Setting(NamedTuple):
    """What every measurement begins with."""

    config: ConfigDict
    cache: Path
    texts: dict[str, list[str]]
    identity: str
    tokenizer: Path
    models: dict[str, Trained]
    passages: list[Passage]


class Found(NamedTuple):
    """What a measurement gives to the results."""

    values: Any
    table: dict[str, Any]
    figures: dict[str, Any]
    claims: list[results.Claim]


def prepare(config: ConfigDict) -> Setting:
    """Texts, tokeniser, trained models and the passages that they are measured on."""
    cache = files.cache_root()
    found, identity = texts(config.data, cache)
    tokenizer = text_models.ensure_tokenizer(
        found["train"], config.tokens.vocab_size, identity, cache
    )
    rule, cap = config.words.rule, config.words.max_word
    passages = text_scores.passages_of(
        found["test"], rule=rule, max_word=cap, num_words=config.passages.words,
        limit=config.passages.count, context=config.passages.context,
    )  # fmt: skip
    setting = Setting(config, cache, found, identity, tokenizer, {}, passages)
    first = architecture(config, {})
    models = {WORDS: train(setting, "hat", first)}
    for name, changes in config.variants.items():
        models[name] = train(setting, f"hat_{_slug(name)}", architecture(config, changes))
    models[TOKENS] = train(setting, "hat_bpe", matched_tokens(setting, first))
    return setting._replace(models=models)


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def texts(data: ConfigDict, cache: Path) -> tuple[dict[str, list[str]], str]:
    """Documents by split, and what names them."""
    options = data.builder_options.to_dict()
    found: dict[str, list[str]] = {}
    identity = ""
    for split in ("train", "validation", "test"):
        examples = registry.load(data.dataset, split, data_dir=cache / "datasets", **options)
        identity = examples.full_name
        found[split] = [example["text"] for example in examples]
    found["test"] = [*found["test"], *found["validation"]] if data.join_held_out else found["test"]
    return found, identity


def architecture(config: ConfigDict, changes: Mapping[str, Any]) -> HierarchicalConfig:
    return hierarchical.hat(**{**config.words.to_dict(), **dict(changes)})


def recipe(setting: Setting, model: Any, **more: Any) -> TextModel:
    options = setting.config.training.to_dict()
    optimizer = optimizers.from_fields(**options.pop("optimizer"))
    return TextModel(**{"model": model, "optimizer": optimizer, **options, **more})


def train(setting: Setting, name: str, model: Any) -> Trained:
    """A model of an architecture by the config's recipe, trained if no run has done so."""
    is_tokens = isinstance(model, TransformerConfig)
    directory = text_models.ensure(
        name,
        recipe(setting, model),
        setting.texts["train"],
        setting.texts["validation"],
        identity=setting.identity,
        cache=setting.cache,
        tokenizer=setting.tokenizer if is_tokens else None,
    )
    return read(directory)


def read(directory: Path) -> Trained:
    config, params = text_models.load(directory)
    summary = json.loads((directory / text_models.SUMMARY_FILE).read_text(encoding="utf-8"))
    return Trained(config, params, directory, summary)


def matched_tokens(setting: Setting, model: HierarchicalConfig) -> TransformerConfig:
    """A model of tokens whose work a byte is that of a hierarchical one (section 2.6).

    Width and layers are the config's; the feed-forward width is what makes the work equal.
    """
    train_texts = setting.texts["train"]
    backend = text_models.tokenizer_of(setting.tokenizer)
    base = flat(setting.config.tokens, backend)
    goal = work(setting, model, text_models.bytes_per_position(model, None, train_texts))
    size = text_models.bytes_per_position(base, backend, train_texts)
    choices = [base.replace(mlp_dim=mlp) for mlp in range(8, 16 * base.embed_dim, 8)]
    return min(choices, key=lambda choice: abs(work(setting, choice, size) - goal))


def flat(options: ConfigDict, backend: tokenizers.Tokenizer) -> TransformerConfig:
    """A model of a tokeniser's tokens, of the config's width and layers, narrow inside."""
    width, head = options.width, options.head_dim
    return TransformerConfig(
        vocab_size=backend.get_vocab_size(), embed_dim=width, num_layers=options.layers,
        num_heads=width // head, num_kv_heads=width // head, head_dim=head, mlp_dim=8,
        max_position=4096, tie_embeddings=True,
        eos_token_ids=(text_models.end_of_text(backend),),
    )  # fmt: skip


def work(setting: Setting, model: Any, per_position: float) -> float:
    """Operations of a forward pass, a byte, half a row in sight."""
    context = setting.config.training.row_bytes / 2
    return compute.per_byte(model, bytes_per_position=per_position, context_bytes=context)


def described(name: str, model: Trained) -> dict[str, Any]:
    """A model as reports show it."""
    return {
        "role": name,
        "source": model.directory.name,
        "parameters": model.summary["num_params"],
        **model.summary,
    }


def score(setting: Setting, model: Trained, passages: Sequence[Passage]) -> TextScores:
    """A model's measures on passages, words counted by the first model's rule."""
    rule, cap = setting.config.words.rule, setting.config.words.max_word
    batch = setting.config.passages.batch_size
    room = setting.config.passages
    if isinstance(model.config, TransformerConfig):
        return text_scores.score_tokens(
            model.config, model.params, text_models.tokenizer_of(setting.tokenizer), passages,
            rule=rule, max_word=cap, num_tokens=room.tokens, batch_size=batch,
        )  # fmt: skip
    own = (model.config.rule, model.config.max_word) == (rule, cap)
    return text_scores.score_words(
        model.config, model.params, passages, num_words=room.most_words, batch_size=batch,
        counted_by=None if own else (rule, cap),
    )  # fmt: skip


def at_most(name: str, measured: float, bound: float) -> results.Claim:
    """A claim that holds when `measured` <= `bound`."""
    return results.Claim(name, float(measured), f"<= {bound:g}", bool(measured <= bound))


def line(label: str, x: Sequence[Any], y: Sequence[float]) -> dict[str, Any]:
    return {"label": label, "x": list(x), "y": list(y)}


def chart(title: str, x: str, y: str, series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"title": title, "x_label": x, "y_label": y, "series": list(series)}


def table(
    title: str, first: str, columns: Sequence[str], values: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """A table of the report: a row for each entry."""
    return {
        "title": title,
        "columns": [first, *(name.replace("_", " ") for name in columns)],
        "rows": [[label, *(row[name] for name in columns)] for label, row in values.items()],
    }
