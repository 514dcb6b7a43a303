"""Shares of labels over time as a plot."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from textwrap import fill
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nightreel.reports.colours import colour_of
from storage.scenes import UNKNOWN
from storage.totals import PeriodTotal

_NARROWEST, _WIDEST = 4.0, 24.0
"""Inches of the axes."""
_LEVEL_INCHES = 10.0
"""Axes no wider than this have the names of periods beside each other; wider ones have them on
end."""
_CHARACTER, _ON_END = 0.09, 0.3
"""Inches of a character, and of a bar whose name stands on end."""
_NAME_CHARACTERS = 28
_MOST_LABELS = 24
"""Labels with a colour of their own; there is one for all others."""
_HATCHES = ("///", "...", "xxx", "+++")
"""For labels of a colour that another has already; denser from the fifth of them on."""
_OTHERS_COLOUR = "#e4e4e4"
_NOTICE_CHARACTERS = 20
"""Characters of a notice that fit into an inch."""
FloatArray = NDArray[np.float64]
_NO_GLYPH = re.compile(r"Glyph (\d+) .* missing")


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot as a file holds it."""

    data: bytes
    boxed: str
    """Characters that the font does not have, in place of which boxes stand."""


def draw_shares(
    periods: Sequence[PeriodTotal],
    labels: Sequence[str],
    form: Literal["png", "svg"],
    *,
    title: str,
    notice: str | None = None,
) -> Plot:
    """A stacked bar for each period that has scenes.

    `labels` are the job's, in order. With each bar's name stands how many videos it is made of;
    where bars are too many, every few have one.
    """
    from matplotlib import rc_context  # noqa: PLC0415 - an extra, and slow to load
    from matplotlib.figure import Figure  # noqa: PLC0415

    periods = [period for period in periods if period.labels]
    level = max((len(p.period) + 1 for p in periods), default=0) * _CHARACTER
    on_end = len(periods) * level > _LEVEL_INCHES
    pitch = _ON_END if on_end else level
    width = float(np.clip(pitch * len(periods), _NARROWEST, _WIDEST))
    every = max(1, ceil(len(periods) * pitch / width))
    # Fixed ids and no date make equal data equal files; text stays text in SVG.
    file, boxed = io.BytesIO(), set[str]()
    with rc_context({"svg.hashsalt": "nightreel", "svg.fonttype": "none"}), _missing_into(boxed):
        figure = Figure(figsize=(width, 4.2 + 0.6 * on_end), layout="constrained")
        axes = figure.add_subplot()
        where = np.arange(len(periods))
        below = np.zeros(len(periods))
        bars, names = [], []
        for name, share, looks in _shares(periods, labels):
            drawn = axes.bar(where, share, 0.8, below, color=looks.colour, hatch=looks.hatch)
            bars.append(drawn[0])
            names.append(_literal(fill(name, _NAME_CHARACTERS)))
            below += share
        axes.set_xlim(-0.6, max(len(periods), 1) - 0.4)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        between = "  " if on_end else "\n"
        axes.set_xticks(
            where[::every],
            [f"{_literal(p.period)}{between}{p.videos}" for p in periods[::every]],
            rotation=90 if on_end else 0,
        )
        axes.set_xlabel("period and number of videos")
        beside = 1.0
        if bars:
            legend = figure.legend(
                bars[::-1], names[::-1], loc="outside right upper", frameon=False
            )
            extent = legend.get_window_extent()
            beside += extent.width / figure.dpi
            figure.set_figheight(max(figure.get_figheight(), extent.height / figure.dpi + 0.2))
        figure.set_figwidth(width + beside)
        axes.set_title(_literal(fill(title, round(width / _CHARACTER))), loc="left")
        if notice:
            # A label of the whole figure, since the layout keeps room for those alone.
            lines = fill(notice, round(figure.get_figwidth() * _NOTICE_CHARACTERS))
            figure.supxlabel(_literal(lines), x=0.01, fontsize=6, ha="left")
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(file, format=form, dpi=150, metadata=metadata)
    # Whoever shows an SVG draws its texts, in a font of theirs.
    return Plot(file.getvalue(), "".join(sorted(boxed)) if form == "png" else "")


@dataclass(frozen=True, slots=True)
class _Looks:
    colour: str
    hatch: str


def _shares(
    periods: Sequence[PeriodTotal], labels: Sequence[str]
) -> Iterator[tuple[str, FloatArray, _Looks]]:
    """Name, shares by period and looks of what is drawn, from below: the labels that show longest,
    in the job's order, and all others as one."""
    shares: dict[str, FloatArray] = defaultdict(lambda: np.zeros(len(periods)))
    lasts: Counter[str] = Counter()
    for at, period in enumerate(periods):
        for one in period.labels:
            shares[one.label][at] += one.share
            lasts[one.label] += one.total_us
    positions = {name: at for at, name in enumerate(labels)}
    own = {name for name, _ in lasts.most_common(_MOST_LABELS)}
    used: Counter[str] = Counter()
    for name in sorted(own, key=lambda name: positions.get(name, len(labels))):
        colour = colour_of(positions.get(name, UNKNOWN))
        denser, kind = divmod(used[colour] - 1, len(_HATCHES))
        yield name, shares[name], _Looks(colour, _HATCHES[kind] * (denser + 1))
        used[colour] += 1
    if others := [share for name, share in shares.items() if name not in own]:
        yield f"{len(others)} others", np.sum(others, axis=0), _Looks(_OTHERS_COLOUR, "")


@contextmanager
def _missing_into(boxed: set[str]) -> Iterator[None]:
    """Collect the characters of which matplotlib warns that its font lacks them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", _NO_GLYPH.pattern)
        yield
    for one in said:
        if found := _NO_GLYPH.match(str(one.message)):
            boxed.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _literal(text: str) -> str:
    """A text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
