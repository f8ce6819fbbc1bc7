"""What draft trees cost: the share of a round outside model calls, memory, one call on many nodes.

Random weights of named sizes; 64 drafted nodes, batch 1. With an accelerator, Llama 3's shapes:

    python -m experiments.benchmark --suite=trees --parts=overhead,memory,verification
        --target=llama3_8b --draft=llama3_2_1b
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import generation, loop, methods, randomness
from decoding.loop import DecodeState, Method, ModelParams
from decoding.sampling import SamplingConfig
from decoding.speculative import scoring, template
from decoding.speculative.sampled_tree import tree_drafter
from decoding.speculative.sources import Growing, Source, model_source, plant
from decoding.speculative.tree import DraftTree
from decoding.stopping import StopConfig
from experiments import timing
from models import cache as kv
from models import sizes, transformer
from models.config import TransformerConfig

NODES = 64
WIDTH, DEPTH = 8, 8  # of SpecTr and RSD-S
LEVELS = (4, 12, 24, 24)  # of RSD-C and the most likely tree, 4-3-2-1
LAYER = 32  # nodes of a layer that DySpec asks for at once
ROUNDS = 4  # of a timed run: short ones find quiet moments
SLOTS = 512
PROMPT_TOKENS = 32
VOCABULARIES = (32000, 64000)  # between which memory that follows the vocabulary is measured
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "SpecTr": ("spectr", {"num_sequences": WIDTH, "length": DEPTH}),
    "RSD-C": ("rsd_c", {"branching": "4-3-2-1"}),
    "RSD-S": ("rsd_s", {"width": WIDTH, "depth": DEPTH}),
    "DySpec": ("dyspec", {"budget": NODES, "layer_width": LAYER}),
    "top tree": ("top_tree", {"branching": "4-3-2-1"}),
    "Token Recycling": ("token_recycling", {"template": f"nodes{NODES}"}),
    "ADED": ("aded", {"budget": NODES}),
}
_STOP = StopConfig(SLOTS, (), SLOTS * 2)

Configs = Mapping[str, TransformerConfig]


def configs(target: str, draft: str, dtype: str | None = None) -> dict[str, TransformerConfig]:
    """Two named sizes with one vocabulary, the smaller of the two, and one dtype."""
    found = {"target": sizes.get(target), "draft": sizes.get(draft)}
    vocab = min(config.vocab_size for config in found.values())
    dtype = dtype or found["target"].dtype
    return {role: c.replace(vocab_size=vocab, dtype=dtype) for role, c in found.items()}


def weights(configs: Configs) -> ModelParams:
    """Random parameters by role."""
    params = {}
    for number, (role, config) in enumerate(configs.items()):

        def make(key: jax.Array, config: TransformerConfig = config) -> Any:
            new = transformer.init(config, key)
            return jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), new)

        # The default generator takes XLA four times as long to compile.
        params[role] = jax.jit(make)(jax.random.key(number, impl="rbg"))
    return params


def _prompt(vocab_size: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(1, vocab_size, (1, PROMPT_TOKENS)).tolist()


def _state(params: ModelParams, configs: Configs, method: Method) -> DecodeState:
    prompts = _prompt(configs["target"].vocab_size)
    state, _ = generation.begin(params, prompts, method, _STOP, buffer=SLOTS)
    return jax.block_until_ready(loop.grow(state, SLOTS))


def overhead(
    configs: Configs,
    params: ModelParams,
    repeats: int,
    entries: Mapping[str, tuple[str, dict[str, Any]]] = METHODS,
) -> list[dict[str, Any]]:
    """Share of a 64-node round that is not a model call, by method.

    The same calls are made in a loop of their own on one tree. The rest is drawing noise, choosing
    nodes, verification, commit and the text: everything that a model call is not. Best of
    `repeats` short runs taken in turn, since the two are subtracted.
    """
    sampling = SamplingConfig(temperature=1.0)
    source = model_source(configs["draft"], sampling)
    found = []
    for label, (name, options) in entries.items():
        method = methods.build(name, configs, sampling, options)
        state = _state(params, configs, method)
        until = np.int32(ROUNDS)
        after = loop.advance(params, state, until, method=method, stop=_STOP, slots=SLOTS)
        calls = int(after.stats.draft_calls[0]) / ROUNDS
        widths, tree = _shape(label, params, configs, source, round(calls))
        runs: dict[str, Callable[[], float]] = {
            "whole": functools.partial(_whole, params, configs, method),
            "bare": _bare(params, configs, source, widths, tree, method),
        }
        seconds = timing.best(runs, repeats)
        found.append(
            {
                "label": label,
                "nodes": tree.num_nodes - 1,
                "draft_calls": calls,
                "round_ms": seconds["whole"] * 1e3,
                "model_calls_ms": seconds["bare"] * 1e3,
                "overhead_share": 1 - seconds["bare"] / seconds["whole"],
            }
        )
    return found


def _whole(params: ModelParams, configs: Configs, method: Method) -> float:
    """Seconds a round of the real loop takes."""
    state = _state(params, configs, method)
    begin = time.perf_counter()
    until = np.int32(ROUNDS)
    state = loop.advance(params, state, until, method=method, stop=_STOP, slots=SLOTS)
    jax.block_until_ready(state)
    return (time.perf_counter() - begin) / ROUNDS


def _shape(
    label: str, params: ModelParams, configs: Configs, source: Source, calls: int
) -> tuple[tuple[int, ...], DraftTree]:
    """Nodes of each draft call after the first, and a tree of 64 nodes for the target's call."""
    if label in ("Token Recycling", "ADED"):  # no draft model
        return (), template_tree(template.named(f"nodes{NODES}", 8))
    kinds = {
        "SpecTr": ("independent", (WIDTH,) * DEPTH),
        "RSD-C": ("without_replacement", LEVELS),
        "RSD-S": ("stochastic_beam", (WIDTH,) * DEPTH),
        "DySpec": ("without_replacement", LEVELS),  # some tree: its own differs by round
        "top tree": ("most_likely", LEVELS),
    }
    expansion, levels = kinds[label]
    sampling = SamplingConfig(temperature=1.0)
    method = methods.build("rsd_c", configs, sampling, METHODS["RSD-C"][1])
    state = _state(params, configs, method)
    drafter = tree_drafter(source, expansion, levels)
    tree = jax.jit(drafter.propose)(params, state.inner.drafter, state).tree
    widths = (LAYER,) * (calls - 1) if label == "DySpec" else levels[:-1]
    return widths, tree


