"""Drafts from an accelerated residual stream after the first layers: M2R2's self-speculation.

arXiv 2502.02040. The ordinary stream goes through the first interval's layers, the accelerated one
beside it; the target's head reads the draft off the latter, and the layers above verify from the
former. Lossless whatever the adapters say. The accelerated stream has no keys and values, so
nothing of the drafter's has to be kept from round to round.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from decoding import randomness
from decoding.loop import Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.speculative import first_layers
from decoding.speculative.drafting import Drafter, nothing
from decoding.speculative.first_layers import Node, Reader
from decoding.speculative.method import speculative
from models import accelerated_residual, transformer
from models.accelerated_residual import ROLE
from models.config import TransformerConfig

STREAMS = ("accelerated", "slow")


@functools.cache
def accelerated_drafter(
    config: TransformerConfig,
    exit_layer: int,
    num_draft: int,
    threshold: float,
    sampling: SamplingConfig,
    purpose: int,
    stream: str = "accelerated",
) -> Drafter:
    """Drafts up to `num_draft` tokens with the first layers and params['accelerator'].

    Args: as `first_layers.drafter`, and:
      stream: what the head reads: the 'accelerated' one, or the 'slow' one as it is.

    Raises:
      InputError: the exit leaves no layer above it.
    """

    def read(params: ModelParams, working: tuple[()], node: Node) -> tuple[jnp.ndarray, tuple[()]]:
        found = node.stream
        if stream == "accelerated":
            positions = node.position[:, None]
            start = transformer.embed(config, params["target"], node.token[:, None], positions)
            found = accelerated_residual.apply(
                config, params[ROLE], start, node.cache, (0, exit_layer), positions=positions
            )[-1]
        return transformer.final_norm(config, params["target"], found[:, 0]), working

    roles = (ROLE,) if stream == "accelerated" else ()
    reader = Reader(roles, nothing, nothing, read, read, nothing)
    return first_layers.drafter(config, exit_layer, num_draft, threshold, sampling, purpose, reader)


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config = configs["target"]
    # At temperature 0 both rules are one: keep the draft that equals the target's arg-max.
    rule = "exact_match" if sampling.greedy else options["rule"]
    drafter = accelerated_drafter(
        config,
        accelerated_residual.gates(options["intervals"], config.num_layers)[1],
        options["num_draft"],
        options["threshold"],
        sampling,
        randomness.SAMPLE if rule == "exact_match" else randomness.DRAFT,
        options["stream"],
    )
    return speculative("m2r2", config, drafter, rule, sampling)


SPEC = MethodSpec(
    "the target's first layers and a stream that is ahead of them draft (M2R2, lossless)",
    ("target",),
    {
        "intervals": Option(4, "J: the first of so many parts of the layers drafts", minimum=2),
        "num_draft": Option(6, "most tokens drafted a round", minimum=1),
        "threshold": Option(0.6, "drafting stops below this probability; 0 never", minimum=0.0),
        "stream": Option(
            "accelerated", "what the head reads: slow is the model's own", choices=STREAMS
        ),
        "rule": Option(
            "speculative_sampling",
            "verification rule; exact_match gives plain decoding's own tokens",
            choices=("speculative_sampling", "exact_match"),
        ),
    },
    _build,
    parts=(ROLE,),
    parts_with=("stream", "accelerated"),
)
