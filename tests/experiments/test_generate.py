"""The generate program: its output, its agreement with the loop and transformers, bad input."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import generation, methods
from decoding.generation import Event, Row
from decoding.sampling import SamplingConfig
from experiments import generate, loading, method_parts
from models import hf_checkpoint, sizes, transformer
from models.errors import InputError
from models.tokenizer import Tokenizer
from tests.models import hf_fixtures
from training import tokenizers as bpe

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXT = "def add(a, b): return a + b — naïve 東京"


def make_checkpoint(directory, tokenizer=None, seed=0, **changes):
    """A tiny random Llama with, where given, a tokeniser and a chat template."""
    vocab = 256 if tokenizer is None else tokenizer.get_vocab_size()
    config = sizes.get("tiny_llama").replace(vocab_size=vocab, **changes)
    params = jax.jit(functools.partial(transformer.init, config))(jax.random.key(seed, impl="rbg"))
    hf_checkpoint.save(directory, config, params)
    if tokenizer is not None:
        bpe.save(tokenizer, directory)
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Checkpoints: a target and a draft with one tokeniser, and one of 97 tokens without any."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = bpe.train_bpe([TEXT] * 4, 280)
    return SimpleNamespace(
        root=root,
        target=make_checkpoint(root / "target", tokenizer, max_position=128),
        draft=make_checkpoint(root / "draft", tokenizer, seed=1),
        plain=hf_fixtures.checkpoint("llama", root / "plain"),
    )


@pytest.fixture
def rows(run):
    """The rows that `--json` prints."""

    def rows(*arguments):
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    return rows


@pytest.fixture
def refused(run):
    """Runs what must be refused; returns the one line said."""

    def refused(*arguments):
        status, out, err = run(*arguments, "--json")
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").strip()

    return refused


def subprocess_run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "experiments.generate", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


# --- what it prints


def test_list_methods(run):
    status, out, err = run("--list_methods")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    summaries = dict(line.split(maxsplit=1) for line in lines if not line.startswith(" "))
    assert summaries == {name: spec.summary for name, spec in methods.METHODS.items()}
    assert any(line.split()[:1] == ["num_draft=5"] for line in lines if line.startswith("  "))


@pytest.mark.parametrize(
    ("method", "flags", "sampling", "options"),
    [
        ("autoregressive", ["--temperature=0.7", "--top_k=20", "--seed=3"], (0.7, 20), {}),
        ("prompt_lookup", ["--repetition_penalty=1.2"], (0.0, 0, 1.0, 0.0, 1.2), {}),
        (
            "speculative_sampling",
            ["--temperature=1", "--top_p=0.9", "--min_p=0.01"],
            (1.0, 0, 0.9, 0.01),
            {"num_draft": "3"},
        ),
    ],
)
def test_rows_are_those_of_the_loop(rows, directories, method, flags, sampling, options):
    draft = [f"--draft={directories.draft}"] if method == "speculative_sampling" else []
    given = [f"--method_option={name}={value}" for name, value in options.items()]
    found = rows(
        f"--checkpoint={directories.target}", f"--method={method}", *draft, *flags, *given,
        f"--prompt={TEXT}", "--prompt_ids=5,6, 7", "--num_samples=2", "--max_new_tokens=24",
    )  # fmt: skip

    configs, params = {}, {}
    for role in methods.spec(method).roles:
        configs[role], params[role] = hf_checkpoint.load(getattr(directories, role))
    tokenizer = tokenizers.Tokenizer.from_file(str(directories.target / "tokenizer.json"))
    prompts = [ids for ids in (tokenizer.encode(TEXT).ids, [5, 6, 7]) for _ in range(2)]
    expected = generation.generate(
        params,
        prompts,
        methods.build(method, configs, SamplingConfig(*sampling), options),
        generation.stop_config(configs["target"], 24),
        seed=3 if "--seed=3" in flags else 0,
    )
    assert [row["id"] for row in found] == ["0", "0", "1", "1"]
    assert [row["sample"] for row in found] == [0, 1, 0, 1]
    for row, reference in zip(found, expected, strict=True):
        assert row["prompt_ids"] == reference.prompt_ids
        assert row["token_ids"] == reference.token_ids
        assert len(row["token_ids"]) == 24
        assert row["finish_reason"] == "length"
        assert row["text"] == tokenizer.decode(reference.token_ids)
        stats = row["stats"]
        assert {name: stats[name] for name in reference.stats} == reference.stats
        shares = [a / p for a, p in zip(stats["accepted"], stats["proposed"]) if p]
        assert [share for share in stats["acceptance_by_depth"] if share] == list(
            filter(None, shares)
        )
        assert stats["tokens_per_target_call"] == 24 / stats["target_calls"]
    # Samples are different where sampling is random.
    assert (found[0]["token_ids"] == found[1]["token_ids"]) == (sampling[0] == 0)


def test_batch_size_and_mesh_change_nothing(rows, directories):
    arguments = [
        f"--checkpoint={directories.target}", "--num_samples=2", "--max_new_tokens=12",
        "--prompt=def add", "--prompt=東京",
    ]  # fmt: skip
    sampled = rows(*arguments, "--temperature=0.8")
    assert len({tuple(row["token_ids"]) for row in sampled}) == 4
    assert rows(*arguments, "--temperature=0.8", "--batch_size=3") == sampled
    assert rows(*arguments, "--mesh=2x2", "--batch_size=3") == rows(*arguments)


def test_batches():
    assert list(generate.batches(3, 8)) == [[0, 1, 2]]
    assert list(generate.batches(5, 2)) == [[0, 1], [2, 3], [4, 4]]
    assert list(generate.batches(5, 3, 2)) == [[0, 1, 2, 3], [4, 4, 4, 4]]


def test_greedy_equals_transformers(rows, directories):
    """A checkpoint of 97 tokens without tokeniser or EOS id."""
    prompts = [[3, 14, 15, 92, 65], [35, 89, 79, 32, 38, 46, 26], [4]]
    model = hf_fixtures.build("llama")
    found = rows(
        f"--checkpoint={directories.plain}",
        "--max_new_tokens=40",
        *(f"--prompt_ids={','.join(map(str, prompt))}" for prompt in prompts),
    )
    for row, prompt in zip(found, prompts, strict=True):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        assert row["token_ids"] == output[0, len(prompt) :].tolist()
        assert (row["text"], row["finish_reason"]) == (None, "length")


def test_stops_at_eos_and_at_the_end_of_the_context(rows, directories):
    arguments = [f"--checkpoint={directories.target}", "--prompt_ids=5,6,7"]
    row = rows(*arguments, "--max_new_tokens=1000000")[0]
    assert (len(row["token_ids"]), row["finish_reason"]) == (128 - 3, "context")
    eos = row["token_ids"][9]
    first = row["token_ids"].index(eos)
    stopping = shutil.copytree(directories.target, directories.root / "stopping")
    (stopping / "generation_config.json").write_text(json.dumps({"eos_token_id": [279, eos]}))
    found = rows(f"--checkpoint={stopping}", "--prompt_ids=5,6,7")[0]
    assert found["token_ids"] == row["token_ids"][: first + 1]
    assert found["finish_reason"] == "eos"


def test_prompts_file_and_chat(rows, directories, tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    lines = [{"prompt": "東京", "id": "tokyo"}, {"messages": messages}]
    file.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = tokenizers.Tokenizer.from_file(str(directories.target / "tokenizer.json"))
    arguments = [
        f"--checkpoint={directories.target}", f"--prompts_file={file}", "--prompt=a",
        "--max_new_tokens=12",
    ]  # fmt: skip
    conversation = "[system]Be brief.[user]Hi[assistant]"

    def check(found, names, texts):
        assert [row["id"] for row in found] == names
        for row, text in zip(found, texts, strict=True):
            assert row["prompt_ids"] == tokenizer.encode(text).ids

    check(rows(*arguments), ["0", "tokyo", "2"], ["a", "東京", conversation])
    chats = ["[user]a[assistant]", "[user]東京[assistant]", conversation]
    check(rows(*arguments, "--chat"), ["0", "tokyo", "2"], chats)


def test_readable_output(run, directories):
    arguments = [
        f"--checkpoint={directories.target}", f"--prompt={TEXT}", "--max_new_tokens=24",
        "--method=prompt_lookup", "--method_option", "num_draft=2",
    ]  # fmt: skip
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    head, text = out.split("\n--- continuation\n")
    assert head == f"=== prompt 0, sample 0\n{TEXT}"
    text, stats = text.rsplit("\n--- ", 1)
    assert text == json.loads(run(*arguments, "--json")[1])["text"]
    assert stats.startswith("24 tokens in ")
    assert ", accepted by depth " in stats
    assert stats.endswith(", ended by length ---\n")


def test_readable_output_without_a_tokeniser(run, directories):
    prompt = "3,14,15,92,65"
    _, out, _ = run(f"--checkpoint={directories.plain}", f"--prompt_ids={prompt}")
    assert out.startswith(f"=== prompt 0, sample 0\n{prompt.replace(',', ' ')}\n--- continuation\n")
    ids, stats = out.splitlines()[3:]
    assert all(0 <= int(i) < 97 for i in ids.split(" "))
    # The context of 128 holds the prompt and 123 more.
    assert stats == "--- 123 tokens in 123 target calls (1.00 a call), ended by context ---"


# --- streaming


@pytest.mark.parametrize("extra", [[], ["--temperature=1.5"]])
def test_streamed_text_is_the_text(run, rows, directories, extra):
    arguments = [f"--checkpoint={directories.target}", "--prompt=東", "--max_new_tokens=60", *extra]
    status, out, err = run(*arguments, "--stream")
    assert (status, err) == (0, "")
    row = rows(*arguments)[0]
    *text, stats = out.removesuffix("\n").split("\n")
    assert "\n".join(text) == f"=== prompt 0, sample 0\n東\n--- continuation\n{row['text']}"
    assert stats.startswith(f"--- {row['stats']['tokens_emitted']} tokens in ")


@pytest.fixture(scope="module")
def byte_tokenizers(directories):
    """Three ways to spell characters in bytes: plain, byte-level BPE, and SentencePiece's."""
    config = sizes.get("tiny_llama")
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257, "▁": 258}
    piece = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True)
    )
    piece.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    decoders = tokenizers.decoders
    piece.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    target = hf_checkpoint.load_config(directories.target)
    return [
        Tokenizer(None, config),
        Tokenizer.from_directory(directories.target, target),
        Tokenizer(piece, config.replace(vocab_size=259)),
    ]


