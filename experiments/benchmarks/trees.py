"""Draft trees: tokens per target call and speed-up at equal budgets, and what trees cost.

`methods_at_budget` runs on the trained code pair; `overhead` on random weights of about 85M
parameters with a 5M draft. Times are medians over repeats taken in turn.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import SamplingConfig
from decoding.speculative import scoring
from decoding.speculative.sampled_tree import tree_drafter
from decoding.speculative.sources import Growing, Source, model_source
from decoding.speculative.tree import DraftTree
from decoding.stopping import StopConfig
from experiments import comparison, timing
from experiments.config_parts import comparison as comparison_config
from models import cache as kv
from models import sizes, transformer

TEMPERATURES = (0.0, 0.6, 1.0)
# Nodes that the target scores beside the root: SpecTr's and RSD-S's width x depth, RSD-C's tree.
BUDGETS: dict[int, tuple[tuple[int, int], str]] = {
    8: ((2, 4), "2-1-1-1"),
    16: ((4, 4), "4-1-1-1"),
    32: ((4, 8), "2-3-2-1"),
    64: ((8, 8), "4-3-2-1"),
}
ROUNDS = 12
_DRAFT_TEMPERATURE = 0.6  # where the target's is 0


def run(repeats: int) -> dict[str, Any]:
    """Both parts; see the module."""
    return {"budgets": methods_at_budget(repeats), "overhead": overhead(repeats)}


def entries(budget: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Methods with their options at a budget of drafted nodes, by label."""
    (width, depth), branching = BUDGETS[budget]
    return {
        "plain": ("autoregressive", {}),
        "chain": ("speculative_sampling", {"num_draft": budget}),
        "SpecTr": ("spectr", {"num_sequences": width, "length": depth}),
        "RSD-C": ("rsd_c", {"branching": branching}),
        "RSD-S": ("rsd_s", {"width": width, "depth": depth}),
        "DySpec": ("dyspec", {"budget": budget}),
        "top tree": ("top_tree", {"branching": branching}),
    }


def methods_at_budget(repeats: int) -> list[dict[str, Any]]:
    """One record a method, temperature and budget, on the trained pair."""
    config: ConfigDict = comparison_config("trees")
    models = comparison.load_models(config)
    prompts = comparison.held_out_prompts(config, models.tokenizer).ids
    stop = generation.stop_config(models.configs["target"], config.decode.max_new_tokens, ())
    records = []
    for temperature in TEMPERATURES:
        sampling = SamplingConfig(temperature=temperature)
        for budget in BUDGETS:
            runs: dict[str, Callable[[], Any]] = {}
            for label, (name, options) in entries(budget).items():
                if label == "chain" and temperature == 0:
                    options = {**options, "draft_temperature": 0.0}
                method = methods.build(name, models.configs, sampling, options)
                runs[label] = functools.partial(
                    timing.decode_all, models.params, prompts, method, stop, batch_size=1
                )
            where = f"temperature {temperature:g}, {budget} nodes"
            measured = timing.side_by_side(runs, repeats, label=where)
            for label, entry in measured.items():
                total = generation.total_stats(entry["result"])
                records.append(
                    {
                        "label": label,
                        "temperature": temperature,
                        "budget": budget,
                        "tokens_per_target_call": total["tokens_per_target_call"],
                        "speedup": timing.speedup(measured["plain"]["seconds"], entry["seconds"]),
                        "target_calls": total["target_calls"],
                        "draft_calls": total["draft_calls"],
                    }
                )
    return records


