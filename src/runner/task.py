"""Tasks: what is asked of the model for a row, and what the requests for it look like."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from runner.config import DatasetKind, RunnerConfig, TaskKind, asked_kind
from runner.dataset import Row, media_folder
from runner.digests import read_unchanged
from runner.embedding import embed
from runner.errors import ConfigError, ItemError, RequestTooLargeError, RowError
from runner.prompt import Ask, PromptBuilder
from runner.response_format import ResponseFormat
from runner.types import (
    ChatMessage,
    EmbeddingRequest,
    Embeddings,
    Endpoint,
    GenerationRequest,
    Request,
    Response,
    Trace,
    TranscriptionRequest,
)


class Item(NamedTuple):
    """One thing to ask: a row, or one of its repeats."""

    position: int  # dataset index × samples + sample
    fields: Mapping[str, Any]  # the row's
    content: bytes  # identity of what is asked
    metadata: str  # JSON
    input: Any  # of the task's own form; None: there is an error
    files: tuple[str, ...] = ()  # paths of what is sent with it
    digests: tuple[bytes, ...] = ()  # of these files
    error: ItemError | None = None  # why it cannot be asked


class Settled(NamedTuple):
    """What came of one request."""

    places: Sequence[int]  # of its items, in their group
    trace: Trace
    result: Sequence[Response] | ItemError  # a response for each of them, or the failure of all


class Line(Protocol):
    """A group's way to the provider, where the books are kept."""

    def trace(self, places: Sequence[int]) -> Trace:
        """A fresh trace for a request that asks for the items at these places of the group."""
        ...

    async def send(self, request: Request) -> Response:
        """As `Client.send`."""
        ...

    async def settle(self, settled: Settled) -> None:
        """Take what came of a request before the next one is sent."""
        ...

    async def note_split(self, places: Sequence[int], trace: Trace, error: ItemError) -> None:
        """The request for these items failed, and they will be asked for in smaller ones."""
        ...


class Asking(Protocol):
    """How items are asked for."""

    group_size: int
    """How many items may share a request."""

    async def ask_for(self, items: Sequence[Item], line: Line) -> None:
        """Ask for the items of one group, and settle each request on their line."""
        ...


class Task(Asking, Protocol):
    """What is asked for rows. Making one checks that the configuration fits it."""

    def check(self, rows: Sequence[Row]) -> None:
        """Raise a `ConfigError` if the first rows show that this cannot work."""
        ...

    def ask(self, row: Row) -> Ask:
        """What to ask for ``row``. Raises a `RowError` where that cannot be said."""
        ...


def task_of(config: RunnerConfig, response_format: ResponseFormat | None) -> Task:
    """The task that ``config`` describes.

    Raises:
        ConfigError: Its templates or its mapper cannot be used.
    """
    match asked_kind(config):
        case TaskKind.embed:
            return Embed(config)
        case TaskKind.transcribe:
            return Transcribe(config)
    return Generate(config, response_format)


def suffixes_of(config: RunnerConfig) -> Sequence[str] | None:
    """Of ``dataset=files``, the suffixes of the files that the task can send. None: any, or it is another dataset."""
    if config.dataset.kind is not DatasetKind.files or config.mapper is not None:
        return None
    if asked_kind(config) is TaskKind.transcribe:
        return _AUDIO
    return tuple(_IMAGES) if config.task.image == "path" else None


class Generate:
    """Text in, text out; with ``task.image``, the images that a field of the row names go with it."""

    group_size = 1

    def __init__(self, config: RunnerConfig, response_format: ResponseFormat | None) -> None:
        self._endpoint = config.endpoint
        self._params = _params(config)
        if response_format is not None:
            self._params["response_format"] = response_format.schema_param
        self._build = PromptBuilder(
            prompt=config.prompt, system=config.system, mapper=config.mapper, interface=config.endpoint
        )
        self._images = Images(config) if config.task.image else None

    def check(self, rows: Sequence[Row]) -> None:
        self._build.check(rows)
        if self._images is not None:
            self._images.check(rows)

    def ask(self, row: Row) -> Ask:
        ask = self._build(row)
        return ask if self._images is None else self._images.add(row, ask)

    async def ask_for(self, items: Sequence[Item], line: Line) -> None:
        await _ask_alone(items, line, self._request)

    async def _request(self, item: Item, trace: Trace) -> GenerationRequest:
        asked = item.input if self._images is None else await self._images.sent(item)
        return GenerationRequest(input=asked, endpoint=self._endpoint, params=self._params, trace=trace)


