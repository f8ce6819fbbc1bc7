"""CLDR's names: known ones, scripts, splits that share no code, and errors."""

from pathlib import Path

import pytest

from models.errors import InputError
from training.datasets import cldr, registry

LOCALES = ["de", "el", "ja", "sr_Latn"]


def test_known_names_and_scripts(tmp_path: Path) -> None:
    rows = list(registry.load("cldr", "all", data_dir=tmp_path, locales=LOCALES))
    found = {(r["locale"], r["kind"], r["code"]): r for r in rows}
    assert len(found) == len(rows)
    assert found["de", "territory", "GR"]["text"] == "Griechenland"
    assert found["el", "territory", "DE"]["text"] == "Γερμανία"
    assert found["el", "language", "de"]["text"] == "Γερμανικά"
    assert found["ja", "territory", "JP"]["text"] == "日本"
    scripts = {(r["locale"], r["language"], r["script"]) for r in rows}
    assert scripts == {
        ("de", "de", "Latn"), ("el", "el", "Grek"), ("ja", "ja", "Jpan"), ("sr_Latn", "sr", "Latn"),
    }  # fmt: skip
    assert {r["kind"] for r in rows} == {"language", "territory"}
    assert all(r["text"] not in ("", r["code"]) for r in rows)

    splits = {
        split: {
            (r["kind"], r["code"])
            for r in registry.load("cldr", split, data_dir=tmp_path, locales=LOCALES[::-1])
        }
        for split in ("train", "validation", "test")
    }
    assert set().union(*splits.values()) == {(r["kind"], r["code"]) for r in rows}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values()))
    assert len(splits["train"]) > 8 * len(splits["test"]) > 0


def test_every_language_has_a_script() -> None:
    found = cldr.locales()
    assert len(found) > 250
    assert {"en", "zh", "zh_Hant", "ar", "hi", "th", "am", "sr", "sr_Latn"} <= set(found)
    scripts = {name: cldr.script_of(name) for name in found}
    assert all(len(script) == 4 for script in scripts.values())
    assert len(set(scripts.values())) > 30
    assert (scripts["zh"], scripts["zh_Hant"]) == ("Hans", "Hant")
    assert (scripts["sr"], scripts["sr_Latn"]) == ("Cyrl", "Latn")
    assert not any("_US" in name for name in found)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"locales: 'sr_Lat' is not known \(did you mean"):
        registry.load("cldr", "train", data_dir=tmp_path, locales=["sr_Lat"])
    with pytest.raises(InputError, match="locales: 'de' must be different locales"):
        registry.load("cldr", "train", data_dir=tmp_path, locales="de")
    with pytest.raises(InputError, match="kinds: 'month' is not known"):
        registry.load("cldr", "train", data_dir=tmp_path, locales=["de"], kinds=["month"])
    with pytest.raises(InputError, match=r"kinds: .* must be different kinds"):
        registry.load("cldr", "train", data_dir=tmp_path, locales=["de"], kinds=[])
