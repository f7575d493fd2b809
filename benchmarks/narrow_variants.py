"""The kernels beside the two GEMMs with every configuration of `kernels/narrow_configs.py`, to be compiled.

Each is compiled in the most demanding cases that it serves: A and B are fp32 and nothing is known of the rank; where a
kernel reads rows that are aligned in another way than others ("elements"), it is compiled for both. What reads aligned
rows is compiled once more for sizes that all are multiples of 16, as in most models: that is other code.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import triton.language as tl

from benchmarks.compiled import Variant
from slora.kernels import configs, gate_probe, narrow_configs, skinny, weight_gradients

# What is multiplied: the dtype of the rows as Triton writes it, and the precision of the product.
_KINDS: dict[configs.Precision, tuple[str, str]] = {
    "16-bit": ("bf16", "ieee"),
    "tf32": ("fp32", "tf32"),
    "ieee": ("fp32", "ieee"),
}
PRECISIONS = tuple(_KINDS)
_DTYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}


def narrow_variants(part: int, precisions: Sequence[configs.Precision] = PRECISIONS) -> Iterator[Variant]:
    """Yield every case of one kind of GPU; kernels without products come with the exact precision."""
    for precision in precisions:
        for variant in (*_weight_gradients(part, precision), *_skinny(part, precision), *_probes(part, precision)):
            yield variant
            if "elements" not in variant.label and variant.kernel is not gate_probe._probe_table:
                # An interpreted kernel does not know; it is not compiled either.
                unknown = frozenset(getattr(variant.kernel, "do_not_specialize", ()))
                yield dataclasses.replace(variant, label=f"all % 16 == 0, {variant.label}", unaligned=unknown)
    if "ieee" in precisions:
        yield from _others(part)


def _variant(
    kernel: Any,
    part: int,
    label: str,
    types: dict[str, str],
    meta: dict[str, Any],
    constants: dict[str, Any],
    aligned: Iterable[str] = (),
    **more: Any,
) -> Variant:
    """A variant whose arguments are integers where `types` and `constants` say nothing."""
    options = {name: value for name, value in meta.items() if name.startswith("num_") or name == "maxnreg"}
    constants = constants | {name: value for name, value in meta.items() if name not in options}
    integers = [name for name in kernel.arg_names if name not in types and name not in constants]
    return Variant(
        kernel=kernel,
        part=part,
        label=label,
        types=types | dict.fromkeys(integers, "i32"),
        constants=constants,
        options=options,
        unaligned=frozenset(integers) - frozenset(aligned),
        **more,
    )


def _weight_gradients(part: int, precision: configs.Precision) -> Iterator[Variant]:
    element, multiplied = _KINDS[precision]
    pointers = {
        "S": f"*{element}", "T": f"*{element}", "gate": "*fp32", "seed": "*i64", "partial_A": "*fp32",
        "partial_B": "*fp32", "threshold": "fp32",
    }  # fmt: skip
    # By elements only with the mask, which asks for more registers still.
    vectors = "bulk" if part >= 90 else "vectors"
    cases = [(vectors, False), (vectors, True), ("elements", True)]
    for low in (16, 32, 64, 128):
        tiles = narrow_configs.weight_gradients(part, precision, low)
        for tile, (access, dropout) in itertools.product(tiles, cases):
            bulk = access == "bulk"
            rows = f"tensordesc<{element}[{tile.ROWS}, {tile.TILE}]>" if bulk else f"*{element}"
            constants = {
                "LOW_A": low, "LOW_B": low, "DROPOUT": dropout, "DESCRIPTORS": bulk, "PRECISION": multiplied,
            }  # fmt: skip
            yield _variant(
                weight_gradients._partial_sums,
                part,
                f"{precision}, {access}{', dropout' * dropout}, {low}, {tile}",
                pointers | {"x": rows, "dy": rows},
                tile.meta(),
                constants | ({} if dropout else {"seed": None}),
                ("K", "N", "n", "stride_x", "stride_dy") if access == "vectors" else (),
                tensor_cores=precision != "ieee",
                # Before sm_90 there is nothing else; after it, tiles are tall enough for the own instructions.
                older_products=part < 90,
                described=("x", "dy") if bulk else (),
                # The mask.
                in_registers=dropout and precision == "tf32",
            )


def _skinny(part: int, precision: configs.Precision) -> Iterator[Variant]:
    element, multiplied = _KINDS[precision]
    common = {"gate": "*fp32", "threshold": "fp32"}
    cases = [
        (low, narrow_configs.skinny(precision, rows, low, aligned), aligned)
        for aligned in (True, False) for low in (16, 32, 64, 128) for rows in (8, 64, 128)
    ]  # fmt: skip
    for low, tile, aligned in dict.fromkeys(cases):
        constants = {"PRECISION": multiplied, "LOW": low}
        arrays = dict.fromkeys(("x", "S", "room"), f"*{element}")
        # Room is filled after the loop that masks: with both, the kernel is at its largest.
        yield _variant(
            skinny._S,
            part,
            f"{precision}, dropout, room{'' if aligned else ', elements'}, {low}, {tile}",
            arrays | common | {"A": "*fp32", "seed": "*i64", "factor": "fp32"},
            tile.meta(),
            constants | {"DROPOUT": True, "ROOM": True},
            ("K", "stride_x") if aligned else (),
            tensor_cores=precision != "ieee",
            older_products=True,
            copies_ahead=aligned,
        )
        # T is S without mask and room: by elements it takes less than that.
        if aligned:
            yield _variant(
                skinny._T,
                part,
                f"{precision}, {low}, {tile}",
                common | {"dy": f"*{element}", "B": "*fp32", "T": f"*{element}"},
                tile.meta(),
                constants,
                ("n", "stride_dy"),
                tensor_cores=precision != "ieee",
                older_products=True,
                copies_ahead=True,
            )


def _probes(part: int, precision: configs.Precision) -> Iterator[Variant]:
    element, multiplied = _KINDS[precision]
    cases = [
        (low, narrow_configs.gate_probe(precision, m, low, aligned=aligned), aligned)
        for aligned in (True, False) for low in (16, 32, 64) for m in (512, 50432)
    ]  # fmt: skip
    for low, tile, aligned in dict.fromkeys(cases):
        yield _variant(
            gate_probe._probe,
            part,
            f"{precision}{'' if aligned else ', elements'}, {low}, {tile}",
            {
                "dy": f"*{element}", "x": f"*{element}", "A": "*fp32", "B": "*fp32", "gate": "*fp32", "out": "*fp32",
                "shift": "*i64", "threshold": "fp32", "scaling": "fp32",
            },
            tile.meta(),
            {"PRECISION": multiplied, "LOW": low},
            ("K", "n", "stride_dy", "stride_x") if aligned else (),
            tensor_cores=precision != "ieee",
            older_products=True,
            copies_ahead=aligned,
        )  # fmt: skip

    tile = narrow_configs.gate_probe(precision, 512, 64, layers=64)
    yield _variant(
        gate_probe._probe_table,
        part,
        f"{precision}, 64 layers, 64, {tile}",
        {"table": "*i64", "factors": "*fp32", "out": "*fp32"},
        tile.meta(),
        {
            "LAYERS": 64, "ROW_DTYPE": _DTYPES[element], "LORA_DTYPE": tl.float32, "PRECISION": multiplied, "LOW": 64,
        },
        tensor_cores=precision != "ieee",
        older_products=True,
    )  # fmt: skip


def _others(part: int) -> Iterator[Variant]:
    """The reduction of the weight gradients and the copy of sampled rows."""
    fp32 = ("partial_A", "partial_B", "dA", "dB", "B", "dots", "gate")
    yield _variant(
        weight_gradients._reduce,
        part,
        "all three",
        dict.fromkeys(fp32, "*fp32") | {"threshold": "fp32", "scaling": "fp32"},
        {"num_warps": 2, "TILE": 128, "LOW_A": 64, "LOW_B": 16, "WIDE": 32, "NARROW": 16},
        {"NEED_A": True, "NEED_B": True, "NEED_GATE": True},
        tensor_cores=False,
    )
    for element in _DTYPES:
        yield _variant(
            gate_probe._sample_rows,
            part,
            element,
            {"x": f"*{element}", "out": f"*{element}", "shift": "*i64"},
            narrow_configs.SAMPLE,
            {},
            tensor_cores=False,
        )
