"""The compile check: what it counts, what it takes for granted, and what it says of bad input."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import cli
from launch import (
    chips,
    compile_check,
    hlo_costs,
    hlo_text,
    mesh_search,
    programs,
    reports,
    topologies,
)
from launch.hlo_costs import Collective, Costs
from launch.programs import Decoding, Lowered
from models import sizes
from models.errors import InputError
from training.fitting import TrainConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
CHIP = chips.CHIPS["v5e"]
TINY = sizes.get("tiny_llama")
WORK = Decoding("autoregressive", {"target": TINY}, batch_size=4, prompt_length=32,
                max_new_tokens=32)  # fmt: skip


def run(*flags: str) -> None:
    compile_check.main(cli._parse_flags(compile_check.FLAGS, compile_check.main, ["x", *flags]))


def lowered(function, *shapes, spec=None):
    """A program over bfloat16 arrays of the given shapes, split as `spec` on v5e:2x2."""
    mesh = topologies.make_mesh("v5e:2x2", 2, 2)
    specs = spec or [P()] * len(shapes)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, one))
        for shape, one in zip(shapes, specs, strict=True)
    ]
    return Lowered("call", jax.jit(function).lower(*arrays), {"parameters": 0})


@needs_libtpu
def test_products_are_counted_as_the_compiler_does_and_loops_by_their_steps():
    def once(x, w):
        return jnp.tanh(x @ w)

    def eight(x, w):
        return jax.lax.fori_loop(0, 8, lambda _, x: once(x, w), x)

    shapes = ((64, 512), (512, 512))
    single, looped = (reports.compile_report(lowered(one, *shapes), CHIP) for one in (once, eight))
    product = 2 * 64 * 512 * 512
    assert single.costs.flops == product
    assert looped.costs.flops == 8 * product
    for report in (single, looped):  # the compiler counts a body once, and tanh and the counter
        assert report.compiler_flops == pytest.approx(product, rel=0.02)
    assert looped.costs.open_loops == 0


@needs_libtpu
def test_a_split_contraction_is_one_all_reduce_of_its_result():
    spec = [P("data", "model"), P("model", None)]
    report = reports.compile_report(lowered(jnp.matmul, (64, 512), (512, 256), spec=spec), CHIP)
    ((key, found),) = report.costs.collectives.items()
    assert key == ("all-reduce", 2)
    assert found.count == 1
    assert found.payload in (32 * 256 * 2, 32 * 256 * 4)  # bfloat16 or float32 sums
    assert found.sent == found.payload  # 2 (n - 1) / n for n = 2


@needs_libtpu
def test_what_does_not_fit_is_told_from_the_compilers_own_message():
    big = (10, 2**30)  # 20 GiB
    report = reports.compile_report(lowered(lambda x: x + 1, big), CHIP)
    assert not report.fits
    assert report.costs is None
    assert report.peak > 2 * 10 * 2**30 > report.limit > 15e9
    assert "NO" in reports.table([report])


@needs_libtpu
def test_rows_on_different_devices_do_the_same_work_wherever_they_are():
    """What `mesh_search.Decoder` takes for granted."""
    found = []
    for topology, shape, rows in (("v5e:2x2", (2, 2), 4), ("v5e:2x4", (4, 2), 8)):
        work = dataclasses.replace(WORK, batch_size=rows)
        decode = programs.decoding(work, topologies.make_mesh(topology, *shape))[1]()
        found.append(reports.compile_report(decode, CHIP))
    assert found[0].costs.flops == found[1].costs.flops > 0
    assert found[0].held == found[1].held
    assert found[0].temporary == found[1].temporary
    large = [
        {key: one for key, one in report.costs.collectives.items() if key[1] == 2}
        for report in found
    ]
    assert large[0] == large[1] != {}


@needs_libtpu
def test_few_layers_tell_of_many():
    deep = dataclasses.replace(WORK, configs={"target": TINY.replace(num_layers=6)}, batch_size=8)
    mesh = topologies.make_mesh("v5e:2x2", 2, 2)
    whole = reports.compile_report(programs.decoding(deep, mesh)[1](), CHIP)
    guess = mesh_search.Decoder(deep, CHIP).report(model=2, rows=4)
    assert guess.held == pytest.approx(whole.held)
    assert guess.costs.flops == pytest.approx(whole.costs.flops, rel=1e-6)
    key = ("all-reduce", 2)
    assert guess.costs.collectives[key].count == pytest.approx(
        whole.costs.collectives[key].count, abs=1
    )


@needs_libtpu
def test_the_training_step_holds_two_moments_and_reduces_gradients_over_rows():
    config = TrainConfig(TINY, batch_size=4, sequence_length=16, remat=True, mesh=(4, 1))
    report = reports.compile_report(
        programs.training(config, topologies.make_mesh("v5e:2x2", 4, 1))(), CHIP
    )
    assert report.held["parameters"] == 4 * TINY.num_params()
    assert report.held["optimiser"] == pytest.approx(2 * report.held["parameters"], rel=1e-3)
    payload = sum(
        one.payload for (kind, group), one in report.costs.collectives.items()
        if kind in ("all-reduce", "reduce-scatter") and group == 4
    )  # fmt: skip
    assert payload >= report.held["parameters"]
    tokens, backward = 16, 3 + 1  # of a device; forward again, and two products for each
    dense = 2 * tokens * (TINY.num_params() - TINY.vocab_size * TINY.embed_dim)
    assert 3 * dense < report.costs.flops < 1.5 * backward * dense


@needs_libtpu
def test_split_state_is_gathered_for_both_passes_and_activations_stay():
    config = TrainConfig(TINY, batch_size=4, sequence_length=16, remat=True, mesh=(4, 1), fsdp=True)
    report = reports.compile_report(
        programs.training(config, topologies.make_mesh("v5e:2x2", 4, 1))(), CHIP
    )
    whole = 4 * TINY.num_params()
    assert report.held["parameters"] == pytest.approx(whole / 4, rel=0.02)  # norms stay whole
    assert report.held["optimiser"] == pytest.approx(whole / 2, rel=0.02)
    sent = {
        kind: sum(one.payload for (found, _), one in report.costs.collectives.items()
                  if found == kind)
        for kind in ("all-gather", "all-to-all", "collective-permute")
    }  # fmt: skip
    blocks = TINY.num_params() - 2 * TINY.vocab_size * TINY.embed_dim
    assert sent["all-gather"] + sent["collective-permute"] >= 2 * 2 * blocks  # twice, as bfloat16
    assert sent["all-to-all"] <= 4 * 16 * TINY.embed_dim  # a device's rows of embeddings, once


@needs_libtpu
@pytest.mark.parametrize("flag", ["--search", "--curve"])
def test_a_search_names_what_fits_best_and_is_written_whole(flag, tmp_path, capsys):
    run("--model=tiny_llama", "--topology=v5e:2x2", "--programs=decode", "--batch_sizes=2,4",
        "--prompt_length=32", "--max_new_tokens=32", flag, f"--workdir={tmp_path}")  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("**") >= 2
    assert "2 rows do not divide over 4" in out
    record = json.loads((tmp_path / compile_check.FILE).read_text())
    found = record["searches"]["autoregressive, v5e"]["candidates"]
    assert {one["chips"] for one in found} == ({1, 4} if flag == "--curve" else {4})
    assert {(one["data"], one["model"]) for one in found if one["chips"] == 4} == {(4, 1), (2, 2)}
    chart = tmp_path / compile_check.CHART
    assert chart.exists() is (flag == "--curve")
    run(f"--merge={tmp_path},{tmp_path}", f"--workdir={tmp_path / 'merged'}")
    _, table = capsys.readouterr().out.split("tiny_llama, autoregressive\n\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]
    assert lines[0][:4] == ["chips", "data x model", "rows of a part", "v5e: peak"]
    meshes = [tuple(line[:3]) for line in lines[2:] if line]
    assert len(meshes) == len(set(meshes)) == len(found)  # both directories have the same
    for count in {one["chips"] for one in found}:
        mine = [line[-1] for line in lines[2:] if line and line[0] == str(count)]
        assert sum(cell.startswith("**") for cell in mine) == 1
    assert (tmp_path / "merged" / compile_check.CHART).stat().st_size > 10_000


@needs_libtpu
def test_a_config_names_the_methods_and_json_has_them(capsys):
    run("--config=experiments/configs/quickstart.py", "--model=tiny_llama", "--draft=tiny_llama",
        "--topology=v5e:2x2", "--programs=decode", "--batch_size=2", "--json")  # fmt: skip
    record = json.loads(capsys.readouterr().out)
    labels = [one["label"] for one in record["programs"]]
    assert len(labels) == len(set(labels)) >= 3
    assert record["mesh"] == [2, 2]
    for one in record["programs"]:
        assert one["roofline"]["seconds"] > 0
        assert one["costs"]["collectives"]


HLO = """HloModule m

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%p), index=1
  %all-gather.1 = bf16[32,128]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %vmem = bf16[8,128]{1,0:T(8,128)S(1)} copy(%x)
  ROOT %t = (s32[], bf16[8,128]) tuple(%x, %x)
}

