"""The fork server: a warm command must not differ from a cold one, and nothing may be left behind."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from segdistill import warm
from segdistill.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server needs Linux")

CLIENT = """
import sys
from segdistill import warm
code = warm.run(sys.argv[2:], target="job", preload=sys.argv[1].split(","))
sys.exit(99 if code is None else code)
"""
COLD = 99  # the client's exit code when there was no warm way


class Bench:
    """A folder with a program ``job.py``, a private place for the server, and what a test does with them."""

    def __init__(self, folder: Path, project: Path) -> None:
        self.folder, self.project = folder, project
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("SEGDISTILL_")}
        for name in ("PYTHONUNBUFFERED", "OMP_NUM_THREADS"):
            self.environ.pop(name, None)
        self.environ |= {"XDG_RUNTIME_DIR": str(folder), "SEGDISTILL_WARM_IDLE": "30", "PYTHONPATH": str(project)}
        self.private = folder / f"segdistill-warm-{os.getuid()}"
        self.preload = "random"

    def job(self, text: str) -> None:
        (self.project / "job.py").write_text("import os, random, signal, subprocess, sys, threading, time\n" + text)

    def command(self, *argv: str) -> list[str]:
        return [sys.executable, "-c", CLIENT, self.preload, *argv]

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        options = {"cwd": self.project, "env": self.environ, "text": True, **options}
        return subprocess.Popen(
            self.command(*argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    def run(self, *argv: str, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"cwd": self.project, "env": self.environ, "timeout": 60, **options}
        return subprocess.run(self.command(*argv), input=stdin, capture_output=True, text=True, **options)

    def servers(self) -> list[int]:
        """The server of this bench, and the commands it has forked, which keep its command line."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
                found += [int(entry.name)] if "_warm_server.py" in line and str(self.folder) in line else []
        return sorted(found)


def eventually(condition: Callable[[], bool], seconds: float = 15) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return warm.process_facts(pid)[1] != "Z"
    except OSError:
        return False


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    folder = Path(tempfile.mkdtemp(prefix="warm", dir="/tmp"))  # short: the path of a socket has at most 107 bytes
    bench = Bench(folder, tmp_path)
    yield bench
    shutil.rmtree(folder)
    assert eventually(lambda: not bench.servers()), "the server outlived its socket"


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('no such key')", 1, "no such key\n"),
        ("raise LookupError('boom')", 1, "LookupError: boom\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("os.close(1); os.open('/dev/full', os.O_WRONLY); print('lost')", 120, ""),
    ],
)
def test_a_command_ends_as_it_would_end_cold(bench: Bench, end: str, code: int, said: str) -> None:
    bench.job(end)
    cold = subprocess.run(
        [sys.executable, "-m", "job"], cwd=bench.project, env=bench.environ, capture_output=True, text=True
    )
    warm_one = bench.run()
    assert (warm_one.returncode, cold.returncode) == (code, code)
    assert warm_one.stderr.endswith(said) and cold.stderr.endswith(said)


def test_arguments_streams_folder_environment_and_umask_pass_to_one_and_the_same_server(bench: Bench) -> None:
    bench.job(
        "umask = os.umask(0)\n"
        "facts = [sys.argv[1:], os.getcwd(), os.environ['DVC_STAGE'], os.environ['DVC_LARGE'], umask, sys.path[0]]\n"
        "print(os.getppid(), sys.stdin.read(), *facts, __name__, __spec__.name, sep='|')\n"
        "print('to stderr', file=sys.stderr)\n"
    )
    servers = set()
    for stage, umask in (("prepare", 0o022), ("distill@kd-0", 0o077)):
        environ = {**bench.environ, "DVC_STAGE": stage, "DVC_LARGE": "x" * 100_000}
        done = bench.run("a b", "--flag", stdin="from stdin", env=environ, umask=umask)
        server, *facts = done.stdout.rstrip().split("|")
        servers.add(server)
        said = ["from stdin", "['a b', '--flag']", str(bench.project), stage, "x" * 100_000, str(umask), ""]
        assert (facts, done.stderr) == ([*said, "__main__", "job"], "to stderr\n")
    assert len(servers) == 1


def test_what_a_library_reads_at_its_import_leads_to_another_server(bench: Bench) -> None:
    bench.job("print(os.getppid(), os.environ.get('OMP_NUM_THREADS'), len(os.sched_getaffinity(0)))")
    first = bench.run().stdout.split()
    threads = bench.run(env={**bench.environ, "OMP_NUM_THREADS": "1"}).stdout.split()
    one = min(os.sched_getaffinity(0))
    pinned = bench.run(preexec_fn=lambda: os.sched_setaffinity(0, {one})).stdout.split()
    nice = bench.run(preexec_fn=lambda: os.nice(1)).stdout.split()
    assert (threads[1], pinned[2]) == ("1", "1")
    expected = 4 if len(os.sched_getaffinity(0)) > 1 else 3
    assert len({first[0], threads[0], pinned[0], nice[0]}) == expected


