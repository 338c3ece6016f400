"""Streamed answers: server-sent events, put together to the body that the server would have sent whole. No I/O.

    stream = Stream(request)
    stream.feed(part)  # as parts come, until `is_over`
    stream.end()
    wire.response_from(request, stream.body(), headers)

Servers are untrusted here as in `runner.transports.wire`: whatever comes, only errors of the tree are raised.
"""

from __future__ import annotations

import time
from array import array
from typing import Any, Protocol

from runner import errors
from runner.transports import wire
from runner.types import Endpoint, GenerationRequest

_DONE = b"[DONE]"

_MOST_PARTS = 1024
"""Choices of an answer, and calls of a choice, that are kept apart: a server that makes up more wants memory."""


class Stream:
    """One streamed answer on its way in.

    Notes in the request's trace when the first piece of content came, and when each did. Pieces that come in one part
    are microseconds apart: that is when they could be read.

    Args:
        request: What is answered.
        choices: How many are asked for.
    """

    def __init__(self, request: GenerationRequest, *, choices: Any = None) -> None:
        self._trace = request.trace
        self._times = array("d")
        self._trace.chunk_times = self._times
        self._trace.ttft_s = None
        self._events = EventReader()
        self._pieces: _Pieces = _Items() if request.endpoint is Endpoint.responses else _Chunks(choices)
        self._other: list[bytes] = []  # what came before any event
        self._whole: dict[str, Any] | None = None
        self._done = False
        self.has_events = False
        """Whether what came is a stream of events at all."""
        self._started = time.perf_counter()

    @property
    def has_begun(self) -> bool:
        """Whether something of the answer is there."""
        return self._pieces.have_begun

    @property
    def has_content(self) -> bool:
        """Whether some of that is more than its beginning and its end."""
        return bool(self._times)

    @property
    def is_whole(self) -> bool:
        """Whether all of the answer is there. Its usage may still come."""
        return self._done or self._pieces.are_whole

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return self._done

    def feed(self, part: bytes) -> None:
        """Take in what has just come; raises as `add` does."""
        if not self.has_events:
            self._other.append(part)
        for data in self._events.feed(part):
            self._take(data)

    def add(self, event: Any) -> None:
        """Take in one event.

        Raises:
            APIResponseError: It is none of this endpoint's.
            RequestError: It says that the answer failed.
        """
        try:
            if self._pieces.add(event):
                arrived = time.perf_counter() - self._started
                self._times.append(arrived)
                if self._trace.ttft_s is None:
                    self._trace.ttft_s = arrived
        except wire.UNREADABLE:
            message = f"the server's stream holds no answer: {wire.excerpt(event)}"
            raise errors.APIResponseError(message, status=200) from None
        self._done = self._done or self._pieces.are_over

    def end(self) -> None:
        """Nothing more comes.

        Raises:
            APIConnectionError: The answer is not whole.
            APIResponseError: What came is none.
        """
        for data in self._events.end():
            self._take(data)
        if self._other and not self.is_whole:
            self.read_whole()
        if not self.is_whole:
            raise errors.APIConnectionError("the stream ended before the answer was whole")

    def read_whole(self) -> None:
        """Take what came for an answer in one piece, from a server that does not stream.

        Raises:
            APIResponseError: It is none.
        """
        came = b"".join(self._other)
        try:
            self._whole = dict(_event(came))
        except wire.UNREADABLE:
            raise errors.APIResponseError(
                f"the server's answer is no stream: {wire.excerpt(came)}", status=200
            ) from None
        self._done = True
        self.forget_times()

    def forget_times(self) -> None:
        """What came was no stream: its pieces came at no times of their own."""
        self._trace.chunk_times = ()
        self._trace.ttft_s = None

    def body(self) -> dict[str, Any]:
        """What the server would have sent in one piece."""
        if self._whole is not None:
            return self._whole
        try:
            return self._pieces.body()
        except wire.UNREADABLE:
            raise errors.APIResponseError("the server's stream holds no answer", status=200) from None

    def _take(self, data: bytes) -> None:
        self.has_events = True
        self._other.clear()
        if self._done:
            return
        if data.strip() == _DONE:
            self._done = True
            return
        try:
            self.add(_event(data))
        except errors.RequestError:
            if not self._pieces.are_whole:
                raise
            self._done = True  # what is broken now is not the answer


