"""Directories of safetensors: lazy reading, sharded atomic writing, every way to be broken."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from models import safetensors_io
from models.errors import InputError
from models.safetensors_io import INDEX, SINGLE, Reader, TensorToWrite

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"layer.{i}.weight": rng.normal(size=(4, 6)).astype(DTYPES[i % 3]) for i in range(7)
    } | {"bias": rng.normal(size=5).astype(np.float32)}


def write(directory, values, max_shard_bytes=10**6):
    tensors = [TensorToWrite(n, a.shape, a.dtype, lambda a=a: a) for n, a in values.items()]
    with safetensors_io.replacing(directory) as work:
        safetensors_io.write(work, tensors, max_shard_bytes)
        safetensors_io.write_json(work / "config.json", {"seed": len(values)})


def check(directory, values):
    with Reader(directory) as reader:
        assert set(reader.tensors) == set(values)
        for name, value in values.items():
            read = reader.read(name)
            assert read.dtype == value.dtype == reader.tensors[name].dtype
            assert read.tobytes() == value.tobytes()


@pytest.mark.parametrize("max_shard_bytes", [10**6, 200, 1])
def test_round_trip_in_any_number_of_shards(tmp_path, max_shard_bytes):
    values = arrays()
    write(tmp_path / "out", values, max_shard_bytes)
    check(tmp_path / "out", values)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {10**6: 1, 200: 3, 1: 8}[max_shard_bytes]
    assert (tmp_path / "out" / INDEX).exists() == (len(files) > 1)
    if max_shard_bytes > 1:
        for file in files:
            contents = safetensors.numpy.load_file(file)
            assert sum(a.nbytes for a in contents.values()) <= max_shard_bytes


def test_torch_reads_what_is_written(tmp_path):
    values = arrays()
    write(tmp_path / "out", values)
    for name, tensor in safetensors.torch.load_file(tmp_path / "out" / SINGLE).items():
        as_bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert as_bytes == values[name].tobytes()


def test_slices(tmp_path):
    values = arrays()
    write(tmp_path / "out", values)
    with Reader(tmp_path / "out") as reader:
        for name in ("layer.0.weight", "layer.2.weight"):
            part = reader.read(name, (slice(1, 3), slice(2, 6)))
            np.testing.assert_array_equal(part, values[name][1:3, 2:6])


def test_unsupported_dtype_is_named_when_read(tmp_path):
    safetensors.numpy.save_file({"ids": np.arange(3)}, tmp_path / SINGLE)
    with (
        Reader(tmp_path) as reader,
        pytest.raises(InputError, match=r"'ids' is stored as I64; allowed: BF16, F16, F32"),
    ):
        reader.read("ids")


def one_line(excinfo) -> str:
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def failure(directory) -> str:
    with pytest.raises(InputError) as excinfo:
        Reader(directory)
    return one_line(excinfo)


def test_missing_directory(tmp_path):
    assert "'" + str(tmp_path / "nope") + "' is not a directory" in failure(tmp_path / "nope")


def test_no_weights(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    message = failure(tmp_path)
    assert SINGLE in message and "found adapter_model.safetensors" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"w": torch.zeros(2)}, tmp_path / name)
    message = failure(tmp_path)
    assert name in message and "unpickling can run any code" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_file(tmp_path, keep):
    write(tmp_path / "out", arrays())
    path = tmp_path / "out" / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path}: truncated or corrupt safetensors file" in failure(tmp_path / "out")


def test_corrupt_header(tmp_path):
    write(tmp_path / "out", arrays())
    path = tmp_path / "out" / SINGLE
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    assert "truncated or corrupt" in failure(tmp_path / "out")


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def test_broken_indices(tmp_path):
    out = tmp_path / "out"

    def broken(change) -> str:
        write(out, arrays(), 200)
        edit_index(out, change)
        return failure(out)

    first = "model-00001-of-00003.safetensors"
    last = "model-00003-of-00003.safetensors"
    assert "weight_map must be an object" in broken(lambda index: index.pop("weight_map"))
    message = broken(lambda index: index["weight_map"].update({"layer.0.weight": last}))
    assert f"'layer.0.weight' is not in {last}" in message
    message = broken(lambda index: index["weight_map"].update({"layer.99.weight": first}))
    assert f"'layer.99.weight' is not in {first}" in message and "did you mean" in message
    message = broken(lambda index: index["weight_map"].update({"bias": "../x.safetensors"}))
    assert "'../x.safetensors'; allowed: a file of this directory" in message
    write(out, arrays(), 200)
    (out / INDEX).write_text("{")
    assert "not readable as JSON" in failure(out)


def test_missing_shard(tmp_path):
    write(tmp_path / "out", arrays(), 200)
    (tmp_path / "out" / "model-00002-of-00003.safetensors").unlink()
    assert "'model-00002-of-00003.safetensors', which is missing" in failure(tmp_path / "out")


def test_tensor_in_two_shards(tmp_path):
    out = tmp_path / "out"
    write(out, arrays(), 200)
    second = out / "model-00002-of-00003.safetensors"
    contents = safetensors.numpy.load_file(second)
    contents["layer.0.weight"] = np.zeros((4, 6), np.float32)
    safetensors.numpy.save_file(contents, second)
    message = failure(out)
    assert "'layer.0.weight' is in two shards" in message and second.name in message


def test_bad_shard_size(tmp_path):
    with pytest.raises(InputError, match="max_shard_bytes: 0 must be at least 1"):
        write(tmp_path / "out", arrays(), 0)
    assert list(tmp_path.iterdir()) == []


def test_replaces_an_older_checkpoint_and_keeps_other_files(tmp_path):
    out = tmp_path / "out"
    write(out, arrays(0), 200)
    (out / "tokenizer.json").write_text("{}")
    (out / "generation_config.json").write_text("{}")
    (out / "notes").mkdir()
    newer = {"only": np.ones(3, np.float32)}
    write(out, newer)
    check(out, newer)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["config.json", SINGLE, "notes", "tokenizer.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refuses_to_replace_anything_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds 'thesis.tex' and no checkpoint"):
        write(tmp_path, arrays())
    with pytest.raises(InputError, match="is not a directory"):
        write(tmp_path / "thesis.tex", arrays())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_checkpoint(tmp_path, error):
    out = tmp_path / "out"
    write(out, arrays())

    def fail():
        raise error

    tensor = TensorToWrite("w", (2,), np.dtype(np.float32), fail)
    with pytest.raises(type(error)), safetensors_io.replacing(out) as work:
        safetensors_io.write(work, [tensor], 100)
    check(out, arrays())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A file size limit makes the write fail in the same place as a full disk would."""
    out = tmp_path / "out"
    write(out, arrays())
    program = textwrap.dedent(
        f"""
        import resource, signal
        import numpy as np
        from models import safetensors_io
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        big = np.zeros(50_000, np.float32)
        tensor = safetensors_io.TensorToWrite("big", big.shape, big.dtype, lambda: big)
        try:
            with safetensors_io.replacing({str(out)!r}) as work:
                safetensors_io.write(work, [tensor], 10**9)
        except safetensors_io.InputError as error:
            print(error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout and done.stdout.count("\n") == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000
    check(out, arrays())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_leaves_the_old_checkpoint(tmp_path):
    out = tmp_path / "out"
    write(out, arrays(), 200)
    program = textwrap.dedent(
        f"""
        import time
        import numpy as np
        from models import safetensors_io
        def make(i):
            if i == 3:
                print("half", flush=True)
                time.sleep(60)
            return np.full(4, i, np.float32)
        tensors = [
            safetensors_io.TensorToWrite(f"t{{i}}", (4,), np.dtype(np.float32), lambda i=i: make(i))
            for i in range(5)
        ]
        with safetensors_io.replacing({str(out)!r}) as work:
            safetensors_io.write(work, tensors, 16)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    check(out, arrays())


def test_unwritable_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "file" / "out", arrays())


def test_reading_is_lazy(tmp_path):
    """Opening a checkpoint reads headers only: a sparse gigabyte opens at once."""
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))
    start = time.perf_counter()
    with Reader(tmp_path) as reader:
        assert reader.read("w", (slice(1 << 20, (1 << 20) + 4),)).tolist() == [0, 0, 0, 0]
    assert time.perf_counter() - start < 2
