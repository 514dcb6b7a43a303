"""The price is known before, and it is not exceeded."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from contract_server import ContractServer, answer_with, contract_server
from footage_files import MEDIA, needs_media
from rows import add_video, claimed, found, planned, ranges, spec
from sqlalchemy import Engine, select

from nightreel.cli import run_command
from scheduler.submit import job_spec
from storage import ledger, results
from storage.database import connect, reading, upgrade
from storage.embedded import embedded_ranges
from storage.ledger import BudgetSpent, JobState
from storage.ranges import stored_range
from storage.records import ArchiveFile, Fit, Gap, GapKind, Label, LabelSet, Sampling, TaskState
from storage.schema import tasks as task_table
from workers import process, tasks
from workers.api import ApiClient, Outage
from workers.endpoint import plain_picture
from workers.probing import Asked, probe_and_plan
from workers.settings import WorkerSettings

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))
TASK_US = 2_000_000
LABELS = """\
name: colours
labels:
  - name: red
    prompts: [something red, a red wall, crimson]
  - name: blue
    prompts: [something blue]
"""


# -- the ledger's side


def test_several_workers_never_take_more_than_there_is(engine: Engine) -> None:
    """Eight workers that take and return at random use every call, and not one more."""
    job_id = planned(engine, 4).job_id
    ledger.set_budget(engine, job_id, 60)

    def worker(seed: int) -> int:
        used, chance = 0, random.Random(seed)
        while True:
            try:
                reservation = ledger.reserve_calls(engine, job_id, chance.randint(1, 3))
            except BudgetSpent:
                return used
            assert reservation is not None
            unused = chance.randint(0, reservation.calls - 1)
            ledger.return_calls(engine, job_id, reservation, unused)
            used += reservation.calls - unused

    with ThreadPoolExecutor(8) as pool:
        used = sum(pool.map(worker, range(8)))
    left = ledger.calls_left(engine, job_id)
    assert left is not None
    assert used + left == 60
    assert left < 3


def test_what_an_earlier_run_took_does_not_come_back(engine: Engine) -> None:
    """A budget that is set anew is not enlarged by calls returned of the one before."""
    job_id = planned(engine, 4).job_id
    ledger.set_budget(engine, job_id, 10)
    late = ledger.reserve_calls(engine, job_id, 6)
    assert late is not None
    ledger.set_budget(engine, job_id, 10)
    ledger.return_calls(engine, job_id, late, 6)
    assert ledger.calls_left(engine, job_id) == 10


def test_a_job_without_a_budget_may_call_as_it_likes(engine: Engine) -> None:
    """Neither a job that never had one nor one whose budget was lifted is held."""
    job_id = planned(engine, 4).job_id
    assert ledger.reserve_calls(engine, job_id, 1000) is None
    ledger.set_budget(engine, job_id, 1)
    ledger.set_budget(engine, job_id, None)
    assert ledger.reserve_calls(engine, job_id, 1000) is None


# -- the worker's side


class Farm:
    """A ledger with a job on one real clip, and the worker's task to run by hand."""

    def __init__(self, engine: Engine, clip: Path, server: ContractServer) -> None:
        self.engine = engine
        self.server = server
        labels = LabelSet("colours", (Label("red", ("red",)), Label("blue", ("blue",))))
        self.job = ledger.open_job(
            engine,
            job_spec(
                names=["clip"], sampling=Sampling(), fit=Fit.CROP, top_n=2, labels=labels,
                model="test-colours@1", notice=None,
            ),
        )  # fmt: skip
        stat = clip.stat()
        probed = probe_and_plan(
            Asked(ArchiveFile(str(clip), stat.st_size, stat.st_mtime_ns), None), Sampling(), TASK_US
        )
        assert probed.info is not None
        assert probed.content_id is not None
        video = ledger.register_file(engine, probed.file, probed.content_id)
        ledger.plan_video(engine, self.job.id, video, probed.info, probed.ranges)
        ledger.finish_planning(engine, self.job.id)

    def work(self) -> None:
        """Run whatever can be fed, each task once."""
        for task_id in ledger.feed(self.engine, 100, self.job.id):
            tasks.classify(task_id)

    @property
    def status(self) -> ledger.JobStatus:
        return ledger.status(self.engine, self.job.id)

    def billed(self) -> int:
        """Requests that the server answered with results."""
        return sum("/clip/" in path for path, _, _ in self.server.requests)


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with contract_server() as running:
        yield running


