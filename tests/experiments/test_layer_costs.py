"""Time over layers: medians and ratios by hand, and what a small run counts."""

import pytest

from decoding import stopping
from experiments import layer_costs, text_quality
from experiments.config_parts import comparison as comparison_config
from experiments.config_parts import method
from experiments.layer_costs import Cost
from tests.decoding import tiny

CONFIG = tiny.TARGET.replace(num_layers=4, window=None, local_layers=())


def test_ratios_are_taken_repeat_by_repeat_and_without_prompts():
    found = layer_costs.summarise(
        {
            "plain": [Cost(1.0, 9.0, 10, 80), Cost(1.0, 17.0, 10, 80), Cost(2.0, 10.0, 10, 80)],
            "half": [Cost(1.0, 5.0, 8, 32), Cost(1.0, 9.0, 8, 32), Cost(2.0, 5.2, 8, 32)],
        }
    )
    assert found["plain"]["whole"] == found["plain"]["decoding"] == found["plain"]["promised"] == 1
    half = found["half"]
    assert half["layers"] == 4 and half["promised"] == 2
    assert half["milliseconds"] == pytest.approx(500)
    assert half["decoding"] == pytest.approx(0.8 / 0.5)  # of 1.6, 1.6 and 2
    assert half["whole"] == pytest.approx(17 / 9)  # of 1.8, 1.89 and 1.92


def test_a_run_counts_the_layers_of_every_batch():
    params = {"target": tiny.transformer.init(CONFIG, tiny.jax.random.key(0))}
    config = comparison_config("costs")
    config.decode.update(temperatures=(0.0,), batch_sizes=(2,), max_new_tokens=6)
    options = {"max_layers": 3, "min_layers": 2, "span": 4}
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("skip, few", "skip_decode", **options),
    )
    figure, claims = layer_costs.measure(config, {"target": CONFIG}, params, tiny.PROMPTS[:3])
    plain, skip = figure["table"]["2"].values()
    assert plain["layers"] == 4 and skip["layers"] == (3 + 3 + 2 + 2 + 2 + 2) / 6
    assert skip["milliseconds"] > 0 and len(claims) == 2
    assert [series["label"] for series in figure["series"]] == ["plain, batch 2", "skip, batch 2"]


def test_charts_join_the_methods_of_a_family():
    lines = [
        {"label": label, "role": "target", "batch_size": batch, "rouge_l": rouge, **more}
        for label, batch, rouge, more in (
            ("plain", 1, 1.0, {"answer_loss_by_place": [3.0, 2.0]}),
            ("skip, 3", 1, 0.9, {"layers_per_token": 3.0}),
            ("skip, 2", 1, 0.5, {"layers_per_token": 2.0}),
            ("skip, 2", 8, 0.4, {"layers_per_token": 2.0}),
        )
    ]
    found = text_quality.figures(lines, {"target": CONFIG})
    assert set(found) == {"rouge l", "loss by place"}
    assert found["rouge l"]["series"] == [
        {"label": "plain", "x": [4.0], "y": [1.0]},
        {"label": "skip", "x": [2.0, 3.0], "y": [0.5, 0.9]},
    ]


def test_the_loss_on_answers_is_with_the_methods_own_layers():
    """The gated forward of the method's schedule; all layers for plain decoding."""

    class Words:
        def decode(self, ids):
            return " ".join(map(str, ids))

        def encode(self, text):
            return [int(word) for word in text.split()]

    params = {"target": tiny.transformer.init(CONFIG, tiny.jax.random.key(0))}
    config, stop = CONFIG.replace(eos_token_ids=(5,)), stopping.StopConfig(4)
    options = {"max_layers": 3, "min_layers": 2, "span": 4}
    entries = [method("a", "autoregressive"), method("b", "skip_decode", **options)]
    losses = []
    for entry in entries:
        built = tiny.methods.build(
            entry.method, {"target": config}, tiny.SamplingConfig(), entry.options.to_dict()
        )
        rows = tiny.generation.generate(params, tiny.PROMPTS[:2], built, stop)
        found = text_quality.measure(
            comparison_config("x"), {"target": config}, params, Words(), entry, rows,
            ["7 8 9 10", "11 12"],
        )  # fmt: skip
        budget = text_quality.layers_of(entry, config)
        nats = []
        for row, answer in zip(rows, ([7, 8, 9, 10, 5], [11, 12, 5]), strict=True):
            text = [*row.prompt_ids, *answer]
            first = len(row.prompt_ids) - 1
            tokens = tiny.jnp.asarray([text])
            generated = tiny.jnp.arange(len(text))[None] - first
            logits = text_quality.gated(config, params["target"], tokens, generated, budget)
            log_p = tiny.jax.nn.log_softmax(logits[0])
            nats += [-float(log_p[first + i, token]) for i, token in enumerate(answer)]
        assert found["answer_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
        assert len(found["answer_loss_by_place"]) == text_quality.PLACES
        losses.append(found["answer_loss"])
    assert losses[0] != losses[1]
