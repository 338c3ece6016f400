from __future__ import annotations

import os
from collections.abc import AsyncIterator
from hashlib import blake2b
from pathlib import Path

import pytest

from runner.digests import Digests, read_unchanged
from runner.errors import RequestTooLargeError, RowError
from runner.store import Store

LONG_AGO = 10**18


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with await Store.open(tmp_path / "run" / "results.sqlite") as store:
        yield store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "a.wav", "voice")


def written(path: Path, text: str, mtime_ns: int = LONG_AGO) -> Path:
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


async def digest_of(store: Store, path: Path, *, max_bytes: int | None = None) -> object:
    return (await Digests(store, max_bytes=max_bytes).of([str(path)]))[str(path)]


async def test_a_known_file_is_not_read_again(store: Store, path: Path) -> None:
    assert await digest_of(store, path) == digest("voice")

    written(path, "other")  # of the same size and time: a read would tell

    assert await digest_of(store, path) == digest("voice")


@pytest.mark.parametrize(("text", "mtime_ns"), [("other", LONG_AGO + 1), ("longer text", LONG_AGO)])
async def test_a_file_of_another_size_or_time_is_read_again(store: Store, path: Path, text: str, mtime_ns: int) -> None:
    await digest_of(store, path)
    written(path, text, mtime_ns)

    assert await digest_of(store, path) == digest(text)


async def test_a_file_that_was_just_written_is_not_taken_for_known(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "new.wav"
    path.write_text("first", encoding="utf-8")
    await digest_of(store, path)
    written(path, "later", path.stat().st_mtime_ns)

    assert await digest_of(store, path) == digest("later")


async def test_what_is_known_outlives_the_session(tmp_path: Path, path: Path) -> None:
    for _ in range(2):
        async with await Store.open(tmp_path / "results.sqlite") as store:
            assert await digest_of(store, path) == digest("voice")
            written(path, "other")


async def test_the_same_file_under_a_relative_path_is_the_same(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await digest_of(store, path)
    written(path, "other")
    monkeypatch.chdir(path.parent)

    assert await digest_of(store, Path("a.wav")) == digest("voice")


async def test_a_name_that_is_no_utf8_is_a_name(store: Store, tmp_path: Path) -> None:
    path = written(tmp_path / os.fsdecode(b"caf\xe9.wav"), "voice")

    assert await digest_of(store, path) == await digest_of(store, path) == digest("voice")


async def test_files_are_looked_up_however_many_there_are(store: Store, tmp_path: Path) -> None:
    paths = [str(written(tmp_path / f"{n}.wav", str(n))) for n in range(2_100)]
    found = await Digests(store, max_bytes=None).of(paths)

    assert found == {path: digest(str(n)) for n, path in enumerate(paths)}
    assert len(await store.files(paths)) == 2_100


async def test_what_cannot_be_read_says_why(store: Store, tmp_path: Path, path: Path) -> None:
    missing = await digest_of(store, tmp_path / "none.wav")
    folder = await digest_of(store, tmp_path)
    nul = await digest_of(store, Path("a\0b"))
    large = await digest_of(store, path, max_bytes=4)

    assert isinstance(missing, RowError)
    assert str(missing) == f"{tmp_path / 'none.wav'} cannot be read: No such file or directory"
    assert isinstance(folder, RowError)
    assert str(folder) == f"{tmp_path} is no file"
    assert isinstance(nul, RowError)
    assert isinstance(large, RequestTooLargeError)
    assert "has 5 bytes, and at most 4 are sent" in str(large)


async def test_a_file_is_read_only_as_what_it_was_known_to_be(path: Path) -> None:
    assert await read_unchanged(str(path), digest("voice")) == b"voice"

    with pytest.raises(RowError, match="was changed while the run was going on"):
        await read_unchanged(str(path), digest("other"))
    path.unlink()
    with pytest.raises(RowError, match="cannot be read: No such file"):
        await read_unchanged(str(path), digest("voice"))
