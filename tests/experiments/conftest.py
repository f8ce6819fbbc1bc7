"""Fixtures that tests of several programs share."""

import sys

import pytest

from experiments import cli, generate


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `experiments.generate` here: (exit status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.run_main(generate.main, generate.FLAGS)
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return run
