from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import pytest

from runner import image_block
from runner.errors import ConfigError, RequestTooLargeError, RowError
from runner.media import read_audio

PIXEL = base64.b64decode("R0lGODlhAQABAAAAACwAAAAAAQABAAA=")
DATA = base64.b64encode(PIXEL).decode()


@pytest.mark.parametrize("url", ["https://example.com/cat.jpg", "http://localhost/cat", "data:image/gif;base64,R0lG"])
def test_a_url_is_passed_on(url: str) -> None:
    assert image_block(url) == {"type": "image_url", "image_url": {"url": url}}


def test_a_file_is_put_into_the_message(tmp_path: Path) -> None:
    path = tmp_path / "pixel.gif"
    path.write_bytes(PIXEL)

    assert image_block(path) == {"type": "image_url", "image_url": {"url": f"data:image/gif;base64,{DATA}"}}
    assert image_block(path, mime_type="image/x-mine")["image_url"]["url"].startswith("data:image/x-mine;base64,")


def test_bytes_are_put_into_the_message_with_their_type_and_detail() -> None:
    block = image_block(PIXEL, mime_type="image/gif", detail="low")

    assert block == {"type": "image_url", "image_url": {"url": f"data:image/gif;base64,{DATA}", "detail": "low"}}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("photo.jpg", "is no URL"),
        ("file:///etc/passwd", "is no URL"),
        (PIXEL, "bytes need their type"),
        (Path("missing.png"), r"missing\.png cannot be read: No such file"),
        (Path("photo.unknown"), "names no type"),
        (7, "of type int"),
    ],
)
def test_what_is_no_image_is_named(source: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        image_block(source)


async def test_audio_is_read_from_a_path_from_bytes_and_from_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "talk.mp3"
    path.write_bytes(b"sound")

    assert await read_audio(path, max_bytes=5) == (b"sound", "talk.mp3")
    assert await read_audio(str(path), max_bytes=None) == (b"sound", "talk.mp3")
    assert await read_audio(b"sound", max_bytes=5) == (b"sound", "audio.wav")
    assert await read_audio(io.BytesIO(b"sound"), max_bytes=5) == (b"sound", "audio.wav")
    with path.open("rb") as file:
        assert await read_audio(file, max_bytes=5) == (b"sound", "talk.mp3")
        assert not file.closed
    with os.fdopen(os.open(path, os.O_RDONLY), "rb") as file:
        assert await read_audio(file, max_bytes=None) == (b"sound", "audio.wav")


class Endless(io.RawIOBase):
    """A file without an end, which says how much was read of it."""

    asked = 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        self.asked += size
        return b"x" * size


async def test_audio_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        file.truncate(2**40)
    endless = Endless()

    for source in (path, b"123456", endless):
        with pytest.raises(RequestTooLargeError, match="more than 5 bytes"):
            await read_audio(source, max_bytes=5)  # type: ignore[arg-type]
    assert endless.asked == 6


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.wav", r"missing\.wav: No such file"),
        (".", "is no file"),
        ("/dev/zero", "is no file"),
        ("a\0b", "null"),
        (io.StringIO("text"), "not opened in binary"),
        (7, "of type int"),
        (None, "of type NoneType"),
    ],
)
async def test_what_is_no_audio_is_named(source: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        await read_audio(source, max_bytes=100)


async def test_a_closed_file_is_named() -> None:
    file = io.BytesIO(b"sound")
    file.close()

    with pytest.raises(RowError, match="closed file"):
        await read_audio(file, max_bytes=100)
