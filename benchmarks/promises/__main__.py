"""Hold the server to its promises: a card for each, then JSON lines; exit code 1 when one is broken.

    python -m benchmarks.promises                            all but the soak, about 15 minutes on two cores
    python -m benchmarks.promises --only beams,flood
    python -m benchmarks.promises --only soak --minutes 20
    python -m benchmarks.promises --quick                    a tiny model, one repeat: does it run, not how fast

The model has 100M random weights; a request is 64 tokens in and 64 out, greedy, unless a promise says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp
import uvloop

from benchmarks import report
from benchmarks.process import stop_children_on_sigterm
from benchmarks.promises import beams, first_token, flood, leaving, shutdown, soak, throughput
from benchmarks.promises.checks import Check, broken, card, exactly
from benchmarks.promises.plan import QUICK, Plan


@dataclass(frozen=True)
class Promise:
    sentence: str
    measure: Callable[[Plan], Awaitable[list[Check]]]
    limit_s: float
    """What takes longer is broken."""


SOAK = "soak"
PROMISES: Mapping[str, Promise] = {
    "throughput": Promise("a batch pays, a crowd does not cost", throughput.measure, 600),
    "beams": Promise("the own lane does not stop the shared one", beams.measure, 300),
    "first-token": Promise("a newcomer does not wait for those who run", first_token.measure, 600),
    "fairness": Promise(
        "32 instances of one client do not starve another's request", first_token.measure_fairness, 900
    ),
    "leaving": Promise("nothing stays of 500 clients that leave", leaving.measure, 600),
    "flood": Promise("2,000 requests at once are answered or refused, none is lost", flood.measure, 600),
    "shutdown": Promise("SIGTERM loses no stream", shutdown.measure, 300),
    SOAK: Promise("memory stays flat under load", soak.measure, 600),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.promises",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=_names, help=f"of {','.join(PROMISES)}")
    parser.add_argument("--minutes", type=float, default=Plan.soak_minutes, help="of the soak; default %(default)g")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat: a look, not a result")
    options = parser.parse_args()
    stop_children_on_sigterm()
    report.announce(report.machine())
    plan = dataclasses.replace(QUICK if options.quick else Plan(), soak_minutes=options.minutes)
    measured: dict[str, list[Check]] = {}
    for name in options.only or [name for name in PROMISES if name != SOAK]:
        promise = PROMISES[name]
        measured[name] = uvloop.run(_bounded(promise, plan))
        card(name, promise.sentence, measured[name])
    report.print_json_lines(check.figure(name) for name, checks in measured.items() for check in checks)
    lost = [name for name, checks in measured.items() if broken(checks)]
    report.progress.print(f"broken: {', '.join(lost)}" if lost else "all promises kept")
    return 1 if lost else 0


async def _bounded(promise: Promise, plan: Plan) -> list[Check]:
    limit_s = promise.limit_s + (120 * plan.soak_minutes if promise is PROMISES[SOAK] else 0)
    try:
        async with asyncio.timeout(limit_s):
            return await promise.measure(plan)
    except (TimeoutError, RuntimeError, aiohttp.ClientError) as error:
        # A server that cannot be measured has kept no promise; the others are measured all the same.
        return [exactly("measured", f"{type(error).__name__}: {error}", "")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PROMISES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(PROMISES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
