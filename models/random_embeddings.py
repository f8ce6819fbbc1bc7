"""Lexinvariant Transformers: a fresh Gaussian vector for every vocabulary item and sequence.

Huang et al., 'Lexinvariant Language Models', arXiv 2305.16349. There is no token table among the
parameters: a sequence's table E [V, D] has independent standard normal entries, is read at the
input and again at the output (section 3), and belongs to the sequence as long as it lasts. The same
network with a learned table is the paper's standard model.

The paper leaves the scale of the read-out open. Here logits are h . E_v * c / sqrt(D) with a
learned scalar c. At the start h is little else than the current token's own vector, whose logit is
then c sqrt(D): with c = 1 the first loss is far above ln V, so that c begins at 0.3.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from models import parameter_files, transformer
from models.config import RelativeBiasConfig, RopeConfig
from models.errors import InputError, check_choice
from models.transformer import Output, Params

KIND = "lexinvariant"
TABLES = ("gaussian", "learned")
_FIRST_SCALE = 0.3  # of the logits


@dataclasses.dataclass(frozen=True)
class LexinvariantConfig(RelativeBiasConfig):
    """A Transformer that is given its token table from outside.

    Attributes:
      table: 'gaussian' for one that is drawn anew for every sequence, 'learned' for the standard
        model's.
      fixed_ids: tokens whose vectors are learned all the same, such as end of text; with a learned
        table those of all tokens are.
    """

    family: str = KIND
    tie_embeddings: bool = True
    table: str = "gaussian"
    fixed_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("table", self.table, TABLES)
        if not self.causal:
            raise InputError("causal: False; a lexinvariant model is left to right")
        if not self.tie_embeddings:
            raise InputError("tie_embeddings: False; one table serves input and output")
        if list(self.fixed_ids) != sorted(set(self.fixed_ids)):
            raise InputError(f"fixed_ids: {self.fixed_ids} must be different and in order")
        for token in self.fixed_ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"fixed_ids: {token} is out of range; vocab_size is {self.vocab_size}"
                )

    @property
    def learned_ids(self) -> tuple[int, ...]:
        """Tokens whose vectors are parameters."""
        return tuple(range(self.vocab_size)) if self.table == "learned" else self.fixed_ids

    @property
    def free_ids(self) -> tuple[int, ...]:
        """Tokens that a cipher may exchange: all but `fixed_ids`."""
        return tuple(i for i in range(self.vocab_size) if i not in set(self.fixed_ids))

    def num_params(self) -> int:
        tables = self.vocab_size - len(self.learned_ids)
        return super().num_params() - tables * self.embed_dim + 2 * self.embed_dim + 1


@functools.partial(jax.jit, static_argnames="config")
def init(config: LexinvariantConfig, key: jax.Array) -> Params:
    """Random float32 parameters: a Transformer's without its embedder, and

      input: scale and bias [D] of what is read from the table.
      readout: scale [1] of the logits.
      fixed: embedding [F, D] of `config.learned_ids`, where there are any.

    So no parameter has an axis as long as the vocabulary, unless its table is learned.
    """
    body_key, table_key = jax.random.split(key)
    # A vocabulary of one token for the embedder, which is thrown away.
    alone = config.replace(vocab_size=1, fixed_ids=(), table="gaussian")
    params = dict(transformer.init(alone, body_key))
    del params["embedder"]
    D = config.embed_dim
    params["input"] = {"scale": jnp.ones((D,)), "bias": jnp.zeros((D,))}
    params["readout"] = {"scale": jnp.full((1,), _FIRST_SCALE)}
    if config.learned_ids:
        table = jax.random.normal(table_key, (len(config.learned_ids), D))
        params["fixed"] = {"embedding": table}
    return params


def param_shapes(config: LexinvariantConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without allocating anything."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def draw(config: LexinvariantConfig, params: Params, keys: jax.Array) -> jnp.ndarray:
    """The tables of sequences: float32 [B, V, D], or [V, D] where one learned table serves all.

    Args:
      config: the architecture.
      params: give the vectors of `learned_ids`.
      keys: one a sequence [B], never that of another one or of another step.
    """
    if config.table == "learned":
        return params["fixed"]["embedding"]
    shape = (config.vocab_size, config.embed_dim)
    tables = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    if config.fixed_ids:
        tables = tables.at[:, jnp.array(config.fixed_ids)].set(params["fixed"]["embedding"])
    return tables


def encode(
    config: LexinvariantConfig, params: Params, table: jnp.ndarray, tokens: jnp.ndarray
) -> jnp.ndarray:
    """Inputs of the first layer [B, T, D]: the tokens' vectors, scaled and shifted (appendix B).

    Args:
      config, params: the model.
      table: as `draw` returns.
      tokens: int [B, T].
    """
    if table.ndim == 2:
        vectors = table[tokens]
    else:
        # Random vectors have no gradient; that of fixed ones is a product rather than a scatter.
        vectors = jax.vmap(lambda one, ids: one[ids])(jax.lax.stop_gradient(table), tokens)
        if config.fixed_ids:
            fixed = tokens[:, :, None] == jnp.array(config.fixed_ids)
            learned = fixed.astype(vectors.dtype) @ params["fixed"]["embedding"]
            vectors = jnp.where(fixed.any(axis=-1, keepdims=True), learned, vectors)
    vectors = vectors * params["input"]["scale"] + params["input"]["bias"]
    return vectors.astype(config.compute_dtype)


def logits(
    config: LexinvariantConfig, params: Params, table: jnp.ndarray, hidden: jnp.ndarray
) -> jnp.ndarray:
    """Float32 [B, T, V]: what hidden states [B, T, D] after the final norm say of each token."""
    form = "btd,vd->btv" if table.ndim == 2 else "btd,bvd->btv"
    products = jnp.einsum(
        form, hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return products * (params["readout"]["scale"] * config.embed_dim**-0.5)


def apply(
    config: LexinvariantConfig,
    params: Params,
    table: jnp.ndarray,
    tokens: jnp.ndarray,
    *,
    with_logits: bool = True,
    **options: Any,
) -> Output:
    """`transformer.apply` on tokens int [B, T] under a table of `draw`, options as there."""
    inputs = encode(config, params, table, tokens)
    output = transformer.apply(config, params, inputs, with_logits=False, **options)
    if with_logits:
        output = output.replace(logits=logits(config, params, table, output.hidden))
    return output


def save(directory: str | os.PathLike[str], config: LexinvariantConfig, params: Params) -> None:
    """Writes a model; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: str | os.PathLike[str]) -> tuple[LexinvariantConfig, Params]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""
    return parameter_files.load(directory, KIND, _from_json, param_shapes)


def _from_json(**fields: Any) -> LexinvariantConfig:
    """A config from what JSON made of it."""
    fields = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    for name in ("rope", "local_rope"):
        if isinstance(fields.get(name), dict):
            fields[name] = RopeConfig(**fields[name])
    return LexinvariantConfig(**fields)


def load_config(directory: str | os.PathLike[str]) -> LexinvariantConfig:
    """The architecture of a directory of `save`; errors as `parameter_files.load_config`."""
    return parameter_files.load_config(directory, KIND, _from_json)
