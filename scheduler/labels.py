"""`labels.yaml`, read with errors that name the line and the remedy."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from storage.records import Fit, Label, LabelSet, shown_path
from storage.scenes import UNKNOWN_NAME
from workers.calls import prompts_of

SEASONS = ("Winter Season", "Autumn Season", "Spring Season", "Summer Season", "something else")
"""The label set of a run that names none."""
MOST_LABELS = 1000
LONGEST_PROMPT = 1000
"""Characters, far more than 77 tokens hold; whether a shorter prompt fits, only the API knows."""
SURELY_FITS_BYTES = 75
"""CLIP reads 77 tokens: two marks, and others that cover at least a byte of the text each."""
MOST_EXAMPLES = 500
LONGEST_FILE_BYTES = 4 << 20
SHOWN_CHARACTERS = 80
"""Of a label or prompt, in a message."""

LoadPicture = Callable[[bytes], bytes]
"""From a picture file's bytes to a JPEG as the model reads it; ValueError says what is wrong."""


class LabelsError(Exception):
    """A label set cannot be used; the message names the file, the line and the remedy."""


def label_set_of(texts: Sequence[str], name: str = "labels") -> LabelSet:
    """Return the label set of plain texts, each name and prompt at once. Raises LabelsError."""
    labels = [Label(text.strip(), (text.strip(),)) for text in texts]
    for label in labels:
        if not label.name:
            raise LabelsError("an empty label: give each --label a text")
        check_text(label.name, "label")
    _check_together(labels, "labels", lambda _: "")
    return LabelSet(name, tuple(labels))


def seasons() -> LabelSet:
    """Return the label set of a run that names none."""
    return label_set_of(SEASONS, "seasons")


def read_labels(path: Path, load_picture: LoadPicture) -> LabelSet:
    """Return the label set that a YAML file describes.

    `load_picture` turns an example picture into what the model reads. Raises LabelsError.
    """
    return _Reader(path, load_picture).read()


def picture_loader(size: int, fit: Fit) -> LoadPicture:
    """Return what prepares example pictures for a model that reads squares of `size` pixels."""
    from workers.footage.picture import encode_jpeg, load_picture  # noqa: PLC0415 - loads PyAV

    return lambda data: encode_jpeg(load_picture(data, size, fit))


def check_text(text: str, what: str) -> None:
    """Refuse a text that no model need be asked for: not printable, or far too long. Raises
    LabelsError, which calls it `what`."""
    if not text.isprintable():
        raise LabelsError(
            f"the {what} {_shown(text)}: give a text of printable characters on one line"
        )
    if len(text) > LONGEST_PROMPT:
        raise LabelsError(
            f"the {what} {_shown(text)} has {len(text)} characters: "
            "CLIP reads 77 tokens, about as many words; write a shorter one"
        )


def check_name(name: str, where: str) -> None:
    """Refuse a label that every answer would confuse with time in which no label leads. Raises
    LabelsError, which begins with `where`."""
    if name.casefold() == UNKNOWN_NAME:
        raise LabelsError(
            f"{where}: the label {name!r} would be taken for time in which no label leads, which "
            "answers call so: rename it"
        )


def may_not_fit(labels: LabelSet) -> tuple[str, ...]:
    """Return the prompts that could be more than CLIP reads, each once: usual ones never are."""
    return tuple(p for p in prompts_of(labels) if _cleaned_bytes(p) > SURELY_FITS_BYTES)


def check_fit(
    labels: LabelSet, refused: Callable[[Sequence[str]], Sequence[tuple[str, str]]]
) -> None:
    """Refuse a label set with a prompt that the API does not take, before anything is recorded.

    `refused` returns those of the texts that are not taken, each with the reason
    (`ApiClient.refused_texts`); it is asked only where `may_not_fit` finds any. Raises LabelsError
    that names label and prompt, and whatever `refused` raises.
    """
    doubtful = may_not_fit(labels)
    for text, why in refused(doubtful) if doubtful else ():
        name = next(label.name for label in labels.labels if text in label.prompts)
        prompt = f", prompt {_shown(text)}" if text != name else ""
        raise LabelsError(f"the label {_shown(name)}{prompt}: {why}; write a shorter one")