def _event(data: bytes) -> Any:
    try:
        return wire.parse_json(data)
    except ValueError as error:
        message = f"the server's stream is not JSON ({error}): {wire.excerpt(data)}"
        raise errors.APIResponseError(message, status=200) from None


class EventReader:
    """Cuts a stream of bytes into the data of its events.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html, without names, ids and reconnection. The
    last event counts even without the empty line after it.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # of a line that is not at its end
        self._data: list[bytes] = []  # lines of an event that is not at its end

    def feed(self, part: bytes) -> list[bytes]:
        """The data of the events that ``part`` completes."""
        if b"\n" not in part and b"\r" not in part:
            self._rest.append(part)
            return []
        if self._rest:
            part = b"".join((*self._rest, part))
            self._rest = []
        lines = part.splitlines()
        if not part.endswith(b"\n"):
            self._rest.append(lines.pop() + (b"\r" if part.endswith(b"\r") else b""))  # a line feed may follow it
        return self._events(lines)

    def end(self) -> list[bytes]:
        """The data of what is left."""
        rest, self._rest = b"".join(self._rest), []
        return self._events([*rest.splitlines(), b""])

    def _events(self, lines: list[bytes]) -> list[bytes]:
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data: "):
                self._data.append(line[6:])
            elif line.startswith(b"data:"):
                self._data.append(line[5:])
        return events


class _Pieces(Protocol):
    """What has come of an answer. ``add`` and ``body`` raise one of `wire.UNREADABLE` on what is of no known shape."""

    @property
    def have_begun(self) -> bool: ...
    @property
    def are_whole(self) -> bool: ...
    @property
    def are_over(self) -> bool: ...

    def add(self, event: Any) -> bool:
        """Take in one event; whether it held content."""
        ...

    def body(self) -> dict[str, Any]: ...


class _Chunks:
    """Of a chat or text completion: choices in pieces, told apart by their index."""

    are_over = False  # `[DONE]` says so

    def __init__(self, choices: Any) -> None:
        self._expected = max(1, choices) if isinstance(choices, int) else 1
        self._choices: dict[int, _Choice] = {}
        self._id: Any = None
        self._model: Any = None
        self._usage: Any = None

    @property
    def have_begun(self) -> bool:
        return bool(self._choices)

    @property
    def are_whole(self) -> bool:
        choices = self._choices
        return len(choices) >= self._expected and all(choice.finish_reason for choice in choices.values())

    def add(self, event: Any) -> bool:
        if error := event.get("error"):
            raise wire.error_from(None, {"error": error}, {})
        self._id = self._id or event.get("id")
        self._model = self._model or event.get("model")
        self._usage = event.get("usage") or self._usage
        has_content = False
        for entry in event.get("choices") or ():
            index = int(entry.get("index") or 0)
            choice = self._choices.get(index)
            if choice is None:
                if len(self._choices) >= max(self._expected, _MOST_PARTS):
                    raise ValueError("choices")
                choice = self._choices[index] = _Choice()
            has_content |= choice.add(entry)
        return has_content

    def body(self) -> dict[str, Any]:
        choices = [{"index": index, **choice.whole()} for index, choice in sorted(self._choices.items())]
        return {"id": self._id, "model": self._model, "choices": choices, "usage": self._usage}


class _Choice:
    """One choice in pieces."""

    def __init__(self) -> None:
        self.finish_reason: Any = None
        self._is_chat = False
        self._texts: dict[str, list[Any]] = {}
        self._calls: list[dict[str, Any]] = []
        self._message: dict[str, Any] = {}  # fields that are no pieces of text
        self._rest: dict[str, Any] = {}

    def add(self, entry: dict[str, Any]) -> bool:
        self.finish_reason = entry.get("finish_reason") or self.finish_reason
        has_content = False
        for name, value in entry.items():
            if value is None or name in _ENTRY_FIELDS:
                continue
            if name == "delta":
                self._is_chat = True
                has_content |= self._add_delta(value)
            elif name == "text":
                has_content |= self._add_text(name, value)
            else:
                _merge(self._rest, name, value)
        return has_content

    def whole(self) -> dict[str, Any]:
        texts = {name: "".join(map(wire.text_of, pieces)) for name, pieces in self._texts.items()}
        ending = {"finish_reason": self.finish_reason, **self._rest}
        if not self._is_chat:
            return {"text": "", **texts, **ending}
        message = {"role": "assistant", "content": None, **self._message, **texts}
        if self._calls:
            message["tool_calls"] = [_whole_call(call) for call in self._calls]
        return {"message": message, **ending}

    def _add_delta(self, delta: dict[str, Any]) -> bool:
        has_content = False
        for name, value in delta.items():
            if not value:
                continue
            if name in _TEXTS:
                has_content |= self._add_text(name, value)
            elif name == "tool_calls":
                for call in value:
                    self._add_call(call)
                has_content = True
            else:
                _merge(self._message, name, value)
        return has_content

    def _add_text(self, name: str, piece: Any) -> bool:
        if not piece:
            return False
        pieces = self._texts.get(name)
        if pieces is None:
            pieces = self._texts[name] = []
        pieces.append(piece)
        return True

    def _add_call(self, piece: dict[str, Any]) -> None:
        """Add a piece of a tool call to the call that it belongs to: by index, else by id, else the last one."""
        index, call_id = piece.get("index"), piece.get("id")
        if index is not None:
            call = next((call for call in self._calls if call["index"] == index), None)
        else:
            call = self._calls[-1] if self._calls and call_id in (None, "", self._calls[-1]["id"]) else None
        if call is None:
            if len(self._calls) >= _MOST_PARTS:
                raise ValueError("tool_calls")
            call = {"index": index, "id": None, "name": None, "arguments": []}
            self._calls.append(call)
        function = piece.get("function") or {}
        call["id"] = call["id"] or call_id
        call["name"] = call["name"] or function.get("name")  # some servers repeat it
        if arguments := function.get("arguments"):
            call["arguments"].append(arguments)


_ENTRY_FIELDS = frozenset({"index", "finish_reason"})
_TEXTS = frozenset({"content", "refusal", "reasoning_content", "reasoning"})


def _whole_call(call: dict[str, Any]) -> dict[str, Any]:
    pieces = call["arguments"]
    arguments = pieces[0] if len(pieces) == 1 else "".join(pieces)  # one piece may be the object itself
    return {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _merge(into: dict[str, Any], name: str, value: Any) -> None:
    """Add a field of which more may come: lists grow, objects are merged, anything else is replaced."""
    known = into.get(name)
    if isinstance(known, list) and isinstance(value, list):
        known.extend(value)
    elif isinstance(known, dict) and isinstance(value, dict):
        for key, entry in value.items():
            if entry is not None:
                _merge(known, key, entry)
    else:
        into[name] = value


class _Items:
    """Of the Responses interface: the last event holds the whole response."""

    def __init__(self) -> None:
        self.have_begun = False
        self._response: dict[str, Any] | None = None
        self._items: list[Any] = []

    @property
    def are_whole(self) -> bool:
        return self._response is not None

    are_over = are_whole

    def add(self, event: Any) -> bool:
        kind = event.get("type")
        self.have_begun = self.have_begun or kind == "response.created" or kind in _LAST
        if kind in _DELTAS:
            return bool(event.get("delta"))
        if kind in _LAST:
            self._response = dict(event["response"])
        elif kind == "response.output_item.done":
            self._items.append(event["item"])
        elif kind == "error" or event.get("error"):
            raise wire.error_from(None, {"error": event.get("error") or event}, {})
        return False

    def body(self) -> dict[str, Any]:
        if self._response is None:
            raise KeyError("response")
        if not self._response.get("output"):  # some servers do not repeat it
            self._response["output"] = self._items
        return self._response


_DELTAS = frozenset(
    {
        "response.output_text.delta",
        "response.refusal.delta",
        "response.reasoning_text.delta",
        "response.reasoning_summary_text.delta",
        "response.function_call_arguments.delta",
    }
)
_LAST = frozenset({"response.completed", "response.incomplete", "response.failed", "response.cancelled"})