class Images:
    """The images of a row: what its field ``task.image`` holds, one or a list.

    Each is a path to a file (relative to the dataset's file), a URL, or a dictionary with ``bytes`` in base64 as
    Parquet files and Hugging Face's datasets have it.
    """

    def __init__(self, config: RunnerConfig) -> None:
        self._field = str(config.task.image)
        self._folder = media_folder(config.dataset)
        self._in_responses = config.endpoint is Endpoint.responses

    def check(self, rows: Sequence[Row]) -> None:
        readable = [row for row in rows if row.error is None]
        if readable and not any(self._field in row.fields for row in readable):
            fields = ", ".join(dict.fromkeys(name for row in readable for name in row.fields))
            raise ConfigError(f"task.image={self._field!r}: the first rows have no such field. The fields: {fields}")

    def add(self, row: Row, ask: Ask) -> Ask:
        """``ask`` with the row's images in it, those that are files by their place among ``files``."""
        value = row.fields.get(self._field)
        if value is None:
            raise RowError(f"{row.source}: no image: the field {self._field!r} is null or missing")
        urls: list[str | None] = []
        files: list[str] = []
        for image in value if isinstance(value, list) else [value]:
            match image:
                case str() if image.startswith(("https://", "http://", "data:image/")):
                    urls.append(image)
                case str() if os.path.splitext(image)[1].lower() in _IMAGES:
                    urls.append(None)
                    files.append(os.path.join(self._folder, os.path.expanduser(image)))
                case {"bytes": str(content)}:
                    urls.append(f"data:{_image_type(content)};base64,{content}")
                case _:
                    raise RowError(
                        f"{row.source}: {self._field}: {_shown(image)} is no image: a URL, or a file"
                        f" ({', '.join(_IMAGES)})"
                    )
        metadata = ask.metadata
        if any(url is not None and url.startswith("data:") for url in urls):  # not once more in the results
            metadata = {name: each for name, each in metadata.items() if name != self._field}
        return ask._replace(input={"asked": ask.input, "images": urls}, metadata=metadata, files=tuple(files))

    async def sent(self, item: Item) -> Any:
        """The input of the request for ``item``, its files read."""
        contents = [await self._data_url(path, digest) for path, digest in zip(item.files, item.digests, strict=True)]
        files = iter(contents)
        blocks = [self._block(next(files) if url is None else url) for url in item.input["images"]]
        asked = item.input["asked"]
        if isinstance(asked, dict):
            return {**asked, "input": self._illustrated(asked["input"], blocks)}
        return self._illustrated(asked, blocks)

    async def _data_url(self, path: str, digest: bytes) -> str:
        content = await read_unchanged(path, digest)
        encoded = await asyncio.to_thread(base64.b64encode, content)
        return f"data:{_IMAGES[os.path.splitext(path)[1].lower()]};base64,{encoded.decode()}"

    def _illustrated(self, asked: str | list[ChatMessage], blocks: list[dict[str, Any]]) -> list[ChatMessage]:
        """The conversation with the images at the end of the user's last message."""
        messages: list[ChatMessage] = list(asked) if isinstance(asked, list) else [{"role": "user", "content": asked}]
        place = next((at for at in reversed(range(len(messages))) if messages[at].get("role") == "user"), None)
        if place is None:
            return [*messages, {"role": "user", "content": blocks}]
        content = messages[place].get("content")
        if not isinstance(content, list):
            content = [{"type": "input_text" if self._in_responses else "text", "text": content or ""}]
        messages[place] = {**messages[place], "content": [*content, *blocks]}
        return messages

    def _block(self, url: str) -> dict[str, Any]:
        if self._in_responses:
            return {"type": "input_image", "image_url": url}
        return {"type": "image_url", "image_url": {"url": url}}


class Embed:
    """Text in, its vector out; ``task.micro_batch_size`` texts share a request, and a bad one fails alone."""

    def __init__(self, config: RunnerConfig) -> None:
        self.group_size = config.task.micro_batch_size
        self._params = _params(config)
        self._build = PromptBuilder(prompt=config.prompt, system=None, mapper=config.mapper, interface=TaskKind.embed)

    def check(self, rows: Sequence[Row]) -> None:
        self._build.check(rows)

    def ask(self, row: Row) -> Ask:
        return self._build(row)

    async def ask_for(self, items: Sequence[Item], line: Line) -> None:
        texts = [item.input for item in items]

        def make_request(places: range) -> EmbeddingRequest:
            asked = texts[places.start : places.stop]
            return EmbeddingRequest(texts=asked, params=self._params, trace=line.trace(places))

        async for outcomes in embed(line.send, texts, make_request, on_split=line.note_split):
            places, first = [outcome.place for outcome in outcomes], outcomes[0]
            responses = [
                Response(
                    output=Embeddings(vectors=(outcome.embedding,)),
                    model_id=outcome.model_id,
                    request_id=outcome.request_id,
                    usage=outcome.usage,
                    headers={},
                )
                for outcome in outcomes
                if outcome.embedding is not None
            ]
            await line.settle(Settled(places=places, trace=first.trace, result=first.error or responses))


