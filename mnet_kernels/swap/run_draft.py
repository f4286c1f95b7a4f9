"""A run of layers while it is being found."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mnet_kernels.runs.stages import Stage


@dataclass
class Draft:
    """A run so far. ``pooled`` are the values that have one pixel, ``channels`` those of each value
    (None: not known yet), ``sizes`` numbers that are equal where height and width are."""

    stages: list[Stage] = field(default_factory=list)
    channels: list[int | None] = field(default_factory=lambda: [None])
    sizes: list[int] = field(default_factory=lambda: [0])
    pooled: set[int] = field(default_factory=set)
    inert: list[str] = field(default_factory=list)
    flat_input: bool = False
    #: The latest value is (N, C).
    flat: bool = False

    @property
    def latest(self) -> int:
        return len(self.stages)

    def copy(self) -> Draft:
        return replace(
            self,
            stages=[*self.stages],
            channels=[*self.channels],
            sizes=[*self.sizes],
            pooled={*self.pooled},
            inert=[*self.inert],
        )

    def convolve(
        self, path: str, inputs: int, outputs: int, pooled: bool, keeps_size: bool = True
    ) -> None:
        self.channels = [inputs if c is None else c for c in self.channels]
        self._add(Stage("conv", path), outputs, pooled, self.sizes[-1] if keeps_size else None)

    def pool(self) -> None:
        if self.latest not in self.pooled:
            self._add(Stage("pool"), self.channels[-1], True)

    def sigmoid(self) -> bool:
        if self.latest in self.pooled:
            self._add(Stage("sigmoid"), self.channels[-1], True, self.sizes[-1])
        return self.latest in self.pooled

    def scale(self, other: int) -> bool:
        channels = self.channels[-1]
        fits = channels is not None and self.channels[other] == channels
        if fits:
            self._add(Stage("scale", other=other), channels, False, self.sizes[other])
        return fits

    def _add(
        self, stage: Stage, channels: int | None, pooled: bool, size: int | None = None
    ) -> None:
        self.stages.append(stage)
        self.channels.append(channels)
        self.sizes.append(self.latest if size is None else size)  # None: another one
        if pooled:
            self.pooled.add(self.latest)

    def last_conv(self) -> Stage | None:
        stage = self.stages[-1] if self.stages else None
        return stage if stage is not None and stage.kind == "conv" else None
