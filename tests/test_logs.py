"""What a candidate prints: bounded, cleaned, and never in its way."""

import os
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

import logs
from logs import BoundedLog, clean


def logged(data, limit=65536, chunk=1 << 20):
    """The text after `data` was written and the writer closed its end."""
    log = BoundedLog(limit)
    for i in range(0, len(data), chunk):
        written = 0
        part = data[i : i + chunk]
        while written < len(part):
            written += os.write(log.write_fd, part[written:])
    log.close_writer()
    text = log.text(timeout=10)
    assert not log._thread.is_alive()
    return text


def test_short_output_is_kept_whole():
    assert logged("step 1: loss 4.25 é\n".encode()) == "step 1: loss 4.25 é\n"
    assert logged(b"") == ""


@pytest.mark.parametrize("size", [0, 1, 499, 500, 501, 999, 1000])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_up_to_the_limit_nothing_is_lost(size, chunk):
    data = bytes(ord("a") + i % 26 for i in range(size))
    assert logged(data, limit=1000, chunk=chunk) == data.decode()


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_beyond_the_limit_head_and_tail_are_kept(chunk):
    data = b"".join(b"%05d\n" % i for i in range(1000))
    text = logged(data, limit=1200, chunk=chunk)
    assert text == data[:600].decode() + "\n[... 4800 bytes dropped ...]\n" + data[-600:].decode()


def test_a_flood_is_bounded_and_never_blocks_the_writer():
    size = 50 << 20
    tracemalloc.start()
    began = time.monotonic()
    block = b"x" * 65535 + b"\n"
    log = BoundedLog()
    for _ in range(size // len(block)):
        assert os.write(log.write_fd, block)
    log.close_writer()
    text = log.text(timeout=10)
    seconds = time.monotonic() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 8
    assert peak < 4 << 20
    assert len(text) < 65536 + 100
    assert f"{size - 65536} bytes dropped" in text


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_even_a_tiny_limit_holds(limit):
    text = logged(b"abcdefgh" * 1000, limit=limit)
    assert len(text.replace("\n", "").split("[")[0]) <= 1
    assert len(text) < 50


def test_text_does_not_wait_for_a_writer_that_stays():
    log = BoundedLog()
    os.write(log.write_fd, b"hello")
    deadline = time.monotonic() + 5
    while log.text(timeout=0.01) != "hello":
        assert time.monotonic() < deadline
    began = time.monotonic()
    assert log.text(timeout=0.05) == "hello"
    assert time.monotonic() - began < 2
    log.close_writer()
    log._thread.join(5)


def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    threads = threading.active_count()
    for _ in range(20):
        logged(b"x")
    assert threading.active_count() == threads
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Hval_loss: 3.0", "val_loss: 3.0"),
        ("\x1b[?25l\x1b[38;5;196mx", "x"),
        ("\x1b]0;title\x07a", "a"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;never ends", ""),
        ("\x1bPdevice\x1b\\a\x1b_app\x1b\\b\x1b^pm\x1b\\c", "abc"),
        ("\x1bcreset", "reset"),
        ("\x1b(Bx", "Bx"),
        ("a\x1b", "a"),
        ("\x1b\x1b[31m[31mx", "[31m[31mx"),
        ("progress 1\rprogress 2\r\ndone\r", "progress 1\nprogress 2\ndone\n"),
        ("a\x00b\x07c\x08d\x7fe\x9bf\x85g", "abcdefg"),
        ("tab\tnew\nline", "tab\tnew\nline"),
        ("\u202egnp.exe\u202c", "gnp.exe"),
        ("a\u2066b\u2069c\u200fd\u061ce", "abcde"),
        ("a\u200bb\u200dc\ufeffd\u2060e\xadf", "abcdef"),
        ("a\u2028b\u2029c", "abc"),
        ("a\U000e0041\U000e0100b", "ab"),
        ("é 日本語 🚀", "é 日本語 🚀"),
    ],
    ids=lambda x: ascii(x)[:24],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned


def test_no_escape_or_bidi_character_survives_any_mixture():
    """Removing one sequence must not leave another."""
    parts = ["\x1b", "[", "]", "3", "1m", "\x07", "\\", "\x9b", "\u202e", "\r", "\n", "P", "a"]
    for a in parts:
        for b in parts:
            for c in parts:
                text = clean(a + b + c + a + c + b)
                assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)


def test_bytes_that_are_no_text_become_replacement_characters():
    assert logged(b"a\xff\xfeb\xc3") == "a\ufffd\ufffdb\ufffd"


def test_a_sequence_that_is_cut_off_hides_neither_the_gap_nor_the_tail():
    data = b"h" * 90 + b"\x1b]0;" + b"x" * 1000 + b"the end"
    text = logged(data, limit=200)
    assert "bytes dropped" in text
    assert text.endswith("the end")


@pytest.mark.parametrize("unit", ["\x1b[", "\x1b]", "\x1b[0", "\x1b]8;;", "\r", "\x1b\x1b"])
def test_cleaning_takes_linear_time(unit):
    began = time.monotonic()
    clean(unit * (65536 // len(unit)))
    clean(unit[:2] + unit[2:] * 65536)
    assert time.monotonic() - began < 1


def test_it_is_the_file_in_gpu_backend():
    assert Path(logs.__file__).parent.name == "gpu_backend"
