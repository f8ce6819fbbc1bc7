"""What a decoding method needs, from what a command line says: models, mesh, tokeniser, prompts.

A model is named by a Hugging Face directory, or by `random:SIZE` for random weights of a size of
`models.sizes`: the same ones each time (on the same mesh), in the size's own dtype unless another
is given.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tokenizers
from jax.sharding import Mesh

from decoding import methods
from decoding.loop import ModelParams
from models import (
    hf_checkpoint,
    hierarchical,
    masked_words,
    parameter_files,
    random_embeddings,
    sharding,
    sizes,
    transformer,
    word_units,
)
from models.config import DTYPES
from models.errors import InputError, check_choice
from models.hierarchical import HierarchicalConfig
from models.masked_words import ReaderConfig
from models.random_embeddings import LexinvariantConfig
from models.spaced_words import SpacedWordTokenizer
from models.tokenizer import Tokenizer
from models.word_tokenizer import WordTokenizer

RANDOM = "random:"

# A `TransformerConfig`, a `HierarchicalConfig` or a `ReaderConfig`.
Architecture = Any


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      name: its `id` in a file, else its place among all prompts.
      text: as given, chat template applied; None for raw ids.
      ids: token ids.
    """

    name: str
    text: str | None
    ids: list[int]


def parse_mesh(text: str | None) -> Mesh | None:
    """The mesh of `2x4`: 2 parts of the batch by 4 of every model. None for one device.

    Each of several processes has a mesh of its own devices where these are enough; a larger mesh is
    of all processes.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise InputError(f"mesh: {text!r} must be DATAxMODEL, for example 2x4")
    data, model = int(match[1]), int(match[2])
    own = jax.local_devices()
    return sharding.make_mesh(data, model, devices=own if data * model <= len(own) else None)


def load_config(source: str) -> Architecture:
    """The architecture of a directory or of `random:SIZE`; errors as those of either."""
    if source.startswith(RANDOM):
        return sizes.get(source.removeprefix(RANDOM))
    if parameter_files.kind_of(source) == hierarchical.KIND:
        return hierarchical.load_config(source)
    if parameter_files.kind_of(source) == masked_words.KIND:
        return masked_words.load_config(source)
    if parameter_files.kind_of(source) == random_embeddings.KIND:
        return random_embeddings.load_config(source)
    return hf_checkpoint.load_config(source)


def load_configs(
    method: str, sources: Mapping[str, str], options: Mapping[str, Any] | None = None
) -> dict[str, Architecture]:
    """The architectures that a method needs, by role.

    Args:
      method: its name.
      options: the method's own.
      sources: directory or `random:SIZE` by role ('target', 'draft'), the target among them.

    Raises:
      InputError: an unknown method; a role that it needs and lacks, or does not have; anything
        wrong with a config; vocabularies that differ.
    """
    roles = methods.spec(method).roles_with(methods.parse_options(method, options or {}))
    for role in roles:
        if role not in sources:
            raise InputError(f"{role}: method {method} needs a {role} model, and none is given")
    for role in sources:
        if role not in roles:
            raise InputError(
                f"{role}: method {method} has no {role} model; allowed: {', '.join(roles)}"
            )
    return check_vocabularies(sources)


def check_vocabularies(sources: Mapping[str, str]) -> dict[str, Architecture]:
    """The architectures by role; InputError where one has not the target's vocabulary."""
    configs = {role: load_config(source) for role, source in sources.items()}
    for role in sources:
        if role != "target":
            _check_vocabulary(role, sources, configs)
    return configs


def _check_vocabulary(
    role: str, sources: Mapping[str, str], configs: Mapping[str, Architecture]
) -> None:
    """Raises InputError unless a model has its target's tokens, special ones aside."""
    size, target_size = configs[role].vocab_size, configs["target"].vocab_size
    if size != target_size:
        raise InputError(
            f"{role}: {sources[role]} has vocab_size {size}, the target "
            f"{sources['target']} {target_size}; they must be equal"
        )
    files = [Path(sources[name]) / "tokenizer.json" for name in (role, "target")]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    ours, targets = map(_ordinary_tokens, files)
    if different := sorted(i for i in ours.keys() & targets.keys() if ours[i] != targets[i]):
        token = different[0]
        raise InputError(
            f"{role}: token {token} is {ours[token]!r} in {sources[role]} and "
            f"{targets[token]!r} in the target {sources['target']}; they must be equal"
        )


