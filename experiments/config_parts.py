"""Parts that the config files of decoding comparisons share; see `experiments/comparison.py`."""

from typing import Any

from ml_collections import ConfigDict


def comparison(name: str) -> ConfigDict:
    """A comparison on held-out code with the embedded pair, without methods yet."""
    config = ConfigDict()
    config.name = name
    config.experiment = "comparison"
    config.seed = 0

    # A role's model: a named base model (trained on first use), a checkpoint directory in
    # Hugging Face's format, random:SIZE, or a copy that is fine-tuned on first use: `fine_tuned`.
    config.models = ConfigDict({"target": "code_target", "draft": "code_draft"})
    # What methods of `corpus=True` begin with: tri-grams of this split of `data.dataset`, or of
    # another dataset.
    config.corpus = ConfigDict({"dataset": "", "split": "train", "slots": 2**19, "top": 12})
    config.corpus.builder_options = ConfigDict()
    config.corpus.text_field = ""
    # Trained parts by name, for methods that ask for one: see `learned_filter`,
    # `exit_adapter` and `feature_head`.
    config.parts = ConfigDict()

    config.data = ConfigDict()
    config.data.dataset = "stdlib_code"
    config.data.split = "test"
    config.data.num_prompts = 6
    config.data.prompt_tokens = 64
    config.data.builder_options = ConfigDict()

    config.decode = ConfigDict()
    config.decode.temperatures = (0.0, 1.0)
    config.decode.top_k = 0
    config.decode.top_p = 1.0
    config.decode.batch_sizes = (1,)
    config.decode.max_new_tokens = 96
    config.decode.repeats = 2
    # The first method is the baseline of the speed-ups.
    config.decode.methods = ()

    config.lossless = ConfigDict({"samples": 384, "batch_size": 192})
    config.analyses = ()
    config.claims = ()
    return config


# Of a recipe that learns to answer on slot sentences.
SLOT_ANSWERS: dict[str, Any] = {"dataset": "slot_sentences", "loss_on": "response"}


def on_slot_sentences(config: ConfigDict, num_prompts: int) -> None:
    """Has a comparison's methods answer slots of a restaurant with the sentences that say them."""
    config.data.update(
        dataset="slot_sentences", prompt_field="question", answer_field="solution",
        num_prompts=num_prompts,
    )  # fmt: skip
    config.decode.update(max_new_tokens=64, stop_at_eos=True)


def method(
    label: str,
    name: str,
    *,
    hot: bool = False,
    corpus: bool = False,
    role: str = "target",
    part: str = "",
    **options: object,
) -> ConfigDict:
    """An entry of `config.decode.methods`.

    Args:
      label: as reports show it.
      name: of `decoding.methods.METHODS`.
      hot: what the method learns from a prompt serves the next.
      corpus: it begins with the store of `config.corpus`.
      role: which of `config.models` it decodes with as its target.
      part: which of `config.parts` it decodes with.
      options: the method's own.
    """
    return ConfigDict(
        {
            "label": label,
            "method": name,
            "hot": hot,
            "corpus": corpus,
            "role": role,
            "part": part,
            "options": options,
        }
    )


def learned_filter(
    *sources: dict[str, object], new_tokens: int, block_length: int, **training: object
) -> ConfigDict:
    """An entry of `config.parts`: what `training.unmask_filter` trains, on first use.

    Args:
      sources: fields of `training.unmask_filter.Source`, one kind of prompts each.
      new_tokens: of a canvas.
      block_length: of its blocks.
      training: fields of `training.unmask_filter.FilterTraining`.
    """
    return ConfigDict(
        {
            "kind": "filter",
            "sources": sources,
            "new_tokens": new_tokens,
            "block_length": block_length,
            "training": training,
        }
    )


def exit_adapter(exit_layer: int, kind: str = "attention", **recipe: object) -> ConfigDict:
    """An entry of `config.parts`: what `training.exit_adapter` trains, on first use.

    Args:
      exit_layer: l.
      kind: of `models.exit_adapter.KINDS`.
      recipe: fields of `training.target_features.PartRecipe`, `optimizer` as a dict.
    """
    adapter = {"exit_layer": exit_layer, "kind": kind}
    return ConfigDict({"kind": "exit_adapter", "adapter": adapter, **recipe})


