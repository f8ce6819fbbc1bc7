"""Medusa-1: text, law, drafts, for heads that say anything."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop
from decoding.sampling import SamplingConfig
from decoding.speculative import medusa
from decoding.speculative.method import speculative
from models import medusa_heads, transformer
from models.errors import InputError
from models.medusa_heads import MedusaConfig
from tests.decoding import exact_laws, tiny

PATHS = medusa.paths_of("0 1 2 00 01 10 000 001", 3)


@functools.cache
def heads(config: Any = tiny.TARGET, own: bool = False) -> Any:
    params = medusa_heads.init(MedusaConfig(3, own), config, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)


def models(config: Any = tiny.TARGET, own: bool = False) -> dict[str, Any]:
    return {"target": tiny.params(config)["target"], "medusa_heads": heads(config, own)}


@functools.cache
def method(temperature: float = 0.0, config: Any = tiny.TARGET) -> loop.Method:
    drafter = medusa.medusa_drafter(config, PATHS)
    return speculative("medusa", config, drafter, "exact_match", SamplingConfig(temperature))


@pytest.mark.parametrize("own", [False, True])
def test_text_is_plain_decodings_whatever_the_heads_say(own):
    rows = generation.generate(models(own=own), tiny.PROMPTS, method(), tiny.STOP)
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()


def test_the_law_is_the_targets():
    config, sampling, eos = tiny.SMALL, SamplingConfig(temperature=0.8), (4,)
    model = models(config)
    counts = exact_laws.sampled(method(0.8, config), eos, models=model)
    laws = exact_laws.laws(sampling, eos, config, model["target"])
    assert exact_laws.p_value(counts, laws) > 1e-3


def test_drafts_are_the_heads_likeliest_at_the_last_accepted_token():
    run, model = method(), models()
    state = tiny.start(run, model, tiny.PROMPTS, slots=64, buffer=64)
    drafter = medusa.medusa_drafter(tiny.TARGET, PATHS)
    ask = jax.jit(lambda s: drafter.propose(model, s.inner.drafter, s).tree)
    for _ in range(3):
        tree = ask(state)
        for b in range(3):
            text = np.asarray(state.tokens)[b, : int(state.lengths[b]) - 1]
            if not len(text):
                assert not bool(tree.valid[b, 1:].any())
                continue
            hidden = transformer.apply(tiny.TARGET, model["target"], text[None]).hidden[:, -1]
            logits = medusa_heads.apply(
                tiny.TARGET, model["target"], model["medusa_heads"], hidden
            )[0]
            best = np.argsort(-np.asarray(logits), axis=-1)
            wanted = [best[len(path) - 1, path[-1]] for path in PATHS]
            assert tree.tokens[b, 1:].tolist() == wanted
        state = loop.advance(
            model, state, jnp.int32(state.rounds + 1), method=run, stop=tiny.STOP, slots=64
        )


def test_fresh_heads_are_the_targets_and_heads_are_written_and_read(tmp_path):
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)), jnp.float32)
    target = tiny.params()["target"]
    for own in (False, True):
        config = MedusaConfig(2, own)
        fresh = medusa_heads.init(config, tiny.TARGET, jax.random.key(0))
        fresh = medusa_heads.with_head(tiny.TARGET, target, fresh)
        logits = medusa_heads.apply(tiny.TARGET, target, fresh, hidden)
        wanted = transformer.unembed(tiny.TARGET, target, hidden)
        for k in range(2):
            np.testing.assert_allclose(logits[:, k], wanted, atol=1e-5)
        medusa_heads.save(tmp_path / str(own), config, fresh)
        found, params = medusa_heads.load(tmp_path / str(own), tiny.TARGET)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, params, fresh)


def test_trees_are_checked():
    assert len(medusa.paths_of(medusa.TREE_25, 4)) == 23
    for text in ("0 x", "00", "0 0", ""):
        with pytest.raises(InputError, match="tree"):
            medusa.paths_of(text, 4)


def test_a_tree_deeper_than_there_are_heads_is_refused():
    drafter = medusa.medusa_drafter(tiny.TARGET, ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)))
    deep = speculative("medusa", tiny.TARGET, drafter, "exact_match", SamplingConfig(0.0))
    with pytest.raises(InputError, match=r"4 levels.*these are 3"):
        generation.generate(models(), tiny.PROMPTS[:1], deep, tiny.STOP)