@settings(deadline=None, max_examples=150)
@given(
    which=st.integers(0, 2),
    text=st.text(st.sampled_from("ab é東🙂\ufffd"), max_size=8),
    noise=st.lists(st.integers(128, 255), max_size=2),
    cut=st.integers(0, 12),
    data=st.data(),
)
def test_pieces_never_break_a_character(byte_tokenizers, which, text, noise, cut, data):
    """However a text is cut into prompt and events, its pieces join to the rest of the text."""
    tokenizer = byte_tokenizers[which]
    # SentencePiece turns characters before a stray byte into replacement characters.
    ids = tokenizer.encode(text) + (noise if which < 2 else [])
    prompt = loading.Prompt("0", None, ids[:cut])
    rest, events = ids[cut:], []
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        last = Row(prompt.ids, ids[cut:], "length", {}) if size == len(rest) else None
        events.append(Event(0, rest[:size], last))
        rest = rest[size:]
    sent = list(generate.pieces(events, prompt, tokenizer))
    expected = loading.continuation(tokenizer, prompt.ids, ids[cut:])
    assert "".join(sent) == expected
    # Nothing is sent twice or taken back: a replacement character is one of the final text.
    assert sum(piece.count("\ufffd") for piece in sent) == expected.count("\ufffd")
    if not noise and "\ufffd" not in tokenizer.decode(prompt.ids):
        assert tokenizer.decode(prompt.ids) + expected == tokenizer.decode(ids)


