"""What windows rest on, as experiments measure it, on a tiny model and on made-up trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding.generation import Row
from experiments import unmasking_observations as observations
from models import transformer
from tests.decoding import masked, tiny

CONFIGS = {"target": masked.CONFIG}
SETTINGS = ConfigDict({"seed": 0, "decode": {"max_new_tokens": masked.NEW}})


def test_ranks_are_counted_among_the_masks():
    before = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
    # Row 0 decodes its third mask and then its first two; row 1 its last two.
    middle = np.array([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]], bool)
    after = np.array([[0, 0, 0, 0, 1], [1, 1, 0, 0, 0]], bool)
    shown = np.stack([before, middle, after])
    found = observations.chosen_ranks(observations.Trajectory(shown.astype(int), shown, before[0]))
    assert sorted(found.tolist()) == [0, 1, 2, 2, 3]


def test_surprise_is_that_of_hidden_tokens():
    rows = [Row(prompt, [7, 8, 9, 10, 11], "length", {}) for prompt in tiny.PROMPTS[:3]]
    mine = observations.surprise(masked.CONFIG, masked.params()["target"], rows, stride=2)
    total = count = 0.0
    width = observations.generation.canvas_slots(22)[0]
    run = jax.jit(
        lambda t, m: transformer.apply(masked.CONFIG, masked.params()["target"], t, mask=m).logits
    )
    for row in rows:
        text = np.array([*row.prompt_ids, *row.token_ids])
        for phase in range(2):
            at = [i for i in range(len(row.prompt_ids), len(text)) if i % 2 == phase]
            seen = np.zeros((1, width), np.int32)
            seen[0, : len(text)] = text
            seen[0, at] = masked.MASK
            mask = np.broadcast_to(np.arange(width) < len(text), (1, width, width))
            law = masked.softmax(np.asarray(run(jnp.asarray(seen), jnp.asarray(mask))[0], float))
            total -= sum(np.log(law[i, text[i]]) for i in at)
            count += len(at)
    assert count == 15
    np.testing.assert_allclose(mine, total / count, rtol=1e-4)


def test_measurements_of_a_tiny_model():
    """A random model holds none of the claims for sure; figures and bounds must be sound."""
    given = (SETTINGS, CONFIGS, masked.params(), tiny.PROMPTS)
    trajectory = observations.follow(*given)
    assert trajectory.masked.sum(axis=(1, 2)).tolist() == list(range(8 * 24, -1, -8))
    figure, claims = observations.measure_ranks(*given)
    plain, uniform = (series["y"] for series in figure["series"])
    assert plain == sorted(plain) and uniform == sorted(uniform)
    # Masks left fall from 24 to 1: the chance to be among the first 16 is 1 in 16 of 24 calls.
    by_hand = (16 + sum(16 / n for n in range(17, 25))) / 24
    np.testing.assert_allclose(uniform[figure["series"][1]["x"].index(16)], by_hand)
    assert claims[0].measured >= by_hand / 2
    figure, _ = observations.measure_far_masks(*given)
    assert figure["series"][0]["x"] == [16]
    assert figure["series"][0]["y"][0] > 0
    figure, claims = observations.measure_ages(*given)
    for series in figure["series"]:
        assert np.all(np.abs(series["y"]) <= 1 + 1e-5)
        # What turns from the mask into a token moves more than what stays the same token.
        assert series["y"][0] < np.mean(series["y"][1:])
