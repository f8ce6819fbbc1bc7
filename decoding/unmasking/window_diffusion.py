"""Window-Diffusion as users choose it (arXiv 2601.20332): quotas, adaptive length, options."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from decoding import randomness
from decoding.loop import Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.unmasking import selectors
from decoding.unmasking.canvas import Schedule, View
from decoding.unmasking.llada import SHARED
from decoding.unmasking.method import Cut, unmasking
from decoding.unmasking.prediction import Prediction
from decoding.unmasking.selectors import Choice, Selector
from decoding.unmasking.window import VARIANTS, Window, windowed
from models.errors import InputError, check_choice

QUOTAS = ("even", "linear", "constant")
_LAST_TIME = 1e-3  # at which Dream's noise schedule ends


@functools.cache
def rate(
    tokens_per_step: int, quota: str, ranking: str = "confidence", temperature: float = 0.0
) -> Selector:
    """So many tokens a step over the whole canvas.

    Args:
      tokens_per_step: n; a row of G masks takes T = ceil(G / n) steps.
      quota: how G is shared out. 'even': LLaDA's G // T, one more in the first G mod T steps.
        'linear': Dream's share 1 - s / t of the masks left, times from 1 to 0.001 in equal steps,
        and all at the last step; at least one, where Dream may spend a call on none. 'constant':
        n.
      ranking: which tokens come first, see `selectors.confidence_of`.
      temperature: of a draw of positions by softmax(ranking / temperature), without replacement
        (Dream's alg_temp); 0 for the first ones.
    """

    check_choice("quota", quota, QUOTAS)

    def select(params: ModelParams, view: View, prediction: Prediction, memory: Any) -> Choice:
        del params
        left = view.candidates.sum(axis=1)
        total = jnp.where(view.step == 0, left, memory)
        steps = jnp.maximum(-(-total // tokens_per_step), 1)
        if quota == "even":
            count = total // steps + (view.step < total % steps)
        elif quota == "linear":
            count = _linear(left, view.step, steps)
        else:
            count = jnp.full_like(left, tokens_per_step)
        score = selectors.confidence_of(prediction, view, ranking)
        if temperature:
            keys = randomness.at(view.keys, view.calls, randomness.ORDER)
            # One key a position: noise must not depend on the size of the canvas.
            noise = randomness.gumbel(randomness.several(keys, score.shape[1]), 1)[..., 0]
            score = score / temperature + noise
        among = view.candidates & prediction.known
        write = selectors.best(among, score, jnp.maximum(count, 1))
        return selectors.fill(prediction, write, total)

    features = (ranking,) if ranking in ("entropy", "margin") else ()
    return Selector(select, lambda batch: jnp.zeros((batch,), jnp.int32), features)


def _linear(left: jnp.ndarray, step: jnp.ndarray, steps: jnp.ndarray) -> jnp.ndarray:
    """Dream's int(left * (1 - s / t)), and all that is left at the last step: int32 [B]."""
    each = (1 - _LAST_TIME) / steps
    share = each / jnp.maximum(1 - step * each, _LAST_TIME)
    return jnp.where(step < steps - 1, (left * share).astype(jnp.int32), left)


@functools.cache
def after_end(eos_ids: tuple[int, ...]) -> Cut:
    """Canvases end after the first end of text that is written, whatever is undecided before it."""

    def cut(view: View, prediction: Prediction, choice: Choice) -> jnp.ndarray:
        del prediction
        tokens = jnp.where(choice.write, choice.tokens, view.tokens)
        mine = (view.index >= view.prompt_lengths[:, None]) & (view.index < view.ends[:, None])
        mine &= choice.write | ~view.masked
        found = mine & jnp.isin(tokens, jnp.asarray(eos_ids))
        return jnp.where(found.any(axis=1), found.argmax(axis=1) + 1, view.ends)

    return cut


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config = configs["target"]
    dream, adaptive = options["variant"] == "dream", options["adaptive_length"]
    if adaptive and not config.eos_token_ids:
        raise InputError("adaptive_length: True needs a target with an end-of-text token")
    window = Window(
        active=options["active_tokens"],
        size=options["window_tokens"],
        refresh=options["refresh_cycle"],
        tokens_per_step=options["tokens_per_step"],
        slide=options["slide"],
        buffer=options["buffer"],
        recompute_decoded=options["recompute_decoded"],
    )
    policy = windowed(
        config,
        window,
        variant=options["variant"],
        shifted=options["shifted"],
        eos_ids=config.eos_token_ids if dream and adaptive else (),
    )
    ranking = options["ranking"]
    if ranking == "default":
        ranking = "entropy" if dream else "confidence"
    quota = "even" if not dream else "constant" if adaptive else "linear"
    return unmasking(
        "window_diffusion",
        config,
        sampling,
        Schedule(0),
        rate(window.tokens_per_step, quota, ranking, options["alg_temp"]),
        policy,
        cut=after_end(config.eos_token_ids) if adaptive else None,
        early_stop=options["early_stop"],
        filtered=dream,
    )


SPEC = MethodSpec(
    "masked diffusion in a sliding window of active and cached masks, refreshed in phases",
    ("target",),
    {
        "variant": Option("llada", "which of the published forms", choices=VARIANTS),
        "active_tokens": Option(16, "masks computed in every step", minimum=1),
        "window_tokens": Option(64, "masks attended to; 0 for all", minimum=0),
        "refresh_cycle": Option(32, "steps of a phase; 0 for one phase", minimum=0),
        "tokens_per_step": Option(1, "masks filled in a step: generated length / steps", minimum=1),
        "ranking": Option(
            "default",
            "which tokens come first: confidence with llada, entropy with dream",
            choices=("default", *selectors.RANKINGS),
        ),
        "alg_temp": Option(0.0, "temperature of a draw of positions; 0 for none", minimum=0),
        "shifted": SHARED["shifted"],
        "adaptive_length": Option(False, "drop the canvas after an end of text that is written"),
        "early_stop": SHARED["early_stop"],
        "slide": Option(True, "active masks follow the text within a phase"),
        "buffer": Option(True, "attend to masks that are not active"),
        "recompute_decoded": Option(True, "compute tokens again in the phase that decodes them"),
    },
    _build,
    bidirectional=True,
)
