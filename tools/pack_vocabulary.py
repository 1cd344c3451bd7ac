"""Pack the official World vocabulary into src/roost/assets/world.xz.

Usage: python tools/pack_vocabulary.py rwkv_vocab_v20230424.txt src/roost/assets/world.xz

The text file comes with the packages `rwkv` (CRLF) and `pyrwkv-tokenizer` (LF); both are the same vocabulary, pinned
here by the sha256 of the LF form. Owns: writing the packed layout which `roost.vocabulary` reads.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import sys
from collections import Counter
from pathlib import Path

from roost.files import replacing
from roost.tokenizer import WorldTokenizer

LF_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"


def pack(source: Path) -> bytes:
    """The packed vocabulary, not yet compressed. Raises ValueError when `source` is not the official file."""
    found = hashlib.sha256(source.read_bytes().replace(b"\r", b"")).hexdigest()
    if found != LF_SHA256:
        raise ValueError(f"{source} is not rwkv_vocab_v20230424: sha256 {found} without CR, wanted {LF_SHA256}")
    tokenizer = WorldTokenizer.from_file(source)
    tokens = [token for id in range(tokenizer.vocab_size) if (token := tokenizer.token_bytes(id))]
    assert tokens == sorted(tokens, key=lambda token: (len(token), token))
    counts = Counter(map(len, tokens))
    longest = max(counts)
    head = struct.pack(f"<H{longest}H", longest, *(counts[length] for length in range(1, longest + 1)))
    return head + b"".join(tokens)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with replacing(sys.argv[2]) as temporary:
        temporary.write_bytes(lzma.compress(pack(Path(sys.argv[1])), preset=9 | lzma.PRESET_EXTREME))
