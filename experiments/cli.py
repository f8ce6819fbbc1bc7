"""What every program of this project shares on the command line.

A program defines its flags on a `flags.FlagValues()` of its own, so that one program can import
another, and ends with

    if __name__ == "__main__":
        cli.run_main(main, FLAGS)

Results go to standard output, everything else to standard error. Exit status: 0; 1 for a defect
(with a traceback); 2 for bad input (one line, `error: ...`); 130 when interrupted; 143 when SIGTERM
ended it after what was done had been saved, and 75 when another process of the job died, both of
which a launcher may start again. Nothing here
imports JAX before the flags are read, so that a mistyped one is answered at once.
"""

import contextlib
import functools
import importlib.util
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from models.errors import InputError, nearest
from models.files import cache_root

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended

# Device files of TPUs, and of NVIDIA's and AMD's GPUs; the last one is a GPU's under WSL.
ACCELERATORS = (
    "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/nvhost*", "/dev/kfd", "/dev/dxg",
)  # fmt: skip

_FOLDERS = ("models", "decoding", "training", "experiments", "launch")
_OURS = tuple(str(Path(__file__).parents[1] / folder) + os.sep for folder in _FOLDERS)


def run_main(main: Callable[[list[str]], Any], program: flags.FlagValues = flags.FLAGS) -> NoReturn:
    """Parses `sys.argv` and runs a program under `absl.app`; ends the process.

    Args:
      main: takes the program's name and the arguments that are not flags; may raise InputError.
      program: the program's flags; absl's own (`--verbosity`, ...) and `--help` are added.
    """
    use_compilation_cache()
    use_cpu_if_there_is_nothing_else()
    if isinstance(sys.stdout, io.TextIOWrapper):  # text that the terminal cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")

    def run(argv: list[str]) -> Any:
        status = main(argv)
        sys.stdout.flush()  # here, where a broken pipe is caught
        return status

    try:
        app.run(run, flags_parser=functools.partial(_parse_flags, program, main))
    except InputError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has left. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    sys.exit(0)


def no_arguments(argv: Sequence[str]) -> None:
    """Raises InputError when `argv`, which begins with the program, holds more than flags."""
    if len(argv) > 1:
        raise InputError(f"argument {argv[1]!r}: not expected; allowed: flags only, see --help")


def use_compilation_cache() -> None:
    """Lets JAX keep what it compiles under the cache root, unless told otherwise by environment.

    Processes that this one starts inherit the setting.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = str(cache_root() / "jax")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    if "jax" in sys.modules:  # it has read its environment already
        import jax

        jax.config.update("jax_compilation_cache_dir", directory)


def use_cpu_if_there_is_nothing_else() -> None:
    """Keeps an installed libtpu, which compile checks need, from looking for a TPU in vain.

    It would complain in several lines on any machine without one. `JAX_PLATFORMS` comes first.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return
    if any(path for pattern in ACCELERATORS for path in Path("/").glob(pattern.lstrip("/"))):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")


