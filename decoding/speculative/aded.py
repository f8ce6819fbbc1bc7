"""ADED: drafts by tree search in a tri-gram store that learns from the text as it is written.

Liu, Lei, Zhang and Xu, 'Adaptive draft-verification for efficient LLM decoding', arXiv 2407.12021
(AAAI 2025). No draft model and nothing trained: a round first adds the text's last tokens to the
store, then searches it for likely continuations of the last two tokens, which one target call
verifies. What the store has learned can serve the next run (`generation.HotStart`), and it can
begin with a corpus (`training.trigrams`).

Drafts depend on the text and on noise that nothing else uses, so `exact_match` keeps the target's
distribution at any temperature. (The published code does not: at temperatures above 0 it draws
anew after a mismatch.)
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from decoding import randomness
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Memory, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.speculative import tree_search, trigram, verification
from decoding.speculative.drafting import Draft, Drafter, observe_nothing
from decoding.speculative.method import speculative
from decoding.speculative.tree import DraftTree
from decoding.speculative.tree_search import SearchConfig
from decoding.speculative.trigram import Store
from models.errors import InputError

# Stream of `decoding.randomness` for the roll-outs of a search.
ROLL_OUT = 2407


@dataclasses.dataclass(frozen=True)
class Learning:
    """What a store learns, and who shares it.

    Attributes:
      delta: weight that a tri-gram gains each time it is seen.
      cap: largest weight.
      window: last tokens of the text that are seen at every round; a tri-gram is seen again as
        long as it is inside.
      update: whether they are; else the store stays as the run found it.
      learn_prompt: whether every tri-gram of a prompt is seen once before the first round; else a
        prompt's last `window` tokens are all that is ever seen of it.
      shared: one store for all rows, learning from them in row order; else one a row.
      slots: S of a new store.
    """

    delta: float = 0.04
    cap: float = 3.0
    window: int = 16
    update: bool = True
    learn_prompt: bool = False
    shared: bool = True
    slots: int = 2**14


def initial_memory(store: Store) -> Store:
    """A store as `generation.HotStart.value` holds it: the start from a corpus, or from a file.

    Args:
      store: arrays of NumPy or JAX; one store, or for store='per_row' one a row.

    Raises:
      InputError: arrays whose shapes or types are not those of a store.
    """
    slots, width = store.successors.shape[-2:]
    before = store.successors.shape[:-2]
    for field, shape, dtype in (
        ("keys", (slots, 2), jnp.int32),
        ("successors", (slots, width), jnp.int32),
        ("weights", (slots, width), jnp.float32),
    ):
        array = getattr(store, field)
        if array.shape != (*before, *shape) or array.dtype != dtype:
            raise InputError(
                f"store: {field} is {array.dtype}{list(array.shape)}; allowed: "
                f"{jnp.dtype(dtype)}{[*before, *shape]}"
            )
    if slots < trigram.PROBES:
        raise InputError(f"store: {slots} slots; allowed: at least {trigram.PROBES}")
    return jax.tree.map(jnp.asarray, store)


def learn(store: Store, tokens: jnp.ndarray, usable: jnp.ndarray, learning: Learning) -> Store:
    """Adds every tri-gram of some text, row after row where rows share a store.

    Args:
      store: one, or one a row.
      tokens: int32 [B, W].
      usable: bool [B, W], which tokens there are; contiguous.
      learning: how.
    """
    trigrams = jnp.stack([tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]], axis=2)
    whole = usable[:, :-2] & usable[:, 2:]
    add = functools.partial(trigram.update, delta=learning.delta, cap=learning.cap)
    if learning.shared:
        return add(store, trigrams.reshape(-1, 3), whole.reshape(-1))
    return jax.vmap(add)(store, trigrams, whole)


@functools.cache
def aded_drafter(search: str, config: SearchConfig, learning: Learning, num_draft: int) -> Drafter:
    """Drafts trees of up to `num_draft` nodes, `config.sentence_length` deep.

    Args:
      search: 'puct', or 'best_first' for a greedy expansion by path probability, of whose
        settings only the depth is used.
      config: of the search.
      learning: of the store.
      num_draft: most nodes, the root not counted.
    """

    def init(batch: int, slots: int) -> Store:
        store = trigram.empty(learning.slots)
        return store if learning.shared else _for_each(store, batch)

    def read(params: ModelParams, store: Store, tokens: jnp.ndarray, lengths: jnp.ndarray) -> Store:
        if not learning.learn_prompt:
            return store
        return learn(store, tokens, jnp.arange(tokens.shape[1]) < lengths[:, None], learning)

    def draft(store: Store, pair: jnp.ndarray, uniforms: jnp.ndarray) -> tree_search.Drafts:
        successors = functools.partial(trigram.lookup, store)
        if search == "best_first":
            return tree_search.best_first(successors, pair, config.sentence_length, num_draft + 1)
        tree = tree_search.puct_search(successors, pair, uniforms, config)
        return tree_search.best_sentences(successors, tree, config, num_draft + 1)

    def propose(params: ModelParams, store: Store, state: DecodeState) -> Draft:
        tokens, lengths = state.tokens, state.lengths
        if learning.update:
            place = lengths[:, None] + jnp.arange(-learning.window, 0)
            seen = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1)
            store = learn(store, seen, (place >= 0) & state.active[:, None], learning)
        before = jnp.take_along_axis(tokens, jnp.maximum(lengths[:, None] - 2, 0), axis=1)[:, 0]
        before = jnp.where(lengths >= 2, before, trigram.EMPTY)  # part of no pair that is known
        pairs = jnp.stack([before, pending_tokens(state)], axis=1)
        shape = (len(lengths), config.iterations, config.depth)
        keys = randomness.at(state.keys, lengths, ROLL_OUT)
        uniforms = randomness.uniform(randomness.several(keys, shape[1] * shape[2]))
        store_axis = None if learning.shared else 0
        drafts = jax.vmap(draft, (store_axis, 0, 0))(store, pairs, uniforms.reshape(shape))
        tree = DraftTree(
            tokens=drafts.tokens,
            parent=drafts.parent,
            depth=drafts.depth,
            valid=drafts.valid,
            log_q=None,
            max_depth=config.sentence_length,
            is_chain=False,
        )
        nodes = drafts.valid.sum(axis=1) - 1
        # A pair that is known has successors, and a search finds one at least.
        return Draft(tree, store, counters={"tree_nodes": nodes, "unknown_pairs": nodes == 0})

    def put(store: Store, value: Store) -> Store:
        own, given = store.keys.shape[:-2], value.keys.shape[:-2]
        if given not in ((), own):
            raise InputError(
                f"memory: {given[0]} stores, one a row; allowed: one store"
                + ("" if learning.shared else f", or {own[0]}, as many as there are rows")
            )
        return _for_each(value, own[0]) if own != given else value

    return Drafter(
        roles=(),
        num_nodes=num_draft + 1,
        max_depth=config.sentence_length,
        law=verification.DETERMINISTIC,
        init=init,
        prefill=read,
        propose=propose,
        observe=observe_nothing,
        counters=("tree_nodes", "unknown_pairs"),
        memory=Memory(take=lambda store: store, put=put),
    )


def _for_each(store: Store, batch: int) -> Store:
    """The same store for each row."""
    return jax.tree.map(lambda array: jnp.broadcast_to(array, (batch, *array.shape)), store)


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    settings = {field.name for field in dataclasses.fields(SearchConfig)}
    shared = options["store"] == "shared"
    if shared and options["rule"] != "exact_match":
        raise InputError(
            f"rule: {options['rule']!r} lets a row's text depend on its drafts, and with store="
            "'shared' on other rows; allowed: exact_match, or store='per_row'"
        )
    learning = Learning(
        delta=options["delta"],
        cap=options["cap"],
        window=options["window"],
        # Tri-grams of weight 0 would only push others out.
        update=options["update"] and options["delta"] > 0,
        learn_prompt=options["learn_prompt"] and options["delta"] > 0,
        shared=shared,
        slots=options["slots"],
    )
    search = SearchConfig(**{name: options[name] for name in settings})
    drafter = aded_drafter(options["search"], search, learning, options["budget"])
    rule = "exact_match" if sampling.greedy else options["rule"]
    return speculative("aded", configs["target"], drafter, rule, sampling)


SPEC = MethodSpec(
    "tree search in a tri-gram store that learns from the text; verified exactly (lossless)",
    ("target",),
    {
        "search": Option(
            "puct",
            "how the store is searched; best_first: greedily by path probability",
            choices=("puct", "best_first"),
        ),
        "iterations": Option(150, "of the PUCT search, a round", minimum=1),
        "sentence_length": Option(
            4, "words of a searched sentence, the root's included", minimum=2
        ),
        "top_sentences": Option(24, "most visited sentences that are drafted", minimum=2),
        "c1": Option(32.0, "exploration constant of PUCT; 1.814 in the first release", minimum=0.0),
        "c2": Option(8.0, "its second constant", minimum=0.001),
        "value": Option(
            "path",
            "what a sentence is worth: its steps' weights, or as published code computes it",
            choices=tree_search.VALUES,
        ),
        "budget": Option(64, "most nodes of a draft tree", minimum=1),
        "store": Option(
            "shared", "one tri-gram store for all rows, or one a row", choices=("shared", "per_row")
        ),
        "slots": Option(2**14, "pairs that a new store has room for", minimum=trigram.PROBES),
        "update": Option(True, "learn from the text at every round"),
        "delta": Option(0.04, "weight a tri-gram gains when it is seen", minimum=0.0),
        "window": Option(16, "last tokens that are seen at a round", minimum=3),
        "cap": Option(3.0, "largest weight", minimum=0.001),
        "learn_prompt": Option(False, "learn from the whole prompt before the first round"),
        "rule": Option(
            "exact_match",
            "verification rule; exact_match at temperature 0",
            choices=("exact_match", "typical_acceptance"),
        ),
    },
    _build,
)