def template_tree(shape: template.Template) -> DraftTree:
    """A static tree with token 0 everywhere."""
    row = lambda values: jnp.asarray([values], jnp.int32)  # noqa: E731
    return DraftTree(
        tokens=row([0] * shape.num_nodes),
        parent=row(shape.parent),
        depth=row(shape.depth),
        valid=jnp.ones((1, shape.num_nodes), bool),
        log_q=None,
        max_depth=shape.max_depth,
        is_chain=False,
    )


def _bare(
    params: ModelParams,
    configs: Configs,
    source: Source,
    widths: Sequence[int],
    tree: DraftTree,
    method: Method,
) -> Callable[[], float]:
    """Seconds of a round's model calls alone: nothing is drawn, judged or kept."""
    state = _state(params, configs, method)
    drafting = "draft" in method.roles

    @jax.jit
    def calls(params: ModelParams, tree: DraftTree, state: DecodeState) -> jnp.ndarray:
        growing = Growing(tree.tokens, tree.parent, tree.depth, tree.valid, tree.ancestry)

        def one(_: jnp.ndarray, carry: tuple) -> tuple:
            target, draft, total = carry
            # What a call reads must depend on the round before, or it is done only once.
            moved = state.replace(tokens=state.tokens.at[:, 0].set(total.astype(jnp.int32) % 2))
            if drafting:
                log_q, draft = source.root(params, draft, moved)
                total = total + log_q.max()
            first = 1
            for width in widths:
                start = jnp.full((1,), min(first, tree.num_nodes - width))
                log_q, draft = source.nodes(params, draft, moved, growing, start, width)
                total, first = total + log_q.max(), first + width
            shifted = tree.replace(tokens=tree.tokens + (total > 1e9))
            out = scoring.score(configs["target"], params["target"], target, shifted)
            assert out.logits is not None and out.cache is not None
            return kv.truncate(out.cache, target.lengths), draft, total + out.logits.max()

        inner = state.inner
        draft = kv.fold(inner.drafter) if drafting else ()
        start = (kv.fold(inner.target), draft, jnp.zeros(()))
        return jax.lax.fori_loop(0, ROUNDS, one, start)[2]

    def run() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(calls(params, tree, state))
        return (time.perf_counter() - begin) / ROUNDS

    return run


