"""llama.cpp splits texts as the tokenizer that a file was written from, and as the one that is read back from it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llama_cpp
import tiny
from darwinlm.export.gguf import export_gguf
from darwinlm.export.gguf_vocabulary import SPLITS, add_vocabulary
from darwinlm.export.hf import export_hf
from darwinlm.model.checkpoint import PACKAGED, Checkpoint, _packaged, find_checkpoint
from darwinlm.types import UsageError
from exports import Case, dense_model, stitched_model
from llama_cpp import needs_llama_cpp
from vocabularies import byte_pair_tokenizer, sentencepiece_tokenizer

ROWS = 512  # as many as the tokenizers have tokens, or more
TEXTS = (
    "In 1969, Neil's crew FLEW 384400  km: IT'S   so, x+=10;\n\n\tdef f(a_b): return 3.14159 //2  #no\r\n  Yes",
    "  12\n34\n\n5 \t6  7,8.90  and 2024-11-22T08:15\n",
    "x  =  1\n    y  =  22\n\n\n\n        z = [333,  4444]",
    "naïve café — “Übergröße”, Ω≈3½, ٣٤ १२ \uff14\uff12, ² Ⅷ\u00a07",
    "東京は2024年、 🤷🏽\u200d♀️ e\u0301x  \u3000 0",
    "<|endoftext|>1<|endoftext|>\n 2",
    " ",
    "  leading",
    "\n two\n\n\n   \t x",
    "<s>  a</s>  b",
    "a  b   c    d     e",
)


@dataclass(frozen=True)
class Written:
    """Tokenizers by name, and the GGUF files that hold them."""

    tokenizers: dict[str, PreTrainedTokenizerFast]
    files: dict[str, Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Write a file for every tokenizer, of a native architecture, which transformers reads too."""
    root = tmp_path_factory.mktemp("vocabularies")
    tokenizers = {name: byte_pair_tokenizer(name, ROWS, every_byte=True) for name in SPLITS.values()}
    tokenizers["llama"] = sentencepiece_tokenizer()
    case = Case("llama", {"vocab_size": ROWS}, kept=(((1,), tuple(range(32))),) * 4)
    stitched, sizes = stitched_model(dense_model(case), case)
    files = {}
    for name, tokenizer in tokenizers.items():
        directory = export_hf(stitched, sizes, tokenizer, root / name, "card")
        files[name] = export_gguf(directory, root / f"{name}.gguf", "f32")
    return Written(tokenizers, files)


@needs_llama_cpp
def test_llama_cpp_splits_as_the_tokenizer_does(written: Written, tmp_path: Path) -> None:
    answers = llama_cpp.token_ids(written.files, TEXTS, tmp_path)
    for name, tokenizer in written.tokenizers.items():
        assert answers[name] == [tokenizer(text)["input_ids"] for text in TEXTS], name


# transformers 5.14 reads no GGUF file whose tokenizer has no BOS.
reads_files_without_bos = pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 23), reason="transformers is too old"
)


@reads_files_without_bos
@pytest.mark.parametrize("name", [*SPLITS.values(), "llama"])
def test_a_file_that_is_read_back_splits_alike(written: Written, name: str, tmp_path: Path) -> None:
    again = find_checkpoint(str(written.files[name]), tmp_path).tokenizer
    for text in TEXTS:
        assert again(text)["input_ids"] == written.tokenizers[name](text)["input_ids"], text


@reads_files_without_bos
def test_a_way_to_split_that_is_not_known_is_refused(written: Written, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    known = written.files["gpt-2"].read_bytes()
    file.write_bytes(known.replace(b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0other"))
    with pytest.raises(UsageError, match="splits words in the way other: expected gpt-2"):
        find_checkpoint(str(file), tmp_path)
    assert not (tmp_path / "dense").exists()


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    known = byte_pair_tokenizer("gpt-2")
    writer = gguf.GGUFWriter(tmp_path / "unused", "llama")
    with pytest.raises(UsageError, match="expected at most 300 tokens"):
        add_vocabulary(writer, known, 300)
    known.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match="words split as in gpt-2, smollm"):
        add_vocabulary(writer, known, tiny.VOCAB)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UsageError, match="a WordLevel tokenizer"):
        add_vocabulary(writer, words, tiny.VOCAB)


@needs_llama_cpp
@pytest.mark.slow
def test_smollm2_splits_as_llama_cpp_does(smollm2: Path, tmp_path: Path) -> None:
    """The packaged file says `smollm`, which transformers (5.23) does not know."""
    file = _packaged(next(iter(PACKAGED)))
    texts = [*TEXTS, *tiny.documents()]
    tokenizer = Checkpoint(smollm2).tokenizer
    (answers,) = llama_cpp.token_ids({"": file}, texts, tmp_path).values()
    for text, ids in zip(texts, answers, strict=True):
        assert ids == tokenizer(text)["input_ids"], text[:100]
