"""Notebooks, top to bottom, on tiny models."""

import functools
import json
import pathlib

import jax
import pytest

from models import hf_checkpoint, sizes, transformer
from training import tokenizers as bpe

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "def add(a, b): return a + b\nfor x in y: print(x)\nWhat is 1 + 2? 3"
# What makes a notebook small beside its model: text -> what stands for it.
CHANGES = {"unmasking_policies.ipynb": ("size=30_000, levels=(7,)", "size=200, levels=(1,)")}


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train_bpe([TEXT] * 4, 270)


def checkpoint(directory, tokenizer, size, seed=0, extra=0):
    vocab = tokenizer.get_vocab_size() + extra
    changes = {"mask_token_id": vocab - 1} if extra else {}
    config = sizes.get(size).replace(vocab_size=vocab, max_position=128, **changes)
    params = jax.jit(functools.partial(transformer.init, config))(jax.random.key(seed, impl="rbg"))
    hf_checkpoint.save(directory, config, params)
    bpe.save(tokenizer, directory)
    return str(directory)


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": checkpoint(root / "llama", tokenizer, "tiny_llama"),
        "draft": checkpoint(root / "draft", tokenizer, "tiny_llama", seed=1),
        "llada": checkpoint(root / "llada", tokenizer, "tiny_llada", extra=1),
    }


def execute(name, monkeypatch):
    """The names that a notebook's cells leave; cells may not need anything that they do not say."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    text = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
    for cell in (notebook := json.loads(text))["cells"]:
        assert not cell.get("outputs"), "notebooks are kept without outputs"
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            if name in CHANGES:
                source = source.replace(*CHANGES[name])
            exec(compile(source, f"{name}:{cell['id']}", "exec"), names)
    plt.close("all")
    return names


def small(monkeypatch, target, draft=""):
    monkeypatch.setenv("TOKENLOOM_NOTEBOOK_TARGET", target)
    monkeypatch.setenv("TOKENLOOM_NOTEBOOK_DRAFT", draft)
    monkeypatch.setenv("TOKENLOOM_NOTEBOOK_TOKENS", "12")
    monkeypatch.setenv("TOKENLOOM_NOTEBOOK_PROMPTS", "2")


def test_quick_start(places, monkeypatch, capsys):
    small(monkeypatch, places["llama"], places["draft"])
    names = execute("quick_start.ipynb", monkeypatch)
    assert len(names["results"]) == 5
    assert capsys.readouterr().out.count("same text: True") == 5


def test_own_checkpoint(places, monkeypatch, capsys):
    small(monkeypatch, places["llama"])
    names = execute("own_checkpoint.ipynb", monkeypatch)
    assert names["same"] == [True, True]
    assert "token_recycling" in capsys.readouterr().out


def test_new_drafter(places, monkeypatch, capsys):
    small(monkeypatch, places["llama"])
    names = execute("new_drafter.ipynb", monkeypatch)
    assert all(value >= 1 for value in names["tokens_per_call"].values())
    # The notebook's title is a promise.
    cells = json.loads((ROOT / "notebooks/new_drafter.ipynb").read_text())["cells"]
    drafter = next(
        "".join(c["source"]) for c in cells if "def counting_drafter" in "".join(c["source"])
    )
    lines = [line for line in drafter.splitlines() if line.strip()]
    assert len(lines) <= 30
    assert "exact_match" in capsys.readouterr().out


def test_unmasking_policies(places, monkeypatch, capsys):
    small(monkeypatch, places["llada"])
    names = execute("unmasking_policies.ipynb", monkeypatch)
    calls = names["calls"]
    assert calls["two tokens a call"] < calls["one token a call"]
    assert names["trace"]["rounds"] > 0 and "calls a row" in capsys.readouterr().out
