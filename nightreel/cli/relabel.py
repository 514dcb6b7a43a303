"""`nightreel relabel`: other labels for a job that is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nightreel.cli.asked import job_asked
from nightreel.cli.options import JOB_ID, api_options, database_option, format_option
from nightreel.cli.output import OutputError, counted, say
from storage.exits import ExitCode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nightreel.asking import SameApi
    from storage.ledger import Job
    from storage.records import LabelSet


@click.command(
    epilog="""\b
Examples:
  nightreel relabel 1 --labels weather.yaml
  nightreel relabel 1 --label rain --label snow --label "clear sky"
  nightreel relabel 1 --like goal=match.mp4@0:12:03 --like play=match.mp4@0:20:00

The new job stands beside the old one; the same command again only adds what is new."""
)
@click.argument("job_id", type=JOB_ID, metavar="JOB")
@click.option("--label", "label_texts", multiple=True, metavar="TEXT", help="A label; repeat it.")
@click.option(
    "--labels",
    "labels_file",
    type=click.Path(path_type=Path),
    help="YAML file of labels: prompts, example pictures, thresholds, flags.",
)
@click.option(
    "--like",
    "likes",
    multiple=True,
    metavar="[NAME=]VIDEO@TIME",
    help="A label given by a moment of the archive; repeat it.",
)
@api_options
@database_option
@format_option
def relabel(  # noqa: PLR0917 - one parameter an option
    job_id: int,
    label_texts: tuple[str, ...],
    labels_file: Path | None,
    likes: tuple[str, ...],
    api_url: str | None,
    engine: str,
    database_url: str,
    form: str,
) -> int:
    """Give JOB other labels from its stored embeddings, as a new job beside it, and print its
    summary. No frame is decoded or sent; texts and example pictures of the labels are, once. The
    summary comes as soon as every video is answered for; then the rows of all samples are written.
    """
    from nightreel.asking import SameApi
    from nightreel.cli.answers import write_summary
    from nightreel.cli.likes import labels_like
    from nightreel.progress import bar
    from scheduler.labels import check_flags
    from storage import relabel as relabelling
    from storage.labels import store_label_vectors, vectors_of_labels

    if sum(map(bool, (label_texts, labels_file, likes))) != 1:
        raise click.UsageError("give one of --label, --labels and --like.")
    database, source = job_asked(database_url, job_id)
    relabelling.check(database, source)
    with SameApi(source.model, api_url, engine) as api:
        if likes:
            labels, matrix = labels_like(database, source, likes)
        else:
            labels = _labels(label_texts, labels_file, source, api)
            check_flags(labels, source.top_n)
            known = vectors_of_labels(database, labels, source.model)
            matrix = _embedded(labels, api) if known is None else known
    # Only now: a job without its labels' vectors would be the latest, and empty.
    target = relabelling.new_job(database, source, labels)
    store_label_vectors(database, target.label_set_id, target.model, matrix)
    say(
        f"job {target.id} ({'new' if target.created else 'known'}): job {source.id} under "
        f"{counted(len(labels.labels), 'label')} ({labels.name}), model {source.model}"
    )
    code: int = ExitCode.OK
    samples = written = 0
    unsaid: OutputError | None = None
    with bar("writing samples and predictions") as show:

        def answer(left: int) -> None:
            nonlocal code, samples, unsaid
            samples = left
            try:
                code = write_summary(database, target, form)
            except OutputError as error:
                unsaid = error  # The rows do not depend on whether anybody reads.

        def advance(count: int) -> None:
            nonlocal written
            written += count
            show(written, samples)

        whole = relabelling.relabel(database, source, target, answers=answer, progress=advance)
    if not whole:
        say("not all rows are written: the job changed meanwhile; repeat the command")
    if unsaid is not None:
        raise unsaid
    return code


def _embedded(labels: LabelSet, api: SameApi) -> npt.NDArray[np.float32]:
    from workers.classify import embed_labels

    return embed_labels(labels, api.client)


def _labels(texts: tuple[str, ...], file: Path | None, job: Job, api: SameApi) -> LabelSet:
    from scheduler import labels

    if file is None:
        return labels.label_set_of(texts)

    def load(picture: bytes) -> bytes:
        # Only example pictures need to know what the model reads.
        return labels.picture_loader(api.client.identity().input_size, job.fit)(picture)

    return labels.read_labels(file, load)
