"""Decoding with hierarchical models: units inside words, the backbone once a word.

The two loops of HAT (arXiv 2501.10322, section 2.4), words outside and characters inside, are one
loop here. The text is a stream of units in which `word_end` closes each word; one round is one call
of the word decoder on all rows. A row whose pending unit closed a word begins the round by encoding
that word and taking a step of the backbone; a round in which no row does skips both. So rows
may stand at different places of their words, and their texts do not depend on each other.

The backbone's cache has p slots a word and grows; the word decoder's has room for one word, and is
begun anew with each. What is written is split into words by the model alone, never by a rule.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding import stats as work
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.speculative import scoring
from decoding.speculative.ngram import find_continuation
from decoding.speculative.tree import DraftTree, chain, proposed_by_depth
from decoding.speculative.verification import exact_match
from models import cache as kv
from models import hierarchical, masks, transformer, utf8
from models.hierarchical import HierarchicalConfig

# Words of a prompt that are encoded in one call.
_CHUNK = 32


class WordState(struct.PyTreeNode):
    """What a run keeps beside its text.

    Attributes:
      backbone: cache of the words that are complete, p slots each.
      word: cache of the word decoder, [B, K, p + C, H]: the p vectors and the units of the current
        word but for the pending one.
      start: int32 [B], where in the text the current word begins.
      character: int32 [B], state of `models.utf8` before the pending unit.
    """

    backbone: kv.KVCache
    word: kv.KVCache
    start: jnp.ndarray
    character: jnp.ndarray


@functools.cache
def word_by_word(
    config: HierarchicalConfig,
    sampling: SamplingConfig,
    *,
    valid_utf8: bool = True,
    num_draft: int = 0,
    max_ngram: int = 4,
) -> Method:
    """A method for the loop; tokens are units, and ends of words and documents among them.

    Args:
      config: the model.
      sampling: acts on the logits of units, the end of a word among them.
      valid_utf8: rule out bytes that would break a character, for models of bytes; words then end
        between characters. The law is the model's, renormalised.
      num_draft: E, units that are drafted at the end of each round from the row's own text, as
        prompt lookup does, and verified by the next round's call; units of one word only. Texts
        are those of E = 0, token for token.
      max_ngram: longest suffix that is looked up for drafts.
    """
    p, C = config.num_prefix, config.max_word
    valid_utf8 = valid_utf8 and config.units == "bytes"

    def init(batch: int, slots: int) -> WordState:
        zeros = jnp.zeros((batch,), jnp.int32)
        return WordState(
            kv.create(config.backbone, batch, slots),
            kv.create(config.decoder, batch, p + C),
            zeros,
            zeros,
        )

    def needed(tokens: Any, lengths: Any) -> Any:
        """Slots for the words that are complete and the next."""
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        return p * (1 + ((tokens == config.word_end) & inside).sum(axis=1))

    def read(
        params: ModelParams, inner: WordState, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> WordState:
        model = params["target"]
        backbone, prefix, start = _read_words(config, model, inner.backbone, tokens, lengths)
        units = _from(tokens, start, C)
        inputs = jnp.concatenate([prefix, hierarchical.embed(model, units)], axis=1)
        positions = jnp.broadcast_to(jnp.arange(p + C), inputs.shape[:2])
        word = _write_word(config, model, inner.word, inputs, positions, positions)[1]
        character = _characters(tokens, lengths) if valid_utf8 else inner.character
        return WordState(backbone, word, start, character)

    def step(params: ModelParams, state: DecodeState) -> tuple[WordState, Emission]:
        written = units_written(config, state)
        tree = draft(config, state, written, num_draft, max_ngram)
        inner, logits = call(config, params["target"], state, tree)
        if sampling.repetition_penalty != 1:
            logits = scoring.penalised_logits(
                logits, tree.ancestry, tree.tokens, state.tokens, state.lengths, sampling
            )
        at_node = written[:, None] + jnp.arange(num_draft + 1)
        logits = hierarchical.possible(config, logits, at_node)
        characters = state.inner.character[:, None]
        if valid_utf8:
            characters = _walk(state.inner.character, tree.tokens)
            logits = _well_formed(config, logits, characters, at_node)
        verdict = exact_match(tree, logits, state.keys, state.lengths, sampling)

        count = jnp.where(state.active, verdict.count, 0)
        last = jnp.minimum(jnp.maximum(count, 1), characters.shape[1]) - 1
        after = jnp.take_along_axis(characters, last[:, None], axis=1)[:, 0]
        character = jnp.where(state.active, after, state.inner.character)
        reached = jnp.arange(1, num_draft + 1) < verdict.count[:, None]
        spent = work.round_work(
            len(count),
            num_draft,
            proposed=proposed_by_depth(tree),
            accepted=reached.astype(jnp.int32),
            extra={"decoder_calls": jnp.ones_like(count)},
        )
        calls = (written == 0).astype(jnp.int32)
        spent = spent.replace(target_calls=calls, target_positions=calls * p)
        return inner.replace(character=character), Emission(verdict.tokens, count, spent)

    return Method(
        "hat",
        ("target",),
        num_draft,
        p,
        init,
        read,
        step,
        counters=("decoder_calls",),
        needed=needed,
        resize=lambda inner, slots: inner.replace(backbone=kv.resize(inner.backbone, slots)),
    )


def units_written(config: HierarchicalConfig, state: DecodeState) -> jnp.ndarray:
    """Units of each row's current word, the pending one included: int32 [B]; 0 after an end."""
    closed = pending_tokens(state) == config.word_end
    return jnp.where(closed, 0, state.lengths - state.inner.start)


