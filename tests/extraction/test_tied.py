"""Extraction from checkpoints whose config ties an output layer of which they hold numbers."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from plait.errors import InputError
from plait.extraction.extract import Extraction, extract
from tests.extraction.test_extract import changed, llama


@pytest.mark.parametrize("which", ["tuned", "base"])
def test_an_output_layer_of_its_own_is_not_passed_over(tmp_path, which):
    """transformers ties what is equal, and keeps both where they differ, whatever the config says."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    changed(llama(tie_word_embeddings=True)).save_pretrained(tmp_path / "tuned")
    file = tmp_path / which / "model.safetensors"
    tensors = load_file(file)
    ask = Extraction(tmp_path / "tuned", tmp_path / "base", rank=2, drop=True)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert "lm_head.weight" not in extract(ask, tmp_path / "lora").record.dropped
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 0.1}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"'lm_head\.weight' is other than 'model\.embed_tokens\.weight'"):
        extract(ask, tmp_path / "another")
