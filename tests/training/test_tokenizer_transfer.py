"""Models with other tokenisers: exact rows, export that transformers opens, unigramify, n-shot."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from models import byte_level, hf_checkpoint, hypernetwork, token_tables, transformer
from models.byte_characters import BYTE_CHARACTERS
from models.errors import InputError
from models.tokenizer import Tokenizer
from tests.models import random_models
from training import (
    batches,
    hypernetwork_recipes,
    retokenized,
    tokenizer_transfer,
    unigramify,
)
from training import tokenizers as tokenizer_training
from training.fitting import TrainConfig
from training.hypernetwork_losses import BaseModel

END = tokenizer_training.END_OF_TEXT
TEXTS = (
    "def first(number):\n    return number + first(number - 1)\n",
    "class Second(object):\n    def method(self, number):\n        return self.number\n",
    "for index in range(number):\n    print(index, number)\n",
)


@functools.cache
def source():
    return tokenizer_training.train_bpe(TEXTS, 290)


@functools.cache
def base(tied: bool = False) -> BaseModel:
    form = byte_level.normalise(source())
    model = random_models.BASE.replace(
        vocab_size=form.vocab_size, eos_token_ids=(0,), tie_embeddings=tied
    )
    return BaseModel(model, random_models.params(model), form)


@functools.cache
def target():
    other = tokenizer_training.train_bpe([*TEXTS[1:] * 4, "größer und größer " * 4], 320)
    return tokenizer_transfer.target_form(base(), other)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_the_export_and_agrees(tmp_path, tied):
    """AutoTokenizer and AutoModelForCausalLM: the same ids and the same logits as here."""
    swapped = tokenizer_transfer.with_heuristic(base(tied), target(), "fvt")
    settings = {"eos_token": END, "pad_token": {"content": END}, "chat_template": "x"}
    tokenizer_transfer.save(tmp_path / "model", swapped, settings=settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs.eos_token, theirs.pad_token, theirs.eos_token_id) == (END, END, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    text = "def größer(number):\n\treturn 日本 number" + END
    ids = theirs(text)["input_ids"]
    config, params = hf_checkpoint.load(tmp_path / "model")
    assert config.vocab_size == target().vocab_size and config.tie_embeddings == tied
    mine = Tokenizer.from_directory(tmp_path / "model", config)
    assert ids == mine.encode(text) == target().encode(text) and ids[-1] == 0
    assert theirs.decode(ids, skip_special_tokens=True) == text.removesuffix(END)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits.numpy()
    ours = transformer.apply(config, params, jnp.array([ids])).logits
    np.testing.assert_allclose(ours, logits, atol=2e-4)
    # Opened again, it is a base model whose tokeniser can be exchanged in turn.
    again = hypernetwork_recipes.load_base(tmp_path / "model")
    assert again.form.encode(text) == ids
    with_bias = swapped._replace(bias=jnp.zeros(target().vocab_size))
    with pytest.raises(InputError, match="bias"):
        tokenizer_transfer.save(tmp_path / "other", with_bias)


def test_the_models_own_tokeniser_by_a_heuristic_changes_nothing():
    for arm in ("lexical", "fvt"):
        same = tokenizer_transfer.with_heuristic(base(), base().form, arm)
        for mine, theirs in zip(same.tables[:2], base().tables[:2], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    biased = base()._replace(bias=jnp.arange(float(base().config.vocab_size)))
    moved = tokenizer_transfer.with_heuristic(biased, target(), "fvt")
    match = byte_level.overlap(base().form, target())
    both = match >= 0
    np.testing.assert_allclose(moved.bias[both], match[both], rtol=1e-6)


def test_special_tokens_keep_rows_and_may_move():
    """Section 6.5, also where the new tokeniser has them at other ids."""
    other = byte_level.normalise(source(), specials={END: 7})
    config = hypernetwork.for_model(base().config, num_heads=2, num_layers=1)
    params = hypernetwork.init(config, jax.random.key(0))
    for form, place in ((target(), 0), (other, 7)):
        swapped = tokenizer_transfer.with_hypernetwork(base(), form, config, params)
        assert swapped.config.eos_token_ids == (place,)
        for mine, theirs in zip(swapped.tables[:2], base().tables[:2], strict=True):
            np.testing.assert_array_equal(mine[place], theirs[0])
    copied = tokenizer_transfer.with_copies(base(), swapped)
    match = byte_level.overlap(base().form, other)
    both, new = match >= 0, match < 0
    rows = base().tables.input[match[both]]
    np.testing.assert_array_equal(copied.tables.input[both], rows)
    np.testing.assert_array_equal(copied.tables.input[new], swapped.tables.input[new])
    strange = byte_level.normalise(source(), specials={"<s>": 0})
    with pytest.raises(InputError, match="lacks"):
        tokenizer_transfer.with_tables(base(), strange, base().tables)


def joint() -> retokenized.Predicting:
    config = hypernetwork.for_model(base().config, num_heads=2, num_layers=1, max_surface=4)
    params = jax.jit(hypernetwork.init, static_argnums=0)(config, jax.random.key(1))
    surfaces = tokenizer_transfer.surfaces_of(base(), target(), config)
    return retokenized.Predicting(
        config, params, base().source, surfaces.ids, np.array([0], np.int32)
    )


@pytest.mark.parametrize("with_network", [False, True])
def test_training_goes_on_from_new_tables(tmp_path, with_network):
    """Section 2.7: the loss falls; with a hypernetwork its predictions are the tables."""
    predicting = joint() if with_network else None
    swapped = tokenizer_transfer.with_heuristic(base(), target(), "fvt")
    if predicting is not None:
        chosen = (predicting.config, predicting.params)
        swapped = tokenizer_transfer.with_hypernetwork(base(), target(), *chosen)
    config = TrainConfig(
        model=swapped.config, optimizer=retokenized.optimizer(3e-3), num_steps=12, batch_size=2,
        sequence_length=32, log_every=1, eval_every=6, checkpoint_every=12,
    )  # fmt: skip
    tokenizer = Tokenizer(target().backend, swapped.config)
    documents = batches.TokenizedDocuments([{"text": text} for text in TEXTS], tokenizer)
    seen = []

    def evaluate(params):
        seen.append(params)
        return {"eval_loss": 0.0}

    found = retokenized.train(
        config, swapped.params,
        train_batches=batches.train_batches(documents, batch_size=2, seq_len=32),
        evaluate=evaluate, workdir=tmp_path, predicting=predicting,
    )  # fmt: skip
    from training import metric_writers

    lines = metric_writers.read_metrics(tmp_path / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    rates = {line["learning_rate"] for line in lines if "loss" in line}
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) and len(rates) == 1
    assert len(seen) == 2
    moved = token_tables.tables(swapped.config, found)
    assert np.abs(moved.input - swapped.tables.input).max() > 1e-4
    kernel = found["layers_0"]["attention"]["qkv"]["kernel"]
    assert np.abs(kernel - base().params["layers_0"]["attention"]["qkv"]["kernel"]).max() > 1e-5
    np.testing.assert_array_equal(token_tables.tables(swapped.config, seen[-1]).input, moved.input)
    if predicting is not None:  # special rows stay; at first nothing is far away
        np.testing.assert_array_equal(moved.input[0], base().tables.input[0])
        first = next(line for line in lines if "auxiliary" in line)
        assert first["auxiliary"] == pytest.approx(0, abs=1e-6)
        assert lines[-2].get("auxiliary", 1) > 0


def test_best_segmentations_are_those_of_full_enumeration():
    rng = np.random.default_rng(0)
    word = "abcabd"
    parts = {word[i:j] for i, j in itertools.combinations(range(7), 2)} - {"abca", "bd"}
    scores = {part: float(rng.normal(-3, 1)) for part in sorted(parts)}
    every = []
    for cuts in itertools.product([0, 1], repeat=5):
        at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 6]
        way = tuple(word[i:j] for i, j in itertools.pairwise(at))
        if all(part in scores and len(part) <= 4 for part in way):
            every.append(way)
    every.sort(key=lambda way: -sum(scores[part] for part in way))
    assert unigramify.best_segmentations(word, scores, 9, 4) == every[:9]


def test_a_bpe_as_a_unigram_cuts_words_as_before():
    form = byte_level.normalise(source(), pre_tokenization="own")
    found = unigramify.unigramify(form, TEXTS)
    assert found.form.tokens == form.tokens and found.words > 20
    assert found.identical > 0.95
    same = total = 0
    for text in TEXTS:
        for piece, _ in form.backend.pre_tokenizer.pre_tokenize_str(text):
            same += form.decompose(piece) == found.form.decompose(piece)
            total += 1
        assert found.form.decode(found.form.encode(text)) == text
    assert found.identical == pytest.approx(same / total)
    # 'ab' is frequent, so that priors write 'abc' as 'ab' and 'c'; the BPE does not.
    tokens = {token: i for i, token in enumerate([*BYTE_CHARACTERS, "bc", "ab"])}
    model = tokenizers.models.BPE(tokens, [("b", "c"), ("a", "b")])
    small = byte_level.assemble(model, list(tokens), {}, len(tokens))
    text = ["ab,ab,ab,ab,ab,ab,ab,ab,abc"]
    assert [small.tokens[i] for i in small.encode("abc")] == ["a", "bc"]
    right = unigramify.unigramify(small, text)
    assert right.identical == 1
    plain = unigramify.unigramify(small, text, prior_weight=1e6)
    assert plain.identical == pytest.approx(16 / 17)
    with pytest.raises(InputError, match="no words"):
        unigramify.unigramify(form, [])
