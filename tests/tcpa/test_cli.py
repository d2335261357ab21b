"""Promise: a command ends with one line and its status, and keeps what was printed."""

import subprocess
import sys

import pytest

from tcpa.cli import BROKEN_PIPE, UsageError, command, require_writable, write_results

ENDINGS = {
    "usage": (UsageError("--epochs: got 0"), 2, "prog: --epochs: got 0\n"),
    "memory": (MemoryError("8 TiB"), 2, "prog: out of memory (8 TiB); ask for less\n"),
    "interrupted": (KeyboardInterrupt(), 130, "prog: interrupted\n"),
}


@pytest.mark.parametrize(("error", "status", "message"), ENDINGS.values(), ids=ENDINGS)
def test_an_end_that_is_no_accident_has_one_line(error, status, message, capsys):
    @command("prog")
    def main(argv):
        print("measured")
        raise error

    assert main([]) == status
    assert capsys.readouterr() == ("measured\n", message)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, FileNotFoundError])
def test_an_accident_is_not_hidden(error):
    @command("prog")
    def main(argv):
        raise error("ours")

    with pytest.raises(error, match="ours"):
        main([])


SCRIPT = """
import sys
from tcpa.cli import command

@command("prog")
def main(argv):
    {body}

sys.exit(main(None))
"""
BODIES = {
    "buffered": "print('row'); return 0",
    "many": "[print('row', flush=True) for _ in range(100_000)]; return 0",
    "usage": "print('row', flush=True) or sys.exit(2)",
    "rich": "import rich; [rich.print('row') for _ in range(100_000)]; return 0",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_reader_that_leaves_ends_the_program_quietly(body):
    arguments = [sys.executable, "-c", SCRIPT.format(body=body)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == BROKEN_PIPE


def test_a_program_without_output_runs():
    arguments = [sys.executable, "-c", SCRIPT.format(body="return 3")]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *arguments], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (3, b"")


def test_files_are_tried_before_and_refused_by_option(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"--json: got .*, expected a file that can be writ"):
            require_writable(path, "--json")
        with pytest.raises(UsageError, match=r"--json: .* could not be written \("):
            write_results(path, "{}", "--json")
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new" / "results.json")
    assert (tmp_path / "file").read_text() == "kept" and not any((tmp_path / "new").iterdir())
