"""Flags, errors, exit statuses and config files, as every program has them."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import cli
from models.errors import InputError


def program():
    """A program's flags; `main` of each test reads them."""
    values = flags.FlagValues()
    flags.DEFINE_integer("count", 1, "How many.", lower_bound=0, flag_values=values)
    flags.DEFINE_enum("kind", "a", ["a", "b"], "Which.", flag_values=values)
    flags.DEFINE_multi_string("word", [], "Words.", flag_values=values)
    flags.DEFINE_bool("loud", False, "Whether.", flag_values=values)
    return values


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program as `python -m` would: (exit status, standard output, standard error)."""

    def run(main, values, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.run_main(main, values)
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return run


def never(argv):
    raise AssertionError("the program ran")


def test_values_and_arguments_reach_the_program(run):
    values = program()

    def main(argv):
        print(argv[1:], values.count, values.word, values.loud)

    status, out, err = run(
        main, values, "--count=3", "--word", "x=y", "--word=-z", "--loud", "rest"
    )
    assert (status, out, err) == (0, "['rest'] 3 ['x=y', '-z'] True\n", "")


def test_a_second_run_starts_from_the_defaults(run):
    values = program()

    def main(argv):
        print(values.count, values.word)

    assert run(main, values, "--count=3", "--word=x", "--kind=wrong")[0] == 2
    assert run(main, values, "--word=y")[1] == "1 ['y']\n"
    assert run(main, values)[1] == "1 []\n"


def test_programs_may_have_flags_of_the_same_name(run):
    first, second = program(), program()
    assert run(lambda argv: print(first.count), first, "--count=5")[1] == "5\n"
    assert run(lambda argv: print(second.count), second)[1] == "1\n"


def test_bad_input_is_one_line_and_status_2(run):
    def main(argv):
        print("partial", end="")
        raise InputError("field: 'x\ny' is wrong")

    assert run(main, program()) == (2, "partial", "error: field: 'x y' is wrong\n")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--cuont=2", "--cuont: no such flag (did you mean 'count'?); see --help"),
        ("--nolod", "--nolod: no such flag (did you mean 'loud'?); see --help"),
        ("--zzzzzz", "--zzzzzz: no such flag; see --help"),
        ("--count=two", "--count=two: invalid literal for int() with base 10: 'two'; allowed: a"),
        ("--count=-1", "--count=-1: -1 is not a non-negative integer; allowed: a non-negative"),
        ("--kind=c", "--kind=c: value should be one of <a|b>"),
        ("--loud=maybe", "--loud=maybe: "),
        ("--count", "Missing value for flag --count"),
        ("--noloud=1", "--noloud=1 does not take an argument"),
    ],
)
def test_bad_flags(run, argument, said):
    status, out, err = run(never, program(), argument)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_arguments_that_are_not_flags_are_refused(run):
    status, _, err = run(cli.no_arguments, program(), "stray", "--count=2")
    assert (status, err.count("\n")) == (2, 1)
    assert "'stray'" in err


def test_interruption_and_defects(run):
    def interrupted(argv):
        raise KeyboardInterrupt

    def defective(argv):
        raise ValueError("a defect keeps its traceback")

    assert run(interrupted, program()) == (130, "", "interrupted\n")
    with pytest.raises(ValueError, match="keeps its traceback"):
        run(defective, program())


def test_exit_status_of_the_program_is_kept(run):
    assert run(lambda argv: 3, program())[0] == 3


def test_help(run):
    status, out, err = run(never, program(), "--help")
    assert (status, err) == (0, "")
    assert out.startswith(sys.modules[__name__].__doc__)
    for text in ("--count: How many.", "(default: '1')", "--[no]loud: Whether.", "<a|b>"):
        assert text in out


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.generate", "--list_methods"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, b"")


def test_flags_are_answered_without_jax():
    code = "import sys, experiments.generate; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_compilation_cache_follows_the_environment(monkeypatch, tmp_path):
    import jax

    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path))
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
        cli.use_compilation_cache()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        cli.use_compilation_cache()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jax")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("chips", [False, True])
def test_libtpu_without_a_tpu_is_left_alone(monkeypatch, tmp_path, chips):
    import jax

    before = jax.config.jax_platforms
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(cli, "ACCELERATORS", (str(tmp_path / "accel*"),))
    if chips:
        (tmp_path / "accel0").touch()
    try:
        cli.use_cpu_if_there_is_nothing_else()
        # Without the package there is nothing to keep from complaining.
        installed = importlib.util.find_spec("libtpu") is not None
        wanted = "cpu" if installed and not chips else None
        assert os.environ.get("JAX_PLATFORMS") == wanted
        monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
        cli.use_cpu_if_there_is_nothing_else()
        assert os.environ["JAX_PLATFORMS"] == "tpu,cpu"
    finally:
        jax.config.update("jax_platforms", before)
        os.environ.pop("JAX_PLATFORMS", None)


CONFIG = """
from ml_collections import ConfigDict
from models.errors import InputError

