"""A bounded, cleaned copy of what a candidate prints: untrusted text, never a measurement."""

from __future__ import annotations

import os
import re
import threading

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # OSC and other strings: titles, links
    r"|\x1b.",
    re.DOTALL,
)
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


class BoundedLog:
    """Reads a pipe to its end in a thread and keeps `limit` bytes: the first half and the last half.

    The pipe is always drained, so that a candidate can neither fill our memory nor block on us.
    """

    def __init__(self, limit: int = 65536) -> None:
        self.limit = limit
        self._head, self._tail, self._seen = bytearray(), bytearray(), 0
        self._read_fd, self.write_fd = os.pipe()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def close_writer(self) -> None:
        """Call when the candidate process holds its copy of the writing end."""
        os.close(self.write_fd)

    def _drain(self) -> None:
        half = self.limit // 2
        while chunk := os.read(self._read_fd, 65536):
            with self._lock:
                self._seen += len(chunk)
                room = half - len(self._head)
                self._head += chunk[:room]
                self._tail += chunk[max(room, 0) :]
                del self._tail[: max(0, len(self._tail) - half)]
        os.close(self._read_fd)

    def text(self, timeout: float = 2.0) -> str:
        """The cleaned text so far; waits up to `timeout` seconds for the pipe to end."""
        self._thread.join(timeout)
        with self._lock:
            dropped = self._seen - len(self._head) - len(self._tail)
            head, tail = bytes(self._head), bytes(self._tail)
        if not dropped:
            return clean((head + tail).decode("utf-8", "replace"))
        # each by itself, so that an escape sequence cut off in the head swallows neither the rest nor this line
        parts = [clean(part.decode("utf-8", "replace")) for part in (head, tail)]
        return f"\n[... {dropped} bytes dropped ...]\n".join(parts)


def clean(text: str) -> str:
    """Without terminal escape sequences, control and invisible direction-changing characters."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
