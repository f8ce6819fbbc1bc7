"""Losses of a hypernetwork for a frozen language model (ZeTT, arXiv 2405.07883, section 2.5)."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import hypernetwork as network
from models import masks, token_tables, transformer
from models.byte_level import ByteLevel
from models.config import TransformerConfig
from models.hypernetwork import HypernetworkConfig
from models.token_tables import Tables
from training import fitting, loop, losses
from training.fitting import TrainConfig

_NOT_A_TOKEN = -1e5  # logit of rows beyond the vocabulary
_MASKED_SHARE, _KEPT, _RANDOM = 0.15, 0.1, 0.1  # BERT's corruption


class BaseModel(NamedTuple):
    """A frozen language model.

    Attributes:
      config, params: the model; left to right, or bidirectional with a mask token.
      bias: float32 [V] of its logits; None without.
      form: its tokeniser in normal form.
    """

    config: TransformerConfig
    params: Any
    form: ByteLevel
    bias: jax.Array | None = None

    @property
    def tables(self) -> Tables:
        return token_tables.tables(self.config, self.params, self.bias)

    @property
    def source(self) -> jax.Array:
        """[V, c], what a hypernetwork reads."""
        return token_tables.joined(self.tables)


def overlapping(config: HypernetworkConfig, surfaces: jax.Array, specials: jax.Array) -> jax.Array:
    """bool [k]: tokens that are one token of the source, which has a row; specials aside."""
    single = (surfaces != config.pad_id).sum(1) == 1
    first = surfaces[:, 0]
    ordinary = ~jnp.isin(jnp.arange(surfaces.shape[0]), specials)
    return single & (first != config.pad_id) & (first < config.vocab_size) & ordinary


def _pairs(found: Tables, wanted: Tables) -> list[tuple[jax.Array, jax.Array]]:
    """Input rows, and output rows where the model has them."""
    both = zip(found[:2], wanted[:2], strict=True)
    return [(mine, theirs) for mine, theirs in both if mine is not None and theirs is not None]


def distance(predicted: Tables, wanted: Tables, weights: jax.Array) -> jax.Array:
    """The auxiliary loss (section 2.5): squared distance of rows, over the rows' mean length.

    Averaged over weights [k], and over input and output tables.
    """
    total = jnp.zeros(())
    pairs = _pairs(predicted, wanted)
    for mine, theirs in pairs:
        squared = jnp.sum((mine - theirs) ** 2, axis=-1)
        length = jnp.mean(jnp.linalg.norm(theirs, axis=-1), where=weights > 0)
        mean = jnp.sum(squared * weights) / (jnp.sum(weights) + 1e-8)
        total += jnp.where(jnp.sum(weights) > 0, mean / length, 0.0)
    return total / len(pairs)


def identity_loss(
    config: HypernetworkConfig,
    model: TransformerConfig,
    rows: int,
    train: TrainConfig,
    params: Any,
    batch: Any,
    step: jax.Array,
    frozen: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """Giving back the rows of single tokens of the source: mean squared distance (section 2.5)."""
    del batch
    key = fitting.step_key(train, step)
    ids = jax.random.choice(key, config.vocab_size, (min(rows, config.vocab_size),), replace=False)
    found = network.apply(config, params, frozen["source"], ids[:, None])
    wanted = token_tables.split(model, frozen["source"][ids])
    loss = jnp.zeros(())
    pairs = _pairs(found, wanted)
    for mine, theirs in pairs:
        loss += jnp.sum((mine - theirs) ** 2, axis=-1).mean() / len(pairs)
    if found.bias is not None:
        loss += jnp.mean((found.bias - frozen["bias"][ids]) ** 2)
    return loss, {"cosine": cosine(found, wanted)}


def cosine(found: Tables, wanted: Tables) -> jax.Array:
    """Mean cosine similarity of rows, over both tables."""
    mine, theirs = token_tables.joined(found), token_tables.joined(wanted)
    product = jnp.sum(mine * theirs, axis=-1)
    lengths = jnp.linalg.norm(mine, axis=-1) * jnp.linalg.norm(theirs, axis=-1)
    return jnp.mean(product / lengths)


def predicted_tables(
    config: HypernetworkConfig,
    params: Any,
    surfaces: jax.Array,
    frozen: Any,
    *,
    remat: bool = False,
) -> tuple[Tables, Tables]:
    """What a hypernetwork says of all tokens: as predicted, and with special tokens' own rows."""
    apply: Any = functools.partial(network.apply, config)
    if remat:
        apply = jax.checkpoint(apply)
    found = apply(params, frozen["source"], surfaces)
    return found, token_tables.with_rows(
        found, frozen["tables"], frozen["specials"], frozen["specials"]
    )


def token_nats(
    model: TransformerConfig,
    lm_params: Any,
    tables: Tables,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Nats of targets and which of them count, float32 [B, T] each, of a model with new tables.

    A left-to-right model says next tokens; a bidirectional one the tokens hidden from it: 15%,
    of which a tenth stays in sight and a tenth is another token (BERT).
    """
    tokens, weights, mask = batch["tokens"], batch["loss_mask"], None
    if not model.causal:
        hide, how, other = jax.random.split(key, 3)
        real = weights > 0
        hidden = real & (jax.random.uniform(hide, tokens.shape) < _MASKED_SHARE)
        dice = jax.random.uniform(how, tokens.shape)
        drawn = jax.random.randint(other, tokens.shape, 0, batch["vocab_size"])
        assert model.mask_token_id is not None
        shown = jnp.where(dice < 1 - _KEPT - _RANDOM, model.mask_token_id, drawn)
        shown = jnp.where(dice >= 1 - _KEPT, tokens, shown)
        tokens, weights = jnp.where(hidden, shown, tokens), hidden.astype(jnp.float32)
        mask = masks.full(real, tokens.shape[1])
    changed = token_tables.with_tables(lm_params, tables)
    logits = transformer.apply(model, changed, tokens, mask=mask, remat=remat).logits
    assert logits is not None
    if tables.bias is not None:
        logits = logits + tables.bias
    known = jnp.arange(logits.shape[-1]) < batch["vocab_size"]
    logits = jnp.where(known, logits, _NOT_A_TOKEN)
    return losses.cross_entropy(logits, batch["targets"]), weights


def main_loss(
    config: HypernetworkConfig,
    train: TrainConfig,
    auxiliary_weight: float,
    params: Any,
    batch: Mapping[str, jax.Array],
    step: jax.Array,
    frozen: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """The language model's loss in the batch's tokeniser, and the auxiliary one (section 2.5)."""
    surfaces = batch["surfaces"]
    found, tables = predicted_tables(config, params, surfaces, frozen, remat=train.remat)
    nats, weights = token_nats(
        fitting.compute_config(train), frozen["params"], tables, batch,
        fitting.step_key(train, step), remat=train.remat,
    )  # fmt: skip
    loss = losses.masked_mean(nats, weights)
    same = overlapping(config, surfaces, frozen["specials"])
    rows = jnp.where(same, surfaces[:, 0], 0)
    wanted = token_tables.split(train.model, frozen["source"][rows])
    auxiliary = distance(found, wanted, same.astype(jnp.float32))
    count = jnp.maximum(jnp.sum(batch["target_bytes"] * weights), 1)
    metrics = {
        "nats": loss,
        "bits_per_byte": jnp.sum(nats * weights) / count / jnp.log(2.0),
        "auxiliary": auxiliary,
        "vocab_size": batch["vocab_size"],
        "truncated": batch["truncated"],
        "noise": batch["deviation"],
    }
    return loss + auxiliary_weight * auxiliary, metrics
