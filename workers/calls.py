"""How many calls an endpoint is asked for what, so that a plan and a worker count alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from storage.records import LabelSet
from workers.settings import MAX_BATCH


def range_calls(pictures: int, *, embeds: bool, batch: int, prompts: int) -> int:
    """Calls for the pictures of one range: `batch` of them a call where they are embedded, else
    each is compared with the label set's `prompts`, as many a call as an endpoint takes."""
    return ceil(pictures / batch) if embeds else pictures * ceil(prompts / MAX_BATCH)


def label_calls(labels: LabelSet, *, embeds: bool, batch: int) -> tuple[int, int]:
    """Image calls and text calls for a label set, made once. Where nothing is embedded, only labels
    of several prompts cost: each prompt is compared with all of its label."""
    if embeds:
        pictures = sum(ceil(len(label.examples) / batch) for label in labels.labels)
        return pictures, int(any(label.prompts for label in labels.labels))
    several = [len(label.prompts) for label in labels.labels if len(label.prompts) > 1]
    return 0, sum(n * ceil(n / MAX_BATCH) for n in several)


def groups_of(prompts: Sequence[str]) -> list[Sequence[str]]:
    """The prompts of a comparison, as many a call as an endpoint takes."""
    return [prompts[at : at + MAX_BATCH] for at in range(0, len(prompts), MAX_BATCH)]


def prompts_of(labels: LabelSet) -> tuple[str, ...]:
    """The prompts of a label set in order, each once."""
    return tuple(dict.fromkeys(p for label in labels.labels for p in label.prompts))


def labels_key(model: str, *, embeds: bool) -> str:
    """The name under which what the API says of a label set is stored: vectors, or weights."""
    return model if embeds else f"{model} by comparison"
