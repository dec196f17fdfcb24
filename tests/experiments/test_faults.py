"""A sweep among faults: told to end at any moment, a full disk, readers that leave, two writers. No
point is lost or doubled, and what is said is one line.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.runner import store
from tests.support import ROOT
from tests.support.tools import refusal

LENGTHS = [str(length) for length in range(1, 61)]
FLAGS = ["--lengths", *LENGTHS, "--failing", "3", "17", "18", "60"]


def start(*flags, room=None, **streams):
    """The runner as a program, as from a shell. room: a full disk, no file may grow beyond so many
    KiB.
    """
    command = [sys.executable, "-m", "experiments", "toy.toml", *flags]
    if room is not None:
        # A limit set between fork and exec would meet JAX's warning of forks in this process.
        command = ["bash", "-c", f'ulimit -f {room}; exec "$@"', "bash", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(command, env=environment, text=True, **streams)


def run(*flags, **streams):
    """(exit status, what it says on stderr) of the runner as a program."""
    with start(*flags, **streams) as process:
        said = process.communicate(timeout=60)[1]
    return process.returncode, said


def written(folder="out"):
    """The rows of a folder, line by line."""
    lines = (line for path in Path(folder).glob("rows*") for line in path.read_text().splitlines())
    return [json.loads(line) for line in lines]


def assert_whole(folder="out"):
    """Every point is there once, as if nothing had happened; the others failed, as they should."""
    rows = written(folder)
    assert sorted(row["point"]["length"] for row in rows) == [int(length) for length in LENGTHS]
    assert len({row["key"] for row in rows}) == len(rows)
    assert [row["point"]["length"] for row in rows if row["status"] == "failed"] == [3, 17, 18, 60]
    assert all(
        row["metrics"]["count"] == row["point"]["length"] for row in rows if "metrics" in row
    )


pytestmark = pytest.mark.usefixtures("heeding_interrupts")


def taken_over(process):
    """Whether the program has begun, and not only its interpreter: whether it heeds SIGTERM."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def end_again_and_again(number, times):
    """Send a signal at random moments of as many runs; how many were still there to receive it."""
    draw, ended = random.Random(number), 0
    for _ in range(times):
        with start("--out", "out", *FLAGS, "--pause", "0.1") as process:
            while process.poll() is None and not taken_over(process):
                time.sleep(0.001)
            time.sleep(draw.choice([0, draw.uniform(0, 0.3), draw.uniform(0, 0.3)]))
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        if process.returncode == 1:
            continue  # it had come to its end, where some points fail
        ended += 1
        word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}.get(number)
        assert process.returncode == (128 + number if word else -number)
        assert said == (f"{word}: the same command goes on with what is left\n" if word else "")
    return ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_ended_at_random_moments_ends_like_one_left_alone(toy, number):
    assert end_again_and_again(number, 4) >= 2
    assert run("--out", "out", *FLAGS) == (1, "")
    assert_whole()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_ended_thirty_times_ends_like_one_left_alone(toy, number):
    # Half of them may come after the last point.
    assert end_again_and_again(number, 30) >= 15
    assert run("--out", "out", *FLAGS) == (1, "")
    assert_whole()


def test_a_signal_is_heeded_in_the_middle_of_a_computation(toy):
    """Which may not come back to the interpreter for minutes."""
    Path("mine").mkdir()
    Path("mine/long.py").write_text(
        "import hashlib\n"
        "from experiments.runner.config import Fields as Config\n"
        "X64 = None\n"
        "def points(config):\n    return [{}]\n"
        "def measure(point, config):\n"
        "    return {'x': hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9).hex()}\n"
    )
    toy("tests.support.toy_experiment", "mine.long")
    Path("toy.toml").write_text(Path("toy.toml").read_text().partition("lengths")[0])
    with start("--out", "out") as process:
        while not Path("out/manifest.json").exists():
            time.sleep(0.01)
        time.sleep(0.3)  # to be in it
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()


def test_a_full_disk_ends_the_sweep_in_one_line_and_loses_no_row(toy):
    status, said = run("--out", "out", *FLAGS, room=20)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("out/rows.jsonl: ")
    held = store.read("out")
    assert 10 < len(held) < 60
    assert run("--out", "out", *FLAGS) == (1, "")
    assert_whole()


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(toy):
    assert run("--smoke", "--out", "out") == (0, "")
    before = Path("out/manifest.json").read_bytes()
    status, said = run("--smoke", "--out", "out", room=1)
    assert (status, said) == (2, "out/manifest.json: File too large\n")
    assert Path("out/manifest.json").read_bytes() == before
    assert sorted(path.name for path in Path("out").iterdir()) == ["manifest.json", "rows.jsonl"]


def test_nobody_need_read_what_a_sweep_prints(toy):
    """A closed stdout, closed streams altogether, a reader that leaves, a log on a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    assert run("--out", "gone", *FLAGS, stdout=writer) == (1, "")
    os.close(writer)
    assert_whole("gone")
    with open("/dev/full", "w") as full:
        assert run("--out", "full", *FLAGS, stdout=full) == (1, "")
    assert_whole("full")
    command = f"'{sys.executable}' -m experiments toy.toml {' '.join(FLAGS)}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name, closed in (("one", ">&-"), ("both", ">&- 2>&-")):
        shell = f"{command} --out {name} {closed}"
        done = subprocess.run(["sh", "-c", shell], env=environment, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (1, b"")
        assert_whole(name)


def test_of_two_writers_one_is_refused_and_shards_do_not_meet(toy):
    with start("--smoke", "--out", "out", "--pause", "60") as process:
        while not (Path("out/manifest.json").exists()):
            time.sleep(0.01)
        status, said = run("--smoke", "--out", "out")
        assert (status, said.count("\n")) == (2, 1)
        assert said.startswith("out/rows.jsonl: got a file that another process is writing")
        process.kill()
        process.wait()
    parts = [start("--out", "parts", *FLAGS, "--shard", f"{n}/3") for n in (1, 2, 3)]
    for part in parts:
        assert part.communicate(timeout=60)[1] == ""
    rows = written("parts")
    assert len({row["key"] for row in rows}) == len(rows) == 60


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(toy, capsys):
    """/proc takes no folders, whoever asks."""
    assert refusal(capsys, "toy.toml", "--out", "/proc/none").startswith("/proc/none: ")
    Path("file").touch()
    assert refusal(capsys, "toy.toml", "--out", "file/inside").startswith("file/inside: ")


def test_lines_that_editors_leave(toy, capsys):
    """A byte order mark and NaN are read; a blank line in the middle is not a row."""
    assert main(["toy.toml", "--out", "out", "--lengths", "1", "2", "5"]) == 0
    path = Path("out/rows.jsonl")
    text = path.read_text()
    path.write_text(text.replace(': "nan"', ": NaN"), encoding="utf-8-sig")
    assert main(["toy.toml", "--out", "out", "--lengths", "1", "2", "5"]) == 0
    assert len(store.read("out")) == 3
    capsys.readouterr()
    path.write_text("\n" + text)
    assert refusal(capsys, "toy.toml", "--out", "out").startswith("out/rows.jsonl:1: got ''")
    assert path.read_text() == "\n" + text


def test_a_platform_that_is_not_there_is_refused_in_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments", str(ROOT / "configs" / "scaling.toml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"}
    options = ["--smoke", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("JAX_PLATFORMS: got 'cuda', expected")
    assert "Traceback" not in done.stderr
