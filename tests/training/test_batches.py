"""Packed batches against a naive reference; positions that resume; bytes; sharding."""

import collections
import hashlib
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from models.errors import InputError
from training import batches
from training import tokenizers as tokenizer_training
from training.batches import TokenizedDocuments, eval_batches, train_batches
from training.datasets import registry

FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_mask": np.float32,
    "target_bytes": np.int32,
}


class Bytes:
    """UTF-8 bytes as token ids, 256 for EOS; counts how often each text was tokenised."""

    vocab_size = 257
    eos_ids = (256,)

    def __init__(self):
        self.counts = collections.Counter()

    def encode(self, text):
        self.counts[text] += 1
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class Bpe:
    """A `tokenizers.Tokenizer` as the protocol of `training.batches`."""

    def __init__(self, bpe):
        self.bpe = bpe
        self.vocab_size = bpe.get_vocab_size()
        self.eos_ids = (bpe.token_to_id("<|endoftext|>"),)

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(list(ids))


def _examples(count, longest, seed=0):
    """Documents of 0 to `longest` characters, all different."""
    rng = random.Random(seed)
    letters = "abcdefghij klmnop"
    texts = [
        f"{i}:" + "".join(rng.choices(letters, k=rng.randint(0, longest))) for i in range(count)
    ]
    return [{"text": text} for text in ["", *texts]]


def _documents(count=60, longest=90, seed=0):
    return TokenizedDocuments(_examples(count, longest, seed), Bytes())


def _windows(text, seq_len):
    """The naive reference: (tokens, targets, mask) of a document's windows."""
    tokens = [*text.encode(), 256] if text else []
    targets, mask = [*tokens[1:], 0], [1] * (len(tokens) - 1) + [0]
    return [
        tuple(tuple(values[i : i + seq_len]) for values in (tokens, targets, mask))
        for i in range(0, len(tokens), seq_len)
    ]


def _first_fit(windows, seq_len, num_rows):
    """Rows of windows: each in the first row with room, all rows emitted when there is none."""
    emitted, rows = [], []
    for window in windows:
        row = next((r for r in rows if sum(len(w[0]) for w in r) + len(window[0]) <= seq_len), None)
        if row is None and len(rows) == num_rows:
            emitted, rows = emitted + rows, []
        if row is None:
            rows.append(row := [])
        row.append(window)
    return emitted + rows


def _segments(batch):
    """(tokens, targets, mask) of every segment of a batch, checking the layout of its rows."""
    found = []
    for row in range(len(batch["tokens"])):
        fields = {name: values[row] for name, values in batch.items()}
        ids = fields["segment_ids"]
        used = int((ids > 0).sum())
        assert (ids[:used] > 0).all()  # padding comes last
        for name in FIELDS:
            assert not fields[name][used:].any()
        for segment in range(1, ids.max(initial=0) + 1):
            at = np.flatnonzero(ids == segment)
            assert at.size and (np.diff(at) == 1).all()
            np.testing.assert_array_equal(fields["positions"][at], np.arange(at.size))
            found.append(
                tuple(tuple(fields[n][at].tolist()) for n in ("tokens", "targets", "loss_mask"))
            )
    return found