class Transcribe:
    """Audio in, text out.

    A row's ``audio`` or ``path`` leads to a file (relative to the dataset's file), which is read when its turn comes;
    ``audio`` may also be a dictionary with ``bytes`` in base64 and a ``path`` that names them, as Parquet files and
    Hugging Face's datasets have it. ``prompt`` is what the provider takes under that name: words that may be heard.
    """

    group_size = 1

    def __init__(self, config: RunnerConfig) -> None:
        self._params = _params(config)
        self._folder = media_folder(config.dataset)
        self._max_bytes = config.task.max_bytes
        self._build = PromptBuilder(prompt=None, system=None, mapper=config.mapper, interface=TaskKind.transcribe)
        self._hint = None
        if config.prompt is not None:
            self._hint = PromptBuilder(prompt=config.prompt, system=None, mapper=None, interface=TaskKind.embed)

    def check(self, rows: Sequence[Row]) -> None:
        self._build.check(rows)
        if self._hint is not None:
            self._hint.check(rows)

    def ask(self, row: Row) -> Ask:
        ask = self._build(row)
        asked = {} if self._hint is None else {"prompt": self._hint(row).input}
        if isinstance(ask.input, dict):
            return ask._replace(input=asked | self._audio_in(row, ask.input))
        suffix = os.path.splitext(ask.input)[1].lower()
        if suffix not in _AUDIO:
            raise RowError(f"{row.source}: {_shown(ask.input)} is no audio file: {', '.join(_AUDIO)}")
        return ask._replace(input=asked, files=(os.path.join(self._folder, os.path.expanduser(ask.input)),))

    async def ask_for(self, items: Sequence[Item], line: Line) -> None:
        await _ask_alone(items, line, self._request)

    async def _request(self, item: Item, trace: Trace) -> TranscriptionRequest:
        params = self._params
        if "prompt" in item.input:
            params = {**params, "prompt": item.input["prompt"]}
        if item.files:
            [path], [digest] = item.files, item.digests
            audio, name = await read_unchanged(path, digest), os.path.basename(path)
        else:
            audio, name = await self._decoded(item), item.input["name"]
        return TranscriptionRequest(audio=audio, filename=name, params=params, trace=trace)

    async def _decoded(self, item: Item) -> bytes:
        try:
            return await asyncio.to_thread(base64.b64decode, item.input["audio"], validate=True)
        except binascii.Error as error:
            raise RowError(f"the bytes of audio are not in base64: {error}") from None

    def _audio_in(self, row: Row, given: Mapping[str, Any]) -> dict[str, str]:
        content = given["bytes"]
        if self._max_bytes is not None and len(content) * 3 // 4 > self._max_bytes + 2:
            raise RequestTooLargeError(
                f"{row.source}: the audio has more than {self._max_bytes:,} bytes: cut it, or raise task.max_bytes"
                " where the server takes more"
            )
        return {"audio": content, "name": os.path.basename(str(given.get("path") or "audio.wav"))}


_IMAGES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
"""The images that models take, and their media types. Nothing else leaves this machine as one."""

_AUDIO = (".flac", ".m4a", ".mp3", ".mp4", ".mpeg", ".mpga", ".oga", ".ogg", ".opus", ".wav", ".webm")
"""The audio files that models take. Nothing else leaves this machine as one."""


async def _ask_alone(
    items: Sequence[Item], line: Line, make_request: Callable[[Item, Trace], Awaitable[Request]]
) -> None:
    """Ask for one item in a request of its own."""
    [item] = items
    trace = line.trace((0,))
    result: Sequence[Response] | ItemError
    try:
        result = (await line.send(await make_request(item, trace)),)
    except ItemError as error:
        result = error
    await line.settle(Settled(places=(0,), trace=trace, result=result))


def _params(config: RunnerConfig) -> dict[str, Any]:
    return {key: value for key, value in config.request.items() if key != "timeout"}


def _image_type(content: str) -> str:
    """The media type of an image in base64, by its first bytes."""
    starts = {"iVBOR": ".png", "/9j/": ".jpg", "R0lG": ".gif", "UklG": ".webp"}
    return next((_IMAGES[suffix] for start, suffix in starts.items() if content.startswith(start)), "image/png")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else type(value).__name__
    return repr(text if len(text) <= 80 else f"{text[:80]}…")
