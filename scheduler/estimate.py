"""What a job will cost, from its plan alone. Pure: nothing is opened and nobody is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from storage.records import Fit, FrameRange, LabelSet, VideoInfo
from workers.calls import groups_of, label_calls, prompts_of, range_calls
from workers.contract import Body, comparison_body, pictures_body, texts_body


@dataclass(frozen=True, slots=True)
class Planned:
    """A video as it would be worked on."""

    path: str
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
    frames_sent: int
    """How often a sample's squares are sent: more than once where prompts take several calls."""
    other_bytes: int
    """Of all requests, without what stands for the frames."""

    @property
    def calls(self) -> int:
        """Requests that the endpoint bills."""
        return self.image_calls + self.text_calls

    def bytes_at(self, frame_bytes: float) -> float:
        """What is sent, at so many bytes for the squares of a sample."""
        return self.frames_sent * frame_bytes + self.other_bytes

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
    weight: Callable[[Body], int],
    asking_bytes: int,
) -> Estimate:
    """Return what the videos so planned will cost at an endpoint that embeds, `batch` pictures a
    call, or only compares. `labels_known` says that the model was asked about the labels before;
    `weight` is what a request with a body counts for, and `asking_bytes` what it takes to ask
    whether lists of pictures work. How many duplicates there are to skip is known after decoding
    only: the estimate skips none."""
    prompts = prompts_of(labels)
    groups = groups_of(prompts)
    if embeds:
        of_call = [0, *(weight(pictures_body([b""] * n)) for n in range(1, batch + 1))]
    else:
        of_picture = sum(weight(comparison_body(b"", group)) for group in groups)
    videos = duration_us = samples = embedded = calls = sent = 0
    for plan in plans:
        videos += 1
        duration_us += plan.info.duration_us
        for one, stored in zip(plan.ranges, plan.embedded, strict=True):
            samples += len(one.buckets)
            if stored:
                embedded += len(one.buckets)
                continue
            pictures = len(one.buckets) * fit.squares
            calls += range_calls(pictures, embeds=embeds, batch=batch, prompts=len(prompts))
            if embeds:
                full, rest = divmod(pictures, batch)
                sent += full * of_call[batch] + of_call[rest]
            else:
                sent += pictures * of_picture
    of_labels = texts = 0
    if samples and not labels_known:
        of_labels, texts = label_calls(labels, embeds=embeds, batch=batch)
        sent += sum(map(weight, _label_bodies(labels, embeds=embeds, batch=batch)))
    asks = calls + of_labels > 0
    return Estimate(
        videos=videos,
        duration_us=duration_us,
        samples=samples,
        embedded=embedded,
        # An endpoint that only compares turns the question away, and does not bill it.
        image_calls=calls + of_labels + int(embeds and asks),
        text_calls=texts,
        frames_sent=(samples - embedded) * (1 if embeds else len(groups)),
        other_bytes=sent + asking_bytes * asks,
    )


def _label_bodies(labels: LabelSet, *, embeds: bool, batch: int) -> Iterator[Body]:
    """What an endpoint is asked about a label set, as `label_calls` counts it."""
    if embeds and (prompts := prompts_of(labels)):
        yield texts_body(prompts)
    for label in labels.labels:
        if embeds:
            for at in range(0, len(label.examples), batch):
                yield pictures_body(label.examples[at : at + batch])
        elif len(label.prompts) > 1:
            for prompt in label.prompts:
                for group in groups_of(label.prompts):
                    yield comparison_body(prompt, group)
