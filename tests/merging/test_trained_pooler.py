"""A pooler that was trained whole beside a head: it lies in the backbone, and goes where its head goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.classifiers import classifier, expected_logits, quiet, saved_base, saved_classifier

import plait
from plait.adapters.peft_format import read_adapter
from plait.errors import InputError
from plait.fidelity.panel import parts_of
from plait.formats.export import export
from plait.merging import merge_folders

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
INPUTS = {"input_ids": torch.tensor([[0, 7, 9, 11, 2], [0, 20, 30, 40, 2]]), "attention_mask": torch.ones(2, 5).long()}


def with_pooler(folder: Path, base: Path) -> Path:
    """A classifier's adapter that also trained the pooler, made and saved by PEFT."""
    import peft

    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"]
    )  # fmt: skip
    with quiet():
        model = peft.get_peft_model(classifier(base, 2), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def loaded(base: Path, folder: Path):
    import peft

    with quiet():
        return peft.PeftModel.from_pretrained(classifier(base, 2), folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path, Path]:
    """(base, one with a pooler of its own, one without, their sum)."""
    root = tmp_path_factory.mktemp("pooler")
    base = saved_base(root / "base", "bert")
    one, other = with_pooler(root / "one", base), saved_classifier(root / "other", base, "bert", 2, seed=1)
    merge_folders([one, other], root / "merged", method="task_arithmetic", scale=1.0)
    return base, one, other, root / "merged"


def test_it_comes_with_its_head_and_goes_with_the_next(folders):
    base, one, other, merged = folders
    wanted = {f.name: expected_logits(base, [one, other], f, 2, INPUTS) for f in (one, other)}
    model = loaded(base, merged)
    for name in ("one", "other", "one", "one", "other"):
        plait.load_head(model, merged, name)
        torch.testing.assert_close(logits(model), wanted[name], atol=1e-5, rtol=1e-5)


def test_its_head_as_an_ordinary_folder_is_what_peft_makes_of_it(folders, tmp_path):
    base, one, other, merged = folders
    export(merged, tmp_path / "exported", loader="peft", task="one")
    wanted = expected_logits(base, [one, other], one, 2, INPUTS)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "exported")), wanted, atol=1e-5, rtol=1e-5)


def test_peft_has_put_it_in_already(folders):
    base, one, _, _ = folders
    model = loaded(base, one)
    before = logits(model)
    plait.load_head(model, one)
    torch.testing.assert_close(logits(model), before)


def test_a_model_without_that_layer_is_refused_unchanged(folders):
    base, _, _, merged = folders
    model = classifier(base, 2)
    model.bert.pooler = None
    weight = model.classifier.weight.clone()
    with pytest.raises(InputError, match="no such layer in the model"):
        plait.load_head(model, merged, "one")
    assert torch.equal(model.classifier.weight, weight)


def test_predictions_with_it_are_refused_by_name(folders):
    with pytest.raises(InputError, match=r"'one' it trained bert\.pooler\.dense of the backbone whole"):
        parts_of([read_adapter(folders[1])])
