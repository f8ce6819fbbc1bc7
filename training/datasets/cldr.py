"""Names of languages, territories, scripts and currencies in hundreds of languages, from CLDR.

The Unicode Common Locale Data Repository as the babel package carries it: short texts with exact
labels in dozens of scripts, on every machine.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import babel
import tensorflow_datasets as tfds
from babel import core, localedata

from models.errors import InputError, check_choice, nearest
from training.datasets import identity

# The attribute of a babel locale that holds each kind's names.
KINDS = {
    "language": "languages",
    "territory": "territories",
    "script": "scripts",
    "currency": "currencies",
}


def locales() -> list[str]:
    """Every locale that stands for a language, or a language in a script: 'el', 'sr_Latn'."""
    found = []
    for name in localedata.locale_identifiers():
        locale = babel.Locale.parse(name)
        if not locale.territory and not locale.variant and script_of(name):
            found.append(name)
    return sorted(found)


def script_of(locale: str) -> str:
    """ISO 15924 code of the script that a locale is written in: 'Grek'; '' where not known."""
    parsed = babel.Locale.parse(locale)
    if parsed.script:
        return str(parsed.script)
    likely = core.get_global("likely_subtags")
    # 'el' -> 'el_Grek_GR'
    parts = likely.get(locale, likely.get(parsed.language, "")).split("_")
    return parts[1] if len(parts) > 1 else ""


def names(locale: str, kind: str) -> dict[str, str]:
    """Names by code, in the order of codes; those that are only their code are left out."""
    found = getattr(babel.Locale.parse(locale), KINDS[kind])
    return {code: found[code] for code in sorted(found) if found[code] not in ("", code)}


class Cldr(tfds.core.GeneratorBasedBuilder):
    """Display names, split 90/5/5 by a hash of kind and code.

    A territory is thus in one split in all locales: names that languages share (or nearly) do not
    leak. Where held-out locales are wanted instead, load 'all' of different `locales`.

    Options:
      locales: babel's names, such as ['en', 'el', 'sr_Latn']; None for all of `locales()`.
      kinds: of `KINDS`.

    Examples, in the order of kinds, codes and locales:
      text: the name; locale; language and script: of the locale (ISO 639, ISO 15924); kind; code:
        of what is named ('DE', 'el').
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(
        self,
        *,
        locales: Sequence[str] | None = None,
        kinds: Sequence[str] = ("language", "territory"),
        data_dir: str | None = None,
    ):
        self._locales = _checked(locales)
        if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds):
            raise InputError(f"kinds: {kinds!r} must be different kinds, such as ['territory']")
        for kind in kinds:
            check_choice("kinds", kind, KINDS)
        self._kinds = sorted(kinds)
        options = {
            "locales": self._locales,
            "kinds": self._kinds,
            "cldr": f"{core.get_cldr_version()}, babel {babel.__version__}",
        }
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        fields = ("text", "locale", "language", "script", "kind", "code")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Names of languages, territories, scripts and currencies (Unicode CLDR).",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in fields}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        examples = (
            (identity.split_of(f"{example['kind']}/{example['code']}"), example)
            for example in generate(self._locales, self._kinds)
        )
        return {
            split: self._generate_examples(group)
            for split, group in identity.group(examples).items()
        }

    def _generate_examples(self, examples: Any) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(examples)


def generate(locales: Sequence[str], kinds: Sequence[str]) -> Iterator[dict[str, str]]:
    """The examples of `Cldr` over all splits."""
    about = {
        name: {
            "locale": name,
            "language": str(babel.Locale.parse(name).language),
            "script": script_of(name),
        }
        for name in locales
    }
    for kind in kinds:
        by_locale = {name: names(name, kind) for name in locales}
        for code in sorted(set().union(*by_locale.values())):
            for name in locales:
                if code in by_locale[name]:
                    yield {
                        "text": by_locale[name][code],
                        **about[name],
                        "kind": kind,
                        "code": code,
                    }


def _checked(chosen: Sequence[str] | None) -> list[str]:
    known = locales()
    if chosen is None:
        return known
    if isinstance(chosen, str) or not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"locales: {chosen!r} must be different locales, such as ['en', 'el']")
    for name in chosen:
        if name not in known:
            raise InputError(
                f"locales: {name!r} is not known{nearest(name, known)}; allowed: {len(known)} "
                f"locales without a territory, such as {', '.join(known[:3])}"
            )
    return sorted(chosen)
