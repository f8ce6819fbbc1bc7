"""Prompts in, tokens and stats out: the loop with everything around it that needs a host."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from decoding import loop, randomness, stopping
from decoding.loop import DecodeState, Method, ModelParams
from models import cache as kv
from models import distributed, sharding
from models.config import TransformerConfig
from models.errors import InputError

# Prompts are padded to a multiple of this, so that few lengths are compiled.
PROMPT_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One finished row.

    Attributes:
      prompt_ids: the prompt.
      token_ids: what was generated, a final EOS included.
      finish_reason: 'eos', 'length' or 'context'.
      stats: target_calls, target_positions, draft_calls, tokens_emitted, and by draft depth
        proposed and accepted rounds; and the method's own counters.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    stats: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of one row, as `stream` yields them.

    Attributes:
      row: which prompt.
      token_ids: the tokens since the row's last event.
      finished: the whole row when these were its last tokens, else None.
    """

    row: int
    token_ids: list[int]
    finished: Row | None

    @property
    def done(self) -> bool:
        return self.finished is not None


@dataclasses.dataclass
class HotStart:
    """What a method has learned so far, carried from one run into the next.

    Pass the same object to several calls of `generate`: each begins with what the ones before
    left. Methods that learn nothing leave it alone.

    Attributes:
      value: of the method's `loop.Memory`; None before the first run.
    """

    value: Any = None


def cache_slots(needed: int) -> int:
    """The cache size that holds `needed` tokens: 128, 256, 384, 512, 768, 1024, 1536, ...

    Time per token grows with the slots allocated, so the loop begins small and grows; sizes are
    few, because each one is compiled.
    """
    size = 128
    while size < needed:
        size *= 2
    return size * 3 // 4 if size >= 512 and size * 3 // 4 >= needed else size


def canvas_slots(needed: int) -> tuple[int, int]:
    """The canvas size that holds `needed` tokens, and the next smaller one.

    Sizes are 32, 48, 64, 96, 128, 192, ...: every position of a canvas costs, so they are closer
    than cache sizes, and a canvas that has shrunk to the smaller size goes on at that size.
    """
    small, size = 0, 32
    while size < needed:
        small, size = size, size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size, small


def check_prompts(
    prompts: Sequence[Sequence[int]], config: TransformerConfig, stop: stopping.StopConfig
) -> None:
    """Raises InputError for prompts that are empty, too long or hold ids out of range."""
    if not prompts:
        raise InputError("prompts: at least one is needed")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {row}: empty; at least one token is needed")
        bad = [t for t in prompt if not 0 <= t < config.vocab_size]
        if bad:
            raise InputError(
                f"prompt {row}: token id {bad[0]} is out of range; allowed: 0 to "
                f"{config.vocab_size - 1}"
            )
        if len(prompt) >= stop.max_position:
            raise InputError(
                f"prompt {row}: {len(prompt)} tokens leave no room in a context of "
                f"{stop.max_position}"
            )


def stop_config(
    config: TransformerConfig, max_new_tokens: int, eos_ids: Sequence[int] | None = None
) -> stopping.StopConfig:
    """Stop rules of a checkpoint: its EOS ids unless others are given, its context length."""
    ids = config.eos_token_ids if eos_ids is None else tuple(eos_ids)
    return stopping.StopConfig(max_new_tokens, tuple(ids), config.max_position)


