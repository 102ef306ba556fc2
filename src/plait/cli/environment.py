"""Commands about the installation: doctor, completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plait.border.counts import plural
from plait.cli.options import Json
from plait.cli.output import emit
from plait.options import require_known

if TYPE_CHECKING:
    from plait.checking.doctor import Installation

SHELLS = ("bash", "zsh", "fish", "powershell")
VARIABLE = "_PLAIT_COMPLETE"  # set by the shell's script when it asks what may come next

_UNHEALTHY = 4  # the exit code of an environment in which something does not work


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(doctor)
    app.command()(completion)


def doctor(as_json: Json = False) -> None:
    """Say what this installation stands on. For bug reports.

    Versions, hardware, and combinations that are known not to work, each with the way out; exit code 4 where there is one.
    No paths and no names: it may be pasted anywhere.
    """
    from plait.checking.doctor import examine

    installation = examine()
    emit(installation, as_json, doctor_text(installation))
    if installation.problems:
        raise typer.Exit(_UNHEALTHY)


def completion(
    shell: Annotated[str, typer.Argument(help="bash, zsh, fish or powershell.")],
    as_json: Json = False,
) -> None:
    """Print what makes a shell complete commands and options.

    bash: plait completion bash > ~/.local/share/bash-completion/completions/plait. zsh: plait completion zsh > _plait in a folder
    of $fpath. fish: plait completion fish > ~/.config/fish/completions/plait.fish. Then open a new shell.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # its own --show-completion uses it

    require_known(shell, SHELLS, "shell")
    script = get_completion_script(prog_name="plait", complete_var=VARIABLE, shell=shell)
    emit({"shell": shell, "script": script}, as_json, script)


def complete(command: object, instruction: str) -> int:
    """Answer a shell's script: what may come next.

    Args:
        command: The whole command line.
        instruction: What the script put into `VARIABLE`, such as "complete_bash".
    """
    from typer.completion import completion_init, shell_complete  # type: ignore[attr-defined]

    completion_init()
    return shell_complete(command, {}, "plait", VARIABLE, instruction)  # type: ignore[arg-type]


def doctor_text(installation: Installation) -> str:
    """Write versions and hardware, then what is wrong."""
    i = installation
    memory = f", {i.memory_gb:g} GB of memory" if i.memory_gb is not None else ""
    disk = f", {i.disk_gb:g} GB free here" if i.disk_gb is not None else ""
    gpus = ", ".join(f"{g.name} ({g.memory_gb:g} GB, {g.capability})" for g in i.gpus) or "none that torch can use"
    rows = [
        ["plait", i.plait],
        ["Python", i.python],
        ["system", i.system],
        ["CPU", f"{plural(i.cores, 'core')}{memory}{disk}"],
        ["GPU", f"{gpus}; torch {f'for CUDA {i.cuda}' if i.cuda else 'without CUDA'}"],
        *([name, version or "missing"] for name, version in i.packages.items()),
        *([name, value] for name, value in i.environment.items()),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    lines += ["", *(f"problem: {p}" for p in i.problems), *(f"warning: {w}" for w in i.warnings)]
    return "\n".join(
        [*lines, "nothing is known against it" if not i.problems else "something does not work, see above"]
    )
