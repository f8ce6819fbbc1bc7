"""How often prompt tokens foretell what the target will say, by distance; and what they weigh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding.loop import ModelParams
from experiments import results, trained_parts
from models import medusa_heads, prompt_tokens, sizes, transformer
from models.config import TransformerConfig
from models.prompt_tokens import PromptTokensConfig
from training import prompt_marginals

TOP = 10


def medusa_ranks(
    target: TransformerConfig, target_params: Any, heads: Any, texts: np.ndarray, cut: np.ndarray
) -> np.ndarray:
    """As `prompt_marginals.measure`, of Medusa's heads: ranks int [samples, K]."""

    @jax.jit
    def run(texts: jnp.ndarray) -> jnp.ndarray:
        hidden = transformer.apply(target, target_params, texts, with_logits=False).hidden
        logits = medusa_heads.apply(target, target_params, heads, hidden[:, cut])
        further = cut[:, None] + 1 + np.arange(1, logits.shape[2] + 1)
        return prompt_marginals.ranks(logits, texts[:, np.minimum(further, texts.shape[1] - 1)])

    found = np.asarray(run(jnp.asarray(texts)))
    return found.reshape(-1, found.shape[-1])


def compare(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
    """By part of `config.parts`, ranks int [samples, n] of true tokens on the target's own text."""
    target, frozen = configs["target"], params["target"]
    length = min(map(len, prompts))
    rows = [list(prompt[-length:]) for prompt in prompts]
    texts = prompt_marginals.greedy_texts(target, frozen, rows, config.decode.max_new_tokens)
    found = {}
    for name in config.parts:
        directory = trained_parts.directory_of(config, name)
        if config.parts[name].kind == "prompt_tokens":
            own, part = prompt_tokens.load(directory, target)
            cut = prompt_marginals.places(length, texts.shape[1], own.distances)
            found[name] = prompt_marginals.measure(own, target, part, frozen, texts, cut)
        elif config.parts[name].kind == "medusa_heads":
            heads = medusa_heads.load(directory, target)[1]
            cut = prompt_marginals.places(length, texts.shape[1], len(heads["block"]["bias"]))
            found[name] = medusa_ranks(target, frozen, heads, texts, cut)
    return found


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Share of places whose true token is among the first ten of the list, as a figure.

    Claims compare parts by their names in `experiments/configs/ppd.py`, those that are there.
    """
    found = compare(config, configs, params, prompts)
    top = {name: prompt_marginals.top_accuracy(rank, TOP) for name, rank in found.items()}
    places = len(next(iter(found.values())))
    figure = {
        "title": f"The true token is among the first {TOP} ({places} places)",
        "x_label": "tokens beyond the next one",
        "x_ticks": list(range(1, 1 + max(map(len, top.values())))),
        "y_label": "share",
        "series": [
            {"label": name, "x": list(range(1, len(share) + 1)), "y": share.tolist()}
            for name, share in top.items()
        ],
    }
    claims = []
    for better, worse, distance in (
        ("prompt tokens", "independent", 3),
        ("4 embeddings each", "prompt tokens", 1),
        ("4 embeddings each", "prompt tokens", 3),
        ("prompt tokens", "Medusa", 1),
        ("prompt tokens", "Medusa", 3),
    ):
        if better in top and worse in top:
            claims.append(
                results.at_least(
                    f"top-{TOP} accuracy of {better} at distance {distance}, over {worse}",
                    top[better][distance - 1] / top[worse][distance - 1],
                    1.0,
                )
            )
    small = PromptTokensConfig()
    for name, model in (("the target", configs["target"]), ("Llama 2 7B", sizes.get("llama2_7b"))):
        share = small.num_params(model) / model.num_params()
        bound = 1.9e-6 if name == "Llama 2 7B" else 1e-3
        claims.append(results.at_most(f"prompt tokens over the parameters of {name}", share, bound))
    return figure, claims
