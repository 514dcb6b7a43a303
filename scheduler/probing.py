"""Probing and planning videos in processes of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import partial

from scheduler.children import in_children
from storage.records import Sampling
from workers.probing import Asked, Probed, probe_and_plan


def probe_all(
    files: Iterable[Asked],
    sampling: Sampling,
    task_us: int,
    *,
    processes: int,
    stop: threading.Event,
) -> Iterator[Probed]:
    """Yield what probing found for each file, in order, as `in_children` does: a file that kills
    its process twice is rejected."""
    work = partial(probe_and_plan, sampling=sampling, task_us=task_us)
    for asked, found in in_children(work, files, processes=processes, stop=stop):
        if found is None:
            reason = "reading it crashes the media library: convert it, or leave it out"
            yield Probed(asked.file, asked.content_id, None, (), "crashes", reason)
        else:
            yield found
