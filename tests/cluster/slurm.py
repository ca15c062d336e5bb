"""A SLURM of its own: munged, slurmctld and two slurmd with settings, keys and folders below one folder.

They run on loopback, or each slurmd on a machine of the lab's (`lab.Machine`), where the first has slurmctld too.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.lab import Machine
from tests.support.free_port import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
NODES = ("one", "two")
SETTINGS = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=60
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=2 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Return what this machine lacks for it; None: nothing."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if lacking:
        return f"{', '.join(lacking)} missing (Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "needs root"


class Slurm:
    """Daemons, and what is asked of them."""

    def __init__(self, folder: Path, machines: Sequence[Machine] = ()) -> None:
        self.folder, self.machines, self.daemons = folder, machines, list[subprocess.Popen]()
        ports = [free_port() for _ in range(1 + len(NODES))]
        folder.chmod(0o755)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        hosts = [(each.name, each.address) for each in machines] or [(socket.gethostname(), "127.0.0.1")] * len(NODES)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} CPUs=1 State=UNKNOWN"
            for node, (host, address), port in zip(NODES, hosts, ports[1:], strict=True)
        )
        settings, user = folder / "slurm.conf", pwd.getpwuid(os.geteuid()).pw_name
        filled = {"folder": folder, "host": hosts[0][0], "address": hosts[0][1], "ports": ports, "user": user}
        settings.write_text(SETTINGS.format(**filled, nodes=nodes))
        self.environment = {**os.environ, "PATH": SEARCHED, "SLURM_CONF": str(settings)}
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                    f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                    f"--seed-file={folder}/munge.seed")  # fmt: skip
        self.until((folder / "munge.socket").exists, "munged")
        self._start(*self.on(0, "slurmctld", "-D"))
        for number, node in enumerate(NODES):
            self._start(*self.on(number, "slurmd", "-D", "-N", node))
        self.until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(NODES)), "slurmd")

    def on(self, number: int, *words: str) -> list[str]:
        """Return the command that runs `words` on a node."""
        return self.machines[number].command(*words) if self.machines else list(words)

    def _start(self, *words: str) -> None:
        with (self.folder / f"{len(self.daemons)}.out").open("w") as file:
            daemon = subprocess.Popen(
                words, env=self.environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.daemons.append(daemon)

    def ask(self, *words: str, cwd: Path | None = None) -> str:
        """Run one of SLURM's programs; return what it says."""
        command = self.on(0, *words)
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """Return a job's or a task's state."""
        shown = self.ask("scontrol", "show", "job", "-o", job)
        return next((word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")), "gone")

    def until(self, holds, what: str, seconds: float = 120.0) -> None:
        """Wait for something."""
        end = time.monotonic() + seconds
        while not holds():
            dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not dead, f"{dead} ended: {self.logs()}"
            assert time.monotonic() < end, f"no {what} after {seconds:.0f} s: {self.ask('squeue')}{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        """Return the ends of all logs."""
        files = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "".join(f"\n--- {file.name}\n" + file.read_text(errors="replace")[-1500:] for file in files)

    def close(self) -> None:
        """End everything."""
        self.ask("scancel", "--full", "--user", pwd.getpwuid(os.geteuid()).pw_name)
        time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
