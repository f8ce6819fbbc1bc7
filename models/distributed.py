"""Several processes as one job: how they find each other, and what they say to each other.

Every process runs the same program (JAX's multi-controller runtime); arrays on a mesh of all
devices belong to all of them. What belongs to the job as a whole, such as a lock, a file or a line
of output, is the first process' to do: `is_first`, `first`. With one process nothing here does
anything.

How a process learns where the others are:
  Cloud TPU, Slurm, Open MPI: JAX finds out (`Cluster()`).
  plain hosts, a local test: an address and two numbers, as flags or as the environment variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from models.errors import InputError

T = TypeVar("T")

# Exit status of a process that ended because another one did: EX_TEMPFAIL of sysexits.h, 'try
# again later'. JAX itself aborts (134) when it learns of that first.
PEER_LOST = 75

# What a process waits for the others at the end of a job that went wrong in one of them.
_SHUTDOWN_SECONDS = 15
_SMALLEST_MESSAGE = 256
# How failed collectives and lost connections are worded (XLA's CPU, GPU and TPU runtimes raise
# plain errors).
_LOST = re.compile(
    r"gloo|nccl|coordination service|heartbeat|connection (reset|closed|refused)|socket closed"
    r"|megascale|slice health|preempted",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the processes of a job are, as this process sees it.

    Attributes:
      coordinator: HOST:PORT at which process 0 listens and the others call.
      num_processes, process_id: how many there are, and which one this is. Where both are None,
        JAX finds them out on Cloud TPU, Slurm and Open MPI; anywhere else there is one process.
      detect: whether to look for such a cluster at all.
      connect_timeout: seconds that processes wait for each other at the start.
      heartbeat_timeout: seconds after which a silent process counts as dead, and ends the job.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    detect: bool = True
    connect_timeout: int = 300
    heartbeat_timeout: int = 100

    def __post_init__(self) -> None:
        numbers = {"num_processes": self.num_processes, "process_id": self.process_id}
        given = {name: value for name, value in numbers.items() if value is not None}
        if given:
            for name, value in {"coordinator": self.coordinator, **numbers}.items():
                if value is None:
                    raise InputError(f"{name}: missing; it is needed with {next(iter(given))}")
        if self.coordinator is not None and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise InputError(f"coordinator: {self.coordinator!r} must be HOST:PORT")
        for name in ("num_processes", "connect_timeout", "heartbeat_timeout"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}: {value} must be at least 1")
        if given and not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            raise InputError(
                f"process_id: {self.process_id} must be at least 0 and below num_processes, "
                f"{self.num_processes}"
            )


def from_environment(environment: Mapping[str, str], **given: Any) -> Cluster:
    """`Cluster(**given)`; what is not given or None is taken from JAX_* variables, if set."""
    names = {
        "coordinator": "JAX_COORDINATOR_ADDRESS",
        "num_processes": "JAX_NUM_PROCESSES",
        "process_id": "JAX_PROCESS_ID",
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, variable in names.items():
        text = environment.get(variable)
        if not text or name in chosen:
            continue
        if name != "coordinator" and not text.isdecimal():
            raise InputError(f"{variable}: {text!r} must be an integer")
        chosen[name] = text if name == "coordinator" else int(text)
    return Cluster(**chosen)


def start(cluster: Cluster) -> None:
    """Joins the processes of a job; to be called before JAX is used for anything else.

    Raises:
      InputError: the coordinator cannot be reached in time, by address; a cluster that JAX finds
        but cannot read; numbers without any cluster.
    """
    timeouts: dict[str, Any] = {
        "initialization_timeout": cluster.connect_timeout,
        "heartbeat_timeout_seconds": cluster.heartbeat_timeout,
        "shutdown_timeout_seconds": _SHUTDOWN_SECONDS,
    }
    if cluster.num_processes == 1:
        return
    if cluster.num_processes is not None:
        assert cluster.coordinator is not None
        logging.info(
            "process %d of %d: joining at %s, for at most %d s",
            cluster.process_id,
            cluster.num_processes,
            cluster.coordinator,
            cluster.connect_timeout,
        )
        if cluster.process_id != 0:  # JAX would abort, and not say where it had called
            _wait_for(cluster.coordinator, cluster.connect_timeout)
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            cluster_detection_method="deactivate",
            **timeouts,
        )
    elif cluster.detect and not _alone(os.environ):
        try:
            jax.distributed.initialize(cluster.coordinator, **timeouts)
        except ValueError as error:
            if "should be defined" not in str(error) and "must be defined" not in str(error):
                raise
            if cluster.coordinator is not None:
                raise InputError(
                    f"coordinator: {cluster.coordinator} is given, but not num_processes and "
                    "process_id, and no cluster is found that says them"
                ) from None
        except Exception as error:
            if "must be called before" in str(error):
                return  # called from a program that uses JAX already, on its own
            raise InputError(
                f"cluster: one was found, but not its processes ({_one_line(error)}); give "
                "coordinator, num_processes and process_id, or --cluster=none for one process"
            ) from None


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler says that it started one process only.

    Kubernetes says nothing that can be read without rights that a pod seldom has; there the
    environment variables are set by whoever writes the manifest (Cloud TPU in GKE aside).
    """
    tasks = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if any(environment.get(name) == "1" for name in tasks):
        return True
    return "KUBERNETES_SERVICE_HOST" in environment and "TPU_WORKER_HOSTNAMES" not in environment


