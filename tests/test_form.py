from __future__ import annotations

import email
import email.policy
from email.message import EmailMessage

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.transports.form import encode_form, form_fields, media_type


def parsed(content_type: str, body: bytes) -> list[EmailMessage]:
    """The parts, as the standard library reads them."""
    message = email.message_from_bytes(
        b"content-type: " + content_type.encode() + b"\r\n\r\n" + body, policy=email.policy.HTTP
    )
    assert isinstance(message, EmailMessage)
    return [part for part in message.iter_parts() if isinstance(part, EmailMessage)]


@given(content=st.binary(max_size=200))
def test_a_form_holds_its_fields_and_its_file(content: bytes) -> None:
    language, file = parsed(*encode_form([("language", "de")], filename="talk.mp3", content=content))
    assert language.get_payload(decode=True) == b"de"
    assert file.get_filename() == "talk.mp3"
    assert file.get_content_type() == "audio/mpeg"


def test_a_file_goes_into_a_form_byte_by_byte() -> None:
    content = bytes(range(256)) + b"\r\n--\r\n\r\n"
    content_type, body = encode_form([], filename="a.wav", content=content)
    boundary = content_type.partition("boundary=")[2].encode()
    assert body.partition(b"\r\n\r\n")[2] == content + b"\r\n--" + boundary + b"--\r\n"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ('a "b".wav', 'filename="a %22b%22.wav"'),
        ("a\r\nx-evil: 1.wav", 'filename="a%0D%0Ax-evil: 1.wav"'),
        ("gespräch.wav", 'filename="gespräch.wav"'),
    ],
)
def test_a_name_cannot_leave_its_quotes(name: str, written: str) -> None:
    _, body = encode_form([], filename=name, content=b"")
    assert written in body.decode()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.WAV", "audio/wav"),
        ("dir.mp3/a.flac", "audio/flac"),
        ("a.m4a", "audio/mp4"),
        ("a", "application/octet-stream"),
        ("a.xyz", "application/octet-stream"),
        (".wav", "application/octet-stream"),
    ],
)
def test_the_ending_of_the_name_says_what_the_file_is(name: str, kind: str) -> None:
    assert media_type(name) == kind


def test_nested_parameters_are_written_as_openais_sdk_does() -> None:
    params = {
        "temperature": 0.5,
        "words": ["a", "b"],
        "chunking": {"type": "server_vad", "deep": {"x": 1}},
        "flag": True,
        "nothing": None,
    }
    assert list(form_fields(params)) == [
        ("temperature", "0.5"),
        ("words[]", "a"),
        ("words[]", "b"),
        ("chunking[type]", "server_vad"),
        ("chunking[deep][x]", "1"),
        ("flag", "true"),
    ]


def test_what_has_no_form_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="prompt is object"):
        list(form_fields({"prompt": object()}))
