"""Fetching shards from a hub: a real client against a server of ours that cuts, damages and withholds."""

import contextlib
import hashlib
import http.server
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter

import numpy as np
import pytest
from conftest import TINY
from rules import SGD, train
from test_cli import COMMAND, call, call_json

from nanogpt_env import datasets
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.errors import BackendError
from nanogpt_env.tiers import load_tier

HUB = "somebody/some-tokens"
LARGE = 8_000_000  # the client keeps pieces of 10 MB: what is to go on from the middle must be larger


def shard_bytes(seed, count):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, count
    ids = np.random.default_rng(seed).integers(1, 1024, count, dtype=np.uint16)
    ids[::500] = 0
    return header.tobytes() + ids.tobytes()


SHARDS = {
    "web_train_1": shard_bytes(1, LARGE),
    "web_train_2": shard_bytes(2, LARGE),
    "web_val": shard_bytes(3, 60_000),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that fetching uses. `faults`: what happens to the next answers, by file."""

    protocol_version = "HTTP/1.1"
    faults: dict
    asked: Counter

    def do_HEAD(self):
        if (body := self._body()) is not None:
            self._head(200, len(body), body)

    def do_GET(self):
        body = self._body()
        if body is None:
            return
        name = self.path.rpartition("/")[2]
        begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.asked[name, begin > 0] += 1
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        sent = body[begin:]
        if fault == "damage":
            sent = sent[:5000] + bytes([sent[5000] ^ 1]) + sent[5001:]
        self._head(206 if begin else 200, len(sent), body, begin)
        if fault == "cut":
            self.wfile.write(sent[: 3 * len(sent) // 4])
            self.wfile.flush()
            self.close_connection = True
            return
        if fault == "slow":
            self.wfile.write(sent[: 3 * len(sent) // 4])
            self.wfile.flush()
            time.sleep(600)
        self.wfile.write(sent)

    def _body(self):
        found = re.fullmatch(rf"/datasets/{HUB}/resolve/main/(\w+)\.bin", self.path.partition("?")[0])
        if not found or found[1] not in SHARDS:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return None
        return SHARDS[found[1]]

    def _head(self, status, length, body, begin=0):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef" * 2 + "01234567")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """(address, faults, count of requests by (file, whether it went on from the middle))"""
    kind = type("Hub", (Hub,), {"faults": {}, "asked": Counter()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server:
        yield f"http://127.0.0.1:{server.server_port}", kind.faults, kind.asked
        server.shutdown()


@pytest.fixture
def tier(tmp_path):
    """A folder of a tier on two training shards and a part of each half of the validation shard."""
    folder = tmp_path / "web-steps"
    shutil.copytree(TINY, folder)
    table = (folder / "env.toml").read_text().replace('name = "tiny-steps"', 'name = "web-steps"')
    data = ['corpus = "web"', 'train = ["web_train_1", "web_train_2"]']
    data += ['public = "web_val[0:3000]"', 'hidden = "web_val[3000:6000]"']
    table = table.replace('corpus = "shakespeare"', "\n".join(data))
    (folder / "env.toml").write_text(table)
    (folder / "web").mkdir()
    manifest = {"vocab_size": 1024, "special_ids": [0], "hub": HUB, "shards": [{"name": name} for name in SHARDS]}
    (folder / "web" / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def surroundings(hub, tmp_path):
    return {
        "HF_ENDPOINT": hub[0],
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "NANOGPT_ENV_CACHE": str(tmp_path / "cache"),
    }


def whole(tmp_path):
    return {path.stem: path.read_bytes() for path in (tmp_path / "cache" / "web").glob("*.bin")} == SHARDS


def test_fetch_then_check(hub, tier, surroundings, tmp_path):
    missing = call_json("data", "check", "--tier", tier, env=surroundings, code=1)
    assert [s["status"] for s in missing["shards"]] == ["missing"] * 3
    assert any(str(tmp_path / "cache" / "web") in line for line in missing["copy"])
    found = call_json("data", "fetch", "--tier", tier, env=surroundings)
    assert [s["status"] for s in found["shards"]] == ["ok"] * 3
    assert whole(tmp_path)
    assert not (tmp_path / "cache" / "web" / "part").exists()
    asked = sum(hub[2].values())
    assert call("data", "fetch", "--tier", tier, env=surroundings).returncode == 0
    assert sum(hub[2].values()) == asked == 3  # nothing twice
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "cache" / "web", check=True)
    path = call("data", "path", "--tier", tier, env=surroundings).stdout.strip()
    assert path == str(tmp_path / "cache" / "web")


def test_a_cut_connection_goes_on_where_it_was_cut(hub, tier, surroundings, tmp_path):
    hub[1]["web_train_1.bin"] = ["cut"]
    assert call("data", "fetch", "--tier", tier, env=surroundings).returncode == 0
    assert hub[2]["web_train_1.bin", True] == 1
    assert whole(tmp_path)


def test_bytes_that_arrive_damaged_are_fetched_again(hub, tier, surroundings, tmp_path):
    hub[1]["web_val.bin"] = ["damage"]
    assert call("data", "fetch", "--tier", tier, env=surroundings).returncode == 0
    assert whole(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    hub[1]["web_val.bin"] = ["damage", "damage"]
    done = call("data", "fetch", "--tier", tier, env=surroundings)
    assert done.returncode
    assert "web_val: its SHA-256 is not the one published, 2 times" in done.stderr
    assert not (tmp_path / "cache" / "web" / "web_val.bin").exists()
    assert call("data", "fetch", "--tier", tier, env=surroundings).returncode == 0  # the others were kept
    assert whole(tmp_path)


def test_a_file_that_was_changed_or_copied_without_its_sum(tier, surroundings, hub, tmp_path):
    assert call("data", "fetch", "--tier", tier, env=surroundings).returncode == 0
    folder = tmp_path / "cache" / "web"
    changed = bytearray(SHARDS["web_val"])
    changed[5000] ^= 1
    (folder / "web_val.bin").write_bytes(changed)
    found = call_json("data", "check", "--tier", tier, env=surroundings, code=1)
    assert [s["status"] for s in found["shards"]] == ["ok", "ok", "damaged"]
    (folder / "SHA256SUMS").unlink()
    (folder / "web_train_1.bin").write_bytes(SHARDS["web_train_1"][:-2])
    found = call_json("data", "check", "--tier", tier, env=surroundings, code=1)
    assert [s["status"] for s in found["shards"]] == ["damaged", "unchecked", "unchecked"]


def test_no_way_to_the_hub_names_the_commands_to_copy(tier, surroundings):
    offline = {**surroundings, "HF_ENDPOINT": "http://127.0.0.1:1"}
    done = call("data", "fetch", "--tier", tier, env=offline)
    assert done.returncode
    assert "rsync" in done.stderr
    assert f"nanogpt-env data check --tier {tier}" in done.stderr


def test_a_shard_that_the_hub_lacks(hub, tier, surroundings):
    path = tier / "web" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "hub": "somebody/else"}))
    done = call("data", "fetch", "--tier", tier, env=surroundings)
    assert done.returncode
    assert "somebody/else" in done.stderr
    path.write_text(json.dumps({**manifest, "shards": manifest["shards"][:2]}))
    done = call("data", "check", "--tier", tier, env=surroundings)
    assert "has no shard web_val" in done.stderr


def test_ctrl_c_ends_at_once_and_loses_no_whole_shard(hub, tier, surroundings, tmp_path):
    hub[1]["web_train_2.bin"] = ["slow"]
    with subprocess.Popen(
        [COMMAND, "data", "fetch", "--tier", tier], env={**surroundings, "PATH": ""}, stderr=subprocess.DEVNULL
    ) as process:
        until = time.monotonic() + 60
        while not hub[2]["web_train_2.bin", False] and time.monotonic() < until:
            time.sleep(0.05)
        second = call("data", "fetch", "--tier", tier, env=surroundings)
        assert "another process fetches" in second.stderr
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0  # the server would take ten minutes
    assert call("data", "fetch", "--tier", tier, env=surroundings).returncode == 0
    assert {name: n for (name, _), n in hub[2].items()} == {
        "web_train_1.bin": 1,
        "web_train_2.bin": 2,
        "web_val.bin": 1,
    }
    assert whole(tmp_path)
    assert not (tmp_path / "cache" / "web" / "part").exists()


def test_a_disk_that_is_too_small_is_found_before_anything_is_fetched(hub, tier, surroundings, monkeypatch):
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    corpus = datasets.Corpus(load_tier(tier, calibrated=False))
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**5))

    class Library:
        @staticmethod
        def hf_hub_url(*_, **__):
            return "a url"

        @staticmethod
        def get_hf_file_metadata(url):
            return type("Metadata", (), {"size": 120_000, "etag": ""})

    monkeypatch.setattr(datasets, "_hub", lambda: Library)
    with pytest.raises(BackendError, match="NANOGPT_ENV_CACHE"):
        datasets.fetch(corpus)
    assert not hub[2]


def test_a_run_on_fetched_shards(tier, surroundings, monkeypatch):
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    web = load_tier(tier, calibrated=False)
    with contextlib.closing(LocalBackend("plain")) as backend:
        hidden = (web.table.data.hidden,)
        with pytest.raises(BackendError, match="data fetch"):
            train(backend, web, SGD, shards=hidden)
        assert call("data", "fetch", "--tier", tier, env=surroundings).returncode == 0
        result = train(backend, web, SGD, shards=hidden)
    assert result.exit_reason == "completed", result.detail
    assert set(result.val_losses) == {"web_val[3000:6000]"}
