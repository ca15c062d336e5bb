"""A cluster of namespaces, from bare nodes: head, two workers, and the laptop that `ray` is called from."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from tests.cluster.lab import HERE, PATIENCE, Lab, Machine, missing, which
from tests.conftest import ROOT
from tests.e2e.conftest import Project, make_project

DATABASE_PASSWORD = "s3cret-of-the-database"  # noqa: S105 - of a throw-away database


class PostgreSQL:
    """A server on a machine's loopback that asks for a password; run by a user other than root, as it insists."""

    def __init__(self, machine: Machine) -> None:
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = names.get("postgres") or names["nobody"]
        self.folder = Path(tempfile.mkdtemp(prefix="hificl-postgres-"))
        self.machine = machine
        secret = self.folder / "password"
        secret.write_text(DATABASE_PASSWORD)
        for path in (self.folder, secret):
            os.chown(path, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        data = str(self.folder / "data")
        subprocess.run(
            [*as_user, which("initdb"), "-D", data, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={secret}", "-N",
             "--locale=C", "--encoding=UTF8"],
            check=True, capture_output=True, cwd=self.folder,
        )  # fmt: skip
        self.command = [
            "env", f"--chdir={self.folder}", *as_user, str(which("postgres")), "-D", data, "-h", "127.0.0.1",
            "-k", str(self.folder),
        ]  # fmt: skip
        self.start()
        passfile = machine.home / ".pgpass"
        passfile.write_text(f"127.0.0.1:5432:*:mlflow:{DATABASE_PASSWORD}\n")
        passfile.chmod(0o600)
        self.query("create database mlflow", database="postgres")

    def start(self) -> None:
        """Start the server, for the first time or after its machine was lost."""
        (self.folder / "data/postmaster.pid").unlink(missing_ok=True)
        self.machine.start(*self.command, log=self.machine.folder / "postgres.log")

    def query(self, sql: str, database: str = "mlflow") -> list[list]:
        """Return the rows of a statement, asked from the machine itself."""
        code = (
            "import sys, json, psycopg\n"
            "with psycopg.connect(host='127.0.0.1', user='mlflow', dbname=sys.argv[1], autocommit=True) as c:\n"
            "    done = c.execute(sys.argv[2])\n"
            "    print(json.dumps(done.fetchall() if done.description else [], default=str))\n"
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            done = self.machine.run(sys.executable, "-c", code, database, sql, check=False)
            if done.returncode == 0:
                return json.loads(done.stdout)
            if "connect" not in done.stderr or time.monotonic() > deadline:
                raise AssertionError(done.stderr)
            time.sleep(0.25)

    def dump(self) -> str:
        """Return everything in the database, as text."""
        each = "query_to_xml('select * from ' || quote_ident(table_name), true, false, '')::text"
        tables = "from information_schema.tables where table_schema = 'public'"
        return self.query(f"select string_agg({each}, '') {tables}")[0][0]

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Cluster:
    """What a test may ask of the cluster."""

    def __init__(self, lab: Lab, project: Project) -> None:
        self.lab, self.project = lab, project
        self.submitted: subprocess.CompletedProcess | None = None  # the sweep, after the head was lost
        self.before: dict[str, int] = {}  # which trials had ended by then, and when
        (project.folder / "runs").mkdir()
        lab.share()
        self.head, self.workers = lab.machine("head"), [lab.machine("worker-1"), lab.machine("worker-2")]
        self.laptop = lab.machine("laptop")
        self.bin = lab.folder / "bin"
        self.bin.mkdir()
        if which("rsync") is None:
            shutil.copy(HERE / "rsync_over_ssh.py", self.bin / "rsync")
            (self.bin / "rsync").chmod(0o755)
        for machine in [self.head, *self.workers]:
            (machine.home / "hificl-lab").symlink_to(project.folder)
            machine.mount(project.folder / "runs")
        self.postgres = PostgreSQL(self.head)
        self.folder = lab.folder / "cluster"  # the laptop's copy of cluster/
        self.folder.mkdir()
        lab.cwd = self.folder
        shutil.copy(ROOT / "cluster/sweep", self.folder / "sweep")
        self._write_config()
        self.laptop.run("bash", "-c", "umask 077; ray get-auth-token --generate > /dev/null", PATH=self.path)

    @property
    def path(self) -> str:
        return f"{self.bin}:{ROOT / '.venv/bin'}:{os.environ['PATH']}"

    @property
    def token(self) -> str:
        return (self.laptop.home / ".ray/auth_token").read_text().strip()

    def _write_config(self) -> None:
        """Fill in the capitals of cluster.yaml, and nothing else but the size of a node."""
        text = (ROOT / "cluster/cluster.yaml").read_text()
        text = text.replace("HEAD_ADDRESS", self.head.address).replace(
            "[WORKER_ADDRESS]", str([w.address for w in self.workers])
        )
        text = text.replace("USER", "root", 1).replace("~/.ssh/id_ed25519", str(self.lab.key))
        text = text.replace("_workers: 1", "_workers: 2").replace("$RAY_HEAD_IP:6379", "$RAY_HEAD_IP:6379 --num-cpus=1")
        text = text.replace("$HIFICL_TRACKING", "--database postgresql+psycopg://mlflow@127.0.0.1/mlflow").replace(
            "export PATH=", f"export PATH={self.bin}:"
        )
        assert yaml.safe_load(text)["provider"]["head_ip"] == self.head.address
        (self.folder / "cluster.yaml").write_text(text)

    def ray(self, *words: str, check: bool = True, timeout: float = PATIENCE) -> subprocess.CompletedProcess:
        """Run `ray` on the laptop, in cluster/."""
        return self.laptop.run("ray", *words, check=check, timeout=timeout, PATH=self.path, RAY_AUTH_MODE="token")

    def start(self, *words: str, log: Path) -> subprocess.Popen:
        """Start `ray` on the laptop."""
        return self.laptop.start("ray", *words, log=log, PATH=self.path, RAY_AUTH_MODE="token")

    def on_head(self, *words: str, check: bool = True, timeout: float = PATIENCE) -> subprocess.CompletedProcess:
        """Run a command of the environment on the head, in the project."""
        line = 'cd ~/hificl-lab && exec "$@"'
        return self.head.run("bash", "-c", line, "bash", *words, check=check, timeout=timeout, PATH=self.path,
                             RAY_AUTH_MODE="token")  # fmt: skip

    def alive(self) -> list[dict]:
        """Return the nodes of the cluster that are alive, as the dashboard on the head's loopback has them."""
        ask = (
            '{ echo -n "header = \\"Authorization: Bearer "; cat ~/.ray/auth_token; echo "\\""; } |'
            " curl -s -K - 'http://127.0.0.1:8265/api/v0/nodes?detail=true'"
        )
        done = self.head.run("bash", "-c", ask, check=False)
        found = json.loads(done.stdout)["data"]["result"]["result"] if done.returncode == 0 else []
        return [node for node in found if node["state"] == "ALIVE"]

    def wait_for_nodes(self, count: int, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while (found := len(self.alive())) < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"{found} of {count} nodes came up\n{self.logs()}")
            time.sleep(1)

    def logs(self) -> str:
        """Return the ends of the head's logs, for a failure's message."""
        files = sorted((self.head.folder / "ray").glob("session_2*/logs/monitor*"))
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files)


@pytest.fixture(scope="session")
def load():
    """Processes that keep the machine busy until the end (`make test-cluster LOAD=25`): every wait is a long one.

    They are at nice 10: 25 of them leave the test two fifths of the processors, and it ends within the hour.
    """
    count = int(os.environ.get("HIFICL_TEST_LOAD") or 0)
    spin = ["nice", "-n", "10", sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(count)]
    yield
    for process in spinning:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, load):
    """The machines, before `ray up`."""
    why = missing()
    if why:
        pytest.skip(f"no cluster of namespaces: {why}")
    folder = tmp_path_factory.mktemp("cluster")
    project = make_project(folder / "hificl-lab")
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "setup.py"):
        (project.folder / name).symlink_to(ROOT / name)
    project.python("-m", "stages.subsample", "vqav2")
    (folder / "lab").mkdir()
    lab = Lab(folder / "lab")
    made = None
    try:
        made = Cluster(lab, project)
        yield made
    finally:
        lab.close()
        if made is not None:
            made.postgres.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
