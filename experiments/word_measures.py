"""What is measured of readers of words: noise, scripts, typos, the cost of the input, writing."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding import generation, stopping, word_subwords
from decoding.sampling import SamplingConfig
from models import cross_attention_words as caw
from models import masked_words, spaced_words, word_pieces, words
from models.masked_words import ReaderConfig
from models.word_pieces import WordPieces
from training import text_classifier, text_noise
from training.text_classifier import LabelledRows
from training.word_models import Task


class Classifier(NamedTuple):
    """A fine-tuned reader: its config, parameters without a head, pieces and jitted logits."""

    config: ReaderConfig
    params: Any
    pieces: WordPieces
    logits: Callable[..., jax.Array]


def load_classifier(directory: Path) -> Classifier:
    """Reads what `word_models.ensure_classifier` made."""
    config, params = masked_words.load(directory)
    reader = masked_words.reader(config)
    apply = jax.jit(lambda params, batch: text_classifier.logits(reader, params, batch))
    return Classifier(config, params, word_pieces.load(directory), apply)


def accuracy(
    classifier: Classifier, task: Task, texts: Sequence[str], labels: Sequence[int], batch_size: int
) -> float:
    """Share of texts whose label is the likeliest."""
    rows = LabelledRows(texts, labels, classifier.pieces, task.rows)
    right = 0
    for batch in text_classifier.in_order(rows, batch_size):
        found = np.asarray(classifier.logits(classifier.params, batch)).argmax(axis=1)
        right += int((found == batch["labels"]).sum())
    return right / len(texts)


def noisy(texts: Sequence[str], kinds: Sequence[str], rate: float, seed: int) -> list[str]:
    """Texts with character noise, kinds in turn; a text's noise is its own."""
    return [
        text_noise.perturb(text, kinds[i % len(kinds)], rate, np.random.default_rng((seed, i)))
        for i, text in enumerate(texts)
    ]


