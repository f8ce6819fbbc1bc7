"""Continues prompts with any decoding method, from any checkpoint.

    python -m experiments.generate --checkpoint=DIR --prompt="def fibonacci("
    python -m experiments.generate --checkpoint=DIR --prompts_file=prompts.jsonl --json
    python -m experiments.generate --checkpoint=DIR --draft=DIR --prompt=...
        --method=speculative_sampling --method_option num_draft=4 --temperature=0.8

Prompts are those of --prompt, --prompts_file and --prompt_ids, in that order; the row of prompt i
and sample j is number i * num_samples + j, and its text depends on its prompt, --seed and that
number, not on --batch_size.

With --json, standard output has one JSON object a row and nothing else: `id` (of the prompt),
`sample`, `prompt_ids`, `token_ids` (an end-of-sequence token included), `text` (null without a
tokeniser), `finish_reason` ('eos', 'length' or 'context') and `stats`, the row's counters.

With --workdir, rows are kept as they come, and a run that was stopped goes on behind the last one;
standard output is that of a run that was not. Several processes share out the batches, and the
first one prints and keeps all rows, in order. See "Several hosts" in docs/performance.md.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli
from models.errors import InputError

if TYPE_CHECKING:  # these import JAX, which a mistyped flag should not wait for
    from decoding.generation import Event, Row
    from decoding.loop import ModelParams
    from decoding.sampling import SamplingConfig
    from experiments.loading import Prompt
    from models.config import TransformerConfig
    from models.tokenizer import Tokenizer

FLAGS = flags.FlagValues()


def _text(name: str, default: str | None, text: str) -> flags.FlagHolder:
    return flags.DEFINE_string(name, default, text, flag_values=FLAGS)


def _texts(name: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE_multi_string(name, [], text, flag_values=FLAGS)


def _switch(name: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE_bool(name, False, text, flag_values=FLAGS)


def _integer(name: str, default: int, least: int, text: str) -> flags.FlagHolder:
    most = 2**31 - 1
    return flags.DEFINE_integer(name, default, text, least, most, flag_values=FLAGS)


def _number(name: str, default: float, text: str) -> flags.FlagHolder:
    return flags.DEFINE_float(name, default, text, flag_values=FLAGS)


_CHECKPOINT = _text(
    "checkpoint",
    None,
    "Hugging Face directory of the target, or random:SIZE (see models/sizes.py).",
)
_DRAFT = _text("draft", None, "Directory, or random:SIZE, of the draft model.")
_METHOD = _text("method", "autoregressive", "Decoding method; see --list_methods.")
_LIST_METHODS = _switch("list_methods", "Print every method and its options, then stop.")
_METHOD_OPTION = _texts("method_option", "NAME=VALUE, an option of the method")
_METHOD_PARAMS = _text(
    "method_params", None, "Directory of the method's trained parts, or of a store for aded."
)
_UNTRAINED_PARTS = _switch("untrained_parts", "Allow random values for the method's trained parts.")
_PROMPT = _texts("prompt", "Text to continue")
_PROMPTS_FILE = _text(
    "prompts_file", None, "JSON Lines; each has a `prompt` text or chat `messages`."
)
_PROMPT_IDS = _texts("prompt_ids", "Token ids such as 1,2,3; no tokeniser is needed")
_CHAT = _switch("chat", "Put each text prompt into the checkpoint's chat template.")
_NUM_SAMPLES = _integer("num_samples", 1, 1, "Continuations of each prompt.")
_MAX_NEW_TOKENS = _integer("max_new_tokens", 128, 1, "Tokens to generate at most.")
_TEMPERATURE = _number("temperature", 0.0, "0 for the most likely token each time.")
_TOP_K = _integer("top_k", 0, 0, "Sample among the k most likely tokens; 0 for all.")
_TOP_P = _number("top_p", 1.0, "Sample among the most likely tokens that reach this probability.")
_MIN_P = _number("min_p", 0.0, "Drop tokens less likely than this times the most likely one.")
_REPETITION_PENALTY = _number(
    "repetition_penalty", 1.0, "Divide the logits of tokens seen before by this; 1 for none."
)
_SEED = _integer("seed", 0, 0, "Base of all randomness.")
_BATCH_SIZE = _integer("batch_size", 8, 1, "Rows decoded together.")
_DTYPE = _text("dtype", None, "float32, bfloat16 or float16; default as stored.")
_MESH = _text("mesh", None, "DATAxMODEL devices, for example 2x4; default one device.")
_STREAM = _switch("stream", "Print the text of a single row as it comes.")
_JSON = _switch("json", "Print one JSON object a row.")
_PROFILE = _text("profile", None, "Directory for a trace of the first batch, decoded once more.")
_WORKDIR = _text("workdir", None, "Directory to keep rows in, and to go on from.")
_JOB = cli.define_cluster(FLAGS)


def main(argv: Sequence[str]) -> None:
    """The program; reads `FLAGS`."""
    cli.no_arguments(argv)
    if _LIST_METHODS.value:
        print(list_methods())
        return
    if _CHECKPOINT.value is None:
        raise InputError("checkpoint: missing; give --checkpoint=DIR, or --list_methods")
    if not (_PROMPT.value or _PROMPTS_FILE.value or _PROMPT_IDS.value):
        raise InputError("prompt: missing; give --prompt, --prompts_file or --prompt_ids")
    if _STREAM.value and _JSON.value:
        raise InputError("stream: not with --json; allowed: one of the two")
    if _STREAM.value and _PROFILE.value:
        raise InputError("stream: not with --profile; allowed: one of the two")
    if _STREAM.value and _WORKDIR.value:
        raise InputError("stream: not with --workdir; allowed: one of the two")
    options = method_options(_METHOD_OPTION.value)
    with _JOB():
        _generate(options)


def list_methods() -> str:
    """Every method with one line, and beneath it a line for each option with its default."""
    from decoding.methods import METHODS

    lines = []
    for name, spec in METHODS.items():
        lines.append(f"{name:<22}{spec.summary}")
        for option_name, option in spec.options.items():
            choices = f" ({', '.join(option.choices)})" if option.choices else ""
            lines.append(f"    {f'{option_name}={option.default}':<30}  {option.help}{choices}")
    return "\n".join(lines)


def method_options(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs as a dict; InputError for what is none, or given twice."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"method_option: {pair!r} must be NAME=VALUE")
        if name in options:
            raise InputError(f"method_option: {name!r} is given twice")
        options[name] = value
    return options


def _generate(options: dict[str, Any]) -> None:
    """Checks everything that can be checked before weights are read, then decodes and prints."""
    from decoding import generation, methods
    from experiments import kept_rows, loading, method_parts
    from models import distributed

    name = _METHOD.value
    memory = method_parts.load_memory(name, _METHOD_PARAMS.value)
    options = method_parts.with_directory(name, options, _METHOD_PARAMS.value)
    sampling = _sampling()
    mesh = loading.parse_mesh(_MESH.value)
    sources = {"target": _CHECKPOINT.value}
    if _DRAFT.value is not None:
        sources["draft"] = _DRAFT.value
    configs = loading.load_configs(name, sources, options)
    methods.build(name, configs, sampling, options)  # checks what depends on the models
    target = configs["target"]
    parts = method_parts.load_method_params(
        name, _METHOD_PARAMS.value, _UNTRAINED_PARTS.value, options, target
    )
    tokenizer = _load_tokenizer(target)
    prompts = _prompts(tokenizer)
    stop = generation.stop_config(target, _MAX_NEW_TOKENS.value)
    generation.check_prompts([prompt.ids for prompt in prompts], target, stop)
    rows = len(prompts) * _NUM_SAMPLES.value
    if _STREAM.value and rows > 1:
        raise InputError(f"stream: {rows} rows; allowed: one prompt and one sample")
    if _STREAM.value and distributed.several():
        raise InputError("stream: not in several processes; allowed: one process")

    configs, params = loading.load_models(sources, dtype=_DTYPE.value, mesh=mesh)
    run = {
        "method": methods.build(name, configs, sampling, options),
        "stop": stop,
        "seed": _SEED.value,
        "mesh": mesh,
    }
    hot = generation.HotStart(memory)  # what a method learns from a batch serves the next
    if _STREAM.value:
        _stream(params | parts, prompts[0], tokenizer, run | {"hot": hot})
        return

    def decode(ids: list[int]) -> list[dict[str, Any]]:
        chosen = [prompts[i // _NUM_SAMPLES.value] for i in ids]
        done = generation.generate(
            params | parts, [prompt.ids for prompt in chosen], row_ids=ids, hot=hot, **run
        )
        # By number, so that a repeated row is shown once.
        return [
            _record(row, prompt, i % _NUM_SAMPLES.value, tokenizer)
            for i, (prompt, row) in dict(zip(ids, zip(chosen, done))).items()
        ]

    def show(line: str, row: int) -> None:
        prompt = prompts[row // _NUM_SAMPLES.value]
        print(line if _JSON.value else _readable(json.loads(line), prompt, tokenizer), flush=True)

    numbers = list(batches(rows, _BATCH_SIZE.value, mesh.shape["data"] if mesh else 1))
    if _PROFILE.value:
        first = [prompts[i // _NUM_SAMPLES.value].ids for i in numbers[0]]
        _profile(lambda: generation.generate(params | parts, first, row_ids=numbers[0], **run))
    settings = _settings(name, sources, options, prompts)
    with kept_rows.opened(_WORKDIR.value, settings, len(numbers[0]), rows) as kept:
        for row, line in enumerate(kept.lines):
            if distributed.is_first():
                show(line, row)
        begun = -(-len(kept.lines) // len(numbers[0]))
        for row, line in kept_rows.rounds(numbers, begun, decode, mesh, kept):
            show(line, row)


def _profile(decode: Callable[[], Any]) -> None:
    """Traces a call that is compiled; what is printed later, and learned, is left alone."""
    from experiments import profiling

    with profiling.asked(Path(_PROFILE.value)):
        decode()
        profiling.trace_once({_METHOD.value: decode})


def _settings(
    method: str, sources: dict[str, str], options: dict[str, Any], prompts: "Sequence[Prompt]"
) -> dict[str, Any]:
    """Everything that rows depend on."""
    flags_read = (
        _METHOD_PARAMS, _UNTRAINED_PARTS, _NUM_SAMPLES, _MAX_NEW_TOKENS, _TEMPERATURE, _TOP_K,
        _TOP_P, _MIN_P, _REPETITION_PENALTY, _SEED, _DTYPE,
    )  # fmt: skip
    names = [[prompt.name, prompt.ids] for prompt in prompts]
    return {
        "method": method,
        "models": sources,
        "options": {name: str(value) for name, value in options.items()},
        **{flag.name: flag.value for flag in flags_read},
        "prompts": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
    }


def _sampling() -> "SamplingConfig":
    from decoding.sampling import SamplingConfig

    return SamplingConfig(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
    )


def _stream(
    params: "ModelParams", prompt: "Prompt", tokenizer: "Tokenizer | None", run: dict[str, Any]
) -> None:
    """Prints one row as it comes, then its stats."""
    from decoding import generation

    finished: list[Row] = []

    def events() -> "Iterator[Event]":
        for event in generation.stream(params, [prompt.ids], row_ids=[0], **run):
            finished.extend([event.finished] if event.finished else [])
            yield event

    header = _header(prompt, 0, tokenizer) + "\n"
    for piece in pieces(events(), prompt, tokenizer):
        print(header + piece, end="", flush=True)
        header = ""
    print("\n" + _stats_line(_stats(finished[0]), finished[0].finish_reason))


def _load_tokenizer(config: "TransformerConfig") -> "Tokenizer | None":
    """The target's tokeniser; None when prompts are ids and it has none that works."""
    from experiments import loading

    try:
        return loading.load_tokenizer(_CHECKPOINT.value, config)
    except InputError:
        if _PROMPT.value or _PROMPTS_FILE.value:
            raise
        return None


