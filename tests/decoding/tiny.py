"""Tiny models, one batch of ragged prompts and naive references that all tests of decoding share.

Shapes are shared so that little is compiled: eight prompts in 32 slots, 24 new tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import generation, loop, methods, randomness, stopping
from decoding.sampling import SamplingConfig
from decoding.speculative import verification
from decoding.speculative.drafting import Draft, Drafter, nothing, observe_nothing
from decoding.speculative.tree import DraftTree
from models import transformer
from models.config import TransformerConfig
from models.hierarchical import HierarchicalConfig
from models.masked_words import ReaderConfig
from models.random_embeddings import LexinvariantConfig
from tests.models import random_models, tiny_hierarchical
from tests.training import tiny_words

TARGET = TransformerConfig(
    vocab_size=64,
    embed_dim=16,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=32,
    max_position=1024,
    window=6,
    local_layers=(True, False),
)
DRAFT = TARGET.replace(num_layers=1, local_layers=(True,))
CONFIGS = {"target": TARGET, "draft": DRAFT}

# For methods that fill masks.
MASKED = TARGET.replace(
    window=None,
    local_layers=(),
    num_kv_heads=8,
    causal=False,
    mask_token_id=63,
    eos_token_ids=(5,),
    family="llada",
)

# For the method that is given a table with every row.
LEXINVARIANT = LexinvariantConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4, mlp_dim=32,
    max_position=1024, eos_token_ids=(5,), fixed_ids=(5,),
)  # fmt: skip

# Five tokens: whole continuations can be enumerated, and a random draft is often right.
SMALL = TARGET.replace(vocab_size=5, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)
SMALL_DRAFT = SMALL.replace(num_layers=1, local_layers=(True,))
SMALL_CONFIGS = {"target": SMALL, "draft": SMALL_DRAFT}

PROMPT_LENGTHS = (9, 1, 17, 32, 2, 30, 5, 12)
NEW_TOKENS = 24
STOP = stopping.StopConfig(NEW_TOKENS)


def first_layer(params: Any, seed: int = 1) -> Any:
    """A draft model: the target's first layer, a little disturbed, under its own head."""
    rng = np.random.default_rng(seed)
    kept = {name: value for name, value in params.items() if name != "layers_1"}
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), kept)


@functools.cache
def params(config: TransformerConfig = TARGET) -> dict[str, Any]:
    """Parameters of the target and of its draft model, by role."""
    target = dict(random_models.params(config))
    # The second layer says less than the first, so that the draft is right now and then.
    target["layers_1"] = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0.4 if path[-2].key in ("out", "down") else x, target["layers_1"]
    )
    return {"target": target, "draft": first_layer(target)}


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS, vocab: int = 64, seed: int = 0) -> list:
    """Random prompts with repeated stretches, which prompt lookup can find."""
    rng = np.random.default_rng(seed)
    motif = rng.integers(0, vocab, 6)
    rows = []
    for length in lengths:
        row = rng.integers(0, vocab, length)
        if length > 14:
            row[1:7], row[-6:] = motif, motif
        rows.append(row.tolist())
    return rows


PROMPTS = prompts()


def build(name: str, temperature: float = 0.0, /, **options: Any) -> loop.Method:
    """A method on the tiny pair, or on the model that it is for; see also `decode`."""
    spec = methods.spec(name)
    configs: Mapping[str, Any] = {"target": MASKED} if spec.bidirectional else CONFIGS
    configs = {
        HierarchicalConfig: {"target": tiny_hierarchical.HAT},
        LexinvariantConfig: {"target": LEXINVARIANT},
        ReaderConfig: {"target": tiny_words.config("words", True, "autoregressive")},
    }.get(spec.architecture, configs)
    return methods.build(name, configs, SamplingConfig(temperature=temperature), options)


def decode(method: loop.Method, rows: Sequence[Sequence[int]] = PROMPTS, **kwargs: Any) -> list:
    """`generate` on the tiny pair under STOP unless told otherwise."""
    return generation.generate(params(), rows, method, kwargs.pop("stop", STOP), **kwargs)


def texts(rows: Sequence[generation.Row]) -> list[list[int]]:
    return [row.token_ids for row in rows]


@functools.cache
def _forward(config: TransformerConfig) -> Callable[..., jnp.ndarray]:
    return jax.jit(lambda p, tokens: transformer.apply(config, p, tokens).logits)


