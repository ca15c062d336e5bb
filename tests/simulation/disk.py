"""A disk in memory with the faults of real ones, and Python's own file functions turned to it.

Two kinds. A *local* disk keeps what was synced: a power cut undoes the last changes of folders in their order (as a
journalling file system does), and tears or empties files that were not synced. A *shared* one is NFS: each machine
keeps its writes until a file is synced or closed, and remembers which names were and were not in a folder for `memory`
seconds, until it lists that folder. Locks reach all machines, one machine, or do not exist.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import functools
import io
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.simulation.world import Host, Process, World

HOME = "/simulated"
_FIRST = 1 << 20  # file descriptors from here on are the simulation's


class Node:
    """A file or a folder."""

    def __init__(self, disk: Disk, *, folder: bool) -> None:
        disk.numbers += 1
        self.number, self.folder, self.dead = disk.numbers, folder, False
        self.names = 0
        self.data = bytearray()
        self.synced: bytes | None = None  # content that a power cut leaves; None: nothing is sure
        self.unsaved: dict[Host, list[tuple[int, bytes]]] = {}  # shared: what machines have not sent yet
        self.entries: dict[str, Node] = {}
        self.changed = disk.world.now
        self.locks: list[tuple[OpenFile, bool]] = []

    def content(self, host: Host) -> bytearray:
        if host not in self.unsaved:
            return self.data
        whole = bytearray(self.data)
        for at, part in self.unsaved[host]:
            _put(whole, at, part)
        return whole


@functools.lru_cache(maxsize=10_000)
def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path[len(HOME) :].split("/") if part and part != ".")


def _put(whole: bytearray, at: int, part: bytes) -> None:
    if len(whole) < at:
        whole.extend(bytes(at - len(whole)))
    whole[at : at + len(part)] = part


class Disk:
    """The tree, and what the machines know of it.

    Args:
        shared: NFS; else a local disk.
        memory: seconds that a machine remembers names for.
        locks: "all", "machine" or "none".
        slow: mean seconds of an operation.
    """

    def __init__(self, world: World, *, shared: bool, memory: float, locks: str, slow: float) -> None:
        self.world, self.shared, self.memory, self.locks, self.slow = world, shared, memory, locks, slow
        self.pace = 1 / slow  # operations a second
        self.numbers = 0
        self.root = Node(self, folder=True)
        self.undo: list[tuple[list[tuple[Node, str, Node | None]], set[int]]] = []
        self.unsynced: dict[int, Node] = {}
        self.known: dict[Host, dict[tuple[int, str], tuple[Node | None, float]]] = {}
        self.full = False
        self.sick: Callable[[Process, str], int | None] | None = None  # an errno, now and then
        self.hears: list[Callable[[str, str], None]] = []  # who is told of renames and removals
        self.numbers_of_files = _FIRST

    # -- finding -------------------------------------------------------------------------------------------------------

    def look(self, host: Host, folder: Node, name: str, *, fresh: bool = False) -> Node | None:
        if not folder.folder:
            raise OSError(errno.ENOTDIR, "not a folder")
        if folder.dead:
            raise OSError(errno.ESTALE, "stale")
        if not self.shared or not self.memory:
            return folder.entries.get(name)
        known = self.known.setdefault(host, {})
        if not fresh and (entry := known.get((folder.number, name))) is not None and entry[1] > self.world.now:
            if entry[0] is not None and entry[0].dead:
                raise OSError(errno.ESTALE, "stale")
            return entry[0]
        node = folder.entries.get(name)
        known[folder.number, name] = node, self.world.now + self.memory
        return node

    def parent(self, host: Host, path: str) -> tuple[Node, str]:
        """Return the folder that a name stands in, and the name."""
        *above, name = _parts(path)
        return self._walk(host, above, path), name

    def find(self, host: Host, path: str, *, fresh: bool = False) -> Node:
        above = _parts(path)
        if not above:
            return self.root
        return self._walk(host, above, path, fresh=fresh)

    def _walk(self, host: Host, names: Sequence[str], path: str, *, fresh: bool = False) -> Node:
        if not self.shared or not self.memory:  # as below, where nobody remembers a name: most of all walks
            node = self.root
            for name in names:
                if not node.folder or node.dead:
                    break
                below = node.entries.get(name)
                if below is None:
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
                node = below
            else:
                return node
        for again in (False, True):
            node = self.root
            try:
                for name in names:
                    below = self.look(host, node, name, fresh=again)
                    if below is None:
                        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
                    node = below
                return node
            except OSError as error:  # a machine that meets a stale handle walks the path once more, and asks
                if error.errno != errno.ESTALE or again:
                    raise
        raise AssertionError

    def knows(self, host: Host, folder: Node, name: str, node: Node | None) -> None:
        if self.shared and self.memory:
            self.known.setdefault(host, {})[folder.number, name] = node, self.world.now + self.memory

    def exists(self, path: str) -> bool:
        return self.truth(path) is not None

    def truth(self, path: str) -> Node | None:
        """Return what really is at a path, whatever machines remember."""
        node: Node | None = self.root
        for name in _parts(path):
            node = node.entries.get(name) if node is not None and node.folder else None
        return node

    # -- changing folders ----------------------------------------------------------------------------------------------

    def change(self, *changes: tuple[Node, str, Node | None]) -> None:
        before = []
        for folder, name, node in changes:
            before.append((folder, name, folder.entries.get(name)))
            if node is None:
                folder.entries.pop(name, None)
            else:
                folder.entries[name] = node
            folder.changed = self.world.now
        if not self.shared:
            self.undo.append((before, {folder.number for folder, *_ in changes}))

    def sync_folder(self, folder: Node) -> None:
        """Make all changes up to the folder's last one certain: a journal is written in order."""
        last = max((at for at, (_, folders) in enumerate(self.undo) if folder.number in folders), default=-1)
        del self.undo[: last + 1]

    def sync_file(self, node: Node) -> None:
        node.synced = bytes(node.data)
        self.unsynced.pop(node.number, None)

    def power_cut(self) -> None:
        """Leave what is certain of a local disk, and what the dice say of the rest."""
        dice = self.world.rng
        kept = dice.choice((0, len(self.undo), dice.randint(0, len(self.undo))))
        for before, _ in reversed(self.undo[kept:]):
            for folder, name, node in reversed(before):
                if node is None:
                    folder.entries.pop(name, None)
                else:
                    folder.entries[name] = node
                    node.dead = False
        self.undo.clear()
        for node in self.unsynced.values():
            now = bytes(node.data)
            torn = now[: dice.randint(0, len(now))]
            zeros = torn + bytes(len(now) - len(torn))
            node.data = bytearray(dice.choice((now, node.synced or b"", torn, zeros)))
            node.synced = bytes(node.data)
        self.unsynced.clear()
        for node in self.nodes(self.root):
            node.dead, node.locks = False, []

    def nodes(self, node: Node) -> Iterator[Node]:
        yield node
        for below in list(node.entries.values()):
            yield from self.nodes(below)

    def forget(self, host: Host) -> None:
        """A machine has gone down: what it knew and had not sent is lost."""
        self.known.pop(host, None)
        for node in self.nodes(self.root):
            node.unsaved.pop(host, None)


