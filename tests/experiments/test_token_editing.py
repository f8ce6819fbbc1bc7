"""What the experiment on token editing measures, on a tiny random model."""

import types

import jax.numpy as jnp
import numpy as np

from decoding import generation, stopping
from experiments import token_editing
from experiments.comparison import Models, Prompts
from models import masks, transformer
from tests.decoding import masked, tiny

BLOCK = 8
STOP = stopping.StopConfig(masked.NEW, (masked.EOS,))


def models() -> Models:
    tokenizer = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    params = {"target": masked.params()["target"]}
    return Models({"target": masked.CONFIG}, params, tokenizer, [])  # type: ignore[arg-type]


def test_points_of_a_sweep_are_the_methods_and_edits_are_counted_call_by_call():
    method = tiny.build("llada21", mode="S", block_length=BLOCK)
    rows = masked.decode(method)
    right = [row.token_ids[: row.token_ids.index(5)] if 5 in row.token_ids else [] for row in rows]
    answers = [" ".join(map(str, ids)) for ids in right]
    held_out = Prompts(tiny.PROMPTS, answers)
    found = token_editing.point(models(), "target", held_out, STOP, BLOCK, 0.5, 0.0)
    total = generation.total_stats(rows)
    assert found["tokens_per_call"] == total["tokens_per_target_call"]
    assert found["budget_exits"] == total["budget_exits"]
    edits = found["edits_per_100_tokens"] * total["tokens_emitted"] / 100
    np.testing.assert_allclose(edits, total["edits"])
    assert found["exact_match"] == np.mean([5 in row.token_ids for row in rows])
    by_call, early = token_editing.edits_by_call(models(), "target", held_out, STOP, BLOCK)
    assert by_call[0] == 0 or by_call[0] < by_call[1]  # a block begins with masks
    blocks = total["edits"] / by_call.sum()
    np.testing.assert_allclose(blocks, round(blocks), atol=1e-6)
    assert 0 < early < 1


def test_repairs_against_a_row_at_a_time():
    rng = np.random.default_rng(0)
    texts = [(rng.integers(6, 60, p).tolist(), rng.integers(6, 60, a).tolist())
             for p, a in ((3, 9), (8, 4), (1, 15))]  # fmt: skip
    config, params = masked.CONFIG, masked.params()["target"]
    found = token_editing.repairs(config, params, texts, BLOCK, seed=0)
    differs = total = 0
    for prompt, answer in texts:
        tokens = np.full((1, 16), masked.EOS)
        tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        index = jnp.arange(16)
        mask = masks.block_diffusion(index[None], index, BLOCK)
        logits = np.array(transformer.apply(config, params, tokens, mask=mask).logits[0])
        logits[:, masked.MASK] = -np.inf
        mine = slice(len(prompt), len(prompt) + len(answer))
        differs += (logits.argmax(axis=-1)[mine] != tokens[0, mine]).sum()
        total += len(answer)
    np.testing.assert_allclose(found["needless"], differs / total)
    assert found["needless_sure"] < found["needless"]
    assert 0 <= found["repaired"] <= found["found"] <= 1
