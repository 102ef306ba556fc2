"""`plait push` against a hub on this machine: what arrives, what is refused, and what an interruption leaves."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.adapters.peft_format import read_adapter
from plait.checking.check import check_path
from plait.disk.manifest import CARD, MANIFEST
from plait.merging import merge_folders, plan_merge
from plait.merging.bake.baking import bake
from tests.classifiers import saved_base, saved_classifier
from tests.command import call
from tests.fake_hub import GOOD, READER, FakeHub, Repository
from tests.merging.test_bake import llama, lora
from tests.test_card import card

# The hub's client hands bytes to its HTTP library in a way that the newest version of that deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "heads/mood.safetensors",
    "heads/topic.safetensors",
]


@pytest.fixture
def hub(monkeypatch):
    """A hub that this process talks to, with a token that may write."""
    import huggingface_hub.constants as constants
    from huggingface_hub import hf_api
    from huggingface_hub.utils import _http

    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between its own tries
        monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])  # an earlier test's stderr is closed
        monkeypatch.setenv("HF_TOKEN", GOOD)
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a merge of two classifiers of a base of this machine, and the adapters."""
    root = tmp_path_factory.mktemp("anna-secret")
    base = saved_base(root / "base", "bert")
    pair = [saved_classifier(root / n, base, "bert", 2 + i, seed=i) for i, n in enumerate(("mood", "topic"))]
    merge_folders(pair, root / "merged")
    return root / "merged", pair, base


def downloaded(repository: Repository, folder: Path) -> Path:
    for name, data in repository.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_what_arrives_is_whole_and_names_nobodys_machine(hub, folders, tmp_path, capsys):
    merged, _, _ = folders
    code, said, err = call(capsys, "push", merged, "--to", "alice/two", "--base", "alice/base")
    assert code == 0, err
    assert f"-> {hub.url}/alice/two" in said and "base: alice/base" in said
    repository = hub.repositories["alice/two"]
    assert sorted(repository.files) == [*FILES, MANIFEST] and not repository.private and len(repository.commits) == 1
    assert not any(b"anna-secret" in data for data in repository.files.values())
    there = downloaded(repository, tmp_path / "there")
    (checked,) = check_path(there)
    assert checked.listed and not checked.failed
    mine, theirs = read_adapter(merged), read_adapter(there)
    assert theirs.base == "alice/base" and theirs.modules.keys() == mine.modules.keys()
    assert all(
        (theirs.modules[m].A == f.A).all() and (theirs.modules[m].B == f.B).all() for m, f in mine.modules.items()
    )
    text, data = card(there)
    assert data["base_model"] == "alice/base" and "adapter = 'alice/two'" in text and "base = 'alice/base'" in text


def test_private_and_the_same_again(hub, folders, capsys):
    merged, _, _ = folders
    command = ["push", merged, "--to", "alice/two", "--base", "alice/base", "--private"]
    code, said, err = call(capsys, *command)
    assert code == 0 and "(private)" in said, err
    assert hub.repositories["alice/two"].private
    code, said, _ = call(capsys, *command)
    assert code == 0 and "holds all of it already" in said and len(hub.repositories["alice/two"].commits) == 1


def test_a_rehearsal_asks_nothing_of_the_network(hub, folders, capsys, monkeypatch):
    merged, _, _ = folders
    monkeypatch.delenv("HF_TOKEN")
    code, said, _ = call(capsys, "push", merged, "--to", "alice/two", "--base", "alice/base", "--dry-run", "--json")
    told = json.loads(said)
    assert code == 0 and told["sent"] is False and [f["path"] for f in told["files"]] == [*FILES, MANIFEST]
    assert hub.requests == [] and hub.repositories == {}


