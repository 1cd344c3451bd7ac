"""Text as the corpora hold it.

Owns: the normal form of training text: NFC, lines ended by LF, no control characters but LF and tab, no byte-order
marks, no blanks at the end of a line, at most one empty line in a row. Normalising twice changes nothing.
Refuses to know: tokens (the tokenizer never normalises) and where a text came from.
"""

from __future__ import annotations

import re
import unicodedata

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")  # tab (09) and LF (0a) stay
_BLANKS = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n{3,}")


def normalise(text: str) -> str:
    """Return `text` in normal form: NFC, LF, no controls, trimmed lines, one empty line at most, one LF at the end.

    An empty or blank text gives "".
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", _CONTROLS.sub("", text))
    text = _EMPTY_LINES.sub("\n\n", _BLANKS.sub("", text)).strip("\n")
    return text + "\n" if text else ""
