"""Every error that runner raises, in one tree.

RunnerError
├── ConfigError                    the configuration cannot be run; names the key and the way out
│   └── DatasetError               the dataset cannot be read; names the file and the line
├── StoreError                     a results.sqlite that cannot be used; names the file
├── ParseError                     an answer is not in the form that was asked for; a warning, its item did not fail
├── RunStopped                     the run cannot go on; everything settled so far is kept
│   ├── Interrupted                a signal asked for the end
│   ├── BudgetExhausted            the budget has no room for another request
│   └── SystemicError              every request would fail the same way (a wrong key, no server)
└── ItemError                      one item failed; a value in a batch, never the end of a run
    ├── RowError                   the row cannot be turned into a request
    └── RequestError               the request was sent, or tried to be, and was not answered well
        ├── APIConnectionError     the connection broke before the answer was whole
        │   └── ConnectError       there was none: nobody listens, the name is unknown; nothing was sent
        ├── Timeout                no answer in time; what it cost is unknown
        ├── BadRequestError        400, 422 and every other refusal of the request itself
        │   ├── ConflictError          409: something else is under way with what the request is about
        │   ├── ContextWindowExceededError
        │   ├── ContentPolicyViolationError
        │   └── RequestTooLargeError   413, or larger than this client sends
        ├── AuthenticationError    401
        ├── PermissionDeniedError  403
        ├── NotFoundError          404: no such model or path; 3xx: it is somewhere else
        ├── RateLimitError         429
        │   └── InsufficientQuotaError  429 that no waiting heals: the account is out of quota or money
        ├── InternalServerError    5xx
        │   └── ServiceUnavailableError  503, 529: this replica is overloaded
        ├── NoDeploymentError      no deployment has answered for so long that waiting ended; nothing was sent
        ├── APIResponseError       an answer came and is no answer: truncated, no JSON, an error behind a 200
        └── WorkerError            the caller's own function, asked in a provider's place, raised or gave no text

The names below RequestError are those that LiteLLM and the OpenAI SDK use.
"""

from __future__ import annotations

import signal
from typing import Any, ClassVar

FINISHED, BAD_CONFIG, SOME_FAILED, STOPPED = 0, 2, 3, 4
"""Exit codes of a run; an interrupt is 128 + signal."""


class RunnerError(Exception):
    """The root: ``except RunnerError`` catches whatever runner raises on purpose."""


class ConfigError(RunnerError):
    """The configuration or an argument cannot be used. Nothing was sent. Several faults are several arguments."""

    def __str__(self) -> str:
        text, *others = map(str, self.args or ("",))
        for other in others:
            text += f"{'' if text.endswith(('.', '?')) else '.'} Also: {other}"
        return text


class DatasetError(ConfigError):
    """The dataset as a whole cannot be read. Nothing was sent."""


class StoreError(RunnerError):
    """The run's database cannot be opened, read or written."""


class ParseError(RunnerError):
    """An answer does not fit its ``response_format``. The text is there all the same."""


class RunStopped(RunnerError):
    """The run ended before its last row. What was settled is stored, and the same command resumes it."""

    reason: ClassVar[str] = "stopped"


class Interrupted(RunStopped):
    """SIGINT or SIGTERM came.

    Args:
        signum: The signal's number.
    """

    reason = "interrupted"

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    def __reduce__(self) -> tuple[Any, ...]:
        return Interrupted, (self.signum,)


class BudgetExhausted(RunStopped):
    """The budget has no room for what comes next."""

    reason = "budget"


class SystemicError(RunStopped):
    """The same failure meets every request: going on would only burn the dataset."""

    reason = "systemic-error"


class ItemError(RunnerError):
    """One item failed. ``status`` is the HTTP status, where there was one."""

    status: int | None = None

    def as_row(self) -> dict[str, Any]:
        """The ``error`` column of a result: ``{type, message, status}``."""
        return {"type": type(self).__name__, "message": str(self), "status": self.status}


class RowError(ItemError):
    """The row cannot be turned into a request; the message names its place in the dataset."""


class RequestError(ItemError):
    """A request failed.

    Args:
        message: What happened, in one line, with the server's own words where it gave some.
        status: HTTP status, if an HTTP answer came.
        retry_after_s: The server's hint: do not try again for so many seconds.
        headers: The answer's headers, lower-case names.
    """

    retryable: ClassVar[bool] = False
    """Whether the same request can succeed when it is sent again."""

    billing: ClassVar[str] = "free"
    """``free`` if a request that ends so is not charged, ``unknown`` if it may have been."""

    turned_away: ClassVar[bool] = False
    """Whether the deployment did not take the request at all, so that another attempt costs nothing but time."""

    pauses: ClassVar[bool] = False
    """Whether everyone who shares the quota should wait too."""

    systemic: ClassVar[bool] = False
    """Whether every other request is bound to fail the same way."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.retry_after_s = retry_after_s
        self.headers = headers or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.status, self.retry_after_s, self.headers)


def _rebuild(
    kind: type[RequestError], message: str, status: int | None, retry_after_s: float | None, headers: dict[str, str]
) -> RequestError:
    return kind(message, status=status, retry_after_s=retry_after_s, headers=headers)


class APIConnectionError(RequestError):
    retryable = True
    billing = "unknown"


class ConnectError(APIConnectionError):
    billing = "free"
    turned_away = True


class Timeout(RequestError):
    retryable = True
    billing = "unknown"


class BadRequestError(RequestError):
    """The request itself is refused."""


class ContextWindowExceededError(BadRequestError):
    """The prompt and the reserved output do not fit the model's context."""


class ContentPolicyViolationError(BadRequestError):
    """The provider's content filter refused the prompt or the answer."""


class ConflictError(BadRequestError):
    """The request is in the way of another one, which will be over."""

    retryable = True


class RequestTooLargeError(BadRequestError):
    """The request, or its answer, is larger than one side accepts."""


class AuthenticationError(RequestError):
    systemic = True


class PermissionDeniedError(RequestError):
    systemic = True


class NotFoundError(RequestError):
    systemic = True


class RateLimitError(RequestError):
    retryable = True
    turned_away = True
    pauses = True


class InsufficientQuotaError(RateLimitError):
    retryable = False
    systemic = True


class InternalServerError(RequestError):
    retryable = True
    billing = "unknown"


class ServiceUnavailableError(InternalServerError):
    billing = "free"
    turned_away = True


class NoDeploymentError(RequestError):
    systemic = True


class APIResponseError(RequestError):
    retryable = True
    billing = "unknown"


class WorkerError(RequestError):
    retryable = True
    billing = "unknown"