def call(
    config: HierarchicalConfig, model: Any, state: DecodeState, tree: DraftTree
) -> tuple[WordState, jnp.ndarray]:
    """One call of the word decoder, after one of encoder and backbone where a word was closed.

    Args:
      config, model: the model and its parameters.
      state: of a run, its `inner` a `WordState`.
      tree: the pending units and drafts of what follows them in their words: a chain of N nodes.

    Returns:
      The state with both caches written and words begun, and logits float32 [B, N, V] of the units
      after each node, those among them that are not possible.
    """
    p, N, inner = config.num_prefix, tree.num_nodes, state.inner
    written = units_written(config, state)
    closed = (written == 0) & state.active
    backbone, prefix = _next_word(config, model, state, closed)
    # The first p inputs are the new word's vectors, or end with the pending unit.
    units = hierarchical.embed(model, tree.tokens).astype(prefix.dtype)
    leading = jnp.pad(units[:, :1], ((0, 0), (p - 1, 0), (0, 0)))
    leading = jnp.where(closed[:, None, None], prefix, leading)
    inputs = jnp.concatenate([leading, units[:, 1:]], axis=1)
    offset = jnp.arange(p + N - 1)
    positions = written[:, None] + offset
    unused = (offset < p - 1) & ~closed[:, None]
    slots = jnp.where(unused, inner.word.slots, positions)
    hidden, word = _write_word(config, model, inner.word, inputs, positions, slots)
    logits = transformer.unembed(config.decoder, model["decoder"], hidden[:, p - 1 :])
    start = jnp.where(closed, state.lengths, inner.start)
    return inner.replace(backbone=backbone, word=word, start=start), logits


def _from(tokens: jnp.ndarray, start: jnp.ndarray, count: int) -> jnp.ndarray:
    """tokens[b, start[b] : start[b] + count]: [B, M] and int [B, ...] -> [B, ..., count]."""
    index = jnp.minimum(start[..., None] + jnp.arange(count), tokens.shape[1] - 1)
    flat = jnp.take_along_axis(tokens, index.reshape(len(tokens), -1), axis=1)
    return flat.reshape(index.shape)


