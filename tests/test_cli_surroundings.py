"""The command line in odd places: locales, closed and full streams, interruptions, other terminals."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.cli.output import foreseen
from plait.disk.locks import locked, writing_to
from plait.entry import SAME_PRODUCTS, SELDOM, SHORT_WAITS
from plait.errors import EnvironmentFault
from plait.progress import Progress, duration
from plait.training.checkpoints import open_root
from tests.command import PLAIT, call, one_object, plait
from tests.conftest import tiny_rows, unprivileged, write_rows

# --- odd surroundings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "surroundings", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "40"}, {"TERM": "dumb"}]
)
def test_odd_surroundings(surroundings):
    ended = plait("ls", "tasks", env={**os.environ, **surroundings})
    assert ended.returncode == 0 and "sst2" in ended.stdout and ended.stderr == ""


@pytest.mark.parametrize(("options", "shown"), [([], False), (["-W", "default"], True)])
def test_what_a_library_will_change_is_said_to_those_who_ask(options, shown):
    code = """
import sys, warnings
import plait.cli
from plait.entry import main
plait.cli.main = lambda **_: warnings.warn("`past_key_values` will be another", FutureWarning, stacklevel=2)
sys.argv = ["plait", "try"]
main()
"""
    ended = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0 and ("past_key_values" in ended.stderr) == shown, ended.stderr


def test_products_do_not_depend_on_the_number_of_threads():
    """MKL splits a long sum over threads where there are few rows, unless the command tells it not to before the first product."""
    code = """
import contextlib, sys
from plait.entry import main
sys.argv = ["plait", "--version"]
with contextlib.suppress(SystemExit):
    main()
import torch
generator, products = torch.Generator().manual_seed(0), []
x, w = (torch.randn(n, 1536, generator=generator) for n in (100, 384))
for threads in (1, 2):
    torch.set_num_threads(threads)
    products.append(torch.nn.functional.linear(x, w))
assert torch.equal(*products)
"""
    surroundings = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"}
    for told in ({}, {"MKL_CBWR": "COMPATIBLE"}):  # what somebody says himself stays
        check = f"{code}import os; assert os.environ['MKL_CBWR'] == {told.get('MKL_CBWR', SAME_PRODUCTS[1])!r}"
        ended = subprocess.run(
            [sys.executable, "-c", check if not told else check.replace("assert torch.equal(*products)", "")],
            env=surroundings | told, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr


def test_threads_do_not_wait_awake():
    """libgomp reads this once, when torch is loaded: it has to be there before, and what somebody says himself stays."""
    code = """
import contextlib, os, sys
from plait.entry import main
sys.argv = ["plait", "--version"]
with contextlib.suppress(SystemExit):
    main()
assert "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    surroundings = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for told, expected in (
        ({}, SHORT_WAITS[1]),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", code], env=surroundings | told, capture_output=True, text=True, timeout=120, check=False
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.split()[-1] == expected


def test_cycles_are_looked_for_seldom():
    """In the command alone: what a library sets would hold for everybody's process."""
    for begin, expected in (("import plait.merging", "before"), ("main()", repr(SELDOM))):
        code = f"""
import contextlib, gc, sys
before = gc.get_threshold()
from plait.entry import main
sys.argv = ["plait", "--version"]
with contextlib.suppress(SystemExit):
    {begin}
assert gc.isenabled() and gc.get_threshold() == {expected}, gc.get_threshold()
"""
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("words", [["--version"], ["merge", "a", "b", "--method", "ties", "--out", "out"]])
def test_what_a_command_made_is_not_looked_through_at_its_end(words, tmp_path):
    """That takes a third of a second where torch is loaded; and a merge in somebody's own process keeps none of his garbage."""
    for seed, name in enumerate("ab"):
        g = torch.Generator().manual_seed(seed)
        factors = LoraFactors(torch.randn(2, 8, generator=g), torch.randn(6, 2, generator=g))
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, Adapter(name, "base", {"layers.0.q": factors}))
    library = "from plait.merging import *; answer(MergeRequest(['a', 'b'], Path('own'), MergeSpec('ties')))"
    for begin, frozen in ((f"sys.argv[1:] = {words!r}; main()", True), (library, False)):
        code = f"""
import atexit, gc, sys
from pathlib import Path
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))  # what is registered first runs last
from plait.entry import main
{begin}
"""
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1] == f"frozen {frozen}"


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 2), ("2>&-", 2), (">&- 2>&-", 2), ("> /dev/full", 2), ("2> /dev/full", 2)]
)
def test_closed_and_full_streams_change_no_exit_code(redirection, code):
    line = f"'{sys.executable}' -m plait ls nothing --json {redirection}"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == code and "Traceback" not in ended.stderr and "Exception" not in ended.stderr


