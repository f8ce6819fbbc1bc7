"""Verification rules by name, and the drafts that each of them is right for."""

import dataclasses
from collections.abc import Callable

from decoding.speculative import multi_draft, rollback, typical, verification
from decoding.speculative.verification import (
    CHAIN,
    INDEPENDENT,
    LAWS,
    WITHOUT_REPLACEMENT,
    Verdict,
)
from models.errors import InputError, check_choice


@dataclasses.dataclass(frozen=True)
class RuleSpec:
    """A rule as drafters and users see it.

    Attributes:
      verify: the rule; see `verification.Rule`, options as keywords.
      laws: how drafts may have been made.
      lossless: whether the text follows the target's distribution.
      counters: names of `Verdict.counters`.
    """

    verify: Callable[..., Verdict]
    laws: tuple[str, ...]
    lossless: bool = True
    counters: tuple[str, ...] = ()


RULES: dict[str, RuleSpec] = {
    "exact_match": RuleSpec(verification.exact_match, LAWS),
    "speculative_sampling": RuleSpec(verification.speculative_sampling, (CHAIN,)),
    "k_seq": RuleSpec(multi_draft.k_seq, (CHAIN, INDEPENDENT)),
    "multi_round": RuleSpec(multi_draft.multi_round, (CHAIN, INDEPENDENT)),
    "recursive_rejection": RuleSpec(multi_draft.recursive_rejection, (CHAIN, WITHOUT_REPLACEMENT)),
    "typical_acceptance": RuleSpec(typical.typical_acceptance, LAWS, lossless=False),
    "rollback": RuleSpec(rollback.rollback, (CHAIN,), lossless=False, counters=rollback.COUNTERS),
}


def check(rule: str, law: str) -> RuleSpec:
    """The rule of that name; InputError unless it is right for drafts made by `law`."""
    check_choice("rule", rule, RULES)
    if law not in RULES[rule].laws:
        allowed = ", ".join(name for name, spec in RULES.items() if law in spec.laws)
        raise InputError(
            f"rule: {rule!r} needs {' or '.join(RULES[rule].laws)}; these drafts are {law}; "
            f"allowed: {allowed}"
        )
    return RULES[rule]
