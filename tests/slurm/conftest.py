"""A Slurm of two nodes on this machine, started for these tests and ended with them; skipped where none is installed.

On Debian: apt-get install --no-install-recommends slurm-wlm munge. Two slurmd of one host are two nodes to Slurm, to
srun and to torchrun, each with a task of its own; they share what nodes of a cluster share, the file system.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")

_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPort={ports[0]}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
KillWait=5
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running Slurm, and the environment in which its commands find it."""

    root: Path
    environment: Mapping[str, str]

    def submit(self, command: Sequence[str], *, num_nodes: int, then: str | None = None) -> tuple[str, Path]:
        """Submit a batch job of whole nodes; return its id and the file that its output goes to.

        The job's script becomes the command, or goes on behind it with `then`.
        """
        output = self.root / f"job-{secrets.token_hex(4)}.log"
        called = " ".join(command)
        script = "#!/bin/bash\n" + (f"exec {called}\n" if then is None else f"{called}\n{then}\n")
        job = subprocess.run(
            ["sbatch", "--parsable", f"--nodes={num_nodes}", "--exclusive", f"--output={output}"],
            input=script,
            env=self.environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        return job.stdout.strip(), output

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def state(self, job: str) -> str:
        """Return what Slurm calls the job's state: RUNNING, COMPLETED, FAILED."""
        told = self.call("scontrol", "show", "job", job)
        return next(word.removeprefix("JobState=") for word in told.split() if word.startswith("JobState="))

    def wait(self, job: str, *, timeout_s: float) -> str:
        """Wait until a job has ended, and return its state."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (state := self.state(job)) not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
                return state
            time.sleep(0.5)
        self.call("scancel", job)
        pytest.fail(f"job {job} did not end within {timeout_s:.0f} s")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start it, wait until both nodes are idle, and end it."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")
    root = tmp_path_factory.mktemp("slurm")
    root.chmod(0o755)  # munged refuses a socket that others cannot reach
    (root / "state").mkdir()
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    (root / "slurm.conf").write_text(
        _CONFIGURATION.format(
            root=root,
            host=socket.gethostname(),
            user=pwd.getpwuid(os.getuid()).pw_name,
            ports=_free_ports(3),
            cpus=os.cpu_count(),
        )
    )
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}
    places = [f"--{name}-file={root}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={root}/munge.socket", *places],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    daemons = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    running = Cluster(root=root, environment=environment)
    try:
        _wait_for_nodes(running)
        yield running
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _wait_for_nodes(cluster: Cluster) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        told = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %T"], env=cluster.environment, capture_output=True, text=True
        )
        if told.stdout.strip() == f"{len(NODES)} idle":
            return
        time.sleep(0.5)
    logs = "\n".join(f"{path.name}: {path.read_text()[-500:]}" for path in cluster.root.glob("*.log"))
    pytest.fail(f"Slurm did not start within 30 s\n{logs}")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
