"""Plain and wavefront decoding of images against the whole image run anew for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, stopping
from decoding.autoregressive import autoregressive
from decoding.images import image_tokens, raster, wavefront
from models import transformer
from models.errors import InputError
from tests.decoding import tiny_images as tiny

N = tiny.SIDE**2


@pytest.mark.parametrize(("temperature", "guidance"), [(0.0, 1.0), (1.0, 1.0), (1.0, 2.5)])
def test_raster_is_the_naive_loop(temperature, guidance):
    which = tiny.sampler(temperature=temperature, guidance=guidance)
    found = raster.generate(tiny.params()["target"], tiny.LABELS, tiny.KEYS, sampler=which)
    blank = image_tokens.blank(which, tiny.LABELS)
    expected = tiny.naive(blank, list(range(N)), temperature, guidance)
    np.testing.assert_array_equal(found, expected[:, 1:])
    assert len(np.unique(found)) == tiny.K


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_raster_is_the_autoregressive_method(temperature):
    """Bit for bit, noise included: the method draws from the whole vocabulary, but only codes."""
    params = tiny.params()["target"]
    which = tiny.sampler(temperature=temperature)
    found = raster.generate(params, tiny.LABELS, tiny.KEYS, sampler=which)
    method = autoregressive(tiny.CONFIG, which.sampling)
    rows = generation.generate(
        {"target": params},
        [[tiny.K + int(label)] for label in tiny.LABELS],
        method,
        stopping.StopConfig(N),
        seed=5,
    )
    np.testing.assert_array_equal([row.token_ids for row in rows], found)


def test_a_row_does_not_depend_on_its_neighbours():
    which = tiny.sampler()
    params = tiny.params()["target"]
    together = raster.generate(params, tiny.LABELS, tiny.KEYS, sampler=which)
    alone = raster.generate(params, tiny.LABELS[2:3], tiny.KEYS[2:3], sampler=which)
    np.testing.assert_array_equal(together[2:3], alone)


def test_a_wavefront_as_wide_as_a_row_is_plain_decoding():
    which = tiny.sampler()
    params = tiny.params()["target"]
    found = wavefront.generate(
        params, tiny.LABELS, tiny.KEYS, sampler=which, width=tiny.SIDE, first_row_serial=False
    )
    plain = raster.generate(params, tiny.LABELS, tiny.KEYS, sampler=which)
    np.testing.assert_array_equal(found, plain)


def test_wavefront_steps_and_order():
    n = 8
    for width in (1, 3, 8):
        pure = wavefront.schedule(n, n, width, first_row_serial=False)
        assert pure.steps == n + (n - 1) * width
        order = wavefront.schedule(n, n, width)
        assert order.steps == 2 * n + (n - 2) * width
        when = {}
        for step in range(order.steps):
            written = order.writes[step][order.writes[step] != wavefront.NO_QUERY]
            assert len(set(written)) == len(written)
            for code in order.decides[step][order.decides[step] >= 0]:
                assert code not in when
                when[int(code)] = step
        assert sorted(when) == list(range(n * n))
        for row in range(1, n):
            for column in range(n):
                ahead = row * n - n + min(column + width - 1, n - 1)
                assert when[row * n + column] > when[ahead]
    with pytest.raises(InputError, match="width: 9 must be between 1 and the side 8"):
        wavefront.schedule(8, 8, 9)


def test_wavefront_writes_a_row_end_again_once_it_is_known():
    n, width = 8, 3
    order = wavefront.schedule(n, n, width)
    stands_in = order.reads != order.writes
    stands_in &= order.writes != wavefront.NO_QUERY
    assert stands_in.sum() == n - 2  # all rows but the first two open on a stand-in
    for step, lane in np.argwhere(stands_in):
        slot, source = order.writes[step, lane], order.reads[step, lane]
        assert slot % n == n - 1 and source % n == n - 1 and source < slot
        again = np.argwhere((order.writes == slot) & (order.reads == slot))
        assert len(again) == 1 and again[0][0] > step
        decided = np.argwhere(order.decides == slot)[0][0]
        assert again[0][0] == decided + 1


def test_wavefront_is_a_loop_over_the_same_schedule():
    """Greedy, replayed without a cache: the model run anew on what each slot holds at that time.

    One layer, so that a slot's keys and values depend on its own input alone.
    """
    config = tiny.CONFIG.replace(num_layers=1)
    params = {k: v for k, v in tiny.params()["target"].items() if k != "layers_1"}
    which = tiny.sampler(temperature=0.0, config=config)
    n, width = tiny.SIDE, 3
    found = wavefront.generate(params, tiny.LABELS, tiny.KEYS, sampler=which, width=width)
    tokens = np.array(image_tokens.blank(which, tiny.LABELS))
    held = tokens.copy()
    positions = jnp.broadcast_to(jnp.arange(1 + N), held.shape)
    order = wavefront.schedule(n, n, width)
    written = np.zeros(1 + N, bool)
    written[0] = True
    causal = np.tri(1 + N, dtype=bool)

    @jax.jit
    def run(tokens, mask):
        mask = jnp.broadcast_to(mask, (len(tokens), *mask.shape))
        return transformer.apply(config, params, tokens, positions=positions, mask=mask).logits

    for step in range(order.steps):
        reads, writes = order.reads[step], order.writes[step]
        for read, write in zip(reads, writes):
            if write != wavefront.NO_QUERY:
                held[:, write + 1] = tokens[:, read + 1]
                written[write + 1] = True
        logits = np.asarray(run(held, causal & written))[..., : tiny.K]
        for code in order.decides[step]:
            if code >= 0:
                tokens[:, code + 1] = logits[:, code].argmax(axis=-1)
    np.testing.assert_array_equal(found, tokens[:, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codes": 15}, "num_codes: 15 must leave room"),
        ({"side": 9}, "side: 9 needs 81 positions, max_position is 65"),
        ({"guidance": -1.0}, "guidance: -1.0 must be 0 or more"),
    ],
)
def test_bad_samplers(change, message):
    fields = {"config": tiny.CONFIG, "num_codes": tiny.K, "side": 8} | change
    with pytest.raises(InputError, match=message):
        image_tokens.ImageSampler(**fields)
