"""Images and audio: what goes into a request beside text."""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from runner.errors import ConfigError, RequestTooLargeError, RowError

MAX_TRANSCRIPTION_BYTES = 25 * 2**20
"""The largest audio that OpenAI takes; see https://platform.openai.com/docs/guides/speech-to-text."""

TranscriptionInput: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO
"""The path of an audio file, its content, or the file opened for reading in binary."""


def image_block(
    source: str | os.PathLike[str] | bytes,
    *,
    detail: Literal["auto", "low", "high"] | None = None,
    mime_type: str | None = None,
) -> dict[str, Any]:
    """An image as a content block of a chat message.

    Args:
        source: A URL as a string (``https://…``, ``http://…``, ``data:…``), which is passed on for the provider to
            fetch; a `pathlib.Path`, whose file is put into the message; or the image itself as bytes. A string is
            never taken for a path, so that a text from a dataset cannot name a file of yours.
        detail: How closely the model looks, and what it costs; None: the provider's default.
        mime_type: ``image/png`` and the like. Needed for bytes; None: by a path's suffix.

    Returns:
        ``{"type": "image_url", "image_url": {"url": …, "detail": …}}``

    Raises:
        ConfigError: The source is none of these, cannot be read, or its type is unknown.
    """
    image = {"url": _url_of(source, mime_type)}
    if detail is not None:
        image["detail"] = detail
    return {"type": "image_url", "image_url": image}


async def read_audio(source: TranscriptionInput, *, max_bytes: int | None) -> tuple[bytes, str]:
    """The audio in ``source`` and its file name, read in a thread. What is too large is not read.

    Args:
        source: A path, bytes, or an open file, which is read from where it stands and not closed.
        max_bytes: The largest audio to read. None: any.

    Raises:
        RequestTooLargeError: It has more than ``max_bytes``.
        RowError: It is no audio that can be read; names the file.
    """
    if isinstance(source, bytes):
        _require_size(len(source), max_bytes, "the audio")
        return source, "audio.wav"
    try:
        if isinstance(source, str | os.PathLike):
            return await asyncio.to_thread(_read_path, Path(source), max_bytes)
        if hasattr(source, "read"):
            return await asyncio.to_thread(_read_file, source, max_bytes)
    except OSError as error:
        raise RowError(f"the audio cannot be read: {error.filename or source}: {error.strerror or error}") from None
    except ValueError as error:  # a closed file, a path with a null character
        raise RowError(f"the audio cannot be read: {source}: {error}") from None
    raise RowError(f"audio of type {type(source).__name__}: give a path, bytes, or a file opened in binary")


def _url_of(source: str | os.PathLike[str] | bytes, mime_type: str | None) -> str:
    if isinstance(source, str):
        if source.startswith(("https://", "http://", "data:")):
            return source
        raise ConfigError(
            f"image_block: {source[:100]!r} is no URL; for a local file, pass a Path: image_block(Path(…))"
        )
    if isinstance(source, bytes):
        if mime_type is None:
            raise ConfigError("image_block: bytes need their type, for example mime_type='image/jpeg'")
        return _data_url(source, mime_type)
    if not isinstance(source, os.PathLike):
        raise ConfigError(f"image_block: an image of type {type(source).__name__}: give a URL, a Path, or bytes")
    path = Path(source)
    kind = mime_type or mimetypes.guess_type(path.name)[0]
    if kind is None:
        raise ConfigError(f"image_block: the suffix of {path} names no type: give one, as mime_type='image/jpeg'")
    try:
        return _data_url(path.read_bytes(), kind)
    except OSError as error:
        raise ConfigError(f"image_block: {path} cannot be read: {error.strerror}") from None


def _data_url(content: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(content).decode('ascii')}"


def _read_path(path: Path, max_bytes: int | None) -> tuple[bytes, str]:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise RowError(f"the audio cannot be read: {path} is no file")
    _require_size(status.st_size, max_bytes, path)
    with path.open("rb") as file:
        return _read_at_most(file, max_bytes, path), path.name


def _read_file(file: BinaryIO, max_bytes: int | None) -> tuple[bytes, str]:
    name = getattr(file, "name", None)  # a number where the file was opened by its descriptor
    name = os.path.basename(name) if isinstance(name, str) else ""
    return _read_at_most(file, max_bytes, name or "the audio"), name or "audio.wav"


def _read_at_most(file: BinaryIO, max_bytes: int | None, what: str | Path) -> bytes:
    content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if not isinstance(content, bytes):
        raise RowError(f"the audio cannot be read: {what} is not opened in binary: use open(…, 'rb')")
    _require_size(len(content), max_bytes, what)
    return content


def _require_size(size: int, max_bytes: int | None, what: str | Path) -> None:
    if max_bytes is not None and size > max_bytes:
        raise RequestTooLargeError(
            f"{what} has more than {max_bytes:,} bytes: cut it, or, where the server takes more, raise"
            " max_transcription_bytes"
        )
