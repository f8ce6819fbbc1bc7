import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models import sharding
from models.errors import InputError
from training import checkpoints

# tensorstore's threads fail a little later than the call that is tested.
late_failures = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _state(seed=0, size=64):
    values = np.random.default_rng(seed).normal(size=(size, 16)).astype(np.float32)
    return {
        "step": jnp.int32(seed),
        "params": {"lm_head": {"kernel": jnp.asarray(values)}},
        "key": jax.random.key(seed),
    }


def _template(state, mesh=None):
    places = sharding.tree_shardings(state, mesh or sharding.make_mesh())
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def checkpointer(tmp_path):
    with contextlib.closing(checkpoints.Checkpointer(tmp_path)) as opened:
        yield opened


def _reopen(tmp_path):
    return contextlib.closing(checkpoints.Checkpointer(tmp_path))


def test_state_data_position_and_metrics_come_back(tmp_path, checkpointer):
    state = _state(3)
    position = {"epoch": 1, "readers": [1, 2, None]}
    checkpointer.save(7, state, position, {"eval_loss": 1.5, "eval_bits_per_byte": 2.0})
    with _reopen(tmp_path) as again:
        found = again.restore(_template(state))
    assert found.step == 7
    assert found.data_state == position
    assert found.metrics == {"eval_loss": 1.5, "eval_bits_per_byte": 2.0}
    _assert_same(found.state, state)


def test_nothing_to_restore(checkpointer):
    assert checkpointer.restore(_template(_state())) is None


def test_restores_onto_other_meshes(checkpointer):
    assert jax.device_count() >= 8, "tests/conftest.py asks for 8 simulated devices"
    wide = sharding.make_mesh(2, 4)
    state = _state(5)
    checkpointer.save(1, state, {}, None)
    spread = checkpointer.restore(_template(state, wide)).state
    kernel = spread["params"]["lm_head"]["kernel"]
    assert kernel.sharding.mesh.shape == {"data": 2, "model": 4}
    assert kernel.addressable_shards[0].data.shape == (64, 4)
    _assert_same(spread, state)
    checkpointer.save(2, spread, {}, None)
    _assert_same(checkpointer.restore(_template(state)).state, state)


def test_keeps_the_newest_and_the_best(tmp_path, checkpointer):
    measured = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: 2.5}
    for step, loss in measured.items():
        checkpointer.save(step, _state(), {}, loss and {"eval_loss": loss})
    assert checkpointer.steps == [2, 5, 6]
    assert checkpointer.best_step == 2
    with _reopen(tmp_path) as again:
        assert again.best_step == 2
        again.save(7, _state(), {}, {"eval_loss": 0.5})
        assert again.steps == [6, 7]
        assert again.best_step == 7


