"""The operations as Triton kernels, under their names in `reference`. Imported only where triton is."""

from kernels.attention import paged_attention
from kernels.matmul import linear
from kernels.rms_norm import rms_norm
from kernels.rope_cache import rope_write
from kernels.sample import apply_penalties, sample, token_logprobs, uniform
from kernels.swiglu import swiglu

__all__ = [
    "apply_penalties", "linear", "paged_attention", "rms_norm", "rope_write", "sample", "swiglu", "token_logprobs",
    "uniform",
]  # fmt: skip
