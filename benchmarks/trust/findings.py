"""The findings of the first attack on plait, each with its command, what it does now, and the test that holds it so."""

# ruff: noqa: E501 (a finding is a line)
from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Args:
        number: Its number: S silent, D data lost or code run, H hangs, U uncaught.
        command: What was tried.
        now: What it does now.
        test: "file::function" that holds it; "" where only rows of the table of bad inputs do, or none.
    """

    number: str
    command: str
    now: str
    test: str = ""


FINDINGS = (
    Finding("S1", "stats, train, eval on a base with missing tensors", "exit 3, the tensors are named",
            "tests/test_base_whole.py::test_missing_tensors_of_the_backbone_are_named"),
    Finding("S2", "a base in pytorch_model.bin; two bases that differ in weights only", "exit 3; the fingerprint covers every byte that is loaded",
            "tests/test_base_whole.py::test_pickled_weights_are_refused_with_the_way_out"),
    Finding("S3", "stats on a base without its tokenizer", "exit 3", "tests/test_base_whole.py::test_a_base_without_its_tokenizer_is_refused"),
    Finding("S4", "merge, inspect, convert of a folder whose heads or config were changed or are gone", "exit 3, the file is named",
            "tests/test_manifest.py::test_every_flipped_byte_is_noticed_or_changes_nothing"),
    Finding("S5", "run again over a damaged result", "the damaged unit is done again by itself, and a line says so",
            "tests/test_damaged_runs.py::test_a_damaged_result_is_done_again_by_itself"),
    Finding("S6", "merge of a folder whose heads/ may not be read", "exit 3", "tests/test_manifest.py::test_heads_that_may_not_be_read_are_refused"),
    Finding("S7", "merge, convert of tensors that the config does not speak of", "exit 3, the tensor is named",
            "tests/cases/test_beside.py::test_nothing_beside_the_factors_is_passed_over"),
    Finding("S8", '"use_rslora": "false" (text) in adapter_config.json', "exit 3, the key is named"),
    Finding("S9", "stats check of counts, errors and shapes that cannot be", "exit 3, the key is named"),
    Finding("S10", "train DIR --target-modules zzz; a validation file without the text column", "exit 2; exit 3",
            "tests/test_train_folders.py::test_options_are_used_or_refused"),
    Finding("D1", "--overwrite of a folder of others, of an input, of the working directory", "exit 2, nothing is touched",
            "tests/test_overwriting.py::test_what_plait_did_not_write_is_not_replaced"),
    Finding("D2", "commands and their children in a folder that holds a plait.py", "nothing is imported from there",
            "tests/test_safe_path.py::test_processes_of_a_study_import_nothing_from_there"),
    Finding("H1", "inspect of an adapter whose pattern makes a backtracking engine hang", "matched in time linear in the name",
            "tests/test_patterns.py::test_endless_patterns_end"),
    Finding("H2", "a header with a name twice among 20,000", "exit 3"),
    Finding("H3", "headers, configs and manifests of many megabytes", "exit 3, the limit is named"),
    Finding("H4", "a sparse file that declares gigabytes", "exit 3 where the header refutes itself, else 4 before memory is taken"),
    Finding("U1", "job run FILE, and -", "works; a file that is no job ends with exit 3",
            "tests/study/test_jobs.py::test_jobs_are_done_from_files_and_from_standard_input"),
    Finding("U2", "merge by each method of adapters with an embedding or a convolution", "merges","tests/merging/test_kinds.py::test_peft_sees_what_the_method_gives_for_plain_matrices"),
    Finding("U3", "validate, plan of a recipe with an option out of range", "exit 2 before anything is computed"),
    Finding("U4", "tensors in 8-bit floats", "read exactly", "tests/cases/test_readers.py::test_8_bit_folders_are_read_exactly"),
    Finding("U5", "rank_pattern with flags inside", "exit 3, the pattern is named"),
    Finding("U6", "a base's name with NUL, half a surrogate pair or thousands of characters", "exit 3"),
    Finding("U7", "result.tasks that is no list", "exit 3"),
    Finding("U8", "statistics with infinite counts and shapes, foreign types in the record", "exit 3, the key is named"),
    Finding("U9", "mergekit YAML with wrong types and numbers", "exit 2, or 3 where it is no YAML"),
    Finding("U10", "recipes with a mapping, null or a column twice", "exit 2, the key is named"),
    Finding("U11", "study table over a runs.jsonl whose lines are cut, binary or foreign; run over scores that were emptied or changed", "the lines are counted as unreadable; the scores are made again",
            "tests/test_trust_page.py::test_lines_of_the_journal_that_are_none_are_counted"),
    Finding("U12", "bases whose config is not that of the weights, cut weights", "exit 3",
            "tests/test_base_whole.py::test_a_config_that_is_not_of_these_weights"),
    Finding("U13", "outputs that cannot be made, devices that are none, folders of other users", "exit 4; 2; 3",
            "tests/test_cli_surroundings.py::test_an_output_that_cannot_be_made"),
    Finding("U14", "Ctrl-C in the first moments", "one line, exit 130", "tests/test_cli_surroundings.py::test_an_early_interrupt_is_told_in_one_line"),
    Finding("U15", "names in plait.json and heads that name no task", "exit 3, the folder is named"),
)  # fmt: skip


@functools.cache
def cases_of(number: str) -> tuple[str, ...]:
    """Rows of the table of bad inputs that carry a finding's number: "name: `command`, exit code"."""
    from tests.robustness.test_cases import CASES

    found = [c for c in CASES if number in c.name.split()[:2]]
    return tuple(f"{c.name}: exit {c.code}" for c in found)


def table() -> list[str]:
    """Lines of a Markdown table of all findings.

    Raises:
        ValueError: A test that is named is not there.
    """
    lines = ["| | tried | now | held by |", "| --- | --- | --- | --- |"]
    for f in FINDINGS:
        held = [f"`{f.test}`"] if f.test else []
        if f.test:
            file, name = f.test.split("::")
            if f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8"):
                raise ValueError(f"{f.number}: no test {f.test}")
        if rows := cases_of(f.number):
            codes = ", ".join(str(c) for c in sorted({int(r.rsplit(" ", 1)[1]) for r in rows}))
            held.append(f"{len(rows)} row{'s' * (len(rows) > 1)} of `tests/robustness` (exit {codes})")
        lines.append(
            f"| {f.number} | {f.command} | {f.now or 'not checked here'} | {'; '.join(held) or 'no test of its own'} |"
        )
    return lines
