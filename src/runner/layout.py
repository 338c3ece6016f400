"""Layout: how a table fits the columns of a terminal without a break within a word or a number.

Widths are those of a terminal, where some letters take two columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_WHOLE = (20, 10)
"""Up to how many columns a cell is kept in one piece: rather the first, if need be the second."""

_REMARK = 24
"""Columns that remarks want, to stand beside what they are about."""

_LOOKED_AT = 20
"""Lines that choose which columns are made narrow."""

_NAMED = 3
"""Names that stand before a remark they share."""

_TOGETHER = re.compile(
    r"""
    (?<=\d)\ (?=(?:ms|s|pp|%)(?![^\W_]))  # a figure and its unit
    | (?<=[^\W\d_])\ (?=\$?\d)  # a figure and what it is of
    | (?<=\d,)\ (?=[^\s\[\]]{1,8}\])  # the two ends of a short interval
    """,
    re.VERBOSE,
)
"""Spaces that no line is broken at."""

_LABEL = re.compile(r" *\S+ {2,}(?=\S)")
"""What a line of text may begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A table as it fits."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    widths: Sequence[int] | None  # of the columns; None: no table fits, and each line is a block
    remarks: Sequence[str] = ()  # what stands below the table
    left_out: Sequence[str] = ()  # columns there was no room for


def laid_out(
    header: Sequence[str], lines: Sequence[Sequence[str]], width: int, *, optional: Sequence[str] = ()
) -> Layout:
    """The table of these cells on a terminal that is ``width`` columns wide, borders included.

    Cells are wrapped at spaces. Where that is not enough, remarks (a last column without a name) go below the table,
    then ``optional`` columns are left out, the first one first, and at last each line is a block of its own.
    """
    plain, remarks = (header, lines), []
    if header[-1] == "" and len(header) > 1:
        wanted = min(_REMARK, max((columns_of(line[-1]) for line in lines), default=0))
        if widths := column_widths(header, lines, width, last=wanted):
            return Layout(header=header, lines=lines, widths=widths)
        plain, remarks = (header[:-1], [line[:-1] for line in lines]), list(remarks_of(lines))
    for count in range(len(optional) + 1):
        kept = [place for place, name in enumerate(plain[0]) if name not in optional[:count]]
        some = [plain[0][place] for place in kept], [[line[place] for place in kept] for line in plain[1]]
        if widths := column_widths(*some, width):
            left_out = [name for name in plain[0] if name in optional[:count]]
            return Layout(header=some[0], lines=some[1], widths=widths, remarks=remarks, left_out=left_out)
    return Layout(header=plain[0], lines=plain[1], widths=None, remarks=remarks)


def column_widths(
    header: Sequence[str], lines: Sequence[Sequence[str]], width: int, *, last: int = 0
) -> list[int] | None:
    """How wide the columns of a table may be that has ``width`` with its borders; None: it does not fit.

    Args:
        last: What the last column has at least.
    """
    room = width - 3 * len(header) - 1
    columns = list(zip(header, *lines, strict=True))
    natural = [max(map(columns_of, column)) for column in columns]
    for whole in _WHOLE:
        least = [max([_longest(name, 0), *(_longest(cell, whole) for cell in cells)]) for name, *cells in columns]
        least[-1] = max(least[-1], last)
        if sum(least) <= room:
            return _narrowed(natural, least, room, columns)
    return None


def wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines, broken at spaces only, and not between a figure and its unit or its name.

    A word that is longer than ``width`` has a line of its own.
    """
    if columns_of(text) <= width:
        return [text]
    lines: list[str] = []
    for piece in _pieces(text):
        if lines and columns_of(lines[-1]) + 1 + columns_of(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def paragraph(line: str, width: int) -> list[str]:
    """A line of text in as many as it takes; those after the first keep clear of its label, where it has one."""
    label = found[0] if (found := _LABEL.match(line)) and columns_of(found[0]) <= width // 3 else ""
    first, *rest = wrapped(line[len(label) :], width - columns_of(label))
    return [f"{label}{first}", *(f"{'':{columns_of(label)}}{each}" for each in rest)]


def blocks(header: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> list[list[str]]:
    """Each line of a table as lines of text: its first cell, and below it the others, all with their names."""
    title, *names = [name and f"{name} " for name in header]
    sizes = [max((columns_of(name + line[place]) for line in lines), default=0) for place, name in enumerate(names, 1)]
    return [
        [*wrapped(f"{title}{first}", width), *_in_rows(list(zip(names, others, sizes, strict=True)), width)]
        for first, *others in lines
    ]


def remarks_of(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """The remarks after the names of the lines that they are about, each remark once."""
    about: dict[str, list[str]] = {}
    for line in lines:
        if line[-1]:
            about.setdefault(line[-1], []).append(line[0])
    for remark, names in about.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"{', '.join(names[:_NAMED])}{more}: {remark}"


def columns_of(text: str) -> int:
    """The columns that ``text`` takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _in_rows(cells: Sequence[tuple[str, str, int]], width: int) -> Iterator[str]:
    """Cells with their names one after the other, those of different lines below each other."""
    line = ""
    for name, cell, size in cells:
        shown = f"{name}{cell}" if cell else ""
        if line.strip() and columns_of(line) + 2 + size > width:
            yield line.rstrip()
            line = ""
        if columns_of(shown) + 2 > width:
            yield from (f"  {each}" for each in wrapped(shown, width - 2))
        else:
            line += f"  {shown}{' ' * (size - columns_of(shown))}"
    if line.strip():
        yield line.rstrip()


def _narrowed(natural: Sequence[int], least: Sequence[int], room: int, columns: Sequence[Sequence[str]]) -> list[int]:
    """Widths that fit the ``room``, and for which few cells need another line."""
    widths = [max(pair) for pair in zip(natural, least, strict=True)]
    while (excess := sum(widths) - room) > 0:
        step = max(1, excess // 4)
        narrower = {
            place: max(least[place], width - step) for place, width in enumerate(widths) if width > least[place]
        }
        place = min(narrower, key=lambda each: (_added(columns[each], widths[each], narrower[each]), -widths[each]))
        widths[place] = narrower[place]
    return widths


def _added(cells: Sequence[str], width: int, narrower: int) -> int:
    """The lines that cells need more in a narrower column."""
    some = cells[: _LOOKED_AT + 1]
    return sum(len(wrapped(cell, narrower)) - len(wrapped(cell, width)) for cell in some)


def _longest(text: str, whole: int) -> int:
    """The columns of what is not broken in ``text``; up to ``whole`` columns that is all of it."""
    size = columns_of(text)
    if size <= whole:
        return size
    return max(map(columns_of, _pieces(text)))


def _pieces(text: str) -> list[str]:
    return [piece.replace("\0", " ") for piece in _TOGETHER.sub("\0", text).split(" ")]
