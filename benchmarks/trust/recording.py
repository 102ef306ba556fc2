"""What a command does to the files of one folder, recorded by strace.

strace sees every process and library, also those that write without Python's `os` (safetensors writes from Rust), which a
patched `os` would not. A record is checked: followed to its end it must give what is on the disk.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.trust.power_loss import ROOT, Data, Entries, Flush, Record, after, snapshot, tree_of

import plait

_CALLS = (
    "write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,"
    "mkdir,mkdirat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,open,openat,creat,lseek,sendfile,copy_file_range,mmap"
)
_LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?[^>]*$", re.DOTALL)
_DESCRIPTOR = re.compile(r"^(\d+|AT_FDCWD)<(.*)>$", re.DOTALL)
_HEX = re.compile(r"\\x([0-9a-f]{2})")


def recorded(args: Sequence[str], world: Path, log: Path) -> tuple[Record, int]:
    """Run ``plait ARGS`` in a folder under strace.

    Args:
        args: The command.
        world: Where it runs; what it does in this folder is recorded.
        log: Where strace writes.

    Returns:
        The record, and the command's exit code.

    Raises:
        RuntimeError: The record does not lead to what is in the folder now, so it would prove nothing.
    """
    world = world.resolve()
    record = snapshot(world)
    command = ["strace", "-f", "-z", "-y", "-xx", "-s", "1000000000", "--seccomp-bpf", "-qq", "-e", "signal=none",
               "-e", f"trace={_CALLS}", "-o", str(log), sys.executable, "-P", "-m", "plait", *args]  # fmt: skip
    done = subprocess.run(command, cwd=world, capture_output=True, text=True, check=False, env=_environment())
    live = _Live(record, world)
    with log.open(encoding="latin-1") as lines:
        for line in lines:
            live.take(line.rstrip("\n"))
    if after(record, len(record.steps), "kept") != tree_of(world):
        raise RuntimeError(f"what strace told of plait {' '.join(args)} is not what is on the disk")
    return record, done.returncode


def _environment() -> dict[str, str]:
    """The environment of a child that runs elsewhere: with this very plait."""
    return {**os.environ, "PYTHONPATH": str(Path(plait.__file__).parents[1])}


class _Live:
    """The folder as the running command sees it, followed call by call."""

    def __init__(self, record: Record, world: Path) -> None:
        self.record, self.world = record, str(world)
        self.files = dict(record.files)
        self.folders = {n: dict(entries) for n, entries in record.folders.items()}
        self.offsets: dict[str, int] = {}
        self.next = max([ROOT, *self.files, *self.folders]) + 1

    # Paths and nodes

    def parts(self, path: str) -> list[str] | None:
        """A path inside the folder as names; None where it lies elsewhere."""
        path = os.path.normpath(f"{self.world}/{path}" if not path.startswith("/") else path)
        if path == self.world:
            return []
        return path[len(self.world) + 1 :].split("/") if path.startswith(f"{self.world}/") else None

    def node(self, parts: list[str] | None) -> int | None:
        here: int | None = None if parts is None else ROOT
        for name in parts or ():
            here = None if here is None else self.folders.get(here, {}).get(name)
        return here

    def change(self, *changes: tuple[int, str, int | None]) -> None:
        """Entries set or taken away; those of one folder are one change."""
        for folder in dict.fromkeys(c[0] for c in changes):
            inside = tuple((name, node) for f, name, node in changes if f == folder)
            self.record.steps.append(Entries(folder, inside))
            for name, node in inside:
                if node is None:
                    self.folders[folder].pop(name, None)
                else:
                    self.folders[folder][name] = node

    def fill(self, node: int, content: bytes) -> None:
        self.files[node] = content
        self.record.steps.append(Data(node, content))

    def write(self, node: int, at: int, data: bytes) -> None:
        old = self.files[node].ljust(at, b"\0")
        self.fill(node, old[:at] + data + old[at + len(data) :])

    # Calls

    def take(self, line: str) -> None:
        """Follow one line of strace's."""
        if not (matched := _LINE.match(line)):
            if "exited with" in line or "killed by" in line or not line.strip():
                return
            raise RuntimeError(f"not understood: {line[:300]}")
        name, inside, result, opened = matched.groups()
        relative = inside.startswith('"') and not inside.startswith(
            '"\\x2f'
        )  # as in mkdir("out"): of the folder it runs in
        named = self.world.encode().hex() in line.replace("\\x", "") or self.world in line or "AT_FDCWD" in line
        if not named and not relative:
            return  # of other places, such as the libraries
        args = _split(inside)
        handler = getattr(self, f"on_{name.removesuffix('64')}", None)
        if handler is None:
            raise RuntimeError(f"{name} in the recorded folder is not followed: {line[:300]}")
        handler(args, int(result), _text(opened or ""))

    def place(self, folder: str, path: str) -> list[str] | None:
        """Where the path of an ...at call lies."""
        matched = _DESCRIPTOR.match(folder)
        start = "" if matched is None else _text(matched[2])
        name = _text(path.strip('"'))
        return self.parts(f"{start}/{name}" if start and not name.startswith("/") else name)

    def target(self, argument: str) -> tuple[str, int | None]:
        """A descriptor's key and node."""
        matched = _DESCRIPTOR.match(argument)
        if matched is None:
            return argument, None
        path = _text(matched[2]).removesuffix(" (deleted)")
        return f"{matched[1]} {path}", self.node(self.parts(path))

    def on_openat(self, args: list[str], result: int, opened: str) -> None:
        parts = self.parts(opened) if opened.startswith("/") else None
        if not parts:
            return
        node, flags = self.node(parts), args[2]
        self.offsets[str(result)] = 0
        if node is None and "O_CREAT" in flags:
            folder = self.node(parts[:-1])
            assert folder is not None
            self.files[self.next] = self.record.files[self.next] = b""
            self.change((folder, parts[-1], self.next))
            self.next += 1
        elif node is not None and "O_TRUNC" in flags and self.files[node]:
            self.fill(node, b"")
        if "O_APPEND" in flags and (node := self.node(parts)) is not None:
            self.offsets[str(result)] = len(self.files[node])

    def on_open(self, args: list[str], result: int, opened: str) -> None:
        self.on_openat(["", *args], result, opened)

    def on_lseek(self, args: list[str], result: int, opened: str) -> None:
        self.offsets[self.target(args[0])[0].split(" ")[0]] = result

    def on_write(self, args: list[str], result: int, opened: str) -> None:
        key, node = self.target(args[0])
        if node is not None:
            at = self.offsets.get(key.split(" ")[0], 0)
            self.write(node, at, _bytes(args[1])[:result])
            self.offsets[key.split(" ")[0]] = at + result

    def on_writev(self, args: list[str], result: int, opened: str) -> None:
        joined = "".join(re.findall(r'iov_base="((?:\\x[0-9a-f]{2})*)"', args[1]))
        self.on_write([args[0], f'"{joined}"'], result, opened)

    def on_pwrite(self, args: list[str], result: int, opened: str) -> None:
        if (node := self.target(args[0])[1]) is not None:
            self.write(node, int(args[3]), _bytes(args[1])[:result])

    def on_ftruncate(self, args: list[str], result: int, opened: str) -> None:
        if (node := self.target(args[0])[1]) is not None:
            self.fill(node, self.files[node][: int(args[1])].ljust(int(args[1]), b"\0"))

    def on_sendfile(self, args: list[str], result: int, opened: str) -> None:
        key, node = self.target(args[0])
        source = _DESCRIPTOR.match(args[1])
        if node is None or source is None:
            return
        inner = self.node(self.parts(_text(source[2])))
        content = Path(_text(source[2])).read_bytes() if inner is None else self.files[inner]
        start = int(re.sub(r"[^0-9].*", "", args[2].strip("[")) or 0)
        at = self.offsets.get(key.split(" ")[0], 0)
        self.write(node, at, content[start : start + result])
        self.offsets[key.split(" ")[0]] = at + result

    def on_mmap(self, args: list[str], result: int, opened: str) -> None:
        if "MAP_SHARED" in args[3] and "PROT_WRITE" in args[2] and self.target(args[4])[1] is not None:
            raise RuntimeError("a file of the recorded folder is written through memory, which strace does not see")

    def on_fsync(self, args: list[str], result: int, opened: str) -> None:
        if (node := self.target(args[0])[1]) is not None:
            self.record.steps.append(Flush(node))

    on_fdatasync = on_fsync

    def on_mkdirat(self, args: list[str], result: int, opened: str) -> None:
        if parts := self.place(args[0], args[1]):
            folder = self.node(parts[:-1])
            assert folder is not None
            self.folders[self.next], self.record.folders[self.next] = {}, {}
            self.change((folder, parts[-1], self.next))
            self.next += 1

    def on_mkdir(self, args: list[str], result: int, opened: str) -> None:
        self.on_mkdirat(["", *args], result, opened)

    def on_unlinkat(self, args: list[str], result: int, opened: str) -> None:
        if parts := self.place(args[0], args[1]):
            folder = self.node(parts[:-1])
            assert folder is not None
            self.change((folder, parts[-1], None))

    def on_unlink(self, args: list[str], result: int, opened: str) -> None:
        self.on_unlinkat(["", *args], result, opened)

    on_rmdir = on_unlink

    def on_renameat(self, args: list[str], result: int, opened: str) -> None:
        old, new = self.place(args[0], args[1]), self.place(args[2], args[3])
        if old is None and new is None:
            return
        node, source, target = self.node(old), self.node((old or [])[:-1]), self.node((new or [])[:-1])
        if not old or not new or None in (node, source, target):
            raise RuntimeError(f"a rename into or out of the recorded folder: {old} -> {new}")
        self.change((target, new[-1], node), (source, old[-1], None))  # type: ignore[arg-type]

    def on_rename(self, args: list[str], result: int, opened: str) -> None:
        self.on_renameat(["", args[0], "", args[1]], result, opened)

    on_renameat2 = on_renameat


def _split(text: str) -> list[str]:
    """Arguments of a call: all strings are in hexadecimal, so commas and brackets are strace's own."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [*found, text[start:].strip()]


def _bytes(text: str) -> bytes:
    if not text.startswith('"') or text.endswith("..."):
        raise RuntimeError(f"data that strace did not write out: {text[:100]}")
    return bytes.fromhex(text.strip('"').replace("\\x", ""))


def _text(text: str) -> str:
    return _HEX.sub(lambda m: chr(int(m[1], 16)), text)