def test_edited_code_is_seen_by_the_next_command(bench: Bench) -> None:
    bench.job("import part; print(os.getppid(), part.value)")
    (bench.project / "part.py").write_text("value = 1\n")
    first = bench.run().stdout.split()
    (bench.project / "part.py").write_text("value = 'edited'\n")
    bench.job("import part; print(os.getppid(), part.value, 'main edited, too')")
    server, *said = bench.run().stdout.split(maxsplit=2)
    assert (first, [server, *said]) == ([server, "1"], [server, "edited", "main edited, too\n"])


def test_commands_do_not_share_their_random_numbers(bench: Bench) -> None:
    bench.job("print(os.getppid(), random.random())")
    one, two = bench.run().stdout.split(), bench.run().stdout.split()
    assert one[0] == two[0] and one[1] != two[1]


def test_threads_are_joined_and_exit_handlers_run(bench: Bench) -> None:
    bench.job(
        "import atexit\n"
        "atexit.register(print, 'handler')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "open('kept.txt', 'w').write('unflushed')\n"
    )
    assert bench.run().stdout == "thread\nhandler\n"
    assert (bench.project / "kept.txt").read_text() == "unflushed"


WAITING = (
    "seen = []\n"
    "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(s, lambda n, f: seen.append(n))\n"
    "print(os.getpid(), os.isatty(1), flush=True)\n"
    "until = time.time() + 30\n"
    "while not seen and time.time() < until: time.sleep(0.01)\n"
    "time.sleep(0.3); print(len(seen), flush=True); sys.exit(seen[0] + 40)\n"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_client_reaches_the_command_once(bench: Bench, number: int) -> None:
    bench.job(WAITING)
    client = bench.start()
    assert client.stdout is not None
    client.stdout.readline()
    client.send_signal(number)
    assert client.communicate(timeout=60)[0] == "1\n"
    assert client.returncode == number + 40


def test_an_unhandled_signal_ends_the_client_by_the_same_signal(bench: Bench) -> None:
    bench.job("print(1, flush=True); time.sleep(30)")
    client = bench.start()
    assert client.stdout is not None
    client.stdout.readline()
    client.terminate()
    assert client.wait(60) == -signal.SIGTERM


def test_ctrl_c_at_a_terminal_interrupts_once(bench: Bench) -> None:
    bench.job(WAITING)
    ours, theirs = pty.openpty()
    login = ["setsid", "--ctty", "--wait", *bench.command()]
    client = subprocess.Popen(login, cwd=bench.project, env=bench.environ, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    while b"\n" not in output:
        output += os.read(ours, 1024)
    os.write(ours, b"\x03")
    assert client.wait(60) == signal.SIGINT + 40
    output += os.read(ours, 1024)
    os.close(ours)
    said = output.decode().replace("^C", "").split()
    assert said[1:] == ["True", "1"]


def test_a_signal_that_the_caller_ignores_is_ignored_by_the_command(bench: Bench) -> None:
    bench.job("print(*(signal.getsignal(s).name for s in (signal.SIGHUP, signal.SIGTERM)))")
    bench.run()
    nohup = bench.run(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert nohup.stdout == "SIG_IGN SIG_DFL\n"


def test_a_killed_client_takes_its_command_and_the_helpers_of_it_along(bench: Bench) -> None:
    bench.job(
        "helper = subprocess.Popen(['sh', '-c', 'trap \"\" TERM; sleep 60 & wait; wait'])\n"
        "time.sleep(0.2); print(os.getpid(), helper.pid, flush=True); time.sleep(60)\n"
    )
    client = bench.start()
    assert client.stdout is not None
    processes = [int(word) for word in client.stdout.readline().split()]
    assert all(map(alive, processes))
    client.kill()
    client.communicate(timeout=60)
    assert eventually(lambda: not any(map(alive, processes)))
    assert len(bench.servers()) == 1  # and the server is there for the next one


def test_a_killed_server_takes_the_command_along_and_the_client_says_so(bench: Bench) -> None:
    bench.job("print(os.getpid(), os.getppid(), flush=True); time.sleep(60)")
    client = bench.start()
    assert client.stdout is not None
    command, server = (int(word) for word in client.stdout.readline().split())
    os.kill(server, signal.SIGKILL)
    assert client.communicate(timeout=60)[1] == warm.LOST + "\n"
    assert client.returncode == 1
    assert eventually(lambda: not alive(command))
    bench.job("print('again')")
    assert bench.run().stdout == "again\n"  # the dead server's socket is in nobody's way


def test_clients_that_come_at_once_start_one_server(bench: Bench) -> None:
    bench.job("time.sleep(0.2); print(os.getppid(), *sys.argv[1:]); sys.exit(int(sys.argv[1]))")
    clients = [bench.start(str(number)) for number in range(6)]
    said = [client.communicate(timeout=60)[0].split() for client in clients]
    assert [words[1] for words in said] == [str(number) for number in range(6)]
    assert [client.returncode for client in clients] == list(range(6))
    assert len({words[0] for words in said}) == 1


def test_an_idle_server_goes_and_leaves_nothing(bench: Bench) -> None:
    bench.environ["SEGDISTILL_WARM_IDLE"] = "0.1"
    bench.job("time.sleep(1.5); print('not idle while a command runs')")
    assert bench.run().stdout == "not idle while a command runs\n"
    assert eventually(lambda: not bench.servers())
    assert list(bench.private.iterdir()) == []


def test_the_server_goes_when_the_process_that_led_to_it_has_ended(bench: Bench) -> None:
    bench.job("print('done')")
    dvc = f"import subprocess, time; subprocess.run({bench.command()!r}); subprocess.run(['sleep', '0.5'])"
    subprocess.run([sys.executable, "-c", dvc], cwd=bench.project, env=bench.environ, check=True, timeout=60)
    assert eventually(lambda: not bench.servers(), seconds=10)  # the idle time is 30 s


def test_a_server_whose_socket_is_removed_finishes_its_command_and_goes(bench: Bench) -> None:
    bench.job("print(1, flush=True); time.sleep(2); print(2)")
    client = bench.start()
    assert client.stdout is not None
    client.stdout.readline()
    shutil.rmtree(bench.private)
    assert client.communicate(timeout=60)[0] == "2\n"
    assert eventually(lambda: not bench.servers())


def test_the_switch_turns_it_off(bench: Bench) -> None:
    bench.job("print('not reached')")
    assert bench.run(env={**bench.environ, "SEGDISTILL_WARM": "0"}).returncode == COLD
    assert not bench.private.exists()


@pytest.mark.parametrize("trap", ["open to others", "a link", "somebody else's"])
def test_a_folder_that_is_not_ours_alone_is_refused(bench: Bench, trap: str) -> None:
    bench.job("print('not reached')")
    if trap == "a link":
        (bench.folder / "elsewhere").mkdir(mode=0o700)
        bench.private.symlink_to("elsewhere")
    else:
        bench.private.mkdir(mode=0o700)
    if trap == "open to others":
        bench.private.chmod(0o755)
    if trap == "somebody else's":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(bench.private, 65534, 65534)
    done = bench.run()
    assert (done.returncode, done.stdout) == (COLD, "")
    assert bench.servers() == []


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_closed_stream_means_cold(bench: Bench, stream: int) -> None:
    bench.job("print('not reached')")
    assert bench.run(preexec_fn=lambda: os.close(stream)).returncode == COLD


def test_a_preloaded_library_with_a_thread_makes_the_server_refuse(bench: Bench) -> None:
    (bench.project / "threaded.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    bench.preload = "not_installed,threaded"
    bench.job("print('not reached')")
    assert (bench.run().returncode, bench.run().returncode) == (COLD, COLD)
    assert len(bench.servers()) == 1  # which says no at once, instead of a new one that imports everything again
    assert "do not survive a fork" in next(bench.private.glob("*.log")).read_text()


def test_a_light_stage_starts_the_server_without_waiting_for_it(bench: Bench) -> None:
    (bench.project / "slow.py").write_text("import time; time.sleep(3)")
    bench.preload = "slow"
    bench.job("print(os.getppid())")
    before = time.monotonic()
    assert bench.run(warm.LIGHT[0]).returncode == COLD
    assert time.monotonic() - before < 2.5
    (server,) = bench.servers()
    assert bench.run().stdout == f"{server}\n"


def test_a_bad_idle_time_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(bench.folder))
    monkeypatch.setenv("SEGDISTILL_WARM_IDLE", "soon")
    monkeypatch.delenv("SEGDISTILL_WARM", raising=False)
    with pytest.raises(UserError, match="SEGDISTILL_WARM_IDLE"):
        warm.ensure_started(target="job", preload=[])


TRAINING = """
import torch
from torch.utils.data import DataLoader, TensorDataset
preloaded = sorted(name for name in sys.modules if name.startswith("segdistill"))
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 5, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
images = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(0, 5, (16, 30, 30)))
for image, label in DataLoader(images, batch_size=4, shuffle=True, num_workers=2):
    loss = torch.nn.functional.cross_entropy(net(image), label)
    loss.backward()
    optimizer.step()
torch.export.export(net.eval(), (image,))
torch.distributed.init_process_group("gloo", init_method="file://" + os.path.abspath(sys.argv[1]), rank=0, world_size=1)
torch.distributed.all_reduce(loss.data)
product = torch.rand(300, 300).numpy() @ torch.rand(300, 300).numpy()
print(loss.item().hex(), float(product.sum()).hex(), torch.get_num_threads(), torch.cuda.is_initialized(), preloaded)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_after_the_real_preload_equals_training_cold_bit_for_bit(bench: Bench) -> None:
    bench.job(TRAINING)
    bench.preload = ",".join(warm.PRELOAD)
    forked = bench.start("warm")
    cold = [sys.executable, "-m", "job", "cold"]
    expected = subprocess.run(cold, cwd=bench.project, env=bench.environ, capture_output=True, text=True, timeout=300)
    assert expected.returncode == 0, expected.stderr
    said, errors = forked.communicate(timeout=300)
    assert (forked.returncode, said) == (0, expected.stdout), errors