def test_a_reader_that_goes_away_is_no_error():
    line = f"'{sys.executable}' -m plait ls --json | head -c 10; echo ${{PIPESTATUS[0]}} >&2"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == '{"schema":' and ended.stderr == "0\n"


def test_a_full_stdout_is_a_fault_of_the_environment():
    ended = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m plait ls tasks > /dev/full"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 4 and "No space left" in ended.stderr and ended.stderr.count("\n") == 1


def test_no_room_for_temporary_files_is_a_fault_of_the_environment():
    """A limit of no bytes a file (ulimit -f 0), under which what Python says is what is foreseen."""
    program = "import resource, tempfile; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); tempfile.gettempdir()"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: ")
    said = foreseen(FileNotFoundError(2, last.partition("] ")[2]))
    assert said is not None and said.exit_code == 4 and "ulimit -f" in str(said)
    assert foreseen(FileNotFoundError(2, "No such file or directory")) is None


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "/proc/x.stats.safetensors"])
def test_a_place_where_nothing_can_be_made(place):
    with pytest.raises(EnvironmentFault, match="nothing can be made there") as raised, locked(Path(place)):
        pass
    assert raised.value.where == place


@pytest.mark.parametrize("command", ["inspect", "check", "convert"])
@pytest.mark.parametrize("mode", [0o000, 0o700])
def test_a_folder_that_another_user_shut(capsys, public_path, command, mode):
    folder = public_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    call(capsys, command, folder, "--out", public_path / "out")  # what it imports is there: others may not read it
    more = ["--out", public_path / "out"] if command == "convert" else []
    for path in (folder, folder / "adapter_model.safetensors"):
        with unprivileged(folder, mode):
            code, _, err = call(capsys, command, path, *more)
        assert code == 3 and f"{folder}: may not be read by this user" in err and err.count("\n") == 1


def test_errors_of_writing_name_a_folder_that_is_not_staged(tmp_path):
    """What a full disk says of a write names no file: checkpoints lie in folders that are not staged."""
    with pytest.raises(OSError, match="No space left") as raised, writing_to(tmp_path / "checkpoints"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / "checkpoints") in str(foreseen(raised.value))
    with pytest.raises(OSError, match="No space left") as raised, writing_to(tmp_path / "checkpoints"):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))
    assert str(foreseen(raised.value)).startswith(f"{tmp_path}/file")


