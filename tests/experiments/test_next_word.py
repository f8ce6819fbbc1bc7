"""Models of a language in which a word says what comes next: 'ab' is followed by 'abab' and '.'."""

import dataclasses
import functools
import itertools
import json
import random

import jax
import numpy as np
import pytest

from experiments import next_word, next_word_costs
from experiments import next_word_scores as scoring
from experiments.configs import learn_your_tokens
from experiments.next_word_costs import Arm
from experiments.next_word_scores import Example, Model
from models import hierarchical, transformer
from models.errors import InputError
from models.word_pooling import Sizes
from models.word_units import NormalForm
from models.words import pack
from training import next_word_models
from training.next_word_models import Recipe, Text
from training.optimizers import OptimizerConfig

FORM = NormalForm(lower_case=True, max_bytes=6)
PAIRS = ["".join(pair) for pair in itertools.product("abcdefghij", repeat=2)]
HELD_OUT = random.Random(0).sample(PAIRS, 15)
SEEN = [pair for pair in PAIRS if pair not in HELD_OUT]
CONTEXT = 6  # words


def text(pairs, count, seed):
    rng = random.Random(seed)
    return "".join(f"{pair} {pair}{pair} . " for pair in rng.choices(pairs, k=count))


TEXTS = {
    "train": [{"text": text(SEEN, 60, seed)} for seed in range(30)],
    "eval": [{"text": text(PAIRS, 60, 100)}],
}
SIZES = Sizes(
    num_prefix=1, width=32, layers=1, heads=2, backbone_width=32, backbone_layers=1,
    backbone_heads=2, blocks="llama",
)  # fmt: skip
RECIPE = Recipe(
    Text("text_files", form=FORM),
    "byte",
    300,
    SIZES,
    context_words=9,
    num_steps=400,
    batch_size=8,
    eval_rows=8,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
    eval_every=400,
)
FLAT = dataclasses.replace(RECIPE, sizes=dataclasses.replace(SIZES, num_prefix=0))
KINDS = {
    "eByte": RECIPE,
    "word": dataclasses.replace(FLAT, units="word", vocab_size=300),
    "sub": dataclasses.replace(FLAT, units="joined_subword", num_steps=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models by kind, each trained when it is first asked for, and their directories."""
    found = {}

    def get(kind):
        if kind not in found:
            directory = tmp_path_factory.mktemp(kind)
            config, units, trained = next_word_models.train(
                KINDS[kind], TEXTS, workdir=directory / "run"
            )
            next_word_models.save(directory / "model", config, trained.state.params, units)
            model = Model(*next_word_models.load(directory / "model"))
            found[kind] = model, directory / "model", trained.metrics
        return found[kind]

    return get


COUNTS = scoring.word_counts(TEXTS["train"])
BUCKETS = scoring.choose(
    TEXTS["eval"], COUNTS, bounds=(0, 50), sizes=(24, 24, 48), context_words=15, seed=0
)


def test_examples_are_a_document_s_words_by_frequency():
    words = TEXTS["eval"][0]["text"].split()
    assert BUCKETS.names == ("never", "1-50", "51 and more")
    for part, fits in zip(
        BUCKETS.examples, (lambda c: c == 0, lambda c: 1 <= c <= 50, lambda c: c > 50), strict=True
    ):
        assert part
        assert all(fits(e.count) and e.count == COUNTS.get(e.word, 0) for e in part)
        for example in part:
            places = [i for i in range(15, len(words)) if words[i] == example.word]
            assert any(tuple(words[i - 15 : i]) == example.context for i in places)
    shares = np.array(BUCKETS.shares)
    counts = np.array([COUNTS.get(word, 0) for word in words[15:]])
    np.testing.assert_allclose(
        shares, [(counts == 0).mean(), ((counts > 0) & (counts <= 50)).mean(), (counts > 50).mean()]
    )
    # Every place once, in whatever bucket.
    assert len(set(BUCKETS.flat)) > 0.9 * len(BUCKETS.flat)


def test_means_are_weighted_by_share():
    values = [float(e.count == 0) for e in BUCKETS.flat]
    assert BUCKETS.means(values) == [1, 0, 0]
    assert BUCKETS.mean(values) == pytest.approx(BUCKETS.shares[0])
    with pytest.raises(InputError, match="buckets: bounds"):
        scoring.choose(
            TEXTS["eval"], COUNTS, bounds=(9, 0), sizes=(1, 1, 1), context_words=1, seed=0
        )
    with pytest.raises(InputError, match="none has more than 1000 words"):
        scoring.choose(TEXTS["eval"], COUNTS, bounds=(), sizes=(1,), context_words=1000, seed=0)


def context_of(model):
    return CONTEXT if model.is_pooled or model.units.kind == "word" else 16


def room_of(model):
    return 0 if model.units.kind == "word" else FORM.max_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_writing_is_right_when_every_unit_and_the_end_are_the_likeliest(kind, models):
    """What a model writes is right for it; with more or fewer letters it is not (section 6, 6)."""
    model, _, _ = models(kind)
    settings = {"context": context_of(model), "max_word": room_of(model), "batch_size": 24}
    examples = BUCKETS.flat[:48]
    rows = scoring.generated(model, examples, **settings)
    written = [model.units.first_word(row.token_ids) for row in rows]
    assert sum(word is not None for word in written) > 24 or kind == "sub"
    for change in (lambda w: w, lambda w: w + "a", lambda w: w[:-1] or "b"):
        asked = [
            dataclasses.replace(e, word=change(word or e.word)[: FORM.max_bytes])
            for e, word in zip(examples, written, strict=True)
        ]
        right = scoring.right_words(model, asked, rows)
        expected = [e.word == word for e, word in zip(asked, written, strict=True)]
        assert right.tolist() == expected
        score = scoring.scores(model, asked, **settings)
        np.testing.assert_array_equal(score.right, right)
        assert (score.hits <= score.units).all() and (score.nats > 0).all()


def test_words_never_seen_are_written_by_units_and_not_by_a_closed_vocabulary(models):
    """Section 6, item 9."""
    accuracy = {}
    for kind in ("eByte", "word"):
        model, _, _ = models(kind)
        settings = {"context": context_of(model), "max_word": room_of(model), "batch_size": 24}
        rows = scoring.generated(model, BUCKETS.flat, **settings)
        accuracy[kind] = BUCKETS.means(scoring.right_words(model, BUCKETS.flat, rows))
    assert accuracy["eByte"][0] > 0.05 and accuracy["word"][0] == 0
    assert min(accuracy["eByte"][2], accuracy["word"][2]) > 0.8  # of full stops


def test_surprise_is_that_of_the_models_themselves(models):
    """Of one word, from the logits of the whole text."""
    example = BUCKETS.flat[0]
    for kind in ("eByte", "sub"):
        model, _, _ = models(kind)
        size = context_of(model)
        settings = {"context": size, "max_word": room_of(model), "batch_size": 24}
        found = scoring.scores(model, BUCKETS.flat[:24], **settings).nats[0]
        ids = model.units.closed(example.word)
        if kind == "sub":
            stream = np.array([*scoring.prompt(model, example.context, size), *ids])
            output = jax.jit(functools.partial(transformer.apply, model.config))
            logits = output(model.params, stream[None, :-1]).logits[0, -len(ids) :]
        else:
            encoded = [word.encode() for word in (*example.context[-size:], example.word)]
            words, lengths = pack(encoded, model.config.max_word)
            output = jax.jit(functools.partial(hierarchical.apply, model.config))
            logits = output(
                model.params, words[None, :-1], lengths[None, :-1], words[None, 1:],
                segment_ids=np.ones((1, size), int), positions=np.arange(size)[None],
            )[0, -1, : len(ids)]  # fmt: skip
        expected = -jax.nn.log_softmax(logits)[np.arange(len(ids)), np.array(ids)].sum()
        assert found == pytest.approx(float(expected), abs=1e-4)


def test_noise_is_in_the_context_alone():
    """Section 6, item 11."""
    changed = scoring.noisy(BUCKETS.flat, "swap", 0.5, seed=0)
    assert [e.word for e in changed] == [e.word for e in BUCKETS.flat]
    pairs = [
        pair
        for before, after in zip(BUCKETS.flat, changed, strict=True)
        for pair in zip(before.context, after.context, strict=True)
    ]
    assert 0.2 < np.mean([a != b for a, b in pairs]) < 0.9
    assert all(sorted(a) == sorted(b) for a, b in pairs)
    assert scoring.noisy(BUCKETS.flat, "swap", 0.5, seed=0) == changed
    with pytest.raises(InputError, match="'insert' makes words longer"):
        scoring.noisy(BUCKETS.flat, "insert", 0.1, seed=0)


def test_flat_models_are_shown_units_and_pooled_ones_words(models):
    """Section 6, item 8: equal units, and equal bytes."""
    example = Example(("ab", "abab", ".", "cd"), "cdcd", 0)
    pooled, flat = models("eByte")[0], models("sub")[0]
    assert pooled.units.decode(scoring.prompt(pooled, example.context, 2)) == ". cd "
    shown = scoring.prompt(flat, example.context, 4)
    assert len(shown) == 4 and flat.units.decode(shown).endswith("cd ")
    with pytest.raises(InputError, match="context: 100 units, but an example has"):
        scoring.scores(flat, BUCKETS.flat[:2], context=100, max_word=6, batch_size=2)


def test_costs_are_counted(models):
    """Section 6, item 10."""
    config = learn_your_tokens.get_config("offline")
    config.examples.context_words = CONTEXT
    config.timing.update(batch_size=2, repeats=1)
    loaded = {kind: models(kind)[0] for kind in ("eByte", "sub")}
    arms = [Arm("sub", "sub", 22, 3.7), Arm("eByte", "eByte", CONTEXT, 3.7)]
    found = next_word_costs.costs(config, arms, loaded)
    assert found["eByte"]["attention"] == CONTEXT**2 + 2 * CONTEXT * (1 + 6) ** 2
    assert found["sub"]["attention"] == 22**2
    assert (found["sub"]["positions"], found["eByte"]["positions"]) == (3.7, 1)
    assert found["eByte"]["operations"] < found["eByte"]["padded operations"]
    assert all(row["milliseconds"] > 0 for row in found.values())


def test_a_saved_model_is_decoded_by_generate(models, run):
    """From text to text, the last word open where no space follows it."""
    _, directory, _ = models("eByte")
    a, b = SEEN[:2]
    prompt = f"{a} {a}{a} . {b}"
    status, out, _ = run(
        f"--checkpoint={directory}", f"--prompt={prompt}", "--method=hat", "--max_new_tokens=6",
        "--json",
    )  # fmt: skip
    row = json.loads(out)
    assert status == 0 and row["text"] == f" {b}{b} "
    assert row["stats"]["target_calls"] == 1 and row["stats"]["decoder_calls"] == 6


def test_a_run_of_the_experiment(monkeypatch, tmp_path):
    """Two models of the offline preset, hardly trained: what is recorded, and that claims are read
    off it."""
    documents = tmp_path / "text"
    documents.mkdir()
    for seed in range(8):
        (documents / f"{seed}.txt").write_text(text(SEEN, 40, seed))
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    config = learn_your_tokens.get_config("offline")
    config.text.dataset, config.text.options.files = "text_files", str(documents / "*.txt")
    config.text.form.max_bytes = 6
    config.sizes.update(width=16, backbone_width=16, heads=1, backbone_heads=1, num_params=40_000)
    config.training.update(num_steps=2, eval_every=2, context_words=9, eval_rows=8)
    config.training.optimizer = {"kind": "adamw", "learning_rate": 1e-3}
    for role in set(config.models) - {"byte", "eByte"}:
        del config.models[role]
    config.models.byte.sizes.backbone_layers = 3
    config.examples.update(sizes=(8, 8, 8, 8), context_words=5, room_words=10, batch_size=8)
    config.examples.equal_units = ()
    config.noise.kinds, config.timing.repeats = (), 1
    found = next_word.run(config, tmp_path)
    assert set(found["values"]) == {"byte, equal bytes", "eByte"}
    for record in found["runs"]:
        assert record["agreement"] == 1.0
    sizes = [row["parameters"] for row in found["values"].values()]
    assert max(sizes) / min(sizes) < 1.05
    assert {claim.name.split(":")[0] for claim in found["claims"]} >= {"equal parameters"}
    assert (tmp_path / "charts.png").stat().st_size > 0
    # The eval documents are others than the training ones.
    assert found["text"]["train"]["documents"] + found["text"]["eval"]["documents"] < 8


def test_claims_compare_figures():
    values = {"a": {"x": 3.0}, "b": {"x": 1.0}, "none": {"x": 0.0}}
    claim = next_word.claim
    wanted = (
        claim("more", "a", "x", "b", times=2),
        claim("less", "a", "x", "b", times=2, at_most=1),
        claim("some", "b", "x", at_least=1),
        claim("nothing over nothing", "none", "x", "none", times=4),
        claim("left out", "c", "x", "b"),
    )
    found = next_word.claims_of(wanted, values)
    assert [c.held for c in found] == [True, False, True, False]
    assert [c.bound for c in found] == [">= 2", "<= 2", ">= 1", ">= 0"]
    with pytest.raises(InputError, match=r"config\.claims: metric: 'y' is not known"):
        next_word.claims_of((claim("", "a", "y"),), values)


def test_recipes_say_what_is_wrong():
    config = learn_your_tokens.get_config("offline")
    config.models.byte.sizes.layer = 1
    with pytest.raises(InputError, match=r"config\.models: byte: .*layer"):
        next_word.recipe(config, "byte")
    published = next_word.recipe(learn_your_tokens.get_config(), "eByte")
    assert published.sizes == Sizes() and published.sizes.num_prefix == 4
    assert published.optimizer.learning_rate == 1e-4 and published.optimizer.final_fraction == 1
