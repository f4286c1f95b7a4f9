"""A run of layers while it is being found (find_runs.py).

Its values are numbered as in runs/stages.py: 0 is the input, i + 1 the result of stage i. The lists
here have one entry a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mnet_kernels.runs.stages import Stage


@dataclass
class Draft:
    """A run so far. What a method returns is whether the stage fits; if not, nothing changed."""

    stages: list[Stage] = field(default_factory=list)
    #: Channels; None: not known before the first convolution.
    channels: list[int | None] = field(default_factory=lambda: [None])
    #: Not the sizes themselves, which differ from call to call, but labels of them: two values with
    #: the same label have the same height and width.
    sizes: list[int] = field(default_factory=lambda: [0])
    #: The values that are known to have one pixel.
    pooled: set[int] = field(default_factory=set)
    #: See Run.
    inert: list[str] = field(default_factory=list)
    flat_input: bool = False
    #: Whether the latest value is (N, C).
    flat: bool = False

    @property
    def latest(self) -> int:
        """The number of the latest value."""
        return len(self.stages)

    def copy(self) -> Draft:
        """One that can be extended without changing this one."""
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
        """Add a convolution; ``pooled``: its result has one pixel, ``keeps_size``: as many rows and
        columns as its input."""
        self.channels = [inputs if c is None else c for c in self.channels]
        self._add(Stage("conv", path), outputs, pooled, self.sizes[-1] if keeps_size else None)

    def pool(self) -> None:
        """Add a global mean."""
        if self.latest not in self.pooled:
            self._add(Stage("pool"), self.channels[-1], True)

    def sigmoid(self) -> bool:
        """Add a sigmoid, which a gate ends in: of one pixel."""
        if self.latest in self.pooled:
            self._add(Stage("sigmoid"), self.channels[-1], True, self.sizes[-1])
        return self.latest in self.pooled

    def scale(self, other: int) -> bool:
        """Add the product of the value ``other`` with the latest one, a factor for each channel."""
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
        self.sizes.append(self.latest if size is None else size)  # None: a new label
        if pooled:
            self.pooled.add(self.latest)

    def last_conv(self) -> Stage | None:
        """The latest stage, if it is a convolution."""
        stage = self.stages[-1] if self.stages else None
        return stage if stage is not None and stage.kind == "conv" else None