def test_continuation_completes_the_prompts_character_and_keeps_spaces(byte_tokenizers):
    plain, _, piece = byte_tokenizers
    ids = list("né".encode())
    assert loading.continuation(plain, ids[:2], ids[2:]) == "é"
    assert loading.continuation(plain, ids[:2], [0x62]) == "b"
    assert piece.decode([256]) == "a"
    assert loading.continuation(piece, [257], [256]) == " a"


# --- random weights, and whole processes


def test_random_weights(rows, refused):
    found = rows("--checkpoint=random:tiny_qwen3", "--prompt=ab", "--max_new_tokens=3")
    assert found[0]["prompt_ids"] == [97, 98]
    assert len(found[0]["token_ids"]) == 3
    said = refused("--checkpoint=random:tiny_lama", "--prompt=a")
    assert said.startswith("size: 'tiny_lama' is not known (did you mean 'tiny_llama'?)")


def test_random_models_are_the_same_each_time_and_differ_by_role():
    sources = {"target": "random:tiny_llama", "draft": "random:tiny_llama"}
    configs, params = loading.load_models(sources, dtype="bfloat16")
    again = loading.load_model("random:tiny_llama")[1]
    assert {config.dtype for config in configs.values()} == {"bfloat16"}

    def kernel(params):
        return params["layers_0"]["attention"]["qkv"]["kernel"]

    assert kernel(params["target"]).dtype == jax.numpy.bfloat16
    target, draft = (np.asarray(kernel(params[role]), np.float32) for role in sources)
    np.testing.assert_allclose(target, kernel(again), rtol=0.01)
    assert np.abs(target - draft).max() > 0.1


