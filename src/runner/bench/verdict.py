"""The verdict: the level to run at, with the evidence for it, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

from runner.bench.levels import Figure, LevelFacts, Mode
from runner.config import BenchConfig, SloConfig

_NARROW = 0.1
"""Half the width, as a share of the throughput, up to which an interval can say that two levels are alike."""


class Standing(StrEnum):
    """How sure the verdict is."""

    found = "found"
    at_edge = "at-edge"  # the highest level is the best: there may be better ones above
    unresolved = "unresolved"  # too few requests to tell the levels apart
    client_limited = "client-limited"  # this program was measured, and not the server
    none_passes = "none-passes"  # no level keeps bench.slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a benchmark found."""

    standing: Standing
    mode: Mode
    level: float | None = None  # None: nothing is recommended
    plateau_per_s: float | None = None  # the best throughput of a level that passes
    highest_pass: float | None = None  # level
    first_fail: float | None = None  # level
    binding: str | None = None  # what keeps higher levels from being better
    monotone: bool = True  # up to the plateau, more load never brought less
    override: str | None = None  # to paste into a command
    reasons: tuple[str, ...] = ()  # sentences

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "standing": self.standing.value, "mode": self.mode.value, "reasons": list(self.reasons)}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Verdict:
        """What `as_json` wrote."""
        kinds = {"standing": Standing, "mode": Mode, "reasons": tuple}
        return cls(**{name: kinds[name](value) if name in kinds else value for name, value in stored.items()})


def verdict_on(levels: Sequence[LevelFacts], bench: BenchConfig) -> Verdict:
    """The smallest level that keeps ``bench.slo`` and whose throughput reaches the plateau.

    The plateau is the best throughput of the levels that keep it; a level reaches it with ``bench.plateau`` of it, or
    where the intervals of both overlap and are narrow. A level that the client limited is never recommended, and none
    is where such a level leaves open whether the server could do more.
    """
    return _Judge(sorted(levels, key=lambda facts: facts.level), bench).verdict()


def reaches(facts: LevelFacts, best: LevelFacts, plateau: float) -> bool:
    """Whether a level's throughput is as good as the best."""
    here, there = facts.requests_per_s, best.requests_per_s
    if here.value >= plateau * there.value:
        return True
    if here.interval is None or there.interval is None or not (_is_narrow(here) and _is_narrow(there)):
        return False
    return here.interval.overlaps(there.interval)


def violation(facts: LevelFacts, slo: SloConfig) -> str | None:
    """What a level does not keep of ``slo``, by its key. None: it keeps all.

    A failed request counts as one that takes for ever. The rate of errors is exceeded where its interval lies above.
    """
    if facts.error_share.low > slo.error_rate or (facts.failed and facts.failed == facts.requests):
        return f"bench.slo.error_rate={slo.error_rate:g}"
    for key, what, percent, limit in demands(slo):
        figure = facts.percentile("latency_with_failures_s" if what == "latency_s" else what, percent)
        if figure is None:
            return f"bench.slo.{key}={limit:g}, as far as so few requests can show"
        if figure.value > limit:
            return f"bench.slo.{key}={limit:g}"
    return None


def demands(slo: SloConfig) -> list[tuple[str, str, int, float]]:
    """The percentiles that are limited: the key, what it is about, which percentile, and the limit in seconds."""
    found = []
    for field in fields(slo):
        what, _, rest = field.name.partition("_p")
        limit = getattr(slo, field.name)
        if rest and limit is not None:
            found.append((field.name, f"{what}_s", int(rest.removesuffix("_s")), limit))
    return found


