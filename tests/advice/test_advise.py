"""Advice: with texts every figure is measured, without them what is unknown is said; two folders are enough to ask."""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.adapters.lora import truncated
from plait.adapters.peft_format import write_adapter
from plait.advice.advise import SEPARATELY, SINGLE, AdviceSettings, Option, advise, recommend
from plait.choosing import costs
from plait.choosing.auto import AutoSettings, at_rank, merge_auto
from plait.choosing.notes import coarse, that_merge, that_model
from plait.choosing.proxy import cosines
from plait.cli import main
from plait.fidelity.measure import Fidelity, TaskFidelity
from plait.fidelity.score import fidelities
from plait.fidelity.texts import split_off
from plait.learning.heads import with_heads
from plait.model.base import BaseModel
from tests.command import call
from tests.panels import adapters_of, folders_of, text_file
from tests.tiny import save_model

pytestmark = pytest.mark.usefixtures("untimed")

PUBLIC = Path(__file__).parents[3] / "shared" / "adapters"
PAIRS = [("distilbert_imdb", "distilbert_emotion"), ("gemma3_270m_svg", "gemma3_270m_svg_stage1")]


@pytest.mark.parametrize(("texts", "tried"), [(16, False), (24, True)])
def test_a_repair_is_tried_where_classifiers_have_texts_enough(make_panel, texts, tried):
    """Three quarters of the texts are what choice and repair read."""
    panel = make_panel(texts=texts)
    settings = AdviceSettings(repair=2, repair_from=18, refine=0, max_length=24)
    found = advise([p.adapter for p in panel.parts], panel.base, panel.texts, settings=settings)
    assert any("repaired" in o.option for o in found.options) == (found.repair is not None) == tried
    said = [n for n in found.notes if n.startswith("no repair is tried: 12 texts of one;")]
    assert len(said) == (not tried)


def test_with_texts_everything_is_measured(make_panel):
    panel = make_panel(texts=24)
    adapters = [p.adapter for p in panel.parts]
    found = advise(
        adapters, panel.base, panel.texts, settings=AdviceSettings(repair=3, repair_from=0, refine=3, max_length=24)
    )
    names = [o.option for o in found.options]
    assert names[0] == SEPARATELY and "merged, rank 6" in names and "merged, cut to rank 3" in names
    assert "merged, baked into the base" in names and "merged and repaired, rank 3" in names
    assert sum(n.startswith("the best single adapter") for n in names) == 1
    assert all(o.kept is not None and o.worst <= o.kept + 1e-9 for o in found.options)
    assert all("the bare base" in u for u in found.unknown)  # what the few held-out texts do not tell
    size = {o.option: o.bytes for o in found.options}
    assert size["merged, baked into the base"] < size["merged, cut to rank 3"] < size["merged, rank 6"]
    assert size["merged, rank 6"] == costs.base_size(Path(panel.base.name))[0] + costs.factors_at(
        adapters, 6
    ) + costs.head_bytes(adapters)
    good = [o.option for o in found.options if o.worst >= 0.9]
    assert found.recommended in good
    assert found.recommended != SEPARATELY or good == [SEPARATELY]


@pytest.mark.parametrize(
    ("apart", "n", "said"), [(2, 6, "50 %"), (1, 6, "100 %"), (19, 25, "5 %"), (20, 25, None), (0, 6, None)]
)
def test_what_one_text_is_worth_is_told_where_there_are_few(apart, n, said):
    """By changing one answer: what is kept moves by as much."""
    one = TaskFidelity("one", 0.1, 1.0, 0.5, 0.9, 0.5, 0.3, 1 - apart / n, n)
    other = replace(one, task="grade", agreement_base=0.9)  # a regression, whose agreement is a correlation
    notes = coarse(Fidelity.of([one, other]), ["one"])
    assert bool(notes) == (said is not None)
    if said:
        moved = one.kept_agreement - replace(one, agreement=1 - 1 / n).kept_agreement
        assert f"{100 * moved:.0f} %" == said
        assert notes[0].endswith(
            f"on {apart} of the {n} texts that they are of, so that one text is {said} of what is kept of it"
        )


def test_the_row_of_a_cut_measures_what_merge_auto_makes_at_that_rank(make_panel):
    """Fitted at that rank where the texts say so, which a cut of the fit at the whole rank is not."""
    panel = make_panel(texts=32)
    adapters = [p.adapter for p in panel.parts]
    most, rest = split_off(panel.texts)
    auto = AutoSettings(refine=0, heads=False, max_length=24)
    whole = merge_auto(adapters, panel.base, most, settings=auto)
    wanted = merge_auto(adapters, panel.base, most, settings=replace(auto, rank=3))
    assert wanted.record.chosen.fit is not None
    ours = at_rank(whole.choice, panel.with_texts(most), adapters, 3)
    for module, f in wanted.adapter.modules.items():
        torch.testing.assert_close(ours.modules[module].delta(), f.delta(), atol=1e-4, rtol=1e-4)
        by_weights = truncated(whole.adapter.modules[module], 3)[0].delta()
        assert float((by_weights - f.delta()).norm()) > 1e-3 * float(f.delta().norm())
    told = advise(adapters, panel.base, panel.texts, settings=AdviceSettings(repair=0, refine=0, max_length=24))
    row = next(o for o in told.options if o.option == "merged, cut to rank 3")
    held_out = panel.with_texts(rest)
    [measured] = fidelities(held_out, [(with_heads(panel.with_texts(most), wanted.adapter)[0], 1.0)])
    assert row.kept == pytest.approx(measured.kept_agreement, abs=1e-6)


