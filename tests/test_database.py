"""The database file: who may read it, older versions of it, and the messages of what can go wrong."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from harness import save, version_1
from runner.database import SCHEMA_VERSION
from runner.errors import StoreError
from runner.store import Claim, Outcome, Store, Terms


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "results.sqlite"


async def test_what_holds_answers_can_be_read_by_its_owner_only(path: Path) -> None:
    async with await Store.open(path) as store:
        await store.put_meta({"a": "b"})
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.glob("results.sqlite*")}
    assert modes == {"results.sqlite": 0o600, "results.sqlite-wal": 0o600, "results.sqlite-shm": 0o600}


# Older versions


async def test_a_store_of_the_first_version_is_migrated_with_all_that_is_in_it(path: Path) -> None:
    version_1(path)
    async with await Store.open(path) as store:
        known = await store.claim(
            [Claim(position=n, content=bytes([n % 4]), metadata=f'{{"n":{n}}}') for n in range(5)],
            Terms(retry_failed=False),
        )
        assert [each.answered for each in known] == [True, True, True, False, True]
        assert await store.meta() == {"samples": "1", "scorers": "x"}
        rows = [tuple(row) async for row in store.query("SELECT scores FROM rows ORDER BY position")]
        lost = [tuple(row) async for row in store.query("SELECT content, started_at FROM attempts ORDER BY id")]
        assert rows == [('{"exact":1}',), (None,), (None,), (None,), (None,)]
        texts = "SELECT output_text FROM rows LEFT JOIN answers USING (ticket) ORDER BY position"
        assert [text async for (text,) in store.query(texts)] == ["zero", "one", None, None, "more"]
        assert lost == [(b"\x02", None), (b"\x03", 210.0)]  # what was in flight at the kill is entered after migrating
        await save(store, 3, Outcome(ticket=0, content=b"\x03", settled_at=1.0, embedding=b"v", cost_bound_usd=1.0))
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


async def test_a_migrated_store_has_the_tables_of_a_new_one(path: Path, tmp_path: Path) -> None:
    version_1(path)
    new = tmp_path / "new" / "results.sqlite"
    for each in (path, new):
        async with await Store.open(each):
            pass
    assert layout(path) == layout(new)


def layout(path: Path) -> dict[str, set[tuple[str, str]]]:
    """Columns with their types, by table; the columns of indexes by index."""
    with closing(sqlite3.connect(path)) as database:
        names = database.execute("SELECT type, name FROM sqlite_master").fetchall()
        return {
            name: {tuple(row[1:3]) for row in database.execute(f"PRAGMA {kind}_info({name})")} for kind, name in names
        }


async def test_an_older_store_is_not_migrated_by_a_reader(path: Path) -> None:
    version_1(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"schema version 1, this program reads version 4: the command that made it"):
        await Store.open_readonly(path)
    assert path.read_bytes() == before


async def test_a_migration_that_fails_leaves_the_older_version(path: Path) -> None:
    version_1(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE attempts")
    before = dump(path)
    with pytest.raises(StoreError, match=str(path)):
        await Store.open(path)
    assert dump(path) == before


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return [*database.iterdump(), str(database.execute("PRAGMA user_version").fetchone())]
