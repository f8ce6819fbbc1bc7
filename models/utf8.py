"""Well-formed UTF-8 as a table: which byte may follow which, inside a jitted loop.

The states of the Unicode Standard's table 3-7: between characters, or within one with so many
bytes to come, the next of them perhaps restricted (no overlong forms, no surrogates, nothing beyond
U+10FFFF).
"""

import numpy as np

BETWEEN = 0
REJECT = -1


def _table() -> tuple[np.ndarray, np.ndarray]:
    # state: (bytes to come, least and greatest next byte)
    inside = [
        (0, 0, 0), (1, 0x80, 0xBF), (2, 0x80, 0xBF), (3, 0x80, 0xBF),
        (2, 0xA0, 0xBF), (2, 0x80, 0x9F), (3, 0x90, 0xBF), (3, 0x80, 0x8F),
    ]  # fmt: skip
    table = np.full((len(inside), 256), REJECT, np.int32)
    for first, last, state in (
        (0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEC, 2), (0xED, 0xED, 5),
        (0xEE, 0xEF, 2), (0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7),
    ):  # fmt: skip
        table[BETWEEN, first : last + 1] = state
    for state, (to_come, least, greatest) in enumerate(inside):
        if state != BETWEEN:
            table[state, least : greatest + 1] = to_come - 1
    return table, np.array([to_come for to_come, _, _ in inside], np.int32)


# NEXT [8, 256]: the state after a byte in each state, or REJECT; TO_COME [8]: bytes that the
# character still lacks.
NEXT, TO_COME = _table()