def test_memory_shows_what_lies_beside_the_base(make_panel):
    panel = make_panel()
    one, two = (p.adapter for p in panel.parts)
    separately, merged, _, cut = advise([one, two], panel.base).options
    base = costs.base_size(Path(panel.base.name))[0]
    for option in (separately, merged, cut):
        first, second = option.memory.removesuffix(" MB").split(" + ")
        assert float(first) == pytest.approx(base / 1e6, abs=0.051)
        assert float(second) == pytest.approx((option.bytes - base) / 1e6, rel=0.06)
    assert (
        len({separately.memory, cut.memory}) == 2 and separately.memory == merged.memory
    )  # it holds the ranks of both


def test_a_merge_of_16_bits_weighs_what_its_files_do(make_panel):
    def halved(adapter):
        modules = {m: replace(f, A=f.A.bfloat16(), B=f.B.bfloat16()) for m, f in adapter.modules.items()}
        return replace(adapter, modules=modules, heads={})

    adapters = [halved(p.adapter) for p in make_panel().parts]
    separately, merged, _, cut = advise(adapters).options
    assert separately.bytes == merged.bytes == 2 * cut.bytes > 0


def test_a_sum_of_no_larger_rank_leaves_nothing_to_cut(make_panel):
    """Where adapters meet in a module of rank 1 each, the sum has the rank of the larger one: one row, not two that are the same."""
    one, two = (p.adapter for p in make_panel().parts)
    first, second, *_ = sorted(one.modules)
    small = [{first: truncated(a.modules[first], 1)[0]} for a in (one, two)]
    apart = [replace(one, modules={**small[0], second: one.modules[second]}), replace(two, modules=small[1])]
    assert costs.total_rank(apart) == 3
    assert [o.option for o in advise(apart).options][1:] == ["merged, rank 3", "merged, baked into the base"]


def test_the_advice_follows_the_worst_adapter():
    separately = Option(SEPARATELY, "", 50, "", 1.0, 1.0)
    small = Option("small", "", 10, "", 0.97, 0.85, "a")
    large = Option("large", "", 30, "", 0.95, 0.93, "b")
    mended = Option("merged and repaired, small", "", 5, "", 0.99, 0.98, "b")
    settings = AdviceSettings(tolerate=0.1)
    assert recommend([separately, small, large, mended], settings)[1] == "large"
    assert recommend([separately, small, mended], settings)[1] == mended.option
    text, name = recommend([separately, small], settings)
    assert name == SEPARATELY and "85 % of a" in text


def test_one_and_the_same_adapter_twice_is_worth_merging(make_panel):
    panel = make_panel(texts=16)
    one = panel.parts[0].adapter
    twin = replace(one, name="twin", heads={"twin": one.heads["one"]})
    texts = {"one": panel.texts["one"], "twin": panel.texts["one"]}
    found = advise([one, twin], panel.base, texts, settings=AdviceSettings(repair=0, refine=0, max_length=24))
    assert found.recommended != SEPARATELY
    assert found.next == that_merge([one, twin], panel.base, found.recommended, 0)


def test_the_command_makes_what_is_recommended(make_panel):
    adapters, base = [p.adapter for p in make_panel().parts], BaseModel("the base")
    given = "plait merge auto 'the base' one two --out merged"
    placed = [replace(a, source={"path": a.name}) for a in adapters]
    assert that_merge(placed, base, "merged, rank 6", 7) == f"{given} --rank 6"
    assert that_merge(placed, base, "merged, baked into the base", 7) == given
    assert that_merge(placed, base, "merged and repaired, rank 3", 7) == f"{given} --repair 7 --rank 3"
    assert that_merge(placed, base, f"{SINGLE} (one)", 7) is None and that_merge(placed, base, SEPARATELY, 7) is None


def test_the_command_that_bakes_is_one_for_a_base_with_a_space_in_its_path(tmp_path, make_panel):
    base, merged = str(save_model(tmp_path / "the base", "bert")), tmp_path / "merged"
    command = that_model(BaseModel(base), "merged, baked into the base")
    program, *words = shlex.split(command)
    assert program == "plait" and words == ["merge", "merged", "--bake", base, "--out", "full-model"]
    assert that_model(BaseModel(base), "merged, rank 6") is None
    one = make_panel().parts[0].adapter
    merged.mkdir()
    write_adapter(merged, one)
    with contextlib.chdir(tmp_path), pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0 and (tmp_path / "full-model" / "config.json").is_file()