def feature_head(
    objective: dict[str, float] | None = None,
    recipe: dict[str, object] | None = None,
    **head: object,
) -> ConfigDict:
    """An entry of `config.parts`: what `training.feature_head` trains, on first use.

    Args:
      objective: fields of `training.feature_head.Objective`.
      recipe: fields of `training.target_features.PartRecipe`, `optimizer` as a dict.
      head: fields of `models.feature_head.FeatureHeadConfig`.
    """
    parts = {"kind": "feature_head", "head": head, "objective": objective or {}}
    return ConfigDict({**parts, **(recipe or {})})


def prompt_tokens(
    objective: dict[str, object] | None = None,
    recipe: dict[str, object] | None = None,
    **prompts: object,
) -> ConfigDict:
    """An entry of `config.parts`: what `training.prompt_marginals` trains, on first use.

    Args:
      objective: fields of `training.prompt_tokens.Objective`.
      recipe: fields of `training.target_features.PartRecipe`, `optimizer` as a dict.
      prompts: fields of `models.prompt_tokens.PromptTokensConfig`.
    """
    parts = {"kind": "prompt_tokens", "prompts": prompts, "objective": objective or {}}
    return ConfigDict({**parts, **(recipe or {})})


def fine_tuned(
    kind: str, start: str, settings: dict[str, object] | None = None, **recipe: object
) -> ConfigDict:
    """An entry of `config.models`: a fine-tuned copy of a model, made on first use.

    Args:
      kind: of `experiments.fine_tuned_models.KINDS`.
      start: the model that it is a copy of: a named base model or a directory.
      settings: of the kind: fields of `training.lexical_units.Units`, of
        `models.layer_skipping.SkipSchedule`, or none.
      recipe: fields of `training.target_features.PartRecipe`, `optimizer` as a dict of
        `training.optimizers.from_fields`.
    """
    return ConfigDict({"kind": kind, "start": start, "settings": settings or {}, **recipe})


def medusa_heads(recipe: dict[str, object] | None = None, **heads: object) -> ConfigDict:
    """An entry of `config.parts`: what `training.medusa_heads` trains, on first use.

    Args:
      recipe: fields of `training.target_features.PartRecipe`, `optimizer` as a dict.
      heads: fields of `models.medusa_heads.MedusaConfig`.
    """
    return ConfigDict({"kind": "medusa_heads", "heads": heads, **(recipe or {})})


def chimera_heads(
    objective: dict[str, object] | None = None,
    recipe: dict[str, object] | None = None,
    **heads: object,
) -> ConfigDict:
    """An entry of `config.parts`: what `training.chimera_heads` trains, on first use.

    Args:
      objective: fields of `training.chimera_heads.Objective`.
      recipe: fields of `training.target_features.PartRecipe`, `optimizer` as a dict.
      heads: fields of `models.chimera_heads.ChimeraConfig`.
    """
    parts = {"kind": "chimera_heads", "heads": heads, "objective": objective or {}}
    return ConfigDict({**parts, **(recipe or {})})


def accelerator(
    objective: dict[str, float] | None = None,
    recipe: dict[str, object] | None = None,
    **accelerator: object,
) -> ConfigDict:
    """An entry of `config.parts`: what `training.accelerated_residual` trains, on first use.

    Args:
      objective: fields of `training.accelerated_residual.Objective`.
      recipe: fields of `training.target_features.PartRecipe`, `optimizer` as a dict.
      accelerator: fields of `models.accelerated_residual.AcceleratorConfig`.
    """
    parts = {"kind": "accelerator", "accelerator": accelerator, "objective": objective or {}}
    return ConfigDict({**parts, **(recipe or {})})


def claim(
    label: str,
    metric: str,
    at_least: float,
    *,
    temperature: float,
    batch_size: int = 1,
    over: str | None = None,
) -> ConfigDict:
    """An entry of `config.claims`: a metric of a method is at least so large.

    Args:
      label: the method's.
      metric: 'speedup', 'tokens_per_target_call', 'agreement', ...
      at_least: the bound.
      temperature: of the run.
      batch_size: of the run.
      over: label of a method whose metric divides it.
    """
    return ConfigDict(
        {
            "label": label,
            "metric": metric,
            "at_least": at_least,
            "temperature": temperature,
            "batch_size": batch_size,
            "over": over or "",
        }
    )
