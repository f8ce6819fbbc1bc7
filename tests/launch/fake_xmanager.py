"""The part of XManager's interface that the launcher uses, with processes for local work units.

For environments without XManager, which cannot share one with the newest protobuf. Where it is
installed the same tests run with the real one as well.
"""

import asyncio
import os
import types


class FakeExperiment:
    def __init__(self, title, log):
        self.title, self.log = title, log

    async def __aenter__(self):
        self.log.append(("experiment", self.title))
        return self

    async def __aexit__(self, *_):
        self.log.append(("left",))

    def package(self, packageables):
        self.log.extend(("package", p) for p in packageables)
        return packageables

    async def add(self, job):
        self.log.append(("add", job))
        return FakeUnit(job)


class FakeUnit:
    def __init__(self, job):
        self.job = job

    async def wait_until_complete(self):
        package = self.job.executable
        process = await asyncio.create_subprocess_exec(
            package.executable_spec.path, *self.job.args, env=os.environ | package.env_vars
        )
        if status := await process.wait():
            raise RuntimeError(f"returned non-zero code: {status}")


def modules():
    """(xm, xm_local, log of calls)."""
    log = []
    record = types.SimpleNamespace
    xm = record(
        Packageable=lambda **fields: record(**fields),
        Binary=lambda path: record(kind="binary", path=path),
        Dockerfile=lambda path, dockerfile: record(kind="dockerfile", path=path, file=dockerfile),
        Job=lambda executable, executor, name, args: record(
            executable=executable, executor=executor, name=name, args=args
        ),
        JobRequirements=lambda **resources: resources,
    )

    def executor(kind):
        return lambda requirements=None: record(
            kind=kind, requirements=requirements, Spec=lambda: f"{kind} spec"
        )

    xm_local = record(
        Local=executor("local"),
        Vertex=executor("vertex"),
        create_experiment=lambda experiment_title: FakeExperiment(experiment_title, log),
    )
    return xm, xm_local, log
