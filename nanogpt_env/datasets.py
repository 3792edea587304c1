"""Fetch the token shards of a tier from the hub that its corpus names, and check what is there.

Fetched shards lie in `cache_dir()/<corpus>/`, with their sums in `SHA256SUMS` (as `sha256sum --check` reads it).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from nanogpt_env.content import cache_dir
from nanogpt_env.errors import BackendError, TierError
from nanogpt_env.tracks import Tier
from nanogpt_env.types import Record

SUMS, PART = "SHA256SUMS", "part"
HEADER_BYTES, MAGIC, VERSION = 1024, 20240520, 1
ATTEMPTS = 2
"""of a shard whose bytes arrive damaged"""
POLL_S = 0.1


class ShardState(Record):
    """A file that a tier needs. `unchecked`: whole by its header, but there is no sum to hold it to."""

    name: str
    path: Path
    status: Literal["ok", "unchecked", "missing", "damaged"]
    bytes: int = 0
    detail: str = ""


class Corpus:
    """What a tier's `[data]` names. Raises `TierError` if the corpus's manifest does not have it."""

    def __init__(self, tier: Tier) -> None:
        self.folder = tier.corpus_folder()
        manifest = json.loads(tier.manifest())
        self.hub: str = manifest.get("hub", "")
        self.revision: str = manifest.get("revision", "main")
        sums = {shard["name"]: shard.get("sha256") for shard in manifest["shards"]}
        names = dict.fromkeys(name.partition("[")[0] for name in tier.table.data.shards)
        if unknown := [name for name in names if name not in sums]:
            raise TierError(f"tier {tier.name}: corpus {self.folder} has no shard {', '.join(unknown)}")
        self.names = list(names)
        self.target = cache_dir() / self.folder.name
        self._published = {f"{name}.bin": sums[name] for name in names if sums[name]}
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        beside = [self.folder / f"{name}.bin.xz", self.folder / f"{name}.bin"]
        return next((path for path in beside if path.exists()), self.target / f"{name}.bin")

    def sums(self) -> dict[str, str]:
        """File -> SHA-256: the manifest's, and those of fetched shards."""
        path = self.target / SUMS
        lines = path.read_text().splitlines() if path.exists() else []
        found = [re.fullmatch(r"([0-9a-f]{64}) [ *](\S+)", line) for line in lines]
        return {match[2]: match[1] for match in found if match} | self._published

    def keep_sum(self, file: str, sha256: str) -> None:
        with self._lock:
            lines = [f"{value}  {name}\n" for name, value in sorted({**self.sums(), file: sha256}.items())]
            part = self.target / f"{SUMS}.part"
            part.write_text("".join(lines))
            part.replace(self.target / SUMS)

    def state(self, name: str) -> ShardState:
        """Reads the whole file."""
        path = self.path(name)
        if not path.exists():
            return ShardState(name=name, path=path, status="missing")
        size, packed = path.stat().st_size, path.suffix == ".xz"
        wanted = self.sums().get(f"{name}.bin")
        if wanted and not packed:
            same = _sha256(path) == wanted
            detail = "" if same else "SHA-256 is not the one it was fetched with"
            return ShardState(name=name, path=path, status="ok" if same else "damaged", bytes=size, detail=detail)
        if packed:  # its sum is checked whenever it is unpacked
            return ShardState(name=name, path=path, status="ok", bytes=size)
        fault = _header_fault(path)
        status: Literal["damaged", "unchecked"] = "damaged" if fault else "unchecked"
        return ShardState(name=name, path=path, status=status, bytes=size, detail=fault)

    def copy_commands(self, tier: str) -> list[str]:
        """For a machine that does not reach the hub: to run on one that does, and here."""
        return [
            f"on a machine that reaches {self.hub or 'the data'}:",
            f"    nanogpt-env data fetch --tier {tier}",
            f"    rsync --archive --partial \"$(nanogpt-env data path --tier {tier})/\" THIS_MACHINE:'{self.target}/'",
            "then here:",
            f"    nanogpt-env data check --tier {tier}",
        ]


def check(corpus: Corpus, on_shard: Callable[[str], None] = lambda name: None) -> Iterator[ShardState]:
    for name in corpus.names:
        on_shard(name)
        yield corpus.state(name)


OnBytes = Callable[[str, int, int], None]
"""takes (shard, bytes that are here, bytes in all)"""


