"""Exact block caches: models whose blocks see themselves and what is before them.

LLaDA2.0 and 2.1 (arXiv 2512.15745, 2602.08676) and other block diffusion models (arXiv 2503.09573).
Keys and values of finished blocks do not depend on what follows, so a call is on one block alone.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from decoding.loop import ModelParams
from decoding.prefill import CHUNK
from decoding.unmasking.canvas import Schedule, View
from decoding.unmasking.policies import Call, Policy
from decoding.unmasking.prediction import Prediction, Reader
from models import cache as kv
from models import masks, transformer
from models.config import TransformerConfig
from models.errors import InputError

COUNTERS = ("commit_passes", "revisit_passes")

# What a row's next call is for.
_BLOCK = 0  # its current block
_COMMIT = 1  # keys and values of the block before, as it stands
_REVISIT = 2  # another look at earlier blocks
_REFRESH = 3  # keys and values of earlier blocks after changes
_NOTHING = 4  # of rows that were not served


class BlockCausalStore(struct.PyTreeNode):
    """What the policy keeps.

    Attributes:
      cache: keys and values; slot s holds position s. They are exact before the current block.
      duty: int32 [B], what the row's next call is for.
      ran: int32 [B], what this round's call was for.
      unsaved: bool [B], rows whose last block was left with a write, so that its keys and values
        are not those of its tokens.
    """

    cache: kv.KVCache
    duty: jnp.ndarray
    ran: jnp.ndarray
    unsaved: jnp.ndarray


@functools.cache
def block_causal(
    config: TransformerConfig, schedule: Schedule, *, revisit: int = 0, widen: bool = True
) -> Policy:
    """Each call is on a row's current block, over the keys and values of the blocks before it.

    A block's last call wrote nothing, if all went well: then its keys and values are those of the
    final tokens and stay. Otherwise the row takes a further call, which predicts nothing, before
    its next block (`commit_passes`).

    With `revisit`, a finished block is followed by a call on it and the `revisit` blocks before it,
    which predicts these again (`revisit_passes`); if some of their tokens are changed, their keys
    and values and those of the finished block are computed anew (a commit pass). LLaDA2.1 calls
    this multi-block editing and publishes no algorithm. Rows wait for each other with these wider
    calls; what a row writes does not depend on that.

    Args:
      config: the architecture.
      schedule: of blocks at absolute positions, one at a time.
      revisit: earlier blocks that are looked at again; 0 for none, a large number for all.
      widen: let all blocks of such a call see each other. Without, an earlier block sees
        nothing that it did not see before.
    """
    L = schedule.block_length
    if not schedule.absolute or schedule.horizon:
        raise InputError("schedule: exact block caches need blocks at absolute positions, in turn")
    if revisit < 0:
        raise InputError(f"revisit: {revisit} must be 0 (none) or more")

    def run(
        params: ModelParams,
        view: View,
        cache: kv.KVCache,
        positions: jnp.ndarray,
        wanted: jnp.ndarray,
        read: Reader,
        whole: jnp.ndarray | None = None,
    ) -> tuple[kv.KVCache, Prediction]:
        """A call on positions [B, T]; those of `wanted` bool [B, T] are predicted.

        Rows of `whole` bool [B] see everything before their current block, from everywhere.
        """
        S = view.tokens.shape[1]
        held = jnp.clip(positions, 0, S - 1)
        mask = masks.block_diffusion(held, view.index, L)
        if whole is not None:
            before = view.index < view.start[:, None]
            mask = jnp.where(whole[:, None, None], before[:, None], mask)
        out = transformer.apply(
            config,
            params["target"],
            jnp.take_along_axis(view.tokens, held, axis=1),
            positions=held,
            mask=mask,
            cache=kv.truncate(cache, jnp.zeros_like(view.start)),
            slots=jnp.where(positions < 0, S, positions),
            with_logits=False,
        )
        assert out.cache is not None
        logits = transformer.unembed(config, params["target"], out.hidden)
        return out.cache, read(logits, jnp.where(wanted, positions, S))

    def on_block(
        params: ModelParams, view: View, store: BlockCausalStore, read: Reader
    ) -> tuple[kv.KVCache, Prediction]:
        first = view.start - L * (store.duty == _COMMIT)
        positions = first[:, None] + jnp.arange(L)
        wanted = jnp.broadcast_to((store.duty == _BLOCK)[:, None], positions.shape)
        return run(params, view, store.cache, positions, wanted, read)

    def on_earlier(
        params: ModelParams, view: View, store: BlockCausalStore, read: Reader
    ) -> tuple[kv.KVCache, Prediction]:
        width = min((revisit + 1) * L, view.tokens.shape[1])
        positions = view.start[:, None] - width + jnp.arange(width)
        again = store.duty == _REVISIT
        wanted = again[:, None] & (positions >= 0) & (positions < view.start[:, None] - L)
        cache, prediction = run(
            params, view, store.cache, positions, wanted, read, again if widen else None
        )

        def keep(old: jnp.ndarray, new: jnp.ndarray) -> jnp.ndarray:
            """Keys and values of blocks that see what is after them are of no use later."""
            rows = again.reshape(-1, 1, 1, 1)
            return jnp.where(rows if old.ndim == 4 else rows[0], old, new)

        old = store.cache
        cache = cache.replace(
            keys=tuple(map(keep, old.keys, cache.keys)),
            values=tuple(map(keep, old.values, cache.values)),
        )
        return cache, prediction

    def compute(params: ModelParams, view: View, store: BlockCausalStore, read: Reader) -> Call:
        served, size = view.active, jnp.full_like(view.start, L)
        if not revisit:
            cache, prediction = on_block(params, view, store, read)
        else:
            earlier = (store.duty == _REVISIT) | (store.duty == _REFRESH)
            now = (earlier | ~view.active).all()
            served = view.active & (earlier == now)
            width = min((revisit + 1) * L, view.tokens.shape[1])
            size = jnp.where(now, jnp.minimum(width, view.start), L)
            cache, prediction = jax.lax.cond(
                now,
                lambda: on_earlier(params, view, store, read),
                lambda: on_block(params, view, store, read),
            )
        ran = jnp.where(served, store.duty, _NOTHING)
        one = jnp.ones_like(view.start)
        return Call(
            store=store.replace(cache=cache.replace(lengths=store.cache.lengths), ran=ran),
            prediction=prediction,
            served=served,
            calls=one,
            positions=size,
            full=0 * one,
            extra={
                "commit_passes": (ran == _COMMIT) | (ran == _REFRESH),
                "revisit_passes": ran == _REVISIT,
            },
        )

    def update(
        store: BlockCausalStore, view: View, write: jnp.ndarray, moved: jnp.ndarray
    ) -> BlockCausalStore:
        wrote = write.any(axis=1)
        looks_back = moved & (view.start - L >= view.prompt_lengths // L * L) & bool(revisit)
        unsaved = jnp.where(store.ran == _BLOCK, moved & wrote, store.unsaved)
        commit = jnp.where(unsaved, _COMMIT, _BLOCK)
        duty = jnp.select(
            [store.ran == _BLOCK, store.ran == _REVISIT, store.ran == _NOTHING],
            [
                jnp.where(looks_back, _REVISIT, commit),
                jnp.where(wrote, _REFRESH, commit),
                store.duty,
            ],
            _BLOCK,
        )
        return store.replace(duty=duty, unsaved=unsaved)

    def prefill(
        params: ModelParams, store: BlockCausalStore, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> BlockCausalStore:
        """Reads whole blocks of the prompts; what is beyond them is decoded with its block."""
        B, P = tokens.shape
        chunk = L * max(1, min(CHUNK, P) // L)
        tokens = jnp.pad(tokens, ((0, 0), (0, -P % chunk)))

        def part(i: jnp.ndarray, cache: kv.KVCache) -> kv.KVCache:
            positions = jnp.broadcast_to(i * chunk + jnp.arange(chunk), (B, chunk))
            out = transformer.apply(
                config,
                params["target"],
                jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1),
                positions=positions,
                mask=masks.block_diffusion(positions, jnp.arange(cache.slots), L),
                cache=cache,
                slots=positions,
                with_logits=False,
            )
            assert out.cache is not None
            return out.cache

        blocks = lengths.max() // L
        count = -(-blocks * L // chunk)
        return store.replace(cache=jax.lax.fori_loop(0, count, part, store.cache))

    def init(batch: int, slots: int) -> BlockCausalStore:
        zero = jnp.zeros((batch,), jnp.int32)
        return BlockCausalStore(kv.create(config, batch, slots), zero, zero, zero > 0)

    def pending(store: BlockCausalStore) -> jnp.ndarray:
        return store.duty == _REVISIT

    return Policy(init, prefill, compute, update, COUNTERS, pending)