def _wait_for(address: str, seconds: float) -> None:
    """Returns when something listens at HOST:PORT; raises InputError when nothing does in time."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            with socket.create_connection((host.strip("[]"), int(port)), max(left, 0.1)):
                return
        except (OSError, OverflowError) as error:
            if time.monotonic() + 0.5 > end:
                raise InputError(
                    f"coordinator: {address} cannot be reached in {seconds:g} s ({error}); is "
                    "process 0 running there, and is the port open?"
                ) from None
        time.sleep(0.5)


@contextlib.contextmanager
def job(cluster: Cluster) -> Iterator[None]:
    """`start`, and an end in which processes wait for each other.

    An error in one process ends the others too: at once where they wait for it in a collective,
    else after `heartbeat_timeout`. A process that ends because of another one says so in one line
    and has the status `PEER_LOST`, or is aborted by JAX with its own message.
    """
    start(cluster)
    if not jax.distributed.is_initialized():
        yield
        return
    _keep_standard_output()
    try:
        yield
        barrier("end")
    except (InputError, SystemExit, KeyboardInterrupt):
        raise  # most often in every process, so that JAX's own orderly end works
    except BaseException as error:
        _die(error)
    jax.distributed.shutdown()


def _keep_standard_output() -> None:
    """Sends what native libraries print (Gloo does, on connecting) to standard error instead."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(output, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def _die(error: BaseException) -> None:
    """Ends the process at once: the others are not there any more to agree with on an end."""
    sys.stdout.flush()
    status = 1
    if _LOST.search(str(error)):
        status = PEER_LOST
        print(
            f"error: process {jax.process_index()} of {jax.process_count()}: lost another process "
            f"of this job, which has died or was stopped ({_one_line(error)}); start all of them "
            "again to go on from what was saved",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(status)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def several() -> bool:
    """Whether this job has several processes. (Asking JAX alone would start its backend.)"""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def processes() -> tuple[int, int]:
    """How many processes this job has, and which one this is."""
    return (jax.process_count(), jax.process_index()) if several() else (1, 0)


def is_first() -> bool:
    """Whether this process writes what belongs to the job as a whole."""
    return not several() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if several():
        multihost_utils.sync_global_devices(name)


def gather(text: str) -> list[str]:
    """Each process' text, in their order, in every process."""
    if not several():
        return [text]
    message = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([message.size], np.int32)).reshape(-1)
    # Few sizes, since each one is compiled.
    room = max(_SMALLEST_MESSAGE, 1 << int(sizes.max()).bit_length())
    padded = np.zeros(room, np.uint8)
    padded[: message.size] = message
    parts = multihost_utils.process_allgather(padded)
    return [part[:size].tobytes().decode() for part, size in zip(parts, sizes)]


def first(function: Callable[[], T]) -> T:
    """What `function` returns (anything JSON can hold) in the first process, which alone runs it.

    Raises:
      InputError: when it does there, in every process.
    """
    if not several():
        return function()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome["value"] = function()
        except InputError as error:
            outcome["error"] = str(error)
    outcome = json.loads(gather(json.dumps(outcome))[0])
    if "error" in outcome:
        raise InputError(outcome["error"])
    return outcome["value"]


def put(tree: Any, place: jax.sharding.Sharding) -> Any:
    """`jax.device_put` of values that every process has, random keys among them."""
    if not several():
        return jax.device_put(tree, place)

    def one(leaf: Any) -> jax.Array:
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(np.asarray(leaf), place)
        numbers = jax.device_put(np.asarray(jax.random.key_data(leaf)), place)
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))

    return jax.tree.map(one, tree)


def on_host(tree: Any) -> Any:
    """NumPy arrays of a tree of arrays, wherever their parts are; in every process."""

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(fetch, tree))


# Calls of `preempted` in this process.
_calls = itertools.count(1)


def preempted() -> bool:
    """Whether to stop here because some process of several was sent SIGTERM.

    Every process must call it equally often; all are told so at the same call. (With one process,
    False: a signal handler is all that is needed.)
    """
    if not several():
        return False
    return multihost_utils.reached_preemption_sync_point(next(_calls))