def _equal(a, b):
    assert a.keys() == b.keys() == FIELDS.keys()
    for name in FIELDS:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_eval_batches_equal_the_naive_packing():
    examples, seq_len = _examples(400, 60), 16
    documents = TokenizedDocuments(examples, Bytes())
    windows = [window for e in examples for window in _windows(e["text"], seq_len)]
    num_rows = batches._MAX_PACKING_ROWS
    rows = _first_fit(windows, seq_len, num_rows)
    assert len(rows) < num_rows
    result = list(eval_batches(documents, batch_size=7, seq_len=seq_len))
    assert len(result) == -(-len(rows) // 7)
    for batch in result:
        assert {name: values.dtype.type for name, values in batch.items()} == FIELDS
        assert {values.shape for values in batch.values()} == {(7, seq_len)}
    packed = [_segments({n: v[i : i + 1] for n, v in b.items()}) for b in result for i in range(7)]
    padding = len(packed) - len(rows)
    assert packed == rows + [[]] * padding


def test_packing_in_several_groups(monkeypatch):
    monkeypatch.setattr(batches, "_PACKING_TOKENS", 1)
    examples, seq_len = _examples(200, 60), 32
    windows = [window for e in examples for window in _windows(e["text"], seq_len)]
    rows = _first_fit(windows, seq_len, batches._MIN_PACKING_ROWS)
    assert len(rows) > 5 * batches._MIN_PACKING_ROWS
    documents = TokenizedDocuments(examples, Bytes())
    result = list(eval_batches(documents, batch_size=1, seq_len=seq_len))
    assert [_segments(batch) for batch in result] == rows


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_window_once(shuffle):
    seq_len = 32
    examples = _examples(100, 80)
    documents = TokenizedDocuments(examples, Bytes())
    expected = collections.Counter(w for e in examples for w in _windows(e["text"], seq_len))
    options = {"batch_size": 4, "seq_len": seq_len, "shuffle": shuffle, "num_epochs": 1}
    result = list(train_batches(documents, **options))
    assert collections.Counter(w for b in result for w in _segments(b)) == expected
    twice = train_batches(documents, **{**options, "num_epochs": 2})
    counts = collections.Counter(w for b in twice for w in _segments(b))
    assert counts == {window: 2 * count for window, count in expected.items()}


def test_shuffling_depends_on_seed_and_epoch_alone(monkeypatch):
    monkeypatch.setattr(batches, "_PACKING_TOKENS", 1)  # groups of 16 rows
    examples = [{"text": f"{i:03}"} for i in range(64)]  # with EOS, each fills a row

    def epochs(seed, shuffle=True):
        documents = TokenizedDocuments(examples, Bytes())
        options = {"batch_size": 64, "seq_len": 4, "seed": seed, "shuffle": shuffle}
        iterator = train_batches(documents, **options)
        return [next(iterator)["tokens"][:, :3].tolist() for _ in range(2)]

    first, second = epochs(1)
    in_order = [list(e["text"].encode()) for e in examples]
    assert sorted(first) == sorted(second) == in_order
    assert first != in_order != second
    # Documents are shuffled, not just the rows of each group, and anew in each epoch.
    groups = [sorted(epoch[:16]) for epoch in (first, second, epochs(2)[0], in_order)]
    assert len({str(group) for group in groups}) == 4
    assert epochs(1) == [first, second]
    assert epochs(1, shuffle=False) == [in_order, in_order]


@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_continues_with_the_same_batches(shuffle, monkeypatch):
    monkeypatch.setattr(batches, "_PACKING_TOKENS", 1)  # groups of 16 rows, so several an epoch
    options = {"batch_size": 3, "seq_len": 32, "seed": 5, "shuffle": shuffle}
    iterator = train_batches(_documents(), **options)
    states, expected = [json.dumps(iterator.get_state())], []
    for _ in range(90):  # some three epochs
        expected.append(next(iterator))
        states.append(json.dumps(iterator.get_state()))
    documents = _documents()
    for start in range(85):
        resumed = train_batches(documents, **options)
        for _ in range(start % 3):
            next(resumed)  # what was read before makes no difference
        resumed.set_state(json.loads(states[start]))
        for step in range(start, start + 5):
            _equal(next(resumed), expected[step])
            assert json.dumps(resumed.get_state()) == states[step + 1]


def test_resuming_at_the_end_of_the_data():
    options = {"batch_size": 4, "seq_len": 32, "num_epochs": 1}
    iterator = train_batches(_documents(), **options)
    expected = []
    states = [iterator.get_state()]
    for batch in iterator:
        expected.append(batch)
        states.append(json.loads(json.dumps(iterator.get_state())))
    for start in (0, len(expected) - 1, len(expected)):
        resumed = train_batches(_documents(), **options)
        resumed.set_state(states[start])
        rest = list(resumed)
        assert len(rest) == len(expected) - start
        for a, b in zip(rest, expected[start:], strict=True):
            _equal(a, b)


RESUME = """
import hashlib, json, sys
import tokenizers
from training.batches import TokenizedDocuments, train_batches
from training.datasets import registry

class Bpe:
    def __init__(self, bpe):
        self.bpe = bpe
        self.vocab_size = bpe.get_vocab_size()
        self.eos_ids = (0,)
    def encode(self, text):
        return self.bpe.encode(text).ids
    def decode(self, ids):
        return self.bpe.decode(list(ids))

folder, state, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
examples = registry.load("arithmetic", "train", data_dir=folder, size=200)
tokenizer = Bpe(tokenizers.Tokenizer.from_file(folder + "/tokenizer.json"))
documents = TokenizedDocuments(examples, tokenizer, loss_on="response")
iterator = train_batches(documents, batch_size=4, seq_len=64, seed=9)
iterator.set_state(state)
digest = hashlib.sha256()
for _ in range(steps):
    batch = next(iterator)
    for name in sorted(batch):
        digest.update(batch[name].tobytes())
print(digest.hexdigest())
"""


def test_resuming_in_another_process(tmp_path):
    examples = registry.load("arithmetic", "train", data_dir=tmp_path, size=200)
    bpe = tokenizer_training.train_bpe((e["text"] for e in examples), 300)
    tokenizer_training.save(bpe, tmp_path)
    documents = TokenizedDocuments(examples, Bpe(bpe), loss_on="response")
    iterator = train_batches(documents, batch_size=4, seq_len=64, seed=9)
    for _ in range(70):
        next(iterator)
    command = [sys.executable, "-c", RESUME, str(tmp_path), json.dumps(iterator.get_state()), "40"]
    digest = hashlib.sha256()
    for _ in range(40):
        batch = next(iterator)
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.stdout.strip() == digest.hexdigest(), other.stderr


def test_loss_on_the_response_alone(tmp_path):
    examples = list(registry.load("arithmetic", "train", data_dir=tmp_path, size=60))
    documents = TokenizedDocuments(examples, Bytes(), loss_on="response")
    learned = collections.Counter()
    for seq_len in (512, 16):  # whole problems, and cut ones
        learned.clear()
        texts = []
        for batch in eval_batches(documents, batch_size=2, seq_len=seq_len):
            for tokens, targets, mask in _segments(batch):
                texts.append((tokens, [t for t, m in zip(targets, mask, strict=True) if m]))
        if seq_len == 512:
            answers = [bytes(targets[:-1]).decode() for _, targets in texts]
            assert sorted(answers) == sorted(e["solution"] for e in examples)
            assert all(targets[-1] == 256 for _, targets in texts)
            whole = [bytes(tokens[:-1]).decode() for tokens, _ in texts]
            assert sorted(whole) == sorted(e["text"] for e in examples)
        total = sum(len(targets) for _, targets in texts)
        assert total == sum(len(e["solution"]) + 1 for e in examples)


def test_documents_are_tokenised_once(monkeypatch):
    tokenizer = Bytes()
    examples = _examples(50, 40)
    documents = TokenizedDocuments(examples, tokenizer)
    for seed in range(2):
        options = {"batch_size": 4, "seq_len": 32, "seed": seed, "num_epochs": 3}
        list(train_batches(documents, **options))
    list(eval_batches(documents, batch_size=4, seq_len=16))
    assert {tokenizer.counts[e["text"]] for e in examples} == {1}
    # A corpus that is too large to keep is tokenised again, with the same result.
    monkeypatch.setattr(batches, "_MAX_CACHED_TOKENS", 500)
    large = TokenizedDocuments(examples, tokenizer)
    a, b = (train_batches(d, batch_size=4, seq_len=32, num_epochs=2) for d in (documents, large))
    for x, y in zip(a, b, strict=True):
        _equal(x, y)
    assert max(tokenizer.counts[e["text"]] for e in examples) == 3
    assert 2 in {tokenizer.counts[e["text"]] for e in examples}


@pytest.mark.parametrize(
    "make", [Bytes, lambda: Bpe(tokenizer_training.train_bpe(["ab été"], 270))]
)
def test_target_bytes_are_the_bytes_of_the_text(make):
    tokenizer = make()
    texts = ["plain text", "naïve café", "東京は夜の七時", "🙂🙂 ok", "x", " lead"]
    documents = TokenizedDocuments([{"text": text} for text in texts], tokenizer)
    for text, document in zip(texts, documents, strict=True):
        assert document["token_bytes"].sum() == len(text.encode())
        assert document["token_bytes"][-1] == 0  # EOS
        ids, sizes = document["tokens"][:-1], document["token_bytes"][:-1]
        assert tokenizer.decode(ids.tolist()) == text
        if isinstance(tokenizer, Bytes):
            assert (sizes == 1).all()
        if text.isascii():
            assert [tokenizer.decode([i]) for i in ids] == _split(text, sizes)
    batch = next(iter(eval_batches(documents, batch_size=1, seq_len=256)))
    first = [int(document["token_bytes"][0]) for document in documents]
    assert batch["target_bytes"].sum() == sum(len(t.encode()) for t in texts) - sum(first)
    assert not batch["target_bytes"][batch["loss_mask"] == 0].any()


def _split(text, sizes):
    ends = np.cumsum(sizes)
    return [text[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def test_target_bytes_with_a_decoder_that_strips_a_leading_space():
    class Words:
        vocab_size, eos_ids = 100, ()

        def __init__(self):
            self.words = ["a", " b", " longer"]

        def encode(self, text):
            return [self.words.index("a")] + [self.words.index(f" {w}") for w in text.split()[1:]]

        def decode(self, ids):
            return "".join(self.words[i] for i in ids).removeprefix(" ")

    (document,) = TokenizedDocuments([{"text": "a b longer b"}], Words())
    assert document["tokens"].tolist() == [0, 1, 2, 1]  # and no EOS
    assert document["token_bytes"].tolist() == [1, 2, 7, 2]


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_batches_are_the_same_with_any_number_of_processes(shards, count, monkeypatch):
    monkeypatch.setattr(batches, "_PACKING_TOKENS", 1)  # groups of 16 rows
    sizes = {"batch_size": 8, "seq_len": 32, "seed": 5, "shards": shards}
    whole = train_batches(_documents(), process_index=0, process_count=1, **sizes)
    sources = [_documents() for _ in range(count)]
    parts = [
        train_batches(source, process_index=i, process_count=count, **sizes)
        for i, source in enumerate(sources)
    ]
    for _ in range(16):
        shares = [next(part) for part in parts]
        together = {name: np.concatenate([s[name] for s in shares]) for name in FIELDS}
        _equal(together, next(whole))
    if shards >= count:  # a process has read its own shards' documents only
        assert sum(len(source._cache) for source in sources) == len(sources[0])
    # Where one of so many had come to, another number goes on.
    states = [part.get_state() for part in parts]
    state = states[0]
    if shards > 1:
        state = {"shards": {n: s for one in states for n, s in one["shards"].items()}}
    other = train_batches(_documents(), process_index=1, process_count=2, **sizes)
    other.set_state(json.loads(json.dumps(state)))
    _equal(next(other), {name: value[4:] for name, value in next(whole).items()})


def test_shards_share_out_the_documents():
    def segments(shards):
        found = train_batches(_documents(), batch_size=6, seq_len=128, num_epochs=1, shards=shards)
        return collections.Counter(w for batch in found for w in _segments(batch))

    # Nothing twice; the end of a shard may come a few batches before that of another.
    assert segments(3) <= segments(1)
    assert segments(3).total() > segments(1).total() // 2


def test_evaluation_is_the_same_with_any_number_of_processes():
    whole = list(eval_batches(_documents(), batch_size=6, seq_len=32))
    parts = [
        list(eval_batches(_documents(), batch_size=6, seq_len=32, process_index=i, process_count=3))
        for i in range(3)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        together = {name: np.concatenate([s[name] for s in shares]) for name in FIELDS}
        _equal(together, batch)


def test_evaluation_can_be_iterated_again():
    evaluation = eval_batches(_documents(), batch_size=4, seq_len=32)
    for a, b in zip(evaluation, evaluation, strict=True):
        _equal(a, b)


def test_little_padding_and_fast_enough(tmp_path):
    examples = list(registry.load("stdlib_code", "validation", data_dir=tmp_path))
    bpe = tokenizer_training.train_bpe((e["text"] for e in examples), 1024)
    documents = TokenizedDocuments(examples, Bpe(bpe))
    iterator = train_batches(documents, batch_size=16, seq_len=256, num_epochs=2)
    start, used, slots = time.perf_counter(), 0, 0
    for batch in iterator:
        used += int((batch["segment_ids"] > 0).sum())
        slots += batch["tokens"].size
    rate = slots / (time.perf_counter() - start)
    assert slots > 200_000
    assert used / slots > 0.97
    assert rate > 50_000, f"{rate:.0f} tokens/s"


def test_errors():
    documents = _documents(count=5)

    def train(**options):
        return train_batches(documents, **{"batch_size": 2, "seq_len": 8, **options})

    for field in ("batch_size", "seq_len", "process_count", "num_epochs"):
        with pytest.raises(InputError, match=f"{field}: 0 must be at least 1"):
            train(**{field: 0})
    with pytest.raises(InputError, match="process_index: 2 must be"):
        train(process_index=2, process_count=2)
    with pytest.raises(InputError, match="batch_size: 2 must be a multiple of the 3 processes"):
        train(process_index=0, process_count=3)
    with pytest.raises(InputError, match="batch_size: 2 must be a multiple of the 3 shards"):
        train(shards=3)
    with pytest.raises(InputError, match="shards: 3 must be a multiple or a divisor of the 2 proc"):
        train(shards=3, process_index=0, process_count=2)
    with pytest.raises(InputError, match="shards: 7 cannot share 6 documents"):
        train(shards=7, batch_size=7)
    with pytest.raises(InputError, match="seed: -1 must be"):
        train(seed=-1)
    with pytest.raises(InputError, match="batch_size: 0"):
        eval_batches(documents, batch_size=0, seq_len=8)
    with pytest.raises(InputError, match=r"loss_on: 'responce' .*did you mean 'response'"):
        TokenizedDocuments([{"text": "a"}], Bytes(), loss_on="responce")
    with pytest.raises(InputError, match="needs the field 'question', which is not among text"):
        TokenizedDocuments([{"text": "a"}], Bytes(), loss_on="response")
    with pytest.raises(InputError, match="no examples"):
        TokenizedDocuments([], Bytes())
    small = Bytes()
    small.vocab_size = 100
    with pytest.raises(InputError, match="token id 122; its vocab_size is 100"):
        TokenizedDocuments([{"text": "az"}], small)[0]