def get_config(preset="full"):
    if preset == "wrong":
        raise InputError("preset: 'wrong' is not known")
    if preset == "defect":
        raise ValueError("a defect")
    config = ConfigDict({"steps": 10, "name": preset})
    config.train = ConfigDict({"learning_rate": 0.1, "warm": True, "sizes": (1, 2)})
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run_config(run):
    values = flags.FlagValues()
    holder = cli.define_config(values, "The config.")

    def main(argv):
        config = holder.value
        print(config if config is None else config.to_json(sort_keys=True))
        with pytest.raises(AttributeError):
            config.new = 1  # locked

    def run_config(*arguments):
        return run(main, values, *arguments)

    run_config.flag = values["config"]
    return run_config


def test_config_overrides(run_config, config_file):
    status, out, err = run_config(
        f"--config={config_file}:small",
        "--config.steps=3",
        "--noconfig.train.warm",
        "--config.train.learning_rate=1e-3",
        "--config.train.sizes=(4, 5)",
    )
    assert (status, err) == (0, "")
    train = {"learning_rate": 0.001, "sizes": (4, 5), "warm": False}
    assert (
        ConfigDict({"steps": 3, "name": "small", "train": train}).to_json(sort_keys=True)
        == out[:-1]
    )
    assert config_flags.get_config_filename(run_config.flag) == f"{config_file}:small"
    # Nothing of that is left for the next run.
    _, out, _ = run_config("--config", str(config_file), "--config.steps=4")
    assert '"steps": 4' in out
    assert '"warm": true' in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.step=1"], "--config.step: no field 'step' (did you mean 'steps'?); allowed: "),
        (["--config.train.learningrate=1"], "(did you mean 'train.learning_rate'?); allowed: "),
        (["--config.learning_rate=1"], "(did you mean 'train.learning_rate'?); allowed: name, "),
        (["--noconfig.train.wram"], "--config.train.wram: no field 'wram' (did you mean 'train.wa"),
        (["--config.steps=many"], "--config.steps=many: invalid literal for int()"),
        (["--config.train.warm=perhaps"], "--config.train.warm=perhaps: "),
    ],
)
def test_bad_overrides(run_config, config_file, arguments, said):
    status, out, err = run_config(f"--config={config_file}", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: --config.")
    assert said in err
    assert err.count("\n") == 1


def test_bad_config_files(run_config, config_file, tmp_path):
    def said(argument, content=None):
        if content is not None:
            config_file.write_text(textwrap.dedent(content))
        status, out, err = run_config(f"--config={argument}")
        assert (status, out, err.count("\n")) == (2, "", 1)
        return err.removeprefix("error: ").strip()

    assert said(tmp_path / "none.py") == f"config: {str(tmp_path / 'none.py')!r} is not a file"
    assert said(f"{config_file}:wrong") == "preset: 'wrong' is not known"
    assert said(config_file, "def get_config(:\n").startswith(f"config: {config_file}, line 1: ")
    assert said(config_file, "x = 1").endswith("has no function get_config")
    assert said(config_file, "def get_config(): return {}").endswith("must return a ConfigDict")
    assert "takes no argument, given 'a'" in said(f"{config_file}:a")
    assert "needs FILE:ARGUMENT" in said(config_file, "def get_config(preset): pass")


def test_defects_of_a_config_file_keep_their_traceback(run_config, config_file):
    with pytest.raises(RuntimeError, match="failed") as error:
        run_config(f"--config={config_file}:defect")
    assert str(error.value.__cause__) == "a defect"
