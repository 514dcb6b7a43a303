"""`labels.yaml`: what is right is read exactly, what is wrong names its line and the remedy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from scheduler.labels import (
    SEASONS,
    LabelsError,
    check_fit,
    check_flags,
    label_set_of,
    may_not_fit,
    read_labels,
    seasons,
)
from scheduler.submit import job_spec
from storage.records import Fit, Label, LabelSet, Sampling


def loader(data: bytes) -> bytes:
    """Stands where the decoder of pictures would: this module is about the file's own rules."""
    if data.startswith(b"bad"):
        raise ValueError("it is not a picture")
    return b"jpeg:" + data


def read(tmp_path: Path, text: str):
    path = tmp_path / "labels.yaml"
    path.write_text(text, encoding="utf-8")
    return read_labels(path, loader)


def test_a_full_file_is_read(tmp_path: Path) -> None:
    """Name, prompts, threshold and flag arrive; a plain text is a label by itself."""
    labels = read(
        tmp_path,
        """
name: sites
labels:
  - name: building
    prompts: [a construction site, a crane]
    threshold: 0.6
    flag: works in progress
  - open field
""",
    )
    first, second = labels.labels
    assert labels.name == "sites"
    assert first.prompts == ("a construction site", "a crane")
    assert (first.threshold, first.flag) == (0.6, "works in progress")
    assert (second.name, second.prompts) == ("open field", ("open field",))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (b"night shift.yaml", "night shift"),
        (b"two\nlines\t\x1b[31m.yaml", "two\\nlines\\t\\x1b[31m"),
        (b"latin\xe9.yaml", "latin\\xe9"),
    ],
)
def test_a_set_without_a_name_is_called_after_its_file(
    tmp_path: Path, file: bytes, name: str
) -> None:
    """A job bears that name: it is one line of printable text, whatever the file is called."""
    path = tmp_path / os.fsdecode(file)
    path.write_text("- fire\n- rest\n", encoding="utf-8")
    assert read_labels(path, loader).name == name


def test_a_threshold_alone_raises_the_name(tmp_path: Path) -> None:
    """Whoever names a threshold wants to be told: without a reason, the label's name is it."""
    first, second = read(tmp_path, "- {name: fire, threshold: 0.6}\n- rest\n").labels
    assert (first.threshold, first.flag) == (0.6, "fire")
    assert (second.threshold, second.flag) == (None, None)


def flagging(count: int, threshold: float) -> LabelSet:
    """So many labels, the last with a flag."""
    rest = tuple(Label(str(at), (str(at),)) for at in range(count - 1))
    return LabelSet("many", (*rest, Label("fire", ("fire",), (), threshold, "burning")))


@pytest.mark.parametrize(
    ("count", "top_n", "threshold", "enough"),
    [
        (20, 5, 0.1, 10),
        (20, 5, 1 / 6, 6),
        (8, 5, 0.01, 8),
        (20, 5, 0.17, None),
        (5, 5, 0.01, None),
        (3, 1, 0.5, 2),
    ],
)
def test_a_flag_that_could_go_unseen_is_refused(
    count: int, top_n: int, threshold: float, enough: int | None
) -> None:
    """A label beyond the best kept may have an equal share with them; what is told to be kept
    suffices."""
    labels = flagging(count, threshold)
    if enough is None:
        check_flags(labels, top_n)
        return
    with pytest.raises(LabelsError, match=f"'fire' raises.*--top {enough}`"):
        check_flags(labels, top_n)
    with pytest.raises(LabelsError, match="--top"):
        check_flags(labels, enough - 1)
    check_flags(labels, enough)


def test_no_job_is_recorded_whose_flags_could_go_unseen() -> None:
    """What `run` and `submit` record is checked."""
    with pytest.raises(LabelsError, match="--top 10"):
        job_spec(
            names=["a"], sampling=Sampling(), fit=Fit.CROP, top_n=5,
            labels=flagging(20, 0.1), model="clip/1", notice=None,
        )  # fmt: skip


def test_examples_are_found_beside_the_file(tmp_path: Path) -> None:
    """Example pictures are relative to the label file, globs included, in order of name."""
    for name in ("w2.jpg", "w1.jpg", "s.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    labels = read(
        tmp_path, '- {name: winter, examples: "w*.jpg"}\n- {name: summer, examples: [s.jpg]}\n'
    )
    assert labels.labels[0].examples == (b"jpeg:w1.jpg", b"jpeg:w2.jpg")
    assert labels.labels[0].prompts == ()


