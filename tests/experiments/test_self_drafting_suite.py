"""The suite of self-drafting: what it takes from the systems' configs, and what a token costs."""

import pytest

from decoding import methods
from experiments.benchmarks import self_drafting
from experiments.config_parts import method
from experiments.configs import kangaroo, lud
from models import hf_checkpoint, transformer
from models.errors import InputError
from tests.decoding import tiny

CONFIG = tiny.TARGET.replace(num_layers=4, window=None, local_layers=(), vocab_size=300)


def test_methods_parts_and_copies_are_those_of_the_systems():
    config = self_drafting.config()
    entries = {entry.label: entry for entry in config.decode.methods}
    assert set(self_drafting.PICKS) < set(entries) and next(iter(entries)) == "plain"
    for entry in entries.values():
        methods.parse_options(entry.method, entry.options.to_dict())
        assert entry.role in config.models
        assert not entry.part or entry.part in config.parts
    assert config.models.target == "code_deep" and config.models.draft == "code_draft"
    own = kangaroo.get_config("offline")
    assert config.parts["kangaroo: exit 2, attention"] == own.parts["exit 2, attention"]
    assert config.models[entries["LUD"].role] == lud.get_config("offline").models.target
    assert entries["SkipDecode"].options.span == self_drafting.NEW_TOKENS

    few = self_drafting.config(["Kangaroo"])
    assert [entry.label for entry in few.decode.methods] == ["plain", "Kangaroo"]
    assert list(few.models) == ["target"]
    with pytest.raises(InputError, match="lines: 'Kangaro'"):
        self_drafting.config(["Kangaro"])


def test_a_token_costs_the_weights_that_were_read_for_it():
    head = CONFIG.vocab_size * CONFIG.embed_dim
    layer = (CONFIG.num_params() - 2 * head) / 4
    assert not CONFIG.tie_embeddings
    calls = {"target_calls": 10, "tokens_emitted": 20, "draft_calls": 0}
    found = self_drafting.cost(calls, CONFIG, 0, False)
    assert found == {"layers": 2.0, "weights": pytest.approx(0.5)}
    plain = 4 * layer + head
    skipped = self_drafting.cost({**calls, "layers_run": 20}, CONFIG, 0, False)
    assert skipped["layers"] == 1
    assert skipped["weights"] == pytest.approx((20 * layer + 10 * head) / plain / 20)
    # A part is read at least once a call; a draft model as often as it is called.
    part = self_drafting.cost(calls, CONFIG, 1000, True)
    assert part["weights"] - 0.5 == pytest.approx(10 * 1000 / plain / 20)
    drafted = self_drafting.cost({**calls, "draft_calls": 30}, CONFIG, 1000, False)
    assert drafted["weights"] - 0.5 == pytest.approx(30 * 1000 / plain / 20)


def test_a_small_run_has_a_line_for_every_method_and_setting(tmp_path):
    params = transformer.init(CONFIG, tiny.jax.random.key(0))
    hf_checkpoint.save(tmp_path / "target", CONFIG, params)
    config = self_drafting.config(["Token Recycling"])
    config.models.target = str(tmp_path / "target")
    config.data.update(num_prompts=2, prompt_tokens=16)
    config.decode.update(max_new_tokens=6, repeats=1, temperatures=(0.0,), batch_sizes=(1, 2))
    config.decode.methods += (
        method("SkipDecode", "skip_decode", max_layers=3, min_layers=2, span=4),
    )
    records = self_drafting.measure(config)
    assert len(records) == 6
    by = {(r["label"], r["batch_size"]): r for r in records}
    assert by["plain", 1]["weights"] == pytest.approx(1) and by["plain", 2]["layers"] == 4
    assert by["SkipDecode", 2]["layers"] == pytest.approx((3 + 3 + 2 + 2 + 2 + 2) / 6)
    assert by["Token Recycling", 1]["lossless"]["held"]
    text = self_drafting.table(records)
    assert text.count("\n") == 7 and "| SkipDecode | 0 | 2 |" in text
    assert [len(chart["series"]) for chart in self_drafting.charts(records)] == [3, 3]
