"""The experiment on readers of words: recipes of every setting, tasks, noise, claims."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import cli, sweep, word_encoding, word_measures, word_recipes
from models import files, masked_words, spaced_words
from models.errors import InputError
from tests.training import tiny_words

CONFIG = "experiments/configs/byte2word.py"


def test_recipes_of_all_settings() -> None:
    for argument in (CONFIG, f"{CONFIG}:offline"):
        config = cli.load_config_file(argument)
        recipes = {role: word_recipes.pretraining(config, role) for role in config.models}
        mine, bert = recipes["byte2word"], recipes["bert"]
        # The baseline has the same text, rows, steps and backbone.
        assert (mine.corpora, mine.rows, mine.run) == (bert.corpora, bert.rows, bert.run)
        assert (mine.layers, mine.width, mine.heads) == (bert.layers, bert.width, bert.heads)
        assert (mine.objective, mine.positions) == (bert.objective, bert.positions)
        if "byte2word A" in recipes:
            assert recipes["byte2word A"].run == mine.run
        assert recipes["causal"].rows.end_of_text and not mine.rows.end_of_text
    settings = sweep.settings(f"{CONFIG}:offline")
    assert len({config.name for config in settings}) == len(settings) >= 6
    recipes = [word_recipes.pretraining(config, "byte2word") for config in settings]
    assert len({str(recipe) for recipe in recipes}) == len(recipes)
    config.models.byte2word.pooling = "mean"
    with pytest.raises(InputError, match=r"config.models: byte2word: .*pooling"):
        word_recipes.pretraining(config, "byte2word")


def test_a_saved_directory_is_continued(tmp_path: Path, run: Any) -> None:
    """Text in, text out, through the program that any checkpoint goes through."""
    made = tiny_words.config("words", causal=True, head="autoregressive")
    masked_words.save(tmp_path, made, masked_words.reader(made).init(jax.random.key(0)))
    tiny_words.pieces().save(tmp_path)
    given = (f"--checkpoint={tmp_path}", "--max_new_tokens=20", "--json")
    prompts = ("the  naïve cat", "東京\n(a)")
    status, out, error = run(
        *given, "--method=byte2word", *(f"--prompt={prompt}" for prompt in prompts)
    )
    assert status == 0, error
    for prompt, line in zip(prompts, out.splitlines(), strict=True):
        row = json.loads(line)
        assert spaced_words.decode(row["prompt_ids"]) == prompt
        assert spaced_words.decode(row["prompt_ids"] + row["token_ids"]) == prompt + row["text"]
        words = spaced_words.words_of(row["token_ids"])
        assert row["stats"]["target_calls"] == len(words)
    status, _, error = run(*given, "--prompt=a")
    assert status == 2 and "models that read words from bytes; allowed: models of tokens" in error


def test_tasks() -> None:
    cache = files.cache_root()
    config = cli.load_config_file(f"{CONFIG}:offline")
    config.tasks.kind.options.locales = ("de", "fr")
    config.tasks.kind.options.held_out = {"Greek": ("el",)}
    kind = word_recipes.task(config, "kind", cache)
    assert set(kind.texts) == {"train", "validation", "test", "Greek"}
    assert dict(zip(kind.texts["Greek"], kind.labels["Greek"], strict=True))["Γερμανία"] == 1
    config.tasks.section.options.packages = ("json", "logging")
    section = word_recipes.task(config, "section", cache)
    assert set(section.labels["train"]) == {0, 1} and section.num_classes == 2
    together = [set(section.texts[split]) for split in ("train", "validation", "test")]
    assert not together[0] & together[2]
    assert len(together[0]) > 2 * len(together[2]) > 0
    assert all(len(text.split()) == 20 for text in together[1])
    config.tasks.kind.options.label = "language"
    with pytest.raises(InputError, match=r"held_out: a language that is not trained on"):
        word_recipes.task(config, "kind", cache)


def test_noise_is_a_texts_own() -> None:
    texts = ["the quick brown fox", "jumped over the dog"] * 3
    found = word_measures.noisy(texts, ("replace", "delete"), 0.3, seed=1)
    assert found[2:4] == word_measures.noisy(texts[:4], ("replace", "delete"), 0.3, seed=1)[2:]
    assert found[0] != found[2] and all(a != b for a, b in zip(found, texts, strict=True))
    assert word_measures.noisy(texts, ("swap",), 0.0, seed=1) == texts


def test_words_that_the_rule_would_make() -> None:
    stream = list(b"".join(spaced_words.split("one (two) three", 16)))
    assert word_measures._as_rule(stream, 17) == 1
    joined = [*stream[:4], *stream[5:]]  # 'one' and '(' in one word, which the rule cuts
    assert word_measures._as_rule(joined, 17) < 1


def results(mine: float, bert: float) -> dict[str, Any]:
    split = lambda accuracy: {"accuracy": accuracy, "commonest": 0.5, "texts": 10}  # noqa: E731
    curve = lambda low: {"rates": [0.0, 0.2, 0.4], "accuracy": [0.8, low, low], "capitals": low}  # noqa: E731
    quality = {"bits_per_byte": 2.0, "exact_match_several": 0.1}
    return {
        "input": {"share_at_bert_base": 0.11},
        "vectors": {"typo": 0.5},
        "pretrained": {"byte2word": quality, "bert": quality, "byte2word A": quality},
        "tasks": {
            "kind": {
                "byte2word": {"test": split(0.9), "Greek": split(mine)},
                "bert": {"test": split(0.9), "Greek": split(bert)},
            }
        },
        "noise": {"kind": {"byte2word": curve(mine), "bert": curve(bert)}},
    }


def test_claims_hold_and_fail() -> None:
    held = {claim.name: claim.held for claim in word_encoding.claims(results(0.7, 0.6))}
    assert all(held.values()) and len(held) == 10
    failed = {claim.name for claim in word_encoding.claims(results(0.5, 0.6)) if not claim.held}
    assert failed == {
        "kind: accuracy on unseen scripts, over the commonest label",
        "kind: accuracy on unseen scripts, over BERT's",
        "kind: relative loss at 20% noise less BERT's",
        "kind: relative loss at 40% noise less BERT's",
        "kind: relative loss in capitals less BERT's",
    }
