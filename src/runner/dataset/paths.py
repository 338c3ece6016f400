"""The files that datasets are read from: found, or missed with the nearest name beside the error."""

from __future__ import annotations

import codecs
import difflib
import os
import stat

from runner.config import DatasetConfig
from runner.errors import ConfigError, DatasetError


def find_text(config: DatasetConfig) -> tuple[str, str]:
    """As `find_file`, for a format that is text: what is plainly something else is refused."""
    path, shown = find_file(config)
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise DatasetError(f"{shown} {what}")
    return path, shown


def find_file(config: DatasetConfig) -> tuple[str, str]:
    """The path to open, and the path as the user wrote it.

    Raises:
        ConfigError: No path is set.
        DatasetError: There is no such file, or it can be read only once.
    """
    path = expanded(config, example=f"rows.{config.kind.value}")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no path at all, it holds a NUL
        raise DatasetError(f"dataset.path={config.path}: there is no such file.{suggestion(path)}") from None
    if stat.S_ISDIR(mode):
        raise DatasetError(
            f"dataset.path={config.path} is a folder: name one file in it{_example(path, config.kind.value)}"
        )
    if not stat.S_ISREG(mode):
        raise DatasetError(f"dataset.path={config.path} is no regular file: a dataset is read more than once")
    return path, str(config.path)


def expanded(config: DatasetConfig, *, example: str) -> str:
    """``dataset.path`` with the user's home in it.

    Raises:
        ConfigError: It is not set; ``example`` shows what to write.
    """
    if not config.path:
        raise ConfigError(
            f"dataset.path is not set: dataset={config.kind.value} reads files, for example dataset.path={example}"
        )
    return os.path.expanduser(config.path)


def suggestion(path: str) -> str:
    """The nearest names beside a path that does not exist, as the rest of a message."""
    folder, name = os.path.split(path)
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or os.curdir), n=3)
    except (OSError, ValueError):
        return f" There is no folder {folder!r} either" if not os.path.lexists(folder) else ""
    return f" Did you mean {' or '.join(repr(os.path.join(folder, each)) for each in near)}?" if near else ""


def _example(folder: str, kind: str) -> str:
    """The first file of a folder, one of this kind if there is one, as the rest of a message."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name[0] != "."]
    except OSError:
        return ""
    names.sort(key=lambda name: (not name.endswith(f".{kind}"), name))
    return f", for example dataset.path={os.path.join(folder, names[0])}" if names else ""


_FOREIGN = {
    codecs.BOM_UTF16_LE: "is UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16: save it as UTF-8",
    b"\x1f\x8b": "is compressed: unpack it first",
    b"PK\x03\x04": "is a ZIP archive or an Excel workbook: unpack it, or save it as CSV",
    b"PAR1\x15": "is Parquet, not text: dataset=parquet reads it",
}
"""How files begin that are taken for text by mistake."""
