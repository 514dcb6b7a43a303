"""The API client against a real server that misbehaves on command."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from email.utils import formatdate
from typing import Any
from urllib.parse import quote, quote_plus

import numpy as np
import pytest
from contract_server import (
    ContractServer,
    answer_with,
    contract_server,
    drip,
    half_close,
    hang_up,
    keep_silent,
)

from storage.records import Label, LabelSet
from storage.settings import SecretUnreadable
from workers.api import ApiClient, FrameRefused, JobPaused, JobStopped, Outage, TextRefused
from workers.classify import LabelVectors, embed_labels, predictions, prompt_weights
from workers.footage.picture import encode_jpeg
from workers.settings import WorkerSettings

KEY = "rf_secret_0123456789"


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with contract_server() as running:
        yield running


def client(server: ContractServer, **settings: Any) -> ApiClient:
    """A client that notes its waits instead of sleeping."""
    defaults: dict[str, Any] = {"api_connect_timeout_s": 20, "api_read_timeout_s": 20}
    waits: list[float] = []
    made = ApiClient(
        WorkerSettings(**(defaults | {"api_url": server.url} | settings)),
        sleep=waits.append,
        uniform=lambda _, high: high,
    )
    made.waits = waits  # type: ignore[attr-defined]
    return made


def pictures(n: int) -> list[bytes]:
    random = np.random.default_rng(3)
    return [encode_jpeg(random.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(n)]


def test_lists_of_pictures_are_used_where_they_work(server: ContractServer) -> None:
    """An endpoint that answers a list with as many embeddings is asked in batches."""
    api = client(server)
    assert api.endpoint().batch == 8
    vectors = api.embed_images(pictures(8))
    assert len(vectors) == 8
    assert all(abs(np.linalg.norm(v) - 1) < 1e-5 for v in vectors)  # type: ignore[arg-type]


def test_a_server_that_stacks_lists_is_asked_one_by_one() -> None:
    """The known bug, N pictures in and one embedding out, is noticed before any result is kept."""
    with contract_server(stacks_lists=True) as server:
        assert client(server).endpoint().batch == 1


@pytest.mark.parametrize("said", [404, 405])
def test_an_endpoint_without_embeddings_is_compared(said: int) -> None:
    """Where /clip/embed_image does not exist, whichever way that is said, /clip/compare serves."""
    with contract_server(embeds=False, unknown_route=said) as server:
        api = client(server)
        assert not api.endpoint().embeds
        assert isinstance(api.compare(pictures(1)[0], ["a", "b"]), np.ndarray)


def refuse_lists(status: int) -> Any:
    def act(handler: Any, body: dict[str, Any]) -> None:
        alone = not isinstance(body["image"], list)
        answer_with(200 if alone else status, {"embeddings": [[1.0, 2.0]]})(handler, body)

    return act


@pytest.mark.parametrize("status", [413, 422, 500])
def test_a_server_that_refuses_lists_is_asked_one_by_one(
    server: ContractServer, status: int
) -> None:
    """A list is refused, a picture alone is taken, and the list is refused again."""
    server.always = refuse_lists(status)
    assert client(server).endpoint().batch == 1


def test_a_500_that_passes_does_not_decide_a_jobs_way(server: ContractServer) -> None:
    """Trouble while the endpoint is asked whether it takes lists leaves the answer as it was."""
    server.script = [answer_with(500, {"message": "Internal error."})] * 2
    assert client(server).endpoint().batch == 8


@pytest.mark.parametrize(("status", "kind"), [(500, Outage), (422, JobStopped)])
def test_an_endpoint_that_takes_no_picture_has_no_way(
    server: ContractServer, status: int, kind: type[Exception]
) -> None:
    """Nothing is learned of an endpoint that refuses a plain picture too."""
    api = client(server)
    server.always = answer_with(status, {"message": "no"})
    with pytest.raises(kind):
        api.endpoint()
    server.always = None
    assert api.endpoint().batch == 8


def test_each_job_asks_anew_what_the_endpoint_is(server: ContractServer) -> None:
    """A worker lives longer than a job: what it learned for one is not taken for the next, and is
    asked once for each."""
    api = client(server)
    api.work_for(1)
    assert api.endpoint().batch == 8
    server.info = {"model": "another@2", "input_size": 32}
    server.stacks_lists = True
    api.work_for(2)
    assert (api.identity().model, api.identity().input_size) == ("another@2", 32)
    assert api.endpoint().batch == 1
    asked = len(server.requests)
    api.work_for(1)
    assert (api.identity().model, api.endpoint().batch) == ("test-colours@1", 8)
    api.work_for(2)
    assert api.endpoint().batch == 1
    assert len(server.requests) == asked


def test_an_answer_of_another_model_is_never_kept(server: ContractServer) -> None:
    """Should a server be started anew with another model while a job runs, its answers stop the
    job; once the job's model is back, the next task goes on."""
    api = client(server)
    api.work_for(1)
    api.endpoint()
    server.info = {"model": "another@2"}
    for ask in (lambda: api.embed_images(pictures(1)), lambda: api.embed_texts(["a"])):
        with pytest.raises(JobStopped, match="served test-colours@1 and answers now as another@2"):
            ask()
    assert api.identity().model == "test-colours@1"
    api.work_for(1)
    assert api.identity().model == "another@2"
    assert len(api.embed_images(pictures(1))) == 1


