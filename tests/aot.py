"""Compiles Triton kernels for a GPU that need not be there, and reads what ptxas made of them.

A script, not a test module: it runs in its own process without TRITON_INTERPRET, which replaces tl.* at import.
Prints one JSON line a kernel: name, arch, registers, spilled bytes, row loads of 16 bytes, and what is wrong. Numbers
choose architectures, --only=WORD kernels with it in their name. `python -m tests.compiled` keeps what it prints.
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

from gas_triton.kernels import (
    aggregate,
    aggregate_triton,
    attention_triton,
    dropout,
    dynamic_attention_triton,
    edge_dot,
    multi_aggregate,
    multi_aggregate_grad,
    pull,
    push,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8, "i8": 1}
WARPS = {"_dropout_kernel": 4, "_pull_kernel": 8}


def compile_kernel(kernel, signature, constants, arch, num_warps=1):
    """The compiled kernel; every pointer is promised to be divisible by 16, as torch allocations are."""
    # Triton 3.6 takes no constants but the kernel's own
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
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
    residual=None,
    residual_weight=0.0,
):
    """(kernel, signature, constants, least number of 16-byte loads) as `_launch` would call it."""
    scale = table == "i8"
    block_f, rows = aggregate_triton.tile(features, min(ITEMSIZE[x], ITEMSIZE[table]))
    chunked = hubs == "chunked"
    accumulator = "fp64" if x == "fp64" else "fp32"
    signature = {
        "p_x": f"*{x}", "p_table": f"*{table}", "p_scale": "*fp32", "p_inner_rowptr": "*i32", "p_inner_col": "*i32",
        "p_out": f"*{accumulator}" if chunked else f"*{x}", "p_arg": "*i32", "p_weight": "*fp32",
        "p_outer_rowptr": "*i32", "p_outer_col": "*i32", "p_outer_node": "*i32", "p_chunk_row": "*i32",
        "p_chunk_start": "*i32", "p_winner": "*i32", "p_edge_id": "*i32", "p_seed": "*i64",
        "p_residual": f"*{residual}", "num_programs": "i32",
        "num_inner": "i32", "drop_below": "i32", "drop_scale": "fp32",
    }  # fmt: skip
    constants = {
        "F": features, "STRIDE_X": features, "STRIDE_TABLE": features, "BLOCK_F": block_f, "ROWS": rows, "UNROLL": 8,
        "ACC": getattr(triton.language, "float64" if x == "fp64" else "float32"), "REDUCE": reduce,
        "HAS_SCALE": scale, "HAS_WEIGHT": weight, "HAS_OUTER": outer, "HAS_DROPOUT": drop, "STAGED": staged,
        "HAS_WINNER": winner, "HUB_EDGES": aggregate.HUB_EDGES, "SKIP_HUBS": hubs == "skipped", "CHUNKED": chunked,
        "HAS_RESIDUAL": residual is not None, "STRIDE_RESIDUAL": features, "RESIDUAL_WEIGHT": residual_weight,
    }  # fmt: skip
    absent = {
        "p_scale": scale, "p_weight": weight, "p_outer_rowptr": outer, "p_outer_col": outer, "p_outer_node": staged,
        "p_chunk_row": chunked, "p_chunk_start": chunked, "p_winner": winner, "p_edge_id": winner, "p_seed": drop,
        "p_residual": residual is not None,
    }  # fmt: skip
    constants |= {name: None for name, present in absent.items() if not present}
    # the wider of the two row types needs two loads where the narrower fills a lane's 16 bytes with one; of int8 a lane
    # takes 8 bytes
    wide = 8 * max(1, ITEMSIZE[x] // 2 if scale else 1) if features * ITEMSIZE[x] % 16 == 0 else 0
    wide += 8 if outer and not scale and features * ITEMSIZE[table] % 16 == 0 else 0
    wide += 1 if residual is not None and features * ITEMSIZE[residual] % 16 == 0 else 0
    return aggregate_triton._aggregate_kernel, signature, constants, wide


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


def attention_case(kind, x, heads, width, edge=False, drop=False, hubs="none", save=True):
    """The forward, merge or backward kernel as its launcher would call it."""
    block_d, pairs = attention_triton.tile(width, ITEMSIZE[x])
    chunked = hubs == "chunked"
    accumulator = "fp64" if x == "fp64" else "fp32"
    row = f"*{accumulator}" if chunked else f"*{x}"
    pointers = {
        "p_x": f"*{x}", "p_grad": f"*{x}", "p_source": "*fp32", "p_target": "*fp32", "p_edge_logit": "*fp32",
        "p_rowptr": "*i32", "p_col": "*i32", "p_edge_id": "*i64", "p_chunk_row": "*i32", "p_chunk_start": "*i32",
        "p_hub_row": "*i32", "p_hub_ptr": "*i32", "p_seed": "*i64", "p_out": row, "p_positive": row, "p_grad_x": row,
    }  # fmt: skip
    own = (
        "p_lse", "p_positive_weight", "p_partial", "p_partial_lse", "p_partial_positive", "p_partial_weight", "p_delta",
        "p_grad_source", "p_grad_edge",
    )  # fmt: skip
    counts = dict.fromkeys(("num_rows", "num_hubs", "num_edges", "drop_below"), "i32")
    signature = pointers | dict.fromkeys(own, f"*{accumulator}") | counts | {"drop_scale": "fp32"}
    constants = {
        "HEADS": heads, "D": width, "STRIDE_X": heads * width, "BLOCK_D": block_d, "PAIRS": pairs,
        "UNROLL": attention_triton.unroll(edge, drop, hubs != "none"), "SLOPE": 0.2,
        "ACC": getattr(triton.language, "float64" if x == "fp64" else "float32"), "HAS_EDGE_LOGIT": edge,
        "HAS_EDGE_ID": edge or drop, "HAS_DROPOUT": drop, "SAVE": save, "EDGE_GRAD": edge,
        "HUB_EDGES": aggregate.HUB_EDGES, "SKIP_HUBS": hubs == "skipped", "CHUNKED": chunked,
    }  # fmt: skip
    absent = {"p_edge_logit": edge, "p_chunk_row": chunked, "p_chunk_start": chunked, "p_seed": drop}
    constants |= {name: None for name, present in absent.items() if not present}
    kernel = getattr(attention_triton, f"_attention_{kind}kernel")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    wide = constants.get("UNROLL", 1)
    return kernel, signature, constants, wide if width * ITEMSIZE[x] % 16 == 0 else 0


ALL = ("sum", "mean", "min", "max", "var", "std")


def multi_aggregate_case(x, table, features, reduces=ALL, outer=True, hubs="none", drop=False, staged=False, grad=True):
    _, signature, constants, wide = aggregate_case(x, table, features, outer=outer, hubs=hubs, drop=drop, staged=staged)
    accumulator = "fp64" if x == "fp64" else "fp32"
    dropped = {"p_arg", "p_weight", "p_winner", "p_edge_id", "REDUCE", "HAS_WEIGHT", "HAS_WINNER"}
    signature = {name: kind for name, kind in signature.items() if name not in dropped} | {
        "p_out": f"*{x}", "p_winner": "*i32", "p_moments": f"*{accumulator}", "p_partial": f"*{accumulator}",
        "p_partial_arg": "*i32", "num_rows": "i32",
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name not in dropped}
    unroll = multi_aggregate.unroll_forward(getattr(multi_aggregate.torch, f"float{accumulator[2:]}"))
    wide = wide * unroll // constants["UNROLL"]
    constants |= {"NUM": len(reduces), "HAS_GRAD": grad, **multi_aggregate_grad.places_of(list(reduces))}
    constants |= {"UNROLL": unroll, "ROWS": min(constants["ROWS"], multi_aggregate.MOST_ROWS)}
    constants |= {} if hubs == "chunked" else {"p_partial": None, "p_partial_arg": None}
    return multi_aggregate._multi_aggregate_kernel, signature, constants, wide


def multi_grad_case(x, features, reduces=ALL, hubs="none"):
    accumulator = "fp64" if x == "fp64" else "fp32"
    block_f, rows = aggregate_triton.tile(features, ITEMSIZE[accumulator])
    places = multi_aggregate_grad.places_of(list(reduces))
    squares = places["AT_VAR"] >= 0 or places["AT_STD"] >= 0
    sums = squares or places["AT_SUM"] >= 0 or places["AT_MEAN"] >= 0
    extrema = ("min" in reduces) + ("max" in reduces)
    unroll = multi_aggregate_grad.unroll(sums + squares + 2 * extrema)
    chunked = hubs == "chunked"
    signature = {
        "p_grad": f"*{x}", "p_x": f"*{x}", "p_coefficient": f"*{accumulator}", "p_winner": "*i32", "p_rowptr": "*i32",
        "p_col": "*i32", "p_edge_id": "*i32", "p_out": f"*{x}", "p_chunk_row": "*i32", "p_chunk_start": "*i32",
        "p_partial": f"*{accumulator}", "num_programs": "i32", "num_rows": "i32",
    }  # fmt: skip
    constants = {
        "F": features, "STRIDE_X": features, "STRIDE_GRAD": features * len(reduces), "BLOCK_F": block_f, "ROWS": rows,
        "UNROLL": unroll, "ACC": getattr(triton.language, "float64" if x == "fp64" else "float32"),
        "AT_MIN": places["AT_MIN"], "AT_MAX": places["AT_MAX"], "SUMS": sums, "SQUARES": squares,
        "HUB_EDGES": aggregate.HUB_EDGES, "SKIP_HUBS": hubs == "skipped", "CHUNKED": chunked,
    }  # fmt: skip
    constants |= {} if chunked else {"p_chunk_row": None, "p_chunk_start": None, "p_partial": None}
    # of a narrower gradient, and of winners beside a wider one, a lane takes 8 bytes
    loads = sums + squares + extrema * (2 if ITEMSIZE[x] == 4 else 1)
    wide = unroll * loads if features % 4 == 0 else 0
    return multi_aggregate_grad._multi_grad_kernel, signature, constants, wide


def dynamic_attention_case(x, heads, width, score, hubs="none", drop=False, edge=False, gradient="", value=True):
    """The kernel of the forward, or with `gradient` "rows" or "columns" that of the backward."""
    rows, block_h, block_d = dynamic_attention_triton.tile(heads, width, ITEMSIZE[x])
    chunked, gatv2 = hubs == "chunked", score == "gatv2"
    accumulator = "fp64" if x == "fp64" else "fp32"
    result = f"*{accumulator}" if chunked else f"*{x}"
    signature = {
        "p_query": f"*{x}", "p_key": f"*{x}", "p_value": f"*{x}", "p_att": f"*{x}", "p_edge": f"*{x}",
        "p_rowptr": "*i32", "p_col": "*i32", "p_edge_id": "*i64", "p_chunk_row": "*i32", "p_chunk_start": "*i32",
        "p_seed": "*i64", "num_programs": "i32", "drop_below": "i32", "drop_scale": "fp32",
    }  # fmt: skip
    constants = {
        "HEADS": heads, "D": width, "ROWS": rows, "BLOCK_H": block_h, "BLOCK_D": block_d,
        "ACC": getattr(triton.language, "float64" if x == "fp64" else "float32"), "SLOPE": 0.2, "GATV2": gatv2,
        "HAS_VALUE": value, "HAS_EDGE": edge, "HAS_EDGE_ID": drop or edge, "HAS_DROPOUT": drop,
        "HUB_EDGES": aggregate.HUB_EDGES, "SKIP_HUBS": hubs == "skipped", "CHUNKED": chunked,
    }  # fmt: skip
    absent = {
        "p_value": value, "p_att": gatv2, "p_edge": edge, "p_edge_id": drop or edge, "p_chunk_row": chunked,
        "p_chunk_start": chunked, "p_seed": drop,
    }  # fmt: skip
    # rows that an edge reads
    gathered = 2 if value or gradient == "columns" else 1
    kernel = dynamic_attention_triton._dynamic_attention_kernel
    if gradient:
        kernel, by_row = dynamic_attention_triton._dynamic_gradient_kernel, gradient == "rows"
        signature |= {
            "p_grad": f"*{x}", "p_lse": f"*{accumulator}", "p_delta": f"*{accumulator}", "p_first": result,
            "p_second": f"*{accumulator}" if by_row else result, "p_grad_edge": f"*{x}",
        }  # fmt: skip
        constants |= {"BY_ROW": by_row}
        absent |= {"p_second": gatv2 if by_row else value, "p_grad_edge": edge and not by_row}
    else:
        signature |= {"p_out": result, "p_lse": f"*{accumulator}", "p_total": f"*{accumulator}"}
        absent |= {"p_total": chunked}
    constants |= {"UNROLL": dynamic_attention_triton.unroll(width, ITEMSIZE[x], value, gradient != "")}
    constants |= {name: None for name, present in absent.items() if not present}
    return kernel, signature, constants, constants["UNROLL"] * gathered if width * ITEMSIZE[x] % 16 == 0 else 0


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
    for table in ("fp32", "bf16", "i8"):
        options = {"weight": True, "residual": "fp32", "residual_weight": 0.1}
        yield f"sum fp32 {table} with residual", 80, *aggregate_case("fp32", table, 128, **options)
    options = {"hubs": "skipped", "residual": "bf16", "residual_weight": 0.1}
    yield "mean bf16 with residual skipping hubs", 96, *aggregate_case("bf16", "bf16", 64, "mean", **options)
    yield "sum scaled without outer", 80, *aggregate_case("fp32", "fp32", 128, outer=False, residual_weight=0.1)
    for reduce, residual_weight in (("sum", 0.0), ("sum", 0.1), ("max", 0.0)):
        signature = {
            "p_partial": "*fp32", "p_partial_arg": "*i32", "p_hub_row": "*i32", "p_hub_ptr": "*i32",
            "p_inner_rowptr": "*i32", "p_outer_rowptr": "*i32", "p_out": "*fp32", "p_arg": "*i32",
            "p_residual": "*fp32",
        }  # fmt: skip
        constants = {
            "F": 128, "BLOCK_F": 128, "ACC": triton.language.float32, "REDUCE": reduce, "HAS_OUTER": True,
            "HAS_RESIDUAL": residual_weight > 0.0, "STRIDE_RESIDUAL": 128, "RESIDUAL_WEIGHT": residual_weight,
        }  # fmt: skip
        wide_loads = 1 + constants["HAS_RESIDUAL"]
        constants |= {} if constants["HAS_RESIDUAL"] else {"p_residual": None}
        name = f"combine {reduce}{' with residual' if residual_weight else ''}"
        yield name, 64, aggregate_triton._combine_kernel, signature, constants, wide_loads
    for features in (64, 128, 256):
        yield f"sum fp32 int8 F={features}", 80, *aggregate_case("fp32", "i8", features)
        yield f"sum bf16 int8 F={features}", 80, *aggregate_case("bf16", "i8", features)
    yield "sum int8 staged with dropout", 128, *aggregate_case("fp32", "i8", 128, weight=True, drop=True, staged=True)
    yield "sum staged with dropout", 128, *aggregate_case("fp32", "bf16", 128, weight=True, drop=True, staged=True)
    yield "max int8", 128, *aggregate_case("fp32", "i8", 128, "max", weight=True)
    for kind in ("", "backward_"):
        for x, heads, width in (
            ("fp32", 8, 8), ("fp32", 1, 128), ("fp32", 4, 256), ("bf16", 8, 8), ("bf16", 4, 64), ("bf16", 1, 256),
            ("fp16", 3, 32), ("fp64", 8, 8),
        ):  # fmt: skip
            yield f"attention {kind}{x} {heads} x {width}", 128, *attention_case(kind, x, heads, width)
        yield f"attention {kind}odd width", 128, *attention_case(kind, "fp32", 3, 7)
        yield f"attention {kind}narrow heads", 128, *attention_case(kind, "bf16", 8, 1)
        yield f"attention {kind}dropout", 128, *attention_case(kind, "bf16", 4, 16, drop=True, hubs="skipped")
        for x in ("fp32", "bf16"):
            options = {"edge": True, "drop": True}
            yield f"attention {kind}{x} with edges", 168, *attention_case(kind, x, 8, 8, **options)
            yield f"attention {kind}{x} wide with edges", 168, *attention_case(kind, x, 1, 256, **options)
        yield f"attention {kind}skipping hubs", 128, *attention_case(kind, "bf16", 8, 8, hubs="skipped")
        yield f"attention {kind}chunks of one head", 128, *attention_case(kind, "fp32", 1, 128, hubs="chunked")
        yield f"attention {kind}chunks", 128, *attention_case(kind, "bf16", 8, 8, drop=True, hubs="chunked")
    yield "attention without backward", 80, *attention_case("", "fp32", 8, 8, save=False)
    for x, width in (("fp32", 8), ("bf16", 256)):
        yield f"attention merge {x}", 80, *attention_case("merge_", "fp32", 8, width)
    yield "edge_dot winner=False", 168, *edge_dot_case("bf16", drop=True)
    yield "edge_dot winner=True", 168, *edge_dot_case("bf16", winner=True)
    yield "edge_dot int8 staged", 168, *edge_dot_case("i8", drop=True, staged=True)
    for score, value in (("dot", True), ("gatv2", False)):
        for gradient in ("", "rows", "columns"):
            for x, heads, width, options in (
                ("fp32", 8, 16, {}), ("fp32", 1, 256, {}), ("bf16", 4, 64, {"hubs": "chunked", "drop": True}),
                ("fp32", 3, 33, {"hubs": "skipped"}), ("fp64", 2, 32, {"edge": True}),
            ):  # fmt: skip
                case = dynamic_attention_case(x, heads, width, score, gradient=gradient, value=value, **options)
                yield f"dynamic attention {score} {gradient} {x} {heads}x{width} {options}", 136, *case
    signature = {
        "p_partial": "*fp32", "p_highest": "*fp32", "p_total": "*fp32", "p_hub_row": "*i32", "p_hub_ptr": "*i32",
        "p_out": "*fp32", "p_lse": "*fp32",
    }  # fmt: skip
    constants = {"HEADS": 4, "D": 32, "BLOCK_H": 4, "BLOCK_D": 32, "ACC": triton.language.float32}
    yield "dynamic merge", 64, dynamic_attention_triton._dynamic_merge_kernel, signature, constants, 1
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
    yield from multi_aggregate_cases()


def multi_aggregate_cases():
    for features in (32, 64, 128, 256):
        yield f"multi F={features}", 128, *multi_aggregate_case("fp32", "fp32", features)
    yield "multi odd width", 128, *multi_aggregate_case("fp32", "fp32", 33)
    narrow = multi_aggregate_case("fp32", "i8", 15, hubs="skipped", drop=True, staged=True)
    yield "multi narrow int8", 184, *narrow
    yield "multi bf16", 168, *multi_aggregate_case("bf16", "bf16", 64)
    yield "multi fp64", 128, *multi_aggregate_case("fp64", "fp64", 64)
    yield "multi mean, max", 96, *multi_aggregate_case("fp32", "fp32", 128, ("mean", "max"), grad=False)
    yield (
        "multi skipping hubs without outer",
        128,
        *multi_aggregate_case("fp32", "fp32", 64, outer=False, hubs="skipped"),
    )
    yield "multi of chunks", 184, *multi_aggregate_case("fp32", "bf16", 128, hubs="chunked")
    yield "multi int8 staged with dropout", 184, *multi_aggregate_case("fp32", "i8", 128, drop=True, staged=True)
    for features in (32, 128, 256, 33):
        yield f"multi grad F={features}", 96, *multi_grad_case("fp32", features)
    for reduces in (("max",), ("mean", "std")):
        yield f"multi grad {', '.join(reduces)}", 96, *multi_grad_case("fp32", 64, reduces)
    yield "multi grad bf16", 96, *multi_grad_case("bf16", 128)
    yield "multi grad fp64 skipping hubs", 96, *multi_grad_case("fp64", 64, hubs="skipped")
    yield "multi grad of chunks", 96, *multi_grad_case("fp32", 128, hubs="chunked")
    places = multi_aggregate_grad.places_of(list(ALL))
    signature = {
        "p_partial": "*fp32", "p_partial_arg": "*i32", "p_hub_row": "*i32", "p_hub_ptr": "*i32",
        "p_inner_rowptr": "*i32", "p_outer_rowptr": "*i32", "p_out": "*fp32", "p_winner": "*i32", "p_moments": "*fp32",
        "p_x": "*fp32", "num_rows": "i32", "num_chunks": "i32",
    }  # fmt: skip
    constants = {"F": 128, "BLOCK_F": 128, "ACC": triton.language.float32}
    combined = constants | {"NUM": 6, "HAS_GRAD": True, "HAS_OUTER": True, **places}
    yield "multi combine", 128, multi_aggregate._multi_combine_kernel, signature, combined, 7
    combined = constants | {"STRIDE_X": 128, "SQUARES": True}
    yield "multi grad combine", 64, multi_aggregate_grad._multi_grad_combine_kernel, signature, combined, 3


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
            about = {"kernel": name, "function": kernel.__name__, "arch": arch, "triton": triton.__version__}
            print(json.dumps({**about, **found, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    word = next((a.removeprefix("--only=") for a in arguments if a.startswith("--only=")), "")
    chosen = (case for case in (controls() if "--controls" in arguments else cases()) if word in case[0])
    main(chosen, [int(a) for a in arguments if a.isdigit()] or [90])