def test_process_prints_rows_and_fills_the_compilation_cache(directories, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    process = subprocess_run(
        f"--checkpoint={directories.target}", "--prompt=def", "--max_new_tokens=4", "--json",
        TOKENLOOM_CACHE=str(tmp_path / "cache"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert len(json.loads(process.stdout)["token_ids"]) == 4
    assert any((tmp_path / "cache" / "jax").iterdir())


def test_process_reports_bad_input_in_one_line():
    process = subprocess_run("--checkpoint=/nowhere", "--prompt=def")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "error: checkpoint: '/nowhere' is not a directory\n"


# --- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt="], "prompt 0: '' is empty"),
        (["--prompt_ids="], "prompt_ids: '' is empty"),
        (["--prompt_ids=1,x"], "prompt_ids: '1,x' must be integers separated by commas"),
        (["--prompt_ids=5", "--prompt_ids=5,280"], "prompt 1: token id 280 is out of range; allow"),
        (["--prompt_ids=-1"], "prompt 0: token id -1 is out of range; allowed: 0 to 279"),
        ([f"--prompt_ids={'7,' * 127}7"], "prompt 0: 128 tokens leave no room in a context of 128"),
        (["--temperature=-0.5"], "temperature: -0.5 must be 0 or more"),
        (["--temperature=nan"], "temperature: nan must be 0 or more"),
        (["--temperature=warm"], "--temperature=warm: could not convert"),
        (["--top_p=1.5"], "top_p: 1.5 must be above 0 and at most 1"),
        (["--top_k=-1"], "--top_k=-1: -1 is not"),
        (["--min_p=2"], "min_p: 2.0 must be between 0 and 1"),
        (["--repetition_penalty=0"], "repetition_penalty: 0.0 must be above 0"),
        (["--max_new_tokens=0"], "--max_new_tokens=0: 0 is not"),
        (["--seed=99999999999"], "--seed=99999999999: "),
        (["--dtype=float31"], "dtype: 'float31' is not known (did you mean 'float32'?); allowed: "),
        (["--mesh=2by4"], "mesh: '2by4' must be DATAxMODEL"),
        (["--mesh=64x64"], "mesh: 64x64 needs 4096 devices; 8 available"),
        (["--method=promptlookup"], "method: 'promptlookup' is not known (did you mean 'prompt_lo"),
        (
            ["--method_option=num_draft=2"],
            "method autoregressive has no option 'num_draft'; allowed",
        ),
        (["--method_option=2"], "method_option: '2' must be NAME=VALUE"),
        (["--method_params=/tmp"], "method_params: '/tmp' given, but method autoregressive has no"),
        (["--untrained_parts"], "untrained_parts: 'True' given, but method autoregressive has no"),
        (["--stream"], "stream: not with --json"),
        (["--prompts_file=/nowhere"], "prompts file '/nowhere': No such file"),
        (
            ["--method=speculative_sampling"],
            "draft: method speculative_sampling needs a draft model",
        ),
        (["--draft=/nowhere"], "draft: method autoregressive has no draft model; allowed: target"),
    ],
)
def test_bad_flags(refused, directories, flags, said):
    prompt = [] if any(flag.startswith("--prompt") for flag in flags) else ["--prompt=a"]
    assert refused(f"--checkpoint={directories.target}", *prompt, *flags).startswith(said)


def test_bad_combinations(run, refused, directories):
    checkpoint = f"--checkpoint={directories.target}"
    assert refused("--prompt=a").startswith("checkpoint: missing; give --checkpoint=DIR")
    assert refused(checkpoint).startswith("prompt: missing; give --prompt, ")
    assert "no such flag (did you mean 'prompt'?)" in refused(checkpoint, "--promt=a")
    option = refused(
        checkpoint, "--prompt=a", "--method=prompt_lookup", "--method_option", "max_ngrams=2"
    )
    assert "has no option 'max_ngrams' (did you mean 'max_ngram'?)" in option
    twice = ["--method_option=num_draft=1", "--method_option=num_draft=2"]
    assert "'num_draft' is given twice" in refused(checkpoint, "--prompt=a", *twice)
    status, out, err = run(checkpoint, "--prompt=a", "--num_samples=2", "--stream")
    assert (status, out) == (2, "")
    assert err == "error: stream: 2 rows; allowed: one prompt and one sample\n"
    # Text needs a tokeniser, and 97 tokens are too few for bytes.
    said = refused(f"--checkpoint={directories.plain}", "--prompt=a")
    assert "pass ids with --prompt_ids" in said


def test_bad_prompts_files(refused, directories, tmp_path):
    file = tmp_path / "prompts.jsonl"
    for content, said in (
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": 1}', "line 2: prompt: text is needed"),
        ("{", "line 1: not JSON"),
    ):
        file.write_text(content)
        assert said in refused(f"--checkpoint={directories.target}", f"--prompts_file={file}")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def garble(directory):
    path = directory / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def pickle_only(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"not even looked at")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "is not a directory"),
        (lambda d: (d / "config.json").unlink(), "config.json: missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lambda d: edit_config(d, model_type="lama"), "did you mean 'llama'"),
        (
            lambda d: edit_tensors(d, lambda t: t.pop(NORM)),
            f"tensor {NORM!r} of shape (16,) is mis",
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update(extra=np.zeros(3, np.float32))),
            "unexpected tensor 'extra' of shape (3,)",
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({NORM: np.ones(15, np.float32)})),
            f"tensor {NORM!r} has shape (15,); expected (16,)",
        ),
        (truncate, "truncated or corrupt safetensors"),
        (garble, "truncated or corrupt safetensors"),
        (pickle_only, "unpickling can run any code"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "corrupt tokenizer"),
    ],
)
@pytest.mark.parametrize("role", ["checkpoint", "draft"])
def test_bad_checkpoints(refused, directories, tmp_path, role, damage, said):
    copy = shutil.copytree(directories.target, tmp_path / "damaged")
    damage(copy)
    other = {"checkpoint": "draft", "draft": "checkpoint"}[role]
    message = refused(
        f"--{role}={copy}", f"--{other}={directories.draft}", "--method=speculative_sampling",
        "--prompt=a",
    )  # fmt: skip
    assert said in message
    assert str(copy) in message


