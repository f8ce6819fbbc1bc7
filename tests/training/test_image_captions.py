"""Captions as vectors, and masked image models that learn from them; tfds' coco_captions itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from models import enat, hf_checkpoint, transformer, vq
from models.errors import InputError
from tests.models import hf_fixtures
from tests.training import tiny_captions
from training import image_batches, image_captions, image_models, image_tokens, masked_image
from training.data_parallel import RunConfig
from training.image_batches import ImageData
from training.image_captions import CaptionedImageModel, CaptionedTokens, Captions, TextVectors
from training.image_tokens import TokenImages
from training.masked_image import TrainConfig
from training.optimizers import OptimizerConfig

TEXTS = ["w3 w7", "w9", "", "w1 " * 20, "w7 w3", "w5 w5 w5"]
E = 16
MODEL = enat.TextENATConfig(
    num_codes=6, num_tokens=16, embed_dim=8, num_heads=2, encoder_layers=1, text_dim=E
)
UNIFORM = dataclasses.replace(MODEL, disentangled=False)  # which has one shape to compile
CONFIG = TrainConfig(
    model=UNIFORM,
    run=RunConfig(num_steps=200, batch_size=8, log_every=50, eval_every=200),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    ema_decay=0.5,
)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return tiny_captions.save_text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return tiny_captions.prepare_coco(tmp_path_factory.mktemp("coco"))


def test_vectors_are_mean_hidden_states_of_transformers(text_model):
    """Against torch, text by text; the beginning of sequence is read and not counted."""
    found = image_captions.text_vectors(text_model, TEXTS, max_tokens=18)
    model = hf_fixtures.build("llama").model
    for text, vector in zip(TEXTS, found, strict=True):
        ids = [1, *(2 + tiny_captions.WORDS.index(word) for word in text.split())][:18]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0, 1:].numpy()
        expected = hidden.mean(0) if len(hidden) else np.zeros(E)
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert np.abs(found[0] - found[4]).max() > 0.01  # the order of words is in the vector


def test_a_bidirectional_model_does_not_see_padding(tmp_path):
    directory = hf_fixtures.llada_checkpoint(hf_fixtures.build("llama"), tmp_path / "llada")
    tiny_captions.save_tokenizer(directory)
    found = image_captions.text_vectors(directory, TEXTS)
    config, params = hf_checkpoint.load(directory)
    assert not config.causal
    ids = jnp.array([[1, 2 + 3, 2 + 7]])  # as short as it is
    hidden = jax.jit(transformer.apply, static_argnums=0)(config, params, ids).hidden
    np.testing.assert_allclose(found[0], hidden[0, 1:].mean(0), atol=1e-5)


def test_a_vector_does_not_depend_on_other_texts(text_model):
    many = [f"w{i} w{i + 1}" for i in range(66)]
    together = image_captions.text_vectors(text_model, [*TEXTS, *many])
    for i in (0, 3, 5):
        alone = image_captions.text_vectors(text_model, [TEXTS[i]])
        np.testing.assert_array_equal(alone[0], together[i])
    np.testing.assert_array_equal(
        image_captions.text_vectors(text_model, many[-1:])[0], together[-1]
    )


def test_captions_of_an_example():
    example = {"caption": b"one", "captions": {"text": np.array([b"a", b"b"], object)}, "n": 3}
    assert image_captions.captions_of(example, "caption") == ["one"]
    assert image_captions.captions_of(example, "captions.text") == ["a", "b"]
    for field, message in (
        ("captoin", r"'captoin' is not a field \(did you mean 'caption'"),
        ("captions.txt", r"'captions.txt' is not a field .*allowed: text"),
        ("captions", "which is not text"),
    ):
        with pytest.raises(InputError, match=message):
            image_captions.captions_of(example, field)


def test_cached_vectors_are_the_captions_own(text_model, tmp_path, monkeypatch):
    data = ImageData(options={"variants": 1, "grid": 2, "captions": True}, sizes=(16,))
    given = (text_model, Captions(), data, "test", tmp_path)
    found = image_captions.ensure(*given)
    examples = image_batches.load_examples(data, "test", 16, tmp_path)
    assert found.image_of.tolist() == list(range(len(examples)))
    texts = [example["caption"] for example in examples]
    assert [found.texts[i] for i in found.text_of] == texts
    direct = image_captions.text_vectors(text_model, texts[:3])
    np.testing.assert_array_equal(found.vectors[found.text_of[:3]], direct)
    mean, deviation = image_captions.statistics(found)
    every = found.vectors[found.text_of]
    np.testing.assert_allclose(mean, every.mean(0), atol=1e-6)
    np.testing.assert_allclose(deviation, every.std(0), atol=1e-5)
    monkeypatch.setattr(image_captions, "text_vectors", None)  # whatever is made anew now fails
    again = image_captions.ensure(*given)
    jax.tree.map(np.testing.assert_array_equal, again._replace(texts=()), found._replace(texts=()))
    # Another tokeniser beside the same weights gives other vectors.
    other = tmp_path / "other"
    other.mkdir()
    for path in text_model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"w3"', '"three"'))
    assert image_captions.fingerprint(other) != image_captions.fingerprint(text_model)


# What an image shows follows from its text: there is something to learn from it alone.
RNG = np.random.default_rng(0)
KINDS = RNG.integers(0, 3, size=40).astype(np.int32)
IDS = ((np.arange(16)[None] + 2 * KINDS[:, None]) % 6).astype(np.int32)
VECTORS = (5 + 0.1 * RNG.normal(size=(3, E))).astype(np.float32)  # alike, but for a little
SOURCE = CaptionedTokens(
    TokenImages(IDS, KINDS), TextVectors(VECTORS, ["a", "b", "c"], KINDS, np.arange(40))
)


@functools.cache
def trained(workdir):
    return masked_image.train(
        CONFIG,
        train_batches=image_batches.train_batches([(SOURCE, 8)], seed=1),
        eval_batches=lambda: image_batches.in_order(SOURCE, 8, 40),
        workdir=workdir,
        text_statistics=image_captions.statistics(SOURCE.captions),
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


def test_training_learns_from_texts_and_keeps_their_statistics(result):
    mean, deviation = image_captions.statistics(SOURCE.captions)
    start = masked_image.init_state(CONFIG, (mean, deviation)).params
    for params in (result.state.params, result.state.ema):
        fixed = params["text_norm"]
        np.testing.assert_allclose(fixed["scale"], 1 / deviation, rtol=1e-5)
        np.testing.assert_allclose(fixed["bias"], -mean / deviation, rtol=1e-5)
    null = lambda params: np.asarray(params["null_text"]["embedding"])  # noqa: E731
    assert np.abs(null(result.state.params) - null(start)).max() > 0.01
    # Without its text an image is one of three, and all masks hide which.
    apply = jax.jit(enat.apply, static_argnums=0)
    indices = enat.indices_of(np.ones((3, 16), bool))
    codes = IDS[[int(np.flatnonzero(kind == KINDS)[0]) for kind in range(3)]]

    def nats(condition):
        ids = np.full((3, 16), UNIFORM.mask_id)
        logits = apply(UNIFORM, result.state.ema, ids, condition, indices).logits
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        return -np.take_along_axis(log_probs, codes[..., None], -1).mean()

    assert nats(VECTORS) < nats(enat.null_condition(UNIFORM, 3)) - 0.3


def test_texts_are_dropped_to_the_null_vector_as_labels_are():
    texts = np.ones((20_000, E), np.float32)
    given, seen = masked_image.drop_conditions(CONFIG, texts, jax.random.key(0))
    for found, share in ((given, 0.15), (seen, 0.235)):
        assert set(np.unique(found.sum(1))) == {0, E}  # whole vectors
        assert np.mean(found[:, 0] == 0) == pytest.approx(share, abs=0.01)
    assert (np.asarray(seen)[np.asarray(given)[:, 0] == 0] == 0).all()
    labels = masked_image.drop_conditions(
        dataclasses.replace(CONFIG, model=enat.ENATConfig()),
        np.zeros(20_000, np.int32),
        jax.random.key(0),
    )
    for mine, theirs in zip((given, seen), labels, strict=True):
        np.testing.assert_array_equal(np.asarray(mine)[:, 0] == 0, np.asarray(theirs) == 10)


def test_coco_captions(coco, text_model, tmp_path):
    chosen = image_models.recipe("coco_enat_b", {"data.data_dir": str(coco), "data.sizes": (16,)})
    assert chosen.captions.choice == "every"
    tokenizer = vq.VQConfig(
        channels=3, base_width=4, multipliers=(1, 1, 1), norm_groups=2, codebook_size=6, embed_dim=2
    )
    vq.save(tmp_path / "vq", tokenizer, vq.init(tokenizer, jax.random.key(0)))
    tokens = image_tokens.ensure(tmp_path / "vq", chosen.data, "train", tmp_path)
    assert tokens.labels.tolist() == [-1] * 3
    every = image_captions.ensure(text_model, chosen.captions, chosen.data, "train", tmp_path)
    source = CaptionedTokens(tokens, every)
    assert [every.texts[i] for i in every.text_of] == [
        "w0 w0", "w0 w1", "w1 w0", "w1 w1", "w1 w2", "w2 w0", "w2 w1", "w2 w2", "w2 w3",
    ]  # fmt: skip
    assert [int(i) for i in every.image_of] == [0] * 2 + [1] * 3 + [2] * 4
    np.testing.assert_array_equal(source[4]["ids"], tokens.ids[1])
    expected = image_captions.text_vectors(text_model, ["w1 w2"])[0]
    np.testing.assert_array_equal(source[4]["text"], expected)
    only_first = dataclasses.replace(chosen.captions, choice="first")
    first = image_captions.ensure(text_model, only_first, chosen.data, "train+val", tmp_path)
    assert [first.texts[i] for i in first.text_of] == ["w0 w0", "w1 w0", "w2 w0", "w0 w0", "w1 w0"]

    # The recipe itself, with a tiny network.
    run = RunConfig(num_steps=2, batch_size=4, eval_every=2)
    tiny = dataclasses.replace(
        chosen,
        train=dataclasses.replace(chosen.train, model=UNIFORM, run=run),
        tokenizer=str(tmp_path / "vq"),
        captions=dataclasses.replace(chosen.captions, text_model=str(text_model)),
    )
    config, params = enat.load(image_models.ensure_recipe("tiny", tiny, tmp_path))
    assert config == UNIFORM
    mean = image_captions.statistics(every)[0]
    fixed = params["text_norm"]
    np.testing.assert_allclose(-fixed["bias"] / fixed["scale"], mean, atol=1e-4)
    wide = dataclasses.replace(MODEL, text_dim=E + 1)
    wrong = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, model=wide))
    with pytest.raises(InputError, match=r"train.model.text_dim: 17 must be 16, of"):
        image_models.ensure_recipe("wrong", wrong, tmp_path)


def test_bad_recipes():
    chosen = image_models.recipe("digits_enat_captions")
    with pytest.raises(InputError, match="flip: True"):
        dataclasses.replace(chosen, flip=True)
    with pytest.raises(InputError, match="needs a TextENATConfig"):
        CaptionedImageModel(chosen.data, dataclasses.replace(chosen.train, model=enat.ENATConfig()))
    with pytest.raises(InputError, match=r"captions.choice: 'any' is not known"):
        Captions(choice="any")
    with pytest.raises(InputError, match=r"captions.max_tokens: 0 must be at least 1"):
        Captions(max_tokens=0)