class OpenFile:
    """An open file or folder."""

    def __init__(self, disk: Disk, node: Node, flags: int, path: str) -> None:
        self.disk, self.node, self.flags, self.path = disk, node, flags, path
        self.process = disk.world.process
        disk.numbers_of_files += 1
        self.number = disk.numbers_of_files
        self.at = 0
        self.process.files.add(self)

    def write(self, at: int, part: bytes) -> None:
        disk, node, host = self.disk, self.node, self.process.host
        if disk.shared:
            if node.dead:
                raise OSError(errno.ESTALE, "Stale file handle", self.path)
            node.unsaved.setdefault(host, []).append((at, part))
        else:
            _put(node.data, at, part)
            disk.unsynced[node.number] = node
        node.changed = disk.world.now

    def send(self) -> None:
        """Shared: let the server have what this machine has written."""
        if not self.disk.shared:
            return
        for at, part in self.node.unsaved.pop(self.process.host, ()):
            _put(self.node.data, at, part)

    def close_by_kernel(self) -> None:
        if self.process.host.up and self.disk.shared:
            self.send()
        if self.node.locks:
            self.node.locks = [(file, alone) for file, alone in self.node.locks if file is not self]

    def truncate(self, size: int) -> None:
        self.send()
        del self.node.data[size:]
        self.node.data.extend(bytes(max(0, size - len(self.node.data))))
        if not self.disk.shared:
            self.disk.unsynced[self.node.number] = self.node