def check_examples(labels: LabelSet, only_compares: Callable[[], bool]) -> None:
    """Refuse example pictures for an API that embeds none, before anything is recorded.

    `only_compares` is asked only where there are any (`ApiClient.only_compares`). Raises
    LabelsError that names the label, and whatever `only_compares` raises.
    """
    name = next((label.name for label in labels.labels if label.examples), None)
    if name is not None and only_compares():
        raise LabelsError(
            f"the label {_shown(name)}: this API compares prompts only and cannot use example "
            "pictures; give prompts, or an API with /clip/embed_image"
        )


def check_flags(labels: LabelSet, top_n: int) -> None:
    """Refuse a label set of which a flag could stay unseen where each frame's `top_n` best labels
    are kept: one that is not among them has at most an equal part of 1 with all of them, which is
    1 / (top_n + 1). Raises LabelsError that names the label and the remedies.
    """
    count = len(labels.labels)
    for label in labels.labels:
        if label.flag is None or label.threshold is None:
            continue
        enough = top_n
        while enough < count and label.threshold <= 1 / (enough + 1):
            enough += 1
        if enough > top_n:
            raise LabelsError(
                f"the label {_shown(label.name)} raises its flag from {label.threshold:g} on, "
                f"which may go unseen where the {top_n} best of {count} labels are kept: "
                f"keep {enough} (`--top {enough}` of run and submit), or raise the threshold above "
                f"{1 / (top_n + 1):.3f}"
            )


def _cleaned_bytes(text: str) -> int:
    """UTF-8 bytes of a text as CLIP's tokeniser sees it, or as it stands where that is longer."""
    cleaned = unicodedata.normalize("NFC", text).lower()
    return max(len(cleaned.encode()), len(text.encode()))


def _shown(text: str) -> str:
    cut = "..." * (len(text) > SHOWN_CHARACTERS)
    return f"{text[:SHOWN_CHARACTERS]!r}{cut}"


