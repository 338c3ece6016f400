"""Forms with a file in them, as ``multipart/form-data`` (RFC 7578)."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

_MEDIA_TYPES = {
    "aac": "audio/aac",
    "flac": "audio/flac",
    "m4a": "audio/mp4",
    "mp3": "audio/mpeg",
    "mp4": "audio/mp4",
    "mpeg": "audio/mpeg",
    "mpga": "audio/mpeg",
    "oga": "audio/ogg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "wav": "audio/wav",
    "webm": "audio/webm",
}


def encode_form(fields: Iterable[tuple[str, str]], *, filename: str, content: bytes) -> tuple[str, bytes]:
    """The content type and the body of a form with ``fields`` and one ``file``."""
    boundary = secrets.token_hex(16)
    parts: list[bytes] = []
    for name, value in fields:
        parts.append(f'--{boundary}\r\ncontent-disposition: form-data; name="{_quoted(name)}"\r\n\r\n'.encode())
        parts += [value.encode("utf-8", "replace"), b"\r\n"]
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{_quoted(filename)}"\r\n'
    parts.append(f"{head}content-type: {media_type(filename)}\r\n\r\n".encode("utf-8", "replace"))
    parts += [content, f"\r\n--{boundary}--\r\n".encode()]
    return f"multipart/form-data; boundary={boundary}", b"".join(parts)


def media_type(filename: str) -> str:
    """The media type of an audio file, by the ending of its name."""
    return _MEDIA_TYPES.get(PurePath(filename).suffix[1:].lower(), "application/octet-stream")


def form_fields(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters as a form's fields, nested ones as OpenAI's SDK writes them: ``a[b]``, and ``a[]`` for each in a list.

    Raises:
        TypeError: A value has no such form.
    """
    for name, value in params.items():
        yield from _fields(name, value)


def _fields(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if value is None:
        return
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _fields(f"{name}[{key}]", entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _fields(f"{name}[]", entry)
    elif isinstance(value, bool):
        yield name, str(value).lower()
    elif isinstance(value, str | int | float):
        yield name, str(value)
    else:
        raise TypeError(f"{name} is {type(value).__name__}")


def _quoted(text: str) -> str:
    """For the inside of a quoted parameter, as browsers write it."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