def define_cluster(
    program: flags.FlagValues,
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Flags that say where the other processes of a job are; `models.distributed` has the rest.

    Returns:
      To be called, and entered, once flags are read and before JAX is used: the job.
    """

    def text(name: str, default: str | None, what: str) -> flags.FlagHolder:
        return flags.DEFINE_string(name, default, what, flag_values=program)

    def integer(name: str, default: int | None, least: int, what: str) -> flags.FlagHolder:
        return flags.DEFINE_integer(name, default, what, least, flag_values=program)

    coordinator = text("coordinator", None, "HOST:PORT of process 0, or JAX_COORDINATOR_ADDRESS.")
    count = integer("num_processes", None, 1, "Processes of this job, or JAX_NUM_PROCESSES.")
    index = integer("process_id", None, 0, "Which of them this is, or JAX_PROCESS_ID.")
    found = flags.DEFINE_enum(
        "cluster", "auto", ("auto", "none"),
        "Whether to look for the other processes on Cloud TPU, Slurm and Open MPI.",
        flag_values=program,
    )  # fmt: skip
    connect = integer("connect_timeout", 300, 1, "Seconds to wait for the other processes.")
    heartbeat = integer("heartbeat_timeout", 100, 1, "Seconds until a silent process is dead.")

    def job() -> contextlib.AbstractContextManager[None]:
        from models import distributed

        cluster = distributed.from_environment(
            os.environ,
            coordinator=coordinator.value,
            num_processes=count.value,
            process_id=index.value,
            detect=found.value == "auto",
            connect_timeout=connect.value,
            heartbeat_timeout=heartbeat.value,
        )
        return distributed.job(cluster)

    return job


def define_config(
    program: flags.FlagValues, help_text: str, name: str = "config"
) -> flags.FlagHolder[Any]:
    """A flag `--config=FILE[:ARGUMENT]` whose fields can be overridden: `--config.field=value`.

    The file's `get_config()`, or `get_config(ARGUMENT)`, returns an `ml_collections.ConfigDict`.
    An override of a field that does not exist, or of another type, is bad input.
    """
    holder = config_flags.DEFINE_config_file(name, None, help_text, flag_values=program)
    program[name].parser = _ConfigParser(name)
    return holder


class _ConfigParser(flags.ArgumentParser[Any]):
    """Loads a config file and checks what the command line overrides.

    In place of ml_collections' parser, whose errors are tracebacks or about something else.
    """

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        config = load_config_file(argument)
        override = re.compile(rf"--?(?:no)?{re.escape(self._name)}\.([^=]+)")
        for match in filter(None, map(override.match, sys.argv[1:])):
            _check_field(config, self._name, match[1])
        return config.lock()


def load_config_file(argument: str) -> ml_collections.ConfigDict:
    """The config of FILE or FILE:ARGUMENT.

    Raises:
      InputError: no such file, not Python, no `get_config`, one that takes no (or needs an)
        argument, or what `get_config` itself raises as such. Another exception of the file's
        code is a RuntimeError, so that its traceback is seen.
    """
    file, colon, option = argument.partition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"config: {file!r} is not a file")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config: {file!r} must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise InputError(f"config: {file} has no function get_config")
        arguments = (option,) if colon else ()
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            form = f"takes no argument, given {option!r}" if colon else "needs FILE:ARGUMENT"
            raise InputError(f"config: get_config of {file} {form}") from None
        config = get_config(*arguments)
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(f"config: {file}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise RuntimeError(f"config file {file} failed") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"config: get_config of {file} must return a ConfigDict")
    return config


def _check_field(config: ml_collections.ConfigDict, name: str, path: str) -> None:
    """Raises InputError unless the dotted `path` is a field; elements such as a[0] are let by."""
    holder: Any = config
    for part in path.split("."):
        if "[" in part or not isinstance(holder, ml_collections.ConfigDict):
            return
        if part not in holder:
            allowed = ", ".join(sorted(holder)) or "none"
            raise InputError(
                f"--{name}.{path}: no field {part!r}{nearest(path, _field_paths(config))}; "
                f"allowed: {allowed}"
            )
        holder = holder[part]


def _field_paths(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    paths = []
    for key in config:
        paths.append(prefix + key)
        if isinstance(config[key], ml_collections.ConfigDict):
            paths += _field_paths(config[key], f"{prefix}{key}.")
    return paths


class _HelpFlag(flags.BooleanFlag):
    """Prints the program's docstring and flags, and ends it."""

    def __init__(self, program: flags.FlagValues, main: Callable[..., Any]):
        super().__init__("help", False, "show this text", short_name="h", allow_override=True)
        self._program = program
        self._main = main

    def parse(self, argument: Any) -> None:
        if self._parse(argument):
            module = self._main.__module__
            print(inspect.getdoc(sys.modules[module]) or "")
            print(self._program.module_help(sys.argv[0] if module == "__main__" else module))
            sys.exit(0)


def _parse_flags(
    program: flags.FlagValues, main: Callable[..., Any], argv: Sequence[str]
) -> list[str]:
    """Parses the program's flags and absl's together; returns the other arguments."""
    _forget_last_run(program)
    for name in flags.FLAGS:  # the same objects, so that absl sees what is parsed
        flag = flags.FLAGS[name]
        if name == flag.name and name not in program and not name.startswith("help"):
            program[name] = flag
    program["help"] = _HelpFlag(program, main)
    try:
        rest = program(argv)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        raise InputError(f"--{name}: no such flag{nearest(name, program)}; see --help") from None
    except (flags.Error, ValueError) as error:
        if isinstance(error.__context__, InputError):
            raise error.__context__ from None
        raise InputError(_explain(error, program)) from None
    flags.FLAGS.mark_as_parsed()
    handler = absl_logging.get_absl_handler()
    if flags.FLAGS["verbosity"].present:
        handler.removeFilter(_without_library_chatter)
    else:
        handler.addFilter(_without_library_chatter)
    return rest


def _without_library_chatter(record: logging.LogRecord) -> bool:
    """This project's messages, and the warnings of others."""
    return record.levelno >= logging.WARNING or record.pathname.startswith(_OURS)


def _forget_last_run(program: flags.FlagValues) -> None:
    """A program may run more than once in a process (tests do): values and overrides go."""
    program.unparse_flags()
    for name in [name for name in program if "." in name]:
        delattr(program, name)


def _explain(error: Exception, program: flags.FlagValues) -> str:
    """absl's message for a bad value, with what is allowed."""
    message = str(error).removeprefix("flag ")
    match = re.match(r"--([\w.]+)=", message)
    if match and match[1] in program and (form := program[match[1]].parser.syntactic_help):
        message += f"; allowed: {form}"
    return message
