"""roost: run, train and study Eagle (RWKV-5.2) and Finch (RWKV-6), recurrent language models with a
state of constant size.

Training, prefill and decoding are one call: `logits, state = model(tokens, state)`.
"""

from roost.checkpoint import convert, info, load
from roost.config import PRESETS, ModelConfig
from roost.data.loader import TokenLoader
from roost.evaluation.loss import bits_per_byte
from roost.inference.sampling import Sampling
from roost.inference.stream import generate, read, stream
from roost.models.rwkv import RWKV
from roost.ops import wkv, wkv_backend
from roost.state import LayerState, State
from roost.tokenizer import StreamDecoder, WorldTokenizer
from roost.training.config import TrainConfig
from roost.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "RWKV",
    "LayerState",
    "ModelConfig",
    "Sampling",
    "State",
    "StreamDecoder",
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