def _read_words(
    config: HierarchicalConfig,
    model: Any,
    cache: kv.KVCache,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
) -> tuple[kv.KVCache, jnp.ndarray, jnp.ndarray]:
    """Encodes the complete words of prompts and runs the backbone on them, chunk by chunk.

    Returns:
      The cache; the vectors [B, p, d] to write the next word from; and its start, int32 [B].
    """
    p, C, P = config.num_prefix, config.max_word, tokens.shape[1]
    index = jnp.arange(P)
    ends = (tokens == config.word_end) & (index < lengths[:, None])
    count = ends.sum(axis=1).astype(jnp.int32)
    # Where the words begin: after each end, in order; those that there are not, at P.
    begins = jnp.sort(jnp.where(ends, index + 1, P), axis=1)
    begins = jnp.pad(begins, ((0, 0), (1, _CHUNK)), constant_values=P)
    begins = begins.at[:, 0].set(0)

    def chunk(carry: tuple) -> tuple:
        i, cache, prefix = carry
        word = i * _CHUNK + jnp.arange(_CHUNK)
        bounds = jax.lax.dynamic_slice_in_dim(begins, i * _CHUNK, _CHUNK + 1, axis=1)
        units = _from(tokens, bounds[:, :-1], C)
        sizes = jnp.clip(jnp.diff(bounds, axis=1) - 1, 1, C)
        vectors = hierarchical.encode(config, model, units, sizes)
        positions = (word[:, None] * p + jnp.arange(p)).reshape(1, -1)
        positions = jnp.broadcast_to(positions, (len(tokens), _CHUNK * p))
        said, cache = hierarchical.think(
            config,
            model,
            vectors,
            cache,
            positions=positions,
            mask=masks.causal(positions, cache.slots),
            slots=jnp.where(positions < count[:, None] * p, positions, cache.slots),
        )
        assert cache is not None
        last = (word == count[:, None] - 1)[:, :, None, None]
        here = jnp.where(last, said, 0).sum(axis=1)
        return i + 1, cache, jnp.where(last.any(axis=1), here, prefix)

    first = model["first"].astype(config.decoder.compute_dtype)
    prefix = jnp.broadcast_to(first, (len(tokens), *first.shape))
    # No longer than the longest of the prompts: a chunk's words beyond a row's count are not kept.
    _, cache, prefix = jax.lax.while_loop(
        lambda carry: carry[0] * _CHUNK < count.max(),
        chunk,
        (jnp.zeros((), jnp.int32), cache, prefix),
    )
    start = jnp.take_along_axis(begins, count[:, None], axis=1)[:, 0]
    return kv.truncate(cache, count * p), prefix, start.astype(jnp.int32)


def _next_word(
    config: HierarchicalConfig, model: Any, state: DecodeState, closed: jnp.ndarray
) -> tuple[kv.KVCache, jnp.ndarray]:
    """Encodes the words that rows have closed and takes a step of the backbone.

    Returns:
      The cache, longer by p slots in the rows of `closed` [B], and in these the vectors [B, p, d]
      to write the next word from.
    """
    inner: WordState = state.inner

    def run(cache: kv.KVCache) -> tuple[kv.KVCache, jnp.ndarray]:
        sizes = jnp.clip(state.lengths - 1 - inner.start, 1, config.max_word)
        units = _from(state.tokens, inner.start, config.max_word)
        vectors = hierarchical.encode(config, model, units[:, None], sizes[:, None])
        said, cache_ = hierarchical.think(config, model, vectors, cache)
        assert cache_ is not None
        return cache_, said[:, 0]

    def skip(cache: kv.KVCache) -> tuple[kv.KVCache, jnp.ndarray]:
        shape = (len(closed), config.num_prefix, config.decoder.embed_dim)
        return cache, jnp.zeros(shape, config.decoder.compute_dtype)

    which = jnp.where(closed.any(), 0, 1)
    cache, prefix = kv.switch(which, (run, skip), inner.backbone)
    more = jnp.where(closed, config.num_prefix, 0)
    return kv.truncate(cache, cache.lengths + more), prefix


def _write_word(
    config: HierarchicalConfig,
    model: Any,
    cache: kv.KVCache,
    inputs: jnp.ndarray,
    positions: jnp.ndarray,
    slots: jnp.ndarray,
) -> tuple[jnp.ndarray, kv.KVCache]:
    """The word decoder on inputs [B, T, d]: hidden states [B, T, d] and its cache."""
    out = transformer.apply(
        config.decoder,
        model["decoder"],
        inputs,
        positions=positions,
        mask=masks.causal(positions, cache.slots),
        cache=cache,
        slots=slots,
        with_logits=False,
    )
    assert out.cache is not None
    return out.hidden, out.cache