def layout(state: DecodeState, mesh: Mesh) -> DecodeState:
    """How a state, or one of shapes, lies on a mesh: rows over 'data', cache heads over 'model'.

    Raises InputError for rows or heads that the mesh does not divide.
    """
    batch = state.lengths.shape[0]
    for cache in loop.caches(state.inner):
        heads = cache.keys[0].shape[1]
        if batch % mesh.shape["data"] or heads % mesh.shape["model"]:
            raise InputError(
                f"mesh: {mesh.shape['data']}x{mesh.shape['model']} does not divide {batch} rows "
                f"and {heads} key/value heads"
            )
    rows = sharding.batch_sharding(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shard(leaf: Any) -> Any:
        if isinstance(leaf, kv.KVCache):
            return sharding.cache_shardings(leaf, mesh)
        return rows if leaf.ndim and leaf.shape[0] == batch else everywhere

    return jax.tree.map(shard, state, is_leaf=lambda leaf: isinstance(leaf, kv.KVCache))


def place(state: DecodeState, mesh: Mesh) -> DecodeState:
    """A state laid out on a mesh; errors as `layout`."""
    where = layout(state, mesh)
    if distributed.several():  # where device_put does not move random keys
        return jax.jit(_same, out_shardings=where)(state)
    return jax.device_put(state, where)


def _same(state: DecodeState) -> DecodeState:
    return state


def plan(
    tokens: np.ndarray,
    lengths: np.ndarray,
    method: Method,
    stop: stopping.StopConfig,
    buffer: int | None = None,
) -> tuple[int, int, np.ndarray | None]:
    """Cache slots to begin with, room for text, and where canvases end [B] (None without one).

    Args:
      tokens: int32 [B, P], prompts padded on the right.
      lengths: int32 [B].
      method: the method.
      stop: its `max_new_tokens` and context bound the room.
      buffer: the room, if it is given.
    """
    padded = tokens.shape[1]
    if method.canvas is None:
        needed = max(padded, int(lengths.max()) - 1 + method.lookahead)
        if method.needed is not None:
            needed = int(method.needed(tokens, lengths).max())
        room = max(padded, stop.max_position)
        return (
            cache_slots(needed),
            buffer or cache_slots(min(padded + stop.max_new_tokens, room)),
            None,
        )
    multiple = method.canvas.multiple
    limits = np.asarray(stopping.limits(jnp.asarray(lengths), stop))
    ends = -(-limits // multiple) * multiple
    slots, _ = canvas_slots(max(padded, int(ends.max())))
    return slots, max(buffer or 0, slots), ends


def begin(
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
    method: Method,
    stop: stopping.StopConfig,
    *,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    buffer: int | None = None,
    memory: Any = None,
) -> tuple[DecodeState, int]:
    """Reads the prompts; returns the state before the first round and its cache slots.

    Arguments are those of `generate`; `buffer` is the room for text, by default what
    `stop.max_new_tokens` and the context allow; `memory` is a `HotStart.value`.
    """
    if not prompts or not all(map(len, prompts)):
        raise InputError("prompts: every row needs at least one token")
    padded = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    ids = np.arange(len(prompts)) if row_ids is None else np.asarray(row_ids)
    slots, buffer, ends = plan(tokens, lengths, method, stop, buffer)
    inputs = (tokens, lengths, randomness.row_keys(seed, jnp.asarray(ids)), ends)
    if mesh is not None:
        if len(prompts) % mesh.shape["data"]:
            raise InputError(
                f"mesh: {len(prompts)} rows do not divide over {mesh.shape['data']} data devices"
            )
        inputs = distributed.put(inputs, sharding.batch_sharding(mesh))
    state = loop.start(
        params,
        *map(jnp.asarray, inputs[:2]),
        inputs[2],
        memory,
        inputs[3],
        method=method,
        slots=slots,
        buffer=buffer,
    )
    return (state if mesh is None else place(state, mesh)), slots


def advance(
    params: ModelParams,
    state: DecodeState,
    slots: int,
    method: Method,
    stop: stopping.StopConfig,
    *,
    rounds: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[DecodeState, int]:
    """Runs up to `rounds` more rounds (None: until all rows are done), resizing caches."""
    until = np.int32(2**31 - 1 if rounds is None else int(state.rounds) + rounds)
    while True:
        least = 0 if method.canvas is None else canvas_slots(slots)[1]
        state = loop.advance(
            params, state, until, method=method, stop=stop, slots=slots, least=least
        )
        needed, ran = jax.device_get((loop.slots_needed(state, method), state.rounds))
        if needed == 0 or ran >= until:
            return state, slots
        slots = cache_slots(int(needed)) if method.canvas is None else canvas_slots(int(needed))[0]
        state = loop.grow(state, slots, method.resize)
        if mesh is not None:
            state = place(state, mesh)


def _row(state: DecodeState, row: int) -> Row:
    """One row of a state that is on the host."""
    start, end = int(state.prompt_lengths[row]), int(state.lengths[row])
    counts = {
        field.name: getattr(state.stats, field.name)[row].tolist()
        for field in dataclasses.fields(state.stats)
        if field.name != "extra"
    }
    counts |= {name: values[row].tolist() for name, values in state.stats.extra.items()}
    return Row(
        prompt_ids=state.tokens[row, :start].tolist(),
        token_ids=state.tokens[row, start:end].tolist(),
        finish_reason=stopping.REASONS[int(state.reason[row])],
        stats=counts,
    )


def _fetch(state: DecodeState) -> DecodeState:
    """The state's text and counters on the host, without its caches."""
    return distributed.on_host(state.replace(inner=(), keys=()))


def generate(
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
    method: Method,
    stop: stopping.StopConfig,
    *,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    hot: HotStart | None = None,
) -> list[Row]:
    """Continues every prompt until a stop rule ends it.

    Args:
      params: parameters by role, for example {'target': ..., 'draft': ...}.
      prompts: token ids, one list a row, of any lengths.
      method: from `decoding.methods.build`.
      stop: stop rules, see `stop_config`.
      seed: base of all randomness.
      row_ids: number that identifies each row to its random key (default 0, 1, ...); a row's
        text depends on its prompt, the seed and this number only.
      mesh: devices to run on; `params` must already lie there (`models.sharding`).
      hot: what earlier runs learned; updated. None for a cold start.

    Returns:
      One Row a prompt.
    """
    memory = hot.value if hot else None
    state, slots = begin(
        params, prompts, method, stop, seed=seed, row_ids=row_ids, mesh=mesh, memory=memory
    )
    state, _ = advance(params, state, slots, method, stop, mesh=mesh)
    if hot is not None and method.memory is not None:
        hot.value = method.memory.take(state.inner)
    state = _fetch(state)
    return [_row(state, row) for row in range(len(prompts))]


def stream(
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
    method: Method,
    stop: stopping.StopConfig,
    *,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    hot: HotStart | None = None,
    every: int = 8,
) -> Iterator[Event]:
    """As `generate`, but yields each row's new tokens after every `every` rounds.

    The rounds are those of `generate`: the tokens are the same.
    """
    memory = hot.value if hot else None
    state, slots = begin(
        params, prompts, method, stop, seed=seed, row_ids=row_ids, mesh=mesh, memory=memory
    )
    sent = [len(prompt) for prompt in prompts]
    finished = [False] * len(prompts)
    while not all(finished):
        state, slots = advance(params, state, slots, method, stop, rounds=every, mesh=mesh)
        host = _fetch(state)
        for row in range(len(prompts)):
            end = int(host.lengths[row])
            done = int(host.reason[row]) != stopping.RUNNING
            if end > sent[row] or (done and not finished[row]):
                new = host.tokens[row, sent[row] : end].tolist()
                yield Event(row, new, _row(host, row) if done else None)
                sent[row], finished[row] = end, done
    if hot is not None and method.memory is not None:
        hot.value = method.memory.take(state.inner)


def total_stats(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Sums of the rows' counters, tokens per target call and acceptance by depth."""

    def summed(name: str) -> Any:
        return np.sum([row.stats[name] for row in rows], axis=0).tolist()

    total = {name: summed(name) for name in rows[0].stats}
    total["tokens_per_target_call"] = total["tokens_emitted"] / max(total["target_calls"], 1)
    total["acceptance_by_depth"] = [
        accepted / proposed if proposed else 0.0
        for accepted, proposed in zip(total["accepted"], total["proposed"], strict=True)
    ]
    return total
