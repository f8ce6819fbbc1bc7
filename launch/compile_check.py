"""Compiles a run for a TPU slice without having one, and says what it needs and takes on paper.

    python -m launch.compile_check --model=llama3_8b --topology=v5e:2x4
    python -m launch.compile_check --model=llama3_70b --draft=llama3_2_1b --topology=v5p:4x4x4
        --mesh=8x8 --batch_size=64 --method=speculative_sampling --method_option num_draft=4
    python -m launch.compile_check --config=experiments/configs/spectr.py --model=llama3_70b
        --draft=llama3_2_1b --topology=v6e:4x4
    python -m launch.compile_check --model=llama3_8b --topology=v5e:4x4 --search
    python -m launch.compile_check --model=llama3_8b --topology=v5e:16x16,v5p:4x8x8 --curve
        --batch_sizes=256 --workdir=runs/curve

Needs no TPU and no weights: the training step, prefill and the decoding loop that a run consists of
are compiled ahead of time with `libtpu` (`pip install -e '.[compile]'`) for arrays that are only
shapes. A size of models/sizes.py or a checkpoint's directory is a model. With --config, what is
decoded with are the methods of that experiment, at its temperature and lengths.

--search compiles few layers for every mesh of the slice and every one of --batch_sizes, and shows
which fit and which is fastest on paper; --curve does so for 1 to as many chips, with a plot.
Times are bounds at the chip's peak rates, not predictions: see docs/scaling.md.

Exit status 0 also where something does not fit; the table says so.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli
from models.errors import InputError, check_choice

if TYPE_CHECKING:
    from launch.mesh_search import Candidate
    from launch.programs import Decoding
    from training.fitting import TrainConfig

FLAGS = flags.FlagValues()
PROGRAMS = ("train", "prefill", "decode")
FILE, CHART = "compile_check.json", "compile_check.png"
_COUNTS = tuple(2**power for power in range(9))


def _text(name: str, default: str | None, text: str) -> flags.FlagHolder[Any]:
    return flags.DEFINE_string(name, default, text, flag_values=FLAGS)


def _integer(name: str, default: int | None, text: str) -> flags.FlagHolder[Any]:
    return flags.DEFINE_integer(name, default, text, 1, 2**31 - 1, flag_values=FLAGS)


def _switch(name: str, text: str) -> flags.FlagHolder[Any]:
    return flags.DEFINE_bool(name, False, text, flag_values=FLAGS)


_CONFIG = cli.define_config(FLAGS, "An experiment whose methods are checked, in place of --method.")
_MODEL = _text("model", None, "The target: a size of models/sizes.py, or a checkpoint's directory.")
_DRAFT = _text("draft", None, "The draft model, likewise, for methods that need one.")
_TOPOLOGY = _text(
    "topology",
    None,
    "CHIP:SHAPE of the slice, such as v5e:4x4 or v5p:4x4x4; --curve takes several.",
)
_MESH = _text("mesh", None, "DATAxMODEL; default as many on 'model' as key/value heads allow.")
_METHOD = _text("method", "autoregressive", "Decoding method, see experiments.generate.")
_OPTION = flags.DEFINE_multi_string(
    "method_option", [], "NAME=VALUE, an option of the method.", flag_values=FLAGS
)
_PROGRAMS = flags.DEFINE_list(
    "programs", ["train", "prefill", "decode"], "Which programs are compiled.", flag_values=FLAGS
)
_BATCH_SIZE = _integer("batch_size", 16, "Rows decoded together, over the whole mesh.")
_PROMPT_LENGTH = _integer("prompt_length", None, "Tokens of a prompt; default 1024.")
_MAX_NEW_TOKENS = _integer("max_new_tokens", None, "Tokens generated at most; default 1024.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0 for the most likely token; default 0.", flag_values=FLAGS
)
_TRAIN_BATCH_SIZE = _integer("train_batch_size", 16, "Rows of a training batch, over the mesh.")
_SEQUENCE_LENGTH = _integer(
    "sequence_length", None, "Tokens of a training row; default 2048, or the model's context."
)
_REMAT = flags.DEFINE_bool(
    "remat", True, "Recompute blocks in the backward pass.", flag_values=FLAGS
)
_FSDP = _switch("fsdp", "Split training state over 'data' too.")
_DTYPE = _text("dtype", "bfloat16", "Compute dtype of every program.")
_SEARCH = _switch("search", "Try every mesh of the slice, with few layers.")
_CURVE = _switch("curve", "As --search, for 1 to as many chips as the slice has; draws a plot.")
_BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", None, "Rows that a search tries; default the program's own.", flag_values=FLAGS
)
_MODEL_AXIS = flags.DEFINE_list(
    "model_axis", None, "Sizes of 'model' that a search tries; default all.", flag_values=FLAGS
)
_MERGE = flags.DEFINE_list(
    "merge", None, "Work directories of --curve, in one table and one plot; compiles nothing.",
    flag_values=FLAGS,
)  # fmt: skip
_JSON = _switch("json", "Print JSON in place of tables.")
_WORKDIR = _text("workdir", None, f"Where to write {FILE} and {CHART}; default nowhere.")


def main(argv: Sequence[str]) -> None:
    """The program; reads `FLAGS`. Everything is checked before anything is compiled."""
    cli.no_arguments(argv)
    if _MERGE.value is not None:
        _merge(_MERGE.value)
        return
    for name in ("model", "topology"):
        if FLAGS[name].value is None:
            raise InputError(f"{name}: missing; give --{name}, see --help")
    for program in _PROGRAMS.value:
        check_choice("programs", program, PROGRAMS)
    from launch import chips, topologies

    for topology in _TOPOLOGY.value.split(",") if _CURVE.value else [_TOPOLOGY.value]:
        chips.parse(topology)
    topologies.check_available()
    found, text = _search() if _SEARCH.value or _CURVE.value else _check()
    from experiments import results

    where = {"model": _MODEL.value, "draft": _DRAFT.value, "topology": _TOPOLOGY.value}
    record = results.header("compile_check", where) | {"libtpu": _libtpu_version()} | found
    if _WORKDIR.value:
        content = json.dumps(record, indent=1) + "\n"
        results.write_text(Path(_WORKDIR.value) / FILE, content)
    print(json.dumps(record) if _JSON.value else text)


def _libtpu_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("libtpu")


def _config_of(source: str) -> Any:
    """The architecture of a size or a directory, in the compute dtype."""
    from experiments import loading
    from models import sizes

    named = loading.RANDOM + source if source in sizes.SIZES else source
    if not Path(source).is_dir() and source not in sizes.SIZES:
        check_choice("model", source, sizes.SIZES)
    config = loading.load_config(named)
    return config.replace(dtype=_DTYPE.value) if hasattr(config, "dtype") else config


def _works() -> "list[tuple[str, Decoding]]":
    """What is decoded with, by label: --method, or the methods of --config."""
    from decoding import methods
    from decoding.sampling import SamplingConfig
    from experiments.generate import method_options
    from launch.programs import Decoding

    configs = {"target": _config_of(_MODEL.value)}
    if _DRAFT.value is not None:
        configs["draft"] = _config_of(_DRAFT.value)
    entries: list[tuple[str, str, dict[str, Any]]]
    entries = [(_METHOD.value, _METHOD.value, method_options(_OPTION.value))]
    lengths, temperature = [1024, 1024], 0.0
    if _CONFIG.value is not None:
        decode = getattr(_CONFIG.value, "decode", None)
        if decode is None or not decode.get("methods"):
            raise InputError("config: it has no decode.methods; give one of a comparison")
        entries = [(one.label, one.method, one.options.to_dict()) for one in decode.methods]
        lengths = [_CONFIG.value.data.prompt_tokens, decode.max_new_tokens]
        temperature = decode.temperatures[0]
    given = (_PROMPT_LENGTH.value, _MAX_NEW_TOKENS.value)
    prompt, new = (ours or theirs for ours, theirs in zip(given, lengths, strict=True))
    if _TEMPERATURE.value is not None:
        temperature = _TEMPERATURE.value
    sampling = SamplingConfig(temperature=temperature)
    works = []
    for label, name, options in entries:
        roles = methods.spec(name).roles_with(methods.parse_options(name, options))
        mine = {role: configs[role] for role in roles if role in configs}
        works.append(
            (label, Decoding(name, mine, options, sampling, _BATCH_SIZE.value, prompt, new))
        )
        methods.build(name, mine, sampling, options)  # checks what depends on the models
    return works


def _train_config(data: int, model: int) -> "TrainConfig":
    from training.fitting import TrainConfig

    target = _config_of(_MODEL.value)
    return TrainConfig(
        model=target,
        batch_size=_TRAIN_BATCH_SIZE.value,
        sequence_length=_SEQUENCE_LENGTH.value or min(2048, target.max_position),
        compute_dtype=_DTYPE.value,
        remat=_REMAT.value,
        fsdp=_FSDP.value,
        mesh=(data, model),
    )


def _trainable(config: Any) -> bool:
    from decoding.method_spec import architecture_of
    from models.config import TransformerConfig

    return architecture_of(config) is TransformerConfig and config.causal


def mesh_shape(text: str | None, count: int, heads: int) -> tuple[int, int]:
    """(data, model) of DATAxMODEL; by default the most that `heads` allow on 'model'."""
    if text is None:
        model = max(size for size in range(1, count + 1) if count % size == heads % size == 0)
        return count // model, model
    try:
        data, model = map(int, text.split("x"))
    except ValueError:
        raise InputError(f"mesh: {text!r} must be DATAxMODEL, for example 2x4") from None
    return data, model


def _check() -> tuple[dict[str, Any], str]:
    """Compiles whole programs on one mesh; the record and its tables."""
    from launch import chips, programs, reports, topologies

    works = _works()
    chip, _ = chips.parse(_TOPOLOGY.value)
    target = works[0][1].configs["target"]
    heads = getattr(target, "num_kv_heads", 1)
    data, model = mesh_shape(_MESH.value, len(topologies.devices(_TOPOLOGY.value)), heads)
    mesh = topologies.make_mesh(_TOPOLOGY.value, data, model)
    if heads % model and _trainable(target):
        raise InputError(f"mesh: {model} on 'model' does not divide the {heads} key/value heads")
    planned = []
    if "train" in _PROGRAMS.value and _CONFIG.value is None and _trainable(target):
        planned.append(("training step", programs.training(_train_config(data, model), mesh)))
    for label, work in works:
        for name, lower in zip(PROGRAMS[1:], programs.decoding(work, mesh), strict=True):
            if name in _PROGRAMS.value:
                planned.append((label, lower))
    found = [(label, reports.compile_report(lower(), chip)) for label, lower in planned]
    text = [f"{_TOPOLOGY.value}, mesh {data}x{model}; of one device, GB and ms\n"]
    for label in dict.fromkeys(label for label, _ in found):
        mine = [report for other, report in found if other == label]
        text.append(f"{label}\n\n{reports.table(mine)}\n")
    record = [{"label": label} | report.as_json() for label, report in found]
    return {"mesh": [data, model], "chip": dataclasses.asdict(chip), "programs": record}, "\n".join(
        text
    )


def _search() -> tuple[dict[str, Any], str]:
    """Meshes and batches of one slice, or of 1 to as many chips; the record and its tables."""
    from launch import curves, mesh_search

    searches: dict[str, Any] = {}
    text: list[str] = []
    for topology in _TOPOLOGY.value.split(","):
        for label, per, found in _searches(topology):
            label = f"{label}, {topology.partition(':')[0]}"
            text.append(f"{label}\n\n{mesh_search.table(found, per)}\n")
            records = [mesh_search.record(one) for one in found]
            curves.mark_best(records)
            searches[label] = {"per": per, "candidates": records}
            if _CURVE.value:
                best = [one for one, kept in zip(found, records, strict=True) if kept["best"]]
                chosen = mesh_search.table(best, per)
                text.append(f"{label}: the best of each number of chips\n\n{chosen}\n")
    if _CURVE.value and _WORKDIR.value:
        _draw(searches)
    return {"searches": searches}, "\n".join(text)


def _searches(topology: str) -> "Iterator[tuple[str, str, list[Candidate]]]":
    """Label, 'round' or 'step', and the candidates of everything that is asked for."""
    from launch import chips, mesh_search

    chip, sides = chips.parse(topology)
    most = math.prod(sides)
    counts = [n for n in _COUNTS if n <= most and chips.slice_of(chip, n)]
    counts = counts if _CURVE.value else [most]
    works = _works()
    heads = works[0][1].configs["target"].num_kv_heads
    models = _integers(_MODEL_AXIS, [size for size in _COUNTS if heads % size == 0])
    if "decode" in _PROGRAMS.value:
        batches = _integers(_BATCH_SIZES, [_BATCH_SIZE.value])
        for label, work in works:
            decoder = mesh_search.Decoder(work, chip)
            parts = [mesh_search.decoding(decoder, n, batches, models) for n in counts]
            yield label, "round", [one for part in parts for one in part]
    if "train" in _PROGRAMS.value and _CONFIG.value is None:
        batches = _integers(_BATCH_SIZES, [_TRAIN_BATCH_SIZE.value])
        slices = [f"{chips.slice_of(chip, n)}" for n in counts]
        config = _train_config(1, 1)
        parts = [mesh_search.training(config, one, models, batches) for one in slices]
        label = "training step" + (", state split" if _FSDP.value else "")
        yield label, "step", [one for part in parts for one in part]


def _draw(searches: "Mapping[str, Mapping[str, Any]]") -> None:
    """Time and cost over chips, a row of the picture for each workload."""
    from experiments import plots
    from launch import curves

    if specs := curves.charts(searches):
        Path(_WORKDIR.value).mkdir(parents=True, exist_ok=True)
        plots.write_png(plots.panels(specs), Path(_WORKDIR.value) / CHART)


def _merge(directories: Sequence[str]) -> None:
    """Draws recorded curves together and prints their tables, chips side by side."""
    from launch import curves

    if _WORKDIR.value is None:
        raise InputError("workdir: missing; --merge writes its plot there")
    searches = curves.read(directories, FILE)
    _draw(searches)
    print(curves.tables(searches))


def _integers(flag: flags.FlagHolder[Any], default: list[int]) -> list[int]:
    """The positive integers of a list flag."""
    if flag.value is None:
        return default
    try:
        found = [int(text) for text in flag.value]
    except ValueError:
        found = []
    if min(found, default=0) < 1:
        raise InputError(f"{flag.name}: {','.join(flag.value)!r} must be positive integers")
    return found


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