def _ordinary_tokens(file: Path) -> dict[int, str]:
    """Tokens by id, without the added ones, which versions of a model rename."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{file}: corrupt tokenizer ({error})") from error
    return {i: token for token, i in tokenizer.get_vocab(with_added_tokens=False).items()}


def load_model(
    source: str, *, dtype: str | None = None, mesh: Mesh | None = None, seed: int = 0
) -> tuple[Architecture, Any]:
    """A model's architecture and its parameters, on one device or laid out on a mesh.

    Args:
      source: a directory, or `random:SIZE`.
      dtype: a name of `models.config.DTYPES`; default as stored, or as the size says.
      mesh: from `parse_mesh`.
      seed: of random weights.

    Raises:
      InputError: see `models.hf_checkpoint.load`.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    if parameter_files.kind_of(source) == hierarchical.KIND:
        return _load_hierarchical(source, dtype, mesh)
    if parameter_files.kind_of(source) == masked_words.KIND:
        return _load_word_reader(source, dtype, mesh)
    if parameter_files.kind_of(source) == random_embeddings.KIND:
        return _load_lexinvariant(source, dtype, mesh)
    if not source.startswith(RANDOM):
        return hf_checkpoint.load(source, dtype=dtype, mesh=mesh)
    config = sizes.get(source.removeprefix(RANDOM))
    config = config.replace(dtype=dtype or config.dtype)

    def make(key: jax.Array) -> Any:
        params = transformer.init(config, key)
        return jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params)

    layout = None if mesh is None else sharding.param_shardings(config, mesh)
    # The default generator takes XLA four times as long to compile.
    return config, jax.jit(make, out_shardings=layout)(jax.random.key(seed, impl="rbg"))


def _load_hierarchical(
    source: str, dtype: str | None, mesh: Mesh | None
) -> tuple[HierarchicalConfig, Any]:
    config, params = hierarchical.load(source)
    config = config.replace(dtype=dtype or config.backbone.dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(config.backbone.compute_dtype), params)
    if mesh is not None:
        params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    return config, params


def _load_word_reader(
    source: str, dtype: str | None, mesh: Mesh | None
) -> tuple[ReaderConfig, Any]:
    config, params = masked_words.load_writer(source)
    config = config.replace(dtype=dtype or config.backbone.dtype)
    if mesh is not None:
        params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    return config, params


def _load_lexinvariant(
    source: str, dtype: str | None, mesh: Mesh | None
) -> tuple[LexinvariantConfig, Any]:
    config, params = random_embeddings.load(source)
    if mesh is not None:
        params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    return dataclasses.replace(config, dtype=dtype or config.dtype), params


def load_models(
    sources: Mapping[str, str], *, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[dict[str, Architecture], ModelParams]:
    """`load_model` by role; random ones differ even where their sizes are the same."""
    configs: dict[str, Architecture] = {}
    params: ModelParams = {}
    for seed, (role, source) in enumerate(sources.items()):
        configs[role], params[role] = load_model(source, dtype=dtype, mesh=mesh, seed=seed)
    return configs, params


def load_tokenizer(source: str, config: Architecture) -> Any:
    """The `Tokenizer` of a directory, or that of its words; bytes for random weights."""
    if isinstance(config, HierarchicalConfig):
        if (Path(source) / word_units.FILE).is_file():
            return word_units.load(source)
        return WordTokenizer(config)
    if isinstance(config, ReaderConfig):
        return SpacedWordTokenizer(config.encoder.width - 1)
    if source.startswith(RANDOM):
        return Tokenizer(None, config)
    return Tokenizer.from_directory(source, config)


def encode_prompt(
    tokenizer: Tokenizer | WordTokenizer, record: Mapping[str, Any], index: int, chat: bool = False
) -> Prompt:
    """Token ids of a prompt or a conversation.

    Args:
      tokenizer: the target's.
      record: with a text `prompt` or a list `messages` (role, content), and perhaps an `id`.
      index: its place among all prompts.
      chat: whether a text is what a user says in a conversation.

    Raises:
      InputError: an empty prompt; see `Tokenizer.encode` and `apply_chat_template`.
    """
    name = record.get("id", str(index))
    messages = record.get("messages")
    if messages is None and not record["prompt"]:
        raise InputError(f"prompt {index}: '' is empty; at least one character is needed")
    if messages is None and chat:
        messages = [{"role": "user", "content": record["prompt"]}]
    if messages is None:
        return Prompt(name, record["prompt"], tokenizer.encode_prompt(record["prompt"]))
    text = tokenizer.apply_chat_template(messages)
    return Prompt(name, text, tokenizer.encode(text))  # the template has written BOS


def parse_ids(text: str, index: int) -> Prompt:
    """The prompt of raw token ids such as `1,2,3`; raises InputError for anything else."""
    if not text.strip():
        raise InputError(f"prompt_ids: {text!r} is empty; at least one id is needed")
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"prompt_ids: {text!r} must be integers separated by commas, for example 1,2,3"
        ) from None
    return Prompt(str(index), None, ids)


def continuation(
    tokenizer: Tokenizer | WordTokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int]
) -> str:
    """The text that `token_ids` add to a prompt's text.

    Decoded after the prompt, since on their own some tokenisers drop a leading space.
    """
    before = tokenizer.decode(prompt_ids)
    whole = tokenizer.decode([*prompt_ids, *token_ids])
    # A prompt may end within a character, which the first new token completes.
    stem = before if whole.startswith(before) else before.rstrip("\ufffd")
    return whole[len(stem) :] if whole.startswith(stem) else tokenizer.decode(token_ids)
