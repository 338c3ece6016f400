"""The doctor: ``python -m runner.doctor [--ask] [+experiment=NAME] [key=value ...]``.

Looks at everything that the command with these arguments would need, and says what to change. Without ``--ask`` it
sends no request that costs anything.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from urllib.parse import urlsplit

from runner import figures
from runner.budget import check_budget
from runner.checks import check, without_effect
from runner.config import DeploymentConfig, RunnerConfig, TaskKind, TrackerKind, asked_kind, replicas
from runner.errors import BAD_CONFIG, FINISHED, APIConnectionError, ConfigError, ItemError, RequestError, Timeout
from runner.progress import printable, say, write
from runner.quota import readings
from runner.transports import DIRECT, base_of, check_addresses, key_of, open_transport, wire
from runner.transports.models import listed_models, missing_keys
from runner.types import EmbeddingRequest, Endpoint, GenerationRequest, Request, Response
from runner.workload import Workload

_LOW_DISK_BYTES = 2**30
_WANDB_TIMEOUT_S = 5.0
_ASK_TIMEOUT_S = 60.0
_READ_S = 5.0
_INDENT = 7  # columns before a finding's subject

_LIMIT_KEYS = {
    ("requests", False): "rpm",
    ("requests", True): "rpd",
    ("tokens", False): "tpm",
    ("tokens", True): "tpd",
    ("input", False): "itpm",
    ("output", False): "otpm",
}
"""The limit for what a provider's headers count, by the minute or by the day."""


