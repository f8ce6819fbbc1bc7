"""Whether a drafter's own probabilities foretell acceptance: what dynamic trees rest on."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from decoding import generation, methods
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import SamplingConfig
from decoding.speculative import scoring, verification
from decoding.speculative.dynamic_tree import threshold_tree_drafter
from decoding.speculative.multi_draft import recursive_rejection
from decoding.speculative.sources import model_source
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict
from experiments import results
from models.config import TransformerConfig

_BUDGET = 16
_DRAFT_TEMPERATURE = 0.6
_EDGES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


def tested(tree: DraftTree, verdict: Verdict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draft probabilities of the nodes that verification tried, and their fate.

    Args:
      tree: a batch of trees on the host, with `log_q`.
      verdict: what became of them.

    Returns:
      Probabilities float [n], whether each was accepted bool [n], and which row int [n].
    """
    assert tree.log_q is not None
    probabilities, fates, rows = [], [], []
    for b in range(len(verdict.count)):
        path = verdict.path[b, : verdict.count[b]].tolist()
        for step, node in enumerate(path):
            chosen = path[step + 1] if step + 1 < len(path) else tree.num_nodes
            children = np.flatnonzero(tree.valid[b] & (tree.parent[b] == node))
            for child in children[children <= chosen]:
                probabilities.append(np.exp(tree.log_q[b, node, tree.tokens[b, child]]))
                fates.append(child == chosen)
                rows.append(b)
    return np.asarray(probabilities), np.asarray(fates, bool), np.asarray(rows, int)


def expected_tokens(tree: DraftTree) -> np.ndarray:
    """Sum over nodes of the probability of their paths: float [B], trees on the host."""
    assert tree.log_q is not None
    value = np.zeros(tree.tokens.shape)
    value[:, 0] = 1
    for b, node in np.ndindex(value.shape):
        if node and tree.valid[b, node]:
            parent = tree.parent[b, node]
            value[b, node] = value[b, parent] * np.exp(tree.log_q[b, parent, tree.tokens[b, node]])
    return value[:, 1:].sum(axis=1)


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Acceptance by draft probability, and the rank correlation of estimate and outcome."""
    temperature = config.decode.temperatures[-1]
    sampling = SamplingConfig(temperature=temperature)
    options = {"budget": _BUDGET, "draft_temperature": _DRAFT_TEMPERATURE}
    method = methods.build("dyspec", configs, sampling, options)
    drafter = threshold_tree_drafter(
        model_source(configs["draft"], SamplingConfig(temperature=_DRAFT_TEMPERATURE)),
        _BUDGET, 1.0 / _BUDGET, 16, 32, configs["target"].eos_token_ids,
    )  # fmt: skip
    verify = verification.exact_match if sampling.greedy else recursive_rejection

    @jax.jit
    def look(params: ModelParams, state: DecodeState) -> tuple[DraftTree, Verdict]:
        tree = drafter.propose(params, state.inner.drafter, state).tree
        out = scoring.score(configs["target"], params["target"], state.inner.target, tree)
        assert out.logits is not None
        return tree, verify(tree, out.logits, state.keys, state.lengths, sampling)

    stop = generation.stop_config(configs["target"], config.decode.max_new_tokens, ())
    state, slots = generation.begin(params, prompts, method, stop, seed=config.seed)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    estimates, outcomes = [], []
    while bool(jnp.any(state.active)):
        tree, verdict = jax.device_get(look(params, state))
        active = np.asarray(state.active)
        probabilities, fates, rows = tested(tree, verdict)
        found.append((probabilities[active[rows]], fates[active[rows]]))
        estimates += expected_tokens(tree)[active].tolist()
        outcomes += (verdict.count - 1)[active].tolist()
        state, slots = generation.advance(params, state, slots, method, stop, rounds=1)
    probability, fate = (np.concatenate(parts) for parts in zip(*found, strict=True))
    which = np.digitize(probability, _EDGES[1:-1])
    bins = [i for i in range(len(_EDGES) - 1) if (which == i).sum() >= 20]
    rate = [float(fate[which == i].mean()) for i in bins]
    centre = [float(probability[which == i].mean()) for i in bins]
    correlation = float(stats.spearmanr(estimates, outcomes).statistic)
    figure = {
        "title": f"Acceptance by draft probability (temperature {temperature:g})",
        "x_label": "draft probability",
        "y_label": "accepted",
        "series": [
            {"label": "measured", "x": centre, "y": rate},
            {"label": "equal", "x": [0, 1], "y": [0, 1]},
        ],
    }
    rank = float(stats.spearmanr(centre, rate).statistic)
    claims = [
        results.at_least("estimated and accepted tokens, rank correlation over rounds",
                         correlation, 0.3),
        results.at_least("acceptance grows with draft probability, rank correlation of bins",
                         rank, 0.9),
    ]  # fmt: skip
    return figure, claims
