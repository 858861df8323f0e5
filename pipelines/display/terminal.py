"""Untrusted text on a terminal: it must not move the cursor, recolour or reorder."""

from __future__ import annotations

# C0 but tab and line feed, DEL, C1, and what turns the direction of writing (UAX #9).
_COMMANDS = (
    *(set(range(32)) - {9, 10}), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
)  # fmt: skip
_SURROGATES = range(0xD800, 0xE000)  # of names that are not UTF-8: stdout would refuse them
_ESCAPED = {code: ascii(chr(code))[1:-1] for code in (*_COMMANDS, *_SURROGATES)}


def harmless(text: str) -> str:
    """Escape every character that a terminal would obey, such as ``\\x1b``, and surrogates."""
    return text if text.isprintable() else text.translate(_ESCAPED)
