"""What small models and probes learn of symbols that they do not know; recipes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from models import decipher_probe
from models import random_embeddings as lex
from models.decipher_probe import DecipherProbeConfig
from models.errors import InputError
from models.permutation_mixture import MarkovLanguage, log_probs
from models.random_embeddings import LexinvariantConfig
from training import decipher_probe as probing
from training import fitting, image_batches, lexinvariant, lexinvariant_models, symbol_data
from training import tokenizers as tokenizer_training
from training.fitting import TrainConfig
from training.lexinvariant import Cipher
from training.optimizers import OptimizerConfig
from training.symbol_data import LanguageRows, TextData

B, T, V = 32, 32, 4
MODEL = LexinvariantConfig(
    vocab_size=V, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
    max_position=32, activation="gelu", gated_mlp=False,
)  # fmt: skip
CONFIG = TrainConfig(
    MODEL, OptimizerConfig(learning_rate=1e-2, warmup_steps=20, weight_decay=0.0), num_steps=250,
    batch_size=B, sequence_length=T, log_every=50, eval_every=125, checkpoint_every=250,
)  # fmt: skip
# Symbols without any order, of which one is frequent: what can be learned is how often each is.
FREQUENCIES = np.array([0.55, 0.3, 0.1, 0.05])


def unordered(rows, seed):
    return np.random.default_rng(seed).choice(V, (rows, T + 1), p=FREQUENCIES).astype(np.int32)


@functools.cache
def trained(folder):
    batches = image_batches.train_batches([(LanguageRows(unordered(4000, 1)), B)], seed=0)
    held_out = list(image_batches.in_order(LanguageRows(unordered(B, 2)), B))
    return lexinvariant.train(
        CONFIG, Cipher(), train_batches=batches, eval_batches=held_out, workdir=folder
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("model"))


def test_frequencies_are_learned_in_context_and_never_before(model):
    rows = unordered(1000, 3)
    given = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    nats = np.asarray(
        lexinvariant.nats(CONFIG, Cipher(), model.state.params, given, jax.random.key(0))
    ).mean(axis=0)
    entropy = -(FREQUENCIES * np.log(FREQUENCIES)).sum()
    assert nats[0] > entropy + 0.05
    assert nats[-8:].mean() < nats[0] - 0.05
    assert nats.min() > entropy - 0.05


def test_a_probe_reads_what_the_model_knows_and_no_more(tmp_path):
    """Token 0 has a fixed vector, so its name can be read off; those of others cannot."""
    frozen_model = MODEL.replace(fixed_ids=(0,))
    params = lex.init(frozen_model, jax.random.key(0))
    before = jax.device_get(params)
    config = dataclasses.replace(CONFIG, model=frozen_model, num_steps=150)
    batches = image_batches.train_batches([(LanguageRows(unordered(4000, 4)), B)], seed=1)
    held_out = list(image_batches.in_order(LanguageRows(unordered(4 * B, 5)), B))
    sizes = DecipherProbeConfig(V, 16, 16)
    found = probing.train(
        config, sizes, params, train_batches=batches, eval_batches=held_out, workdir=tmp_path
    )
    rows = unordered(500, 6)[:, :-1]
    keys = jax.random.split(jax.random.key(1), 500)
    hidden = probing.activations(frozen_model, params, rows, keys)
    said = np.asarray(decipher_probe.apply(found.state.params, hidden).argmax(-1))
    right = said == rows
    assert right[rows == 0].mean() > 0.9
    others = right[rows != 0].mean()  # it can say the most frequent of the others, no more
    assert 0.5 < others < FREQUENCIES[1] / FREQUENCIES[1:].sum() + 0.03
    assert found.metrics["eval_accuracy"] == pytest.approx(right.mean(), abs=0.03)
    jax.tree.map(np.testing.assert_array_equal, params, before)  # the model is as it was
    decipher_probe.save(tmp_path / "saved", sizes, found.state.params)
    loaded_sizes, loaded = decipher_probe.load(tmp_path / "saved")
    assert loaded_sizes == sizes
    jax.tree.map(np.testing.assert_array_equal, loaded, found.state.params)


def test_no_model_is_better_than_the_exact_one_on_an_enumerable_language():
    """Trained a little on the language itself, so that it has had its chance."""
    language = MarkovLanguage(V, (0.8, 0.12))
    rows, held_out = language.sample(4000, T + 1, seed=1), language.sample(2000, T + 1, seed=2)
    config = dataclasses.replace(CONFIG, num_steps=200)
    state = fitting.init(config, lex.init(MODEL, jax.random.key(0)))
    loss = functools.partial(lexinvariant.loss_fn, config, Cipher())
    step = jax.jit(functools.partial(fitting.update, config, loss))
    for batch in image_batches.in_order(LanguageRows(rows), B):
        if int(state.step) == 100:
            break
        state, _ = step(state, batch)
    given = {"tokens": held_out[:, :-1], "targets": held_out[:, 1:]}
    nats = np.asarray(lexinvariant.nats(config, Cipher(), state.params, given, jax.random.key(0)))
    excess = nats + np.asarray(log_probs(language.transition(), held_out))[:, 1:]
    errors = excess.std(axis=0) / np.sqrt(len(excess))
    assert (excess.mean(axis=0) > -3 * errors).all()
    # With one symbol of context nobody knows more than that it hardly repeats itself.
    assert abs(nats[:, 0].mean() - np.log(V)) < 0.35


def test_probes_of_other_models_are_refused(tmp_path):
    run = {"train_batches": None, "eval_batches": None, "workdir": tmp_path}
    with pytest.raises(InputError, match="gaussian"):
        standard = dataclasses.replace(CONFIG, model=MODEL.replace(table="learned"))
        probing.train(standard, DecipherProbeConfig(V, 16, 16), {}, **run)
    with pytest.raises(InputError, match="probe"):
        probing.train(CONFIG, DecipherProbeConfig(V, 8, 16), {}, **run)


def test_characters_are_tokens_and_what_is_none_of_them_has_a_stand_in():
    tokenizer = tokenizer_training.characters(tokenizer_training.LOWER_CASE_64, lower_case=True)
    assert tokenizer.get_vocab_size() == 65
    text = "Def f(x):\n    return {x}[0]"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.lower()
    assert tokenizer.decode(tokenizer.encode("é\t$").ids) == "???"
    assert tokenizer.encode("a<|endoftext|>").ids[-1] == 64
    ascii_ids = tokenizer_training.characters(tokenizer_training.ASCII).encode("Az\t~").ids
    assert ascii_ids == [65, 122, 9, 126]
    for wrong in (("aab?", "?"), ("abc", "?"), ("abc", "")):
        with pytest.raises(InputError):
            tokenizer_training.characters(wrong[0], other=wrong[1])


def test_every_recipe_fits_its_data():
    for name, recipe in lexinvariant_models.RECIPES.items():
        if isinstance(recipe, lexinvariant_models.ProbeModel):
            assert recipe.model in lexinvariant_models.RECIPES
        elif not isinstance(recipe.data, TextData) or recipe.data.tokens in symbol_data.CHARACTERS:
            model = lexinvariant_models.complete(recipe)
            assert len(model.free_ids) >= 6, name
            assert recipe.train.sequence_length <= model.max_position
    published = lexinvariant_models.RECIPES["pile_lexinvariant"].train.model
    assert 150e6 < published.num_params() < 153e6
    with pytest.raises(InputError, match="prose_lexinvariant"):
        lexinvariant_models.ensure("prose_lexinvarian")


def test_a_model_is_trained_once_with_its_tokeniser(tmp_path):
    tiny = {"train.num_steps": 2, "train.batch_size": 2, "train.sequence_length": 16,
            "eval_batches": 1}  # fmt: skip
    root = tmp_path / "library"
    root.mkdir()
    for i in range(60):
        (root / f"m{i}.py").write_text(f'"""{"Some words of prose. " * 12}{i}"""\n')
    tiny["data.options"] = {"root": str(root)}
    first = lexinvariant_models.ensure("prose_lexinvariant", cache_dir=tmp_path, overrides=tiny)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    again = lexinvariant_models.ensure("prose_lexinvariant", cache_dir=tmp_path, overrides=tiny)
    assert again == first and (again / "model.safetensors").stat().st_mtime_ns == stamp
    config, params = lex.load(first)
    assert config.fixed_ids == config.eos_token_ids == (64,)
    assert (first / "tokenizer.json").is_file()
    # End of text alone has a learned vector.
    assert params["fixed"]["embedding"].shape == (1, config.embed_dim)
