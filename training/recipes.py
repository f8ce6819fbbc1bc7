"""Recipes of the named models that `training.base_models` trains and keeps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import TransformerConfig
from models.errors import InputError, check_choice
from training import artifacts
from training.batches import LOSS_ON
from training.datasets import registry
from training.diffusion_rl import Policy
from training.fitting import Distillation, TrainConfig
from training.masked_diffusion import Editing, Objective
from training.optimizers import MuonConfig, OptimizerConfig
from training.tokenizers import END_OF_TEXT, MASK


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The recipe of a named model.

    Attributes:
      dataset: a name of `training.datasets.registry.BUILDERS`, with `train` and `validation`.
      vocab_size: ids that the tokeniser's training may use; the model has those that it did.
      train: the run; `train.model.vocab_size` and the end-of-text id are filled in from the
        tokeniser.
      dataset_options: of the dataset's builder.
      eval_batches: batches of the validation split that an evaluation reads, evenly spaced.
      distilled_from: the named model that `train.distillation` learns from. Its tokeniser is the
        same because dataset and `vocab_size` are.
    """

    dataset: str
    vocab_size: int
    train: TrainConfig
    dataset_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_batches: int = 8
    distilled_from: str | None = None

    def __post_init__(self) -> None:
        check_choice("dataset", self.dataset, registry.BUILDERS)
        if self.eval_batches < 1:
            raise InputError(f"eval_batches: {self.eval_batches} must be at least 1")

    @property
    def parents(self) -> dict[str, str]:
        """Named models that it is made from, by role."""
        return {"target": self.distilled_from} if self.distilled_from else {}

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Of its tokeniser."""
        return (END_OF_TEXT,)


@dataclasses.dataclass(frozen=True)
class AlignedModel(BaseModel):
    """The recipe of a draft that is fine-tuned on its target's answers; see `training.alignment`.

    The dataset has a field `question`; the architecture is the draft's, not `train.model`.

    Attributes:
      draft: the named model that training starts from.
      target: the named model that answers.
      num_prompts: training prompts that it answers.
      max_new_tokens: of an answer.
    """

    draft: str = ""
    target: str = ""
    num_prompts: int = 1000
    max_new_tokens: int = 64

    @property
    def parents(self) -> dict[str, str]:
        return {"draft": self.draft, "target": self.target}


@dataclasses.dataclass(frozen=True)
class AnsweringModel(BaseModel):
    """The recipe of a left-to-right model that a masked diffusion model is compared with.

    Its tokeniser is that one's, mask token included.

    Attributes:
      loss_on: 'response' or 'all', see `training.batches.TokenizedDocuments`.
    """

    loss_on: str = "response"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss_on", self.loss_on, LOSS_ON)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return (END_OF_TEXT, MASK)


@dataclasses.dataclass(frozen=True)
class MaskedDiffusionModel(AnsweringModel):
    """The recipe of a masked diffusion model.

    Rows of 'response' are a prompt, its answer and end-of-text up to `train.sequence_length`; rows
    of 'all' are packed text.

    Attributes:
      objective: see `training.masked_diffusion.Objective`.
      starts_from: the named model that training starts from; None for random parameters. Its
        tokeniser is the same because dataset and `vocab_size` are.
    """

    objective: Objective = dataclasses.field(default_factory=Objective)
    starts_from: str | None = None

    @property
    def parents(self) -> dict[str, str]:
        return {"start": self.starts_from} if self.starts_from else {}


@dataclasses.dataclass(frozen=True)
class ReinforcedModel(MaskedDiffusionModel):
    """The recipe of a masked diffusion model that is rewarded for right answers of its own.

    `starts_from` is the model to improve; the dataset is arithmetic, whose answers can be checked.
    See `training.diffusion_rl`.

    Attributes:
      policy: see `training.diffusion_rl.Policy`; `train.batch_size` counts completions.
      method, method_options: how completions are drawn, see `decoding.methods`.
      temperature: of the draws; above 0, or the completions of a prompt are all the same.
    """

    policy: Policy = dataclasses.field(default_factory=Policy)
    method: str = "llada21"
    method_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.starts_from is None:
            raise InputError("starts_from: None; reinforcement needs a model to improve")
        if not self.temperature > 0:
            raise InputError(f"temperature: {self.temperature} must be above 0")


def _llama(layers: int, width: int, vocab_size: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        mlp_dim=width * 43 // 16,  # about 8/3, as Llama; a multiple of 16
        max_position=1024,
        tie_embeddings=True,
    )


def _recipe(
    dataset: str, vocab_size: int, layers: int, width: int, steps: int, **more: Any
) -> BaseModel:
    distilled_from = more.pop("distilled_from", None)
    train = TrainConfig(
        model=_llama(layers, width, vocab_size),
        optimizer=OptimizerConfig(
            learning_rate=more.pop("learning_rate"), warmup_steps=min(20, steps // 10)
        ),
        num_steps=steps,
        batch_size=more.pop("batch_size", 8),
        sequence_length=256,
        eval_every=40,
        checkpoint_every=50,
        distillation=Distillation(weight=0.5) if distilled_from else None,
    )
    return BaseModel(dataset, vocab_size, train, distilled_from=distilled_from, **more)


def _aligned(
    draft: str, target: str, steps: int, *, learning_rate: float, **more: Any
) -> AlignedModel:
    start = RECIPES[draft]
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup_steps=min(20, steps // 10))
    train = dataclasses.replace(start.train, num_steps=steps, optimizer=optimizer)
    return AlignedModel(start.dataset, start.vocab_size, train, draft=draft, target=target, **more)


# Sums of two numbers of four digits, worked by columns: what small models learn in minutes, with
# masks or without. A sum takes at most 60 tokens.
_SUMS = {"size": 30_000, "levels": (7,)}


# Half-hidden rows show the sums' results in the answer's last line; rows with most of it hidden are
# those that sums are learned from, so these are preferred to LLaDA's even spread.
_ON_SUMS = Objective(mask_ratio=(0.3, 1.0), weighting="mean")


def _with_muon(
    model: TransformerConfig, steps: int, canvas: int, batch_size: int, learning_rate: float
) -> TrainConfig:
    """Muon learns which digits to copy in a fraction of the steps that AdamW takes."""
    return TrainConfig(
        model=model,
        optimizer=MuonConfig(
            learning_rate=learning_rate, warmup_steps=50, weight_decay=0.05, beta2=0.98
        ),
        num_steps=steps,
        batch_size=batch_size,
        sequence_length=canvas,
        eval_every=100,
        checkpoint_every=100,
    )


def _sums(
    steps: int, canvas: int, batch_size: int, learning_rate: float, **more: Any
) -> MaskedDiffusionModel:
    """A masked diffusion model of sums, with an answer in each row."""
    return MaskedDiffusionModel(
        "arithmetic",
        384,
        _with_muon(_llada(4, 128, 384), steps, canvas, batch_size, learning_rate),
        dataset_options=_SUMS,
        objective=more.pop("objective", _ON_SUMS),
        **more,
    )


def _block_sums(editing: Editing | None) -> MaskedDiffusionModel:
    """Block diffusion of sums, the whole canvas as one block at first (LLaDA2.0's decay)."""
    objective = dataclasses.replace(
        _ON_SUMS, block_schedule=((0, 64), (100, 32), (200, 16)), editing=editing
    )
    return _sums(900, 64, 16, 3e-3, objective=objective, starts_from="arithmetic_mdlm_short")


def _wide_sums(editing: Editing | None) -> MaskedDiffusionModel:
    """Sums whose whole canvas is one block."""
    objective = dataclasses.replace(_ON_SUMS, editing=editing)
    return _sums(500, 64, 16, 2e-3, objective=objective, starts_from="arithmetic_mdlm_short")


def _reinforced_wide_sums(start: str) -> ReinforcedModel:
    """Sums in one block, rewarded for right answers in the speedy mode of LLaDA2.1."""
    train = _sums(100, 64, 64, 1e-4).train
    # Above 2e-5 (8e-5 and 2e-4 were tried) the reward falls within ten batches.
    optimizer = OptimizerConfig(learning_rate=2e-5, warmup_steps=10, weight_decay=0.0)
    return ReinforcedModel(
        "arithmetic",
        384,
        dataclasses.replace(train, optimizer=optimizer, eval_every=25, checkpoint_every=25),
        dataset_options=_SUMS,
        starts_from=start,
        policy=Policy(block=None, group_size=8),
        method_options={"mode": "S", "block_length": 64, "max_post_steps": 4},
    )


def _llada(layers: int, width: int, vocab_size: int) -> TransformerConfig:
    return _narrow(_llama(layers, width, vocab_size)).replace(
        family="llada", causal=False, mask_token_id=1
    )


def _narrow(model: TransformerConfig) -> TransformerConfig:
    """With heads 32 wide: more of them, for more places to copy from."""
    heads = model.embed_dim // 32
    return model.replace(num_heads=heads, num_kv_heads=heads, head_dim=32)


def _experts(
    layers: int, width: int, vocab_size: int, experts: int, chosen: int, expert_dim: int
) -> TransformerConfig:
    return _narrow(_llama(layers, width, vocab_size)).replace(
        family="mixtral", num_experts=experts, experts_per_token=chosen, mlp_dim=expert_dim
    )


def _untied(layers: int, width: int, vocab_size: int) -> TransformerConfig:
    return _narrow(_llama(layers, width, vocab_size)).replace(tie_embeddings=False)


RECIPES: dict[str, BaseModel] = {
    # The target's weights are larger than a CPU's cache, as those of any real target are: only then
    # does a call on several tokens cost little more than a call on one.
    "code_target": _recipe("stdlib_code", 1024, 4, 512, 140, learning_rate=8e-4, batch_size=4),
    "code_draft": _recipe(
        "stdlib_code",
        1024,
        1,
        128,
        170,
        learning_rate=4e-3,
        batch_size=4,
        distilled_from="code_target",
    ),
    # For smoke runs: seconds of training, no claim to quality.
    "tiny_target": _recipe("stdlib_code", 512, 4, 128, 8, learning_rate=4e-3),
    "tiny_draft": _recipe(
        "stdlib_code", 512, 1, 64, 8, learning_rate=4e-3, distilled_from="tiny_target"
    ),
    "arithmetic_target": _recipe("arithmetic", 384, 4, 256, 200, learning_rate=2e-3),
    "arithmetic_draft": _recipe(
        "arithmetic", 384, 1, 64, 200, learning_rate=4e-3, distilled_from="arithmetic_target"
    ),
    # Learns sums on a short canvas, where that is quickest, and then the longer one.
    "arithmetic_mdlm_short": _sums(1800, 64, 16, 5e-3),
    "arithmetic_mdlm": _sums(500, 128, 16, 2e-3, starts_from="arithmetic_mdlm_short"),
    # The same model in blocks of 16: from masks alone, with wrong tokens to overwrite, and with the
    # model's own mistakes among them.
    "arithmetic_block_mdlm": _block_sums(None),
    "arithmetic_edit_mdlm": _block_sums(Editing(corruption=0.3)),
    "arithmetic_edit_self": _block_sums(Editing(corruption=0.3, turns=2)),
    # The same in one block, whose 45 tokens are more than a call gets right: editing has work.
    "arithmetic_wide_mdlm": _wide_sums(None),
    "arithmetic_wide_edit": _wide_sums(Editing(corruption=0.3)),
    "arithmetic_wide_self": _wide_sums(Editing(corruption=0.3, turns=2)),
    "arithmetic_wide_rl": _reinforced_wide_sums("arithmetic_wide_edit"),
    "arithmetic_ar": AnsweringModel(
        "arithmetic",
        384,
        _with_muon(_narrow(_llama(4, 128, 384)), 600, 128, 8, 5e-3),
        dataset_options=_SUMS,
    ),
    # Code is learned from a clean past, block by block, and then without one: from scattered masks
    # alone, so short a training finds little more than how often each token occurs.
    "code_mdlm_blocks": MaskedDiffusionModel(
        "stdlib_code",
        1024,
        _with_muon(_llada(4, 192, 1024), 500, 128, 8, 4e-3),
        loss_on="all",
        objective=Objective(
            mask_ratio=(0.3, 1.0),
            weighting="mean",
            block_schedule=((0, 4), (250, 16), (400, 128)),
        ),
    ),
    "code_mdlm": MaskedDiffusionModel(
        "stdlib_code",
        1024,
        _with_muon(_llada(4, 192, 1024), 200, 256, 8, 2e-3),
        loss_on="all",
        objective=Objective(truncated=0.01),
        starts_from="code_mdlm_blocks",
    ),
    # Deep rather than wide, for methods that leave a model half-way or draft with its first layers.
    "code_deep": BaseModel(
        "stdlib_code", 1024, _with_muon(_narrow(_llama(8, 128, 1024)), 800, 256, 8, 4e-3)
    ),
    # As deep, on sentences that say what is meant: for methods that leave out layers.
    "slots_deep": AnsweringModel(
        "slot_sentences", 512, _with_muon(_narrow(_llama(8, 128, 512)), 300, 128, 8, 5e-3)
    ),
    # As deep, of experts, for what depends on which of them a token goes through.
    "code_experts": BaseModel(
        "stdlib_code", 1024, _with_muon(_experts(8, 64, 1024, 16, 2, 96), 400, 128, 8, 5e-3)
    ),
    # Models whose tokeniser is exchanged: small, with tables of their own for input and output; and
    # a bidirectional one with a single table.
    "code_untied": BaseModel(
        "stdlib_code",
        1024,
        _with_muon(_untied(4, 128, 1024), 1200, 256, 8, 4e-3),
    ),
    "code_encoder": MaskedDiffusionModel(
        "stdlib_code",
        1024,
        _with_muon(_llada(4, 128, 1024), 1000, 128, 16, 4e-3),
        loss_on="all",
        objective=Objective(mask_ratio=(0.15, 0.15), weighting="mean"),
    ),
    "numbers_target": _recipe("spelled_numbers", 384, 4, 256, 250, learning_rate=2e-3),
    "numbers_draft": _recipe("spelled_numbers", 384, 2, 64, 600, learning_rate=6e-3),
}
RECIPES["numbers_draft_aligned"] = _aligned(
    "numbers_draft", "numbers_target", 200, learning_rate=2e-3, num_prompts=3000, max_new_tokens=48
)


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> BaseModel:
    """The recipe called `name`, with fields replaced.

    Args:
      name: a key of `RECIPES`.
      overrides: dotted field to value, such as `{'train.num_steps': 20}`; fields of a model that
        it is made from are prefixed with that one's role ('target.') and not read here.

    Raises:
      InputError: an unknown name or field, naming the nearest.
    """
    check_choice("base model", name, RECIPES)
    prefixes = tuple(f"{role}." for role in RECIPES[name].parents)
    own = {
        path: value for path, value in (overrides or {}).items() if not path.startswith(prefixes)
    }
    return artifacts.replace_fields(RECIPES[name], own)
