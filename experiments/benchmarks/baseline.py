"""The foundation's speed: decoding against Hugging Face, against the memory floor, and its parts.

Everything of a shape is measured in one process, in turn. Times are medians over repeats; ratios
are medians of ratios taken repeat by repeat.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import generation, loop, methods
from decoding.sampling import SamplingConfig
from decoding.stopping import StopConfig
from experiments import timing
from experiments.benchmarks import reference
from models import cache as kv
from models import sizes, transformer
from models.config import TransformerConfig

PROMPT_TOKENS = 32
NEW_TOKENS = 128
BATCHES = (1, 8)
SLOTS = (256, 1024, 4096)
NUM_DRAFT = 5
_GREEDY = SamplingConfig()


def run(shapes: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measures every shape; see the functions below for what each figure is."""
    found: dict[str, Any] = {"read_gb_per_second": read_bandwidth(), "shapes": {}}
    for name in shapes:
        config = sizes.get(name)
        params = transformer.init(config, jax.random.key(0))
        found["shapes"][name] = {
            "parameters": config.num_params(),
            "against_hugging_face": [
                against_hugging_face(config, params, batch, repeats) for batch in BATCHES
            ],
            "floor": floor(config, params, repeats),
            "slots": by_slots(config, params, repeats),
            "scoring": scoring(config, params, repeats),
            "round_overhead": round_overhead(config, params, repeats),
            "memory": memory(config, params),
        }
    return found


