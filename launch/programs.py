"""The programs that a run consists of, as functions of shapes: nothing here makes an array.

They are the ones that run: the training step of `training.language_model`, and prefill and rounds
of `decoding.loop` as `decoding.generation` calls them, on arrays that lie as `models.sharding`
says.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decoding import generation, loop, methods, randomness, stopping
from decoding.dynamic_vocabulary import inverted_lists
from decoding.loop import Method
from decoding.method_spec import Configs, architecture_of
from decoding.sampling import SamplingConfig
from experiments import method_parts
from models import hierarchical, masked_words, random_embeddings, sharding, transformer, utf8
from models.config import TransformerConfig
from models.errors import InputError
from models.hierarchical import HierarchicalConfig
from models.masked_words import ReaderConfig
from models.random_embeddings import LexinvariantConfig
from training import fitting, language_model
from training.fitting import TrainConfig

_BATCH = {
    "tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
    "loss_mask": jnp.float32, "target_bytes": jnp.int32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A method on models of some sizes, and the batch that it decodes.

    Attributes:
      method: its name.
      configs: architectures by role.
      options: the method's own.
      sampling: the target's distribution.
      batch_size: rows [B].
      prompt_length: tokens of every prompt [P].
      max_new_tokens: of every row.
    """

    method: str
    configs: Configs
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    batch_size: int = 8
    prompt_length: int = 1024
    max_new_tokens: int = 1024


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program ready to be compiled.

    Attributes:
      name: 'train', 'prefill' or 'decode'.
      lowered: what JAX hands to the compiler.
      held: bytes on each device of what it is called with, by name ('parameters', 'cache', ...).
    """

    name: str
    lowered: Any
    held: dict[str, int]


def _reader_shapes(config: ReaderConfig) -> Any:
    """Parameters of a reader, and `WordPieces.writing`, which is kept beside them."""
    V = config.head.vocab_size
    pieces = {
        "bytes": jax.ShapeDtypeStruct((V, config.encoder.width - 1), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((V,), jnp.int32),
        "begins": jax.ShapeDtypeStruct((V,), bool),
        "after": jax.ShapeDtypeStruct((len(utf8.NEXT), V), jnp.int32),
    }
    return {**masked_words.param_shapes(config), "pieces": pieces}


_SHAPES: dict[type, Callable[[Any], Any]] = {
    TransformerConfig: transformer.param_shapes,
    HierarchicalConfig: hierarchical.param_shapes,
    LexinvariantConfig: random_embeddings.param_shapes,
    ReaderConfig: _reader_shapes,
}


def _index_shapes(target: TransformerConfig) -> Any:
    """Inverted lists over the target's rows: sqrt(V) of them, twice as wide as the average."""
    lists = math.isqrt(target.vocab_size)
    width = 2 * -(-target.vocab_size // lists)
    return inverted_lists.shapes(
        inverted_lists.IndexConfig(target.vocab_size, target.embed_dim, lists, width)
    )


def param_shapes(work: Decoding) -> loop.ModelParams:
    """Parameters by role, of models in their compute dtype and of the method's trained parts."""
    parsed = methods.parse_options(work.method, work.options)
    spec = methods.spec(work.method)
    shapes = {
        role: _in_compute_dtype(work.configs[role], _SHAPES[architecture_of(work.configs[role])])
        for role in spec.roles_with(parsed)
    }
    target = work.configs["target"]
    if not (parts := spec.trained_parts(parsed)):
        return shapes
    if inverted_lists.ROLE in parts:  # made of a model's own rows: there is no untrained one
        return {**shapes, inverted_lists.ROLE: _index_shapes(target)}
    untrained = functools.partial(
        method_parts.load_method_params, work.method, None, True, work.options, target
    )
    return {**shapes, **jax.eval_shape(untrained)}


def _in_compute_dtype(config: Any, shapes_of: Callable[[Any], Any]) -> Any:
    dtype = getattr(config, "backbone", config).compute_dtype

    def cast(leaf: Any) -> Any:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype)

    return jax.tree.map(cast, shapes_of(config))


def on_mesh(tree: Any, shardings: Any) -> Any:
    """Shapes with a place for each."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings,
    )


def device_bytes(tree: Any) -> int:
    """Bytes of placed shapes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _item(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )


