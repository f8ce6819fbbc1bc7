"""Tokeniser transfer from the command line, as an experiment, and as a notebook, at tiny sizes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    cli,
    run,
    sweep,
    sweep_page,
    tokenizer_transfer,
    transfer_parts,
    transfer_tokenizer,
)
from experiments.configs import zett
from models import byte_level, hf_checkpoint, transformer
from models.errors import InputError
from models.tokenizer import Tokenizer
from tests.models import random_models
from training import hypernetwork_recipes
from training import tokenizers as tokenizer_training

ROOT = Path(__file__).parents[2]
TEXT = "def first(number):\n    return number + first(number - 1)\n\n\nclass Second:\n    pass\n"


def make_base(directory, *, masked: bool = False) -> Path:
    special = (tokenizer_training.END_OF_TEXT,)
    changes = {"vocab_size": 300, "eos_token_ids": (0,), "max_position": 512}
    if masked:
        special = (*special, tokenizer_training.MASK)
        changes |= {
            "family": "llada", "causal": False, "mask_token_id": 1, "tie_embeddings": True,
            "num_kv_heads": 4, "head_dim": 4,
        }  # fmt: skip
    tokenizer = tokenizer_training.train_bpe([TEXT * 3], 300, special)
    model = random_models.BASE.replace(**changes | {"vocab_size": tokenizer.get_vocab_size()})
    hf_checkpoint.save(directory, model, random_models.params(model))
    tokenizer_training.save(tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfer")
    (root / "texts").mkdir()
    for number in range(4):
        (root / "texts" / f"{number}.py").write_text(TEXT.replace("first", f"name_{number}") * 6)
    make_base(root / "base")
    make_base(root / "encoder", masked=True)
    target = tokenizer_training.train_bpe([TEXT * 3 + "größer " * 9], 310)
    tokenizer_training.save(target, root / "target")
    return root


def tiny(places) -> dict:
    """Overrides of the offline preset, so that seconds suffice."""
    files = {"files": str(places / "texts" / "*.py")}
    data = {"dataset": "text_files", "dataset_options": files}
    config = zett.get_config("offline")
    config.base = str(places / "base")
    recipe = config.hypernetwork.recipe
    recipe.update(data)
    recipe.network = {"num_heads": 2, "num_layers": 1, "max_surface": 3}
    recipe.sampler.update(
        batch_size=2, queue_batches=2, characters=120, vocab_mean=300.0, vocab_min=300,
        vocab_max=300, longest_run=1,
    )  # fmt: skip
    recipe.training.update(
        identity_steps=2, identity_tokens=32, steps=2, warmup_steps=1, sequence_length=16,
        eval_batches=1, eval_every=2, checkpoint_every=2, log_every=1,
    )  # fmt: skip
    config.targets = (
        zett.target("new", "directory", str(places / "target")),
        zett.target("bytes", "bytes"),
    )
    config.heuristics = ("random", "lexical", "fvt")
    config.data.update(split="train", windows=4, characters=60, batch_size=4,
                       auxiliary_documents=3, auxiliary_rank=4, **data)  # fmt: skip
    config.n_shot.update(
        target="new", heuristics=(), steps=2, batch_size=2, sequence_length=32, eval_every=2
    )
    config.variant.update(target="new", steps=2, **data)
    config.unigramify.update(target="new", documents=2, max_words=30)
    config.encoder.update(base=str(places / "encoder"), targets=("new",))
    return config


@pytest.mark.slow
def test_the_experiment_measures_every_part(places, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    config = tiny(places)
    found = run.execute(config, tmp_path / "run")
    measured = found["measured"]
    assert set(measured) == set(tokenizer_transfer.MEASUREMENTS)
    rows = measured["targets"]["rows"]
    assert len(rows) == 2 * 5 and all(0 < row["bits_per_byte"] < 40 for row in rows)
    assert {row["arm"] for row in rows} == {
        *config.heuristics,
        "hypernetwork",
        "hypernetwork, copies",
    }
    assert measured["n-shot"]["curves"]["hypernetwork"]["x"] == [0, 2]
    assert len(measured["variant"]["bits_per_byte"]) == 5
    assert 0 < measured["unigramify"]["identical"] <= 1
    assert [row["arm"] for row in measured["encoder"]["rows"]] == ["-", *config.heuristics]
    assert all(isinstance(claim.held, bool) for claim in found["claims"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "tokens per byte" in page and "Zero-shot loss" in page
    # The measure is the naive one: nats of every token after the end-of-text, over bytes.
    base = hypernetwork_recipes.load_base(places / "base", "own")
    texts = ["def größer(x):\n    pass", "x"]
    nats = 0.0
    for text in texts:
        ids = [0, *base.form.encode(text)]
        logits = np.asarray(transformer.apply(base.config, base.params, np.array([ids])).logits[0])
        law = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= sum(law[i, token] for i, token in enumerate(ids[1:]))
    size = sum(len(text.encode()) for text in texts)
    mine = transfer_parts.measure(base, texts, 2)
    assert mine.bits_per_byte == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    assert mine.tokens_per_byte == sum(len(base.form.encode(t)) for t in texts) / size
    # A sweep draws its scores.
    collected = sweep_page.collect([{**found, "name": "one"}, {**found, "name": "two"}])
    sweep_page.write(tmp_path, collected)
    charts = sweep_page.figures(collected)
    assert charts[0]["series"][0]["x"] == ["one", "two"] and (tmp_path / "sweep.png").exists()


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["transfer", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.run_main(transfer_tokenizer.main, transfer_tokenizer.FLAGS)
    out, err = capsys.readouterr()
    return exit.value.code or 0, out, err


def test_the_command_writes_a_checkpoint(places, tmp_path, monkeypatch, capsys):
    base, target = places / "base", places / "target"
    given = ("--checkpoint", base, "--tokenizer", target)
    for arm in (("--heuristic", "fvt"), ("--heuristic", "focus", "--texts", places / "texts/*.py")):
        output = tmp_path / arm[1]
        status, out, err = command(monkeypatch, capsys, *given, *arm, "--output", output)
        assert (status, err) == (0, "")
        told = json.loads(out)
        config, _ = hf_checkpoint.load(output)
        size = byte_level.read(target).get_vocab_size()
        assert told["vocab_size"][1] == config.vocab_size == size
        tokenizer = Tokenizer.from_directory(output, config)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    wrong = {
        ("--heuristic", "fvt"): "--output: missing",
        ("--output", "x"): "give one of them",
        ("--output", "x", "--heuristic", "fv"): "did you mean 'fvt'",
        ("--output", "x", "--hypernetwork", base): "model_type",
    }
    for arguments, message in wrong.items():
        status, _, err = command(monkeypatch, capsys, *given, *arguments)
        assert status == 2 and message in err


def test_the_notebook_runs(places, monkeypatch, capsys):
    """Every cell, on a tiny model and a few files."""
    monkeypatch.setenv("TOKENLOOM_NOTEBOOK_BASE", str(places / "base"))
    notebook = json.loads((ROOT / "notebooks" / "swap_tokenizer.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    setting = 'DATASET, OPTIONS = "stdlib_code", {}'
    assert setting in cells[0]
    files = {"files": str(places / "texts" / "*.py")}
    cells[0] = cells[0].replace(setting, f'DATASET, OPTIONS = "text_files", {files!r}')
    names: dict = {}
    for cell in cells:
        exec(cell, names)
    told = capsys.readouterr().out
    assert set(names["scores"]) == {"own tokeniser", "random", "lexical", "fvt", "focus"}
    assert "no hypernetwork is kept" in told and "model.safetensors" in told
    names["plt"].close("all")


def test_presets_and_the_sweep_describe_recipes_that_exist():
    for preset in zett.PRESETS:
        recipe = transfer_parts.hypernetwork_recipe(zett.get_config(preset))
        assert recipe.training.auxiliary_weight == 0.5
    published = transfer_parts.hypernetwork_recipe(zett.get_config())
    assert published.sampler.vocab_max == 32768 and published.training.steps == 190_000
    configs = sweep.settings(str(ROOT / "experiments/configs/zett.py") + ":offline")
    recipes = {c.name: transfer_parts.hypernetwork_recipe(c) for c in configs}
    assert not recipes["no noise"].sampler.noise
    assert recipes["no identity stage"].training.identity_steps == 0
    assert recipes["no auxiliary loss"].training.auxiliary_weight == 0
    assert recipes["full"].training.steps == recipes["no noise"].training.steps
    config = zett.get_config("offline")
    config.hypernetwork.recipe.sampler.strides = 3
    with pytest.raises(InputError, match="strides"):
        transfer_parts.hypernetwork_recipe(config)
    with pytest.raises(InputError, match="no tokenizer"):
        byte_level.read(ROOT)
