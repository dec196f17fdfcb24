"""The command `lora-limits` at its door: what it imports, what it refuses, how it ends."""

import signal
import subprocess
import sys

import pytest

import lora_limits
from lora_limits import cli
from tests.support import ROOT


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["theorems", "--help"], ["solve", "--help"], ["sove"]]
)
def test_what_needs_no_jax_imports_none(argv):
    """In a process of its own, for this one has JAX."""
    code = (
        "import sys\n"
        "from lora_limits.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'numpy', 'flax', 'rich'} & set(sys.modules), sorted(sys.modules)"
    )
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"lora-limits {lora_limits.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "the following arguments are required: COMMAND (lora-limits --help"),
        (["theorem"], "COMMAND: got 'theorem', expected one of "),
        (["theorems", "--jsn"], "unrecognized arguments: --jsn (lora-limits --help"),
        (["solve"], "the following arguments are required: FILE (lora-limits solve --help"),
        (["diagnose", "folder"], "the following arguments are required: --text"),
        (["pilot", "folder", "--steps", "2.5"], "--steps: got '2.5', expected an integer"),
        (["pilot", "folder", "--rate", "fast"], "--rate: got 'fast', expected a number"),
        (["pilot", "folder", "--steps"], "--steps: expected one argument"),
    ],
)
def test_bad_arguments_end_with_2_after_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    printed, told = capsys.readouterr()
    assert printed == ""
    assert told.startswith(f"error: {said}")
    assert told.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error_of_ours():
    """As with `lora-limits theorems | head`: no traceback, and what is buffered is dropped."""
    code = (
        "import sys\n"
        "from lora_limits import cli\n"
        "def endless():\n"
        "    while True: print('a line')\n"
        "sys.modules['endless'] = sys\n"
        "sys.endless = endless\n"
        "cli.COMMANDS['endless'] = ('endless', 'endless', '', {})\n"
        "sys.exit(cli.main(['endless']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdout.readline() == "a line\n"
        child.stdout.close()
        assert child.wait(timeout=60) == 1
        assert child.stderr.read() == ""


@pytest.mark.usefixtures("heeding_interrupts")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_program_that_is_told_to_end_leaves_nothing_and_ends_at_once(number, status, tmp_path):
    """Its temporary folder goes, and what would run as the interpreter is taken down does not."""
    code = (
        "import atexit, sys, tempfile, time\n"
        "from lora_limits import cli\n"
        "def slow(folder):\n"
        "    with tempfile.TemporaryDirectory(dir=folder):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "sys.modules['slow'] = sys\n"
        "sys.slow = slow\n"
        "cli.COMMANDS['slow'] = ('slow', 'slow', '', {'FOLDER': {}})\n"
        "atexit.register(print, 'taken down')\n"
        f"sys.argv = ['lora-limits', 'slow', {str(tmp_path)!r}]\n"
        "cli.program()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        printed, said = child.communicate(timeout=60)
    assert (child.returncode, printed) == (status, "")
    assert said in ("interrupted\n", "terminated\n")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_command_says_so_in_one_line(monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_limits.hardness.command.solve_command", interrupted)
    assert cli.main(["solve", "some.cnf"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
