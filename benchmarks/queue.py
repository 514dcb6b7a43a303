"""What queue and ledger cost beside the work that they hand out.

    python benchmarks/queue.py CLIPS_FOLDER [--quick] [--only messages,overhead,...] [--keep FOLDER]
                               [--on sqlite,postgresql]

Starts a Redis and a PostgreSQL of its own (Debian's binaries, both as durable as docker-compose.yml
has them) and takes every ledger figure on SQLite and on PostgreSQL:

    messages   rate of publishing and of taking, memory in Redis of a full window
    overhead   what a task of a minute costs in the ledger, step by step
    claims     claims a second by one and by two processes
    planning   10,000 videos of 10 tasks: submitted in one transaction, then planned as workers do,
               with made-up plans: the reading of media files is left out
    million    1,000,000 tasks, made by SQL: whether a task costs the same at the beginning, in the
               middle and at the end, and what closing costs; feeding and closing them all is
               projected from that
    simulation 1,000,000 tasks, each of them fed and every video closed by a scheduler, in windows
               of 1,000; workers are simulated, so that there are no samples to be read and smoothed
    work       the share of all that in tasks of 60 s of 1080p (the `soft` file of decode.py, made
               of CLIPS_FOLDER), and what two workers make of two cores; the ideal is what two
               processes reach that decode and ask the same API with no queue between them, since
               cores share caches and memory

An API that sleeps 20 ms and costs next to nothing answers. Absolute numbers are the machine's and
of its other work; compare the figures of one run. A quick run takes two or three minutes, the whole
one about a quarter of an hour. What it printed on two shared cores stands in docs/guarantees.md.
"""

# ruff: noqa: PLC0415 -- what other files import as `queue` must not import them in turn
from __future__ import annotations

import importlib.util
import signal
import sys
import sysconfig
from pathlib import Path


def standard_library() -> None:
    """Put the standard library's module of this name in the place of this one.

    A script's folder comes first on the path, so that whatever it imports finds this file instead.
    """
    source = Path(sysconfig.get_path("stdlib")) / "queue.py"
    found = importlib.util.spec_from_file_location("queue", source)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    sys.modules["queue"] = module


def main() -> None:
    import argparse
    import tempfile

    from decode import build
    from queue_ledger import claims, million, overhead, planning, simulation
    from queue_servers import databases, postgresql_server, redis_server
    from queue_workers import Bench, messages, taken, work

    assert __doc__ is not None
    parts = ("messages", "overhead", "claims", "planning", "work", "million", "simulation")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clips", type=Path, help="folder of clips (mp4, webm)")
    parser.add_argument("--quick", action="store_true", help="a fifth of everything, or less")
    parser.add_argument("--only", default=",".join(parts), help="of " + ",".join(parts))
    parser.add_argument("--on", default="sqlite,postgresql", help="databases of the ledger's parts")
    parser.add_argument("--keep", type=Path, help="folder to build the file in, or use it again")
    options = parser.parse_args()
    quick = options.quick
    spent_ms: dict[str, float] = {}
    of_the_ledger = {
        "claims": lambda engine: claims(engine, 200 if quick else 1000),
        "planning": lambda engine: planning(engine, 300 if quick else 10_000, 10),
        "million": lambda engine: million(
            engine, 50_000 if quick else 1_000_000, 1 if quick else 4
        ),
        "simulation": lambda engine: simulation(engine, 20_000 if quick else 1_000_000, 1000),
    }
    with (
        tempfile.TemporaryDirectory() as temporary,
        redis_server() as (redis_url, redis_pid),
        postgresql_server() as (server, postgresql_pid),
    ):
        folder, fresh = Path(temporary), databases(server)
        for part in parts:
            if part not in options.only.split(","):
                continue
            if part == "messages":
                print("messages", flush=True)
                spent_ms["published"] = messages(redis_url, (64, 1000, 5000 if quick else 100_000))
                with fresh("postgresql") as engine:
                    spent_ms["taken"] = taken(engine, redis_url, 500 if quick else 2000, folder)
                continue
            if part == "work":
                print("work", flush=True)
                keep = options.keep or folder
                keep.mkdir(exist_ok=True)
                video = keep / "soft.mp4"
                if not video.exists():
                    build(options.clips, video, 60, 1920, 1080)
                servers = redis_pid, postgresql_pid
                bench = Bench(fresh, redis_url, servers, video, folder, 8 if quick else 10)
                # Of parts that were left out nothing is known.
                known = sum(spent_ms.values()) if len(spent_ms) == 3 else None
                work(bench, 1 if quick else 2, known)
                continue
            for kind in options.on.split(","):
                print(f"{part}, {kind}", flush=True)
                with fresh(kind) as engine:
                    if part == "overhead":
                        at_work = [postgresql_pid] if kind == "postgresql" else []
                        spent_ms["ledger"] = overhead(engine, 1 if quick else 5, *at_work)
                    else:
                        of_the_ledger[part](engine)


if __name__ == "queue":
    standard_library()
elif __name__ == "__main__":
    # The servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
