"""Trained prompt tokens with the chances of their candidates, from which draft trees are planned.

    directory = prompt_marginals.ensure(PartRecipe("code_target"), PromptTokensConfig())

PPD (arXiv 2405.18628, section 3.3) measures them on a validation set where the target goes on
greedily. A directory of `ensure` holds both, so that `--method_params=DIRECTORY` with
`--method_option marginals=part` decodes with trees of the part's own.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import generation, methods
from decoding.sampling import SamplingConfig
from decoding.speculative.prompt_trees import MARGINALS_FILE
from models import files, hf_checkpoint, prompt_tokens
from models.config import TransformerConfig
from models.errors import InputError
from models.prompt_tokens import PromptTokensConfig
from models.tokenizer import Tokenizer
from training import artifacts, checkpoints, fitting, target_features
from training import prompt_tokens as training
from training.prompt_tokens import Objective
from training.target_features import PartRecipe

# Part of every hash, as `target_features.CODE_VERSION`.
CODE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Validation:
    """Texts on which marginals are measured.

    Attributes:
      prompts: windows of validation documents, a document each; of what has answers, questions.
      prompt_tokens: of a window; questions are whole, of the length that is commonest.
      new_tokens: that the target writes behind each, greedily; behind questions half as many, so
        that most answers have not ended.
      candidates: K, length of a list.
    """

    prompts: int = 32
    prompt_tokens: int = 48
    new_tokens: int = 48
    candidates: int = 10


def greedy_texts(
    model: TransformerConfig, target_params: Any, prompts: list[list[int]], new_tokens: int
) -> np.ndarray:
    """Prompts of one length with what the target writes behind them: int32 [B, P + new_tokens]."""
    method = methods.build("autoregressive", {"target": model}, SamplingConfig())
    stop = generation.stop_config(model, new_tokens, ())
    rows = generation.generate({"target": target_params}, prompts, method, stop)
    return np.asarray([[*row.prompt_ids, *row.token_ids] for row in rows], np.int32)


def places(prompt_tokens: int, length: int, distances: int) -> np.ndarray:
    """Where lists are read: every token that is followed by `distances` + 1 written ones."""
    return np.arange(prompt_tokens - 1, length - distances - 1)


def ranks(logits: jnp.ndarray, truth: jnp.ndarray) -> jnp.ndarray:
    """How many tokens are ahead of the true one: logits [..., V], truth int [...] -> int [...].

    Of equal ones the lower id is ahead, as in a top-K list.
    """
    own = jnp.take_along_axis(logits, truth[..., None], axis=-1)
    ids = jnp.arange(logits.shape[-1])
    return ((logits > own) | ((logits == own) & (ids < truth[..., None]))).sum(axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "model"))
def _ranks_ahead(
    config: PromptTokensConfig,
    model: TransformerConfig,
    params: Any,
    target_params: Any,
    tokens: jnp.ndarray,
    cut: jnp.ndarray,
) -> jnp.ndarray:
    """Rank int [B, C, n] of the token k + 1 behind each cut in what prompt token k says."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch: fitting.DeviceBatch = {
        "tokens": tokens, "positions": index, "segment_ids": jnp.ones_like(tokens)
    }  # fmt: skip
    cuts = jnp.broadcast_to(cut, (len(tokens), len(cut)))
    logits = training.ahead(config, model, params, target_params, batch, cuts)
    further = cut[:, None] + 1 + jnp.arange(1, config.distances + 1)
    return ranks(logits, tokens[:, further])


