"""The API client against a real server that misbehaves on command."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from contract_server import (
    ContractServer,
    answer_with,
    contract_server,
    drip,
    half_close,
    hang_up,
)

from storage.records import Label, LabelSet
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
    defaults: dict[str, Any] = {"api_connect_timeout_s": 2, "api_read_timeout_s": 2}
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


def test_an_endpoint_without_embeddings_is_compared() -> None:
    """Where /clip/embed_image does not exist, /clip/compare serves."""
    with contract_server(embeds=False) as server:
        assert not client(server).endpoint().embeds


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
    """A short Retry-After is waited for; a long one gives the task back for that time."""
    api = client(server)
    api.endpoint()
    server.script = [answer_with(429, {}, {"Retry-After": "3"})]
    api.embed_images(pictures(1))
    assert api.waits == [3.0]  # type: ignore[attr-defined]
    server.script = [answer_with(429, {}, {"Retry-After": "120"})]
    with pytest.raises(Outage) as caught:
        api.embed_images(pictures(1))
    assert caught.value.retry_after_s == 120


@pytest.mark.parametrize(
    "trouble",
    [
        answer_with(503, {"message": "loading"}),
        hang_up,
        half_close,
        drip,
        answer_with(200, None, raw=b"<html>proxy</html>"),
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
    [(401, JobStopped), (403, JobStopped), (404, JobStopped), (402, JobPaused), (423, JobPaused)],
)
def test_refusals_of_the_account_are_not_tried_again(
    server: ContractServer, status: int, kind: type[Exception]
) -> None:
    """Key, model and credits are a person's to mend: one call, no retry."""
    api = client(server)
    api.endpoint()
    before = len(server.requests)
    server.always = answer_with(status, {"message": "no"})
    with pytest.raises(kind, match=f"the API answers {status}: no"):
        api.embed_images(pictures(1))
    assert len(server.requests) == before + 1


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


def test_slashes_after_the_address_do_no_harm(server: ContractServer) -> None:
    """A double slash in a path would be refused; an address may end with one all the same."""
    client(server, api_url=f"{server.url}//").embed_texts(["a"])
    assert server.requests[-1][0] == "/clip/embed_text"


@pytest.mark.parametrize(
    "address", ["ftp://host", "host:9001", "http://user:pw@host", "http://host?api_key=x"]
)
def test_an_address_with_more_than_an_address_is_refused(address: str) -> None:
    """Keys and passwords do not belong into the address, where they would be shown."""
    with pytest.raises(JobStopped) as caught:
        ApiClient(WorkerSettings(api_url=address))
    assert "pw" not in str(caught.value)


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
