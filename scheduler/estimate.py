"""What a job will cost, from its plan alone. Pure: nothing is opened and nobody is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.records import Fit, FrameRange, LabelSet, VideoInfo
from workers.calls import label_calls, prompts_of, range_calls

JPEG_TABLES_BYTES = 620
"""What every JPEG picture begins with, however small it is."""
PIXELS_BYTES_224 = 10_900
"""The rest of a picture of 224 x 224 at quality 90: the median over real clips, whose means went
from 5,400 to 24,000."""
PIXELS_GROWTH = 1.5
"""Power of the side by which the rest grows: fitted to the same clips between 64 and 448 pixels. A
frame scaled to less has more detail in each pixel, so it is not the area's 2."""
BASE64 = 4 / 3
REQUEST_BYTES = 120
"""Field names and model name of a request."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A video as it would be worked on."""

    info: VideoInfo
    ranges: Sequence[FrameRange]
    embedded: Sequence[bool]
    """Of each range, whether its vectors are stored, so that nothing of it is decoded or sent."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job will cost where nothing fails."""

    videos: int
    duration_us: int
    samples: int
    embedded: int
    """Of the samples, those whose vectors are stored."""
    image_calls: int
    text_calls: int
    bytes_sent: int
    """About: what a picture weighs is known after decoding only."""

    @property
    def calls(self) -> int:
        """Requests that the endpoint bills."""
        return self.image_calls + self.text_calls

    def seconds_at(self, calls_per_second: float) -> float:
        """How long the calls take at that rate."""
        return self.calls / calls_per_second

    def credits_at(self, per_1000_calls: float) -> float:
        """Price of the calls."""
        return self.calls * per_1000_calls / 1000


def estimate(
    plans: Iterable[Planned],
    labels: LabelSet,
    *,
    labels_known: bool,
    fit: Fit,
    embeds: bool,
    batch: int,
    input_size: int,
) -> Estimate:
    """Return what the videos so planned will cost at an endpoint that embeds, `batch` pictures a
    call, or only compares; pictures are squares of `input_size` pixels. `labels_known` says that
    the model was asked about the labels before. How many duplicates there are to skip is known
    after decoding only: the estimate skips none."""
    prompts = len(prompts_of(labels))
    videos = duration_us = samples = embedded = calls = 0
    for plan in plans:
        videos += 1
        duration_us += plan.info.duration_us
        for one, stored in zip(plan.ranges, plan.embedded, strict=True):
            samples += len(one.buckets)
            if stored:
                embedded += len(one.buckets)
                continue
            pictures = len(one.buckets) * fit.squares
            calls += range_calls(pictures, embeds=embeds, batch=batch, prompts=prompts)
    of_labels = texts = examples = 0
    if samples and not labels_known:
        of_labels, texts = label_calls(labels, embeds=embeds, batch=batch)
        examples = sum(len(label.examples) for label in labels.labels) if embeds else 0
    times_sent = 1 if embeds else range_calls(1, embeds=False, batch=1, prompts=prompts)
    pixels = PIXELS_BYTES_224 * (input_size / 224) ** PIXELS_GROWTH
    picture = (JPEG_TABLES_BYTES + pixels) * BASE64
    # Whether lists of pictures work is asked once, by a call, before any is sent.
    image_calls = calls + of_labels + int(embeds and calls + of_labels > 0)
    sent = (samples - embedded) * fit.squares * times_sent + examples
    return Estimate(
        videos=videos,
        duration_us=duration_us,
        samples=samples,
        embedded=embedded,
        image_calls=image_calls,
        text_calls=texts,
        bytes_sent=round(sent * picture + (image_calls + texts) * REQUEST_BYTES),
    )
