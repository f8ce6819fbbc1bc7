"""The experiment around HAT: matched work, equal bytes, and a run of it on a few words."""

import pytest

from experiments import cli, hierarchical, sweep
from experiments import hierarchical_parts as parts
from models.errors import InputError
from training import compute, text_models
from training import tokenizers as bpe

CONFIG = "experiments/configs/hat.py"
TEXTS = [f"The {a} of {b} is not the {b} of {a}.\n" * 3 for a in ("map", "Zug") for b in ("cats",)]


def small(tmp_path, **changes):
    config = cli.load_config_file(f"{CONFIG}:offline")
    for field, value in changes.items():
        config[field] = value
    return config


def test_published_settings_and_sweep():
    config = cli.load_config_file(CONFIG)
    assert (config.words.backbone_layers, config.words.backbone_width) == (18, 2304)
    assert (config.words.layers, config.words.width // config.words.head_dim) == (3, 6)
    assert config.tokens.vocab_size == 65_536
    names = [one.name for one in sweep.settings(f"{CONFIG}:offline")]
    assert len(names) == len(set(names)) == 3


def test_work_of_the_baseline_is_that_of_hat(tmp_path):
    config = small(tmp_path)
    bpe.save(bpe.train_bpe(TEXTS, 280), tmp_path)
    setting = parts.Setting(config, tmp_path, {"train": TEXTS}, "", tmp_path, {}, [])
    words = parts.architecture(config, {})
    tokens = parts.matched_tokens(setting, words)
    backend = text_models.tokenizer_of(tmp_path)
    work = [
        compute.per_byte(
            model,
            bytes_per_position=text_models.bytes_per_position(model, backend, TEXTS),
            context_bytes=config.training.row_bytes / 2,
        )
        for model in (words, tokens)
    ]
    assert work[1] == pytest.approx(work[0], rel=0.05)
    assert tokens.vocab_size == backend.get_vocab_size()


def test_bytes_a_position_are_those_of_words_and_tokens(tmp_path):
    words = parts.architecture(small(tmp_path), {})
    backend = bpe.train_bpe(TEXTS, 280)
    size = sum(len(text.encode()) for text in TEXTS)
    found = text_models.bytes_per_position(words, None, ["Hello, world! 3.14"])
    assert found == 18 / 4  # 'Hello,', ' world!', ' 3.', '14'
    tokens = sum(len(backend.encode(text).ids) for text in TEXTS)
    found = text_models.bytes_per_position(words.decoder, backend, TEXTS)
    assert found == size / tokens


def test_a_text_begins_with_the_end_of_another():
    backend = bpe.train_bpe(TEXTS, 280)
    tokenizer = text_models.WithStart(backend)
    ids = tokenizer.encode("cats")
    assert ids[0] == tokenizer.eos_ids[0] == 0
    assert tokenizer.decode(ids) == "cats"


def test_unknown_measurements_are_refused(tmp_path, monkeypatch):
    config = small(tmp_path, measurements=("speed",))
    monkeypatch.setattr(parts, "prepare", lambda config: parts.Setting(config, *[None] * 6))
    with pytest.raises(InputError, match=r"config\.measurements: 'speed' is not known"):
        hierarchical.run(config, tmp_path)
