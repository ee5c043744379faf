"""How far estimates of tokens are off, per model, learned from what servers report. One for all runs of a process."""

from __future__ import annotations


class Calibration:
    """How far our estimates are off, per model: reported tokens ÷ estimated tokens, smoothed."""

    WEIGHT = 0.3
    LOWEST, HIGHEST = 0.5, 3.0

    def __init__(self) -> None:
        self._factors: dict[str, float] = {}

    def factor(self, model: str) -> float:
        return self._factors.get(model, 1.0)

    def overflowed(self, model: str) -> None:
        """The server found a prompt too long that we thought would fit."""
        self._factors[model] = min(self.factor(model) * 1.5, self.HIGHEST)

    def learn(self, model: str, estimated: int, reported: int) -> None:
        """estimated: uncalibrated. A short prompt teaches nothing: fixed overheads outweigh it."""
        if estimated < 200 or reported <= 0:
            return
        seen = min(max(reported / estimated, self.LOWEST), self.HIGHEST)
        old = self._factors.get(model)
        self._factors[model] = seen if old is None else old + self.WEIGHT * (seen - old)