def measure(
    config: PromptTokensConfig,
    model: TransformerConfig,
    params: Any,
    target_params: Any,
    texts: np.ndarray,
    cut: np.ndarray,
) -> np.ndarray:
    """Ranks int [samples, n] of the true tokens behind places `cut` int [C] of texts [B, T].

    The token right behind a place is the target's own; prompt token k is to say the one k further.
    """
    at_once = 8  # places behind which copies stand in one call
    found = [
        np.asarray(
            _ranks_ahead(
                config, model, params, target_params, jnp.asarray(texts), jnp.asarray(cut[i::step])
            )
        ).reshape(-1, config.distances)
        for step in (-(-len(cut) // at_once),)
        for i in range(step)
    ]
    return np.concatenate(found)


def marginals(rank: np.ndarray, candidates: int) -> np.ndarray:
    """How often each of the first K candidates is the true token: ranks [S, n] -> float [n, K]."""
    return np.stack([(rank == k).mean(axis=0) for k in range(candidates)], axis=1)


def validation_prompts(
    recipe: PartRecipe, validation: Validation, cache: pathlib.Path
) -> tuple[TransformerConfig, Any, list[list[int]]]:
    """The target's config, its parameters, and windows of validation documents.

    Raises:
      InputError: too few documents are so long.
    """
    source = target_features.open_source(recipe, cache)
    model, params = hf_checkpoint.load(source.directory)
    tokenizer = Tokenizer.from_directory(source.directory, model)
    found: list[list[int]] = []
    examples = source.examples["validation"]
    order = np.random.default_rng(0).permutation(len(examples))
    if recipe.loss_on == "response":
        return model, params, _questions(examples, order, tokenizer, validation.prompts)
    for index in order:
        ids = tokenizer.encode(examples[int(index)]["text"])
        if len(ids) > 2 * validation.prompt_tokens:
            found.append(ids[validation.prompt_tokens : 2 * validation.prompt_tokens])
        if len(found) == validation.prompts:
            return model, params, found
    raise InputError(
        f"validation.prompts: {validation.prompts} wanted, {len(found)} documents are longer than "
        f"{2 * validation.prompt_tokens} tokens"
    )


def _questions(
    examples: Sequence[Mapping[str, Any]], order: np.ndarray, tokenizer: Tokenizer, count: int
) -> list[list[int]]:
    """Whole questions of one length, of which there are the most."""
    by_length: dict[int, list[list[int]]] = {}
    for index in order:
        ids = tokenizer.encode(examples[int(index)]["question"])
        by_length.setdefault(len(ids), []).append(ids)
    most = max(by_length.values(), key=len)
    if len(most) < count:
        raise InputError(f"validation.prompts: {count} wanted, {len(most)} are of one length")
    return most[:count]


def ensure(
    recipe: PartRecipe,
    config: PromptTokensConfig,
    objective: Objective | None = None,
    validation: Validation | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """The directory of trained prompt tokens and their marginals, made first if it is not there.

    Args:
      recipe, cache_dir: as `target_features.ensure`.
      config, objective: see `training.prompt_tokens.part`; the published objective by default.
      validation: see `Validation`.

    Raises:
      InputError, SystemExit: as `target_features.ensure`.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    validation = validation or Validation()
    trained = target_features.ensure(
        recipe, training.part(config, objective or Objective()), cache_dir=cache
    )
    identity = {
        "part": artifacts.content_hash(trained),
        "validation": dataclasses.asdict(validation),
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        model, target_params, prompts = validation_prompts(recipe, validation, cache)
        new_tokens = validation.new_tokens // (2 if recipe.loss_on == "response" else 1)
        texts = greedy_texts(model, target_params, prompts, new_tokens)
        cut = places(len(prompts[0]), texts.shape[1], config.distances)
        params = prompt_tokens.load(trained, model)[1]
        rank = measure(config, model, params, target_params, texts, cut)
        with checkpoints.disk_errors("cannot write the marginals", result):
            result.mkdir(parents=True)
            for file in trained.iterdir():
                shutil.copy(file, result / file.name)
            checkpoints.write_json(
                result / MARGINALS_FILE,
                {
                    **identity,
                    "samples": len(rank),
                    "marginals": marginals(rank, validation.candidates).tolist(),
                },
            )

    name = f"prompt_tokens_measured-{artifacts.digest(identity)}"
    return artifacts.cached(cache / "parts" / name, make)


def top_accuracy(rank: np.ndarray, most: int) -> np.ndarray:
    """How often the true token is among the first `most`: ranks [S, n] -> float [n]."""
    return (rank < most).mean(axis=0)
