"""Docstring prose: what is taken, in which order, and that splits hold different modules."""

import importlib
import inspect

import pytest

from models.errors import InputError
from training.datasets import registry, stdlib_docstrings

SOURCE = '''"""About the module.

    Indented on purpose.
"""
x = "not a docstring"

class A:
    """About A.

    Second paragraph.
    """

    def method(self):
        """About the method."""
        def inner():
            "About inner: é."

async def last():
    \'\'\'   About last.   \'\'\'

def bare():
    return """not a docstring either"""
'''

EXPECTED = """About the module.

    Indented on purpose.

About A.

Second paragraph.

About the method.

About inner: é.

About last.
"""


def test_prose_is_every_docstring_in_source_order():
    # The module's first line is at margin 0 and the rest is indented: cleandoc removes that.
    assert stdlib_docstrings.prose(SOURCE) == EXPECTED.replace("    Indented", "Indented")
    assert stdlib_docstrings.prose("x = 1\n") == ""
    with pytest.raises(SyntaxError):
        stdlib_docstrings.prose("def (")


def test_documents_are_modules_with_enough_prose(tmp_path):
    root = tmp_path / "library"
    (root / "tests").mkdir(parents=True)
    for index in range(60):
        (root / f"module{index}.py").write_text(f'"""{"Words of it. " * 20}{index}"""\n')
    (root / "short.py").write_text('"""Short."""\n')
    (root / "broken.py").write_text("def (\n")
    (root / "tests" / "test_a.py").write_text(f'"""{"Words of it. " * 20}"""\n')
    splits = [
        list(registry.load("stdlib_docstrings", split, data_dir=tmp_path / "data", root=str(root)))
        for split in ("train", "validation", "test")
    ]
    modules = [example["module"] for examples in splits for example in examples]
    assert sorted(modules) == sorted(f"module{index}.py" for index in range(60))
    assert all(examples for examples in splits)
    with pytest.raises(InputError, match="min_chars"):
        stdlib_docstrings.StdlibDocstrings(root=str(root), min_chars=0)


def test_prose_of_this_python(tmp_path):
    examples = {e["module"]: e["text"] for e in registry.load("stdlib_docstrings", "all")}
    assert sum(map(len, examples.values())) > 1_000_000
    module = importlib.import_module("textwrap")
    text = examples["textwrap.py"]
    assert text.startswith(inspect.getdoc(module))
    assert inspect.getdoc(module.dedent) in text
    assert "import re" not in text