def _prompts(tokenizer: "Tokenizer | None") -> "list[Prompt]":
    """Every prompt that the flags give, in order."""
    from experiments import loading

    records: list[dict[str, Any]] = [{"prompt": text} for text in _PROMPT.value]
    if _PROMPTS_FILE.value is not None:
        from training.datasets import jsonl_prompts

        records += jsonl_prompts.read_prompts(_PROMPTS_FILE.value)
    prompts = []
    for index, record in enumerate(records):
        assert tokenizer is not None
        prompts.append(loading.encode_prompt(tokenizer, record, index, _CHAT.value))
    return prompts + [
        loading.parse_ids(text, index)
        for index, text in enumerate(_PROMPT_IDS.value, start=len(prompts))
    ]


def batches(rows: int, batch_size: int, multiple: int = 1) -> Iterator[list[int]]:
    """Row numbers of each batch, all of one size, for which the loop is compiled once.

    The size is at most `batch_size`, rounded up to a multiple of `multiple` (parts of a mesh);
    the last row is repeated where rows are lacking.
    """
    size = -(-min(batch_size, rows) // multiple) * multiple
    for first in range(0, rows, size):
        yield [min(i, rows - 1) for i in range(first, first + size)]


def pieces(
    events: Iterable["Event"], prompt: "Prompt", tokenizer: "Tokenizer | None"
) -> Iterator[str]:
    """The text of one row as it comes, never part of a character; joined, `_text_of` the row."""
    ids: list[int] = []
    sent = 0
    for event in events:
        ids += event.token_ids
        text = _text_of(ids, prompt, tokenizer)
        if not event.done:
            text = text.rstrip("\ufffd")  # bytes of a character that is still to be completed
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)