def test_vocabularies_that_differ(refused, directories, tmp_path):
    arguments = [
        f"--checkpoint={directories.target}", "--method=speculative_sampling", "--prompt_ids=1",
    ]  # fmt: skip
    said = refused(*arguments, f"--draft={directories.plain}")
    assert said.startswith(f"draft: {directories.plain} has vocab_size 97, the target ")
    assert said.endswith(" 280; they must be equal")
    # As many tokens, but others.
    edit = json.loads((directories.target / "tokenizer.json").read_text())
    tokens = edit["model"]["vocab"]
    first, second = sorted(tokens, key=tokens.__getitem__)[10:12]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    swapped = shutil.copytree(directories.target, tmp_path / "swapped")
    (swapped / "tokenizer.json").write_text(json.dumps(edit))
    said = refused(*arguments, f"--draft={swapped}")
    assert said.startswith(
        f"draft: token 10 is {second!r} in {swapped} and {first!r} in the target"
    )


def test_trained_parts_are_refused_for_every_method_without_them():
    for method, spec in methods.METHODS.items():
        if spec.parts:
            continue
        assert method_parts.load_method_params(method, None, False) == {}
        refused = [(None, True)]
        if method not in method_parts.MEMORIES:  # what a method has learned is not a trained part
            refused.append((Path("parts"), False))
        for parts in refused:
            with pytest.raises(InputError, match=f"method {method} has no trained parts"):
                method_parts.load_method_params(method, *parts)