def test_the_digest_follows_the_content_alone(tmp_path: Path) -> None:
    """Equal labels have equal digests whatever the set is called; another prompt has another."""
    one = read(tmp_path, "name: a\nlabels: [x, y]")
    same = read(tmp_path, "name: b\nlabels: [x, {name: y}]")
    other = read(tmp_path, "labels: [x, {name: y, prompt: z}]")
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (
            "labels:\n  - name: a\n    prompt: x\n    colour: red\n  - b",
            4,
            "unknown field 'colour'",
        ),
        ("- a\n- name: b\n  threshold: 7", 3, "above 0 and at most 1"),
        ("- a\n- name: b\n  threshold: much", 3, "above 0 and at most 1"),
        ("- a\n- name: b\n  flag: look", 3, "without `threshold:`"),
        ("- a\n- b\n- a", 3, "stands on line 1 already"),
        ("- a\n- prompts: [x]", 2, "without `name:`"),
        ("- a\n- name: b\n  prompts: []", 3, "empty list of prompts"),
        ("- a\n- name: b\n  name: c", 3, "stands twice"),
        ("- a\n- [b, c]", 2, "a label is a text"),
        ("- a\n- name: b\n  examples: gone.jpg", 3, "no picture is found"),
        (
            "- a\n- name: b\n  examples: bad.jpg",
            3,
            "no usable example picture: it is not a picture",
        ),
        ("- a\n- " + "long " * 300, 2, "characters"),
        ("- a\n- ''", 2, "a text is expected"),
        ("- a\n- Unknown", 2, "'Unknown' would be taken for time in which no label leads"),
        ("- a\n- b: [", 2, "not valid YAML"),
        ("name: x\nlabels: []", 2, "empty or missing list"),
        ("name: x", 1, "no `labels:` list"),
        ("- a\n- {name: b, prompt: x, examples: good.jpg}", 1, "described otherwise than the rest"),
    ],
)
def test_a_mistake_names_its_line(tmp_path: Path, text: str, line: int, problem: str) -> None:
    """Every mistake is one line that names file, line and what to do."""
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    (tmp_path / "good.jpg").write_bytes(b"good")
    with pytest.raises(LabelsError) as caught:
        read(tmp_path, text)
    assert problem in str(caught.value)
    assert f"labels.yaml, line {line}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_tags_are_not_run(tmp_path: Path) -> None:
    """A YAML tag that would construct an object is refused, and constructs nothing."""
    marker = tmp_path / "ran"
    with pytest.raises(LabelsError):
        read(tmp_path, f"- a\n- !!python/object/apply:os.mkdir ['{marker}']")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), (b"\xff\xfe\x00", "not UTF-8"), (b"- a\x00", "forbids")],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """A missing file and binary files are told apart from wrong YAML."""
    path = tmp_path / "labels.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabelsError, match=problem):
        read_labels(path, loader)


def test_the_default_is_the_seasons() -> None:
    """Without labels a run asks for the four seasons and something else."""
    assert [label.name for label in seasons().labels] == list(SEASONS)


@pytest.mark.parametrize(
    "texts",
    [
        ["only one"],
        ["a", "a"],
        ["a", " "],
        ["a", "b" * 1001],
        ["a", "two\nlines"],
        ["a", "\x1b[31m"],
        ["a", "\udcff"],
    ],
)
def test_labels_that_cannot_be_compared_are_refused(texts: list[str]) -> None:
    """One label, a repeated one, an empty one and one too long for the model are mistakes."""
    with pytest.raises(LabelsError):
        label_set_of(texts)


def test_only_a_long_prompt_may_not_fit() -> None:
    """A text of at most 75 bytes as the tokeniser reads it is at most 77 tokens; beyond that nobody
    knows without the vocabulary."""
    fits = ["a" * 75, "\u00e9" * 37, "\u0130" * 25]
    may_not = ["a" * 76, "\u00e9" * 38, "\u0130" * 26]  # a capital dotted i grows in lower case
    assert may_not_fit(label_set_of([*fits, *may_not])) == tuple(may_not)


def test_prompts_that_surely_fit_cost_no_question() -> None:
    """Usual labels are not asked about."""

    def nobody(_: Sequence[str]) -> list[tuple[str, str]]:
        raise AssertionError

    check_fit(seasons(), nobody)


def test_a_prompt_that_the_api_refuses_is_a_mistake_of_its_label() -> None:
    """One line names the label, the prompt and what the API says; only doubtful prompts are
    asked about, once each."""
    long = "one after another " * 10
    asked = []

    def refused(texts: Sequence[str]) -> list[tuple[str, str]]:
        asked.append(tuple(texts))
        return [(long, "the API answers 400: 90 tokens")]

    labels = LabelSet("two", (Label("queue", ("short", long)), Label("rest", ("else", long))))
    with pytest.raises(LabelsError) as caught:
        check_fit(labels, refused)
    assert asked == [(long,)]
    assert str(caught.value) == (
        f"the label 'queue', prompt '{long[:80]}'...: the API answers 400: 90 tokens; "
        "write a shorter one"
    )
    with pytest.raises(LabelsError, match=r"^the label 'one after another one .*'\.\.\.: the API"):
        check_fit(label_set_of([long, "a"]), lambda texts: [(texts[0], "the API answers 500")])
    check_fit(labels, lambda _: [])
