"""Every kernel, compiled for every card, none of which is there: a rule refuses it or it compiles, with the
tensor cores meant, in the card's shared memory, and without spilling registers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest
from flux_kernels import KernelUnavailable, arch
from flux_kernels.arch import SHARED, Capability
from flux_kernels.crosscompile import specialised
from flux_kernels.ops import OPS
from kernel_launches import DEFAULT, SIZES, Outcome, Size, all_outcomes, dtypes, launches

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
Outcomes = Mapping[tuple[Size, Capability], list[Outcome]]
KINDS = {"int8_linear": ("s8.s8", "kind::i8"), "fp8_linear": ("e4m3.e4m3", "kind::f8f6f4")}
HALVES = ("f16.f16", "bf16.bf16", "kind::f16")


def name(size: Size, capability: Capability) -> str:
    return f"{size}-{capability[0]}{capability[1]}"


def every(sizes: tuple[Size, ...]) -> list[tuple[Size, Capability]]:
    return [(size, capability) for size in sizes for capability in SHARED]


def refused(size: Size, card: Capability) -> bool:
    return arch.why_not(size.op, dtypes(size), card) is not None


IN_DEFAULT = every(DEFAULT)
# What is refused is compiled as well, to see that the rule is right: minutes where tensor cores are missing.
REST = [one for one in every(SIZES) if one not in IN_DEFAULT or refused(*one)]
in_default = pytest.mark.parametrize(("size", "card"), IN_DEFAULT, ids=[name(*one) for one in IN_DEFAULT])
in_full = pytest.mark.parametrize(("size", "card"), REST, ids=[name(*one) for one in REST])


@pytest.fixture(scope="module")
def found() -> Outcomes:
    return all_outcomes([one for one in IN_DEFAULT if not refused(*one)])


@pytest.fixture(scope="module")
def the_rest() -> Outcomes:
    return all_outcomes(REST)


@in_default
def test_a_kernel_compiles_or_a_rule_refuses_it(size: Size, card: Capability, found: Outcomes) -> None:
    if refused(size, card):
        with pytest.raises(KernelUnavailable):
            launches(size, card)
    else:
        check(size, card, found[size, card])


@pytest.mark.full
@in_full
def test_the_other_variants_do(size: Size, card: Capability, the_rest: Outcomes) -> None:
    check(size, card, the_rest[size, card])


def check(size: Size, card: Capability, outcomes: list[Outcome]) -> None:
    if refused(size, card):
        for outcome in outcomes:
            assert "error" in outcome or not outcome["products"], "a rule refuses what would run on tensor cores"
        return
    for outcome in outcomes:
        assert "error" not in outcome, outcome["error"]
        assert outcome["shared"] <= SHARED[card]
        assert outcome["spilled"] == 0
        if not size.op.endswith("_linear"):
            assert not outcome["products"]
            continue
        assert outcome["products"]
        for instruction in outcome["products"]:
            assert instruction.startswith(arch.products(size.op, card))
            assert any(kind in instruction for kind in KINDS.get(size.op, HALVES))


@pytest.mark.parametrize("op", OPS)
def test_another_picture_size_compiles_nothing(op: str) -> None:
    """Nor does another number of tokens, odd or one: Triton's own key of what it has compiled is the same."""
    for size in (size for size in SIZES if size.op == op):
        card = max(SHARED)
        if arch.why_not(op, dtypes(size), card):
            continue
        keys = {
            str([specialised(launch, card)[:3] for launch in launches(size, card, tokens)])
            for tokens in (4608, 1, 17, 4095)
        }
        assert len(keys) == 1
