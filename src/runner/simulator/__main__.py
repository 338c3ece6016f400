"""``python -m runner.simulator``: the simulated provider on its own."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

from runner.config import SimulatorConfig
from runner.errors import ConfigError
from runner.simulator.server import Simulator
from runner.simulator.settings import SETTINGS, changed, options


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM, which is 0. An option or an address that cannot be used is 2."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    host, port = given.pop("host"), given.pop("port")
    faults = {path.removeprefix("faults."): given.pop(path) for path in [*given] if path.startswith("faults.")}
    try:
        simulator = Simulator(changed(SimulatorConfig(), {**given, "faults": faults}), host=host, port=port)
        asyncio.run(_serve(simulator))
    except ConfigError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 2
    except (OSError, OverflowError) as error:  # an overflow: no port is so large
        print(f"simulator: cannot listen at {host}:{port}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    """An option for each setting, under its name."""
    parser = argparse.ArgumentParser(
        prog="python -m runner.simulator",
        usage="%(prog)s [--KEY VALUE …], where --help lists the keys",
        description="Serve a simulated provider with OpenAI's HTTP interface.",
        epilog="GET /ledger counts what was asked and answered; POST /settings changes settings while it runs.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8900, help="0 for any free port (default: %(default)s)")
    for path, kind, default in options(SimulatorConfig()):
        text = SETTINGS[path].replace("%", "%%") + ("" if default is None else f" (default: {default:g})")
        name, metavar = f"--{path.replace('_', '-')}", kind.__name__.upper()
        parser.add_argument(name, dest=path, type=kind, metavar=metavar, help=text)
    return parser


async def _serve(simulator: Simulator) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with simulator:
        print(f"simulator: listening at {simulator.url}", flush=True)
        await stopped.wait()


if __name__ == "__main__":
    sys.exit(main())