def _prompts(config: TransformerConfig, batch: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(1, config.vocab_size, (batch, PROMPT_TOKENS)).tolist()


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def read_bandwidth(megabytes: int = 512, repeats: int = 9) -> float:
    """Best rate at which all cores together read a large array, in GB/s."""
    rows = jnp.ones((64, megabytes * 2**20 // 4 // 64), jnp.float32)
    total = jax.jit(lambda x: x.sum(axis=1))
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(total(rows))
        best = max(best, rows.size * 4 / (time.perf_counter() - begin) / 1e9)
    return best


def against_hugging_face(
    config: TransformerConfig, params: transformer.Params, batch: int, repeats: int
) -> dict[str, Any]:
    """Greedy tokens/s of both on one checkpoint; Hugging Face at its better thread count."""
    prompts = _prompts(config, batch)
    method = methods.build("autoregressive", {"target": config}, _GREEDY)
    stop = StopConfig(NEW_TOKENS, (), config.max_position)

    def ours() -> list[list[int]]:
        rows = generation.generate({"target": params}, prompts, method, stop)
        return [row.token_ids for row in rows]

    model = reference.hugging_face(config, params)
    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    for threads in (1, 2):
        runs[f"hugging face, {threads} threads"] = reference.greedy(
            model, prompts, NEW_TOKENS, threads
        )
    measured = timing.side_by_side(runs, repeats, label=f"batch {batch}")
    best = min(list(runs)[1:], key=lambda name: measured[name]["median"])
    tokens = batch * NEW_TOKENS
    return {
        "batch": batch,
        "tokens_per_second": tokens / measured["ours"]["median"],
        "hugging_face_tokens_per_second": tokens / measured[best]["median"],
        "hugging_face_setting": best,
        "ratio": timing.speedup(measured[best]["seconds"], measured["ours"]["seconds"]),
        "ms_per_step": measured["ours"]["median"] / NEW_TOKENS * 1e3,
        "same_tokens": measured["ours"]["result"] == measured[best]["result"],
    }


def _decode_only(
    config: TransformerConfig, params: transformer.Params, batch: int, max_new: int
) -> Callable[[], float]:
    """Seconds that NEW_TOKENS rounds take after the prompt, in a run that may go to max_new."""
    prompts = _prompts(config, batch)
    method = methods.build("autoregressive", {"target": config}, _GREEDY)
    stop = StopConfig(max_new, (), config.max_position)

    def run() -> float:
        state, slots = generation.begin({"target": params}, prompts, method, stop)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state, _ = generation.advance(
            {"target": params}, state, slots, method, stop, rounds=NEW_TOKENS
        )
        jax.block_until_ready(state)
        return time.perf_counter() - begin

    return run


def floor(
    config: TransformerConfig, params: transformer.Params, repeats: int
) -> list[dict[str, float]]:
    """Time per step over the time to read parameters and used cache once.

    The bandwidth is measured before and after, and its best value counts.
    """
    runs = {b: _decode_only(config, params, b, NEW_TOKENS) for b in BATCHES}
    bandwidth = read_bandwidth()
    seconds = timing.medians(runs, repeats)
    bandwidth = max(bandwidth, read_bandwidth())
    mean_length = PROMPT_TOKENS + NEW_TOKENS / 2
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    found = []
    for batch in BATCHES:
        moved = _bytes(params) + batch * mean_length * token_bytes
        ideal = moved / bandwidth / 1e9
        step = seconds[batch] / NEW_TOKENS
        found.append(
            {
                "batch": batch,
                "ms_per_step": step * 1e3,
                "floor_ms": ideal * 1e3,
                "over_floor": step / ideal,
                "read_gb_per_second": bandwidth,
            }
        )
    return found


def by_slots(
    config: TransformerConfig, params: transformer.Params, repeats: int
) -> list[dict[str, float]]:
    """Time per step at equal length in runs allowed to grow to 256, 1024 and 4096 tokens."""
    runs = {
        slots: _decode_only(config, params, 1, min(slots, config.max_position) - PROMPT_TOKENS)
        for slots in SLOTS
    }
    seconds = timing.medians(runs, repeats)
    return [{"slots": s, "ms_per_step": seconds[s] / NEW_TOKENS * 1e3} for s in SLOTS]


def _calls(
    config: TransformerConfig, params: transformer.Params, tokens: int, steps: int
) -> Callable[[], float]:
    """Seconds a forward of `tokens` tokens over a short cache takes, averaged over `steps`."""

    @jax.jit
    def repeat(params: Any, cache: kv.KVCache, inputs: jnp.ndarray) -> jnp.ndarray:
        def body(_: Any, carry: Any) -> Any:
            cache, inputs = carry
            out = transformer.apply(config, params, inputs, cache=cache)
            assert out.logits is not None and out.cache is not None
            cache = kv.truncate(out.cache, out.cache.lengths + 1)
            return cache, jnp.argmax(out.logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, steps, body, (cache, inputs))[1]

    cache = kv.fold(kv.create(config, 1, 128))  # as inside the loop
    inputs = jnp.zeros((1, tokens), jnp.int32)

    def run() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(repeat(params, cache, inputs))
        return (time.perf_counter() - begin) / steps

    return run


def scoring(
    config: TransformerConfig, params: transformer.Params, repeats: int
) -> list[dict[str, float]]:
    """Time of one call on several tokens over one call on one token, batch 1."""
    seconds = timing.medians({t: _calls(config, params, t, 32) for t in (1, 2, 4, 8, 16)}, repeats)
    return [
        {"tokens": t, "ms": s * 1e3, "over_one_token": s / seconds[1]} for t, s in seconds.items()
    ]


def round_overhead(
    config: TransformerConfig, params: transformer.Params, repeats: int
) -> dict[str, float]:
    """Share of a speculative round that is not spent in its model calls.

    A one-layer draft of a quarter of the width; the model calls are timed in loops of their own.
    """
    width = config.head_dim * max(1, config.embed_dim // 4 // config.head_dim)
    draft = config.replace(
        num_layers=1,
        embed_dim=width,
        num_heads=width // config.head_dim,
        num_kv_heads=width // config.head_dim,
        mlp_dim=width * 3,
    )
    weights = {"target": params, "draft": transformer.init(draft, jax.random.key(1))}
    method = methods.build(
        "speculative_sampling", {"target": config, "draft": draft}, _GREEDY,
        {"num_draft": NUM_DRAFT},
    )  # fmt: skip
    rounds = 24
    stop = StopConfig(1 << 20, (), 1 << 20)

    def full() -> float:
        # Slots for the worst case, so that the loop is not left in between.
        state, _ = generation.begin(weights, _prompts(config, 1), method, stop, buffer=256)
        state = jax.block_until_ready(loop.grow(state, 256))
        begin = time.perf_counter()
        until = np.int32(rounds)
        state = loop.advance(weights, state, until, method=method, stop=stop, slots=256)
        jax.block_until_ready(state)
        return (time.perf_counter() - begin) / rounds

    runs: dict[str, Callable[[], float]] = {
        "round": full,
        "target": _calls(config, params, NUM_DRAFT + 1, 32),
        "draft_two": _calls(draft, weights["draft"], 2, 32),
        "draft_one": _calls(draft, weights["draft"], 1, 32),
    }
    seconds = timing.medians(runs, repeats)
    calls = seconds["target"] + seconds["draft_two"] + (NUM_DRAFT - 1) * seconds["draft_one"]
    return {
        "round_ms": seconds["round"] * 1e3,
        "model_calls_ms": calls * 1e3,
        "overhead_share": 1 - calls / seconds["round"],
    }


def memory(config: TransformerConfig, params: transformer.Params) -> dict[str, float]:
    """Peak bytes of the compiled loop over parameters and cache, from the compiler's account."""
    method = methods.build("autoregressive", {"target": config}, _GREEDY)
    stop = StopConfig(NEW_TOKENS, (), config.max_position)
    weights = {"target": params}
    found = {}
    for batch in BATCHES:
        state, slots = generation.begin(weights, _prompts(config, batch), method, stop)
        compiled = loop.advance.lower(
            weights, state, np.int32(1), method=method, stop=stop, slots=slots
        ).compile()
        usage = compiled.memory_analysis()
        assert usage is not None
        peak = (
            usage.argument_size_in_bytes
            + usage.output_size_in_bytes
            - usage.alias_size_in_bytes
            + usage.temp_size_in_bytes
        )
        held = _bytes(params) + sum(_bytes((c.keys, c.values)) for c in loop.caches(state.inner))
        found[f"peak_over_parameters_and_cache_batch_{batch}"] = peak / held
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"Read bandwidth of all cores: {found['read_gb_per_second']:.1f} GB/s", ""]
    for name, shape in found["shapes"].items():
        lines += [
            f"### {name} ({shape['parameters'] / 1e6:.1f}M parameters)",
            "",
            "| against Hugging Face | tokens/s | Hugging Face | its setting | ratio | tokens |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| batch {r['batch']} | {r['tokens_per_second']:.0f} "
            f"| {r['hugging_face_tokens_per_second']:.0f} "
            f"| {r['hugging_face_setting'].removeprefix('hugging face, ')} | {r['ratio']:.2f}x "
            f"| {'same' if r['same_tokens'] else 'differ'} |"
            for r in shape["against_hugging_face"]
        ]
        lines += ["", "| figure | value |", "| --- | --- |"]
        lines += [
            f"| batch {r['batch']}: time per step over the memory floor "
            f"({r['ms_per_step']:.2f} ms, floor {r['floor_ms']:.2f} ms "
            f"at {r['read_gb_per_second']:.1f} GB/s) | {r['over_floor']:.2f} |"
            for r in shape["floor"]
        ]
        first = shape["slots"][0]["ms_per_step"]
        lines += [
            f"| time per step in a run of up to {r['slots']} tokens, over {SLOTS[0]} "
            f"| {r['ms_per_step'] / first:.2f} |"
            for r in shape["slots"][1:]
        ]
        lines += [
            f"| scoring {r['tokens']} tokens over 1 ({r['ms']:.2f} ms) "
            f"| {r['over_one_token']:.2f} |"
            for r in shape["scoring"][1:]
        ]
        lines.append(
            f"| share of a speculative round outside model calls "
            f"({shape['round_overhead']['round_ms']:.2f} ms) "
            f"| {shape['round_overhead']['overhead_share']:.1%} |"
        )
        lines += [
            f"| peak memory over parameters and cache, batch {key.rsplit('_', 1)[1]} "
            f"| {value:.2f} |"
            for key, value in shape["memory"].items()
        ]
        lines.append("")
    return "\n".join(lines)
