"""GPT-2's byte characters: 256 printable stand-ins for bytes, in which vocabularies are written."""


def _byte_characters() -> tuple[str, ...]:
    """Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(
        chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)
    )


BYTE_CHARACTERS = _byte_characters()  # by byte
_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
SPACE, NEWLINE, TAB = (BYTE_CHARACTERS[ord(character)] for character in " \n\t")
WHITESPACE = (SPACE, NEWLINE, TAB)


def to_characters(text: str | bytes) -> str:
    """The byte characters of a text's UTF-8 bytes, or of bytes."""
    content = text.encode() if isinstance(text, str) else text
    return "".join(BYTE_CHARACTERS[byte] for byte in content)


def to_bytes(token: str) -> bytes:
    """The bytes that a string of byte characters stands for; KeyError for any other string."""
    return bytes(_BYTES[character] for character in token)


def is_byte_level(token: str) -> bool:
    """Whether a string consists of byte characters."""
    return all(character in _BYTES for character in token)


def whitespace_runs(longest: int = 15) -> list[str]:
    """One white-space character followed by 1 to `longest` repeats of one (section 2.1)."""
    return [
        first + rest * count
        for first in WHITESPACE
        for rest in WHITESPACE
        for count in range(1, longest + 1)
    ]
