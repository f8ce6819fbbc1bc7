"""The target's first layers and an adapter draft for the layers above (Kangaroo).

arXiv 2404.18911. The first exit is the layer: drafts are read off the residual stream after the
first l layers, through a small trained adapter and the target's own head. The second exit is the
draft: it ends where its most likely token falls below a threshold. The layers above then run once,
on the streams that drafting has computed; no layer runs twice on a token.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from decoding import randomness
from decoding.loop import Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.speculative import exit_state, first_layers, verification
from decoding.speculative.drafting import Drafter
from decoding.speculative.exit_state import ExitState
from decoding.speculative.first_layers import Node, Reader
from decoding.speculative.kangaroo_tree import kangaroo_tree_drafter
from decoding.speculative.method import speculative
from models import cache as kv
from models.config import TransformerConfig
from models.exit_adapter import ROLE


@functools.cache
def kangaroo_drafter(
    config: TransformerConfig,
    exit_layer: int,
    num_draft: int,
    threshold: float,
    sampling: SamplingConfig,
    purpose: int,
) -> Drafter:
    """Drafts up to `num_draft` tokens with the target's first layers and params['adapter'].

    Args: as `first_layers.drafter`; `num_draft` is gamma in the paper, `threshold` eta.

    Raises:
      InputError: the exit leaves no layer above it.
    """

    def begin(params: ModelParams, inner: ExitState, node: Node) -> tuple[jnp.ndarray, kv.KVCache]:
        return exit_state.at_pending(config, params, inner, node.stream[:, 0], node.position)

    def further(
        params: ModelParams, cache: kv.KVCache, node: Node
    ) -> tuple[jnp.ndarray, kv.KVCache]:
        hidden, cache = exit_state.adapt(config, params, node.stream, cache, node.position)
        return hidden[:, 0], cache

    def observe(
        before: ExitState,
        cache: kv.KVCache,
        streams: jnp.ndarray,
        verdict: verification.Verdict,
        base: jnp.ndarray,
        active: jnp.ndarray,
    ) -> ExitState:
        last = verification.rows(streams, verdict.count - 1)
        # The last accepted token is fed again, so the adapter holds all that are before it.
        held = jnp.where(active, base + verdict.count - 1, before.cache.lengths)
        carry = jnp.where(active[:, None], last, before.carry)
        return ExitState(kv.truncate(cache, held), carry)

    create = functools.partial(exit_state.create, config)
    read = functools.partial(exit_state.read, config)
    reader = Reader((ROLE,), create, read, begin, further, observe)
    return first_layers.drafter(config, exit_layer, num_draft, threshold, sampling, purpose, reader)


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config, layer, eta = configs["target"], options["exit_layer"], options["threshold"]
    # At temperature 0 both rules are one: keep the draft that equals the target's arg-max. The
    # nodes of a tree are the likeliest ones, not drawn: exact match is what is right for them.
    tree = options["width"] > 1
    rule = "exact_match" if sampling.greedy or tree else options["rule"]
    if tree:
        width = min(options["width"], config.vocab_size)
        drafter = kangaroo_tree_drafter(config, layer, width, options["num_draft"], eta, sampling)
    else:
        purpose = randomness.SAMPLE if rule == "exact_match" else randomness.DRAFT
        drafter = kangaroo_drafter(config, layer, options["num_draft"], eta, sampling, purpose)
    return speculative("kangaroo", config, drafter, rule, sampling)


SPEC = MethodSpec(
    "the target's first layers and an adapter draft while they are sure (lossless)",
    ("target",),
    {
        "exit_layer": Option(2, "layers that draft; the adapter is trained for them", minimum=1),
        "num_draft": Option(6, "most tokens drafted a round, or levels of a tree", minimum=1),
        "threshold": Option(0.6, "drafting stops below this probability; 0 never", minimum=0.0),
        "width": Option(1, "drafts of a level; above 1 a tree, verified by exact match", minimum=1),
        "rule": Option(
            "speculative_sampling",
            "verification rule of a chain; exact_match gives plain decoding's own tokens",
            choices=("speculative_sampling", "exact_match"),
        ),
    },
    _build,
    parts=(ROLE,),
)
