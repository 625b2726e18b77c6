"""How long a benchmark will take, said before it starts: from one step of the model, and how many there will be of everything."""

from __future__ import annotations

from dataclasses import dataclass

from bnrestructure.bench.contenders import compiles, contenders, drawn, rungs
from bnrestructure.bench.settings import Settings

__all__ = ["Estimate"]

#: Steps that a job takes beside those it is for: a check trains the model in three ways, float64 among them, on a small batch.
_CHECK_STEPS, _MEMORY_STEPS, _PROFILED_STEPS = 6, 4, 5
#: Seconds for the ceilings of the machine.
_CEILINGS = 6.0


@dataclass(frozen=True)
class Estimate:
    """What is known once the model was loaded and one eager step was taken.

    step        seconds of one eager step of the whole batch
    small       the same of the batch that is checked
    load        seconds that a measuring process takes until it has the model
    memory_efficient    whether torchvision's own way to save memory is among the contenders
    """

    settings: Settings
    step: float
    small: float
    load: float
    memory_efficient: bool

    @property
    def variants(self) -> list[str]:
        """What takes turns."""
        return contenders(self.settings, self.memory_efficient)

    @property
    def _weighed(self) -> int:
        return sum(not compiles(name) for name in self.variants) if self.settings.memory else 0

    @property
    def _drawn(self) -> int:
        return len(drawn(self.settings, self.memory_efficient)) if self.settings.curves else 0

    @property
    def _compilations(self) -> int:
        return sum(compiles(name) for name in self.variants)

    @property
    def jobs(self) -> int:
        """Measuring processes: check, ceilings, compilations, and for each allocator setting the timing and each variant's memory."""
        return 2 + self._compilations + len(self.settings.malloc) * (1 + self._weighed) + self._drawn

    @property
    def seconds(self) -> float:
        """All of it but compilations, whose length nobody knows beforehand."""
        rounds = self.settings.warmup + self.settings.rounds
        check = self.load + _CHECK_STEPS * self.small * max(1, len(rungs(self.settings)))
        ceilings = self.load + _CEILINGS + self.step
        timing = self.load + self.step * (len(self.variants) * rounds + _PROFILED_STEPS)
        weighing = (self.load + _MEMORY_STEPS * self.step) * self._weighed
        drawing = (self.load + _MEMORY_STEPS * self.step) * self._drawn
        return check + ceilings + len(self.settings.malloc) * (timing + weighing) + drawing

    def __str__(self) -> str:
        settings = self.settings
        allocators = f"{len(settings.malloc)} allocator settings x " if len(settings.malloc) > 1 else ""
        text = (
            f"about {_minutes(self.seconds)}: {allocators}{len(self.variants)} variants x {settings.warmup + settings.rounds} steps of "
            f"{self.step:.2g} s, and memory"
        )
        if self._compilations:
            text += f"; torch.compile comes on top, at most {_minutes(settings.compile_limit)} for each of {self._compilations} variants"
        return text


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{seconds / 60:.0f} minutes"
