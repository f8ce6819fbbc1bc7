"""How much batches are merged while adapters are trained: a fixed budget, or one drawn anew.

Feher et al., arXiv 2411.18553, section 2.3 of the sheet. What is drawn evenly is the relative
reduction, not the number of merges: the first merges shorten a batch most.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from decoding.dynamic_vocabulary import merging
from decoding.dynamic_vocabulary.boundaries import Valid
from models.errors import InputError, check_choice

KINDS = ("fixed", "uniform", "gaussian", "cauchy", "student_t")


@dataclasses.dataclass(frozen=True)
class Granularity:
    """How a batch's merges are chosen.

    Attributes:
      kind: 'fixed'; 'uniform' over bins of relative reduction, then over the budgets in the bin;
        or the bin from a 'gaussian', 'cauchy' or 'student_t' around the middle one.
      merges: of 'fixed'.
      bins: equal parts of 0 to 100 % (published: 30).
      full: merges that stand for 100 % (published: 200).
      deviation: of 'gaussian', in bins (published: 5).
      scale: of 'cauchy' and 'student_t', in bins (published: 6).
      freedom: of 'student_t'; not published.
    """

    kind: str = "uniform"
    merges: int = 0
    bins: int = 30
    full: int = 200
    deviation: float = 5.0
    scale: float = 6.0
    freedom: float = 3.0

    def __post_init__(self) -> None:
        check_choice("granularity.kind", self.kind, KINDS)
        for field, least in (("merges", 0), ("bins", 1), ("full", 0)):
            if getattr(self, field) < least:
                raise InputError(
                    f"granularity.{field}: {getattr(self, field)} must be at least {least}"
                )
        for field in ("deviation", "scale", "freedom"):
            if not getattr(self, field) > 0:
                raise InputError(f"granularity.{field}: {getattr(self, field)} must be above 0")


def curve(batches: Iterable[Sequence[Sequence[str]]], valid: Valid) -> list[float]:
    """Mean tokens a row after 0, 1, ... merges, over batches; the last entry is word level.

    A batch that stops early keeps its length.

    Args:
      batches: token strings.
      valid: see `merging.merge`.
    """
    found = [(merging.merge(batch, None, valid).lengths, len(batch)) for batch in batches]
    if not found:
        raise InputError("batches: there are none")
    size = max(len(lengths) for lengths, _ in found)
    rows = sum(count for _, count in found)
    padded = [lengths + lengths[-1:] * (size - len(lengths)) for lengths, _ in found]
    return (np.sum(padded, axis=0) / rows).tolist()


def bins_of(lengths: Sequence[float], how: Granularity) -> list[list[int]]:
    """Budgets by their bin of relative reduction; word level stands for `how.full` merges.

    Args:
      lengths: see `curve`; the last is word level.
      how: gives the number of bins.
    """
    budgets: list[list[int]] = [[] for _ in range(how.bins)]
    for m, at in enumerate(merging.reductions(lengths, lengths[-1])):
        if at.relative >= 1:
            budgets[-1].append(how.full)
            break
        budgets[int(at.relative * how.bins)].append(m)
    return budgets


def draw(budgets: Sequence[Sequence[int]], how: Granularity, rng: np.random.Generator) -> int:
    """Merges of one batch.

    Bins that hold no budget (one merge can skip several) are never drawn; around the middle, the
    nearest that holds one takes their place.

    Args:
      budgets: see `bins_of`.
      how: the law.
      rng: advanced.
    """
    if how.kind == "fixed":
        return how.merges
    held = np.array([b for b, inside in enumerate(budgets) if inside])
    if how.kind == "uniform":
        chosen = int(rng.choice(held))
    else:
        middle = how.bins / 2
        if how.kind == "gaussian":
            value = rng.normal(middle, how.deviation)
        elif how.kind == "cauchy":
            value = middle + how.scale * rng.standard_cauchy()
        else:
            value = middle + how.scale * rng.standard_t(how.freedom)
        nearest = np.clip(np.round(value), 0, how.bins - 1)
        chosen = int(held[np.abs(held - nearest).argmin()])
    return int(rng.choice(budgets[chosen]))
