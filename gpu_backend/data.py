"""Token shards on disk and in memory: read, write, unpack, relabel, batch.

A shard is FineWeb's `.bin`: a header of 256 int32 (magic 20240520, version 1, token count, zeros),
then that many uint16 token ids, all little-endian. A corpus is a folder with a `manifest.json` that
names its shards; they lie beside it as `<name>.bin.xz` (shipped) or `<name>.bin` (your own files), or
in the cache, if they were fetched from a hub (`nanogpt-env data fetch`).

Needs the standard library and numpy only.
"""

import errno
import hashlib
import json
import lzma
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
_NAME = r"\w[\w.-]*"
_PART = re.compile(rf"({_NAME})(?:\[(\d+):(\d+)\])?")

Tokens = NDArray[np.uint16]


class ShardError(ValueError):
    """A shard or its manifest is not what it claims to be."""


class CacheError(OSError):
    """The cache directory cannot take the unpacked shards."""


def read_shard(path: Path) -> Tokens:
    """Map the tokens of a shard, shape (count,), read-only.

    Raises ShardError when the file is missing or its header and size disagree.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    except FileNotFoundError:
        raise ShardError(
            f"{path}: no such file. Unpack its corpus first: data.unpack(corpus_dir, cache_dir)."
        ) from None
    if size < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes, shorter than the {HEADER_BYTES}-byte header. Fetch it again.")
    magic, version, count = (int(value) for value in header[:3])
    if magic != MAGIC:
        raise ShardError(
            f"{path}: magic {magic}, expected {MAGIC}. Not a token shard (still packed, or another "
            "format); data.write_shard makes one from token ids."
        )
    if version != VERSION:
        raise ShardError(
            f"{path}: version {version}, this loader reads version {VERSION}. Rewrite the tokens "
            "as uint16 with data.write_shard."
        )
    if count < 1:
        raise ShardError(f"{path}: the header counts {count} tokens. Build or fetch it again.")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        raise ShardError(
            f"{path}: {size} bytes, but the header counts {count} tokens, which take {expected} "
            "bytes. The file is truncated or was changed; fetch it again."
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def write_shard(path: Path, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> None:
    """Write token ids, shape (count,), as a shard.

    Raises ShardError when there are none, or an id does not fit in uint16.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ShardError(f"{path}: a shard is a non-empty row of integers, got {ids.shape}.")
    if int(ids.min()) < 0 or int(ids.max()) > np.iinfo(np.uint16).max:
        raise ShardError(f"{path}: token ids {ids.min()}..{ids.max()} do not fit in uint16.")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, ids.size
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())


