"""The scripts that launch runs elsewhere: what they would do, what they refuse, and whole cycles against machines that a
stub plays."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rmft_jax.config import to_yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tpu_scripts"
PODS = Path(__file__).parent / "pods"
STAND_INS = ("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "squeue", "sacct", "scancel", "ssh")
CONFIG = ["--", "configs/enron_cpu.yaml", "training.steps=100", "name=it's"]
TPU = ["--name", "pod", "--zone", "us-east5-a", "--type", "v5p-128", "--bucket", "gs://b/runs"]
SLICES = ["--name", "pods", "--zone", "us-east5-a", "--type", "v6e-256", "--slices", "2", "--spot", "--bucket", "gs://b"]
GKE = ["--name", "pod", "--accelerator", "tpu-v6e-slice", "--topology", "4x8", "--image", "eu.gcr.io/p/rmft:1"]
GPUS = ["--name", "gpus", "--accelerator", "nvidia-h100-80gb", "--nodes", "4", "--image", "i", "--spot"]
SLURM = ["--name", "job", "--nodes", "4", "--gpus", "8", "--time", "12:00:00", "--partition", "gpu"]
HOSTS = ["--name", "two", "--hosts", "me@a,b"]
OUT = [*CONFIG, "out=/shared/run"]
GOLDEN = {
    "tpu-create": ["tpu.sh", "create", *TPU],
    "tpu-create-slices": ["tpu.sh", "create", *SLICES],
    "tpu-setup": ["tpu.sh", "setup", *TPU],
    "tpu-launch": ["tpu.sh", "launch", *TPU, *CONFIG],
    "tpu-watch-slices": ["tpu.sh", "watch", "--resume", *SLICES, *CONFIG],
    "tpu-logs": ["tpu.sh", "logs", *SLICES],
    "tpu-sync": ["tpu.sh", "sync", *TPU, "--to", "here"],
    "tpu-delete": ["tpu.sh", "delete", *TPU, "--project", "p"],
    "gke-create": ["gke.sh", "create", *GKE, "--cluster", "c", "--location", "l", "--machine", "ct6e-standard-4t", "--spot"],
    "gke-launch": ["gke.sh", "launch", *GKE, "--slices", "2", *OUT],
    "gke-launch-gpu": ["gke.sh", "launch", *GPUS, *OUT],
    "gke-launch-xpk": ["gke.sh", "launch", *GKE, "--by", "xpk", "--type", "v6e-32", "--cluster", "c", "--location", "l",
                       "--project", "p", *OUT],
    "gke-delete": ["gke.sh", "delete", "--name", "pod", "--pool", "--cluster", "c", "--location", "l"],
    "slurm-launch": ["slurm.sh", "launch", *SLURM, "--venv", "/opt/venv", "--interface", "ib0", "--hca", "mlx5", *OUT],
    "slurm-launch-node": ["slurm.sh", "launch", *SLURM, "--per", "node", "--container", "r#i:1", "--mounts", "/a:/a", *OUT],
    "slurm-launch-sif": ["slurm.sh", "launch", *SLURM, "--container", "rmft.sif", *OUT],
    "slurm-watch": ["slurm.sh", "watch", "--name", "job"],
    "ssh-setup": ["ssh.sh", "setup", *HOSTS],
    "ssh-launch": ["ssh.sh", "launch", *HOSTS, "--interface", "eth1", *OUT],
    "ssh-watch": ["ssh.sh", "watch", *HOSTS],
    "ssh-delete": ["ssh.sh", "delete", *HOSTS],
}  # fmt: skip


def call(script, *words, path=None, **more):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RMFT_")}
    environment |= {"PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]} | more
    return subprocess.run(["bash", SCRIPTS / script, *words], capture_output=True, text=True, env=environment, timeout=90)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_dry_run_prints_what_would_be_done_and_does_nothing(name, tmp_path):
    """RMFT_GOLDEN=write writes the expected files anew."""
    for stand_in in STAND_INS:  # whoever calls one of these fails
        (tmp_path / stand_in).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / stand_in).chmod(0o755)
    script, verb, *words = GOLDEN[name]
    done = call(script, verb, "--dry-run", *words, path=tmp_path)
    assert done.returncode == 0, done.stderr
    said, golden = done.stdout.replace(str(SCRIPTS), "SCRIPTS"), PODS / f"{name}.txt"
    if os.environ.get("RMFT_GOLDEN") == "write":
        golden.write_text(said)
    assert said == golden.read_text()
    done = subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr  # what is printed can be pasted


def test_the_commands_of_the_docs_are_taken():
    """All of the first block of docs/pods.md, in its environment, as dry runs."""
    block = (ROOT / "docs/pods.md").read_text().split("```sh\n")[1].split("```")[0]
    told = dict(re.findall(r"(RMFT_\w+)=(\S+)", block))
    lines = [line.split(" #")[0].split() for line in block.splitlines() if line.startswith("tpu_scripts/")]
    assert [words[1] for words in lines] == ["create", "setup", "launch", "watch", "logs", "sync", "delete"]
    for script, verb, *words in lines:
        done = call(Path(script).name, verb, "--dry-run", *words, **told)
        assert done.returncode == 0 and "gcloud" in done.stdout, done.stderr


REFUSED = [
    ("tpu.sh", ["fly"], "fly is no verb"),
    ("tpu.sh", ["create", "--name", "a"], "--zone is missing: give --zone VALUE, or set RMFT_ZONE"),
    ("tpu.sh", ["create", "--name", "A_", "--zone", "z", "--type", "v5p-8"], "--name is A_: it must be lower-case"),
    ("tpu.sh", ["create", "--name", "a", "--zone", "z", "--type", "v9-8"], "--type is v9-8: it must be"),
    ("tpu.sh", ["create", *SLICES, "--reserved"], "--spot and --reserved contradict each other"),
    ("tpu.sh", ["create", *TPU, "--fast"], "--fast is no option of tpu.sh create"),
    ("tpu.sh", ["create", *TPU, "--spot=yes"], "--spot takes no value"),
    ("tpu.sh", ["create", *TPU, "--slices"], "--slices has no value"),
    ("tpu.sh", ["create", *TPU, "--slices", "0"], "--slices is 0"),
    ("tpu.sh", ["setup", "--name", "a", "--zone", "z"], "--bucket is missing"),
    ("tpu.sh", ["setup", *TPU[:-1], "s3://b"], "--bucket is s3://b: it must be gs://"),
    ("tpu.sh", ["launch", *TPU], "no config"),
    ("tpu.sh", ["launch", *TPU, "--", "training.steps=1"], "training.steps=1 is no config"),
    ("tpu.sh", ["launch", *TPU, "--", "a.yaml", "b.yaml"], "b.yaml is no setting"),
    ("tpu.sh", ["launch", *TPU, "--", "a.yaml", "out=runs"], "out=runs is not shared"),
    ("tpu.sh", ["launch", *TPU, "--jaxlib", "0.99.0", *CONFIG], "no flags for v5p and jaxlib 0.99.0: add rows"),
    ("gke.sh", ["launch", *GKE, "--nodes", "2", *OUT], "--nodes is of GPUs"),
    ("gke.sh", ["launch", *GPUS, "--topology", "2x2", *OUT], "--topology and --slices are of TPUs"),
    ("gke.sh", ["launch", *GKE, "--chips", "5", *OUT], "has 32 chips, which 5 a node do not divide"),
    ("gke.sh", ["launch", *GKE, "--by", "xpk", *OUT], "--cluster is missing"),
    ("gke.sh", ["delete", "--name", "a", "--pool"], "--cluster is missing"),
    ("slurm.sh", ["launch", *SLURM, *OUT], "--venv or --container is missing"),
    ("slurm.sh", ["launch", *SLURM, "--venv", "v", "--container", "c", *OUT], "--venv and --container contradict"),
    ("slurm.sh", ["launch", *SLURM, "--venv", "v", "--mounts", "/a", *OUT], "--mounts is of containers"),
    ("slurm.sh", ["launch", *SLURM[:5], "0", "--per", "gpu", "--venv", "v", *OUT], "--per gpu needs GPUs"),
    ("slurm.sh", ["launch", *SLURM, "--venv", "v", *CONFIG], "out= is missing"),
    ("ssh.sh", ["launch", "--name", "a", *OUT], "--hosts is missing"),
    ("ssh.sh", ["launch", "--name", "a", "--hosts", "a,a", *OUT], "--hosts names a host twice"),
    ("ssh.sh", ["launch", *HOSTS, *CONFIG], "out=(not set) is not shared"),
]


@pytest.mark.parametrize(("script", "words", "says"), REFUSED, ids=[item[2][:30] for item in REFUSED])
def test_what_is_missing_or_contradicts_is_refused_in_one_line(script, words, says, tmp_path):
    for stand_in in STAND_INS:
        (tmp_path / stand_in).write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
        (tmp_path / stand_in).chmod(0o755)
    done = call(script, *words, path=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert re.fullmatch(f"error: .*{re.escape(says)}.*\n", done.stderr)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "slurm.sh", "ssh.sh"])
def test_help_names_every_option_that_is_read(script):
    done, text = call(script, "--help"), (SCRIPTS / script).read_text()
    read = re.search(r'^read_options "([^"]*)" \\?\n?\s*"([^"]*)"', text, re.MULTILINE)
    assert done.returncode == 0
    assert [name for name in f"{read[1]} {read[2]} dry-run".split() if not re.search(rf"--{name}\b", done.stdout)] == []


def test_a_manifest_is_yaml_and_says_how_many_processes_there_are(tmp_path):
    done = call("gke.sh", "launch", "--dry-run", *GKE, "--slices", "2", *OUT)
    jobset = yaml.safe_load(done.stdout.split("<<'END'\n")[1].removesuffix("END\n"))
    (slices,) = jobset["spec"]["replicatedJobs"]
    pods = slices["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    told = {item["name"]: item["value"] for item in container["env"]}
    assert (slices["replicas"], pods["completions"], told["RMFT_JOBSET_PROCESSES"]) == (2, 8, "16")
    check = subprocess.run(["bash", "-n"], input=container["args"][0], text=True, capture_output=True)
    assert check.returncode == 0 and "'name=it'\\''s'" in container["args"][0]


def flags(variable):
    rows = [line.split("\t") for line in (SCRIPTS / "xla_flags.tsv").read_text().splitlines() if line[0] != "#"]
    return sorted({row[4] for row in rows if row[1] == variable})


def test_xla_knows_the_flags():
    """The parser of the jaxlib at hand, which aborts at the first one that it does not know; so it does not know none."""
    parse = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    unknown = " --xla_gpu_no_such_flag=true"
    for text, works in ((" ".join(flags("XLA_FLAGS")), True), (" ".join(flags("XLA_FLAGS")) + unknown, False)):
        done = subprocess.run(parse, env=os.environ | {"XLA_FLAGS": text}, capture_output=True, text=True)
        assert (done.returncode == 0) == works, done.stderr
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag" in done.stderr


def test_libtpu_knows_the_flags():
    pytest.importorskip("libtpu", reason="pip install libtpu")
    parse = ("import jax; from jax.experimental.topologies import get_topology_desc as get; "
             "print(len(get(platform='tpu', topology_name='v5e:2x2').devices))")  # fmt: skip
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for more, works in (("", True), (" --xla_tpu_no_such_flag=true", False)):
        environment = os.environ | told | {"LIBTPU_INIT_ARGS": " ".join(flags("LIBTPU_INIT_ARGS")) + more}
        done = subprocess.run([sys.executable, "-c", parse], env=environment, capture_output=True, text=True)
        assert (done.stdout.strip() == "4") == works, done.stderr


def test_a_training_that_is_told_to_stop_is_waited_for(tmp_path):
    """SIGTERM to the shell alone, as in a container: the training saves and has its say."""
    lines = ["#!/bin/bash", "trap 'sleep 0.5; echo saved; exit 143' TERM", "echo on", "while :; do sleep 0.1; done", ""]
    (tmp_path / "rmft").write_text("\n".join(lines))
    (tmp_path / "rmft").chmod(0o755)
    make = f"source {SCRIPTS}/lib.sh; REST=(a.yaml); training_loop ''"
    loop = subprocess.run(["bash", "-c", make], capture_output=True, text=True)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", "-c", loop.stdout], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "on\n"
    process.terminate()
    assert process.communicate(timeout=60)[0] == "saved\ntraining ended with exit code 143\n" and process.returncode == 143


@pytest.fixture
def machines(tmp_path):
    """Put stand-ins on the PATH; return the folder that they play in, and how to call a script beside them."""
    bin, machine = tmp_path / "bin", tmp_path / "machine"
    bin.mkdir()
    machine.mkdir()
    for stand_in in STAND_INS:
        shutil.copy(PODS / "stub.sh", bin / stand_in)
        (bin / stand_in).chmod(0o755)
    shutil.copy(PODS / "python3.sh", machine / "python3")
    (machine / "python3").chmod(0o755)
    rmft = tmp_path / "rmft"
    rmft.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from rmft_jax.cli import main; main()" "$@"\n')
    told = {"STUB": str(tmp_path), "STUB_RMFT": str(rmft), "PYTHONPATH": str(ROOT)}
    told |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/programs"}
    told |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    yield tmp_path, lambda script, *words, **more: call(script, *words, path=bin, **told, **more)
    for pid in [*tmp_path.glob("workers/*/rmft/*.pid"), *tmp_path.glob("*.pid")]:
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True)


def calls(folder):
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def wait_for(sign, seconds=100):
    end = time.monotonic() + seconds
    while not sign():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_a_tpu_is_created_trains_is_preempted_goes_on_and_is_deleted(machines, tiny, tmp_path):
    """All by the scripts, with the real `rmft train` on the machine that the stub plays."""
    folder, do = machines
    config = tiny("name=cycle", "training.steps=300", "training.log_every=1", "checkpoint.count=1", "model.layers=1",
                  "checkpoint.every_steps=20", f"data={tiny().data_dir}", f"out={tmp_path / 'shared'}")  # fmt: skip
    (path := tmp_path / "config.yaml").write_text(to_yaml(config))
    where = ["--name", "pod", "--zone", "z", "--type", "v5litepod-4", "--spot", "--bucket", "gs://b", "--every", "0"]
    settings = ["--", str(path), f"out={tmp_path / 'shared'}"]
    for verb in (["create", *where], ["setup", *where], ["launch", *where, "--no-xla-flags", *settings]):
        done = do("tpu.sh", *verb)
        assert done.returncode == 0, done.stderr
    wait_for(lambda: any(path.name.isdigit() for path in config.run_dir.glob("checkpoints/*")))
    worker = folder / "workers/pod-0/rmft"
    pid = (worker / "train.pid").read_text().strip()
    subprocess.run(["kill", "-KILL", "--", f"-{pid}"], check=True)  # the machine is taken away
    (folder / "state").write_text("SUSPENDED\n")
    done = do("tpu.sh", "watch", *where)
    assert done.returncode == 75 and "pod: lost (SUSPENDED)" in done.stderr
    done = do("tpu.sh", "watch", "--resume", "--every=1", *where[:-2], "--no-xla-flags", *settings)
    assert done.returncode == 0 and done.stderr.endswith("pod: done\n"), done.stderr
    said = do("tpu.sh", "logs", *where).stdout
    assert re.search(r"^pod \S+: +going on from step \d+$", said, re.MULTILINE), said
    assert "training ended with exit code 0" in said
    records = [json.loads(line)["step"] for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert records == list(range(1, 301))
    (folder / "objects/b/pod").mkdir()
    (folder / "objects/b/pod/result").write_text("42")
    assert do("tpu.sh", "sync", *where, "--to", str(tmp_path / "copy")).returncode == 0
    assert (tmp_path / "copy/result").read_text() == "42"
    assert do("tpu.sh", "delete", *where).returncode == 0 and not (folder / "workers").exists()
    verbs = [words[4] for words in calls(folder) if words[:4] == ["gcloud", "compute", "tpus", "queued-resources"]]
    assert [verb for verb in verbs if verb != "describe"] == ["create", "delete", "create", "delete"]


def fake_rmft(folder, lines):
    """Have the machines run a shell script in the place of rmft."""
    (folder / "rmft").write_text("#!/bin/bash\n" + lines)


def test_a_jobset_is_submitted_watched_submitted_again_and_deleted(machines):
    folder, do = machines
    assert do("gke.sh", "launch", *GKE, *OUT).returncode == 0
    assert yaml.safe_load((folder / "jobset").read_text())["kind"] == "JobSet"
    (folder / "restarts").write_text("3")
    (folder / "state").write_text("Completed")
    done = do("gke.sh", "watch", "--name", "pod")
    assert done.returncode == 0 and done.stderr == "pod: done, after 3 restarts\n"
    (folder / "state").write_text("Failed")
    assert do("gke.sh", "watch", "--name", "pod").returncode == 1
    assert do("gke.sh", "resume", *GKE, *OUT).returncode == 0
    assert do("gke.sh", "delete", "--name", "pod").returncode == 0 and not (folder / "jobset").exists()
    done = do("gke.sh", "watch", "--name", "pod")
    assert done.returncode == 1 and "there is none" in done.stderr
    verbs = [words[1] for words in calls(folder) if words[0] == "kubectl"]
    assert [verb for verb in verbs if verb != "get"] == ["apply", "delete", "apply", "delete"]


def test_hosts_begin_again_when_one_is_lost(machines):
    """Both are told who they are; the one that is left exits with 75, the other one is away for a while."""
    folder, do = machines
    fake_rmft(folder, """
        echo "$JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $*"
        test -e "$STUB/saved" && exit 0
        touch "$STUB/started-$JAX_PROCESS_ID"; sleep 100""")  # fmt: skip
    assert do("ssh.sh", "setup", *HOSTS).returncode == 0
    assert do("ssh.sh", "launch", *HOSTS, *OUT).returncode == 0
    wait_for(lambda: (folder / "started-0").exists() and (folder / "started-1").exists())
    (folder / "down-b").touch()
    done = do("ssh.sh", "watch", "--every", "0", *HOSTS)
    assert done.stderr.count("a host does not answer") == 2
    assert done.returncode == 75 and "two: lost (lost)" in done.stderr
    (folder / "down-b").unlink()
    (folder / "saved").touch()
    assert do("ssh.sh", "resume", *HOSTS, *OUT).returncode == 0
    done = do("ssh.sh", "watch", "--every", "1", *HOSTS)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: "1 of 2" in do("ssh.sh", "logs", *HOSTS).stdout)  # the one may be through before the other has begun
    said = do("ssh.sh", "logs", *HOSTS).stdout
    assert "a:8476 1 of 2: train configs/enron_cpu.yaml training.steps=100 name=it's out=/shared/run" in said
    assert re.findall(r"^(\S+): training ended with exit code 0$", said, re.MULTILINE) == ["me@a", "b"]


def test_a_job_that_loses_a_process_is_queued_again(machines):
    """One of four tasks dies, the others end with 75 (srun passes on the highest code): the job asks for another turn."""
    folder, do = machines
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/activate").write_text(f"export PATH={folder}/venv/bin:$PATH\n")
    (folder / "venv/bin/rmft").write_text("""#!/bin/bash
        echo "task $SLURM_PROCID of $SLURM_NTASKS: $* with $NCCL_SOCKET_IFNAME"
        test -e "$STUB/saved" && exit 0
        test "$SLURM_PROCID" = 2 && kill -9 $$
        exit 75\n""")
    (folder / "venv/bin/rmft").chmod(0o755)
    where = ["--name", "job", "--nodes", "1", "--gpus", "4", "--venv", str(folder / "venv"), "--interface", "ib0",
             "--logs", str(folder / "logs"), "--every", "0"]  # fmt: skip
    done = do("slurm.sh", "launch", *where, *OUT)
    assert done.returncode == 0 and done.stdout == "4711\n", done.stderr
    wait_for(lambda: (folder / "requeued").exists())
    assert do("slurm.sh", "watch", *where).returncode == 1
    assert "exit code 137" in (folder / "job.log").read_text()
    (folder / "saved").touch()
    (folder / "requeued").unlink()
    assert do("slurm.sh", "resume", *where, *OUT).returncode == 0
    wait_for(lambda: "training ended" in (folder / "job.log").read_text())
    done = do("slurm.sh", "watch", "--every", "1", *where[:-2])
    assert done.returncode == 0 and done.stderr.endswith("job: COMPLETED\n"), done.stderr
    assert not (folder / "requeued").exists()
    said = do("slurm.sh", "logs", *where).stdout
    assert "3: task 3 of 4: train configs/enron_cpu.yaml training.steps=100 name=it's out=/shared/run with ib0" in said
    assert do("slurm.sh", "delete", *where).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="needs Google's gcloud")
def test_gcloud_knows_the_options():
    """Every option in the expected files is one that `gcloud ... --help` names."""
    text = "\n".join(path.read_text() for path in PODS.glob("*.txt"))
    used = {}
    for command, options in re.findall(r"^gcloud ((?:[a-z-]+ )+)(.*?)$", text, re.MULTILINE):
        command = re.sub(r" (pods?(-0)?|big).*", "", command.strip())
        used.setdefault(command, set()).update(re.findall(r"(?:^| )'?(--[a-z-]+)", options))
    assert len(used) >= 6
    for command, options in used.items():
        help = subprocess.run(["gcloud", *command.split(), "--help"], capture_output=True, text=True).stdout
        help = re.sub("\x1b\\[[0-9;]*m", "", help)
        wide = {"--quiet", "--project"}
        assert {option for option in options - wide if option not in help} == set(), command