def test_a_model_that_info_does_not_name_may_bear_any_name(server: ContractServer) -> None:
    """The header of a server that does not say what it serves has words of its own."""
    server.info = {"name": "Inference Server"}
    api = client(server)
    api.endpoint()
    server.always = answer_with(200, {"embeddings": [[1.0, 2.0]]}, {"x-model-id": "clip/ViT-B-16"})
    assert isinstance(api.embed_images(pictures(1))[0], np.ndarray)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_who_a_server_is_is_not_guessed_while_it_is_away(status: int) -> None:
    """A server that cannot say now what it serves is not taken for one that never does."""
    with (
        contract_server(info_status=status) as server,
        pytest.raises(Outage, match=f"the API answers {status}"),
    ):
        client(server).identity()


@pytest.mark.parametrize(
    "trouble",
    [answer_with(500, {}), answer_with(503, {}), hang_up, half_close],
    ids=["500", "503", "cut", "half-closed"],
)
def test_who_a_server_is_is_asked_again_after_trouble_that_passes(
    server: ContractServer, trouble: Any
) -> None:
    """One bad answer to GET /info is nobody's name."""
    server.info_script = [trouble]
    api = client(server)
    assert api.identity().model == "test-colours@1"
    assert len(api.waits) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [401, 403, 404, 501])
