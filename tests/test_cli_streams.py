"""What the command line reads and writes: line ends, encodings, closed and full streams, terminals, early Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from standins import write_model

from cupyinfer.cli import generate
from cupyinfer.cli.main import main
from cupyinfer.progress import ProgressBars

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def loud(tmp_path_factory) -> str:
    """A model whose tokenizer spells every ordinary token as a letter that ASCII lacks."""
    directory = write_model(tmp_path_factory.mktemp("loud"))
    file = directory / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    made["decoder"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": "\u00fc"}
    file.write_text(json.dumps(made), encoding="utf-8")
    return str(directory)


def words_of(model: str, *words: str) -> list[str]:
    return [words[0], "--model", model, "--device", "cpu", "--max-tokens", "4", "--ignore-eos", *words[1:]]


def shell(line: str, model: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs ``line`` with $C generating four tokens."""
    words = " ".join(words_of(model, "generate"))
    command = f'C="{sys.executable} -m cupyinfer {words}"; {line}'
    environment = os.environ | variables
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


# --- what is read ---------------------------------------------------------------------------------------------------
CRLF = b"\xef\xbb\xbffirst\r\n\r\n  \r\nu2028\xe2\x80\xa8stays \x0c too\r\nlast"
PROMPTS = ["first", "u2028\u2028stays \x0c too", "last"]


def test_a_file_has_one_prompt_a_line_whatever_the_line_ends(tmp_path, model, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes(CRLF)
    assert main(words_of(model, "generate", "--json", "--file", str(file))) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == PROMPTS


def test_standard_input_is_read_as_a_file_is(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(CRLF), encoding="utf-8"))
    assert main(words_of(model, "generate", "--json", "--file", "-")) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == PROMPTS


def test_text_that_is_not_utf_8_is_named(model, capsys):
    assert main(words_of(model, "generate", "a\udcff")) == 2
    assert "cannot be tokenized: it is not valid UTF-8" in capsys.readouterr().err


WRONG_ANYWAY = [
    (("generate", ""), "the prompt is empty"),
    (("generate", "x", "--temperature", "-1"), "temperature=-1.0 is not allowed"),
    (("generate", "x", "--stop", ""), "stop=[''] is not allowed"),
    (("generate", "x", "--logprobs", "3"), "--logprobs is not allowed without --json"),
    (("generate", "x", "--prompt-logprobs", "0"), "--prompt-logprobs is not allowed without --json"),
    (("chat", "--top-p", "0"), "top_p=0.0 is not allowed"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_ANYWAY, ids=[" ".join(w) for w, _ in WRONG_ANYWAY])
def test_what_is_wrong_with_any_model_is_refused_before_one_is_loaded(words, message, capsys):
    assert main(words_of("/nowhere/model", *words)) == 2
    assert message in capsys.readouterr().err


# --- what is written ------------------------------------------------------------------------------------------------
def test_an_encoding_without_the_letters_gets_escapes(loud):
    done = shell("$C hello", loud, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\xfc" in done.stdout
    assert "\u00fc" in shell("$C hello", loud, PYTHONIOENCODING="utf-8").stdout


@pytest.mark.parametrize("closed", ["", "0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_swallow_what_is_said(model, closed):
    done = shell(f"$C hello {closed}", model)
    assert (done.returncode, "error" in done.stderr) == (0, False), done.stderr
    assert bool(done.stdout) is ("1>" not in closed)
    assert "cupyinfer:" not in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(model):
    done = shell("$C hello >/dev/full", model)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "cupyinfer: error: [Errno 28] No space left on device"


def on_terminal(model: str, *words: str, **variables: str) -> str:
    """What a person sees: all three streams are a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cupyinfer", *words_of(model, "generate", *words)]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | variables
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert running.wait(timeout=60) == 0, seen
    return seen.decode()


def test_on_a_terminal_the_dim_prompt_comes_before_the_text(model):
    seen = on_terminal(model, "hello")
    assert "\033[2mhello\033[0m" in seen
    assert "loading weights" in seen
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        seen = on_terminal(model, "hello", **plain)
        assert "\033[2mhello" not in seen
        assert "hello" in seen


def test_json_on_a_terminal_follows_the_bars(model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("hello\n" * 8)
    seen = on_terminal(model, "--json", "--file", str(file), "--max-tokens", "100")
    assert "prompts" in seen
    objects = [line.removeprefix("\033[2K") for line in seen.replace("\r", "\n").split("\n") if '"prompt"' in line]
    assert [json.loads(line[line.index("{") :])["prompt"] for line in objects] == ["hello"] * 8


def test_the_bar_of_many_prompts_moves_while_none_is_done(model, monkeypatch):
    shares = []

    class Watched(ProgressBars):
        def __init__(self, enabled=None):
            super().__init__(enabled=True)

        def due(self):
            return True

        def __call__(self, stage, done, total):
            shares.append(done / total)

    monkeypatch.setattr("cupyinfer.api.ProgressBars", Watched)
    assert main(words_of(model, "generate", "--n", "2", "--max-tokens", "50", "hello")) == 0
    assert len(set(shares)) > 20
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.1
    assert 0.8 < shares[-1] <= 1


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------
def test_ctrl_c_while_modules_are_imported_prints_no_page(model):
    code = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'datetime':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.modules.pop('datetime', None)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from cupyinfer.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words_of(model, "generate", "hello")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_interrupts_are_as_before_once_the_imports_are_done(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert signal.getsignal(signal.SIGINT) is before
    assert generate.__name__ in sys.modules
    capsys.readouterr()


def test_bars_are_due_ten_times_a_second_and_never_without_a_terminal(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bars = ProgressBars(enabled=True)
    assert [bars.due(), bars.due()] == [True, False]
    now[0] += 0.11
    assert bars.due()
    assert not ProgressBars(enabled=False).due()
