"""What of this machine a candidate may read: system, interpreter, and of the installed packages torch and what torch
needs. Nothing else that is installed, as a package can bring weights, or the very text that we validate on."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

PACKAGES = ("torch", "numpy", "safetensors")
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/alternatives", "/etc/ld.so.cache")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def roots() -> list[Path]:
    """Folders and files that interpreter and torch need, but for packages."""
    found = [Path(p) for p in _SYSTEM] + [
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(sys.executable).resolve().parent,
    ]
    return [p for p in dict.fromkeys(found) if p.exists()]


def is_link(path: Path) -> bool:
    """Whether it is a root that is another name of a folder in /usr."""
    return path.is_symlink() and path.parent == Path("/")


def covered(hidden: list[Path]) -> set[Path]:
    """Of the folders that nobody may see, and of those with packages, what lies in something that is shown."""
    shown = [*roots(), *packages()]
    return {h for h in [*hidden, *package_folders()] if any(v == h or v in h.parents for v in shown)}


def package_folders() -> list[Path]:
    """Where packages are installed below what is visible, for any version of Python: these folders are covered."""
    found = set()
    for root in [*roots(), Path("/usr/local")]:
        for folder in root.glob("lib*/python3*/*-packages"):
            if folder.resolve() == root.resolve() / folder.relative_to(root):  # lib64 is another name of lib
                found.add(folder)
    return sorted(found)


@functools.cache
def packages() -> list[Path]:
    """The installed files and folders of `PACKAGES` and of all that they require, as far as they are there."""
    wanted, seen = list(PACKAGES), set[str]()
    found = dict.fromkeys(path for folder in package_folders() for path in folder.glob("*.pth") if _only_paths(path))
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        found.update(dict.fromkeys(_module(name)))  # where pip has no list of files: a build of one's own, Debian's
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on other machines only
        # the first component: a package, a module, or what pip says about them; scripts lie further up
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        found.update(dict.fromkeys(Path(str(distribution.locate_file(top))) for top in sorted(tops)))
        required = [text for text in distribution.requires or () if "extra ==" not in text]
        wanted += [match[0] for text in required if (match := _NAME.match(text))]
    return [path for path in found if path.exists()]


def _only_paths(file: Path) -> bool:
    """Whether a `.pth` file names folders and nothing else: it is how torch may be found, or runs code."""
    try:
        return not any(line.startswith(("import ", "import\t")) for line in file.read_text("utf-8").splitlines())
    except (OSError, ValueError):
        return False


def _module(name: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(name.replace("-", "_"))
    except (ImportError, ValueError):
        return []
    if not spec or not spec.origin or not Path(spec.origin).exists():
        return []
    origin = Path(spec.origin)
    return [origin.parent if spec.submodule_search_locations else origin]