def noise_curve(
    classifier: Classifier,
    task: Task,
    *,
    rates: Sequence[float],
    kinds: Sequence[str],
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Accuracy on test texts over rates of noise, and all in capitals."""
    texts, labels = task.texts["test"], task.labels["test"]
    found = [
        accuracy(classifier, task, noisy(texts, kinds, rate, seed), labels, batch_size)
        for rate in rates
    ]
    capitals = noisy(texts, ("upper",), 1.0, seed)
    return {
        "rates": list(rates),
        "accuracy": found,
        "capitals": accuracy(classifier, task, capitals, labels, batch_size),
    }


def by_split(
    classifier: Classifier, task: Task, batch_size: int, limit: int = 0
) -> dict[str, dict[str, float]]:
    """Of every split but those of training: accuracy, the commonest label's share, how many texts,
    and the share of sub-words that are single bytes.

    At most about `limit` texts of a split count, evenly spaced; 0 for all.
    """
    single = classifier.pieces.table[1] == 1
    found = {}
    for split in task.texts:
        if split in ("train", "validation"):
            continue
        every = max(1, len(task.texts[split]) // limit) if limit else 1
        texts, labels = task.texts[split][::every], task.labels[split][::every]
        ids = [
            i
            for text in texts
            for word in spaced_words.split(text, task.rows.width - 1)
            for i in classifier.pieces.encode(word)
        ]
        found[split] = {
            "accuracy": accuracy(classifier, task, texts, labels, batch_size),
            "commonest": float(np.bincount(labels).max() / len(labels)),
            "texts": len(texts),
            "single_bytes": float(single[ids].mean()),
        }
    return found


def typo_distances(
    config: ReaderConfig, params: Any, text: Sequence[str], seed: int, count: int = 2000
) -> dict[str, float]:
    """Mean distances between vectors of words, over that of two different words at random.

    Returns:
      `typo`: a word and itself with one letter replaced, left out, added or swapped with its
      neighbour; `reversed`: a word and its letters in reverse order.
    """
    width = config.encoder.width
    seen = dict.fromkeys(
        word
        for line in text
        for word in spaced_words.split(line, width - 1)
        if 5 <= len(word) < width and word[1:].isalpha()
    )
    rng = np.random.default_rng(seed)
    chosen = [list(seen)[i] for i in rng.permutation(len(seen))[:count]]
    rate = {word: 1 / (len(word) - 1) for word in chosen}
    kinds = ("replace", "delete", "insert", "swap")

    def typo(word: bytes, kind: str) -> bytes:
        # A swap is of two letters, a rate that rounds to one pair.
        share = min(1.0, rate[word] * (2 if kind == "swap" else 1))
        changed = text_noise.perturb(word[1:].decode(), kind, share, rng)
        return word[:1] + changed.encode()[: width - 1]

    wrong = [typo(word, kinds[i % len(kinds)]) for i, word in enumerate(chosen)]
    backwards = [word[:1] + word[:0:-1] for word in chosen]
    encode = jax.jit(lambda symbols, sizes: caw.encode(config.model, params, symbols, sizes))
    vectors, wrongs, reverses = (
        np.asarray(encode(*words.pack(some, width))) for some in (chosen, wrong, backwards)
    )
    other = vectors[rng.permutation(len(vectors))]
    scale = np.linalg.norm(vectors - other, axis=1).mean()
    changed = np.array([a != b for a, b in zip(chosen, wrong, strict=True)])
    palindrome = np.array([a == b for a, b in zip(chosen, backwards, strict=True)])
    return {
        "typo": float(np.linalg.norm(vectors - wrongs, axis=1)[changed].mean() / scale),
        "reversed": float(np.linalg.norm(vectors - reverses, axis=1)[~palindrome].mean() / scale),
        "words": len(chosen),
    }


def input_speed(
    config: ReaderConfig, params: Any, text: Sequence[str], repeats: int, batch: int = 1024
) -> dict[str, float]:
    """Words a second through the word encoder, a table of as many rows, and a cache of words."""
    width = config.encoder.width
    found = [word for line in text for word in spaced_words.split(line, width - 1)]
    batch = min(batch, len(found))
    found = found[: len(found) // batch * batch]
    symbols, sizes = words.pack(found, width)
    table = jnp.zeros((30_522, config.backbone.embed_dim))
    ids = np.arange(len(found)) * 7919 % len(table)
    encode = jax.jit(lambda symbols, sizes: caw.encode(config.model, params, symbols, sizes))
    look_up = jax.jit(lambda ids: table[ids])
    cache = caw.WordCache(config.model, params, capacity=10_000)
    runs: dict[str, Callable[[int], Any]] = {
        "encoder": lambda at: encode(symbols[at : at + batch], sizes[at : at + batch]),
        "table": lambda at: look_up(ids[at : at + batch]),
        "cache": lambda at: cache(found[at : at + batch]),
    }
    speeds = {}
    for name, run in runs.items():
        seconds = []
        for _ in range(repeats + 1):  # the first compiles, and fills the cache
            begin = time.perf_counter()
            for at in range(0, len(found), batch):
                jax.block_until_ready(run(at))
            seconds.append(time.perf_counter() - begin)
        speeds[name] = len(found) / float(np.median(seconds[1:]))
    return {**speeds, "cache_hits": cache.hits / (cache.hits + cache.misses)}


def writing(
    directory: Path,
    text: Sequence[str],
    *,
    count: int,
    prompt_words: int,
    max_bytes: int,
    seed: int,
) -> dict[str, Any]:
    """Texts continued by a causal model of words, greedily and at temperature 0.8.

    Returns:
      For each temperature: backbone steps a word (prompt's last word and end of text included),
      `as_rule`, the share of written words that the splitting rule makes of the text too; words a
      second; and samples.
    """
    config, params = masked_words.load_writer(directory)
    width = config.encoder.width
    tokenizer = spaced_words.SpacedWordTokenizer(width - 1)
    starts = [spaced_words.split(line, width - 1)[:prompt_words] for line in text]
    prompts = [list(b"".join(start)) for start in starts if len(start) == prompt_words][:count]
    stop = stopping.StopConfig(max_bytes, config.eos_token_ids, config.max_position)
    found = {}
    for temperature in (0.0, 0.8):
        method = word_subwords.word_by_word(config, SamplingConfig(temperature=temperature))
        run = functools.partial(
            generation.generate, {"target": params}, prompts, method, stop, seed=seed
        )
        run()  # compiles
        begin = time.perf_counter()
        rows = run()
        seconds = time.perf_counter() - begin
        total = generation.total_stats(rows)
        ended = sum(row.finish_reason == "eos" for row in rows)
        found[f"{temperature:g}"] = {
            "backbone_steps_per_word": total["target_calls"] / (total["words"] + ended),
            "bytes_per_backbone_step": total["tokens_per_target_call"],
            "as_rule": float(np.mean([_as_rule(row.token_ids, width) for row in rows])),
            "words_per_second": total["words"] / seconds,
            "samples": [
                {
                    "prompt": tokenizer.decode(row.prompt_ids),
                    "text": tokenizer.decode(row.token_ids),
                }
                for row in rows
            ],
        }
    return found


def _as_rule(stream: Sequence[int], width: int) -> float:
    """Share of a stream's words, the cut last one aside, that are the rule's of its text."""
    mine = spaced_words.words_of([i for i in stream if i != spaced_words.END_OF_TEXT])[:-1]
    theirs = spaced_words.split(spaced_words.join(mine), width - 1)
    ends = lambda some: set(np.cumsum([len(word) for word in some]).tolist())  # noqa: E731
    return len(ends(mine) & ends(theirs)) / max(len(mine), len(theirs), 1)


def input_params(config: ReaderConfig, params: Any) -> Mapping[str, int]:
    """Parameters at the input, of the backbone without its input, and of all."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    inputs = masked_words.num_input_params(config, params)
    backbone = sum(leaf.size for leaf in jax.tree.leaves(params["backbone"]))
    backbone -= params["backbone"]["embedder"]["embedding"].size
    return {"input": inputs, "backbone": int(backbone), "all": total}