def draft(
    config: HierarchicalConfig,
    state: DecodeState,
    written: jnp.ndarray,
    num_draft: int,
    max_ngram: int,
) -> DraftTree:
    """What followed the row's last units before, in the same word: a chain.

    The end of a word is not drafted: what comes after it is not the word decoder's to say alone.
    """
    drafts, found = find_continuation(state.tokens, state.lengths, num_draft, max_ngram, 1)
    ended = (drafts == config.word_end) | (drafts == config.document_end)
    within = jnp.cumsum(ended, axis=1) == 0
    room = written[:, None] + jnp.arange(num_draft) < config.max_word
    return chain(pending_tokens(state), drafts, found & within & room)


def _step(character: jnp.ndarray, unit: jnp.ndarray) -> jnp.ndarray:
    """The state of `models.utf8` after a unit; ends of words and broken text lead between."""
    return jnp.maximum(jnp.asarray(utf8.NEXT)[character, unit], utf8.BETWEEN)


def _characters(tokens: jnp.ndarray, lengths: jnp.ndarray) -> jnp.ndarray:
    """The state after the first `lengths` [B] of tokens [B, P]: int32 [B]."""

    def read(state: jnp.ndarray, column: tuple) -> tuple[jnp.ndarray, None]:
        i, units = column
        return jnp.where(i < lengths, _step(state, units), state), None

    columns = (jnp.arange(tokens.shape[1]), tokens.T)
    return jax.lax.scan(read, jnp.zeros_like(lengths), columns)[0]


def _walk(character: jnp.ndarray, units: jnp.ndarray) -> jnp.ndarray:
    """The states after each of units [B, E], from `character` [B] on: int32 [B, E]."""

    def read(state: jnp.ndarray, column: jnp.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
        state = _step(state, column)
        return state, state

    return jax.lax.scan(read, character, units.T)[1].T


def _well_formed(
    config: HierarchicalConfig, logits: jnp.ndarray, characters: jnp.ndarray, written: jnp.ndarray
) -> jnp.ndarray:
    """Rules out what would break a character, or leave it no room in the word.

    Args:
      config: the model.
      logits: float32 [B, E, V].
      characters: int32 [B, E], state of `models.utf8`.
      written: int32 [B, E], units of the word so far.
    """
    after = jnp.asarray(utf8.NEXT)[characters]
    lacking = jnp.asarray(utf8.TO_COME)[jnp.maximum(after, 0)]
    allowed = (after >= 0) & (written[..., None] + 1 + lacking <= config.max_word)
    unit = jnp.arange(logits.shape[-1])
    ends = (unit == config.word_end) | (unit == config.document_end)
    allowed |= ends & (characters == utf8.BETWEEN)[..., None]
    # A word of a prompt may have been cut within a character, and ends there.
    allowed |= ends & (written >= config.max_word)[..., None]
    return jnp.where(allowed, logits, hierarchical.IMPOSSIBLE)


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config = configs["target"]
    assert isinstance(config, HierarchicalConfig)
    return word_by_word(
        config,
        sampling,
        valid_utf8=options["valid_utf8"],
        num_draft=options["num_draft"] if options["draft"] == "ngram" else 0,
        max_ngram=options["max_ngram"],
    )


SPEC = MethodSpec(
    "hierarchical models: bytes inside words, the backbone once a word",
    ("target",),
    {
        "valid_utf8": Option(True, "rule out bytes that would break a character"),
        "draft": Option(
            "none", "where drafts of the rest of a word come from", choices=("none", "ngram")
        ),
        "num_draft": Option(4, "bytes drafted a round", minimum=1),
        "max_ngram": Option(4, "longest suffix of the text that is looked up", minimum=1),
    },
    _build,
    architecture=HierarchicalConfig,
)