def test_without_a_token_the_next_step_is_told(hub, folders, capsys, monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    merged, _, _ = folders
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = call(capsys, "push", merged, "--to", "alice/two", "--base", "alice/base")
    assert code == 4 and "no token" in err and "hf auth login" in err and err.count("\n") == 1 and hub.requests == []


@pytest.mark.parametrize(("token", "said"), [("hf_wrong", "does not know this token"), (READER, "may not write")])
def test_a_rejected_token_is_one_line(hub, folders, capsys, monkeypatch, token, said):
    merged, _, _ = folders
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = call(capsys, "push", merged, "--to", "alice/two", "--base", "alice/base")
    assert code == 4 and said in err and "nothing was published" in err and "hf auth login" in err
    assert err.count("\n") == 1 and token not in err and hub.repositories == {}


def test_an_interrupted_upload_publishes_nothing_and_goes_on(hub, folders, capsys):
    merged, _, _ = folders
    command = ["push", merged, "--to", "alice/two", "--base", "alice/base"]
    hub.cut = 1000
    code, _, err = call(capsys, *command)
    assert code == 4 and "broke off" in err and "run the same command again" in err and err.count("\n") == 1
    assert hub.repositories["alice/two"].files == {}
    hub.cut = 0
    code, said, err = call(capsys, *command)
    assert code == 0, err
    assert sorted(hub.repositories["alice/two"].files) == [*FILES, MANIFEST] and "-> " in said


def test_a_hub_that_cannot_be_reached_is_one_line(folders, capsys, monkeypatch):
    import huggingface_hub.constants as constants
    from huggingface_hub.utils import _http

    merged, _, _ = folders
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", GOOD)
    code, _, err = call(capsys, "push", merged, "--to", "alice/two", "--base", "alice/base")
    assert code == 4 and "nothing was published" in err and err.count("\n") == 1


def test_another_result_is_replaced_only_when_asked(hub, folders, capsys, tmp_path):
    merged, _, _ = folders
    old = {
        "adapter_model.safetensors": b"old",
        "heads/gone.safetensors": b"old",
        ".gitattributes": b"x",
        "LICENSE": b"y",
    }
    hub.repositories["alice/two"] = Repository(files=dict(old), commits=["1" * 40])
    command = ["push", merged, "--to", "alice/two", "--base", "alice/base"]
    code, _, err = call(capsys, *command)
    assert code == 2 and "holds another 'adapter_model.safetensors'" in err and "--overwrite" in err
    assert hub.repositories["alice/two"].files == old
    code, _, err = call(capsys, *command, "--private")
    assert code == 2 and "is public" in err
    code, said, err = call(capsys, *command, "--overwrite")
    assert code == 0 and "taken out of the repository: heads/gone.safetensors" in said, err
    assert sorted(hub.repositories["alice/two"].files) == [".gitattributes", "LICENSE", *FILES, MANIFEST]
    assert not check_path(downloaded(hub.repositories["alice/two"], tmp_path / "there"))[0].failed


def test_a_repository_with_a_card_alone_is_free(hub, folders, capsys):
    merged, _, _ = folders
    hub.repositories["alice/two"] = Repository(files={".gitattributes": b"", "README.md": b"soon"}, commits=["1" * 40])
    assert call(capsys, "push", merged, "--to", "alice/two", "--base", "alice/base")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--to", "alice/two"], 2, "a folder of this machine: nobody else could load it"),
        (["--to", "two", "--base", "alice/base"], 2, "names no user"),
        (["--to", "a/b/c", "--base", "alice/base"], 2, "a/b/c"),
        (["--to", "alice/two", "--base", "/x/base"], 2, "is no name on the hub"),
        (["--to", "alice/two", "--base", "alice/base", "--offline"], 2, "--offline"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_the_network(hub, folders, capsys, monkeypatch, arguments, code, said):
    merged, _, _ = folders
    before = dict(os.environ)
    answer, _, err = call(capsys, "push", merged, *arguments)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.pop(name, None) if name not in before else os.environ.update({name: before[name]})
    assert (answer, hub.requests) == (code, []) and said in err, err


def test_a_damaged_folder_is_not_sent(hub, folders, tmp_path, capsys):
    _, pair, _ = folders
    merge_folders(pair, tmp_path / "m")
    with (tmp_path / "m/adapter_model.safetensors").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x77")
    code, _, err = call(capsys, "push", tmp_path / "m", "--to", "alice/two", "--base", "alice/base")
    assert code == 3 and "nothing was sent" in err and hub.requests == []
    code, _, err = call(capsys, "push", pair[0].parent, "--to", "alice/two")
    assert code == 2 and "holds several results" in err and hub.requests == []


def test_a_folder_of_pefts_is_sent_with_a_card_and_without_pickles(hub, folders, tmp_path, capsys):
    _, pair, _ = folders
    import shutil

    mine = shutil.copytree(pair[0], tmp_path / "mood")
    (mine / CARD).unlink(missing_ok=True)
    (mine / "training_args.bin").write_bytes(b"pickle")
    (mine / "trainer_state.json").write_text('{"best_model_checkpoint": "/home/anna/run/checkpoint-9"}')
    (mine / "tokenizer_config.json").write_text('{"name_or_path": "/home/anna/base", "chat_template": "a /b c"}')
    shutil.copytree(pair[0], mine / "checkpoint-9")
    (mine / "checkpoint-9/global_step9").mkdir()
    (mine / "checkpoint-9/global_step9/states.pt").write_bytes(b"pickle")
    code, said, err = call(capsys, "push", mine, "--to", "alice/mood", "--base", "alice/base")
    assert code == 0, err
    assert [line for line in said.splitlines() if "not sent" in line] == [
        "not sent: checkpoint-9/ (a checkpoint of a training, not its result)",
        "not sent: trainer_state.json (how the training stood, which names paths of its machine)",
        "not sent: training_args.bin (not weights in safetensors, a config, a tokenizer or a text)",
    ]
    there = downloaded(hub.repositories["alice/mood"], tmp_path / "there")
    assert sorted(hub.repositories["alice/mood"].files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer_config.json",
    ]
    assert json.loads((there / "tokenizer_config.json").read_text()) == {
        "name_or_path": "base",
        "chat_template": "a /b c",
    }
    assert "adapter = 'alice/mood'" in card(there)[0] and "plait.json" not in card(there)[0]


def test_an_edited_card_goes_as_it_was_edited(hub, folders, tmp_path, capsys):
    _, pair, _ = folders
    merge_folders(pair, tmp_path / "m")
    place = tmp_path / "m" / CARD
    place.write_text(
        place.read_text().replace("# m\n", "# My own title\n").replace("library_name", "language: en\nlibrary_name")
    )
    assert call(capsys, "push", tmp_path / "m", "--to", "alice/m", "--base", "alice/base")[0] == 0
    text, data = card(downloaded(hub.repositories["alice/m"], tmp_path / "there"))
    assert "# My own title" in text and data["language"] == "en" and data["base_model"] == "alice/base"
    assert "adapter = 'alice/m'" in text


def test_a_baked_model_needs_no_base(hub, tmp_path, capsys):
    base = llama(tmp_path / "base", shards=False)
    pair = [lora(base, tmp_path / n, ["q_proj"], seed=i) for i, n in enumerate("ab")]
    bake(plan_merge([read_adapter(f) for f in pair]), base, tmp_path / "baked")
    code, said, err = call(capsys, "push", tmp_path / "baked", "--to", "alice/baked")
    assert code == 0 and "a whole model" in said, err
    text, data = card(downloaded(hub.repositories["alice/baked"], tmp_path / "there"))
    assert data["library_name"] == "transformers" and "model_name = 'alice/baked'" in text
    assert not check_path(tmp_path / "there")[0].failed


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(folders, tmp_path):
    merged, _, _ = folders
    with FakeHub() as server:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        surroundings = kept | {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": GOOD,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-P", "-m", "plait", "push", merged, "--to", "alice/two", "--base", "alice/base"]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" and sorted(server.repositories["alice/two"].files) == [*FILES, MANIFEST]
