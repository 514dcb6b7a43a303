"""`python -m clipserver`: the API at home."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys

from pydantic import ValidationError

from clipserver.engines import EngineUnavailableError
from clipserver.engines.choice import choose
from clipserver.settings import Settings

EXIT_USAGE = 2
EXIT_UNREACHABLE = 12
_LATIN_1 = 255  # the last character that a header carries
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


EPILOG = """\
Every option can be set as NIGHTREEL_ and the setting's name in the environment.

Exit codes:
    0  ended by SIGTERM or SIGINT
    2  wrong usage; nothing was started
   12  no engine, no usable key file, or an address that cannot be had
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 after a clean end, 2 for unusable settings, 12 where the engine, its key file
    or the address cannot be had."""
    options = vars(_parser().parse_args(arguments))
    describe = options.pop("describe")
    try:
        settings = Settings(**options)
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False):
            _complain(f"{_option('.'.join(map(str, problem['loc'])))}: {problem['msg']}")
        return EXIT_USAGE
    try:
        choice = choose(
            settings.engine,
            model_dir=settings.model_dir,
            model=settings.model,
            int8=settings.int8,
        )
        if describe:
            sys.stdout.write(json.dumps(dataclasses.asdict(choice.description)) + "\n")
            return 0
        api_key = _api_key(settings)
        # Where a signal comes before the server listens to it, ending is still no failure.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=_LOG_FORMAT)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # the hub's library: a line a request
        # Read once, when numpy is loaded. Its threads spin while they wait, and took more from
        # the decoders beside us than they gave to the short products that are computed here.
        for library in ("OPENBLAS", "OMP", "MKL"):
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")
        from clipserver.serve import serve  # noqa: PLC0415  # heavy, and after the above

        serve(choice, settings, api_key)
    except (EngineUnavailableError, OSError) as error:
        _complain(str(error))
        return EXIT_UNREACHABLE
    except KeyboardInterrupt:
        pass
    return 0


def _parser() -> argparse.ArgumentParser:
    """One option for each setting; what is not given is left to the environment."""
    parser = argparse.ArgumentParser(
        prog="python -m clipserver",
        description="Serve the CLIP HTTP API on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for name, field in Settings.model_fields.items():
        if field.annotation is bool:
            parser.add_argument(
                _option(name), dest=name, help=field.description, action="store_true"
            )
        else:
            parser.add_argument(_option(name), dest=name, help=field.description, metavar="VALUE")
    parser.add_argument(
        "--describe",
        action="store_true",
        default=False,
        help="print the engine that would serve as one line of JSON, and end",
    )
    return parser


def _option(name: str) -> str:
    return "--" + name.removeprefix("server_").replace("_", "-")


def _api_key(settings: Settings) -> str | None:
    path = settings.server_api_key_file
    if path is None:
        return None
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(
            f"the key file {path} cannot be read ({type(error).__name__}): see --api-key-file"
        ) from error
    if not key:
        raise OSError(f"{path} holds no key: write one into it, or leave --api-key-file out")
    # A key that no header carries would shut out every client, and say of each that it is wrong.
    if not key.isprintable() or " " in key or max(map(ord, key)) > _LATIN_1:
        raise OSError(
            f"the key in {path} holds a space, a line break or another character that no header "
            "carries: the file of --api-key-file may hold the key alone"
        )
    return key


def _complain(message: str) -> None:
    sys.stderr.write(f"clipserver: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