def memory(
    configs: Configs,
    *,
    vocabularies: tuple[int, int] = VOCABULARIES,
    slots: int = SLOTS,
    nodes: int = NODES,
    entries: Mapping[str, tuple[str, dict[str, Any]]] = METHODS,
) -> list[dict[str, Any]]:
    """Temporary memory of a compiled round, and how much of it grows with nodes times vocabulary.

    Nothing is run. Each loop is compiled for two vocabularies; the difference of its temporaries
    over that of a float32 array [N, V] says how many such arrays are alive at once. The target's
    logits are one; a sampled drafter's distributions are at most another.

    Args:
      configs: architectures by role; their vocabularies are replaced.
      vocabularies: the two; the first is what the bytes are given for.
      slots: of the caches.
      nodes: that the methods draft.
      entries: methods and options by label.
    """
    found = []
    for label, (name, options) in entries.items():
        usage = []
        for vocab in vocabularies:
            sized = {role: config.replace(vocab_size=vocab) for role, config in configs.items()}
            method = methods.build(name, sized, SamplingConfig(temperature=1.0), options)
            analysis = _compile(sized, method, slots).memory_analysis()
            assert analysis is not None
            usage.append(analysis.temp_size_in_bytes)
        array = 4 * (nodes + 1) * (vocabularies[1] - vocabularies[0])
        found.append(
            {
                "label": label,
                "nodes": nodes,
                "vocabulary": vocabularies[0],
                "temporaries_bytes": usage[0],
                "logits_bytes": 4 * (nodes + 1) * vocabularies[0],
                "arrays": (usage[1] - usage[0]) / array,
            }
        )
    return found


def _compile(configs: Configs, method: Method, slots: int) -> Any:
    """The loop compiled on shapes alone."""
    params = {
        role: jax.eval_shape(functools.partial(transformer.init, configs[role]), jax.random.key(0))
        for role in method.roles
    }
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    begin = functools.partial(loop.start, method=method, slots=slots, buffer=slots)
    prompt = jax.ShapeDtypeStruct((1, PROMPT_TOKENS), jnp.int32)
    state = jax.eval_shape(begin, params, prompt, row, randomness.row_keys(0, jnp.zeros(1, int)))
    until = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = loop.advance.lower(params, state, until, method=method, stop=_STOP, slots=slots)
    return lowered.compile()


def verification(configs: Configs, params: ModelParams, repeats: int) -> dict[str, Any]:
    """Best time of one target call on 64 drafted nodes and the root, over a call on one token."""
    config, weights = configs["target"], params["target"]
    tree = template_tree(template.named(f"nodes{NODES}", 8))
    single = plant(jnp.zeros((1,), jnp.int32), 1)
    one = DraftTree(single.tokens, single.parent, single.depth, single.valid, None, 1, True)
    cache = kv.fold(kv.truncate(kv.create(config, 1, SLOTS), jnp.full((1,), 256)))

    @jax.jit
    def repeat(weights: Any, cache: kv.KVCache, tree: DraftTree) -> jnp.ndarray:
        def body(_: jnp.ndarray, carry: tuple) -> tuple:
            cache, total = carry
            shifted = tree.replace(tokens=tree.tokens + (total > 1e9))
            out = scoring.score(config, weights, cache, shifted)
            assert out.logits is not None and out.cache is not None
            return kv.truncate(out.cache, cache.lengths), total + out.logits.max()

        return jax.lax.fori_loop(0, ROUNDS, body, (cache, jnp.zeros(())))[1]

    def run(tree: DraftTree) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(repeat(weights, cache, tree))
        return (time.perf_counter() - begin) / ROUNDS

    seconds = timing.best({"tree": lambda: run(tree), "one": lambda: run(one)}, repeats)
    return {
        "nodes": tree.num_nodes - 1,
        "dtype": config.dtype,
        "tree_ms": seconds["tree"] * 1e3,
        "one_token_ms": seconds["one"] * 1e3,
        "ratio": seconds["tree"] / seconds["one"],
    }


def table(found: Mapping[str, Any]) -> str:
    """The parts that were measured, as Markdown."""
    lines: list[str] = []
    if "overhead" in found:
        lines += [
            "### share of a round outside model calls (64 nodes, temperature 1, batch 1)",
            "",
            "| method | draft calls | round | model calls | share |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['label']} | {r['draft_calls']:.1f} | {r['round_ms']:.1f} ms "
            f"| {r['model_calls_ms']:.1f} ms | {r['overhead_share']:.1%} |"
            for r in found["overhead"]
        ]
        lines.append("")
    if "memory" in found:
        vocab = found["memory"][0]["vocabulary"]
        lines += [
            f"### temporaries of a compiled round (64 nodes, vocabulary {vocab}, batch 1)",
            "",
            "| method | temporaries | target logits | arrays [N, V] alive at once |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['label']} | {r['temporaries_bytes'] / 1e6:.1f} MB "
            f"| {r['logits_bytes'] / 1e6:.1f} MB | {r['arrays']:.2f} |"
            for r in found["memory"]
        ]
        lines.append("")
    if "verification" in found:
        r = found["verification"]
        lines += [
            f"One target call on {r['nodes']} nodes and the root ({r['dtype']}, batch 1): "
            f"{r['tree_ms']:.1f} ms, on one token {r['one_token_ms']:.1f} ms: "
            f"{r['ratio']:.2f} times.",
            "",
        ]
    return "\n".join(lines)
