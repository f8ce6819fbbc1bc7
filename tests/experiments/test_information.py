"""Budgets of rounds, traces against a method's own ledger, surprise against a naive loop."""

import math

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from decoding import methods
from decoding.unmasking import explore, learned_filter
from experiments import config_parts, information, trained_parts
from models.errors import InputError
from tests.decoding import masked, tiny

OPTIONS = {"block_length": 8, "threshold": 0.4, "early_stop": False}


def test_budgets():
    assert information.quota_budget(2, 10) == pytest.approx(2 * math.log(10))
    assert information.threshold_budget(0.9, 32) == pytest.approx(3.3715, abs=1e-4)
    assert information.exploring_budget(0.9, [1.0, 0.5]) == pytest.approx(2.4)
    with pytest.raises(ValueError, match="factor: 1 must be"):
        information.factor_budget(1)
    # The bound on the factor rule is what n equal tokens at its edge carry, and below f.
    for factor in (0.1, 0.5, 0.99):
        n = np.arange(1, 2000)
        carried = n * -np.log(1 - factor / (n + 1))
        assert (carried < information.factor_budget(factor)).all()
        assert carried.max() > 0.99 * factor  # and no smaller bound would do
    with_rule = information.budget_of
    assert with_rule({"rule": "quota"}, 96) is None
    assert with_rule({"rule": "factor", "factor": 1.0}, 96) is None
    assert with_rule({"rule": "factor", "factor": 0.5}, 96) == 0.5
    wide = {"rule": "threshold", "threshold": 0.9, "block_length": 16, "horizon": 2}
    assert with_rule(wide, 96) == pytest.approx(48 * math.log(1 / 0.9))


def test_what_is_sure_by_rule():
    peak = np.array([[0.95, 0.6, 0.99, 0.8]])
    masks = np.array([[True, True, True, False]])
    for options, expected in (
        ({"rule": "threshold", "threshold": 0.6}, [True, True, True, False]),
        ({"rule": "factor", "factor": 0.5}, [True, False, True, False]),
        ({"rule": "quota"}, [True, False, True, False]),
    ):
        assert information.sure_at(options, peak, masks)[0].tolist() == expected


def test_a_trace_is_the_ledger_of_the_method():
    options = methods.parse_options("ete", OPTIONS)
    method = tiny.build("ete", **OPTIONS)
    prompts = tiny.PROMPTS
    found, texts = information.trace(
        masked.CONFIG, masked.params(), prompts, method, options, masked.STOP
    )
    rows = masked.decode(method)
    assert texts == tiny.texts(rows)
    for number, row in enumerate(rows):
        mine = found.row == number
        stats = row.stats
        assert mine.sum() == stats["target_calls"]
        assert found.sure[mine].sum() == stats[explore.EXPLOITED]
        assert found.tokens[mine].sum() == stats[explore.EXPLOITED] + stats[explore.EXPLORED]
        assert found.sure_nats[mine].sum() == pytest.approx(stats[explore.EXPLOITED_NATS], rel=1e-4)
        total = stats[explore.EXPLOITED_NATS] + stats[explore.EXPLORED_NATS]
        assert found.nats[mine].sum() == pytest.approx(total, rel=1e-4)
        assert (found.newly_sure[mine] == -1).sum() == 1
    # Against a loop over single canvases.
    prompt, text = prompts[0], texts[0]
    canvas, expected = np.array([*prompt, *[masked.MASK] * masked.NEW]), 0.0
    for i, token in enumerate(text):
        law = masked.softmax(masked.Reference()(canvas, 0, len(canvas)))
        expected -= np.log(law[len(prompt) + i, token])
        canvas[len(prompt) + i] = token
    value = information.surprise(masked.CONFIG, masked.params()["target"], prompt, text, masked.NEW)
    assert value == pytest.approx(expected, rel=1e-4)


def test_measure_reports_every_method_and_holds_its_claims():
    config = ConfigDict({"seed": 0})
    config.decode = ConfigDict(
        {
            "temperatures": (0.0,),
            "max_new_tokens": masked.NEW,
            "stop_at_eos": True,
            "methods": (
                config_parts.method("ete", "ete", **OPTIONS),
                config_parts.method("filter", "learn2pd", block_length=8),
                config_parts.method("plain", "llada", rule="threshold", threshold=0.3,
                                    block_length=8, early_stop=False),
            ),
        }
    )  # fmt: skip
    figure, claims = information.measure(
        config, {"target": masked.CONFIG}, masked.params(), tiny.PROMPTS
    )
    assert [line["label"] for line in figure["table"]] == ["ete", "plain"]
    assert all(claim.held for claim in claims) and len(claims) == 2
    line = figure["table"][0]
    assert line["nats_a_round"] == pytest.approx(line["nats"] / line["rounds"], rel=1e-6)
    assert [len(series["x"]) for series in figure["series"]] == [8, 8]


def test_parts_of_a_comparison_come_from_directories_or_recipes(tmp_path):
    shape = learned_filter.FilterConfig(8)
    params = learned_filter.init(shape, jax.random.key(0))
    learned_filter.save(tmp_path / "filter", shape, params)
    config = config_parts.comparison("x")
    config.parts = ConfigDict(
        {"mine": {"kind": "filter", "directory": str(tmp_path / "filter")}, "unused": {}}
    )
    config.decode.methods = (
        config_parts.method("a", "learn2pd", part="mine", block_length=8),
        config_parts.method("b", "llada"),
    )
    found = trained_parts.load(config, {"target": masked.CONFIG})
    assert list(found) == ["mine"]
    np.testing.assert_array_equal(
        found["mine"]["filter"]["layer_0"]["kernel"], params["layer_0"]["kernel"]
    )
    for entry, message in (
        ({"sources": ()}, "config.parts.unused: 'training'"),
        ({"sources": (), "training": {"steps": 3}}, "config.parts.unused: .*'steps'"),
    ):
        config.parts.unused = ConfigDict({"kind": "filter"} | entry)
        with pytest.raises(InputError, match=message):
            trained_parts.directory_of(config, "unused")
    with pytest.raises(InputError, match="part: 'other' is not known"):
        trained_parts.directory_of(config, "other")
