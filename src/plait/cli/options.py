"""The options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --out.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything drawn at random.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set an option; may be repeated.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
FourBits = Annotated[
    str | None,
    typer.Option(
        "--base-4bit",
        metavar="nf4",
        help="Hold the base in NF4, as QLoRA's adapters know it; nf4-single: not quantised twice.",
    ),
]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of local data, laid out as <task>/train.parquet.")]
RecipeArg = Annotated[Path, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one.")]
