"""Machines made of Linux namespaces: each has its own network address, processes, home, host name and sshd.

What they share as a cluster shares a path lies on a machine of its own and is mounted over the network, with NFS's
caching (`Lab.share`); the rest of the file system is this machine's. Everything ends with the first process of each
namespace, so nothing is left behind; no interface of the machine itself is touched.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NETWORK = "10.77.0"
BINARIES = ("ip", "unshare", "nsenter", "mount", "setpriv", "ssh", "ssh-keygen", "sshfs", "sftp-server")
FOLDERS = ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh")  # where sftp-server lies
# As Linux' NFS client mounts by default: names, that a name is not there, and what a folder holds are kept for 30 s
# (acdirmin); a file's attributes and content are asked for when it is opened; writes are sent behind and are there
# after fsync or close. As with `local_lock=all`, no machine sees the locks of another.
CACHED_SECONDS = 30
MOUNTED = (
    "auto_cache,attr_timeout=0,dir_cache=yes,dcache_stat_timeout=0,"
    f"dcache_timeout={CACHED_SECONDS},entry_timeout={CACHED_SECONDS},negative_timeout={CACHED_SECONDS}"
)
FILES_PORT = 2049
WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")  # a test that is killed leaves no machine behind
PATIENCE = 900.0  # seconds: every wait here is for something that is seen, so a busy machine may take its time
PATHS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])


def which(name: str) -> str | None:
    """Return where a program is; PostgreSQL's are in a folder of their own on Debian."""
    folders = [str(folder) for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(name, path=os.pathsep.join([PATHS, *folders, *FOLDERS]))


def missing() -> str | None:
    """Return what keeps the machines from being made here, in one line; None where nothing does."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root here"
    absent = [name for name in (*BINARIES, "initdb", "postgres") if which(name) is None]
    if absent:
        packages = "iproute2, util-linux, openssh-client, openssh-sftp-server, sshfs, postgresql"
        return f"not installed: {', '.join(absent)} (Debian: {packages})"
    script = (
        "ip link add hificl0 type bridge && ip link add hificl1 type veth peer name hificl2 && mount -t tmpfs x /mnt"
    )
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--uts", "--ipc", "sh", "-c", script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    """One node: the first process of its namespaces, its home and its address."""

    def __init__(self, lab: Lab, name: str, number: int) -> None:
        self.lab, self.name, self.address = lab, name, f"{NETWORK}.{number}"
        self.folder = lab.folder / name
        self.home = self.folder / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        (self.folder / "ray").mkdir()
        self.log = self.folder / "machine.log"
        self._write_identity()
        self.mounted: list[Path] = []  # of what the lab's files serve
        self.boot()

    def boot(self) -> None:
        """Start the machine, for the first time or after `kill`."""
        (self.folder / "up").unlink(missing_ok=True)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*WITH_PARENT, "unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc",
                 "--kill-child=SIGKILL", "bash", "-c", self._first_process()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.pid = self._namespace_pid()
        self._connect()
        for folder in self.mounted:
            self._mount(folder)

    def _write_identity(self) -> None:
        users = Path("/etc/passwd").read_text().splitlines()
        mine = [f"root:x:0:0:root:{self.home}:/bin/bash" if row.startswith("root:") else row for row in users]
        if not any(row.startswith("sshd:") for row in mine):
            mine.append("sshd:x:74:65534::/run/sshd:/usr/sbin/nologin")
        (self.folder / "passwd").write_text("\n".join(mine) + "\n")
        hosts = [f"{machine.address} {machine.name}" for machine in [*self.lab.machines, self]]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        (self.home / ".ssh/authorized_keys").write_text(self.lab.key.with_suffix(".pub").read_text())
        (self.home / ".bashrc").write_text("")
        (self.home / ".profile").write_text("")
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {self.address}\nHostKey {self.lab.host_key}\nUsePAM no\nPasswordAuthentication no\n"
            "StrictModes no\nPermitRootLogin yes\nPidFile none\n"
            f"SetEnv PATH={os.environ['PATH']} LD_LIBRARY_PATH={os.environ.get('LD_LIBRARY_PATH', '')}\n"
        )

    def _first_process(self) -> str:
        q = shlex.quote
        sshd = which("sshd")
        serve = (
            f"{q(sshd)} -D -e -f {q(str(self.folder / 'sshd_config'))}"
            if sshd
            else shlex.join([sys.executable, str(HERE / "ssh_server.py"), self.address, str(self.lab.host_key)])
        )
        return f"""
            hostname {self.name}; ip link set lo up
            mount --bind {q(str(self.folder / "passwd"))} /etc/passwd
            mount --bind {q(str(self.folder / "hosts"))} /etc/hosts
            mkdir -p /tmp/ray /run/sshd
            mount --bind {q(str(self.folder / "ray"))} /tmp/ray
            mount -t tmpfs -o size=2g tmpfs /dev/shm
            export HOME={q(str(self.home))}
            cd; touch {q(str(self.folder / "up"))}
            until ip -4 addr show dev eth0 2>/dev/null | grep -q {self.address}; do sleep 0.1; done
            {serve} & wait
        """

    def _namespace_pid(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / "up").exists():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"{self.name} did not start: {self.log.read_text()}")
            time.sleep(0.05)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    def _connect(self) -> None:
        number = self.address.rpartition(".")[2]
        outer, inner = f"hifo{number}", "eth0"
        switch = self.lab.switch.pid
        within = ["nsenter", "-t", str(switch), "-n", "ip"]
        add = [*within, "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", str(self.pid)]
        for _ in range(1000):  # the kernel takes its time to remove a killed machine's end
            if subprocess.run(add, check=False, capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{self.name} gets no link to the bridge")
        subprocess.run([*within, "link", "set", outer, "master", "br0", "up"], check=True)
        own = ["nsenter", "-t", str(self.pid), "-n", "ip"]
        subprocess.run([*own, "addr", "add", f"{self.address}/24", "dev", inner], check=True)
        subprocess.run([*own, "link", "set", inner, "up"], check=True)
        subprocess.run([*own, "route", "add", "default", "via", f"{NETWORK}.1"], check=True)

    def mount(self, folder: Path) -> None:
        """Have a folder of the lab's files in its place, now and after each boot."""
        self.mounted.append(folder)
        self._mount(folder)

    def _mount(self, folder: Path) -> None:
        server = self.lab.files
        assert server is not None
        source, options = f"{server.address}:{folder}", f"directport={FILES_PORT},{MOUNTED}"
        for _ in range(1000):
            if self.run("sshfs", source, str(folder), "-o", options, check=False).returncode == 0:
                return
            time.sleep(0.1)  # the server is not up yet
        raise RuntimeError(f"{self.name} cannot mount {source}")

    def processes(self) -> dict[int, str]:
        """Return the command lines of its processes, by the ids that this side knows them by."""
        own = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "ns/pid").readlink() == own and (words := (entry / "cmdline").read_bytes()):
                    found[int(entry.name)] = words.replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
        return found

    def command(self, *words: str) -> list[str]:
        """Return the command that runs `words` on this machine."""
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", f"--wd={self.lab.cwd}", "--", *words]

    def environment(self, **more: str) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        return {**keep, "HOME": str(self.home), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", **more}

    def run(
        self, *words: str, check: bool = True, timeout: float = PATIENCE, **env: str
    ) -> subprocess.CompletedProcess:
        """Run a command here."""
        done = subprocess.run(
            self.command(*words), env=self.environment(**env), cwd=self.lab.cwd, capture_output=True, text=True,
            timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            said = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
            raise AssertionError(f"{self.name}: {shlex.join(words)} ended with {done.returncode}:\n{said}")
        return done

    def start(self, *words: str, log: Path, **env: str) -> subprocess.Popen:
        """Start a command here, which goes on."""
        with log.open("a") as out:
            return subprocess.Popen(
                self.command(*words), env=self.environment(**env), cwd=self.lab.cwd, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def listening(self) -> list[tuple[str, int]]:
        """Return address and port of every TCP socket that listens in this machine's network."""
        return sockets(Path(f"/proc/{self.pid}/net"))

    def kill(self) -> None:
        """Pull the plug: every process of the machine ends at once."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait(timeout=PATIENCE)


class Lab:
    """A bridge and the machines on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cwd = folder, folder
        self.machines: list[Machine] = []
        self.files: Machine | None = None
        self.key, self.host_key = folder / "key", folder / "host_key"
        for key in (self.key, self.host_key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        self.switch = subprocess.Popen(
            [*WITH_PARENT, "unshare", "--net", "--kill-child=SIGKILL", "--fork", "sh", "-c",
             "ip link add br0 type bridge && ip link set br0 up && exec sleep infinity"],
            start_new_session=True,
        )  # fmt: skip
        self._wait_for_bridge()

    def _wait_for_bridge(self) -> None:
        look = ["nsenter", "-t", str(self.switch.pid), "-n", "ip", "link", "show", "br0"]
        for _ in range(1000):
            if subprocess.run(look, capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.05)
        raise RuntimeError("the bridge did not come up")

    def machine(self, name: str) -> Machine:
        made = Machine(self, name, 11 + len(self.machines))
        self.machines.append(made)
        return made

    def share(self) -> None:
        """Start the machine that serves files; it is to be the first."""
        self.files = self.machine("files")
        self.files.start(sys.executable, str(HERE / "file_server.py"), self.files.address, str(FILES_PORT),
                         str(which("sftp-server")), log=self.files.log)  # fmt: skip

    def close(self) -> None:
        for machine in self.machines:
            machine.kill()
        self.switch.kill()
        self.switch.wait()


def sockets(net: Path) -> list[tuple[str, int]]:
    """Return address and port of the listening TCP sockets in a /proc/<pid>/net."""
    found = []
    for name in ("tcp", "tcp6"):
        file = net / name
        for row in file.read_text().splitlines()[1:] if file.exists() else ():
            local, state = row.split()[1], row.split()[3]
            if state == "0A":
                host, _, port = local.partition(":")
                found.append((address(host), int(port, 16)))
    return sorted(set(found))


def address(words: str) -> str:
    """Return the dotted form of an address in /proc/net/tcp; of IPv6 only what matters here."""
    import ipaddress

    raw = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    found = ipaddress.ip_address(raw)
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)