def test_a_full_disk_under_checkpoints_is_told_with_their_folder(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as raised:
        open_root(tmp_path / ".a.checkpoints", {})
    assert str(tmp_path / ".a.checkpoints") in str(foreseen(raised.value))


def test_a_name_that_is_no_unicode():
    ended = subprocess.run(
        [*map(os.fsencode, PLAIT), b"run", b"\xff\x1b.yaml"], capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == 3 and b"\x1b" not in ended.stderr and b"no such recipe" in ended.stderr


def holds(folder, name):
    """Whether a file of that name lies in it; folders in it may be renamed while one looks."""
    return any(name in files for _, _, files in os.walk(folder))


@pytest.mark.parametrize(
    ("sent", "times", "code", "word"),
    [
        (signal.SIGINT, 1, 130, "interrupted"),
        (signal.SIGINT, 2, 130, "interrupted"),
        (signal.SIGTERM, 1, 143, "terminated"),
    ],
    ids=["once", "twice", "by a scheduler"],
)
def test_interrupted(recipe_file, tmp_path, sent, times, code, word):
    out = tmp_path / "out"
    running = subprocess.Popen(
        [*PLAIT, "run", str(recipe_file), "--out", str(out), "--json", "--set", "training.steps=500"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads; background jobs ignore it)
    )  # fmt: skip
    end = time.monotonic() + 100
    # a checkpoint says that training runs: earlier, imports turn an interrupt into errors of their own
    while not holds(out, "trainer_state.json") and time.monotonic() < end and running.poll() is None:
        time.sleep(0.02)
    for _ in range(times):
        running.send_signal(sent)
        time.sleep(0.05)
    said, err = running.communicate(timeout=60)
    allowed = (code,) if times == 1 else (code, -sent)
    assert running.returncode in allowed, (running.returncode, said[-500:], err[-2000:])
    if times == 1:
        assert one_object(said)["error"]["exit_code"] == code
        assert f"{word}; run the same command again" in err and "Traceback" not in err
    assert not list(out.rglob("*.staging")) or times == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--base", "nobody/nothing", "--task", "x", "--train-file", "rows.csv", "--text", "text"],
            3,
            "hf download nobody/nothing",
        ),
        (["--base", "BASE", "--task", "sst2", "--target-modules", "query"], 4, "name local files instead"),
        (["--base", "BASE", "--task", "x", "--train-file", "hub:nobody/rows", "--text", "text"], 4, "local files"),
    ],
)
def test_52_offline(tiny_base, tmp_path, arguments, code, message):
    write_rows(tmp_path / "rows.csv", tiny_rows(2, 20))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    given = [tiny_base("bert").name if a == "BASE" else a for a in arguments]
    ended = plait("stats", *given, "--out", "out", "--json", cwd=tmp_path, env={**os.environ, **offline})
    assert ended.returncode == code and "Traceback" not in ended.stderr
    assert message in one_object(ended.stdout)["error"]["hint"]
    assert {p.name for p in tmp_path.iterdir()} <= {"rows.csv", "cache"}


def test_an_output_that_cannot_be_made(capsys, recipe_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, said, _ = call(capsys, "run", recipe_file, "--out", tmp_path / "file/out", "--json")
    assert code == 4 and str(tmp_path / "file/out") in one_object(said)["error"]["where"]
    assert (tmp_path / "file").read_text() == "mine"


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_progress_on_a_terminal_rewrites_its_line_and_survives_a_closed_stream():
    terminal = Terminal()
    progress = Progress(10.0, 2, stream=terminal)  # type: ignore[arg-type]
    progress.start("train", 5.0)
    progress.finish()
    progress.close("done")
    assert (
        terminal.text.startswith("\r\x1b[2K[1/2] train")
        and "left" in terminal.text
        and terminal.text.endswith("done\n")
    )
    with Path(os.devnull).open("w") as closed:
        pass
    for stream in (closed, None):
        progress = Progress(1.0, 1, stream=stream)
        if stream is None:
            progress.start("x", 1.0)
        progress.close("done")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.slow  # where an interrupt lands is a matter of timing
@pytest.mark.parametrize("wait", [0.06, 0.1, 0.2, 0.35, 0.6, 1.0])
@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_early_interrupt_is_told_in_one_line(tmp_path, wait, sent, code, word):
    running = subprocess.Popen(
        [sys.executable, "-P", "-X", "importtime", "-m", "plait", "inspect", str(tmp_path), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads; background jobs ignore it)
    )  # fmt: skip
    for line in running.stderr:  # the entry's own first import: from here on it is plait's to answer
        if line.rstrip().endswith(" plait.entry"):
            break
    time.sleep(wait)
    running.send_signal(sent)
    said, err = running.communicate(timeout=120)
    assert "Traceback" not in err and running.returncode in (code, 3, 0), err[-500:]  # 3: it had ended before
    if running.returncode == code:
        assert one_object(said)["error"]["exit_code"] == code and word in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "a", "--out", "b"], "note: --out is given 2 times: the last one counts"),
        (["--method", "ties", "--method", "tsv", "--method", "ties"], "note: --method is given 3 times"),
        (["--json", "--json", "--set", "density=0.3", "--set", "seed=1"], ""),
    ],
)
def test_an_option_that_is_given_again_is_told(tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "merge", "nothing", "here", *more)
    assert code and (said in err if said else "note:" not in err)
