"""Lexinvariant language models and their partial form: a fresh cipher for every row of every step.

Huang et al., arXiv 2305.16349. The loss is next-token cross-entropy under one draw of the row's
table. A row's draw is keyed by the run's seed, the step and the row's number in the whole batch, so
that no two rows share one: not on other devices, and not in another epoch.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models import random_embeddings as lex
from models import sharding, transformer
from models.errors import InputError, check_choice
from models.random_embeddings import LexinvariantConfig
from training import fitting, loop, losses
from training.fitting import Batch, DeviceBatch, TrainConfig, TrainState

DRAWS = ("tables", "permutations")
UNITS = ("type", "occurrence")

_FIELDS = ("tokens", "targets", "loss_mask", "target_bytes")
# What noise is for: rows' own, that of the one table of a step, and that of evaluations.
_ROW, _SHARED, _EVALUATION = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Cipher:
    """How rows of a batch come by their symbols.

    Attributes:
      draw: of a Gaussian model: 'tables', one a row; or 'permutations', one table a step under a
        random permutation for each row. Each row sees independent Gaussian vectors in both; in the
        latter those of two rows are the same ones, but the product with the table is shared.
      permuted: of a learned table: share p of tokens that a row exchanges (semi-lexinvariant,
        section 6); 0 is the standard model.
      unit: whether that share is of a row's 'type's of tokens (the same token is the same symbol
        all along the row) or of its 'occurrence's; the paper leaves it open.
    """

    draw: str = "tables"
    permuted: float = 0.0
    unit: str = "type"

    def __post_init__(self) -> None:
        check_choice("cipher.draw", self.draw, DRAWS)
        check_choice("cipher.unit", self.unit, UNITS)
        if not 0 <= self.permuted <= 1:
            raise InputError(f"cipher.permuted: {self.permuted} must be between 0 and 1")


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """A key for each row of a whole batch: key [] -> [B], wherever the rows lie."""
    each = jax.random.fold_in(key, _ROW)
    return jax.vmap(lambda row: jax.random.fold_in(each, row))(jnp.arange(rows))


def permutations(model: LexinvariantConfig, keys: jax.Array) -> jnp.ndarray:
    """Uniform permutations of the tokens that are not fixed: keys [B] -> int32 [B, V]."""
    free = jnp.array(model.free_ids, jnp.int32)
    identity = jnp.arange(model.vocab_size, dtype=jnp.int32)
    return jax.vmap(lambda key: identity.at[free].set(jax.random.permutation(key, free)))(keys)


def exchange(
    model: LexinvariantConfig,
    cipher: Cipher,
    keys: jax.Array,
    tokens: jnp.ndarray,
    targets: jnp.ndarray,
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """B_p of section 6: each token under its row's permutation with probability p, else as it is.

    A target is exchanged as the token that it will be at the next position.

    Args:
      model: gives the tokens that are never exchanged.
      cipher: p and what it is a share of.
      keys: of the rows [B].
      tokens, targets: int32 [B, T].

    Returns:
      The exchanged tokens and targets.
    """
    pairs = jax.vmap(jax.random.split)(keys)
    permuted = permutations(model, pairs[:, 0])
    count = model.vocab_size if cipher.unit == "type" else tokens.shape[1] + 1
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(pairs[:, 1])
    chosen = uniform < cipher.permuted
    if cipher.unit == "type":
        table = jnp.where(chosen, permuted, jnp.arange(count))
        return _look_up(table, tokens), _look_up(table, targets)
    return (
        jnp.where(chosen[:, :-1], _look_up(permuted, tokens), tokens),
        jnp.where(chosen[:, 1:], _look_up(permuted, targets), targets),
    )


def _look_up(table: jnp.ndarray, ids: jnp.ndarray) -> jnp.ndarray:
    return jnp.take_along_axis(table, ids, axis=1)


def row_logits(
    model: LexinvariantConfig,
    params: Any,
    table_of: Callable[[Any], jnp.ndarray],
    tokens: jnp.ndarray,
    *,
    remat: bool = False,
) -> jnp.ndarray:
    """Float32 [B, T, V] of rows int [B, T] without padding, under the table of `table_of(params)`.

    Args:
      remat: draw the tables again in the backward pass, and compute each block again.
    """

    def encode(params: Any) -> jnp.ndarray:
        return lex.encode(model, params, table_of(params), tokens)

    def read(params: Any, hidden: jnp.ndarray) -> jnp.ndarray:
        return lex.logits(model, params, table_of(params), hidden)

    if remat:
        encode, read = jax.checkpoint(encode), jax.checkpoint(read)
    hidden = transformer.apply(
        model,
        params,
        encode(params),
        positions=jnp.arange(tokens.shape[1])[None],
        with_logits=False,
        remat=remat,
    ).hidden
    return read(params, hidden)


def nats(
    config: TrainConfig, cipher: Cipher, params: Any, batch: DeviceBatch, key: jax.Array
) -> jax.Array:
    """Cross-entropy of every target float32 [B, T] under the draws of `key`."""
    model = fitting.compute_config(config)
    assert isinstance(model, LexinvariantConfig)
    tokens, targets = batch["tokens"], batch["targets"]
    keys = row_keys(key, tokens.shape[0])
    shared = model.table == "gaussian" and cipher.draw == "permutations"
    if model.table == "learned":
        tokens, targets = exchange(model, cipher, keys, tokens, targets)
    elif shared:
        permuted = permutations(model, keys)
        tokens, targets = _look_up(permuted, tokens), _look_up(permuted, targets)
        keys = jax.random.fold_in(key, _SHARED)[None]

    def table_of(params: Any) -> jnp.ndarray:
        table = lex.draw(model, params, keys)
        return table[0] if shared else table

    logits = row_logits(model, params, table_of, tokens, remat=config.remat)
    return losses.cross_entropy(logits, targets)


def loss_fn(
    config: TrainConfig,
    cipher: Cipher,
    params: Any,
    batch: DeviceBatch,
    step: jax.Array,
    frozen: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """The mean over the targets of `loss_mask`, in nats."""
    del frozen
    values = nats(config, cipher, params, batch, fitting.step_key(config, step))
    return losses.masked_mean(values, batch["loss_mask"]), {}


def train(
    config: TrainConfig,
    cipher: Cipher,
    *,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "train",
) -> loop.Result:
    """Trains a lexinvariant model or its baselines, or goes on where `workdir` left off.

    Batches are dicts of arrays of this process's rows, [B, T] each: tokens, targets and
    target_bytes int32, loss_mask float32, as `training.batches` makes them. Attention is over the
    whole row: documents that share a row share its cipher.

    Args:
      config: see `TrainConfig`; `config.model` is a `LexinvariantConfig`. With `remat` tables are
        drawn again in the backward pass.
      cipher: see `Cipher`.
      train_batches: endless iterator with `get_state` and `set_state`.
      eval_batches: iterated from its start at every evaluation; None for no evaluation.
      workdir: holds config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      identity: what identifies the data, as JSON can hold it.
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (nats a token, one
      draw of the table a row, no token exchanged under a learned table) and `eval_bits_per_byte`.

    Raises:
      InputError: as `loop.run`; a model of another kind; a cipher that the table has no use for; a
        batch of the wrong shape or with ids out of range.
      SystemExit: `loop.TERMINATED`, after SIGTERM.
    """
    model = config.model
    if not isinstance(model, LexinvariantConfig):
        raise InputError(f"model: {type(model).__name__} must be a LexinvariantConfig")
    if model.table == "gaussian" and cipher.permuted:
        raise InputError(f"cipher.permuted: {cipher.permuted} is for a learned table")
    if len(model.free_ids) < 2:
        raise InputError(f"fixed_ids: {len(model.fixed_ids)} of {model.vocab_size} leave no cipher")
    mesh = sharding.make_mesh(*config.mesh)
    return fitting.fit(
        config,
        functools.partial(fitting.update, config, functools.partial(loss_fn, config, cipher)),
        prepare=lambda _, batch: put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=evaluator(config, eval_batches, mesh) if eval_batches is not None else None,
        workdir=workdir,
        recorded={"cipher": dataclasses.asdict(cipher), "identity": identity},
        mesh=mesh,
        initial_params=lex.init(model, jax.random.key(config.seed)),
        description=description,
    )


def evaluator(
    config: TrainConfig, batches: Iterable[Batch], mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: `eval_loss` and `eval_bits_per_byte`, the same draws each time."""
    key = jax.random.fold_in(jax.random.key(config.seed), _EVALUATION)

    @jax.jit
    def sums(params: Any, batch: DeviceBatch, number: jax.Array) -> tuple[jax.Array, ...]:
        values = nats(config, Cipher(), params, batch, jax.random.fold_in(key, number))
        mask = batch["loss_mask"]
        return jnp.sum(values * mask), jnp.sum(mask), jnp.sum(batch["target_bytes"] * mask)

    def evaluate(state: TrainState) -> dict[str, float]:
        parts = [
            sums(state.params, put(batch, config, mesh), np.int32(number))
            for number, batch in enumerate(batches)
        ]
        if not parts:
            raise InputError("eval_batches: there are none")
        total, tokens, size = np.sum(np.array(jax.device_get(parts), np.float64), axis=0)
        if not tokens or not size:
            raise InputError("eval_batches: no token of theirs counts")
        return {
            "eval_loss": float(total / tokens),
            "eval_bits_per_byte": losses.bits_per_byte(float(total), float(size)),
        }

    return evaluate


def put(batch: Batch, config: TrainConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows on the mesh, split over its data axis; errors as `fitting.place`."""
    return fitting.place(batch, config, mesh, fields=_FIELDS, ids=("tokens", "targets"))
