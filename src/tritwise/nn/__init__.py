"""Layers. A ternary layer holds int8 registers and int8 scale exponents, and declares the role of each."""

from tritwise.nn.attention import Attention, KVCache, Rotary
from tritwise.nn.dropout import dropout, noise_of
from tritwise.nn.embedding import FloatEmbedding, TritEmbedding
from tritwise.nn.graph import TritGraph
from tritwise.nn.ledger import KVLedger
from tritwise.nn.linear import FloatLinear, TritLinear, decoded, use_fp8
from tritwise.nn.lstm import TritLSTM, TritLSTMCell
from tritwise.nn.mlp import MLP
from tritwise.nn.moe import TritMoE
from tritwise.nn.ngram import NGramEmbedding
from tritwise.nn.norm import relu_squared_norm, rms_norm
from tritwise.nn.trit import ROLES, TritModule, of_trits, tensor_roles, trit_modules
from tritwise.nn.vector import FloatVector, TritVector
from tritwise.nn.vq import TritVQ

__all__ = [
    "MLP",
    "ROLES",
    "Attention",
    "FloatEmbedding",
    "FloatLinear",
    "FloatVector",
    "KVCache",
    "KVLedger",
    "NGramEmbedding",
    "Rotary",
    "TritEmbedding",
    "TritGraph",
    "TritLSTM",
    "TritLSTMCell",
    "TritLinear",
    "TritMoE",
    "TritModule",
    "TritVQ",
    "TritVector",
    "decoded",
    "dropout",
    "noise_of",
    "of_trits",
    "relu_squared_norm",
    "rms_norm",
    "tensor_roles",
    "trit_modules",
    "use_fp8",
]