@pytest.fixture
def farm(
    tmp_path: Path,
    sqlite_url: str,
    redis_url: str,
    server: ContractServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Farm]:
    """Four ranges of two samples, at an API that takes lists."""
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("NIGHTREEL_BROKER_URL", redis_url)
    monkeypatch.setenv("NIGHTREEL_API_URL", server.url)
    monkeypatch.setenv("NIGHTREEL_API_ATTEMPTS", "1")
    process._made.cache_clear()
    engine = connect(sqlite_url)
    yield Farm(engine, make_clip(tmp_path / "clip.mp4", [("red", 4), ("blue", 4)]), server)
    end_process()
    engine.dispose()


def end_process() -> None:
    """The next task is another process's."""
    own = process.current()
    own.engine.dispose()
    own.client.close()
    own.shared.close()
    process._made.cache_clear()


def test_usage_is_what_the_server_was_asked(farm: Farm) -> None:
    """The probe, the texts and every range are in the rows of usage, bytes and all."""
    farm.work()
    spent = farm.status.usage
    assert farm.status.tasks_by_state[TaskState.DONE] == 4
    assert (spent.image_calls, spent.text_calls) == (1 + 4, 1)
    assert farm.billed() == 6
    sent = sum(int(headers["Content-Length"]) for _, _, headers in farm.server.requests)
    assert spent.bytes_sent == sent


def test_a_budget_stops_between_ranges_and_the_rest_follows(farm: Farm) -> None:
    """With four calls, the probe, the texts and two ranges are done; the job is paused with its
    reason, nothing is lost, and what is left is done with another budget."""
    ledger.set_budget(farm.engine, farm.job.id, 4)
    farm.work()
    assert farm.billed() == 4
    status = farm.status
    assert status.job.state is JobState.PAUSED
    assert status.job.pause_kind == ledger.BUDGET_SPENT
    assert "budget of 4 calls has 0 left" in (status.held or "")
    assert status.tasks_by_state[TaskState.DONE] == 2
    assert status.tasks_by_state[TaskState.PENDING] == 2
    ledger.set_budget(farm.engine, farm.job.id, 4)
    ledger.resume_job(farm.engine, farm.job.id)
    farm.work()
    assert farm.status.tasks_by_state[TaskState.DONE] == 4
    assert farm.billed() == 6
    assert ledger.calls_left(farm.engine, farm.job.id) == 2


def test_a_range_that_cannot_be_paid_to_its_end_is_not_begun(farm: Farm) -> None:
    """At an API that takes one picture a call, a range of two is not begun with one call left."""
    farm.server.stacks_lists = True
    ledger.set_budget(farm.engine, farm.job.id, 2 + 2 + 1)
    farm.work()
    assert farm.billed() == 4
    assert ledger.calls_left(farm.engine, farm.job.id) == 1
    assert "has 1 left, and what comes next needs 2" in (farm.status.held or "")


def test_calls_that_are_not_billed_are_not_spent(farm: Farm) -> None:
    """An endpoint that turns every call away leaves budget and usage as they were; what was sent
    in vain is recorded."""
    ledger.set_budget(farm.engine, farm.job.id, 10)
    process.current().client.endpoint()
    asked = farm.billed()
    farm.server.always = answer_with(503, {"message": "loading"})
    farm.work()
    assert farm.billed() > asked
    assert ledger.calls_left(farm.engine, farm.job.id) == 10
    spent = farm.status.usage
    assert (spent.image_calls, spent.text_calls) == (0, 0)
    assert spent.bytes_sent > 0


