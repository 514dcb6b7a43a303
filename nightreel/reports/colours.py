"""Colours of labels, the same in every picture of a job."""

from __future__ import annotations

from storage.scenes import UNKNOWN

_PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9",
    "#d55e00", "#f0e442", "#7b5fb0", "#8c564b", "#3f7f3f",
)  # fmt: skip
"""Okabe and Ito's colours, which most colour-blind people tell apart, and three more."""
_GREY = "#9a9a9a"


def colour_of(label: int) -> str:
    """The colour of the label at this position, as `#rrggbb`; grey where no label is claimed."""
    return _GREY if label == UNKNOWN else _PALETTE[label % len(_PALETTE)]
