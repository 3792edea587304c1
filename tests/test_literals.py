"""The numbers of a candidate file as a vector."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_env import literals
from nanogpt_env.tiers import builtin_tiers, load_tier
from nanogpt_env.workspace import normal_form

SOURCE = '''"""Text, not 7."""
import torch
A, (B, C) = 0.03, (0.95, 2)
ROWS, eps, D = 8, 1e-8, -3
MÜ = 0.5  # ü before the next: "ü", 4
E = "ü"; F = 0.25
class X:
    G = 4
def configure(params, horizon, k=5):
    x = 6
    return torch.optim.AdamW(params, lr=A, betas=(0.8, 0.99), weight_decay=0.1, fused=True, eps=1e-7)
'''


def shape(source):
    return normal_form({"optimizer.py": source}, numbers=False)


def test_what_counts_as_a_setting():
    found = {n.name: n.value for n in literals.find(SOURCE)}
    assert found == {
        "A": 0.03, "B": 0.95, "C": 2, "MÜ": 0.5, "F": 0.25, "betas[0]": 0.8, "betas[1]": 0.99, "weight_decay": 0.1,
    }  # fmt: skip


def test_a_move_changes_one_number_and_nothing_else():
    found = literals.find(SOURCE)
    for i, literal in enumerate(found):
        moves = [0.0] * len(found)
        moves[i] = 0.5
        new = literals.moved(SOURCE, moves)
        again = literals.find(new)
        assert [n.name for n in again] == [n.name for n in found]
        assert [n.value for j, n in enumerate(again) if j != i] == [n.value for j, n in enumerate(found) if j != i]
        assert again[i].value == pytest.approx(literal.moved(0.5), rel=1e-5)
        assert shape(new) == shape(SOURCE)
    assert literals.moved(SOURCE, [0.0] * len(found)) == SOURCE


def test_lines_end_where_python_says():
    source = "text = 'a\x0cb\u2028c'\r\nA = 0.25\rB = 8\n"
    assert literals.moved(source, [1, 1]) == source.replace("0.25", "1").replace("8\n", "32\n")


def test_how_far_a_number_moves():
    by_name = {n.name: n for n in literals.find(SOURCE)}
    assert by_name["A"].moved(1) == pytest.approx(0.12)
    assert by_name["A"].moved(-7) == pytest.approx(0.0075)  # cut
    assert by_name["B"].moved(-1) == pytest.approx(0.9875)  # momenta: their distance to 1
    assert by_name["MÜ"].moved(1) == pytest.approx(0.001)
    assert by_name["C"].moved(-1) == 1 and isinstance(by_name["C"].moved(0.3), int)


def test_another_algorithm_has_another_shape():
    assert shape(SOURCE) != shape(SOURCE.replace("AdamW", "Adam"))
    assert shape("x = -1") == shape("x = -2.5")
    assert shape("x = f(nesterov=True)") != shape("x = f(nesterov=False)")


@given(st.lists(st.floats(-1, 1), min_size=9, max_size=9))
def test_every_move_gives_a_program(moves):
    source = load_tier("nano-steps").records["normuon"].sources["optimizer.py"]
    new = literals.moved(source, moves)
    ast.parse(new)
    assert all(n.value > 0 for n in literals.find(new))
    assert all(n.value < 1 for n in literals.find(new) if "MOMENTUM" in n.name and not n.whole)


def test_wrong_counts_and_text_are_refused():
    with pytest.raises(ValueError, match="2 moves for 8 settings"):
        literals.moved(SOURCE, [0, 0])
    with pytest.raises(SyntaxError):
        literals.find("def")


@pytest.mark.parametrize("name", builtin_tiers())
def test_every_start_program_has_some(name):
    tier = load_tier(name, calibrated=False)
    assert len(literals.find(tier.record(tier.table.reward.start).sources[tier.files[0]])) >= 5
