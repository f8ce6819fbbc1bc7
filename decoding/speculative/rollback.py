"""Rollback: cuts a chain where the target finds a draft too unlikely; the text is not a sample."""

import jax
import jax.numpy as jnp

from decoding.sampling import SamplingConfig, draw
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict, rows

# Where a chain is cut, by name: see `rollback`.
POLICIES = ("joint", "official", "paper")
COUNTERS = ("rollbacks", "rolled_back_tokens", "unchecked_ends")


def rollback(
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
    *,
    threshold: float = 5.0,
    policy: str = "joint",
    unchecked_eos: tuple[int, ...] = (),
) -> Verdict:
    """Cuts a chain at the first draft y with -log p(y) > threshold; the target goes on from there.

    Kim et al., 'Big Little Decoder', arXiv 2302.07863, section 3. p is the target's distribution
    before temperature and filters. Not lossless, but at temperature 0, threshold 0 and policy
    'joint' every disagreement is cut and the text is plain decoding's.

    Args:
      tree: a chain.
      logits: float32 [B, N, V] of the target. Where a repetition penalty is used they are
        penalised, so the comparison is too; the official code compares without it.
      keys, positions, sampling: as `verification.exact_match`; the target's token after the drafts
        that are kept is drawn with plain decoding's noise.
      threshold: in nats; infinity cuts nowhere.
      policy: 'joint' cuts at the first draft that is too unlikely and not the arg-max of p;
        'official' at the first that is too unlikely, but nowhere if that one is the arg-max;
        'paper' at the first that is too unlikely.
      unchecked_eos: a chain that ends with one of these is kept whole.
    """
    if not tree.is_chain:
        raise ValueError("rollback needs a drafter of chains")
    drafts, valid, before = tree.tokens[:, 1:], tree.valid[:, 1:], logits[:, :-1]
    log_p = jax.nn.log_softmax(before, axis=-1)
    nats = -jnp.take_along_axis(log_p, drafts[..., None], axis=-1)[..., 0]
    unlikely = valid & (nats > threshold)
    differs = jnp.argmax(before, axis=-1) != drafts
    cuts = {
        "joint": unlikely & differs,
        "official": unlikely & differs & (jnp.cumsum(unlikely, axis=1) == 1),
        "paper": unlikely,
    }[policy]
    written = valid.sum(axis=1)
    unchecked = jnp.zeros(written.shape, bool)
    if unchecked_eos:
        last = rows(tree.tokens, written)
        unchecked = (written > 0) & jnp.isin(last, jnp.asarray(unchecked_eos))
    cut = cuts.any(axis=1) & ~unchecked
    kept = jnp.where(cut, cuts.argmax(axis=1), written).astype(jnp.int32)
    token = draw(rows(logits, kept), keys, positions + kept, sampling)
    node = jnp.arange(tree.num_nodes, dtype=jnp.int32)
    tokens = jnp.where(node == kept[:, None], token[:, None], jnp.pad(drafts, ((0, 0), (0, 1))))
    counts = (cut, written - kept, unchecked)
    return Verdict(
        path=jnp.broadcast_to(node, tokens.shape),
        count=kept + 1,
        tokens=tokens,
        counters=dict(zip(COUNTERS, (x.astype(jnp.int32) for x in counts), strict=True)),
    )
