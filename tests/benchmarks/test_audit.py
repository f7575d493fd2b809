"""What the static audits count, against loops written here, and the ceilings that they divide by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.audit import complaints, gemm_work, of_shape, variants_of
from benchmarks.ceilings import Ceilings, on_record
from benchmarks.record import RESULTS, write_result
from slora.kernels import configs

ROOT = Path(__file__).parents[2]
TILE = configs.gemm("forward", 90, "bulk", "16-bit", 16, 768).candidates[0]


def test_the_work_of_a_product_is_that_of_its_tiles() -> None:
    rows, columns, depth, r, R = TILE.BM + 1, 2 * TILE.BN, TILE.BK + 3, 5, 16
    flops = l2_bytes = 0
    for _row in range(0, rows, TILE.BM):
        for _column in range(0, columns, TILE.BN):
            for _step in range(0, depth, TILE.BK):
                flops += 2 * TILE.BK * TILE.BM * (TILE.BN + R)
                l2_bytes += 2 * TILE.BK * (TILE.BM + TILE.BN + R)
            flops += 2 * TILE.BM * TILE.BN * R
    once = rows * depth + columns * depth + rows * columns + r * (rows + depth + columns)
    assert gemm_work(rows, columns, depth, r, TILE, R) == (flops, 2 * once, l2_bytes)


def test_a_kernel_takes_what_the_lower_ceiling_allows() -> None:
    work = gemm_work(50432, 768, 768, 16, TILE, 16)
    assert work.seconds(Ceilings(1e12, 1e30)) == pytest.approx(work.flops / 1e12)
    assert work.seconds(Ceilings(1e30, 1e9)) == pytest.approx(work.bytes / 1e9)


def test_predictions_divide_by_measured_ceilings_where_there_are_any(tmp_path: Path) -> None:
    assert on_record(tmp_path).source == "stated, not measured here"
    environment = {"commit": "ab" * 20, "dirty": False, "date": "", "device": "NVIDIA H200", "packages": {}}
    found = {"gemm_flops_per_s": {"bf16": 5e14}, "copy_bytes_per_s": 1e30}
    write_result("linear", "cuda", {"environment": environment, "ceilings": found, "rows": []}, tmp_path)
    limits = on_record(tmp_path)
    assert limits == (5e14, 1e30, "measured, commit ababababab")
    shape = of_shape(768, 3072, None, limits)
    assert shape["predicted_frozen_seconds"] == pytest.approx(shape["counted_frozen"]["flops"] / 5e14)


def test_a_merge_is_predicted_to_move_every_weight_once_each_way() -> None:
    from benchmarks.merge_kernel import VIT_L, predicted

    seconds = predicted(2, Ceilings(1.0, 1e9))
    assert seconds == pytest.approx(sum(2 * 2 * rows * columns for rows, columns in VIT_L) / 1e9)


def test_the_audit_in_the_tree_is_of_the_kernels_in_the_tree() -> None:
    compiled = json.loads((RESULTS / "audit" / "linear_kernels.json").read_text())["kernels"]
    assert {(kernel["part"], kernel["kernel"], kernel["label"]) for kernel in compiled} == {
        (part, variant.kernel.fn.__name__, variant.label) for part in configs.PARTS for variant in variants_of(part)
    }


ENTRY = {"part": 90, "kernel": "k", "label": "l", "registers": 128, "faults": [], "digest": "ab"}


def test_a_file_that_is_right_gets_no_complaint() -> None:
    assert complaints(ENTRY, None) == complaints(ENTRY, dict(ENTRY)) == []
    # Compiling the same twice may differ by so much.
    assert complaints(ENTRY, ENTRY | {"registers": 136}) == []
    # Another Triton's code is in no file.
    assert complaints(None, ENTRY, same=False) == []


@pytest.mark.parametrize(
    ("there", "fresh", "said"),
    [
        (None, ENTRY, "not in the file"),
        (ENTRY, ENTRY | {"registers": 137}, "registers is 137, the file says 128"),
        (ENTRY | {"faults": ["8 bytes spilled"]}, None, "8 bytes spilled"),
        (ENTRY, ENTRY | {"stack": 8}, "stack is 8, the file says None"),
    ],
)
def test_a_file_that_is_wrong_gets_a_sentence(there: dict[str, Any] | None, fresh: dict[str, Any], said: str) -> None:
    (found,) = complaints(there, fresh)
    assert found.startswith("sm_90 k l: ")
    assert said in found


DIGEST = """
from benchmarks import digests
from benchmarks.audit import variants_of
from slora.kernels import skinny, tiles

first = digests.digest(next(variants_of(90)))
for function, old, new in CHANGES:
    assert old in function.src
    function._unsafe_update_src(function.src.replace(old, new, 1))
digests._code.cache_clear()
print(first == digests.digest(next(variants_of(90))))
"""


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ("[]", True),
        ("[(skinny._S, 'tl.zeros', '( tl.zeros)'), (tiles.load, '):', '):  # said')]", True),
        ("[(skinny._S, 'tl.zeros', 'tl.full')]", False),
    ],
)
def test_a_digest_follows_the_code_and_not_its_form(changes: str, same: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", DIGEST.replace("CHANGES", changes)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout == f"{same}\n", run.stderr[-2000:]