def _item(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize


def _check_rows(rows: int, mesh: Mesh) -> None:
    if rows % mesh.shape["data"]:
        raise InputError(f"mesh: {rows} rows do not divide over {mesh.shape['data']} data devices")


def _stop(work: Decoding) -> stopping.StopConfig:
    stop = generation.stop_config(work.configs["target"], work.max_new_tokens)
    if work.prompt_length + work.max_new_tokens > stop.max_position:
        raise InputError(
            f"prompt_length: {work.prompt_length} and max_new_tokens {work.max_new_tokens} exceed "
            f"the target's context of {stop.max_position}"
        )
    return stop


def decoding(work: Decoding, mesh: Mesh) -> list[Callable[[], Lowered]]:
    """What lowers prefill and the loop of rounds, with caches as long as they become.

    Raises InputError for models and a method that do not go together, or a mesh that does not
    divide rows, heads or parameters.
    """
    method = methods.build(work.method, work.configs, work.sampling, work.options)
    stop = _stop(work)
    _check_rows(work.batch_size, mesh)
    shapes = param_shapes(work)
    params = {role: on_mesh(tree, sharding.tree_shardings(tree, mesh))
              for role, tree in shapes.items()}  # fmt: skip
    inputs, sizes, slots = _inputs(work, method, stop, mesh)
    begun = functools.partial(loop.start, method=method, **sizes)
    state = jax.eval_shape(begun, params, *inputs)
    if method.canvas is None:
        state = jax.eval_shape(lambda state: loop.grow(state, slots, method.resize), state)
    state = on_mesh(state, generation.layout(state, mesh))
    held = {"parameters": device_bytes(params)}
    caches = loop.caches(state.inner)
    carried = {"cache": device_bytes(caches), "state": device_bytes(state) - device_bytes(caches)}

    def prefill() -> Lowered:
        return Lowered("prefill", loop.start.lower(params, *inputs, method=method, **sizes), held)

    def decode() -> Lowered:
        until = jax.ShapeDtypeStruct((), jnp.int32, sharding=_everywhere(mesh))
        least = 0 if method.canvas is None else generation.canvas_slots(slots)[1]
        lowered = loop.advance.lower(
            params, state, until, method=method, stop=stop, slots=slots, least=least
        )
        return Lowered("decode", lowered, held | carried)

    return [prefill, decode]


def _inputs(
    work: Decoding, method: Method, stop: stopping.StopConfig, mesh: Mesh
) -> tuple[tuple[Any, ...], dict[str, int], int]:
    """Arguments of `loop.start`, its sizes, and the cache slots of the last round."""
    B, P = work.batch_size, work.prompt_length
    padded = -(-P // generation.PROMPT_MULTIPLE) * generation.PROMPT_MULTIPLE
    tokens, lengths = np.zeros((B, padded), np.int32), np.full((B,), P, np.int32)
    slots, buffer, ends = generation.plan(tokens, lengths, method, stop)
    last = slots
    if method.canvas is None:  # where words have the slots, a token is as short as a word can be
        full = P + work.max_new_tokens - 1
        last = max(slots, generation.cache_slots(full - 1 + method.lookahead))
    rows = sharding.batch_sharding(mesh)
    keys = jax.eval_shape(lambda: randomness.row_keys(0, jnp.arange(B)))
    arrays = (tokens, lengths, keys, None, ends)
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), arrays
    )
    return inputs, {"slots": slots, "buffer": buffer}, last


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def training(config: TrainConfig, mesh: Mesh) -> Callable[[], Lowered]:
    """What lowers the training step of a language model on one batch.

    Raises InputError as `language_model.train` does for a model or a mesh.
    """
    if not config.model.causal:
        raise InputError("model.causal: False; the training step that is checked is left to right")
    state = jax.eval_shape(functools.partial(fitting.init, config))
    state = on_mesh(state, sharding.tree_shardings(state, mesh, fsdp=config.fsdp))
    rows = sharding.batch_sharding(mesh)
    shape = (config.batch_size, config.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
             for name, dtype in _BATCH.items()}  # fmt: skip
    held = {
        "parameters": device_bytes(state.params),
        "optimiser": device_bytes(state.opt_state),
        "batch": device_bytes(batch),
    }

    def train() -> Lowered:
        loss = functools.partial(language_model.loss_fn, config, None)
        update = functools.partial(fitting.update, config, loss)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = fitting.compiled(config, update, mesh, shardings)
        return Lowered("train", step.lower(state, batch), held)

    return train
