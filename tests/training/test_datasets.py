"""The tfds builders: disjoint stable splits, reproducible data, identity on disk, errors."""

import json
import pickle
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from models import files
from models.errors import InputError
from training.datasets import arithmetic, registry, text_files
from training.datasets.jsonl_prompts import read_prompts

SPLITS = ("train", "validation", "test")


def _all(name, data_dir, **options):
    return {s: list(registry.load(name, s, data_dir=data_dir, **options)) for s in SPLITS}


def _prepared(data_dir):
    return {path.parent for path in Path(data_dir).rglob("dataset_info.json")}


@pytest.fixture
def library(tmp_path):
    """A small folder shaped like a standard library, with what must be left out."""
    root = tmp_path / "library"
    for index in range(150):
        path = root / f"package{index % 7}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {index}\nVALUE = {index!r}\n")
    left_out = (
        "test/test_a.py", "package0/tests/test_b.py", "idlelib/idle_test/test_c.py",
        "site-packages/numpy/core.py", "package1/__pycache__/d.py", "package2/notes.txt",
    )  # fmt: skip
    for name in left_out:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left_out = True\n")
    (root / "latin.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (root / "empty.py").write_text("")
    return root


def test_stdlib_code_reads_each_file_once_and_leaves_out_tests(library, tmp_path):
    data = _all("stdlib_code", tmp_path / "data", root=str(library))
    expected = {
        f"package{i % 7}/module{i}.py": f"# module {i}\nVALUE = {i!r}\n" for i in range(150)
    }
    examples = [example for split in SPLITS for example in data[split]]
    assert {e["path"]: e["text"] for e in examples} == expected
    assert len(examples) == len(expected)  # so no two splits share a file
    assert 120 < len(data["train"]) < 146
    assert all(data[split] for split in SPLITS)
    for split in SPLITS:
        paths = [example["path"] for example in data[split]]
        assert paths == sorted(paths)


def test_stdlib_code_prepared_twice_is_equal_and_adding_a_file_moves_no_other(library, tmp_path):
    first = _all("stdlib_code", tmp_path / "a", root=str(library))
    assert _all("stdlib_code", tmp_path / "b", root=str(library)) == first
    (library / "added.py").write_text("added = 1\n")
    second = _all("stdlib_code", tmp_path / "a", root=str(library))
    assert sum(len(second[s]) for s in SPLITS) == 151
    for split in SPLITS:
        assert [e for e in second[split] if e["path"] != "added.py"] == first[split]
    assert len(_prepared(tmp_path / "a")) == 2


def test_stdlib_code_of_this_python(tmp_path):
    data = _all("stdlib_code", tmp_path)
    root = Path(sysconfig.get_paths()["stdlib"])
    sizes = {split: sum(len(e["text"]) for e in data[split]) for split in SPLITS}
    assert sum(sizes.values()) > 5_000_000
    assert min(sizes.values()) > 100_000
    paths = [e["path"] for split in SPLITS for e in data[split]]
    assert len(set(paths)) == len(paths)
    assert {"json/decoder.py", "argparse.py"} <= set(paths)
    assert not [path for path in paths if re.search(r"(^|/)(test|tests|site-packages)/", path)]
    example = data["test"][0]
    assert example["text"] == (root / example["path"]).read_bytes().decode()


def test_arithmetic_answers_are_what_python_computes(tmp_path):
    data = _all("arithmetic", tmp_path, size=600, seed=3)
    examples = [example for split in SPLITS for example in data[split]]
    assert len(examples) == 600
    questions = {split: {e["question"] for e in data[split]} for split in SPLITS}
    assert len(set.union(*questions.values())) == 600  # all different, so splits are disjoint
    for example in examples:
        assert example["text"] == example["question"] + example["solution"]
        expression = re.fullmatch(r"Question: ([0-9+* -]+)\n\n", example["question"])[1]
        value = eval(expression)
        *steps, last = example["solution"].split("\n\n")
        assert last == f"Answer: {value}\n"
        assert example["answer"] == str(value)
        for step in steps:  # each step leaves an expression of the same value
            equation = re.fullmatch(r"Step \d+: (.+) = (-?\d+)(?:, leaving (.+))?", step)
            assert eval(equation[1]) == int(equation[2])
            assert eval(equation[3] or equation[2]) == value
        level = arithmetic.LEVELS[example["level"]]
        assert len(steps) == level.steps
        assert set(re.sub("[0-9 ]", "", expression)) <= set(level.operators)
    assert {e["level"] for e in examples} == {1, 2, 3, 4, 5}  # others are asked for by name


def test_arithmetic_is_deterministic_and_its_options_are_its_identity(tmp_path):
    options = {"size": 60, "levels": (1, 3), "seed": 5}
    first = _all("arithmetic", tmp_path / "a", **options)
    assert _all("arithmetic", tmp_path / "b", **options) == first
    assert _all("arithmetic", tmp_path / "a", **options) == first
    assert len(_prepared(tmp_path / "a")) == 1
    for change in ({"seed": 6}, {"size": 61}, {"levels": (1, 2)}):
        assert _all("arithmetic", tmp_path / "a", **{**options, **change}) != first
    assert len(_prepared(tmp_path / "a")) == 4


def test_sums_by_columns_are_worked_from_the_right():
    for level, digits in ((6, 3), (9, 6)):
        problem = arithmetic.make_problem(random.Random(level), level)
        left, right = map(int, re.findall(r"[0-9]+", problem["question"]))
        assert len(str(left)) == len(str(right)) == digits
        *steps, answer = problem["solution"].split(arithmetic.DELIMITER)
        assert answer == f"Answer: {left + right}\n"
        carry = 0
        for index, step in enumerate(steps):
            a, b = (n // 10**index % 10 for n in (left, right))
            assert step == f"{a}+{b}+{carry}={a + b + carry:02d}"
            carry = (a + b + carry) // 10
        assert len(steps) == digits
        assert arithmetic.check_answer(problem["text"], problem["answer"])


def test_check_answer():
    problem = arithmetic.make_problem(random.Random(0), 4)
    answer = problem["answer"]
    assert arithmetic.check_answer(problem["text"], answer)
    assert arithmetic.check_answer(problem["solution"], answer)
    assert not arithmetic.check_answer(problem["text"], str(int(answer) + 1))
    assert not arithmetic.check_answer(problem["question"], answer)
    # A model that runs on into another question is judged on the first.
    other = arithmetic.make_problem(random.Random(1), 4)
    assert arithmetic.extract_answer(problem["text"] + other["text"]) == answer
    assert arithmetic.extract_answer(problem["solution"] + other["text"]) == answer
    assert arithmetic.extract_answer("Answer: 1\n\nWait.\n\nAnswer:  -2 ") == "-2"
    assert arithmetic.check_answer("Answer: 007", "7")
    for text in ("", "Answer: ", "Answer: 7 apples", "The Answer: 7", "Answer: " + "9" * 5000):
        assert arithmetic.extract_answer(text) is None


def test_arithmetic_with_too_few_problems_says_so(tmp_path):
    with pytest.raises(InputError, match=r"^size: 100000 is more than level 1 has"):
        registry.load("arithmetic", "train", data_dir=tmp_path, size=100_000, levels=(1,))
    assert not _prepared(tmp_path)


def _write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def test_text_files_splits_share_no_file(tmp_path):
    for folder in ("x", "y"):
        _write(tmp_path / folder, **{f"f{i}": f"{folder} {i}" for i in range(40)})
    patterns = [str(tmp_path / "x" / "*.txt"), str(tmp_path / "**" / "f*.txt")]
    data = _all("text_files", tmp_path / "data", files=patterns)
    texts = {e["path"]: e["text"] for split in SPLITS for e in data[split]}
    assert texts == {f"{d}/f{i}.txt": f"{d} {i}" for d in "xy" for i in range(40)}
    assert sum(len(data[split]) for split in SPLITS) == 80
    assert all(data[split] for split in SPLITS)


@pytest.mark.parametrize("count", [3, 4, 11])
def test_text_files_leaves_no_split_empty(count):
    names = [f"part{i}.txt" for i in range(count)]
    assigned = text_files.assign_splits(names)
    assert set(assigned.values()) == set(SPLITS)
    assert sum(split != "train" for split in assigned.values()) <= max(2, count // 3)


@pytest.mark.parametrize(
    "text",
    ["".join(f"line {i} é\n" for i in range(400)), "x" * 997, "no end of line\n" * 40 + "end"],
)
def test_single_text_file_is_cut_by_position(tmp_path, text):
    _write(tmp_path, only=text)
    data = _all("text_files", tmp_path / "data", files=str(tmp_path / "only.txt"))
    parts = [data[split][0]["text"] for split in SPLITS]
    assert "".join(parts) == text  # contiguous, nothing lost, nothing twice
    assert 0.88 < len(parts[0]) / len(text) < 0.93
    if "\n" in text:
        assert parts[0].endswith("\n") and parts[1].endswith("\n")


def test_text_files_change_is_never_stale(tmp_path):
    _write(tmp_path, a="one", b="two", c="three")
    files, data_dir = str(tmp_path / "*.txt"), tmp_path / "data"
    before = _all("text_files", data_dir, files=files)
    _write(tmp_path, b="TWO")
    after = _all("text_files", data_dir, files=files)
    texts = [sorted(e["text"] for s in SPLITS for e in d[s]) for d in (before, after)]
    assert texts == [["one", "three", "two"], ["TWO", "one", "three"]]


def test_text_files_errors(tmp_path):
    with pytest.raises(InputError, match=r"files: '.*nothing\*' matches no file that has text"):
        registry.load("text_files", "train", files=str(tmp_path / "nothing*"))
    with pytest.raises(InputError, match=r"files: \[\] names no file"):
        registry.load("text_files", "train", files=[])
    (tmp_path / "binary.txt").write_bytes(b"ok \xff")
    with pytest.raises(InputError, match=r"binary.txt' is not UTF-8 text \(byte 3\)"):
        registry.load("text_files", "train", data_dir=tmp_path, files=str(tmp_path / "b*"))
    assert not _prepared(tmp_path)


def test_prompts(tmp_path):
    chat = [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": ""}]
    lines = [
        json.dumps({"prompt": "def f(", "id": "first", "answer": 3}),
        "",
        json.dumps({"messages": chat}, ensure_ascii=False),
        json.dumps({"prompt": " \n", "id": 7}),
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert read_prompts(path) == [
        {"id": "first", "prompt": "def f(", "answer": 3},
        {"id": "3", "messages": chat},
        {"id": "7", "prompt": " \n"},
    ]
    examples = list(registry.load("jsonl_prompts", "test", data_dir=tmp_path, path=str(path)))
    assert [(e["id"], e["prompt"]) for e in examples] == [
        ("first", "def f("),
        ("3", ""),
        ("7", " \n"),
    ]
    assert [e["messages"] and json.loads(e["messages"]) for e in examples] == ["", chat, ""]
    path.write_text('{"prompt": "changed"}')
    changed = registry.load("jsonl_prompts", "test", data_dir=tmp_path, path=str(path))
    assert [e["prompt"] for e in changed] == ["changed"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter"),
        (b"[1]", "a JSON object is needed, not list"),
        (b'{"text": "a"}', "exactly one of the fields 'prompt' and 'messages'"),
        (b'{"prompt": "a", "messages": []}', "exactly one of"),
        (b'{"prompt": ""}', "prompt: '' is empty"),
        (b'{"prompt": 3}', "prompt: text is needed, not int"),
        (b'{"prompt": "a", "id": 1.5}', "id: 1.5 must be text or an integer"),
        (b'{"prompt": "a", "id": "1"}', "id: '1' is also on line 1"),
        (b'{"messages": []}', "messages: a non-empty list is needed"),
        (b'{"messages": ["a"]}', r"messages\[0\]: an object"),
        (b'{"messages": [{"content": "a"}]}', r"messages\[0\].role: text is needed"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\].content: text is needed"),
        (b'{"prompt": "\xff"}', "not UTF-8 text"),
    ],
)
def test_bad_prompt_lines_are_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"p\.jsonl, line 3: {message}") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_prompt_files_without_prompts(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_prompts(tmp_path / "missing.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(tmp_path / "blank.jsonl")


def test_errors_of_load(tmp_path):
    def load(name, split="train", **options):
        return registry.load(name, split, data_dir=tmp_path, **options)

    with pytest.raises(InputError, match=r"'arithmetics' is not known \(did you mean 'arithmetic'"):
        load("arithmetics")
    with pytest.raises(InputError, match="'a folder/that is not there' is not known"):
        load("a folder/that is not there")
    with pytest.raises(InputError, match=r"sise: .* no such option \(did you mean 'size'\?\)"):
        load("arithmetic", sise=3)
    with pytest.raises(InputError, match="path: dataset 'jsonl_prompts' needs this option"):
        load("jsonl_prompts")
    with pytest.raises(InputError, match=r"levels: \[10\] must be some of"):
        load("arithmetic", levels=(10,))
    with pytest.raises(InputError, match="size: 0 must be at least 1"):
        load("arithmetic", size=0)
    with pytest.raises(InputError, match=r"root: .* is not a folder"):
        load("stdlib_code", root=str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"split: 'dev' .* allowed: test, train, validation"):
        load("arithmetic", "dev", size=100)
    with pytest.raises(InputError, match=r"split: 'train\[:0\]' .* has no examples"):
        load("arithmetic", "train[:0]", size=100)
    with pytest.raises(InputError, match=r"text_field: 'questoin' .*did you mean 'question'"):
        load("arithmetic", size=100, text_field="questoin")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="data_dir: cannot write"):
        registry.load("arithmetic", "train", data_dir=tmp_path / "file" / "x", size=30)
    # Public datasets are neither downloaded nor looked up unless asked for.
    with pytest.raises(InputError, match=r"'lm1b' is not prepared in .* download=True"):
        load("lm1b")
    with pytest.raises(InputError, match="looked up on the network"):
        load("huggingface:gsm8k")


def test_examples_are_a_sequence_that_pickles(tmp_path):
    examples = registry.load("arithmetic", "all", data_dir=tmp_path, size=30)
    assert len(examples) == 30 == len(list(examples))
    assert examples[-1] == examples[29]
    assert examples[2:4] == [examples[2], examples[3]]
    with pytest.raises(IndexError):
        examples[30]
    assert list(pickle.loads(pickle.dumps(examples))) == list(examples)


class TinyCorpus(tfds.core.GeneratorBasedBuilder):
    """Stands for a public dataset: made by code that tfds knows, with a field of its own."""

    VERSION = tfds.core.Version("2.0.0")
    url_infos = None

    def _info(self):
        features = tfds.features.FeaturesDict({"article": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from ((i, {"article": f"article {i}"}) for i in range(5))


READ_WITHOUT_CODE = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from training.datasets import registry
for name in ("tiny_corpus", "tiny_corpus:2.0.0", sys.argv[1] + "/tiny_corpus/2.0.0"):
    data = registry.load(name, "train[:3]", data_dir=sys.argv[1], text_field="article")
    assert [e["text"] for e in data] == ["article 0", "article 1", "article 2"], name
registry.load("arithmetic", "train", data_dir=sys.argv[1], size=40)
assert not [name for name in sys.modules if name.split(".")[0] == "tensorflow"]
print("read")
"""


def test_public_dataset_in_place(tmp_path):
    with pytest.raises(InputError, match="'tiny_corpus' is not prepared"):
        registry.load("tiny_corpus", "train", data_dir=tmp_path)
    data = registry.load(
        "tiny_corpus", "train", data_dir=tmp_path, text_field="article", download=True
    )
    assert data[4] == {"article": "article 4", "text": "article 4"}
    # Another process that has the files alone, no code, no TensorFlow and no network.
    command = [sys.executable, "-c", READ_WITHOUT_CODE, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.stdout.endswith("read\n"), output.stderr


def test_preparing_says_nothing_on_standard_output(tmp_path, capfd):
    registry.load("arithmetic", "train", data_dir=tmp_path, size=30)
    registry.load("tiny_corpus", "train", data_dir=tmp_path, download=True)
    assert capfd.readouterr().out == ""


PREPARE = """
import sys
from training.datasets import registry
sys.stdin.readline()
data = registry.load("arithmetic", "train", data_dir=sys.argv[1], size=3000)
print(len(data), sum(int(e["answer"]) for e in data))
"""


def test_two_processes_may_prepare_at_once(tmp_path):
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    data = registry.load("arithmetic", "train", data_dir=tmp_path / "alone", size=3000)
    expected = f"{len(data)} {sum(int(e['answer']) for e in data)}\n"
    assert outputs == [expected, expected]
    assert not list(tmp_path.rglob("*incomplete*"))


def test_losing_the_race_uses_the_winners_data(tmp_path, monkeypatch):
    """The rename of the second to finish fails, as it does on a folder that is not empty."""
    prepare = arithmetic.Arithmetic.download_and_prepare
    winners = []

    def overtaken(self, **kwargs):
        if not winners:
            winners.append(arithmetic.Arithmetic(size=40, data_dir=str(tmp_path)))
            split_generators = self._split_generators

            def while_we_generate(dl_manager):
                prepare(winners[0], **kwargs)
                return split_generators(dl_manager)

            self._split_generators = while_we_generate
        return prepare(self, **kwargs)

    monkeypatch.setattr(arithmetic.Arithmetic, "download_and_prepare", overtaken)
    raced = list(registry.load("arithmetic", "train", data_dir=tmp_path, size=40))
    assert winners
    alone = registry.load("arithmetic", "train", data_dir=tmp_path / "alone", size=40)
    assert raced == list(alone)
    assert not list(tmp_path.rglob("*incomplete*"))


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path))
    registry.load("arithmetic", "train", size=30)
    assert [p.relative_to(tmp_path).parts[:2] for p in _prepared(tmp_path)] == [
        ("datasets", "arithmetic")
    ]
    monkeypatch.delenv("TOKENLOOM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_root() == tmp_path / ".cache" / "tokenloom"
