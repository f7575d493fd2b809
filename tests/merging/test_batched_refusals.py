"""Bad input of `batched_merge_`: an error that names the entry, and nothing written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slora.errors import ConfigError, ShapeError, StateError
from slora.merging import batched, batched_merge, batched_merge_
from tests.merging.calls import A0, B0, BACKENDS, W0, needs_extension

good = {"weights": [W0.clone(), torch.randn(3, 5)], "lora_As": [A0, torch.randn(2, 5)],
        "lora_Bs": [B0, torch.randn(3, 2)], "scales": [1.0, 0.5]}  # fmt: skip


def tied() -> dict[str, Any]:
    W = torch.randn(6, 4)
    return {"weights": [torch.randn(6, 4), W, W[2:]], "lora_As": [A0] * 3, "lora_Bs": [B0, B0, B0[2:]],
            "scales": [1.0] * 3}  # fmt: skip


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.randn(3, 5)


BAD = {
    "aliased": (ShapeError, r"weights\[1\].* and weights\[2\].* share memory; pass each weight once", tied()),
    "a weight inside its own update": (ShapeError, r"weights\[0\].* and lora_A of weights\[1\].* share memory",
                                       {"lora_As": [A0, good["weights"][0].view(-1)[:10].view(2, 5)]}),
    "expanded": (ShapeError, r"weights\[1\].*share memory; clone it first",
                 {"weights": [good["weights"][0], torch.randn(1, 5).expand(3, 5)]}),
    "requires grad": (StateError, r"weights\[1\].*requires grad.*torch.no_grad",
                      {"weights": [good["weights"][0], torch.randn(3, 5, requires_grad=True)]}),
    "inference": (StateError, r"weights\[1\].*inference tensor; clone it",
                  {"weights": [good["weights"][0], inference()]}),
    "inner size": (ShapeError, r"weights\[1\].*has shape \[3, 5\], but lora_A of term 1 \[2, 6\]",
                   {"lora_As": [A0, torch.randn(2, 6)]}),
    "rank": (ShapeError, r"weights\[1\].*lora_A of term 1 \[3, 5\] and its lora_B \[3, 2\]",
             {"lora_As": [A0, torch.randn(3, 5)]}),
    "rows": (ShapeError, r"lora_B of term 1 has 2 rows, weights\[1\].* 3; .*rows=",
             {"lora_Bs": [B0, torch.randn(2, 2)]}),
    "rows beyond": (ShapeError, r"term 1 covers the rows 1 to 4 of weights\[1\].*which has 3", {"rows": [0, 1]}),
    "negative row": (ShapeError, r"term 1 covers the rows -1 to 2", {"rows": [0, -1]}),
    "devices": (ShapeError, r"weights\[1\].*is on meta, but weights\[0\].* on cpu",
                {"weights": [good["weights"][0], torch.empty(3, 5, device="meta")]}),
    "device of a matrix": (ShapeError, r"lora_B of weights\[1\].*is on meta, its weight on cpu",
                           {"lora_Bs": [B0, torch.empty(3, 2, device="meta")]}),
    "integers": (ShapeError, r"weights\[1\].* is torch.int8.*dequantise",
                 {"weights": [good["weights"][0], torch.zeros(3, 5, dtype=torch.int8)]}),
    "integer matrix": (ShapeError, r"lora_A of weights\[1\].*is torch.int64",
                       {"lora_As": [A0, torch.zeros(2, 5, dtype=torch.int64)]}),
    "vector": (ShapeError, r"weights\[1\].* is a tensor \[5\]; expected",
               {"weights": [good["weights"][0], torch.ones(5)]}),
    "nan": (ConfigError, r"scale of term 1, of weights\[1\].*, is nan", {"scales": [1.0, float("nan")]}),
    "infinite in fp32": (ConfigError, r"scale of term 1.*is 1e\+39", {"scales": [1.0, 1e39]}),
    "lengths": (ShapeError, r"scales has 1 entries for 2 weights", {"scales": [1.0]}),
    "no list of scales": (ShapeError, r"scales is float; give a list with one entry per weight", {"scales": 1.0}),
    "no scales": (ShapeError, r"scales is NoneType; give a list", {"scales": None}),
    "all on meta": (ShapeError, r"weights\[0\].* is on meta, where weights have no values; materialise",
                    {key: [M.to("meta") for M in good[key]] for key in ("weights", "lora_As", "lora_Bs")}),
    **{f"scale {c!r}": (ConfigError, rf"scale of term 1, of weights\[1\].*, is {said}; use a number",
                        {"scales": [1.0, c]})
       for c, said in (("2", "'2'"), (True, "True"), (None, "None"), (1j, "1j"),
                       (torch.ones((), requires_grad=True), r"a tensor \[\] that requires grad"),
                       (torch.ones((), device="meta"), r"a tensor \[\]"), (torch.ones(2), r"a tensor \[2\]"))},
    **{f"row {row!r}": (ConfigError, rf"first row of term 1, of weights\[1\].*, is {said}; use an integer",
                        {"rows": [0, row]})
       for row, said in ((1.9, "1.9"), ("2", "'2'"), (True, "True"), (float("nan"), "nan"), (None, "None"),
                         (torch.tensor(1.5), r"a tensor \[\]"))},
    "terms": (ShapeError, r"weights\[1\].*has 2 lora_As, 1 lora_Bs", {"lora_As": [A0, [A0, A0]]}),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", list(BAD))
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    what: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    error, message, changed = BAD[what]
    call = {**good, **changed}
    names = ["blocks.0.qkv", "blocks.0.proj", "head"][: len(call["weights"])]
    before = [W.clone() for W in call["weights"]]
    with pytest.raises(error, match=message) as caught:
        batched_merge_(**call, names=names)
    assert any(name in str(caught.value) for name in names) or what in ("lengths", "no list of scales", "no scales")
    for W, old in zip(call["weights"], before, strict=True):
        assert W.device.type == "meta" or torch.equal(W, old)


def test_weights_and_names_are_lists_of_one_length() -> None:
    W = torch.zeros(6, 4)
    for message, call, names in (
        ("weights is generator; give a list", (w for w in [W]), None),
        ("names has 1 entries for 2 weights", [W, W.clone()], ["a"]),
        ("names is str; give a list", [W, W.clone()], "ab"),
    ):
        with pytest.raises(ShapeError, match=message):
            batched_merge_(call, [A0] * 2, [B0] * 2, [1.0, float("inf")], names=names)
    assert not W.any()


def test_out_of_place_reads_what_may_not_be_written() -> None:
    call = {**good, "weights": [inference()[:3, :4], torch.randn(1, 5).expand(3, 5).requires_grad_()],
            "lora_Bs": [B0[:3], good["lora_Bs"][1]]}  # fmt: skip
    with torch.inference_mode():
        expected = [W + c * B @ A for W, A, B, c in zip(*call.values(), strict=True)]
    for found, want in zip(batched_merge(**call), expected, strict=True):
        torch.testing.assert_close(found, want)


@needs_extension
def test_the_operator_itself_refuses_what_would_reach_beyond_memory() -> None:
    batched._extension()
    merge_ = torch.ops.slora.batched_merge_
    W, A, B = torch.zeros(6, 4), torch.ones(2, 4), torch.ones(6, 2)
    for message, call in {
        "covers 6 rows from row 1 on of weights.0., which has 6": ([W], [A], [B], [1.0], [0], [1]),
        "covers 6 rows from row -1 on": ([W], [A], [B], [1.0], [0], [-1]),
        "names none of the 1 weights": ([W], [A], [B], [1.0], [1], [0]),
        "expected .r, 4.": ([W], [A[:, :3]], [B], [1.0], [0], [0]),
        "each term needs one": ([W], [A], [B], [], [0], [0]),
        r"weights\[0\] and weights\[1\] share memory": ([W, W[2:]], [A], [B], [1.0], [0], [0]),
        r"weights\[0\] and lora_As\[0\] share memory": ([W], [W[:2]], [B], [1.0], [0], [0]),
        "scales.0. is not finite": ([W], [A], [B], [float("inf")], [0], [0]),
        "column stride 6": ([torch.zeros(4, 6).T], [A], [B], [1.0], [0], [0]),
        "so its rows share memory": ([torch.zeros(1, 4).expand(6, 4)], [A], [B], [1.0], [0], [0]),
        "expected .N, K.": ([W[0]], [A], [B], [1.0], [0], [0]),
    }.items():
        with pytest.raises(ValueError, match=message):
            merge_(*call, [])
    with pytest.raises(ValueError, match="covers 6 rows from row 1 on"):
        merge_([W.to("meta")], [A.to("meta")], [B.to("meta")], [1.0], [0], [1], [])
    for kept in (W[:3], W.double(), torch.zeros(4, 6).T):
        with pytest.raises(ValueError, match=r"backup\[0\] cannot hold weights\[0\]"):
            merge_([W], [A], [B], [1.0], [0], [0], [kept])
    with pytest.raises(ValueError, match=r"weights\[0\] and backup\[0\] share memory"):
        merge_([W], [A], [B], [1.0], [0], [0], [W])
    assert not W.any()
