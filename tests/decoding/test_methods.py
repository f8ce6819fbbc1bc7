"""Methods by name: options parsed and checked, models required, mistakes named in one line."""

import re

import pytest

from decoding import method_spec, methods
from decoding.loop import Method
from decoding.sampling import SamplingConfig
from models.errors import InputError
from tests.decoding import tiny


def fails(message: str):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


# What defaults do not suit the tiny target.
NEEDED = {
    "kangaroo": {"exit_layer": 1},
    "lud": {"pad_id": 1},
    "m2r2": {"intervals": 2},
    "m2r2_exit": {"intervals": 2},
}


def test_every_method_builds_with_its_defaults_and_once():
    for name, spec in methods.METHODS.items():
        needed = NEEDED.get(name, {})
        for temperature in (0.0, 1.0):
            method = tiny.build(name, temperature, **needed)
            assert isinstance(method, Method)
            assert method.name == name
            assert method.roles == (*spec.roles, *spec.parts)
            # The same method is the same object, so that nothing is compiled twice.
            assert tiny.build(name, temperature, **needed) is method
        assert spec.summary
        assert "\n" not in spec.summary
        for option in spec.options.values():
            assert option.help


def test_depth_and_lookahead():
    assert tiny.build("autoregressive")[2:4] == (0, 1)
    for name in ("prompt_lookup", "speculative_sampling"):
        assert tiny.build(name, num_draft=3)[2:4] == (3, 4)
        assert tiny.build(name)[2:4] == (5, 6)


def test_unknown_method_names_the_nearest():
    with fails(
        "method: 'prompt_lokup' is not known (did you mean 'prompt_lookup'?); "
        f"allowed: {', '.join(sorted(methods.METHODS))}"
    ):
        tiny.build("prompt_lokup")


def test_unknown_option_names_the_nearest():
    with fails(
        "method prompt_lookup has no option 'num_drafts' (did you mean 'num_draft'?); "
        "allowed: max_ngram, min_ngram, num_draft"
    ):
        tiny.build("prompt_lookup", num_drafts=3)
    with fails("method autoregressive has no option 'qwxz'; allowed: none"):
        tiny.build("autoregressive", qwxz=1)


@pytest.mark.parametrize(
    "text,value",
    [("7", 7), (7, 7), (7.0, 7), (" 7 ", 7)],
)
def test_whole_numbers(text, value):
    options = methods.parse_options("prompt_lookup", {"num_draft": text})
    assert options == {"num_draft": value, "max_ngram": 3, "min_ngram": 1}
    assert type(options["num_draft"]) is int


def test_fractions_words_and_defaults():
    parse = methods.parse_options
    assert parse("speculative_sampling", {}) == {
        "num_draft": 5,
        "draft_temperature": 0.0,
        "rule": "speculative_sampling",
    }
    found = parse("speculative_sampling", {"draft_temperature": "0.7", "rule": "exact_match"})
    assert (found["draft_temperature"], found["rule"]) == (0.7, "exact_match")
    assert type(parse("speculative_sampling", {"draft_temperature": 1})["draft_temperature"]) is (
        float
    )
    assert parse("autoregressive", {}) == {}


@pytest.mark.parametrize("value", ["abc", "1.5", 1.5, "", None, [3], float("nan"), float("inf")])
def test_values_of_the_wrong_type(value):
    with fails(f"num_draft: {value!r} is not of type int"):
        methods.parse_options("prompt_lookup", {"num_draft": value})


def test_truth_values(monkeypatch):
    flag = method_spec.Option(False, "a switch")
    spec = methods.METHODS["autoregressive"]
    changed = methods.MethodSpec(spec.summary, spec.roles, {"flag": flag}, spec.build)
    monkeypatch.setitem(methods.METHODS, "switchable", changed)
    for text, value in (("true", True), ("False", False), (True, True), (False, False)):
        assert methods.parse_options("switchable", {"flag": text}) == {"flag": value}
    with fails("flag: 'yes please' is not of type bool"):
        methods.parse_options("switchable", {"flag": "yes please"})


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_draft": 0}, "num_draft: 0 must be at least 1"),
        ({"num_draft": "-2"}, "num_draft: -2 must be at least 1"),
        ({"draft_temperature": -0.5}, "draft_temperature: -0.5 must be at least 0"),
        ({"draft_temperature": "nan"}, "draft_temperature: nan must be at least 0"),
        (
            {"rule": "exactmatch"},
            "rule: 'exactmatch' is not known (did you mean 'exact_match'?); "
            "allowed: exact_match, speculative_sampling",
        ),
    ],
    ids=str,
)
def test_values_out_of_range(options, message):
    with fails(message):
        tiny.build("speculative_sampling", 1.0, **options)


def test_ngrams_in_the_wrong_order():
    with fails("min_ngram: 4 must be at most max_ngram 3"):
        tiny.build("prompt_lookup", min_ngram=4)


def test_a_missing_draft_model():
    with fails("method speculative_sampling needs a draft model; given: target"):
        methods.build("speculative_sampling", {"target": tiny.TARGET}, SamplingConfig())
    # Methods that need none do not mind one.
    assert methods.build("prompt_lookup", tiny.CONFIGS, SamplingConfig())


def test_vocabularies_that_differ():
    configs = {"target": tiny.TARGET, "draft": tiny.SMALL_DRAFT}
    with fails("vocab_size: the draft model has 5 tokens, the target 64; they must be equal"):
        methods.build("speculative_sampling", configs, SamplingConfig())


def test_models_that_do_not_write_from_left_to_right():
    both_ways = tiny.TARGET.replace(causal=False, family="llada")
    for configs in ({"target": both_ways}, {"target": tiny.TARGET, "draft": both_ways}):
        with pytest.raises(
            InputError, match=r"the (target|draft) model \(llada\) is bidirectional"
        ):
            methods.build(
                "speculative_sampling", {"draft": tiny.DRAFT, **configs}, SamplingConfig()
            )
    # Models that a method does not use may be anything.
    others = {"target": tiny.TARGET, "other": both_ways}
    assert methods.build("autoregressive", others, SamplingConfig())
    with pytest.raises(InputError, match=r"fills masks; the target model \(llama\) is causal"):
        methods.build("llada", {"target": tiny.TARGET}, SamplingConfig())
