"""Every registered method compiles for four TPU chips; later ones are tested unasked."""

import math
from typing import Any

import jax
import pytest

from decoding import methods
from decoding.sampling import SamplingConfig
from launch import chips, programs, reports, topologies
from models import sharding, sizes
from models.errors import InputError
from models.hierarchical import HierarchicalConfig
from models.masked_words import ReaderConfig
from models.random_embeddings import LexinvariantConfig
from tests.decoding import tiny
from tests.models import tiny_hierarchical
from tests.training import tiny_words

pytest.importorskip("libtpu")
TOPOLOGY = "v5e:2x2"
_END = {"eos_token_ids": (5,), "pad_token_id": 6}
CAUSAL = sizes.get("tiny_llama").replace(vocab_size=64, **_END)
MASKED = sizes.get("tiny_llada").replace(vocab_size=64, mask_token_id=63, **_END)


def configs_of(spec: methods.MethodSpec, layers: int) -> dict[str, Any]:
    """Tiny architectures of the kind that a method is for."""
    other = {
        HierarchicalConfig: tiny_hierarchical.HAT,
        LexinvariantConfig: tiny.LEXINVARIANT,
        ReaderConfig: tiny_words.config("words", True, "autoregressive"),
    }.get(spec.architecture)
    target = other or (MASKED if spec.bidirectional else CAUSAL).replace(num_layers=layers)
    draft = CAUSAL.replace(num_layers=1)
    return {role: draft if role == "draft" else target for role in spec.roles}


def work_of(name: str) -> programs.Decoding:
    """The least that a method allows, so that little is compiled: few layers, sizes of two."""
    spec = methods.spec(name)
    small = {
        key: max(2, int(option.minimum))
        for key, option in spec.options.items()
        if type(option.default) is int and option.minimum is not None and option.default > 2
    }
    for layers, options in ((2, small), (4, small), (2, {}), (4, {})):
        configs = configs_of(spec, layers)
        work = programs.Decoding(
            name, configs, options, batch_size=4, prompt_length=32, max_new_tokens=8
        )
        try:
            methods.build(name, configs, SamplingConfig(), options)
            programs.param_shapes(work)
        except InputError:
            continue
        return work
    raise AssertionError(f"{name}: none of the tiny models is for it")


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_compiles_for_four_chips_and_its_arrays_are_split(name):
    work = work_of(name)
    shapes = programs.param_shapes(work)
    shape = (2, 2)
    try:
        sharding.tree_shardings(shapes, topologies.make_mesh(TOPOLOGY, *shape))
    except InputError:  # a table of five special words cannot be halved
        assert methods.spec(name).architecture is ReaderConfig
        shape = (4, 1)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    chip = chips.CHIPS["v5e"]
    found = [
        reports.compile_report(lower(), chip)
        for lower in programs.decoding(work, topologies.make_mesh(TOPOLOGY, *shape))
    ]
    assert [report.program for report in found] == ["prefill", "decode"]
    for report in found:
        assert report.fits
        assert report.costs is not None
        assert report.peak >= sum(report.held.values()) - 4096  # arrays that nothing reads
        split = report.held["parameters"] / whole
        assert split == 1 if shape == (4, 1) else split < 0.85
    decode = found[1]
    assert decode.costs.flops > 0
    assert decode.roofline.seconds > 0
    if shape == (2, 2):
        assert any(group == 2 for _, group in decode.costs.collectives)
