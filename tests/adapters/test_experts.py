"""Which factors of a folder are of which parameter, by all ways in which PEFT's config may name parameters."""

from __future__ import annotations

import pytest

from plait.adapters.experts import parameter_names
from plait.errors import InputError

BOTH = ("model.layers.0.mlp.experts", "model.layers.0.mlp.experts.base_layer")
SHAPES = {BOTH[0]: (6, 8), BOTH[1]: (16, 6)}  # down_proj takes 8, half of what gate_up_proj gives


def named(names, targets, by_module=(), shapes=SHAPES):
    return parameter_names(names, shapes, targets, by_module, "folder")


@pytest.mark.parametrize(
    "targets",
    [
        ["gate_up_proj", "down_proj"],  # bare: any module's
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ["model.layers.0.mlp.experts.down_proj", "experts.gate_up_proj"],
        ["experts.gate_up_proj", "down_proj"],  # one of each kind
        [
            "experts.gate_up_proj",
            "experts.down_proj",
            "router",
        ],  # as many by their module's name: a bare one is another's
    ],
)
def test_both_parameters_of_an_expert_by_any_of_their_names(targets):
    found = named(BOTH, targets)
    assert found == {BOTH[0]: f"{BOTH[0]}.down_proj", BOTH[1]: f"{BOTH[0]}.gate_up_proj"}


def test_a_bare_name_is_of_a_module_that_target_modules_does_not_have():
    assert named(BOTH[:1], ["down_proj"]) == {BOTH[0]: f"{BOTH[0]}.down_proj"}
    assert named(BOTH[:1], ["down_proj"], by_module=["mlp.experts"]) == {}
    assert named(BOTH[:1], ["down_proj"], by_module=["perts"]) == {
        BOTH[0]: f"{BOTH[0]}.down_proj"
    }  # no ending of a name
    assert named(BOTH[:1], ["down_proj", "gate_up_proj"]) == {}  # one has factors, and two may be meant: a layer's own
    assert named(BOTH[:1], ["mlp.router.weight"]) == {}


@pytest.mark.parametrize(
    ("names", "targets", "said"),
    [
        (BOTH, ["experts.down_proj"], "factors of 2 parameters, and target_parameters names down_proj of it"),
        (BOTH, [], "names none of it"),
        (BOTH, ["experts.one", "experts.two"], "depends on the model's class"),
        (BOTH[1:], ["experts.down_proj"], "factors of 1 parameter"),  # nested in nothing
    ],
)
def test_what_cannot_be_told_is_refused(names, targets, said):
    with pytest.raises(InputError, match=said):
        named(names, targets)


def test_two_weights_of_an_expert_must_fit_together():
    for shapes in ({BOTH[0]: (6, 7), BOTH[1]: (16, 6)}, {BOTH[0]: (5, 8), BOTH[1]: (16, 6)}):
        with pytest.raises(InputError, match="are no gate_up_proj"):
            named(BOTH, ["down_proj", "gate_up_proj"], shapes=shapes)
    turned = {BOTH[0]: (8, 6), BOTH[1]: (6, 16)}  # stored the other way round
    assert len(named(BOTH, ["down_proj", "gate_up_proj"], shapes=turned)) == 2
