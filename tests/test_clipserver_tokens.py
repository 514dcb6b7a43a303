"""CLIP's own tokenizer through the engine, where a package ships its vocabulary."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from clipserver.engines import TextTooLongError
from clipserver.engines.clip import ClipTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the vocabulary's file, as CLIP itself takes them


def vocabulary_file() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("CLIP's vocabulary: pip install --no-deps open_clip_torch")
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    """CLIP's byte pair encoding, read back from the form in which the hub's exports ship it."""
    lines = gzip.decompress(vocabulary_file().read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
    # GPT-2's order: printable bytes first, then the others under stand-ins.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    letters = [*map(chr, printable), *others]
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges), START, END]
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            merges,
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, words.index(END)), (START, words.index(START)), False, False
    )
    tokenizer.enable_truncation(77)
    tokenizer.enable_padding(length=77)
    path = tmp_path_factory.mktemp("clip") / "tokenizer.json"
    tokenizer.save(str(path))
    return ClipTokenizer(path)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Winter Season", [49406, 2541, 1367, 49407]),
        ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("  A  photo\nof a CAT ", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("", [49406, 49407]),
    ],
)
def test_tokens_are_clips_own(tokenizer: ClipTokenizer, text: str, tokens: list[int]) -> None:
    """Known texts give known tokens, marks of start and end included."""
    assert tokenizer.tokens(text) == tokens


def test_a_text_is_never_cut(tokenizer: ClipTokenizer) -> None:
    """77 tokens are read, marks included; the limit is one of tokens, not of words."""
    assert len(tokenizer.tokens("cat " * 75)) == 77
    with pytest.raises(TextTooLongError, match="78 tokens"):
        tokenizer.tokens("cat " * 76)
    with pytest.raises(TextTooLongError):
        tokenizer.tokens("donaudampfschifffahrtsgesellschaft " * 15)