class _Reader:
    """Walks the YAML tree by its nodes, because values alone have lost their lines."""

    def __init__(self, path: Path, load_picture: LoadPicture) -> None:
        self.path = path
        self.load_picture = load_picture
        self.line_of: dict[str, int] = {}

    def fail(self, node: yaml.Node | None, problem: str) -> NoReturn:
        line = f", line {node.start_mark.line + 1}" if node is not None else ""
        raise LabelsError(f"{self.path}{line}: {problem}")

    def read(self) -> LabelSet:
        try:
            if self.path.stat().st_size > LONGEST_FILE_BYTES:
                self.fail(None, "larger than 4 MiB: a label file lists labels, not pictures")
            text = self.path.read_text(encoding="utf-8")
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except OSError as error:
            self.fail(None, f"cannot be read ({error.strerror}): name a YAML file of labels")
        except UnicodeDecodeError:
            self.fail(None, "is not UTF-8 text: save it as UTF-8")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line = f", line {mark.line + 1}" if mark is not None else ""
            raise LabelsError(
                f"{self.path}{line}: not valid YAML ({error.problem}): see the example in the docs"
            ) from None
        except yaml.YAMLError:
            self.fail(None, "holds characters that YAML forbids: save it as plain UTF-8 text")
        name, nodes = shown_path(os.fsencode(self.path.stem)), root
        if isinstance(root, yaml.MappingNode):
            fields = self.fields(root, {"name", "labels"})
            if "name" in fields:
                name = self.text(fields["name"])
            if "labels" not in fields:
                self.fail(root, "no `labels:` list: add one entry a label")
            nodes = fields["labels"]
        if not isinstance(nodes, yaml.SequenceNode) or not nodes.value:
            self.fail(nodes, "an empty or missing list of labels: write one `- name: ...` a label")
        labels = [self.label(node) for node in nodes.value]
        _check_together(labels, str(self.path), lambda n: f", line {self.line_of[n]}")
        return LabelSet(name, tuple(labels))

    def label(self, node: yaml.Node) -> Label:
        if isinstance(node, yaml.ScalarNode):
            text = self.prompt(node)
            self.remember(text, node)
            return Label(text, (text,))
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, "a label is a text, or a mapping with `name:`")
        known = {"name", "prompts", "prompt", "examples", "threshold", "flag"}
        fields = self.fields(node, known)
        if "name" not in fields:
            self.fail(node, "a label without `name:`: add one")
        name = self.text(fields["name"])
        self.remember(name, fields["name"])
        if "prompt" in fields and "prompts" in fields:
            self.fail(fields["prompt"], "`prompt:` beside `prompts:`: keep one of them")
        prompts = self.prompts(fields.get("prompts", fields.get("prompt")))
        examples = self.examples(fields.get("examples"))
        if not prompts and not examples:
            if len(name) > LONGEST_PROMPT:
                self.fail(fields["name"], f"longer than {LONGEST_PROMPT} characters")
            prompts = (name,)
        threshold = self.threshold(fields.get("threshold"))
        if "flag" in fields and threshold is None:
            self.fail(fields["flag"], "`flag:` without `threshold:`: say from which confidence on")
        reason = self.text(fields["flag"]) if "flag" in fields else name
        flag = None if threshold is None else reason
        return Label(name, prompts, examples, threshold, flag)

    def remember(self, name: str, node: yaml.Node) -> None:
        if name in self.line_of:
            self.fail(
                node, f"the label {name!r} stands on line {self.line_of[name]} already: rename one"
            )
        self.line_of[name] = node.start_mark.line + 1

    def fields(self, node: yaml.MappingNode, known: set[str]) -> dict[str, yaml.Node]:
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            word = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if word not in known:
                self.fail(key, f"unknown field {word!r}: known are {', '.join(sorted(known))}")
            if word in found:
                self.fail(key, f"`{word}:` stands twice: keep one")
            found[word] = value
        return found

    def text(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            self.fail(node, "a text is expected here")
        text: str = node.value.strip()
        if not text.isprintable():
            self.fail(node, "a text of printable characters on one line is expected here")
        return text

    def prompt(self, node: yaml.Node) -> str:
        text = self.text(node)
        if len(text) > LONGEST_PROMPT:
            self.fail(
                node,
                f"a prompt of {len(text)} characters: CLIP reads 77 tokens, about as many words; "
                "write a shorter one",
            )
        return text

    def prompts(self, node: yaml.Node | None) -> tuple[str, ...]:
        if node is None:
            return ()
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not nodes:
            self.fail(node, "an empty list of prompts: write one, or leave the field out")
        return tuple(dict.fromkeys(self.prompt(one) for one in nodes))

    def threshold(self, node: yaml.Node | None) -> float | None:
        if node is None:
            return None
        try:
            value = float(node.value)
        except (TypeError, ValueError):
            value = -1.0
        if not 0 < value <= 1:
            self.fail(node, "a threshold is a confidence above 0 and at most 1, such as 0.6")
        return value

    def examples(self, node: yaml.Node | None) -> tuple[bytes, ...]:
        if node is None:
            return ()
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found: dict[str, bytes] = {}
        for one in nodes:
            pattern = os.path.join(self.path.parent, self.text(one))
            paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
            if not paths:
                self.fail(one, f"no picture is found at {one.value!r} (relative to the label file)")
            for path in paths:
                if len(found) == MOST_EXAMPLES:
                    self.fail(one, f"more than {MOST_EXAMPLES} example pictures for one label")
                try:
                    found[path] = self.load_picture(Path(path).read_bytes())
                except OSError as error:
                    self.fail(one, f"{path} cannot be read ({error.strerror})")
                except ValueError as error:
                    self.fail(one, f"{path} is no usable example picture: {error}")
        return tuple(found.values())


def _check_together(labels: Sequence[Label], where: str, line: Callable[[str], str]) -> None:
    """Refuse what is right label by label and wrong as a set."""
    names = [label.name for label in labels]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise LabelsError(f"{where}: the label {twice!r} stands twice: rename one")
    for name in names:
        check_name(name, f"{where}{line(name)}")
    if not 2 <= len(labels) <= MOST_LABELS:
        raise LabelsError(
            f"{where}: {len(labels)} label(s): a frame is compared among 2 to {MOST_LABELS} "
            'labels; add what the rest looks like, such as "something else"'
        )
    # Pictures are closer to pictures than texts are: a label with examples would always win over
    # one without, so all labels of a set are described in the same ways.
    ways = {(bool(label.prompts), bool(label.examples)) for label in labels}
    if len(ways) > 1:
        odd = next(label for label in labels if not label.examples or not label.prompts)
        raise LabelsError(
            f"{where}{line(odd.name)}: the label {odd.name!r} is described otherwise than the rest:"
            " give example pictures to all labels or to none, and prompts to all or to none"
        )