def test_calls_of_an_attempt_in_vain_are_spent(farm: Farm) -> None:
    """A range whose second call fails is put back, and its first call stays on the bill."""
    farm.server.stacks_lists = True
    client = process.current().client
    client.work_for(farm.job.id)
    client.endpoint()
    ledger.set_budget(farm.engine, farm.job.id, 100)
    # The texts and one picture are answered; then the API is gone.
    seen: list[str] = []

    def soon_gone(handler: Any, body: dict[str, Any]) -> None:
        seen.append(handler.path)
        if "text" in handler.path:
            answer_with(200, {"embeddings": [[1.0, 2.0], [2.0, 1.0]]})(handler, body)
        elif sum("image" in path for path in seen) == 1:
            answer_with(200, {"embeddings": [[1.0, 2.0]]})(handler, body)
        else:
            answer_with(502, {})(handler, body)

    farm.server.always = soon_gone
    tasks.classify(ledger.feed(farm.engine, 1, farm.job.id)[0])
    spent = farm.status.usage
    assert (spent.image_calls, spent.text_calls) == (2, 1)
    assert ledger.calls_left(farm.engine, farm.job.id) == 100 - 3
    assert farm.status.tasks_by_state[TaskState.DONE] == 0


@pytest.mark.expects_error_log("^api-")
@pytest.mark.parametrize(
    ("status", "kind"),
    [(402, "api-paused"), (423, "api-paused")]
    + [(status, "api-refused") for status in (401, 403, 404)],
)
def test_a_refusal_holds_the_job_with_everything_kept(farm: Farm, status: int, kind: str) -> None:
    """Key, address and credits are a person's to mend: one line says what is wrong, nothing more is
    asked, no attempt is spent and nothing is billed; after `resume` the job is done."""
    farm.server.always = answer_with(status, {"message": "see to\nit"})
    farm.work()
    held = farm.status
    assert (held.job.state, held.job.pause_kind) == (JobState.PAUSED, kind)
    assert (held.held or "").startswith(f"the API answers {status}: see to it; ")
    assert held.tasks_by_state[TaskState.PENDING] == 4
    assert held.usage.image_calls == held.usage.text_calls == 0
    asked_in_vain = 1 + 2 * (status == 404)  # of a 404 it is asked whether the routes are there
    assert len(farm.server.requests) == asked_in_vain
    farm.server.always = None
    ledger.resume_job(farm.engine, farm.job.id)
    farm.work()
    assert farm.status.tasks_by_state[TaskState.DONE] == 4
    with reading(farm.engine) as connection:
        assert set(connection.scalars(select(task_table.c.attempts))) == {1}


def test_a_route_that_goes_away_costs_a_job_nothing(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should an endpoint embed no more in the middle of a job, one range goes back without an
    attempt spent, and the rest is compared."""
    monkeypatch.setattr(tasks, "OUTAGE_DELAY_S", 0.0)
    first, *_ = ledger.feed(farm.engine, 1, farm.job.id)
    tasks.classify(first)
    farm.server.embeds = False
    for _ in range(2):
        farm.work()
    assert farm.status.tasks_by_state[TaskState.DONE] == 4
    with reading(farm.engine) as connection:
        assert set(connection.scalars(select(task_table.c.attempts))) == {1}
    assert sum(path == "/clip/compare" for path, body, _ in farm.server.requests if body) >= 6


def test_databases_that_share_a_redis_take_no_word_for_each_others_jobs(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a job 1: what the endpoint was found to be for one, lists that do not work, holds
    for that one alone."""
    farm.server.stacks_lists = True
    farm.work()
    assert farm.status.usage.image_calls == 1 + 8
    farm.server.stacks_lists = False
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", f"sqlite:///{tmp_path / 'other.db'}")
    end_process()
    engine = connect(os.environ["NIGHTREEL_DATABASE_URL"])
    upgrade(engine)
    other = Farm(engine, tmp_path / "clip.mp4", farm.server)
    other.work()
    assert other.job.id == farm.job.id
    assert other.status.usage.image_calls == 1 + 4
    engine.dispose()


@pytest.mark.expects_error_log("^api-")
@pytest.mark.parametrize(
    ("info", "stands"),
    [
        ({"name": "a page"}, JobState.RUNNING),
        ({"model": "another@2"}, JobState.PAUSED),
    ],
    ids=["nameless", "another"],
)
def test_an_api_that_does_not_say_what_it_serves_stops_no_job(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], stands: JobState
) -> None:
    """A job of a model that the API named waits until it is named again; an API that names another
    one stops it. No attempt is spent either way."""
    monkeypatch.setattr(tasks, "OUTAGE_DELAY_S", 0.0)
    right, farm.server.info = farm.server.info, info
    farm.work()
    assert farm.status.job.state is stands
    assert farm.server.requests == []
    farm.server.info = right
    ledger.resume_job(farm.engine, farm.job.id)
    farm.work()
    assert farm.status.tasks_by_state[TaskState.DONE] == 4
    with reading(farm.engine) as connection:
        assert set(connection.scalars(select(task_table.c.attempts))) == {1}


