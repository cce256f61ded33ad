"""Compiles Triton kernels for a GPU that need not be there, and reads what ptxas made of them.

A script, not a test module: it runs in its own process without TRITON_INTERPRET, which replaces tl.* at import.
Prints one JSON line a kernel: name, arch, registers, spilled bytes, row loads of 16 bytes, and what is wrong.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
# Triton 3.10 turns contraction off by default; the kernels are written for fused multiply-adds
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gas_triton.kernels import aggregate, dropout, edge_dot, pull, push

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8, "i8": 1}
WARPS = {"_dropout_kernel": 4, "_pull_kernel": 8}


def compile_kernel(kernel, signature, constants, arch, num_warps=1):
    """The compiled kernel; every pointer is promised to be divisible by 16, as torch allocations are."""
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})


def resources(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    numbers = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ops = collections.Counter(
        re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    )
    spills = sum(count for op, count in ops.items() if re.match(r"(LDL|STL)\b", op))
    wide = sum(count for op, count in ops.items() if re.match(r"LDG\S*\.128", op))
    return {
        "registers": numbers["reg"],
        "spilled": numbers["stack"] + numbers["local"] + spills,
        "wide_loads": wide,
        "barriers": sum(count for op, count in ops.items() if op.startswith("BAR")),
        "shared": compiled.metadata.shared,
    }


def _run(tool, *args):
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def aggregate_case(
    x,
    table,
    features,
    reduce="sum",
    weight=False,
    outer=True,
    hubs="none",
    drop=False,
    winner=False,
    staged=False,
):
    """(kernel, signature, constants, least number of 16-byte loads) as `_launch` would call it."""
    scale = table == "i8"
    block_f, rows = aggregate.tile(features, min(ITEMSIZE[x], ITEMSIZE[table]))
    chunked = hubs == "chunked"
    accumulator = "fp64" if x == "fp64" else "fp32"
    signature = {
        "p_x": f"*{x}", "p_table": f"*{table}", "p_scale": "*fp32", "p_inner_rowptr": "*i32", "p_inner_col": "*i32",
        "p_out": f"*{accumulator}" if chunked else f"*{x}", "p_arg": "*i32", "p_weight": "*fp32",
        "p_outer_rowptr": "*i32", "p_outer_col": "*i32", "p_outer_node": "*i32", "p_chunk_row": "*i32",
        "p_chunk_start": "*i32", "p_winner": "*i32", "p_edge_id": "*i32", "p_seed": "*i64", "num_programs": "i32",
        "num_inner": "i32", "drop_below": "i32", "drop_scale": "fp32",
    }  # fmt: skip
    constants = {
        "F": features, "STRIDE_X": features, "STRIDE_TABLE": features, "BLOCK_F": block_f, "ROWS": rows, "UNROLL": 8,
        "ACC": getattr(triton.language, "float64" if x == "fp64" else "float32"), "REDUCE": reduce,
        "HAS_SCALE": scale, "HAS_WEIGHT": weight, "HAS_OUTER": outer, "HAS_DROPOUT": drop, "STAGED": staged,
        "HAS_WINNER": winner, "HUB_EDGES": aggregate.HUB_EDGES, "SKIP_HUBS": hubs == "skipped", "CHUNKED": chunked,
    }  # fmt: skip
    absent = {
        "p_scale": scale, "p_weight": weight, "p_outer_rowptr": outer, "p_outer_col": outer, "p_outer_node": staged,
        "p_chunk_row": chunked, "p_chunk_start": chunked, "p_winner": winner, "p_edge_id": winner, "p_seed": drop,
    }  # fmt: skip
    constants |= {name: None for name, present in absent.items() if not present}
    # the wider of the two row types needs two loads where the narrower fills a lane's 16 bytes with one; of int8 a lane
    # takes 8 bytes
    wide = 8 * max(1, ITEMSIZE[x] // 2 if scale else 1) if features * ITEMSIZE[x] % 16 == 0 else 0
    wide += 8 if outer and not scale and features * ITEMSIZE[table] % 16 == 0 else 0
    return aggregate._aggregate_kernel, signature, constants, wide


def edge_dot_case(table, winner=False, drop=False, staged=False):
    scale = table == "i8"
    lanes = 32 * (16 // max(2, ITEMSIZE[table]))
    signature = {
        "p_grad": "*fp32", "p_table": f"*{table}", "p_scale": "*fp32", "p_row": "*i64", "p_col": "*i32",
        "p_node": "*i32", "p_winner": "*i32", "p_seed": "*i64", "p_out": "*fp32", "num_edges": "i32",
        "first_edge": "i32", "drop_below": "i32", "drop_scale": "fp32",
    }  # fmt: skip
    constants = {
        "F": 128, "STRIDE_GRAD": 128, "STRIDE_TABLE": 128, "BLOCK_F": 128, "EDGES": 4 * lanes // 128,
        "ACC": triton.language.float32, "HAS_SCALE": scale, "HAS_NODE": staged, "HAS_WINNER": winner,
        "HAS_DROPOUT": drop,
    }  # fmt: skip
    absent = {"p_scale": scale, "p_node": staged, "p_winner": winner, "p_seed": drop}
    constants |= {name: None for name, present in absent.items() if not present}
    return edge_dot._edge_dot_kernel, signature, constants, 8


def push_case(x, stored, features, nonfinite="skip", packed=False, write=True):
    block_f, rows = push.tile(features)
    signature = {
        "p_x": f"*{x}", "p_ids": "*i64", "p_rows": f"*{stored}", "p_scale": "*fp32", "p_last_push": "*i32",
        "p_clock": "*i64", "p_report": "*i64", "num_rows": "i32",
    }  # fmt: skip
    constants = {
        "F": features, "STRIDE_X": features, "STRIDE_ROWS": features, "BLOCK_F": block_f, "ROWS": rows,
        "SCATTER": not packed, "CHECK": nonfinite != "allow", "SKIP": nonfinite == "skip" and not packed,
        "WRITE": write,
    }  # fmt: skip
    absent = {"p_scale": stored == "i8", "p_last_push": not packed, "p_clock": not packed}
    constants |= {name: None for name, present in absent.items() if not present}
    return push._push_kernel, signature, constants, block_f * rows * ITEMSIZE[x] // 512


def pull_case(table, out, features):
    itemsize = ITEMSIZE[table], ITEMSIZE[out]
    block_f, rows = pull.tile(features, max(itemsize))
    signature = {"p_table": f"*{table}", "p_scale": "*fp32", "p_ids": "*i64", "p_out": f"*{out}", "num_rows": "i32"}
    has_scale = table == "i8" and out != "i8"
    constants = {"F": features, "STRIDE_TABLE": features, "BLOCK_F": block_f, "ROWS": rows, "HAS_SCALE": has_scale}
    constants |= {} if has_scale else {"p_scale": None}
    return pull._pull_kernel, signature, constants, pull.TILE_BYTES * itemsize[0] // max(itemsize) // (256 * 16)


def cases():
    for x, table in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp16")):
        for features in (32, 64, 128, 256):
            yield f"sum {x} {table} F={features}", 80, *aggregate_case(x, table, features)
    for features in (32, 128, 256):
        yield f"sum weighted F={features}", 80, *aggregate_case("fp32", "fp32", features, weight=True)
    yield "mean skipping hubs", 96, *aggregate_case("fp32", "fp32", 128, "mean", hubs="skipped")
    yield "sum of chunks", 96, *aggregate_case("fp32", "bf16", 128, weight=True, hubs="chunked")
    yield "sum without outer", 80, *aggregate_case("fp32", "fp32", 128, outer=False)
    yield "sum with dropout", 128, *aggregate_case("fp32", "fp32", 128, weight=True, drop=True)
    yield "sum odd width", 80, *aggregate_case("fp32", "fp32", 100)
    yield "max", 128, *aggregate_case("fp32", "fp32", 128, "max", weight=True)
    yield "min of chunks", 128, *aggregate_case("bf16", "bf16", 64, "min", hubs="chunked")
    yield "winners", 128, *aggregate_case("fp32", "fp32", 128, outer=False, winner=True, weight=True)
    yield "sum fp64", 128, *aggregate_case("fp64", "fp64", 64)
    for reduce in ("sum", "max"):
        signature = {
            "p_partial": "*fp32", "p_partial_arg": "*i32", "p_hub_row": "*i32", "p_hub_ptr": "*i32",
            "p_inner_rowptr": "*i32", "p_outer_rowptr": "*i32", "p_out": "*fp32", "p_arg": "*i32",
        }  # fmt: skip
        constants = {"F": 128, "BLOCK_F": 128, "ACC": triton.language.float32, "REDUCE": reduce, "HAS_OUTER": True}
        yield f"combine {reduce}", 64, aggregate._combine_kernel, signature, constants, 1
    for features in (64, 128, 256):
        yield f"sum fp32 int8 F={features}", 80, *aggregate_case("fp32", "i8", features)
        yield f"sum bf16 int8 F={features}", 80, *aggregate_case("bf16", "i8", features)
    yield "sum int8 staged with dropout", 128, *aggregate_case("fp32", "i8", 128, weight=True, drop=True, staged=True)
    yield "sum staged with dropout", 128, *aggregate_case("fp32", "bf16", 128, weight=True, drop=True, staged=True)
    yield "max int8", 128, *aggregate_case("fp32", "i8", 128, "max", weight=True)
    yield "edge_dot winner=False", 168, *edge_dot_case("bf16", drop=True)
    yield "edge_dot winner=True", 168, *edge_dot_case("bf16", winner=True)
    yield "edge_dot int8 staged", 168, *edge_dot_case("i8", drop=True, staged=True)
    for x, stored in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp16"), ("fp64", "fp64")):
        yield f"push {x} to {stored}", 64, *push_case(x, stored, 128)
    for features in (64, 256, 1024, 1500):
        yield f"push int8 F={features}", 72, *push_case("fp32", "i8", features)
    yield "push without a check", 64, *push_case("fp32", "fp32", 128, "allow")
    yield "check", 64, *push_case("fp32", "fp32", 128, "warn", packed=True, write=False)
    yield "pack bf16", 64, *push_case("fp32", "bf16", 128, "warn", packed=True)
    yield "pack int8", 64, *push_case("fp32", "i8", 128, "warn", packed=True)
    for table, out in (("fp32", "fp32"), ("bf16", "fp32"), ("i8", "fp32"), ("i8", "bf16"), ("i8", "i8")):
        for features in (32, 256):
            yield f"pull {table} to {out} F={features}", 64, *pull_case(table, out, features)
    signature = {
        "p_x": "*fp32", "p_ids": "*i64", "p_seed": "*i64", "p_out": "*fp32", "num_rows": "i32", "drop_below": "i32",
        "scale": "fp32",
    }  # fmt: skip
    constants = {"F": 128, "STRIDE_X": 128, "BLOCK_F": 128, "ROWS": 8}
    yield "dropout", 64, dropout._dropout_kernel, signature, constants, 1


def controls():
    """Kernels that must be found wrong: a tile that cannot fit in registers, and rows that are not 16-byte aligned."""
    kernel, signature, constants, wide_loads = aggregate_case("fp32", "fp32", 1024)
    yield "control: tile too large", 80, kernel, signature, constants | {"BLOCK_F": 1024, "ROWS": 8}, wide_loads
    kernel, signature, constants, _ = aggregate_case("fp32", "fp32", 33)
    yield "control: narrow loads", 80, kernel, signature, constants, 16


def main(chosen, architectures):
    for name, cap, kernel, signature, constants, wide_loads in chosen:
        for arch in architectures:
            found = resources(compile_kernel(kernel, signature, constants, arch, WARPS.get(kernel.__name__, 1)))
            wrong = []
            if found["spilled"]:
                wrong.append(f"spills {found['spilled']}")
            if found["wide_loads"] < wide_loads:
                wrong.append(f"{found['wide_loads']} row loads of 16 bytes, expected {wide_loads}")
            if found["registers"] > cap:
                wrong.append(f"{found['registers']} registers, cap {cap}")
            print(
                json.dumps({"kernel": name, "function": kernel.__name__, "arch": arch, **found, "wrong": wrong}),
                flush=True,
            )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(controls() if "--controls" in arguments else cases(), [int(a) for a in arguments if a.isdigit()] or [90])