class Verdict(Enum):
    """How a finding is shown, and with which colour on a terminal."""

    ok = ("ok", "32")
    note = ("note", "33")
    fault = ("FAULT", "31")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    subject: str
    text: str  # what was found and, unless it is fine, what to change

    def shown(self, *, width: int | None = None, in_colour: bool = False) -> str:
        """It in words; on a terminal ``width`` columns wide, the text keeps to a column of its own."""
        word, colour = self.verdict.value
        mark = f"\x1b[{colour}m{word:<5}\x1b[0m" if in_colour else f"{word:<5}"
        subject, text = f"{printable(self.subject):<14}", printable(self.text)
        if width is None:
            return f"{mark}  {subject}  {text}"
        room = max(width - _INDENT, 20)
        first, *rest = wrap(
            f"{subject}  {text}", room, subsequent_indent=" " * 16, break_on_hyphens=False, break_long_words=False
        )
        return "\n".join([f"{mark}  {first}", *(f"{'':<{_INDENT}}{line}" for line in rest)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; exit code 2 where one is a fault, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m runner.doctor",
        description="Look at what a run would need, and say what to change. Takes the arguments of `python -m runner`.",
    )
    parser.add_argument("--ask", action="store_true", help="send one tiny request to each deployment (it may cost)")
    given, overrides = parser.parse_known_args(argv)
    try:
        config = _compose(overrides)
    except ConfigError as error:
        say(sys.stderr, f"runner: {printable(str(error))}")
        return BAD_CONFIG
    try:
        return asyncio.run(_show(config, ask=given.ask))
    except KeyboardInterrupt:
        return 130


async def examine(config: RunnerConfig, *, ask: bool = False) -> AsyncIterator[Finding]:
    """The findings about ``config``, one after the other, as they are made.

    Args:
        ask: Whether each deployment is sent one tiny request.
    """
    try:
        check(config)
        yield _ok("configuration", "every key is known, every value possible")
    except ConfigError as error:
        yield _fault("configuration", str(error))
        return
    for finding in _look_at_budget(config):
        yield finding
    for doubt in without_effect(config):
        yield _note("configuration", doubt)
    for finding in _look_at_rows(config):
        yield finding
    for label, deployment in replicas(config).items():
        async for finding in _look_at_deployment(label, deployment, config, ask=ask):
            yield finding
    for finding in (*_look_at_disk(Path(config.runs_dir)), *_look_at_descriptors(config)):
        yield finding
    yield await _look_at_tracker(config)


def _compose(overrides: Sequence[str]) -> RunnerConfig:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from runner.complaints import explain
    from runner.composition import compose

    try:
        return compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None


async def _show(config: RunnerConfig, *, ask: bool) -> int:
    faults = 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    async for finding in examine(config, ask=ask):
        faults += finding.verdict is Verdict.fault
        write(sys.stdout, f"{finding.shown(width=width, in_colour=_in_colour())}\n")
    closing = "Everything is in place." if not faults else f"{faults} to mend." if faults > 1 else "One to mend."
    write(sys.stdout, f"\n{closing}\n")
    return BAD_CONFIG if faults else FINISHED


def _in_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _look_at_budget(config: RunnerConfig) -> Iterator[Finding]:
    try:
        check_budget(config)
    except ConfigError as error:
        for message in error.args:
            yield _fault("budget", str(message))


def _look_at_rows(config: RunnerConfig) -> Iterator[Finding]:
    try:
        workload = Workload(config)
        doubts = workload.check()
        total = workload.count()
        broken = _broken(workload) if total is not None else None
    except ConfigError as error:
        for message in error.args:
            yield _fault("dataset", str(message))
        return
    if total == 0:
        yield _note("dataset", "it has no rows")
    else:
        yield _ok("dataset", "it can be read" if total is None else f"{total:,} to ask")
    if broken is not None:
        yield broken
    yield from (_note("dataset", doubt) for doubt in doubts)


def _broken(workload: Workload) -> Finding | None:
    """How many rows cannot be asked, and why one cannot, as far as a few seconds tell; None where all can."""
    until = time.monotonic() + _READ_S
    read = broken = 0
    example: ItemError | None = None
    for item in workload.items():
        read += 1
        if item.error is not None:
            broken += 1
            example = example or item.error
        if time.monotonic() > until:
            break
    if example is None:
        return None
    find = _fault if broken == read else _note
    return find("dataset", f"{broken:,} of {read:,} cannot be asked, for example {example}")


async def _look_at_deployment(
    label: str, deployment: DeploymentConfig, config: RunnerConfig, *, ask: bool
) -> AsyncIterator[Finding]:
    prefix, _, model = deployment.model.partition("/")
    provider = DIRECT.get(prefix)
    try:
        transport = open_transport(deployment, simulator=config.simulator, timeout_s=_ASK_TIMEOUT_S)
        key = key_of(deployment)
    except ConfigError as error:
        yield _fault(label, str(error))
        return
    variable = deployment.api_key_env or (provider.key_env if provider else None)
    base = base_of(deployment)
    if prefix == "simulated" and base is None:
        yield _ok(label, "simulated: needs no key and no network")
    elif key is not None:
        yield _ok(label, f"there is a key in {variable}")
    elif provider is None:
        missing = missing_keys(deployment.model)
        yield _fault(label, f"set {' and '.join(missing)}") if missing else _ok(label, "LiteLLM finds its keys")
    else:
        yield _note(label, f"there is no key in {variable}: right for a server that wants none")
    request = _tiny(config) if ask else None
    if base is not None:
        yield await _look_at_server(label, deployment, base, key, model, is_asked=request is not None)
    if ask and request is None:
        yield _note(label, "not asked: there is no recording at hand to have transcribed")
    if request is not None:
        try:
            response = await transport.send(request)
        except RequestError as error:
            yield _fault(label, f"one request: {type(error).__name__}: {error}")
        else:
            yield _ok(label, f"one request: answered by {response.model_id or deployment.model}")
            for finding in _look_at_limits(label, deployment, config, response):
                yield finding
    await transport.aclose()


async def _look_at_server(
    label: str, deployment: DeploymentConfig, base: str, key: str | None, model: str, *, is_asked: bool
) -> Finding:
    """Whether it is there and has the model. Where it ``is_asked`` for an answer, that tells if it knows the name."""
    try:
        await check_addresses({label: deployment})
        listed = await listed_models(base, key)
    except ConfigError as error:
        return _fault(label, str(error))
    except RequestError as error:
        if error.systemic and error.status in (401, 403):
            return _fault(label, f"the server refuses the key: {error}")
        if error.status == 404 and (meant := wire.meant_base(base)) and await _has_list(meant, key):
            where, right = wire.address(base), wire.address(meant)
            setting = "api_base" if label == deployment.model else f"deployments.{label}.api_base"
            return _fault(label, f"there is no API at {where}, but there is one at {right}: set {setting}={right}")
        if isinstance(error, (APIConnectionError, Timeout)):
            return _fault(label, f"the server is there, and does not answer: {error}")
        return _note(label, f"the server is there, but its list of models is not: {error}")
    if listed and model not in listed:
        some = ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "")
        unlisted = f"the server does not list {model!r}, but {some}"
        if is_asked:
            return _note(label, f"{unlisted}: the request that follows says whether it knows the name")
        return _fault(label, f"{unlisted}: correct the model's name")
    return _ok(label, f"{base} lists the model")