def fetch(corpus: Corpus, workers: int = 4, on_bytes: OnBytes = lambda name, done, total: None) -> None:
    """Get the shards that are not here, some at a time. A connection that was cut goes on where it was cut; after a
    crash or Ctrl-C whole shards are kept, those under way begin anew. Raises `BackendError` with the way out."""
    absent = [name for name in corpus.names if not corpus.path(name).exists()]
    if not absent:
        return
    if not corpus.hub:
        raise BackendError(f"{corpus.folder} lacks {', '.join(absent)}, and its manifest names no hub to fetch from")
    hub = _hub()
    corpus.target.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(corpus.target / "fetch.lock", timeout=0):
            shutil.rmtree(corpus.target / PART, ignore_errors=True)  # of one that was killed: cannot be gone on with
            fetcher = _Fetcher(corpus, hub, on_bytes)
            fetcher.measure(absent)
            fetcher.run(absent, workers)
            shutil.rmtree(corpus.target / PART)
    except Timeout:
        raise BackendError(f"another process fetches into {corpus.target}: let it end first") from None


class _Fetcher:
    def __init__(self, corpus: Corpus, hub: Any, on_bytes: OnBytes) -> None:
        self.corpus, self.hub, self.on_bytes = corpus, hub, on_bytes
        self._metadata: dict[str, Any] = {}

    def measure(self, names: list[str]) -> None:
        """Sizes and sums, before anything is fetched: a disk that is too small is found now."""
        for name in names:
            url = self.hub.hf_hub_url(
                self.corpus.hub, f"{name}.bin", repo_type="dataset", revision=self.corpus.revision
            )
            try:
                self._metadata[name] = self.hub.get_hf_file_metadata(url)
            except Exception as error:
                raise BackendError(f"{url}: {_reason(error)}") from None
            self.on_bytes(name, 0, self._metadata[name].size or 0)
        needed = sum(metadata.size or 0 for metadata in self._metadata.values())
        free = shutil.disk_usage(self.corpus.target).free
        if needed > free:
            raise BackendError(
                f"{len(names)} shards take {needed / 1e9:.1f} GB and {self.corpus.target} has {free / 1e9:.1f} GB "
                "left: set NANOGPT_ENV_CACHE to a folder on a larger disk"
            )

    def run(self, names: list[str], workers: int) -> None:
        # Threads that do not outlive the process: Ctrl-C need not wait for a shard of 200 MB.
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        for name in names:
            todo.put(name)

        def work() -> None:
            while True:
                try:
                    self._shard(todo.get_nowait())
                except queue.Empty:
                    return
                except Exception as error:
                    ended.put(error)
                else:
                    ended.put(None)

        for _ in range(min(workers, len(names))):
            threading.Thread(target=work, daemon=True).start()
        failures = []
        for _ in names:
            while ended.empty():  # a wait without end would hold Ctrl-C back on some systems
                threading.Event().wait(POLL_S)
            if (failure := ended.get()) is not None:
                failures.append(failure)
        if failures:
            raise BackendError("\n".join(str(failure) for failure in failures))

    def _shard(self, name: str) -> None:
        metadata, file = self._metadata[name], f"{name}.bin"
        for _ in range(ATTEMPTS):
            path = self._download(name)
            found = _sha256(path)
            # what the hub stores as a large file has its SHA-256 as its tag
            published = metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else ""
            wanted = self.corpus.sums().get(file) or published
            fault = _header_fault(path) or ("its SHA-256 is not the one published" if wanted not in ("", found) else "")
            if not fault:
                self.corpus.keep_sum(file, found)
                path.replace(self.corpus.target / file)
                return
            path.unlink()
        raise BackendError(f"{name}: {fault}, {ATTEMPTS} times: is there a proxy on the way that changes it?")

    def _download(self, name: str) -> Path:
        try:
            return Path(
                self.hub.hf_hub_download(
                    self.corpus.hub,
                    f"{name}.bin",
                    repo_type="dataset",
                    revision=self.corpus.revision,
                    local_dir=self.corpus.target / PART,
                    tqdm_class=self._bar(name),
                )
            )
        except Exception as error:
            raise BackendError(f"{name}: {_reason(error)}") from None

    def _bar(self, name: str) -> type:
        """What the hub's library reports its progress to."""
        told, total = self.on_bytes, self._metadata[name].size or 0

        class Bar(importlib.import_module("tqdm").tqdm):  # type: ignore[misc]  # comes with the hub's library
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options | {"disable": True})
                self.here = options.get("initial") or 0

            def update(self, n: float | None = 1) -> None:
                self.here += int(n or 0)
                told(name, self.here, total)

        return Bar


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise BackendError("fetching needs the hub's library: `pip install 'nanogpt_env[data]'`") from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_fault(path: Path) -> str:
    """Why it is no whole shard; the trainer's own check is `gpu_backend/data.py`'s."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4").tolist()
    if header[:2] != [MAGIC, VERSION]:
        return "not a token shard"
    return "" if size == HEADER_BYTES + 2 * header[2] else f"{size} bytes do not hold the {header[2]} tokens it counts"