class Raw(io.RawIOBase):
    """What Python's buffers read from and write to."""

    def __init__(self, files: Files, number: int, mode: str) -> None:
        self.files, self.number, self.given = files, number, mode
        self.name = files.open[number].path

    def fileno(self) -> int:
        return self.number

    def readable(self) -> bool:
        return "r" in self.given or "+" in self.given

    def writable(self) -> bool:
        return "r" not in self.given or "+" in self.given

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.files.read(self.number, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        return self.files.write(self.number, bytes(data))

    def seek(self, offset: int, whence: int = 0) -> int:
        file = self.files.open[self.number]
        base = {0: 0, 1: file.at, 2: len(file.node.content(file.process.host))}[whence]
        file.at = base + offset
        return file.at

    def tell(self) -> int:
        return self.files.open[self.number].at

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self.number in self.files.open:
                self.files.close(self.number)

    def __del__(self) -> None:
        """Nothing: a process that was killed closes no file, the system does."""


@functools.cache
def _mode(mode: str) -> tuple[bool, str, bool, int]:
    """Return whether a mode of `open` is for text, the mode without that, whether it has a plus, and its flags."""
    bare = mode.replace("b", "").replace("t", "")
    plus = "+" in bare
    flags = {"r": 0, "w": os.O_CREAT | os.O_TRUNC, "x": os.O_CREAT | os.O_EXCL, "a": os.O_CREAT | os.O_APPEND}[bare[0]]
    flags |= os.O_RDWR if plus else (os.O_RDONLY if bare[0] == "r" else os.O_WRONLY)
    return "b" not in mode, bare, plus, flags


class Files:
    """`os`, `open` and `flock` for paths below `HOME`."""

    def __init__(self, world: World, disk: Disk) -> None:
        self.world, self.disk = world, disk
        self.open: dict[int, OpenFile] = {}

    def _begin(self, what: str, path: str = "", *, writes: bool = False) -> Host:
        """Let time go by, and let the disk fail where the dice say so."""
        world, disk = self.world, self.disk
        process = world.process
        world.sleep(-math.log(1.0 - world.rng.random()) / disk.pace)  # `expovariate`, without its call
        while process.host.cut_from_disk:  # a hard mount waits
            world.sleep(0.5)
        if writes and disk.full:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        if what == "open" and process.starved_until > world.now:
            raise OSError(errno.EMFILE, "Too many open files", path)
        if disk.sick is not None and (number := disk.sick(process, what)) is not None:
            raise OSError(number, os.strerror(number), path)
        return process.host

    # -- files ---------------------------------------------------------------------------------------------------------

    def os_open(self, path: str, flags: int, mode: int = 0o777) -> int:
        disk = self.disk
        host = self._begin("open", path)
        for again in (False, True):
            try:
                folder, name = disk.parent(host, path) if _parts(path) else (disk.root, "")
                if flags & os.O_CREAT:
                    if flags & os.O_EXCL and name in folder.entries:
                        raise FileExistsError(errno.EEXIST, "File exists", path)
                    node = folder.entries.get(name) if flags & os.O_EXCL else disk.look(host, folder, name)
                    node = node or folder.entries.get(name)
                    if node is None:
                        if disk.full:
                            raise OSError(errno.ENOSPC, "No space left on device", path)
                        if folder.dead:
                            raise OSError(errno.ESTALE, "Stale file handle", path)
                        node = Node(disk, folder=False)
                        node.names = 1
                        disk.change((folder, name, node))
                    disk.knows(host, folder, name, node)
                else:
                    node = disk.look(host, folder, name, fresh=again) if name else folder
                    if node is None:
                        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
                break
            except OSError as error:
                if error.errno != errno.ESTALE or again:
                    raise
                disk.known.get(host, {}).clear()
        if node.folder and flags & (os.O_WRONLY | os.O_RDWR):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        file = OpenFile(disk, node, flags, path)
        self.open[file.number] = file
        if flags & os.O_TRUNC:
            file.truncate(0)
        return file.number

    def os_close(self, number: int) -> None:
        self.close(number)

    def close(self, number: int) -> None:
        file = self.open.pop(number)
        file.process.files.discard(file)
        sends = self.disk.shared and file.process.host in file.node.unsaved
        if sends and self.world.process.alive:
            self._begin("close", file.path)
            if self.disk.full:
                file.node.unsaved.pop(file.process.host, None)
                file.close_by_kernel()
                raise OSError(errno.ENOSPC, "No space left on device", file.path)
        file.close_by_kernel()

    def read(self, number: int, size: int) -> bytes:
        self._begin("read", self.open[number].path)
        file = self.open[number]
        if file.node.folder:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", file.path)
        if self.disk.shared and file.node.dead:
            raise OSError(errno.ESTALE, "Stale file handle", file.path)
        data = bytes(file.node.content(file.process.host)[file.at : file.at + size])
        file.at += len(data)
        return data

    def write(self, number: int, data: bytes) -> int:
        file = self.open[number]
        if not self.world.process.alive:
            return len(data)  # a buffer that is thrown away, in a process that is no more
        self._begin("write", file.path)
        if file.flags & os.O_APPEND:
            file.at = len(file.node.content(file.process.host))
        if self.disk.full:
            data = data[: self.world.rng.randint(0, len(data))]
            if not data:
                raise OSError(errno.ENOSPC, "No space left on device", file.path)
        cut = self.world.rng.randint(0, len(data))
        file.write(file.at, data[:cut])
        if 0 < cut < len(data):
            self.world.sleep(self.world.rng.expovariate(1 / self.disk.slow))
        file.write(file.at + cut, data[cut:])
        file.at += len(data)
        return len(data)

    def os_pwrite(self, number: int, data: bytes, offset: int) -> int:
        self._begin("write", self.open[number].path, writes=True)
        self.open[number].write(offset, data)
        return len(data)

    def os_ftruncate(self, number: int, size: int) -> None:
        self._begin("truncate", self.open[number].path)
        self.open[number].truncate(size)

    def os_fsync(self, number: int) -> None:
        file = self.open[number]
        self._begin("fsync", file.path)
        if file.node.folder:
            self.disk.sync_folder(file.node)
        else:
            if self.disk.full and file.process.host in file.node.unsaved:
                raise OSError(errno.ENOSPC, "No space left on device", file.path)
            file.send()
            if not self.disk.shared:
                self.disk.sync_file(file.node)

    def os_fstat(self, number: int) -> os.stat_result:
        return self._stat(self.open[number].node, self.open[number].process.host)

    def builtin_open(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
        errors: str | None = None, newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        text, mode, plus, flags = _mode(mode)
        path = os.fspath(file)
        raw = Raw(self, self.os_open(path, flags), mode)
        if mode[0] == "a":
            raw.seek(0, 2)
        if self.open[raw.number].node.folder:
            raw.close()
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        if buffering == 0:
            return raw
        buffered: Any
        if plus:
            buffered = io.BufferedRandom(raw)
        elif mode[0] == "r":
            buffered = io.BufferedReader(raw)
        else:
            buffered = io.BufferedWriter(raw)
        return io.TextIOWrapper(buffered, encoding, errors, newline) if text else buffered

    # -- names ---------------------------------------------------------------------------------------------------------

    def _stat(self, node: Node, host: Host) -> os.stat_result:
        kind = stat.S_IFDIR | 0o777 if node.folder else stat.S_IFREG | 0o666
        time = node.changed + 1.7e9
        size = 0 if node.folder else len(node.content(host))
        whole = int(time)
        ns = int(time * 1e9)
        fields = (kind, node.number, 1, 1, 0, 0, size, whole, whole, whole)
        return os.stat_result(fields, {"st_atime_ns": ns, "st_mtime_ns": ns, "st_ctime_ns": ns, "st_mtime": time})

    def os_stat(self, path: str, *, dir_fd: Any = None, follow_symlinks: bool = True) -> os.stat_result:
        host = self._begin("stat", path)
        return self._stat(self.disk.find(host, path), host)

    def os_lstat(self, path: str, *, dir_fd: Any = None) -> os.stat_result:
        return self.os_stat(path)

    def os_access(self, path: str, mode: int, **_: Any) -> bool:
        return self.disk.exists(path)

    def os_listdir(self, path: str = ".") -> list[str]:
        host = self._begin("list", path)
        node = self.disk.find(host, path)
        if not node.folder:
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
        if self.disk.shared:  # which makes a machine forget what it thought of the folder
            known = self.disk.known.get(host, {})
            for key in [key for key in known if key[0] == node.number]:
                del known[key]
        names = sorted(node.entries)
        self.world.rng.shuffle(names)
        return names

    @contextmanager
    def os_scandir(self, path: str = ".") -> Iterator[Iterator[Any]]:
        host, names = self.world.process.host, self.os_listdir(path)
        folder = self.disk.find(host, path)
        found = [(name, folder.entries[name]) for name in names if name in folder.entries]
        yield iter([Entry(self, f"{path}/{name}", name, node) for name, node in found])

    def os_mkdir(self, path: str, mode: int = 0o777, *, dir_fd: Any = None) -> None:
        host = self._begin("mkdir", path, writes=True)
        folder, name = self.disk.parent(host, path)
        self._living(folder, path)
        if name in folder.entries:
            self.disk.knows(host, folder, name, folder.entries[name])
            raise FileExistsError(errno.EEXIST, "File exists", path)
        node = Node(self.disk, folder=True)
        node.names = 1
        self.disk.change((folder, name, node))
        self.disk.knows(host, folder, name, node)

    def _living(self, folder: Node, path: str) -> None:
        if folder.dead:
            raise OSError(errno.ESTALE, "Stale file handle", path)
        if not folder.folder:
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)

    def _there(self, host: Host, path: str) -> tuple[Node, str, Node]:
        """Return what a removal or rename takes: by what the machine remembers, then as the server has it."""
        folder, name = self.disk.parent(host, path)
        if self.disk.look(host, folder, name) is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        self._living(folder, path)
        node = folder.entries.get(name)
        if node is None:
            self.disk.knows(host, folder, name, None)
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return folder, name, node

    def os_unlink(self, path: str, *, dir_fd: Any = None) -> None:
        host = self._begin("unlink", path)
        folder, name, node = self._there(host, path)
        if node.folder:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        self.disk.change((folder, name, None))
        self.disk.knows(host, folder, name, None)
        self._lose(node)
        for hears in self.disk.hears:
            hears("unlink", path)

    def _lose(self, node: Node) -> None:
        node.names -= 1
        if node.names <= 0:
            node.dead = True

    def os_rmdir(self, path: str, *, dir_fd: Any = None) -> None:
        host = self._begin("rmdir", path)
        folder, name, node = self._there(host, path)
        if not node.folder:
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
        if node.entries:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        self.disk.change((folder, name, None))
        self.disk.knows(host, folder, name, None)
        node.dead = True

    def os_replace(self, source: str, target: str, **_: Any) -> None:
        self.rename(source, target)

    def os_rename(self, source: str, target: str, **_: Any) -> None:
        self.rename(source, target)

    def rename(self, source: str, target: str) -> None:
        source, target = os.fspath(source), os.fspath(target)
        disk = self.disk
        host = self._begin("rename", target)
        for again in (False, True):
            try:
                old, name, node = self._there(host, source)
                new, called = disk.parent(host, target)
                break
            except OSError as error:
                if error.errno != errno.ESTALE or again:
                    raise
                disk.known.get(host, {}).clear()
        self._living(new, target)
        gone = new.entries.get(called)
        if gone is node:
            return
        if gone is not None:
            if gone.folder and not node.folder:
                raise IsADirectoryError(errno.EISDIR, "Is a directory", target)
            if node.folder and not gone.folder:
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", target)
            if gone.folder and gone.entries:
                raise OSError(errno.ENOTEMPTY, "Directory not empty", target)
        disk.change((old, name, None), (new, called, node))
        disk.knows(host, old, name, None)
        disk.knows(host, new, called, node)
        if gone is not None:
            self._lose(gone)
        for hears in disk.hears:
            hears("rename", target)

    def os_link(self, source: str, target: str, **_: Any) -> None:
        host = self._begin("link", target)
        _, _, node = self._there(host, os.fspath(source))
        folder, name = self.disk.parent(host, os.fspath(target))
        self._living(folder, target)
        if name in folder.entries:
            self.disk.knows(host, folder, name, folder.entries[name])
            raise FileExistsError(errno.EEXIST, "File exists", target)
        node.names += 1
        self.disk.change((folder, name, node))
        self.disk.knows(host, folder, name, node)

    def os_utime(self, path: str, *_: Any, **__: Any) -> None:
        host = self._begin("utime", path)
        self.disk.find(host, path).changed = self.world.now

    def os_chmod(self, path: str, mode: int, **_: Any) -> None:
        host = self._begin("chmod", path)
        self.disk.find(host, path)

    def flock(self, file: Any, how: int) -> None:
        number = file if isinstance(file, int) else file.fileno()
        if number < _FIRST:
            fcntl.flock(number, how)
            return
        opened = self.open[number]
        self._begin("lock", opened.path)
        if self.disk.locks == "none":
            raise OSError(errno.ENOLCK, "No locks available", opened.path)
        alone = bool(how & fcntl.LOCK_EX)
        node = opened.node
        for other, other_alone in node.locks:
            seen = self.disk.locks == "all" or other.process.host is opened.process.host
            if other is not opened and seen and (alone or other_alone):
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable", opened.path)
        node.locks = [(other, kind) for other, kind in node.locks if other is not opened]
        node.locks.append((opened, alone))


class Entry:
    """What `os.scandir` gives."""

    __slots__ = ("_files", "_folder", "_number", "name", "path")

    def __init__(self, files: Files, path: str, name: str, node: Node) -> None:
        self._files, self.path, self.name, self._folder, self._number = files, path, name, node.folder, node.number

    def is_dir(self, **_: Any) -> bool:
        return self._folder

    def is_file(self, **_: Any) -> bool:
        return not self._folder

    def is_symlink(self) -> bool:
        return False

    def is_junction(self) -> bool:
        return False

    def inode(self) -> int:
        return self._number

    def stat(self, **_: Any) -> os.stat_result:
        return self._files.os_stat(self.path)

    def __fspath__(self) -> str:
        return self.path


_BY_PATH = (
    "stat", "lstat", "access", "listdir", "scandir", "mkdir", "unlink", "rmdir", "replace", "rename", "link", "utime",
    "chmod", "open",
)  # fmt: skip
_BY_NUMBER = ("close", "pwrite", "ftruncate", "fsync", "fstat")
REAL = {name: getattr(os, name) for name in (*_BY_PATH, *_BY_NUMBER)}
_REAL_OPEN = builtins.open


def turned(files: Callable[[], Files | None]) -> dict[tuple[Any, str], Any]:
    """Return what takes the place of Python's own file functions: the simulation for its paths, else as before."""

    def by_path(name: str) -> Callable[..., Any]:
        real, own = REAL[name], getattr(Files, f"os_{name}")

        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if type(path) is not str:
                if isinstance(path, int):
                    if path >= _FIRST and name in ("utime", "stat"):
                        raise OSError(errno.EINVAL, "not by number")
                    return real(path, *args, **kwargs)
                path = os.fspath(path)
            if isinstance(path, str) and path.startswith(HOME):
                return own(files(), path, *args, **kwargs)
            return real(path, *args, **kwargs)

        call.__name__ = name
        return call

    def by_number(name: str) -> Callable[..., Any]:
        real, own = REAL[name], getattr(Files, f"os_{name}")

        def call(number: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(number, int) and number >= _FIRST:
                return own(files(), number, *args, **kwargs)
            return real(number, *args, **kwargs)

        return call

    def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, int):
            path = os.fspath(file)
            if type(path) is str and path.startswith(HOME):
                return files().builtin_open(path, *args, **kwargs)
        return _REAL_OPEN(file, *args, **kwargs)

    own: dict[tuple[Any, str], Any] = {(os, name): by_path(name) for name in _BY_PATH}
    own |= {(os, name): by_number(name) for name in _BY_NUMBER}
    own |= {(builtins, "open"): opened, (io, "open"): opened}
    own |= {(shutil, "_use_fd_functions"): False, (shutil, "_USE_CP_SENDFILE"): False}
    own[shutil, "_copyxattr"] = lambda *_, **__: None
    own[shutil, "_samefile"] = lambda *_: False
    return own