async def _has_list(base: str, key: str | None) -> bool:
    try:
        await listed_models(base, key)
    except RequestError:
        return False
    return True


def _look_at_limits(
    label: str, deployment: DeploymentConfig, config: RunnerConfig, response: Response
) -> Iterator[Finding]:
    """Compare the limits that the provider's headers tell with those that are configured."""
    limits = deployment.limits or config.limits
    prefix = f"deployments.{label}.limits" if deployment.limits else "limits"
    for reading in readings(response.headers, now=time.time()):
        key, told = _LIMIT_KEYS.get((reading.kind, reading.is_of_a_day)), reading.limit
        if key is None or told is None:
            continue
        ours = getattr(limits, key)
        if ours is None:
            yield _note(label, f"the provider allows {told:,.0f}: {prefix}.{key}={told:.0f} would keep to it")
        elif ours > told:
            yield _note(
                label, f"{prefix}.{key}={figures.plain(ours)} is above the provider's {told:,.0f}: it will answer 429"
            )
        else:
            yield _ok(label, f"{prefix}.{key}={figures.plain(ours)} is within the provider's {told:,.0f}")


def _tiny(config: RunnerConfig) -> Request | None:
    """A small request with the experiment's own parameters; None where its task can have none."""
    params = {name: value for name, value in config.request.items() if name != "timeout"}
    match asked_kind(config):
        case TaskKind.embed:
            return EmbeddingRequest(texts=["OK"], params=params)
        case TaskKind.transcribe:
            return None
    key = "max_completion_tokens" if "max_completion_tokens" in params else "max_tokens"
    if config.endpoint is Endpoint.responses:
        key = "max_output_tokens"
    return GenerationRequest(input="Say OK.", endpoint=config.endpoint, params={**params, key: 16, "stream": False})


def _look_at_disk(folder: Path) -> Iterator[Finding]:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield _fault("disk", f"{there} cannot be written: choose another folder with runs_dir=PATH")
        return
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:,.1f} GiB free for {folder}"
    yield _ok("disk", text) if free > _LOW_DISK_BYTES else _note("disk", f"only {text}: make room before a long run")


def _look_at_descriptors(config: RunnerConfig) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    slots = config.limits.concurrency
    if isinstance(slots, int) and slots + 100 > soft:
        yield _fault(
            "open files", f"limits.concurrency={slots} needs more than {soft} allow: ulimit -n {2 * slots + 100}"
        )


async def _look_at_tracker(config: RunnerConfig) -> Finding:
    if config.tracker.kind is TrackerKind.none:
        return _ok("tracker", "switched off; numbers go to metrics.jsonl in the run's folder")
    if find_spec("wandb") is None:
        return _fault("tracker", "wandb is not installed: install runner again, or use tracker=none")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return _ok("tracker", f"W&B is {os.environ['WANDB_MODE']} (WANDB_MODE)")

    import wandb

    if not wandb.login(verify=False, prompt=False):
        return _note("tracker", "W&B has no key, so runs are kept offline: set WANDB_API_KEY or run `wandb login`")
    host = urlsplit(str(wandb.Settings().base_url))
    try:
        async with asyncio.timeout(_WANDB_TIMEOUT_S):
            _, writer = await asyncio.open_connection(
                host.hostname, host.port or (443 if host.scheme == "https" else 80)
            )
        writer.close()
    except (OSError, TimeoutError, socket.gaierror):
        return _note("tracker", f"W&B's server {host.hostname} cannot be reached, so runs are kept offline")
    return _ok("tracker", f"W&B has a key, and {host.hostname} is reachable")


def _ok(subject: str, text: str) -> Finding:
    return Finding(verdict=Verdict.ok, subject=subject, text=text)


def _note(subject: str, text: str) -> Finding:
    return Finding(verdict=Verdict.note, subject=subject, text=text)


def _fault(subject: str, text: str) -> Finding:
    return Finding(verdict=Verdict.fault, subject=subject, text=text)


if __name__ == "__main__":
    sys.exit(main())