def last_logits(
    config: TransformerConfig, model: Any, rows: Sequence[Sequence[int]], width: int = 64
) -> np.ndarray:
    """Logits [B, V] after each text, from one call without a cache on rows padded to `width`."""
    batch = -(-len(rows) // 8) * 8
    tokens = np.zeros((batch, width), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    logits = np.asarray(_forward(config)(model, tokens))
    return np.stack([logits[b, len(row) - 1] for b, row in enumerate(rows)])


def greedy(
    config: TransformerConfig,
    model: Any,
    rows: Sequence[Sequence[int]],
    steps: int,
    *,
    width: int = 64,
    warp: Callable[[list[int], np.ndarray], np.ndarray] = lambda text, logits: logits,
) -> list[list[int]]:
    """Arg-max continuations, running the whole text again for every token.

    Args:
      warp: (text, logits [V]) -> logits [V], such as a repetition penalty.
    """
    rows = [list(row) for row in rows]
    starts = [len(row) for row in rows]
    for _ in range(steps):
        logits = last_logits(config, model, rows, width)
        for row, values in zip(rows, logits, strict=True):
            values = warp(row, values)
            second, best = np.sort(values)[-2:]
            assert best - second > 1e-4, "near-tie: choose another seed"
            row.append(int(values.argmax()))
    return [row[start:] for row, start in zip(rows, starts, strict=True)]


@functools.cache
def plain_greedy(steps: int = NEW_TOKENS) -> tuple[tuple[int, ...], ...]:
    """The reference of most tests: PROMPTS continued at temperature 0."""
    if steps < NEW_TOKENS + 6:
        return tuple(row[:steps] for row in plain_greedy(NEW_TOKENS + 6))
    found = greedy(TARGET, params()["target"], PROMPTS, steps)
    assert len({token for row in found for token in row}) > 10
    return tuple(map(tuple, found))


# Branching trees by the parent of each node; paths through them skip nodes.
PARENTS = (-1, 0, 0, 1, 1, 2, 5, 3)


def depths(parents: Sequence[int]) -> list[int]:
    found = [0]
    for parent in parents[1:]:
        found.append(found[parent] + 1)
    return found


@functools.cache
def branching_drafter(parents: tuple[int, ...], vocab: int, random: bool) -> Drafter:
    """Drafts trees of one shape with arbitrary tokens; every seventh node is not valid.

    Args:
      parents: index of each node's parent, -1 for the root.
      vocab: tokens drafted are below this.
      random: drawn from noise of their own; else computed from the row's length.
    """
    depth = depths(parents)
    N = len(parents)

    def propose(params: Any, inner: Any, state: loop.DecodeState) -> Draft:
        B, node = state.lengths.shape[0], jnp.arange(N)
        if random:
            keys = randomness.at(state.keys, state.lengths, 99)
            tokens = jax.vmap(lambda key: jax.random.randint(key, (N,), 0, vocab))(keys)
        else:
            tokens = (state.lengths[:, None] * 3 + node * 2 + node // 3) % vocab
        root = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
        valid = (state.lengths[:, None] + node) % 7 != 0
        tree = DraftTree(
            tokens=jnp.where(node == 0, root, tokens).astype(jnp.int32),
            parent=jnp.broadcast_to(jnp.asarray(parents, jnp.int32), (B, N)),
            depth=jnp.broadcast_to(jnp.asarray(depth, jnp.int32), (B, N)),
            valid=valid | (node == 0),
            log_q=None,
            max_depth=max(depth),
            is_chain=False,
        )
        return Draft(tree, ())

    law = verification.DETERMINISTIC
    return Drafter((), N, max(depth), law, nothing, nothing, propose, observe_nothing)


def start(
    method: loop.Method,
    models: Mapping[str, Any],
    rows: Sequence[Sequence[int]],
    *,
    slots: int,
    buffer: int,
    seed: int = 0,
) -> loop.DecodeState:
    """`loop.start` without the padding and cache sizes of `generation`."""
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    lengths = np.asarray([len(row) for row in rows], np.int32)
    keys = randomness.row_keys(seed, jnp.arange(len(rows)))
    return loop.start(
        dict(models), tokens, lengths, keys, method=method, slots=slots, buffer=buffer
    )
