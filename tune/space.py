"""Spaces of knobs, in Ray Tune's own words: what a knob may be, and which values bound it."""

import math
from collections.abc import Mapping
from typing import Any, Self

import ray.tune
from pydantic import model_serializer
from pydantic import model_validator as validates

from pilotfish.config import Config


class Distribution(Config):
    """Values of one knob: exactly one of the fields, as Ray Tune's function of that name takes it.

    >>> Distribution(quniform=(0.1, 0.9, 0.1))
    """

    uniform: tuple[float, float] | None = None
    """From, to."""
    loguniform: tuple[float, float] | None = None
    """From, to; both positive."""
    quniform: tuple[float, float, float] | None = None
    """From, to (itself possible), step; both bounds are multiples of the step."""
    randint: tuple[int, int] | None = None
    """From, to; the last is never drawn."""
    choice: tuple[Any, ...] | None = None
    grid_search: tuple[Any, ...] | None = None
    """Every one of these, with every value of the other grids."""

    @validates(mode="after")
    def _check(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            named = ", ".join(given) or "none"
            raise ValueError(
                f"wanted exactly one distribution ({', '.join(type(self).model_fields)}), got "
                f"{named}"
            )
        arguments = self.arguments
        if not arguments:
            raise ValueError(f"{self.name} has no values")
        if self.is_numeric and not arguments[0] < arguments[1]:
            raise ValueError(f"{self.name}: wanted the lower bound first, got {list(arguments)}")
        if self.loguniform and arguments[0] <= 0:
            raise ValueError(f"loguniform: wanted positive bounds, got {list(arguments)}")
        if self.quniform and not all(_is_multiple(bound, arguments[2]) for bound in arguments[:2]):
            raise ValueError(f"quniform: wanted bounds that are multiples of {arguments[2]}")
        return self

    @model_serializer
    def _short(self) -> dict[str, list[Any]]:
        return {self.name: list(self.arguments)}

    @property
    def name(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return getattr(self, self.name)

    @property
    def is_numeric(self) -> bool:
        """Whether values lie between bounds; otherwise they are listed."""
        return self.name not in ("choice", "grid_search")

    @property
    def corners(self) -> tuple[Any, ...]:
        """The least and the greatest value that is drawn, or all that are listed."""
        if self.randint:
            return self.randint[0], self.randint[1] - 1
        return self.arguments[:2] if self.is_numeric else self.arguments

    def __contains__(self, value: Any) -> bool:
        if not self.is_numeric:
            return value in self.arguments
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        lower, upper = self.corners
        if not lower <= value <= upper or (self.randint and value != int(value)):
            return False
        return self.quniform is None or _is_multiple(value, self.quniform[2])

    def __str__(self) -> str:
        return f"{self.name}{list(self.arguments)}"

    def to_tune(self) -> Any:
        """Return what `Tuner(param_space=...)` wants."""
        if self.is_numeric:
            return getattr(ray.tune, self.name)(*self.arguments)
        return getattr(ray.tune, self.name)(list(self.arguments))


def _is_multiple(value: float, step: float) -> bool:
    return step > 0 and math.isclose(value / step, round(value / step), abs_tol=1e-9)


def show(knobs: Mapping[str, Any]) -> str:
    """Return a point of a space in one line."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in knobs.items()
    )
