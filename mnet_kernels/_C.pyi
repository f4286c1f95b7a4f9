"""csrc/bindings.cpp and direct_call.cpp."""

from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def set_instruction_set(name: str) -> None: ...
def dwconv_bn_act_direct(*arguments: Any) -> Tensor | None: ...

class Watch:
    def __init__(
        self,
        entries: list[tuple[dict[str, Any], str, Any]],
        sizes: list[tuple[dict[Any, Any], int]],
        list: int,
        addresses: list[int],
        versions: list[tuple[Tensor, int]],
    ) -> None: ...
    def unchanged(self) -> bool: ...

class Bytes:
    def __init__(self, spans: list[tuple[int, int]]) -> None: ...
    def unchanged(self) -> bool: ...
