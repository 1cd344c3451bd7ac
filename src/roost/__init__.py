"""roost: run, train and study Eagle (RWKV-5.2) and Finch (RWKV-6), recurrent language models with a
state of constant size.

Training, prefill and decoding are one call: `logits, state = model(tokens, state)`.
"""

import sys
from pathlib import Path

try:
    from roost.checkpoint import convert, info
    from roost.config import PRESETS, ModelConfig
    from roost.data.loader import PackedLoader, TokenLoader
    from roost.evaluation.loss import bits_per_byte
    from roost.inference.sampling import Sampling
    from roost.inference.stream import generate, read, stream
    from roost.loading import load
    from roost.models.native import NativeModel
    from roost.models.rwkv import RWKV
    from roost.ops import wkv, wkv_backend
    from roost.state import LayerState, State
    from roost.tokenizer import StreamDecoder, StreamEncoder, WorldTokenizer
    from roost.training.config import TrainConfig
    from roost.training.loop import train
except KeyboardInterrupt:  # torch takes seconds to load: in the command line Ctrl-C is as quiet then as it is later
    if Path(sys.argv[0]).stem not in ("roost", "-m"):
        raise
    sys.exit(130)

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "RWKV",
    "LayerState",
    "ModelConfig",
    "NativeModel",
    "PackedLoader",
    "Sampling",
    "State",
    "StreamDecoder",
    "StreamEncoder",
    "TokenLoader",
    "TrainConfig",
    "WorldTokenizer",
    "bits_per_byte",
    "convert",
    "generate",
    "info",
    "load",
    "read",
    "stream",
    "train",
    "wkv",
    "wkv_backend",
]
