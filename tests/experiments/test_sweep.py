"""Sweeps: settings from a config file, results of each, one page for all."""

import json

import jax
import numpy as np
import pytest

from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict
from experiments import calibration, sweep
from models import hf_checkpoint, sizes, transformer
from models.errors import InputError

CONFIG = """
from experiments.config_parts import comparison, method


def get_config():
    config = comparison("tiny")
    config.models.target = config.models.draft = {checkpoint!r}
    config.data.update(num_prompts=2, prompt_tokens=16)
    config.decode.update(max_new_tokens=8, repeats=1, temperatures=(0.0,))
    config.decode.methods = (method("plain", "autoregressive"),)
    return config


def sweep():
    return [
        {{
            "decode.methods": (
                method("plain", "autoregressive"),
                method("tree", "top_tree", branching=branching),
            ),
            {field!r}: name,
        }}
        for name, branching in (("narrow", "1-1"), ("wide", "2-1"))
    ]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    config = sizes.get("tiny_llama")
    hf_checkpoint.save(directory, config, transformer.init(config, jax.random.key(0)))
    return directory


def write_config(directory, checkpoint, field="name"):
    path = directory / "tiny.py"
    path.write_text(CONFIG.format(checkpoint=str(checkpoint), field=field))
    return str(path)


def test_every_setting_is_run_once_and_shown_together(tmp_path, checkpoint):
    argument = write_config(tmp_path, checkpoint)
    configs = sweep.settings(argument)
    assert [config.name for config in configs] == ["narrow", "wide"]
    found = sweep.execute(configs, tmp_path / "work")
    labels = [(r["setting"], r["label"]) for r in found["runs"]]
    assert labels == [(s, m) for s in ("narrow", "wide") for m in ("plain", "tree")]
    # The draft is the target itself: all of a path is right at temperature 0.
    assert all(r["tokens_per_target_call"] > 2 for r in found["runs"] if r["label"] == "tree")
    work = tmp_path / "work"
    assert json.loads((work / "sweep.json").read_text()) == json.loads(json.dumps(found))
    assert (work / "sweep.html").read_text().count("<svg") == 2
    first = (work / "000" / "results.json").read_text()
    assert sweep.execute(configs, work) == found  # nothing is run again
    assert (work / "000" / "results.json").read_text() == first


def test_mistakes_in_a_sweep_are_named(tmp_path, checkpoint):
    with pytest.raises(InputError, match=r"no field 'decode.tokens' in the config"):
        sweep.settings(write_config(tmp_path, checkpoint, field="decode.tokens"))
    path = tmp_path / "none.py"
    path.write_text("from experiments.config_parts import comparison\nget_config = comparison\n")
    with pytest.raises(InputError, match="has no function sweep"):
        sweep.settings(f"{path}:x")


def test_what_verification_tried_and_what_it_expects():
    """Root with children 1 and 2; node 2 has child 3. The second child is accepted, then 3."""
    q = np.log(np.array([[[0.5, 0.3, 0.2]] * 4]))
    tree = DraftTree(
        tokens=np.array([[0, 0, 1, 2]]),
        parent=np.array([[-1, 0, 0, 2]]),
        depth=np.array([[0, 1, 1, 2]]),
        valid=np.ones((1, 4), bool),
        log_q=q,
        max_depth=2,
        is_chain=False,
    )
    verdict = Verdict(np.array([[0, 2, 3]]), np.array([3]), np.array([[1, 2, 0]]))
    probability, fate, rows = calibration.tested(tree, verdict)
    np.testing.assert_allclose(probability, [0.5, 0.3, 0.2])
    assert fate.tolist() == [False, True, True] and rows.tolist() == [0, 0, 0]
    np.testing.assert_allclose(calibration.expected_tokens(tree), [0.5 + 0.3 + 0.3 * 0.2])
