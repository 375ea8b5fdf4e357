"""Options of the commands: numbers that are checked before anything else is done, and one line where they are wrong."""

from __future__ import annotations

import argparse
import math
import re
from typing import NoReturn

MOST = 2**40  # of anything that is counted on a command line
LARGEST_SEED = 2**32 - 1  # what every generator of random numbers takes


class Parser(argparse.ArgumentParser):
    """argparse's parser, which ends with status 2 and one line on stderr where the options are wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")


def count(text: str) -> int:
    """A whole number of at least 1, as `type=` of an option."""
    return _whole(text, 1, MOST)


def count_or_none(text: str) -> int:
    """A whole number of at least 0, as `type=` of an option."""
    return _whole(text, 0, MOST)


def seed(text: str) -> int:
    """A seed, from 0 to 2^32 - 1, as `type=` of an option."""
    return _whole(text, 0, LARGEST_SEED)


def positive(text: str) -> float:
    """A finite number above 0, as `type=` of an option."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"a number above 0 is expected, not {text[:40]!r}")
    return number


def _whole(text: str, least: int, most: int) -> int:
    number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,40}", text) else None
    if number is None or not least <= number <= most:
        raise argparse.ArgumentTypeError(f"a whole number from {least} to {most} is expected, not {text[:40]!r}")
    return number
