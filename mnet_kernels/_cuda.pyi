"""csrc/cuda/bindings.cpp."""

from collections.abc import Sequence

class CallFacts:
    variant: str
    able: list[str]
    blocks: int
    threads: int
    shared_bytes: int
    # Of the running GPU's machine code; -1 where there is no GPU.
    registers: int
    local_bytes: int
    blocks_per_sm: int

def build_info() -> dict[str, str]: ...
def variants() -> list[str]: ...
def force_variant(name: str) -> None: ...
def backward_variants() -> list[str]: ...
def force_backward(name: str) -> None: ...
def facts_of_call(
    x: Sequence[int],
    dtype: str,
    channels_last: bool,
    weight: Sequence[int],
    stride: Sequence[int] = ...,
    padding: Sequence[int] = ...,
    dilation: Sequence[int] = ...,
) -> CallFacts: ...
def separable_variants() -> list[str]: ...
def force_separable_variant(name: str) -> None: ...
def facts_of_separable_call(
    x: Sequence[int],
    dtype: str,
    dw_weight: Sequence[int],
    outputs: int,
    stride: Sequence[int] = ...,
    padding: Sequence[int] = ...,
    dilation: Sequence[int] = ...,
    tf32: bool = ...,
) -> CallFacts: ...
def conv_variants() -> list[str]: ...
def force_conv_variant(name: str) -> None: ...
def facts_of_conv_call(
    x: Sequence[int],
    dtype: str,
    weight: Sequence[int],
    stride: Sequence[int] = ...,
    padding: Sequence[int] = ...,
    dilation: Sequence[int] = ...,
    tf32: bool = ...,
) -> CallFacts: ...