def _text_of(token_ids: Sequence[int], prompt: "Prompt", tokenizer: "Tokenizer | None") -> str:
    """A row's continuation as text, or its ids where there is no tokeniser."""
    from experiments import loading

    if tokenizer is None:
        return " ".join(map(str, token_ids))
    return loading.continuation(tokenizer, prompt.ids, token_ids)


def _record(
    row: "Row", prompt: "Prompt", sample: int, tokenizer: "Tokenizer | None"
) -> dict[str, Any]:
    """A row as JSON can hold it."""
    return {
        "id": prompt.name,
        "sample": sample,
        "prompt_ids": row.prompt_ids,
        "token_ids": row.token_ids,
        "text": None if tokenizer is None else _text_of(row.token_ids, prompt, tokenizer),
        "finish_reason": row.finish_reason,
        "stats": _stats(row),
    }


def _readable(record: dict[str, Any], prompt: "Prompt", tokenizer: "Tokenizer | None") -> str:
    """A `_record` for people: prompt, continuation and a line of stats."""
    text = record["text"]
    if text is None:
        text = _text_of(record["token_ids"], prompt, None)
    line = _stats_line(record["stats"], record["finish_reason"])
    return f"{_header(prompt, record['sample'], tokenizer)}\n{text}\n{line}"


def _stats_line(stats: dict[str, Any], finish_reason: str) -> str:
    line = (
        f"--- {stats['tokens_emitted']} tokens in {stats['target_calls']} target calls "
        f"({stats['tokens_per_target_call']:.2f} a call)"
    )
    if stats["draft_calls"]:
        line += f", {stats['draft_calls']} draft calls"
    if stats["acceptance_by_depth"]:
        shares = " ".join(f"{share:.0%}" for share in stats["acceptance_by_depth"])
        line += f", accepted by depth {shares}"
    return f"{line}, ended by {finish_reason} ---"


def _header(prompt: "Prompt", sample: int, tokenizer: "Tokenizer | None") -> str:
    text = prompt.text
    if text is None:
        text = tokenizer.decode(prompt.ids) if tokenizer else " ".join(map(str, prompt.ids))
    return f"=== prompt {prompt.name}, sample {sample}\n{text}\n--- continuation"


def _stats(row: "Row") -> dict[str, Any]:
    from decoding.generation import total_stats

    return dict(total_stats([row]))


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
