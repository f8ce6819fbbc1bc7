"""What windows over the masks rest on, measured along plain unmasking (2601.20332, section 3).

Three observations: tokens are decoded near the left end of the masks; masks far from there hardly
change a prediction; keys and values of decoded tokens settle soon after they were decoded. And the
quality of what methods write, as the model itself sees it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.generation import Row
from decoding.loop import ModelParams
from decoding.sampling import SamplingConfig
from decoding.unmasking.window import first_masks
from experiments import results, timing
from models import cache as kv
from models import masks, transformer
from models.config import TransformerConfig

# Predictions that the windows of `far_masks` are judged by, and the windows.
_NEAR = 16
_WINDOWS = (16, 24, 32, 48, 64, 96, 128)
_SNAPSHOTS = 6
_OLDEST = 16
_ROWS = 8
# Every so many positions one is hidden when a text is scored.
_STRIDE = 8

Measured = tuple[dict[str, Any], list[results.Claim]]


class Trajectory(NamedTuple):
    """Plain unmasking of some prompts over the whole canvas, one token a call.

    Attributes:
      texts: int32 [N + 1, B, S], the canvas before each of N calls, and the last one.
      masked: bool [N + 1, B, S], what is not decided in them.
      inside: bool [B, S], positions of the canvases and their prompts.
    """

    texts: np.ndarray
    masked: np.ndarray
    inside: np.ndarray


def follow(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> Trajectory:
    """Unmasks the first few prompts at temperature 0 and keeps every canvas."""
    options = {"block_length": 0, "early_stop": False}
    method = methods.build("llada", {"target": configs["target"]}, SamplingConfig(), options)
    stop = generation.stop_config(configs["target"], config.decode.max_new_tokens, ())
    state, slots = generation.begin(params, prompts[:_ROWS], method, stop, seed=config.seed)
    lengths, ends = np.asarray(state.prompt_lengths)[:, None], np.asarray(state.ends)[:, None]
    texts = [np.asarray(state.tokens)]
    while bool(jnp.any(state.active)):
        state, slots = generation.advance(params, state, slots, method, stop, rounds=1)
        texts.append(np.asarray(state.tokens))
    index = np.arange(texts[0].shape[1])
    free = (index >= lengths) & (index < ends)
    return Trajectory(
        np.stack(texts), free & (np.stack(texts) == configs["target"].mask_token_id), index < ends
    )


def chosen_ranks(trajectory: Trajectory) -> np.ndarray:
    """Rank from the left, among the masks, of every token when it was decoded: int [n]."""
    ranks = []
    for call in range(len(trajectory.texts) - 1):
        before, after = trajectory.masked[call], trajectory.masked[call + 1]
        place = before.cumsum(axis=1) - 1
        ranks += place[before & ~after].tolist()
    return np.asarray(ranks)


def measure_ranks(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> Measured:
    """Share of tokens that were decoded among the first masks, beside uniform choice."""
    trajectory = follow(config, configs, params, prompts)
    ranks = chosen_ranks(trajectory)
    left = np.concatenate(
        [np.repeat(n, n) for n in range(config.decode.max_new_tokens, 0, -1)]
    )  # masks left, as often as a uniform choice gives each of their ranks
    places = np.concatenate([np.arange(n) for n in range(config.decode.max_new_tokens, 0, -1)])
    x = [2**i for i in range(int(np.log2(config.decode.max_new_tokens)) + 1)]
    share = [float((ranks < r).mean()) for r in x]
    uniform = [float(((places < r) / left).sum() / config.decode.max_new_tokens) for r in x]
    figure = {
        "title": f"Masks that are decoded next ({len(ranks)} tokens)",
        "x_label": "first masks from the left",
        "y_label": "share of tokens decoded there",
        "x_scale": "log",
        "x_ticks": x,
        "series": [
            {"label": "plain unmasking", "x": x, "y": share},
            {"label": "uniform choice", "x": x, "y": uniform},
        ],
    }
    near, chance = (float(np.interp(_NEAR, x, y)) for y in (share, uniform))
    name = f"tokens decoded among the first {_NEAR} masks"
    return figure, [
        results.at_least(f"{name}, share", near, 0.5),
        results.at_least(f"{name}, over uniform choice", near / chance, 1.0),
    ]


@functools.partial(jax.jit, static_argnames="config")
def _seen(
    config: TransformerConfig, params: Any, tokens: jnp.ndarray, keys: jnp.ndarray
) -> jnp.ndarray:
    """Log-probabilities float32 [B, S, V] when the positions `keys` [B, S] are attended to."""
    logits = transformer.apply(
        config, params, tokens, mask=masks.full(keys, tokens.shape[1])
    ).logits
    assert logits is not None
    return jax.nn.log_softmax(logits)


def measure_far_masks(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> Measured:
    """How far the predictions of the first masks move when masks beyond rank w are hidden."""
    trajectory = follow(config, configs, params, prompts)
    calls = np.linspace(0, len(trajectory.texts) - 1, _SNAPSHOTS, endpoint=False).astype(int)
    sizes = [w for w in _WINDOWS if w < config.decode.max_new_tokens]
    total, agree, count = np.zeros(len(sizes)), np.zeros(len(sizes)), np.zeros(len(sizes))
    for call in calls:
        tokens, masked = jnp.asarray(trajectory.texts[call]), jnp.asarray(trajectory.masked[call])
        inside = jnp.asarray(trajectory.inside)
        near = first_masks(masked, _NEAR)
        law = _seen(configs["target"], params["target"], tokens, inside)
        for i, size in enumerate(sizes):
            far = masked & ~first_masks(masked, size)
            at = near & far.any(axis=1, keepdims=True)  # rows that have a far field
            other = _seen(configs["target"], params["target"], tokens, inside & ~far)
            apart = (jnp.exp(law) * (law - other)).sum(axis=-1)
            same = law.argmax(axis=-1) == other.argmax(axis=-1)
            total[i] += float(jnp.where(at, apart, 0).sum())
            agree[i] += float((at & same).sum())
            count[i] += float(at.sum())
    kept = [i for i in range(len(sizes)) if count[i]]
    x, y = [sizes[i] for i in kept], [float(total[i] / count[i]) for i in kept]
    figure = {
        "title": f"Masks beyond rank w are hidden: the first {_NEAR} predictions",
        "x_label": "w",
        "y_label": "KL divergence, nats",
        "series": [
            {"label": "KL from the whole canvas", "x": x, "y": y},
            {"label": "other tokens, share", "x": x,
             "y": [float(1 - agree[i] / count[i]) for i in kept]},
        ],
    }  # fmt: skip
    last = 64 if 64 in x else x[-1]
    return figure, [
        results.at_least(f"KL at w = {_NEAR} over that at w = {last}",
                         y[0] / max(y[x.index(last)], 1e-9), 2.0),
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnames="config")
def _stored(
    config: TransformerConfig, params: Any, tokens: jnp.ndarray, keys: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Keys and values of all layers as one vector a position and layer: [L, B, S, K * H] each."""
    B, S = tokens.shape
    mask = masks.full(keys, S)
    empty = kv.create(config, B, S)
    out = transformer.apply(config, params, tokens, mask=mask, cache=empty, with_logits=False)
    assert out.cache is not None
    flat = lambda stores: jnp.stack(  # noqa: E731
        [store.swapaxes(1, 2).reshape(B, S, -1) for store in stores]
    )
    return flat(out.cache.keys), flat(out.cache.values)


