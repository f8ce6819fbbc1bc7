"""Self-speculation with an accelerated stream: text, law and counters, for any adapters."""

import jax
import pytest

from decoding import generation, loop, randomness
from decoding.sampling import SamplingConfig
from decoding.speculative.accelerated import accelerated_drafter
from decoding.speculative.method import speculative
from models import accelerated_residual, sharding
from models.accelerated_residual import AcceleratorConfig
from models.errors import InputError
from tests.decoding import exact_laws, tiny, tiny_accelerated
from tests.decoding.tiny_accelerated import Naive

E = 3
ACCELERATOR = AcceleratorConfig(intervals=2, router_width=0)


def models(config=tiny.TARGET) -> dict:
    adapters = tiny_accelerated.models(config, ACCELERATOR)["accelerator"]
    return {"target": tiny.params(config)["target"], "accelerator": adapters}


def build(temperature: float = 0.0, /, **options) -> loop.Method:
    options = {"intervals": 2, "num_draft": E, "threshold": 0.05, **options}
    return tiny.build("m2r2", temperature, **options)


def decode(method: loop.Method, rows=tiny.PROMPTS, **more) -> list:
    return generation.generate(models(), rows, method, tiny.STOP, **more)


def test_text_is_plain_decodings_and_layers_are_counted_once():
    """Section 6, item 6: no layer runs twice on a token."""
    rows = decode(build())
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    for row in rows:
        counts = row.stats
        assert counts["shallow_calls"] == counts["target_calls"] + counts["draft_calls"]
        assert counts["layers_run"] == counts["shallow_calls"] + counts["target_calls"]
        assert counts["draft_calls"] == sum(counts["proposed"])
    accepted = sum(sum(row.stats["accepted"]) for row in rows)
    assert 0 < accepted < sum(row.stats["draft_calls"] for row in rows)
    # Without its adapters, as the head reads the first layers' own stream.
    slow = generation.generate(
        {"target": models()["target"]}, tiny.PROMPTS, build(stream="slow"), tiny.STOP
    )
    assert tiny.texts(slow) == tiny.texts(rows)


def test_the_first_draft_is_the_heads_word_on_the_naive_stream():
    """The stream, head by head, in NumPy; the target's only knows what a fresh pass would."""
    method, model, slots = build(threshold=0.0), models(), 64
    rows = tiny.PROMPTS[:2]
    state = tiny.start(method, model, rows, slots=slots, buffer=64)
    draft = jax.jit(lambda p, s: _drafter().propose(p, s.inner.drafter, s).tree.tokens)(
        model, state
    )
    for b, prompt in enumerate(rows):
        row, text = Naive(tiny.TARGET, model), list(prompt)
        for position, token in enumerate(text[:-1]):
            row.run(0, row.embed(token), position)
        for i in range(E):
            position = len(text) - 1
            x = row.embed(text[-1])
            row.run(0, x, position)
            p = row.faster(0, x, position)
            text.append(int(row.logits(p).argmax()))
            assert int(draft[b, i + 1]) == text[-1]


def _drafter():
    return accelerated_drafter(tiny.TARGET, 1, E, 0.0, SamplingConfig(), randomness.SAMPLE)


def test_rows_and_meshes_change_nothing_and_exact_match_gives_plain_tokens():
    method = build(0.9, rule="exact_match")
    plain = tiny.texts(tiny.decode(tiny.build("autoregressive", 0.9), seed=4))
    rows = decode(method, seed=4)
    assert tiny.texts(rows) == plain
    (alone,) = decode(method, tiny.PROMPTS[2:3], seed=4, row_ids=[2])
    assert alone == rows[2]
    mesh = sharding.make_mesh(2, 4)
    placed = {
        role: jax.device_put(params, sharding.tree_shardings(params, mesh))
        for role, params in models().items()
    }
    split = generation.generate(placed, tiny.PROMPTS, method, tiny.STOP, mesh=mesh, seed=4)
    assert split == rows


def test_the_law_is_the_targets():
    config, sampling, eos = tiny.SMALL, SamplingConfig(temperature=0.9, top_p=0.95), (4,)
    drafter = accelerated_drafter(config, 1, 2, 0.35, sampling, randomness.DRAFT)
    method = speculative("m2r2", config, drafter, "speculative_sampling", sampling)
    model = models(config)
    counts = exact_laws.sampled(method, eos, models=model)
    laws = exact_laws.laws(sampling, eos, config, model["target"])
    assert exact_laws.p_value(counts, laws) > 1e-3


def test_intervals_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="intervals: 4 must divide the model's 2 layers"):
        build(intervals=4)
    assert accelerated_residual.gates(2, 2) == (0, 1, 2)
