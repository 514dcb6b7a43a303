"""What it means that a call of the API failed, decided by the error's type alone:

    ApiError
    |-- FrameRefused   this picture will never be answered: its interval becomes a gap
    |-- Outage         the endpoint cannot answer now: the task goes back and spends no attempt
    |   |-- AtRest     its circuit breaker is open: no call was made
    |   |-- NotReached no connection was made: nothing was sent
    |   |-- TooMany    429: it is there, and has had enough for now
    |   `-- BadAnswer  500 or an unusable answer: the endpoint's trouble, or this one picture's
    |       `-- WrongCount   more or fewer embeddings than pictures or texts
    |-- JobPaused      credits or a paused account: everything stays queued until `resume`
    `-- JobStopped     key, address or model are wrong: no call can succeed until that is mended
        |-- BadRequest   400: one of these, or what was asked for
        |-- NotThere     404 or 405: no such route, or no such model
        |-- ModelChanged the answer is of another model than the one that the endpoint named
        `-- TextRefused  a prompt that the endpoint does not take

No message of these carries the key, an address with a query, the body of an answer, or a character
that is not printable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import quote, quote_plus

API_OUTAGE = "api-outage"
"""Error kind in the ledger of a task that an Outage put back."""
SHOWN_CHARACTERS = 80
"""Of a prompt, in a message."""
SAID_CHARACTERS = 200
"""Of what the endpoint says, in a message."""
CHECK_SETTINGS = "check NIGHTREEL_API_URL, NIGHTREEL_API_KEY and the model"
_PASSING = (408, 425, 429)
"""Refusals below 500 that time mends: a request that came too slowly, too early, or too soon."""
_NEVER = (501, 505)
"""Refusals from 500 on that it does not: a method or a version that is not spoken there."""


class ApiError(Exception):
    """A call failed; the subclass says what follows."""


class FrameRefused(ApiError):
    """The endpoint refuses this picture, and would again."""


class Outage(ApiError):
    """The endpoint cannot answer now."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class AtRest(Outage):
    """The endpoint was away for all workers: it is left alone for a while."""


class JobPaused(ApiError):
    """The account cannot pay or is paused (402, 423)."""


class JobStopped(ApiError):
    """Key, address or model are refused (401, 403, 404), or what was sent is and ever will be."""


class BadRequest(JobStopped):
    """400 that is not about a picture: a missing key, or a text that is not taken."""

    def __init__(self, said: str) -> None:
        """`said` is the endpoint's answer without the advice that the message adds."""
        super().__init__(f"{said}; {CHECK_SETTINGS}")
        self.said = said


class NotThere(JobStopped):
    """404, or 405 of a server that knows the path by another method: no such route or model."""


class ModelChanged(JobStopped):
    """The endpoint was started anew with another model: nothing of its answer may be kept."""


class TextRefused(JobStopped):
    """The endpoint answers other texts and not this one."""

    def __init__(self, text: str, why: str) -> None:
        cut = "..." * (len(text) > SHOWN_CHARACTERS)
        cited = f"{text[:SHOWN_CHARACTERS]!r}{cut}"
        super().__init__(f"the prompt {cited} is refused ({why}): write a shorter one")
        self.text = text
        self.why = why


class BadAnswer(Outage):
    """500, or an answer that is not what was asked for."""


class WrongCount(BadAnswer):
    """Embeddings, but not as many as were asked for: the endpoint stacks lists of pictures."""


class TooMany(Outage):
    """429: the endpoint is there, and has had enough for now."""


class NotReached(Outage):
    """No connection was made: nothing was sent."""


def refusal(status: int, said: str, headers: Mapping[str, str]) -> ApiError:
    """Return what an answer other than 2xx means: the contract's table of errors, in one place.
    `said` is the endpoint's word for it, already `shown`."""
    said = said[:SAID_CHARACTERS]
    text = f"the API answers {status}: {said}"
    if status in (413, 422) or (status == 400 and said.startswith("Could not load input image")):
        return FrameRefused(text)
    if status in (402, 423):
        return JobPaused(f"{text}; see to the account's credits, then run again")
    if status == 400:
        return BadRequest(text)
    if status == 500:
        return BadAnswer(text)
    if status in _PASSING or (status > 500 and status not in _NEVER):
        kind = TooMany if status == 429 else Outage
        return kind(text, _retry_after_s(headers))
    kind_of_stop = NotThere if status in (404, 405) else JobStopped
    return kind_of_stop(f"{text}; {CHECK_SETTINGS}")


def shown(said: str, secret: re.Pattern[str] | None = None) -> str:
    """Return what an endpoint says as one line of printable characters, in which whatever `secret`
    matches is masked. To be cut afterwards: half a key is matched by nothing."""
    line = "".join(filter(str.isprintable, " ".join(said.split())))
    return line if secret is None else secret.sub("[key]", line)


def forms_of(key: str) -> re.Pattern[str]:
    """Return a pattern of whatever a key may be echoed as: itself, or percent-encoded."""
    forms = {key, quote(key), quote(key, safe=""), quote_plus(key)}
    longest_first = sorted(forms, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `Retry-After` header, which may hold a date; None where there is none, or what
    it holds is neither."""
    said = headers.get("Retry-After")
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        until, sent = _moment(said), _moment(headers.get("Date", ""))
        if until is None:
            return None
        # By the server's own clock where it tells the time: this machine's may be off.
        seconds = (until - (sent or datetime.now(UTC))).total_seconds()
    return min(max(seconds, 0.0), 3600.0) if math.isfinite(seconds) else None


def _moment(http_date: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(http_date)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