def test_a_connection_that_is_refused_is_no_call() -> None:
    """Where nothing was sent, nothing is billed."""

    class Counting:
        taken = refunded = 0

        def take(self) -> None:
            self.taken += 1

        def refund(self) -> None:
            self.refunded += 1

    with contract_server() as gone:
        pass
    with closing(ApiClient(WorkerSettings(api_url=gone.url), sleep=lambda _: None)) as client:
        client.wire.purse = purse = Counting()
        with pytest.raises(Outage):
            client.embed_texts(["a"])
        assert purse.taken == purse.refunded == 4
        assert client.spent.text_calls == 0


# -- the commands


def nightreel(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    fast = {"NIGHTREEL_TASK_SECONDS": "2", "NIGHTREEL_FEED_INTERVAL_S": "0.1"}
    done = subprocess.run(
        [NIGHTREEL, *arguments],
        cwd=folder,
        env=kept | fast | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    make_clip(folder / "one.mp4", [("red", 9), ("blue", 6)], keyframes_every=5)
    make_clip(folder / "two.mp4", [("green", 3)])
    (tmp_path / "labels.yaml").write_text(LABELS)
    return folder


def in_batches(server: ContractServer) -> None:
    pass


def one_by_one(server: ContractServer) -> None:
    server.stacks_lists = True


def comparing(server: ContractServer) -> None:
    server.embeds = False


MIB = 1 << 20


@pytest.mark.parametrize(
    ("way", "fit", "side"),
    [
        (in_batches, "crop", 224),
        (in_batches, "tiles", 64),
        (one_by_one, "pad", 64),
        (comparing, "tiles", 224),
    ],
)
def test_a_plan_is_what_is_spent(
    tmp_path: Path,
    archive: Path,
    server: ContractServer,
    way: Callable[[ContractServer], None],
    fit: str,
    side: int,
) -> None:
    """What `plan` says beforehand is what two workers then spend and the server sees: each call,
    and bytes within a thousandth."""
    way(server)
    server.info["input_size"] = side
    asked = ("archive", "--api", server.url, "--labels", "labels.yaml", "--fps", "4", "--fit", fit)
    plan = planned_row(tmp_path, *asked)
    before = len(server.requests)
    code, _, err = nightreel(tmp_path, "run", *asked, "--workers", "2", "--format", "json")
    assert code == 0, err
    _, out, _ = nightreel(tmp_path, "status", "--format", "json")
    images, texts = spent(tmp_path)
    made = len(server.requests) - before
    turned_away = 3 * (not server.embeds)  # the probe of a route that is not there
    assert abs(images + texts - made) <= turned_away
    assert plan["samples"] == json.loads(out)["samples"] == 18 * 4
    assert (plan["image_calls"], plan["text_calls"]) == (images, texts)
    assert plan["mib"] == pytest.approx(bytes_spent(tmp_path) / MIB, rel=0.001)
    assert plan["credits"] == pytest.approx((images + texts) * 0.2 / 1000)
    assert plan["time_s"] == pytest.approx((images + texts) / 20)


@needs_media
def test_a_plan_of_real_clips_is_what_is_spent(tmp_path: Path, server: ContractServer) -> None:
    """Of clips from many hands, each call, and bytes within 2 %."""
    server.info["input_size"] = 224
    plan = planned_row(tmp_path, str(MEDIA), "--api", server.url)
    code, _, err = nightreel(tmp_path, "run", str(MEDIA), "--api", server.url)
    assert code == 0, err
    assert (plan["image_calls"], plan["text_calls"]) == spent(tmp_path)
    assert plan["mib"] == pytest.approx(bytes_spent(tmp_path) / MIB, rel=0.02)


def planned_row(folder: Path, *arguments: str) -> dict[str, Any]:
    code, out, err = nightreel(folder, "plan", *arguments, "--format", "json")
    assert code == 0, err
    (row,) = json.loads(out)
    return dict(row)


def spent(folder: Path) -> tuple[int, int]:
    with closing(sqlite3.connect(folder / "nightreel.db")) as database:
        query = "select sum(image_calls), sum(text_calls) from usage"
        images, texts = database.execute(query).fetchone()
        return images, texts


def bytes_spent(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "nightreel.db")) as database:
        (sent,) = database.execute("select sum(bytes_sent) from usage").fetchone()
        return int(sent)


def test_a_plan_deducts_what_is_stored(
    tmp_path: Path, archive: Path, server: ContractServer
) -> None:
    """After a run, another job over the same archive is planned without a call, and makes none;
    of a video that came later only its own frames are planned, and paid."""
    asked = ("archive", "--api", server.url, "--labels", "labels.yaml", "--fps", "4")
    before = planned_row(tmp_path, *asked)
    assert before["embedded"] == 0
    code, _, err = nightreel(tmp_path, "run", *asked)
    assert code == 0, err
    after = planned_row(tmp_path, *asked)
    assert after["embedded"] == after["samples"] == before["samples"]
    assert (after["image_calls"], after["text_calls"], after["mib"]) == (0, 0, 0)
    paid = spent(tmp_path)
    code, _, err = nightreel(tmp_path, "run", *asked, "--top", "1")
    assert code == 0, err
    assert spent(tmp_path) == paid
    other_labels = ("archive", "--api", server.url, "--fps", "4")
    row = planned_row(tmp_path, *other_labels)
    assert (row["image_calls"], row["text_calls"]) == (0, 1)
    other_frames = planned_row(tmp_path, *asked[:-1], "2")
    assert other_frames["embedded"] == 0

    make_clip(archive / "three.mp4", [("white", 7)])
    row = planned_row(tmp_path, *asked)
    assert (row["samples"], row["embedded"]) == (before["samples"] + 28, before["samples"])
    code, _, err = nightreel(tmp_path, "run", *asked)
    assert code == 0, err
    images, texts = spent(tmp_path)
    asked_before = 1  # a plan is of no job: that this one knows the API it cannot tell
    assert row["image_calls"] == images - paid[0] + asked_before
    assert (row["text_calls"], texts) == (0, paid[1])


def test_labels_that_were_compared_before_cost_no_text_calls(
    tmp_path: Path, archive: Path, server: ContractServer
) -> None:
    """Where an API only compares, pictures are paid for again and prompts are not."""
    server.embeds = False
    asked = ("archive", "--api", server.url, "--labels", "labels.yaml")
    before = planned_row(tmp_path, *asked)
    code, _, err = nightreel(tmp_path, "run", *asked)
    assert code == 0, err
    paid = spent(tmp_path)
    after = planned_row(tmp_path, *asked)
    assert (before["text_calls"], after["text_calls"]) == (paid[1], 0)
    assert after["image_calls"] == before["image_calls"] == paid[0]
    code, _, err = nightreel(tmp_path, "run", *asked, "--top", "1")
    assert code == 0, err
    assert spent(tmp_path) == (2 * paid[0], paid[1])


def test_what_a_plan_takes_as_stored_is_what_a_worker_finds(engine: Engine) -> None:
    """Whatever ranges were committed by jobs that cut the video otherwise, with gaps that last and
    gaps that do not, and however it is cut now: the short answer is that of reading the vectors."""
    chance, seconds, undone = random.Random(5), 120, {3, 7, 12}
    kinds = [GapKind.DAMAGED, GapKind.READ_ERROR]
    for key, each in (("one", 4), ("two", 9)):
        job = ledger.open_job(engine, spec(key), files=())
        video = add_video(engine, job.id, "video", seconds, each)
        ledger.finish_planning(engine, job.id)
        for n, task_id in enumerate(ledger.feed(engine, 100, job.id)):
            claim = claimed(engine, task_id)
            if n in undone:
                continue
            at = chance.choice(claim.frame_range.buckets) * 1_000_000
            gap = Gap(at, at + 1_000_000, chance.choice(kinds), "noise")
            some = [gap] if chance.random() < 0.5 else []
            assert results.commit(engine, task_id, claim.fence, found(claim, gaps=some))
    key_of_vectors = job.sampling, job.fit, job.model
    cuts = [one for each in (1, 4, 7, 9, 13, 30) for one in ranges(seconds, each)]
    stored = [stored_range(engine, video, *key_of_vectors, one) is not None for one in cuts]
    assert embedded_ranges(engine, "content-video", *key_of_vectors, cuts) == stored
    assert 20 < sum(stored) < len(cuts) - 20
    assert not any(embedded_ranges(engine, "content-other", *key_of_vectors, cuts))


def test_a_run_ends_at_its_budget_and_the_same_command_goes_on(
    tmp_path: Path, archive: Path, server: ContractServer
) -> None:
    """Two workers together make no more calls than --max-calls; the run ends with 3 and one line,
    and the same command, run again and again, gives what a run without a budget gives."""
    server.stacks_lists = True
    command = ("run", "archive", "--api", server.url, "--labels", "labels.yaml", "--workers", "2")
    rounds = []
    for _ in range(6):
        before = len(server.requests)
        code, _, err = nightreel(tmp_path, *command, "--max-calls", "7", "--format", "json")
        rounds.append(len(server.requests) - before)
        assert rounds[-1] <= 7
        assert "Traceback" not in err
        if code == 0:
            break
        assert code == 3, err
        assert err.count("stopped: the budget of 7 calls has") == 1
        assert "the same command goes on" in err
    assert code == 0
    assert len(rounds) > 2
    with closing(sqlite3.connect(tmp_path / "nightreel.db")) as database:
        (calls,) = database.execute("select sum(image_calls + text_calls) from usage").fetchone()
        budgeted = database.execute("select bucket, rank, label, similarity from predictions")
        results = budgeted.fetchall()
    assert calls == sum(rounds)
    calm = tmp_path / "calm"
    calm.mkdir()
    (calm / "archive").symlink_to(archive)
    (calm / "labels.yaml").write_text(LABELS)
    assert nightreel(calm, *command)[0] == 0
    with closing(sqlite3.connect(calm / "nightreel.db")) as database:
        query = "select bucket, rank, label, similarity from predictions"
        assert sorted(database.execute(query).fetchall()) == sorted(results)


def test_the_rate_is_kept_over_all_workers(
    tmp_path: Path, archive: Path, server: ContractServer
) -> None:
    """Two workers with --max-rps 10 take a tenth of a second for each request, burst apart."""
    server.stacks_lists = True
    command = ("run", "archive", "--api", server.url, "--fps", "2", "--workers", "2")
    start = time.monotonic()
    code, _, err = nightreel(tmp_path, *command, "--max-rps", "10", "--format", "json")
    assert code == 0, err
    assert len(server.requests) >= 36
    assert time.monotonic() - start >= (len(server.requests) - 2) / 10


def test_a_plan_names_what_is_no_video(tmp_path: Path, archive: Path) -> None:
    """Copies count once, and files that cannot be read are told once, with reasons; exit 3."""
    (archive / "copy.mp4").write_bytes((archive / "two.mp4").read_bytes())
    (archive / "text.mp4").write_text("this is not a video")
    with contract_server() as server:
        code, out, err = nightreel(
            tmp_path, "plan", "archive", "--api", server.url, "--format", "json"
        )
    assert code == 3
    (row,) = json.loads(out)
    assert row["videos"] == 2
    assert row["hours"] == pytest.approx(18 / 3600)
    assert err.count("text.mp4") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--rate", "nan"),
        ("plan", "--rate", "inf"),
        ("plan", "--rate", "1e-320"),
        ("plan", "--price-per-1000", "nan"),
        ("plan", "--price-per-1000", "inf"),
        ("plan", "--price-per-1000", "1e308"),
        ("run", "--max-rps", "nan"),
        ("run", "--max-rps", "inf"),
    ],
    ids=" ".join,
)
def test_a_rate_and_a_price_are_finite(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """What is no number is refused as every wrong option is, before there is a job."""
    command, *option = words
    database = tmp_path / "results.db"
    assert run_command([command, str(archive), *option, "--db", f"sqlite:///{database}"]) == 2
    assert option[0] in capsys.readouterr().err
    assert not database.exists()


def test_an_api_that_takes_no_picture_has_no_plan(
    archive: Path, server: ContractServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every call fails there is nothing to reckon with: exit 12 and one line."""
    server.always = answer_with(500, {"message": "no\nreally"})
    assert run_command(["plan", str(archive), "--api", server.url]) == 12
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "nightreel: the API answers 500: no really\n"


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("labels", "how", "said"),
    [
        (
            "{name: dark, examples: dark.jpg}, {name: light, examples: light.jpg}",
            {"embeds": False},
            "the label 'dark': this API compares prompts only",
        ),
        (
            f"{{name: wordy, prompts: {'word ' * 90}}}, {{name: light}}",
            {"longest_text": 70},
            "the label 'wordy', prompt 'word word",
        ),
    ],
    ids=["examples", "prompt"],
)
def test_labels_that_the_api_cannot_use_have_neither_a_plan_nor_a_job(
    tmp_path: Path,
    archive: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    labels: str,
    how: dict[str, Any],
    said: str,
) -> None:
    """Example pictures where texts and pictures are only compared, and prompts that are too long:
    one line that names the label, exit code 2."""
    (tmp_path / "dark.jpg").write_bytes(plain_picture(64, 40))
    (tmp_path / "light.jpg").write_bytes(plain_picture(64, 200))
    (tmp_path / "labels.yaml").write_text(f"labels: [{labels}]")
    database = tmp_path / "results.db"
    with contract_server(**how) as server:
        words = ["--api", server.url, "--labels", str(tmp_path / "labels.yaml")]
        words += ["--db", f"sqlite:///{database}"]
        assert run_command([command, str(archive), *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not database.exists()


@pytest.mark.parametrize("at_home", [True, False])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_key_of_two_lines_is_refused_before_there_is_a_job(
    tmp_path: Path,
    archive: Path,
    server: ContractServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    at_home: bool,
) -> None:
    """A key file with a comment in it is one line and exit code 2; no part of it is shown."""
    (tmp_path / "key").write_text("rf_secret_0123456789\n# my key\n")
    monkeypatch.setenv("NIGHTREEL_API_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("NIGHTREEL_API_KEY_TRANSPORT", "header")
    database = tmp_path / "results.db"
    where = () if at_home else ("--api", server.url)
    assert run_command([command, str(archive), *where, "--db", f"sqlite:///{database}"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "NIGHTREEL_API_KEY_FILE" in said.err
    assert "rf_" not in said.out + said.err
    assert not database.exists()
