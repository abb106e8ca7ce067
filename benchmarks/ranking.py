"""Whether two results rank the variants of each layer alike."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from benchmarks.stored import program

# Two variants whose medians are closer than that are called equal: their order is noise.
EQUAL = 0.1


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of two results.

    Attributes:
      alike: layers (and passes) that rank their variants alike in both.
      differing: those that do not, with the pairs of variants that changed places.
    """

    alike: tuple[str, ...]
    differing: dict[str, tuple[str, ...]]

    @property
    def share(self) -> float:
        count = len(self.alike) + len(self.differing)
        return len(self.alike) / count if count else 0.0

    def __str__(self) -> str:
        count = len(self.alike) + len(self.differing)
        if not count:
            return "No layer is in both results, at the same size and dtype."
        text = (
            f"{len(self.alike)} of {count} layers rank their variants alike in both "
            f"({self.share:.0%}); times within {EQUAL:.0%} count as equal."
        )
        if self.differing:
            told = [f"{layer} ({', '.join(pairs)})" for layer, pairs in self.differing.items()]
            text += f" Others: {'; '.join(told[:12])}{'; ...' if len(told) > 12 else ''}."
        return text


def agreement(a: Mapping[str, Any], b: Mapping[str, Any]) -> Agreement:
    """Compares the layers and passes that both results hold, at the same size.

    Two rank alike where no variant that is faster than another in one, by more than `EQUAL`, is
    slower in the other by more than that, or compiles to another program.
    """
    others = {key(m): m for m in b["measurements"]}
    alike, differing = [], {}
    for m in a["measurements"]:
        other = others.get(key(m))
        if other is None:
            continue
        changed = _changed(m["variants"], other["variants"])
        label = f"{m['layer']['name']}, {m['pass']}"
        if changed:
            differing[label] = changed
        else:
            alike.append(label)
    return Agreement(tuple(alike), differing)


def key(m: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """By which a measurement of one result is found in another."""
    return m["layer"]["name"], m["layer"]["size"], m["layer"]["dtype"], m["pass"]


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    both = [n for n in a if "ms" in a[n] and "ms" in b.get(n, {})]
    return tuple(
        f"{one}/{two}"
        for one, two in itertools.combinations(both, 2)
        if _order(a, one, two) * _order(b, one, two) < 0
    )


def _order(variants: Mapping[str, Any], one: str, two: str) -> int:
    """1 where ``one`` is faster, -1 where ``two`` is, 0 where it can't be told."""
    if program(variants, one) == program(variants, two):
        return 0
    ratio = variants[two]["ms"] / variants[one]["ms"]
    return 1 if ratio > 1 + EQUAL else -1 if ratio < 1 / (1 + EQUAL) else 0