def overhead(repeats: int) -> list[dict[str, Any]]:
    """Share of a 64-node round that is not a model call, by method, with the target at 85M."""
    configs = {"target": sizes.get("bench_85m"), "draft": sizes.get("bench_5m")}
    vocab = min(config.vocab_size for config in configs.values())
    configs = {role: config.replace(vocab_size=vocab) for role, config in configs.items()}
    params = {
        role: transformer.init(config, jax.random.key(i))
        for i, (role, config) in enumerate(configs.items())
    }
    (width, depth), branching = BUDGETS[64]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, vocab, 32).tolist()]
    sampling = SamplingConfig(temperature=1.0)
    source = model_source(configs["draft"], sampling)
    shapes: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
        "SpecTr": ("spectr", {"num_sequences": width, "length": depth}, (width,) * depth),
        "RSD-C": ("rsd_c", {"branching": branching}, (4, 12, 24, 24)),
        "RSD-S": ("rsd_s", {"width": width, "depth": depth}, (width,) * depth),
    }
    found = []
    for label, (name, options, widths) in shapes.items():
        method = methods.build(name, configs, sampling, options)
        stop = StopConfig(512, (), configs["target"].max_position)

        def whole(method: Any = method, stop: Any = stop) -> float:
            state, _ = generation.begin(params, prompts, method, stop, buffer=512)
            state = generation.loop.grow(state, 512)
            jax.block_until_ready(state)
            begin = time.perf_counter()
            state = generation.loop.advance(
                params, state, np.int32(ROUNDS), method=method, stop=stop, slots=512
            )
            jax.block_until_ready(state)
            return (time.perf_counter() - begin) / ROUNDS

        state, _ = generation.begin(params, prompts, method, stop, buffer=512)
        state = generation.loop.grow(state, 512)
        drafter = tree_drafter(source, "independent", widths)
        tree = jax.jit(drafter.propose)(params, state.inner.drafter, state).tree
        calls = _calls_only(configs, source, widths)

        def bare(calls: Any = calls, tree: Any = tree, state: Any = state) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(calls(params, tree, state))
            return (time.perf_counter() - begin) / ROUNDS

        seconds = timing.medians({"whole": whole, "bare": bare}, repeats)
        found.append(
            {
                "label": label,
                "nodes": tree.num_nodes - 1,
                "round_ms": seconds["whole"] * 1e3,
                "model_calls_ms": seconds["bare"] * 1e3,
                "overhead_share": 1 - seconds["bare"] / seconds["whole"],
            }
        )
    return found


def _calls_only(
    configs: Mapping[str, Any], source: Source, widths: Sequence[int]
) -> Callable[[ModelParams, DraftTree, DecodeState], jnp.ndarray]:
    """ROUNDS times the model calls of a round on a given tree: nothing is drawn or kept."""

    @jax.jit
    def calls(params: ModelParams, tree: DraftTree, state: DecodeState) -> jnp.ndarray:
        growing = Growing(tree.tokens, tree.parent, tree.depth, tree.valid, tree.ancestry)

        def one(_: jnp.ndarray, carry: tuple) -> tuple:
            target, draft, total = carry
            # What a call reads must depend on the round before, or it is done only once.
            moved = state.replace(tokens=state.tokens.at[:, 0].set(total.astype(jnp.int32) % 2))
            log_q, draft = source.root(params, draft, moved)
            total = total + log_q.max()
            first = 1
            for width in widths[:-1]:
                start = jnp.full((1,), first)
                log_q, draft = source.nodes(params, draft, moved, growing, start, width)
                total, first = total + log_q.max(), first + width
            shifted = tree.replace(tokens=(tree.tokens + (total > 1e9)) % log_q.shape[-1])
            out = scoring.score(configs["target"], params["target"], target, shifted)
            assert out.logits is not None and out.cache is not None
            return kv.truncate(out.cache, target.lengths), draft, total + out.logits.max()

        start = (kv.fold(state.inner.target), kv.fold(state.inner.drafter), jnp.zeros(()))
        return jax.lax.fori_loop(0, ROUNDS, one, start)[2]

    return calls


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = []
    records = found["budgets"]
    labels = dict.fromkeys(r["label"] for r in records)
    for temperature in TEMPERATURES:
        lines += [
            f"### temperature {temperature:g}: tokens per target call (speed-up over plain)",
            "",
            "| nodes | " + " | ".join(labels) + " |",
            "| --- |" + " --- |" * len(labels),
        ]
        for budget in BUDGETS:
            cells = [
                f"{r['tokens_per_target_call']:.2f} ({r['speedup']:.2f}x)"
                for r in records
                if (r["temperature"], r["budget"]) == (temperature, budget)
            ]
            lines.append(f"| {budget} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "### share of a round outside model calls (85M target, 5M draft, 64 nodes, batch 1)",
        "",
        "| method | round | model calls | share |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['label']} | {r['round_ms']:.1f} ms | {r['model_calls_ms']:.1f} ms "
        f"| {r['overhead_share']:.1%} |"
        for r in found["overhead"]
    ]
    return "\n".join(lines)
