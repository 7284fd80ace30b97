"""What a setting may be: its range beside its default, its type in words, and the check of both."""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from co2lightning.errors import UserError, show
from co2lightning.runs.ledger import MAX_EPISODES


class Range(NamedTuple):
    """Numbers from `low` (or above it) to `high`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high in (math.inf, MAX_EPISODES):
            return low
        return f"{low} and at most {self.high:,g}"


COUNT = Range(1, 10_000_000)
COUNT_OR_NONE = Range(0, 10_000_000)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
SEED = Range(0, 2**63 - 1)
WIDTH = Range(1, 16_384)  # of a hidden layer

Kind = tuple[Any, Collection[Any] | None]
"""A setting's type and the values of that type that make sense; None: all of them."""


def setting(default: Any, allowed: Collection[Any]) -> Any:
    """Return the field of a dataclass, with the values that make sense beyond its type."""
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def kinds_of(settings_class: type) -> dict[str, Kind]:
    """Return the type and the range of each setting of a dataclass."""
    wanted = typing.get_type_hints(settings_class)
    fields_ = dataclasses.fields(settings_class)
    return {each.name: (wanted[each.name], each.metadata.get("allowed")) for each in fields_}


def check_range(name: str, value: Any, allowed: Collection[Any] | None) -> None:
    """Refuse a value of the right type that makes no sense; `name` begins the message."""
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        wanted = "a finite number"  # a whole number may be larger, too
    elif value is None or allowed is None:
        return
    elif isinstance(value, tuple):
        if 1 <= len(value) <= 16 and all(width in allowed for width in value):
            return
        wanted = f"1 to 16 widths, such as [64, 64], each {allowed}"
    elif value in allowed:
        return
    elif isinstance(allowed, Range):
        wanted = allowed
    else:
        wanted = f"one of {', '.join(dict.fromkeys(str(one) for one in allowed if one))}"
    shown = show(list(value) if isinstance(value, tuple) else value)
    raise UserError(f"{name} {shown}: must be {wanted}")


def check_types(stored: Mapping[Any, Any], kinds: Mapping[str, Kind], origin: str) -> Any:
    """Return settings that a stranger may have written, checked; none imports anything.

    Args:
        stored: Settings by their keys.
        kinds: What there is.
        origin: Begins the message.

    Raises:
        UserError: There is no such setting, or it cannot have that value.
    """
    checked: dict[str, Any] = {}
    for key, value in stored.items():
        if key not in kinds:
            raise UserError(f"{origin}: {show(key)} is not a setting")
        wanted, allowed = kinds[key]
        if not _fits(value, wanted):
            # Nothing deeper is shown: a list may hold itself.
            shown = f" {show(value)}" if isinstance(value, str | int | float) else ""
            raise UserError(f"{origin}: {key}{shown}: must be {in_words(wanted)}")
        checked[key] = tuple(value) if isinstance(value, list) else value
        check_range(f"{origin}: {key}", checked[key], allowed)
    return checked


def _fits(value: object, wanted: Any) -> bool:
    """Say whether a value is of a type that the settings of a run have."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is dict:
        weights = value.items() if isinstance(value, dict) else [(None, None)]
        return all(type(k) is str and type(v) in (int, float) for k, v in weights)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(type(part) is inner[0] for part in value)
    return type(value) in ((int, float) if wanted is float else (wanted,))


def in_words(wanted: Any) -> str:
    """Say in words what a type takes."""
    plain = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    if wanted in plain:
        return plain[wanted]
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(in_words, inner)))
    if origin is Literal:
        return " or ".join(str(choice) for choice in inner)
    if origin is tuple and inner[0] is str:
        return "a list of texts"
    if origin in (tuple, list) and inner[0] is int:
        return "a list of whole numbers, such as [64, 64]"
    if origin is dict:
        return "weights such as {co2: 1, cost: 0.2}"
    if origin is list:
        return f"a list of {in_words(inner[0])}"
    return f"the class_path of a {getattr(origin or wanted, '__name__', wanted)}"
