"""What two threads ask for at once is read by either, and neither is brought down by the other."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from plait.runs.recent import MOST, Recent

TWO_THREADS = """
    import sys, threading
    from pathlib import Path
    from plait.runs.layout import Layout

    layout, failed = Layout(None, Path("x")), []
    sys.setswitchinterval(1e-6)

    def ask():
        try:
            for i in range(50_000):
                assert layout.cached(Path(f"a/{i % 11}"), lambda: i % 11) == i % 11
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit(repr(failed[0]) if failed else 0)
"""


def test_two_threads_ask_a_layout_at_once():  # apart: without a lock the interpreter itself may fall
    command = [sys.executable, "-P", "-c", textwrap.dedent(TWO_THREADS)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_was_asked_for_longest_ago_is_let_go():
    recent, read = Recent(), []
    for key in [*range(MOST), 0, MOST, 0, 1]:
        recent.get(key, lambda key=key: read.append(key))
    assert read == [*range(MOST), MOST, 1]
