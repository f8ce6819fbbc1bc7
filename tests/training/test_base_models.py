import json
import threading
from concurrent import futures

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from models import hf_checkpoint, transformer
from models.config import RopeConfig
from models.errors import InputError
from models.tokenizer import Tokenizer
from training import base_models, language_model

TINY = {
    "dataset_options": {"size": 400, "levels": [1]},
    "vocab_size": 280,
    "eval_batches": 2,
    "train.num_steps": 6,
    "train.batch_size": 4,
    "train.sequence_length": 32,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "train.model.num_layers": 2,
    "train.model.embed_dim": 16,
    "train.model.num_heads": 2,
    "train.model.num_kv_heads": 2,
    "train.model.head_dim": 8,
    "train.model.mlp_dim": 32,
    "train.model.max_position": 64,
}
TINY_DRAFT = {
    **TINY,
    "train.model.num_layers": 1,
    **{f"target.{field}": value for field, value in TINY.items()},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def target(cache):
    return base_models.ensure("arithmetic_target", cache_dir=cache, overrides=TINY)


def _no_training(*_, **__):
    raise AssertionError("trained again")


def test_every_recipe_is_one_that_can_be_trained():
    for name, recipe in base_models.RECIPES.items():
        draft_of = recipe.distilled_from
        assert (draft_of is None) == (recipe.train.distillation is None)
        if draft_of:
            assert name == draft_of.replace("target", "draft")
            other = base_models.RECIPES[draft_of]
            assert (recipe.dataset, recipe.vocab_size) == (other.dataset, other.vocab_size)
            assert recipe.train.model.num_params() < other.train.model.num_params() / 4


def test_directory_opens_in_transformers_with_the_same_numbers(target):
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files | {base_models.SUMMARY_FILE} == {path.name for path in target.iterdir()}
    config, params = hf_checkpoint.load(target)
    tokenizer = Tokenizer.from_directory(target, config)
    text = "Question: 7 + 5\n\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert config.vocab_size == tokenizer.vocab_size
    assert config.eos_token_ids == (tokenizer.encode("<|endoftext|>")[0],)

    reference = transformers.AutoModelForCausalLM.from_pretrained(target)
    encoded = transformers.AutoTokenizer.from_pretrained(target)(text, return_tensors="pt")
    assert encoded["input_ids"][0].tolist() == ids
    logits = transformer.apply(config, params, np.array([ids])).logits
    expected = reference(**encoded).logits.detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_summary_tells_the_run(target):
    summary = json.loads((target / base_models.SUMMARY_FILE).read_text())
    assert [point["step"] for point in summary["curve"]] == [1, 2, 3, 4, 5, 6]
    assert summary["curve"][-1]["loss"] < summary["curve"][0]["loss"]
    assert summary["evaluations"][-1]["eval_loss"] == summary["eval_loss"]
    assert 0 < summary["eval_bits_per_byte"] < 10
    assert summary["tokens"] == 6 * 4 * 32
    assert summary["seconds"] > 0
    weights = load_file(target / "model.safetensors")
    assert summary["num_params"] == sum(array.size for array in weights.values())
    assert summary["recipe"]["train"]["num_steps"] == 6
    left = [path.name for path in (target.parent / ".work").rglob("*") if path.is_file()]
    assert left == [".lock"]


def test_trains_once(cache, target, monkeypatch):
    monkeypatch.setattr(language_model, "train", _no_training)
    monkeypatch.setenv("TOKENLOOM_CACHE", str(cache))
    assert base_models.ensure("arithmetic_target", overrides=TINY) == target


def test_everything_that_matters_changes_the_directory(cache, target, monkeypatch):
    class ChosenError(Exception):
        pass

    def stop(final, make):
        raise ChosenError(final.name)

    monkeypatch.setattr(base_models.artifacts, "cached", stop)

    def directory(**changes):
        with pytest.raises(ChosenError) as chosen:
            base_models.ensure("arithmetic_target", cache_dir=cache, overrides={**TINY, **changes})
        return str(chosen.value)

    same = directory()
    assert same == target.name
    changes = [
        {"train.seed": 1},
        {"train.model.rope": RopeConfig(theta=2.0)},
        {"train.optimizer.beta2": 0.99},
        {"vocab_size": 290},
        {"dataset_options": {"size": 401, "levels": [1]}},
        {"dataset": "stdlib_code", "dataset_options": {}},
    ]
    names = [directory(**change) for change in changes]
    monkeypatch.setattr(base_models, "CODE_VERSION", -1)
    assert len({same, directory(), *names}) == len(names) + 2


def test_draft_learns_from_its_target_with_the_same_tokeniser(cache, target):
    draft = base_models.ensure("arithmetic_draft", cache_dir=cache, overrides=TINY_DRAFT)
    assert (draft / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    summary = json.loads((draft / base_models.SUMMARY_FILE).read_text())
    assert summary["target"] == target.name
    assert summary["recipe"]["train"]["distillation"]["weight"] > 0
    assert hf_checkpoint.load_config(draft).num_layers == 1
    assert len(list(target.parent.glob("arithmetic_target-*"))) == 1


def test_training_that_was_killed_goes_on(cache, target, tmp_path, monkeypatch):
    original, seen = language_model.train, []

    def killed(config, *, train_batches, **more):
        class Killed:
            get_state, set_state = train_batches.get_state, train_batches.set_state

            def __next__(self):
                seen.append(1)
                if len(seen) == 6:
                    raise KeyboardInterrupt
                return next(train_batches)

        return original(config, train_batches=Killed(), **more)

    monkeypatch.setattr(language_model, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        base_models.ensure("arithmetic_target", cache_dir=tmp_path, overrides=TINY)
    assert not list((tmp_path / "models").glob("arithmetic*"))
    again = base_models.ensure("arithmetic_target", cache_dir=tmp_path, overrides=TINY)
    assert len(seen) == 8  # five steps, the sixth fails; steps five and six after step four
    assert (again / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


def test_callers_at_the_same_time_train_once(tmp_path):
    calls, entered, release = [], threading.Event(), threading.Event()

    def make(work, result):
        calls.append(1)
        work.mkdir()
        result.mkdir()
        entered.set()
        assert release.wait(60)

    final = tmp_path / "models" / "one"
    with futures.ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(base_models.artifacts.cached, final, make) for _ in range(4)]
        assert entered.wait(60)
        assert not final.exists()
        release.set()
        assert [caller.result(60) for caller in callers] == [final] * 4
    assert calls == [1]
    assert final.is_dir()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("code_targe", {}, "base model: 'code_targe' .*did you mean 'code_target'"),
        ("code_target", {"train.num_step": 3}, "no field 'train.num_step'.*'num_steps'"),
        ("code_target", {"vocab_size.x": 3}, "no field 'vocab_size.x'"),
        ("code_target", {"train.num_steps": 0}, "num_steps: 0 must be at least 1"),
        ("code_target", {"dataset": "stdlib"}, "dataset: 'stdlib' is not known"),
        ("code_target", {"dataset_options": {"size": 3}}, "dataset_options: .*'size'"),
    ],
)
def test_bad_names_and_fields_are_named(tmp_path, name, overrides, message):
    with pytest.raises(InputError, match=message):
        base_models.ensure(name, cache_dir=tmp_path, overrides=overrides)
    assert not (tmp_path / "models").exists()


def test_how_state_lies_on_devices_does_not_make_another_model():
    described = {"recipe": {"train": {"num_steps": 3, "fsdp": True}}, "steps": (1, 2)}
    whole = {"recipe": {"train": {"num_steps": 3, "fsdp": False}}, "steps": [1, 2]}
    older = {"recipe": {"train": {"num_steps": 3}}, "steps": [1, 2]}
    other = {"recipe": {"train": {"num_steps": 4}}, "steps": [1, 2]}
    names = [base_models.artifacts.digest(one) for one in (described, whole, older, other)]
    assert names[0] == names[1] == names[2] != names[3]