@dataclass(frozen=True)
class Shard:
    """One line of a manifest."""

    name: str
    """File name without `.bin` or `.bin.xz`."""
    sha256: str | None
    """Of the unpacked `.bin`; None only for a plain `.bin` of the user's own."""


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says about a corpus."""

    vocab_size: int
    special_ids: tuple[int, ...]
    """Ids that keep their number under `permutation` (end of text)."""
    shards: tuple[Shard, ...]
    sha256: str
    """Of the manifest file itself."""
    hub: str = ""
    """Data set on a hub that has the shards, if they are to be fetched."""


def load_manifest(corpus_dir: Path) -> Manifest:
    """Read `corpus_dir/manifest.json`. Raises ShardError when it is missing or malformed."""
    path = corpus_dir / "manifest.json"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(
            f"{path}: no such file. For shards of your own write, for example, "
            '{"vocab_size": 50257, "special_ids": [50256], "shards": '
            '[{"name": "fineweb_train_000001"}, {"name": "fineweb_val_000000"}]}'
        ) from None
    try:
        fields = json.loads(raw)
        shards = tuple(Shard(line["name"], line.get("sha256")) for line in fields["shards"])
        vocab_size = int(fields["vocab_size"])
        special_ids = tuple(int(token) for token in fields["special_ids"])
        hub = str(fields.get("hub", ""))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"{path}: {type(error).__name__}: {error}. It needs vocab_size, special_ids and "
            "shards, each shard with a name."
        ) from error
    for shard in shards:
        # A name becomes a path below the cache, so it may not leave its folder.
        if not isinstance(shard.name, str) or not re.fullmatch(_NAME, shard.name):
            raise ShardError(f"{path}: shard name {shard.name!r} is not a plain file name.")
    return Manifest(vocab_size, special_ids, shards, hashlib.sha256(raw).hexdigest(), hub)


def load(corpus_dir: Path, cache_dir: Path, names: Collection[str]) -> dict[str, Tokens]:
    """Return the tokens of shards, or of parts of them: 'NAME' or 'NAME[BEGIN:END]', in tokens. Raises as `unpack`."""
    found = {name: _PART.fullmatch(name) for name in names}
    if malformed := [name for name, match in found.items() if not match]:
        raise ShardError(f"{malformed[0]!r} is neither the name of a shard nor NAME[BEGIN:END]")
    parts = {name: match.groups() for name, match in found.items() if match}
    paths = unpack(corpus_dir, cache_dir, {shard for shard, _, _ in parts.values()})
    tokens = {}
    for name, (shard, begin, end) in parts.items():
        whole = read_shard(paths[shard])
        if end and not int(begin) < int(end) <= len(whole):
            raise ShardError(f"{name}: {shard} has {len(whole)} tokens")
        tokens[name] = whole[int(begin) : int(end)] if end else whole
    return tokens


def unpack(corpus_dir: Path, cache_dir: Path, names: Collection[str] | None = None) -> dict[str, Path]:
    """Return shard name -> path of a verified `.bin`, unpacking `.bin.xz` into the cache; of `names` only, if given.

    Unpacked files go to `cache_dir/<corpus name>-<12 hex of the manifest's SHA-256>/` and are
    hashed anew on each call; one that does not match is rebuilt. Plain `.bin` files are used where
    they lie, fetched ones (`cache_dir/<corpus name>/`) as `data fetch` left them: only their size is checked.
    Raises ShardError for a name that the corpus lacks and a bad file, CacheError when the cache cannot be written.
    """
    manifest = load_manifest(corpus_dir)
    corpus = corpus_dir.resolve().name
    folder = cache_dir / f"{corpus}-{manifest.sha256[:12]}"
    if unknown := set(names or ()) - {shard.name for shard in manifest.shards}:
        raise ShardError(f"corpus {corpus_dir} has no shard {', '.join(sorted(unknown))}")
    paths = {}
    for shard in manifest.shards:
        if names is not None and shard.name not in names:
            continue
        packed = corpus_dir / f"{shard.name}.bin.xz"
        plain = corpus_dir / f"{shard.name}.bin"
        if packed.exists():
            paths[shard.name] = _cached(packed, shard, folder / plain.name)
        elif plain.exists():
            if shard.sha256 is not None and _file_sha256(plain) != shard.sha256:
                raise _mismatch(plain)
            paths[shard.name] = plain
        elif (fetched := cache_dir / corpus / plain.name).exists():
            paths[shard.name] = fetched
        elif manifest.hub:
            raise ShardError(f"{fetched}: not there yet. `nanogpt-env data fetch --tier TIER` gets it.")
        else:
            raise ShardError(f"{corpus_dir}: neither {plain.name} nor {packed.name} is there.")
        read_shard(paths[shard.name])
    return paths


def permutation(vocab_size: int, special_ids: Iterable[int], rng: np.random.Generator) -> Tokens:
    """Draw a relabelling: new id by old id, shape (vocab_size,); special ids keep theirs.

    Raises ValueError for a vocabulary beyond uint16 or a special id outside the vocabulary.
    """
    if not 1 <= vocab_size <= 1 << 16:
        raise ValueError(f"vocab_size {vocab_size} is outside 1..65536.")
    specials = sorted(set(special_ids))
    if specials and not 0 <= specials[0] <= specials[-1] < vocab_size:
        raise ValueError(f"special ids {specials} do not all lie in 0..{vocab_size - 1}.")
    relabelled = np.arange(vocab_size, dtype=np.uint16)
    movable = np.delete(relabelled, specials)
    relabelled[movable] = rng.permutation(movable)
    return relabelled


def relabel(tokens: Tokens, permutation: Tokens) -> Tokens:
    """Return new ids, same shape as `tokens`. Raises IndexError for a token id beyond the table."""
    return permutation[tokens]


def joined(shards: Sequence[Tokens], permutation: Tokens) -> Tokens:
    """The tokens of shards, one after the other, with new ids."""
    tokens = np.empty(sum(map(len, shards)), np.uint16)
    at = 0
    for shard in shards:
        tokens[at : at + len(shard)] = relabel(shard, permutation)
        at += len(shard)
    return tokens


class Batches:
    """An endless source of windows over a row of tokens, in two orders.

    stream: `streams` cursors, evenly spaced over the tokens from a start that `rng` draws; each row is taken from the
    next cursor. documents: each row starts with the first document that begins after the row before (`first_token`
    marks beginnings).
    Rows from one place make seeds differ more on small tiers: docs/design/data-order.md.
    """

    def __init__(self, tokens: Tokens, streams: int, rng: np.random.Generator, first_token: int | None = None) -> None:
        """Raises ValueError when `tokens` has not one entry for each stream."""
        if not 1 <= streams <= len(tokens):
            raise ValueError(
                f"{streams} streams over {len(tokens)} tokens: need at least 1 stream, and a token for each."
            )
        self._tokens = tokens
        start = int(rng.integers(len(tokens)))
        self._cursors = [(start + i * (len(tokens) // streams)) % len(tokens) for i in range(streams)]
        self._next = 0
        self._documents = np.array([], np.int64) if first_token is None else np.flatnonzero(tokens == first_token)
        self._after = start

    def take(self, rows: int, length: int, order: str = "stream") -> Tokens:
        """The next windows, shape (rows, length + 1): inputs and, one further, targets.

        Raises ValueError for windows longer than the tokens, and for an order that this source does not have.
        """
        if length >= len(self._tokens):
            raise ValueError(f"a window of {length} + 1 tokens, but there are {len(self._tokens)}.")
        if order not in ("stream", "documents") or (order == "documents" and not len(self._documents)):
            raise ValueError(f"no order {order!r} over these tokens.")
        start_of = self._in_stream if order == "stream" else self._at_document
        windows = np.empty((rows, length + 1), np.uint16)
        for window in windows:
            self._copy(start_of(length), window)
        return windows

    def position(self) -> list[int]:
        """Where it is, for `seek`."""
        return [*self._cursors, self._next, self._after]

    def seek(self, position: Sequence[int]) -> None:
        *self._cursors, self._next, self._after = position

    def _in_stream(self, length: int) -> int:
        start = self._cursors[self._next]
        self._cursors[self._next] = (start + length) % len(self._tokens)
        self._next = (self._next + 1) % len(self._cursors)
        return start

    def _at_document(self, length: int) -> int:
        index = int(np.searchsorted(self._documents, self._after))
        start = int(self._documents[index % len(self._documents)])
        self._after = (start + length) % len(self._tokens)
        return start

    def _copy(self, start: int, window: Tokens) -> None:
        before_end = self._tokens[start : start + len(window)]
        window[: len(before_end)] = before_end
        window[len(before_end) :] = self._tokens[: len(window) - len(before_end)]


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mismatch(path: Path) -> ShardError:
    return ShardError(
        f"{path}: SHA-256 differs from manifest.json. The file is damaged or was changed; "
        "reinstall the package, or rebuild the corpus together with its manifest."
    )


def _cached(packed: Path, shard: Shard, target: Path) -> Path:
    """Return `target`, unpacked from `packed` unless it already holds the right bytes."""
    if shard.sha256 is None:
        raise ShardError(f"{packed}: a packed shard needs its sha256 in manifest.json.")
    try:
        if not target.exists() or _file_sha256(target) != shard.sha256:
            _write_atomically(target, _unpacked(packed, shard.sha256))
    except OSError as error:
        way_out = "Set NANOGPT_ENV_CACHE to a writable directory"
        if error.errno == errno.ENOSPC:
            way_out = "Free some space or set NANOGPT_ENV_CACHE to a directory on another disk"
        raise CacheError(
            error.errno, f"cannot unpack {packed.name}: {error.strerror}. {way_out}", str(target)
        ) from error
    return target


def _unpacked(packed: Path, sha256: str) -> bytes:
    try:
        content = lzma.decompress(packed.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise ShardError(
            f"{packed}: cannot be unpacked: {error}. Reinstall the package or rebuild the corpus."
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _mismatch(packed)
    return content


def _write_atomically(path: Path, content: bytes) -> None:
    """Write to a file of this process alone, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        part.chmod(0o644)  # mkstemp's 0600 would hide it from a container's user
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