def _truncate(directory):
    """What a copy that was cut off looks like."""
    for file in directory.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            os.truncate(file, file.stat().st_size // 2)


def _lose_the_state(directory):
    for file in directory.joinpath("state").rglob("*"):
        if file.is_file():
            file.unlink()


@pytest.mark.parametrize("damage", [_truncate, _lose_the_state])
def test_goes_back_to_the_newest_whole_checkpoint(tmp_path, checkpointer, damage):
    for step in (1, 2):
        checkpointer.save(step, _state(step), {"at": step}, None)
    damage(tmp_path / "checkpoints" / "2")
    with _reopen(tmp_path) as again:
        found = again.restore(_template(_state()))
        assert (found.step, found.data_state) == (1, {"at": 1})
        _assert_same(found.state, _state(1))
        # The step can be written again, and the damaged files are still there to look at.
        again.save(2, _state(20), {"at": 2}, None)
        _assert_same(again.restore(_template(_state())).state, _state(20))
    assert list((tmp_path / "unreadable_checkpoints").iterdir())


@late_failures
def test_says_so_when_no_checkpoint_is_whole(tmp_path, checkpointer):
    checkpointer.save(4, _state(), {}, None)
    _truncate(tmp_path / "checkpoints" / "4")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read; that of step 4"):
        checkpointer.restore(_template(_state()))
    assert checkpointer.steps == [4]


def test_a_save_that_was_killed_leaves_no_checkpoint(tmp_path, checkpointer):
    checkpointer.save(1, _state(1), {}, None)
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_text("half")
    with _reopen(tmp_path) as again:
        assert again.steps == [1]
        again.save(2, _state(2), {}, None)
        _assert_same(again.restore(_template(_state())).state, _state(2))
    assert not half.exists()


@contextlib.contextmanager
def _small_files(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@late_failures
def test_failed_write_keeps_the_older_checkpoint(tmp_path, checkpointer, capfd):
    # Many arrays, so that many threads fail at once.
    old, new = ({str(i): _state(i, size) for i in range(20)} for size in (512, 4096))
    checkpointer.save(1, old, {"at": 1}, None)
    with (
        _small_files(100_000),
        pytest.raises(InputError) as failure,
    ):
        checkpointer.save(2, new, {"at": 2}, None)
    message = str(failure.value)
    assert "\n" not in message
    assert str(tmp_path / "checkpoints") in message
    assert os.strerror(errno.EFBIG) in message
    assert message.endswith("the checkpoint of step 1 is kept")
    assert not capfd.readouterr().err
    with _reopen(tmp_path) as again:
        assert again.steps == [1]
        _assert_same(again.restore(_template(old)).state, old)


def test_full_disk_is_named(tmp_path, checkpointer, monkeypatch):
    checkpointer.save(1, _state(1), {}, None)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    message = r"step 2 in .*: No space left on device; .*step 1 is kept"
    with pytest.raises(InputError, match=message):
        checkpointer.save(2, _state(2), {}, None)
    monkeypatch.undo()
    _assert_same(checkpointer.restore(_template(_state())).state, _state(1))


def test_errors_that_are_not_the_disks_are_not_hidden(checkpointer):
    with pytest.raises(Exception, match="object") as failure:
        checkpointer.save(1, {"bad": object()}, {}, None)
    assert not isinstance(failure.value, InputError)


def _lock(directory):
    with checkpoints.lock(directory):
        pass


def test_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cannot lock in {tmp_path}/file/run: "):
        _lock(tmp_path / "file" / "run")


def test_two_runs_cannot_share_a_directory(tmp_path):
    held = pytest.raises(InputError, match=f"in use by process {os.getpid()}")
    with checkpoints.lock(tmp_path), held:
        _lock(tmp_path)
    _lock(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    program = (
        "import fcntl, os, signal, sys\n"
        "file = open(sys.argv[1], 'a+')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write(str(os.getpid())); file.flush()\n"
        "print('held', flush=True); signal.pause()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(InputError, match=f"in use by process {holder.pid}"):
            _lock(tmp_path)
        holder.send_signal(signal.SIGKILL)
    with checkpoints.lock(tmp_path), (tmp_path / ".lock").open() as file:
        assert file.read() == str(os.getpid())
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_directory_belongs_to_one_config(tmp_path):
    config = {"model": {"num_layers": 2, "window": None, "local": (True, False)}, "seed": 0}
    checkpoints.claim(tmp_path, config)
    written = (tmp_path / "config.json").read_text()
    assert json.loads(written)["model"]["local"] == [True, False]
    checkpoints.claim(tmp_path, config)
    for changed, difference in [
        ({**config, "seed": 1}, "seed is 0 there and 1 here"),
        (
            {**config, "model": {**config["model"], "num_layers": 4}},
            "model.num_layers is 2 there and 4 here",
        ),
        ({**config, "remat": True}, "remat is 'absent' there and True here"),
        ({"model": config["model"]}, "seed is 0 there and 'absent' here"),
    ]:
        with pytest.raises(InputError) as failure:
            checkpoints.claim(tmp_path, changed)
        assert str(failure.value).endswith(difference)
        assert str(tmp_path) in str(failure.value)
    assert (tmp_path / "config.json").read_text() == written


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "value.json"
    checkpoints.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoints.write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