@jax.jit
def _cosine(a: jnp.ndarray, b: jnp.ndarray) -> jnp.ndarray:
    """Mean over layers of the cosine of [L, B, S, C] vectors: [B, S]."""
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return ((a * b).sum(axis=-1) / norms).mean(axis=0)


def measure_ages(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> Measured:
    """How much keys and values of decoded tokens change from one call to the next, by age.

    A token of age 0 was decoded by the first of the two calls: it was a mask in that one.
    """
    trajectory = follow(config, configs, params, prompts)
    inside = jnp.asarray(trajectory.inside)
    found = {name: np.zeros(_OLDEST + 1) for name in ("keys", "values")}
    count = np.zeros(_OLDEST + 1)
    decided_at = np.full(trajectory.texts.shape[1:], -1)
    before = None
    for call, tokens in enumerate(trajectory.texts[:-1]):
        now = _stored(configs["target"], params["target"], jnp.asarray(tokens), inside)
        if before is not None:
            decided = (decided_at >= 0) & ~trajectory.masked[call]
            age = np.minimum(call - 1 - decided_at, _OLDEST)
            for name, a, b in zip(found, before, now, strict=True):
                np.add.at(found[name], age[decided], np.asarray(_cosine(a, b))[decided])
            np.add.at(count, age[decided], 1)
        decided_at[trajectory.masked[call] & ~trajectory.masked[call + 1]] = call
        before = now
    x = list(range(_OLDEST))
    series = {name: total[:-1] / np.maximum(count[:-1], 1) for name, total in found.items()}
    figure = {
        "title": "Keys and values of decoded tokens from one call to the next",
        "x_label": "calls since the token was decoded",
        "y_label": "cosine",
        "series": [{"label": name, "x": x, "y": y.tolist()} for name, y in series.items()],
    }
    claims = []
    for name, y in series.items():
        claims += [
            results.at_least(f"cosine of {name} from age 4 on", y[4:].mean(), 0.99),
            results.at_least(f"cosine of {name}, age 4 on less age 0", y[4:].mean() - y[0], 0.0),
        ]
    return figure, claims


def surprise(
    config: TransformerConfig, params: Any, rows: Sequence[Row], stride: int = _STRIDE
) -> float:
    """Mean of -log p of what was written, each token hidden with every `stride`-th: nats.

    A pseudo-likelihood: masked models have no likelihood that one call gives. The text is what a
    row shows, its end token included.
    """
    lengths = np.asarray([len(row.prompt_ids) + len(row.token_ids) for row in rows])
    starts = np.asarray([len(row.prompt_ids) for row in rows])
    S = generation.canvas_slots(int(lengths.max()))[0]
    tokens = np.zeros((len(rows), S), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : lengths[b]] = [*row.prompt_ids, *row.token_ids]
    index = np.arange(S)
    inside = index < lengths[:, None]
    mask_id = config.mask_token_id
    assert mask_id is not None
    total = 0.0
    for phase in range(stride):
        hidden = inside & (index >= starts[:, None]) & (index % stride == phase)
        seen = np.where(hidden, mask_id, tokens)
        law = _seen(config, params, jnp.asarray(seen), jnp.asarray(inside))
        own = jnp.take_along_axis(law, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]
        total -= float(jnp.where(hidden, own, 0).sum())
    return total / float((lengths - starts).sum())


def measure_surprise(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> Measured:
    """Surprise of each method's texts over the positions that it computed for them."""
    ends = None if config.decode.get("stop_at_eos") else ()
    stop = generation.stop_config(configs["target"], config.decode.max_new_tokens, ends)
    sampling = SamplingConfig(temperature=config.decode.temperatures[0])
    found = {}
    for entry in config.decode.methods:
        method = methods.build(entry.method, configs, sampling, entry.options.to_dict())
        size = config.decode.batch_sizes[0]
        rows = timing.decode_all(params, prompts, method, stop, batch_size=size, seed=config.seed)
        positions = generation.total_stats(rows)["target_positions"] / len(rows)
        found[entry.label] = (positions, surprise(configs["target"], params["target"], rows))
    figure = {
        "title": "Surprise of the texts over positions computed",
        "x_label": "positions a prompt",
        "y_label": "-log p a token, nats",
        "x_scale": "log",
        "series": [{"label": label, "x": [x], "y": [y]} for label, (x, y) in found.items()],
    }
    return figure, []
