"""Plots of shares, measured as they are drawn."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import pairwise
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from nightreel.reports.plots import draw_shares
from storage.totals import LabelTotal, PeriodTotal

SEASONS = ["Winter Season", "Autumn Season", "Spring Season", "Summer Season", "something else"]
WORDY = [f"a label with a prompt of so many words that it takes lines, of kind {n}" for n in "abcd"]
MONTHS = [f"{2020 + n // 12}-{n % 12 + 1:02}" for n in range(60)]
DAYS = [f"{date(2023, 12, 1) + timedelta(n)}" for n in range(200)]


def period(name: str, labels: list[str]) -> PeriodTotal:
    """A period in which each label takes as long."""
    each = tuple(LabelTotal(label, 10**6, 1 / len(labels), 1, 1) for label in labels)
    return PeriodTotal(name, 12, 10**7, 10**7, {"container": 12}, each)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Each figure that was written to a file, after that."""
    figures: list[Figure] = []
    write = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        write(figure, *args, **kwargs)
        figure.draw_without_rendering()  # at the resolution of the screen again
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.mark.parametrize("labels", [SEASONS, WORDY, [f"label {n}" for n in range(60)]])
@pytest.mark.parametrize(
    "names",
    [["all"], MONTHS[:6], MONTHS[:12], MONTHS[:13], MONTHS, DAYS[:7], DAYS[:12], DAYS],
    ids=lambda names: f"{len(names)} from {names[0]}",
)
def test_nothing_in_a_plot_covers_anything_else(
    drawn: list[Figure], names: list[str], labels: list[str]
) -> None:
    """Names of periods lie apart, the legend beside the axes, which take their share of the page,
    and all words within it."""
    notice = "Whoever reads this plot should know how coarse the engine is. " * 4
    title = "a job whose name is long because it says which archive: share of time"
    periods = [period(name, labels) for name in names]
    draw_shares(periods, labels, "png", title=title, notice=notice)
    (figure,) = drawn
    (axes,) = figure.axes
    (legend,) = figure.legends
    page, inside = figure.bbox, axes.get_window_extent()
    ticks = [tick.get_window_extent() for tick in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(ticks))
    beside = legend.get_window_extent()
    texts = [one for one in figure.findobj(Text) if one.get_text() and one.get_visible()]
    assert {"period and number of videos", "100%"} <= {one.get_text() for one in texts}
    for box in (beside, *(one.get_window_extent() for one in texts)):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
    assert inside.x1 <= beside.x0
    assert inside.width > page.width / 3
    assert inside.height > page.height / 3


def test_a_bar_for_each_period_that_shows_anything(drawn: list[Figure]) -> None:
    """A period without scenes has none; bars reach 100 %, whatever number of labels there is."""
    labels = [f"label {n}" for n in range(60)]
    periods = [period("2024-01", labels[:3]), period("2024-02", labels)]
    nothing = PeriodTotal("undated", 1, 0, 0, {}, ())
    draw_shares([*periods, nothing], labels, "svg", title="all")
    (axes,) = drawn[0].axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2024-01\n12", "2024-02\n12"]
    tops = {0: 0.0, 1: 0.0}
    for bar in axes.patches:
        tops[round(bar.get_x() + bar.get_width() / 2)] += bar.get_height()
    assert list(tops.values()) == pytest.approx([1, 1])
    (legend,) = drawn[0].legends
    assert "36 others" in [text.get_text() for text in legend.get_texts()]


def test_labels_of_one_colour_differ_by_their_pattern(drawn: list[Figure]) -> None:
    """Labels that are drawn are told apart, though there are ten colours for a thousand labels."""
    labels = [f"label {n}" for n in range(1000)]
    for shown in (labels[:24], labels[:240:10], ["label 0", "label 3", "label 40", "label 43"]):
        draw_shares([period("2024-01", shown)], labels, "png", title="all")
        looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in drawn[-1].axes[0].patches}
        assert len(looks) == len(shown)


def test_every_label_is_named_as_it_is_written(drawn: list[Figure]) -> None:
    """Whatever it begins with or holds, at the end of a line too."""
    labels = ["_hidden", "a" * 27 + "$b$", "tab\tand ${x}$"]
    plot = draw_shares([period("2024-01", labels)], labels, "svg", title="$x$ " * 40)
    (legend,) = drawn[0].legends
    assert len(legend.get_texts()) == 3
    svg = plot.data.decode()
    assert "_hidden" in svg
    assert "$x$" in svg
    assert "\\" not in svg.partition("</metadata>")[2]


def test_a_job_without_scenes_gives_an_empty_plot(drawn: list[Figure]) -> None:
    """Axes with nothing in them, and no error."""
    assert draw_shares([], ["a", "b"], "png", title="none").data.startswith(b"\x89PNG")
    assert not drawn[0].axes[0].patches