%condition (q: (s32[], bf16[8,128])) -> pred[] {
  %q = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[8,128]{1,0}) tuple(%zero, %a)
  %w = (s32[], bf16[8,128]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %r = bf16[8,128]{1,0} get-tuple-element(%w), index=1
}
"""


def test_costs_of_a_module_that_can_be_counted_by_hand():
    costs = hlo_costs.Program(HLO).total()
    whole = 32 * 128 * 2
    assert dict(costs.collectives) == {
        ("all-gather", 4): Collective(5, 5 * whole, 5 * whole * 3 / 4)
    }
    # Five times: the gather reads 2 KiB and writes 8, the copy to vector memory reads 2.
    assert costs.hbm_bytes == 5 * (2048 + 8192 + 2048)
    endless = HLO.replace("direction=LT", "direction=NE")
    program = hlo_costs.Program(endless)
    assert program.total().open_loops == 1
    assert program.main_loop().hbm_bytes == 2048 + 8192 + 2048
    with pytest.raises(ValueError, match="no entry"):
        hlo_text.parse("nothing")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=8] {'b'}, use", 8),
        ("replica_groups=mesh['a'=2,'b'=3,'c'=4] {'a','c'}", 8),
        ("source_target_pairs={{0,1},{1,0}}", 2),
        ("dimensions={0}", 1),
    ],
)
def test_every_way_to_write_a_group(text, size):
    assert hlo_text.group_size(text) == size


def test_windows_count_what_meets_an_element_only():
    # A batch axis written as a window: of 6 x 6 pairs one in each place meets the input.
    (window,) = hlo_text.windows("window={size=6 pad=5_5 rhs_reversal=1}, dim", 1)
    assert hlo_text.hits(window, 1, 6) == 6
    (window,) = hlo_text.windows("window={size=16 stride=15 lhs_dilate=16}", 1)
    naive = sum(
        (15 * out + place) % 16 == 0 and (15 * out + place) // 16 < 16
        for out in range(16) for place in range(16)
    )  # fmt: skip
    assert hlo_text.hits(window, 16, 16) == naive == 16


def test_a_roofline_is_its_longest_part_and_small_collectives_take_their_hops():
    line = chips.roofline(CHIP, 197e12, 2 * 819e9, 0.5)
    assert (line.compute, line.memory, line.bound) == (1, 2, "memory")
    assert (line.seconds, line.serial_seconds) == (2, 2.5)
    small, large = Collective(10, 10, 10), Collective(1, 8e9, 8e9)
    costs = Costs(collectives={("all-gather", 4): small, ("all-gather", 16): large})
    assert reports.network_seconds(costs, CHIP) == pytest.approx(10 * 2e-6 + 8e9 / 400e9)
    assert reports.network_seconds(Costs(collectives={("all-reduce", 1): small}), CHIP) == 0


def test_every_slice_has_a_size_of_its_own_and_the_chart_has_all_of_them():
    for chip in chips.CHIPS.values():
        counts = [int(np.prod([int(n) for n in shape.split("x")])) for shape in chip.shapes]
        assert counts == sorted(set(counts)) == [1, 4, 8, 16, 32, 64, 128, 256]
        assert [chips.slice_of(chip, count) for count in counts] == [
            f"{chip.name}:{shape}" for shape in chip.shapes
        ]
    assert chips.slice_of(CHIP, 2) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e:2x2"], "model: missing"),
        (["--model=tiny_llama"], "topology: missing"),
        (["--topology=v5e:3x3"], "v5e has no slice '3x3'; allowed: v5e:1x1, v5e:2x2,"),
        (["--topology=v5x:2x2"], "'v5x' is not known .*allowed: v4, v5e, v5p, v6e"),
        (["--topology=v5e"], "must be CHIP:SHAPE, for example v5e:4x4"),
        (["--model=llama3_80b"], r"did you mean 'llama3_8b'\?|did you mean 'llama3_70b'\?"),
        (["--mesh=2x4"], "mesh: 2x4 needs 8 devices; v5e:2x2 has 4"),
        (["--mesh=1x4"], "does not divide"),
        (["--mesh=four"], "must be DATAxMODEL"),
        (["--programs=decoding"], "programs: 'decoding' is not known"),
        (["--method=spectre"], "did you mean 'spectr'"),
        (["--method=speculative_sampling"], "needs a draft model"),
        (["--batch_size=3"], "3 rows do not divide over 2 data devices"),
        (["--search", "--batch_sizes=0"], "batch_sizes: '0' must be positive integers"),
        (["--merge=nowhere", "--workdir=there"], "merge: 'nowhere' has no compile_check.json"),
        (["--merge=nowhere"], "workdir: missing"),
        (["--prompt_length=500", "--max_new_tokens=500"], "exceed the target's context of 512"),
        (["--method=llada"], "fills masks; the target model .* causal"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_allowed(flags, message):
    named = [flag.split("=")[0] for flag in flags]
    given = [] if "missing" in message else [
        flag for flag in ("--model=tiny_llama", "--topology=v5e:2x2", "--prompt_length=32",
                          "--max_new_tokens=32")
        if flag.split("=")[0] not in named
    ]  # fmt: skip
    with pytest.raises(InputError, match=message):
        run(*given, *flags)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu: not installed.*pip install -e '\.\[compile\]'"):
        run("--model=tiny_llama", "--topology=v5e:2x2")
