"""Shares of labels over time as a plot."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import fill
from typing import Literal

import numpy as np

from nightreel.reports.colours import colour_of
from storage.scenes import UNKNOWN
from storage.totals import PeriodTotal

_BAR_INCHES = 0.45
_NARROWEST, _WIDEST = 6.0, 40.0
_NOTICE_CHARACTERS = 20
"""Characters of a notice that fit into an inch."""
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
    """A stacked bar for each period.

    `labels` are the job's, in order. Below each bar stands how many videos it is made of.
    """
    from matplotlib import rc_context  # noqa: PLC0415 - an extra, and slow to load
    from matplotlib.figure import Figure  # noqa: PLC0415

    width = float(np.clip(_BAR_INCHES * len(periods) + 3.5, _NARROWEST, _WIDEST))
    # Fixed ids and no date make equal data equal files; text stays text in SVG.
    file, boxed = io.BytesIO(), set[str]()
    with rc_context({"svg.hashsalt": "nightreel", "svg.fonttype": "none"}), _missing_into(boxed):
        figure = Figure(figsize=(width, 4.2), layout="constrained")
        axes = figure.add_subplot()
        where = np.arange(len(periods))
        below = np.zeros(len(periods))
        shown = {one.label for period in periods for one in period.labels}
        positions = {name: at for at, name in enumerate(labels)}
        for name in sorted(shown, key=lambda name: positions.get(name, len(labels))):
            share = np.array(
                [sum(one.share for one in p.labels if one.label == name) for p in periods]
            )
            colour = colour_of(positions.get(name, UNKNOWN))
            axes.bar(where, share, bottom=below, width=0.8, color=colour, label=_literal(name))
            below += share
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xticks(
            where, [f"{_literal(p.period)}\n{p.videos}" for p in periods],
            rotation=0 if len(periods) <= 12 else 90,
        )  # fmt: skip
        axes.set_xlabel("period and number of videos")
        axes.set_title(_literal(title), loc="left")
        if shown:
            handles, names = axes.get_legend_handles_labels()
            figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False)
        if notice:
            # A label of the whole figure, since the layout keeps room for those alone.
            lines = fill(_literal(notice), round(width * _NOTICE_CHARACTERS))
            figure.supxlabel(lines, x=0.01, fontsize=6, ha="left")
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(file, format=form, dpi=150, metadata=metadata)
    # Whoever shows an SVG draws its texts, in a font of theirs.
    return Plot(file.getvalue(), "".join(sorted(boxed)) if form == "png" else "")


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
