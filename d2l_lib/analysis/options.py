"""Options that travel by keyword into one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

_Chosen = TypeVar("_Chosen")


def chosen(of: type[_Chosen], what: str, options: Mapping[str, object]) -> _Chosen:
    """The dataclass `of` with these fields. TypeError for an unknown option names `what` and its options."""
    names = [field.name for field in fields(of)]
    if unknown := [name for name in options if name not in names]:
        raise TypeError(f"{what} has no option {unknown[0]!r}; choose from {', '.join(names)}")
    return of(**options)