class _Judge:
    """Looks at the levels from the lowest to the highest."""

    def __init__(self, levels: Sequence[LevelFacts], bench: BenchConfig) -> None:
        self._levels = levels
        self._bench = bench
        self._mode = levels[0].mode if levels else Mode.closed
        self._reasons: list[str] = []

    def verdict(self) -> Verdict:
        passing, failing, why = self._passing()
        if not passing:
            standing = Standing.none_passes if failing is not None else Standing.client_limited
            reason = "the client is the bottleneck at every level"
            self._say(reason if failing is None else f"level {_n(failing)} does not keep {why}")
            return Verdict(
                standing=standing, mode=self._mode, first_fail=failing, binding=why, reasons=tuple(self._reasons)
            )
        best = max(passing, key=lambda facts: facts.requests_per_s.value)
        choice = next(facts for facts in passing if self._suffices(facts, best))
        verdict = Verdict(
            standing=Standing.client_limited,
            mode=self._mode,
            plateau_per_s=best.requests_per_s.value,
            highest_pass=passing[-1].level,
            first_fail=failing,
            binding="the client",
            monotone=self._is_monotone(best),
        )
        if doubt := self._client_hides(choice, best, failing):
            self._say(doubt)
            return replace(verdict, reasons=tuple(self._reasons))
        standing, binding = self._standing(choice, best, passing, failing, why)
        return replace(
            verdict,
            standing=standing,
            level=choice.level,
            binding=binding,
            override=self._override(choice.level),
            reasons=tuple(self._reasons),
        )

    def _passing(self) -> tuple[list[LevelFacts], float | None, str | None]:
        """The levels that may be recommended; the lowest one that may not, and what it does not keep.

        Nothing above a level that fails is considered: if it passes, it is by luck.
        """
        passing: list[LevelFacts] = []
        for facts in self._levels:
            why = violation(facts, self._bench.slo) or self._falls_behind(facts)
            if why is not None:
                if facts.audit.limited_by == "client":
                    continue
                return passing, facts.level, why
            if facts.audit.limited_by != "client":
                passing.append(facts)
        return passing, None, None

    def _falls_behind(self, facts: LevelFacts) -> str | None:
        offered = facts.requests / facts.elapsed_s if facts.elapsed_s else 0.0
        if self._mode is Mode.open and facts.requests_per_s.value < self._bench.plateau * offered:
            return "the rate: requests pile up"
        return None

    def _suffices(self, facts: LevelFacts, best: LevelFacts) -> bool:
        if self._mode is Mode.open:  # the highest rate that is kept, not the smallest
            return facts is best
        return reaches(facts, best, self._bench.plateau)

    def _client_hides(self, choice: LevelFacts, best: LevelFacts, failing: float | None) -> str | None:
        """Whether a level that the client limited leaves open what the server can do."""
        limited = [facts for facts in self._levels if facts.audit.limited_by == "client"]
        faster = [
            each for each in limited if each.requests_per_s.value * self._bench.plateau > best.requests_per_s.value
        ]
        if faster and failing is None:
            return (
                f"level {_n(faster[0].level)} is faster, and the client is the bottleneck there: what the server can do"
                " is not known"
            )
        clean_above = any(facts.level > choice.level and facts not in limited for facts in self._levels)
        if not clean_above and any(facts.level > choice.level for facts in limited):
            return f"above level {_n(choice.level)}, the client is the bottleneck: what the server can do is not known"
        return None

    def _standing(
        self,
        choice: LevelFacts,
        best: LevelFacts,
        passing: Sequence[LevelFacts],
        failing: float | None,
        why: str | None,
    ) -> tuple[Standing, str | None]:
        above = [facts for facts in passing if facts.level > choice.level]
        hidden = [_n(each.level) for each in self._levels if each.level < choice.level and each not in passing]
        if hidden and self._mode is Mode.closed:
            self._say(f"the client is the bottleneck at {', '.join(hidden)}: a smaller level may do as well")
        if choice.audit.limited_by == "limits" or best.audit.limited_by == "limits":
            self._say("the configured limits set the pace: raise limits.rpm or limits.tpm if the provider allows it")
            return Standing.found, "the configured limits"
        if above and self._mode is Mode.closed:
            self._say(
                f"above level {_n(choice.level)}, throughput no longer rises: {best.requests_per_s.value:.4g}/s at most"
            )
            if not (_is_narrow(choice.requests_per_s) and any(_is_narrow(facts.requests_per_s) for facts in above)):
                self._say("the throughputs are not known well enough to be sure: raise bench.requests or bench.repeats")
                return Standing.unresolved, "throughput"
            return Standing.found, "throughput"
        if failing is not None:
            self._say(f"level {_n(failing)} does not keep {why}")
            return Standing.found, why
        self._say(f"level {_n(choice.level)} is the highest that was measured: there may be better ones above")
        return Standing.at_edge, None

    def _is_monotone(self, best: LevelFacts) -> bool:
        rates = [facts.requests_per_s.value for facts in self._levels if facts.level <= best.level]
        return all(after >= self._bench.plateau * before for before, after in pairwise(rates))

    def _override(self, level: float) -> str:
        return f"limits.concurrency={_n(level)}" if self._mode is Mode.closed else f"limits.rpm={_n(level * 60)}"

    def _say(self, reason: str) -> None:
        self._reasons.append(reason)


def _is_narrow(figure: Figure) -> bool:
    interval = figure.interval
    return interval is not None and interval.high - interval.low <= 2 * _NARROW * figure.value


def _n(level: float | None) -> str:
    return "" if level is None else f"{level:g}"