def test_a_server_that_does_not_say_who_it_is_is_asked_once(status: int) -> None:
    """Hosted endpoints may have no GET /info, or none for everybody."""
    with contract_server(info_status=status) as server:
        api = client(server)
        assert not api.identity().named
        assert api.waits == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_asked_past_any_proxy(
    server: ContractServer, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """A proxy of the environment is for other hosts: its own loopback interface is another one."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    here = client(server, api_url=server.url.replace("127.0.0.1", host))
    assert here.identity().model == "test-colours@1"
    elsewhere = client(server, api_url="http://api.test")
    with pytest.raises(Outage, match="the proxy refused"):
        elsewhere.identity()


def test_a_server_without_info_is_named_by_the_model_asked_of_it() -> None:
    """What GET /info does not say follows from the model's name."""
    with contract_server(info={"name": "Inference Server", "version": "1.8.3"}) as server:
        identity = client(server, clip_version="ViT-L-14-336px").identity()
        assert (identity.model, identity.input_size) == ("clip:ViT-L-14-336px", 336)


def test_both_ways_give_the_same_numbers(server: ContractServer) -> None:
    """embed and compare agree within 1e-3 and in order, prompt ensembles and 11 labels included."""
    labels = LabelSet(
        "many",
        (
            Label("ensemble", ("a crane", "a construction site", "scaffolding")),
            *(Label(f"label {i}", (f"prompt {i}",)) for i in range(10)),
        ),
    )
    embedding, comparing = client(server), client(server, api_way="compare")
    vectors = LabelVectors(embed_labels(labels, embedding))
    weighted = prompt_weights(labels, comparing)
    for jpeg in pictures(3):
        (vector,) = embedding.embed_images([jpeg])
        cosines = comparing.compare(jpeg, weighted.prompts)
        assert isinstance(vector, np.ndarray)
        assert isinstance(cosines, np.ndarray)
        one, other = vectors.matrix @ vector, weighted.weights @ cosines
        assert np.abs(one - other).max() < 1e-3
        best, of_other = predictions(np.stack([one, other]), 5)
        assert [p.label for p in best] == [p.label for p in of_other]


def test_confidence_is_softmax_of_a_hundred_cosines() -> None:
    """A cosine 0.05 above the other is a confidence of 1 / (1 + e^-5)."""
    ((first, second),) = predictions(np.array([[0.20, 0.25]], np.float32), 5)
    assert (first.label, second.label) == (1, 0)
    assert first.confidence == pytest.approx(1 / (1 + np.exp(-5)), abs=1e-6)
    assert first.confidence + second.confidence == pytest.approx(1)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_passing_refusal_is_tried_again(server: ContractServer, status: int) -> None:
    """Two refusals and then an answer give the answer, after growing waits."""
    api = client(server)
    api.endpoint()
    server.script = [answer_with(status, {"message": "later"})] * 2
    assert len(api.embed_images(pictures(1))) == 1
    assert api.waits == [0.5, 1.0]  # type: ignore[attr-defined]


def test_retry_after_is_honoured(server: ContractServer) -> None:
    """A short Retry-After is waited for; one above twenty seconds gives the task back for that
    time."""
    api = client(server)
    api.endpoint()
    server.script = [answer_with(429, {}, {"Retry-After": "3"})]
    api.embed_images(pictures(1))
    assert api.waits == [3.0]  # type: ignore[attr-defined]
    server.script = [answer_with(429, {}, {"Retry-After": "21"})]
    with pytest.raises(Outage) as caught:
        api.embed_images(pictures(1))
    assert caught.value.retry_after_s == 21
    assert api.waits == [3.0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("said", "waited"),
    [("nan", None), ("inf", None), ("soon", None), ("-5", 0.0), ("1e9", 3600.0)]
    + [(formatdate(1_790_000_000 + later, usegmt=True), max(later, 0.0)) for later in (90, -90)],
)
def test_retry_after_is_a_number_or_a_date(
    server: ContractServer, said: str, waited: float | None
) -> None:
    """Seconds, or a date by the server's own clock; what is neither counts as absent."""
    api = client(server, api_attempts=1)
    api.endpoint()
    sent = formatdate(1_790_000_000, usegmt=True)
    server.always = answer_with(503, {}, {"Retry-After": said, "Date": sent})
    with pytest.raises(Outage) as caught:
        api.embed_images(pictures(1))
    assert caught.value.retry_after_s == waited


def test_a_date_without_a_clock_is_held_against_ones_own(server: ContractServer) -> None:
    """A server that does not tell its time is taken to have the right one."""
    api = client(server, api_attempts=1)
    api.endpoint()
    until = formatdate(time.time() + 600, usegmt=True)
    server.always = answer_with(503, {}, {"Retry-After": until, "Date": "noon"})
    with pytest.raises(Outage) as caught:
        api.embed_images(pictures(1))
    assert caught.value.retry_after_s == pytest.approx(600, abs=30)


@pytest.mark.parametrize(
    ("trouble", "why"),
    [(drip, "not complete after 1 s"), (keep_silent, "no answer in time")],
    ids=["dripping", "silent"],
)
def test_a_server_that_takes_its_time_is_left(
    server: ContractServer, trouble: Any, why: str
) -> None:
    """Neither a byte now and then nor none at all holds a worker for longer than it may wait."""
    api = client(server, api_read_timeout_s=1, api_attempts=1)
    api.endpoint()
    server.always = trouble

    def took_s() -> float:
        began = time.monotonic()
        with pytest.raises(Outage, match=why):
            api.embed_images(pictures(1))
        return time.monotonic() - began

    # A machine may stand still once.
    assert any(took_s() < 3 for _ in range(3))


def test_a_host_that_does_not_answer_a_connection_is_left() -> None:
    """A connection that is neither made nor refused is given up in time, and is no call."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # more than may wait to be accepted: the next is not answered
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = "http://127.0.0.1:{1}".format(*full.getsockname())
        settings = WorkerSettings(api_url=url, api_connect_timeout_s=0.3, api_attempts=1)
        api = ApiClient(settings)

        def took_s() -> float:
            began = time.monotonic()
            with pytest.raises(Outage, match="no connection in time"):
                api.embed_texts(["a"])
            return time.monotonic() - began

        # A machine may stand still once.
        assert any(took_s() < 3 for _ in range(3))
        assert api.spent.text_calls == 0


def test_an_answer_of_many_megabytes_is_not_read_to_its_end(server: ContractServer) -> None:
    """An answer that unpacks to more than any result can be is refused, right as it may be."""
    api = client(server, api_attempts=1)
    api.endpoint()
    flood = gzip.compress(json.dumps({"embeddings": [[1.0, 2.0]]}).encode() + b" " * (16 << 20))
    server.always = answer_with(200, None, {"Content-Encoding": "gzip"}, flood)
    with pytest.raises(Outage, match="larger than 16 MiB"):
        api.embed_texts(["a"])


@pytest.mark.parametrize(
    "trouble",
    [
        answer_with(503, {"message": "loading"}),
        hang_up,
        half_close,
        drip,
        answer_with(200, None, raw=b"<html>proxy</html>"),
        answer_with(200, None, raw=b'{"embeddings": [[1.0, 2.'),
        answer_with(200, None, raw=b'{"embeddings": ' + b"[" * 100_000),
        answer_with(200, [[1.0, 2.0]]),
        answer_with(429, {}),
        answer_with(200, {"embeddings": []}),
        answer_with(200, {"embeddings": [[1.0, 2.0], [2.0, 1.0]]}),
        answer_with(200, {"embeddings": [[1.0, 2.0], [2.0]]}),
        answer_with(200, {"embeddings": [[float("nan")] * 8]}),
        answer_with(200, {"embeddings": [[0.0] * 8]}),
        answer_with(200, {"embeddings": "yes"}),
        answer_with(500, {"message": "Internal error."}),
    ],
    ids=[
        "503",
        "cut",
        "half-closed",
        "dripping",
        "html",
        "half-json",
        "deep-json",
        "list",
        "429",
        "none",
        "two",
        "ragged",
        "NaN",
        "zero",
        "text",
        "500",
    ],
)
def test_trouble_that_stays_is_an_outage(server: ContractServer, trouble: Any) -> None:
    """A server that keeps failing is an outage, after few tries and in bounded time."""
    api = client(server, api_read_timeout_s=0.3)
    api.endpoint()
    server.always = trouble
    with pytest.raises(Outage):
        api.embed_images(pictures(1))
    assert len(api.waits) < 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "similarity",
    [[float("nan"), 0.2], [float("inf"), 0.2], [0.2], [0.2, 0.2, 0.2], [[0.2, 0.2]], "yes", None],
    ids=["NaN", "infinite", "fewer", "more", "nested", "text", "null"],
)
def test_similarities_that_are_none_are_an_outage(server: ContractServer, similarity: Any) -> None:
    """What cannot be the cosines that were asked for is never taken for them."""
    api = client(server, api_way="compare")
    server.always = answer_with(200, {"similarity": similarity})
    with pytest.raises(Outage):
        api.compare(pictures(1)[0], ["a", "b"])
    assert len(api.waits) < 5  # type: ignore[attr-defined]


def test_a_batch_that_comes_back_short_is_asked_picture_by_picture(server: ContractServer) -> None:
    """Should an endpoint begin to stack lists later on, no picture gets another one's vector."""
    api = client(server)
    api.endpoint()
    alone = [api.embed_images([one])[0] for one in pictures(3)]
    server.stacks_lists = True
    together = api.embed_images(pictures(3))
    assert np.array_equal(np.stack(together), np.stack(alone))  # type: ignore[arg-type]


def test_trying_again_ends_in_bounded_time(server: ContractServer) -> None:
    """However many tries are allowed, none begins later than two minutes after the first."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    settings = WorkerSettings(api_url=server.url, api_attempts=1000)
    api = ApiClient(settings, sleep=sleep, uniform=lambda _, high: high, clock=lambda: now[0])
    api.endpoint()
    server.always = answer_with(503, {}, {"Retry-After": "7"})
    with pytest.raises(Outage):
        api.embed_images(pictures(1))
    assert 100 < now[0] <= 120


def test_nobody_there_is_an_outage() -> None:
    """A refused connection is an outage, and says where."""
    with contract_server() as server:
        pass
    with pytest.raises(Outage, match=r"cannot be reached \(connection refused"):
        client(server).endpoint()


@pytest.mark.parametrize("status", [413, 422])
def test_a_refused_picture_is_refused_alone(server: ContractServer, status: int) -> None:
    """When a batch is refused, its pictures are asked one by one and only the bad one is lost."""
    api = client(server)
    api.endpoint()
    bad = pictures(3)[1]

    def refuse_the_bad(handler: Any, body: dict[str, Any]) -> None:
        images = body["image"] if isinstance(body["image"], list) else [body["image"]]
        values = [one["value"] for one in images]
        if base64.b64encode(bad).decode() in values:
            answer_with(status, {"detail": [{"input": body}]})(handler, body)
        else:
            answer_with(200, {"embeddings": [[1.0, 2.0]] * len(values)})(handler, body)

    server.always = refuse_the_bad
    answers = api.embed_images(pictures(3))
    assert [isinstance(answer, FrameRefused) for answer in answers] == [False, True, False]


def test_a_500_for_one_picture_is_that_pictures_fault(server: ContractServer) -> None:
    """The real server says 500 of a bad picture too: a plain picture is asked about, and if that
    works, the frame alone is refused."""
    api = client(server)
    api.endpoint()
    (answer,) = api.embed_images([b"this is no JPEG"])
    assert isinstance(answer, FrameRefused)


LONG = "a very long prompt " * 30


@pytest.mark.parametrize("refusal", [400, 422, 500])
def test_a_text_that_is_refused_is_named(server: ContractServer, refusal: int) -> None:
    """Where an endpoint answers other texts, the one that it refuses stops the job with one line
    that names it; those beside it are not blamed."""
    server.longest_text, server.refusal = 10, refusal
    with pytest.raises(TextRefused) as caught:
        client(server).embed_texts(["a", "b", LONG, "c"])
    assert caught.value.text == LONG
    assert f"the prompt '{LONG[:80]}'... is refused (the API answers {refusal}:" in str(
        caught.value
    )
    assert "NIGHTREEL" not in str(caught.value)
    assert isinstance(caught.value, JobStopped)


@pytest.mark.parametrize("refusal", [400, 500])
def test_a_prompt_that_is_refused_is_named_by_comparison_too(
    server: ContractServer, refusal: int
) -> None:
    """Where texts are compared with pictures or with each other, the same line says which of them
    is not taken, and no picture is blamed."""
    server.longest_text, server.refusal = 10, refusal
    api = client(server, api_way="compare")
    prompts = [*(f"prompt {n}" for n in range(10)), LONG]
    with pytest.raises(TextRefused, match="the prompt 'a very long prompt"):
        api.compare(pictures(1)[0], prompts)
    for subject, others in ((LONG, ["a", "b"]), ("a", prompts)):
        with pytest.raises(TextRefused) as caught:
            api.compare_texts(subject, others)
        assert caught.value.text == LONG


def test_a_list_of_texts_that_is_not_taken_is_halved(server: ContractServer) -> None:
    """An endpoint that takes two texts at once gives the same vectors as one that takes all."""
    texts = [f"text {n}" for n in range(7)]
    together = client(server).embed_texts(texts)
    server.most_texts = 2
    assert np.array_equal(client(server).embed_texts(texts), together)


@pytest.mark.parametrize("status", [400, 500, 503])
def test_trouble_with_every_text_is_no_texts_fault(server: ContractServer, status: int) -> None:
    """An endpoint that answers no text is away, or asks for a key; no prompt is blamed."""
    server.always = answer_with(status, {"message": "no"})
    for way in ("embed", "compare"):
        api = client(server, api_way=way)
        with pytest.raises(JobStopped if status == 400 else Outage) as caught:
            api.compare_texts("a", ["b", "c"]) if way == "compare" else api.embed_texts(["a", "b"])
        assert not isinstance(caught.value, TextRefused)
        assert len(api.waits) < 12  # type: ignore[attr-defined]


def test_a_500_that_passes_blames_no_text(server: ContractServer) -> None:
    """Should the endpoint come back while it is asked about a plain text, the text is asked for
    once more."""
    server.script = [answer_with(500, {"message": "Internal error."})] * 2
    assert len(client(server).embed_texts(["a"])) == 1


@pytest.mark.parametrize("way", ["embed", "compare"])
def test_texts_that_are_refused_can_be_asked_for(server: ContractServer, way: str) -> None:
    """All refused texts are told at once, each with the API's word; one call where there are none,
    and none at all for no text."""
    api = client(server, api_way=way)
    assert api.refused_texts([]) == []
    assert server.requests == []
    assert api.refused_texts(["a", LONG]) == []
    assert len(server.requests) == 1
    server.longest_text, server.refusal = 10, 400
    why = "the API answers 400: Text too long: 120 words."
    assert api.refused_texts(["a", LONG, "b", "c"]) == [(LONG, why)]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(status, JobPaused) for status in (402, 423)]
    + [(status, JobStopped) for status in (401, 403, 404, 405, 406, 410, 411, 414, 415, 431, 451)]
    + [(status, JobStopped) for status in (501, 505)],
)
def test_refusals_that_time_does_not_mend_are_not_tried_again(
    server: ContractServer, status: int, kind: type[Exception]
) -> None:
    """Key, address, model and credits are a person's to mend: one call, no retry."""
    api = client(server)
    api.endpoint()
    before = len(server.requests)
    server.always = answer_with(status, {"message": "no"})
    with pytest.raises(kind, match=f"the API answers {status}: no"):
        api.embed_images(pictures(1))
    assert len(server.requests) == before + 1


@pytest.mark.parametrize("status", [408, 425, 520, 599])
def test_refusals_that_time_mends_are_tried_again(server: ContractServer, status: int) -> None:
    """Too slow, too early, or a gateway's own words for an outage."""
    api = client(server)
    api.endpoint()
    server.script = [answer_with(status, {})]
    assert len(api.embed_images(pictures(1))) == 1


@pytest.mark.parametrize("transport", ["query", "header", "body"])
def test_the_key_arrives_and_is_never_told(
    transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The key travels as asked; no log at any level and no error text holds it, not even one that
    the server echoes."""
    caplog.set_level(logging.DEBUG)
    with contract_server(key=KEY) as server:
        api = client(server, api_key=KEY, api_key_transport=transport)
        assert len(api.embed_images(pictures(1))) == 1
        path, body, headers = server.requests[-1]
        carried = {
            "query": f"api_key={KEY}" in path,
            "header": headers.get("Authorization") == f"Bearer {KEY}",
            "body": body.get("api_key") == KEY,
        }
        assert [way for way, there in carried.items() if there] == [transport]
        server.always = answer_with(401, {"message": f"the key {KEY} is unknown"})
        with pytest.raises(JobStopped) as caught:
            api.embed_images(pictures(1))
    with pytest.raises(Outage) as gone:
        client(server, api_key=KEY, api_key_transport=transport).embed_images(pictures(1))
    assert KEY not in str(caught.value) + repr(caught.value) + str(gone.value) + repr(gone.value)
    assert gone.value.__cause__ is None
    assert gone.value.__suppress_context__
    assert KEY not in caplog.text
    assert KEY not in repr(api._settings)


@pytest.mark.parametrize(
    "key", [f"{KEY}\n# my key", f"{KEY}\r", f"{KEY} of mine", f"{KEY}\x00", "schlüssel-日本"]
)
def test_a_key_that_no_header_carries_is_refused_unshown(key: str) -> None:
    """A file with a second line, say, is refused before anything is sent, whole or in part."""
    with contract_server() as server:
        for transport in ("query", "header", "body"):
            with pytest.raises(SecretUnreadable, match="NIGHTREEL_API_KEY_FILE") as caught:
                client(server, api_key=f"x{key}x", api_key_transport=transport)
            assert KEY[:6] not in str(caught.value)
        assert server.requests == []


def test_what_cannot_be_sent_is_not_shown(server: ContractServer) -> None:
    """The error of the library that fails to write a header holds all of it."""
    api = client(server)
    api.wire._headers["Authorization"] = f"Bearer {KEY}\n"
    with pytest.raises(JobStopped, match="cannot be asked") as caught:
        api.embed_texts(["a"])
    assert KEY not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("before", range(150, 210, 3))
def test_no_part_of_the_key_is_told(server: ContractServer, before: int) -> None:
    """Wherever in a long answer the key stands, none of it is left where the answer is cut."""
    server.always = answer_with(401, {"message": "x" * before + KEY + " is bad"})
    with pytest.raises(JobStopped) as caught:
        client(server, api_key=KEY).embed_texts(["a"])
    assert "rf" not in str(caught.value)


@pytest.mark.parametrize("echo", [str, quote, quote_plus, lambda key: quote(key, safe="").lower()])
def test_a_key_that_is_echoed_encoded_is_masked(server: ContractServer, echo: Any) -> None:
    """A server that repeats the address that it was asked repeats the key percent-encoded."""
    key = "sécret+/%&=key"
    said = f"no such path: /clip?api_key={echo(key)}&more"
    server.always = answer_with(404, {"message": said})
    with pytest.raises(JobStopped, match=r"api_key=\[key\]&more") as caught:
        client(server, api_key=key, api_key_transport="query").embed_texts(["a"])
    assert "cret" not in str(caught.value)


def test_what_an_api_says_is_one_printable_line(server: ContractServer) -> None:
    """Line breaks, colours and marks that turn a line around do not reach a terminal or a log."""
    said = "no\n\treally \x1b[31mred\x1b[0m \u202eolleh\x00 end"
    server.always = answer_with(401, {"message": said})
    with pytest.raises(JobStopped, match=r"401: no really \[31mred\[0m olleh end; check"):
        client(server).embed_texts(["a"])
    server.info = {"model": "a\nmodel\x1b[0m", "notice": "one\ntwo\x07"}
    identity = client(server, api_key="a").identity()
    assert (identity.model, identity.notice) == ("a model[0m", "one two")


def test_a_422_body_is_never_repeated(server: ContractServer) -> None:
    """422 echoes the whole request, picture included: none of it reaches an error text."""
    api = client(server)
    api.endpoint()
    server.always = answer_with(422, {"message": "SECRET", "detail": [{"input": "SECRET"}]})
    (answer,) = api.embed_images(pictures(1))
    assert "SECRET" not in str(answer)


def test_a_redirect_is_not_followed(server: ContractServer) -> None:
    """A redirect would carry the key to another host, so it is a refusal."""
    api = client(server, api_key=KEY)
    api.endpoint()
    with contract_server() as other:
        server.always = answer_with(307, {}, {"Location": f"{other.url}/clip/embed_image"})
        with pytest.raises(JobStopped):
            api.embed_images(pictures(1))
        assert other.requests == []


@pytest.mark.parametrize(("path", "sent"), [("//", ""), ("//v1//x/", "/v1/x"), ("/v1", "/v1")])
def test_slashes_of_the_address_do_no_harm(server: ContractServer, path: str, sent: str) -> None:
    """A double slash in a path would be refused; an address may have some all the same."""
    api = client(server, api_url=server.url + path)
    assert api.base == server.url + sent
    server.always = answer_with(200, {"embeddings": [[1.0, 2.0]]})
    api.embed_texts(["a"])
    assert server.requests[-1][0] == f"{sent}/clip/embed_text"


@pytest.mark.parametrize(
    "address",
    ["ftp://host", "host:9001", "http://user:pw@host", "http://:pw@host", "http://host?api_key=pw"],
)
def test_an_address_with_more_than_an_address_is_refused(address: str) -> None:
    """Keys and passwords do not belong into the address, where they would be shown."""
    with pytest.raises(JobStopped) as caught:
        ApiClient(WorkerSettings(api_url=address))
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "transport"),
    [
        ("roboflow.com", "query"),
        ("serverless.roboflow.com", "query"),
        ("evilroboflow.com", "body"),
        ("roboflow.com.evil.test", "body"),
        ("name.roboflow.cloud", "body"),
    ],
)
def test_the_key_travels_in_the_query_to_its_own_hosts_alone(host: str, transport: str) -> None:
    """What is in an address stands in the logs of whoever is asked."""
    api = ApiClient(WorkerSettings(api_url=f"https://{host}", api_key=KEY))
    assert api.wire._transport == transport
    assert (KEY in api.wire._query) == (transport == "query")


def test_a_key_is_checked_without_a_call_that_costs(server: ContractServer) -> None:
    """By a request that asks for nothing."""
    server.key = KEY
    client(server, api_key=KEY).check_key()
    wrong = client(server, api_key="another")
    with pytest.raises(JobStopped, match="the API answers 401"):
        wrong.check_key()
    assert (wrong.spent.image_calls, wrong.spent.text_calls) == (0, 0)


@pytest.mark.parametrize(
    ("embeds", "way", "compares"),
    [
        (True, "auto", False),
        (False, "auto", True),
        (True, "compare", True),
        (False, "embed", False),
    ],
)
def test_whether_pictures_are_embedded_is_asked_without_a_call_that_costs(
    embeds: bool, way: str, compares: bool
) -> None:
    """A way that a person chose is not asked about."""
    with contract_server(embeds=embeds) as server:
        api = client(server, api_way=way)
        assert api.only_compares() == compares
        assert all(not {"image", "subject"} & set(body) for _, body, _ in server.requests)
        assert bool(server.requests) == (way == "auto")


def test_what_is_spent_is_counted(server: ContractServer) -> None:
    """Calls and bytes are those that the server saw."""
    api = client(server)
    api.endpoint()
    api.embed_images(pictures(5))
    api.embed_texts(["a", "b"])
    images = sum("embed_image" in path for path, _, _ in server.requests)
    assert (api.spent.image_calls, api.spent.text_calls) == (images, 1)
    sent = sum(int(headers["Content-Length"]) for _, _, headers in server.requests)
    assert api.spent.bytes_sent == sent