def test_two_folders_and_nothing_else(make_panel, tmp_path, capsys):
    folders = folders_of(make_panel(), tmp_path)
    code, out, err = call(capsys, "advise", *folders)
    assert code == 0, err
    assert "Not known:" in out and "serve separately" in out and "--text one=FILE --text two=FILE" in out
    code, out, _ = call(capsys, "advise", *folders, "--json")
    found = json.loads(out)
    assert found["recommended"] == "measure first" and found["options"][1]["kept"] is None
    assert any("nobody can say" in u for u in found["unknown"])


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0])
def test_two_downloaded_folders(pair, capsys):
    if not (PUBLIC / pair[0]).is_dir():
        pytest.skip("the public adapters are not at hand")
    code, out, err = call(capsys, "advise", *(str(PUBLIC / p) for p in pair))
    assert code == 0, err
    assert "Not known:" in out


def test_merge_auto_and_advise_on_the_command_line(make_panel, tmp_path, capsys):
    panel = make_panel(texts=12)
    folders = folders_of(panel, tmp_path)
    texts = [f"--text={text_file(panel, t, tmp_path)}" for t in ("one", "two")]
    common = [panel.base.name, *folders, *texts, "--max-length", "24", "--device", "cpu"]
    code, out, err = call(capsys, "merge", "auto", *common, "--refine", "2", "--out", str(tmp_path / "out"))
    assert code == 0, err
    assert "agreement" in out and "candidate" in out
    assert json.loads((tmp_path / "out" / "plait.json").read_text())["result"]["evidence"]
    code, out, err = call(capsys, "advise", *common, "--repair", "0", "--refine", "0")
    assert code == 0, err
    assert "Advice:" in out and "the base's size" not in out and "nobody can say" not in out
    assert "least kept: of" in out and "s] " in err and "(2 of 2)" in err
    everything = ["--repair", "0", "--refine", "0", "--tolerate", "1"]
    code, out, err = call(capsys, "advise", *common, *everything)
    assert code == 0, err
    command = next(line for line in out.splitlines() if line.startswith("  plait merge auto"))
    rest = ["--max-length", "24", "--device", "cpu", "--refine", "0"]
    words = [str(tmp_path / "made") if w == "merged" else w for w in shlex.split(command)[1:]]
    code, _, err = call(capsys, *words, *rest)
    assert code == 0 and (tmp_path / "made" / "plait.json").is_file(), err
    code, _, err = call(capsys, "merge", "auto", *folders, "--out", str(tmp_path / "blind"))
    assert code == 0, err
    code, _, err = call(capsys, "edit", str(tmp_path / "blind"), "--remove", "one", "--out", str(tmp_path / "no"))
    assert code == 0, err
    code, _, err = call(capsys, "edit", str(tmp_path / "out"), "--remove", "one", "--out", str(tmp_path / "no2"))
    assert code == 3 and "plait merge auto BASE two=" in err and "--text two=FILE" in err
    Path(panel.base.name, "config.json").rename(tmp_path / "hidden")  # the base is no longer where the adapters say
    code, _, err = call(capsys, "merge", "auto", *folders, *texts, "--out", str(tmp_path / "no3"))
    (tmp_path / "hidden").rename(Path(panel.base.name, "config.json"))
    assert code == 2 and "read by the base model" in err
    code, _, err = call(capsys, "merge", "auto", *folders)
    assert code == 2 and "--out" in err
    code, _, err = call(capsys, "merge", *folders, *texts, "--out", str(tmp_path / "no"))
    assert code == 2 and "merge auto" in err


def test_what_cannot_be_merged_is_served_separately(make_panel):
    one, two = (p.adapter for p in make_panel().parts)
    other = replace(two, base="another", source={})
    found = advise([replace(one, source={}), other])
    assert found.recommended == SEPARATELY and "of different bases" in found.advice
    assert [o.option for o in found.options] == [SEPARATELY]
    assert "nothing to merge with" in advise([one]).advice


def test_a_pair_of_one_descent_is_noticed(make_panel):
    one, two = (p.adapter for p in make_panel().parts)
    apart = cosines([one, two])[("one", "two")]
    dense = [torch.cat([f.delta(torch.float64).flatten() for f in a.modules.values()]) for a in (one, two)]
    assert apart == pytest.approx(float(torch.nn.functional.cosine_similarity(*dense, dim=0)), abs=1e-5)
    twin = replace(one, name="twin", heads={"twin": one.heads["one"]})
    assert any("one and twin point much the same way (cosine 1.00)" in n for n in advise([one, twin]).notes)


def test_a_program_may_name_the_base_and_give_plain_strings(make_panel):
    panel = make_panel(texts=4)
    settings = AdviceSettings(repair=0, refine=0, max_length=24)
    plain = {task: [text for (text,) in rows] for task, rows in panel.texts.items()}
    by_name = advise(adapters_of(panel), panel.base.name, plain, settings=settings)
    assert by_name == advise(adapters_of(panel), panel.base, panel.texts, settings=settings)
