"""Compile the Triton kernels of the loss for a GPU that need not be here, and print what the assembler made of them.

    python benchmarks/inspect_kernels.py [--arch 80,90] [--dtypes bf16,fp32]

Per kernel and configuration: registers a thread, bytes spilled, shared memory, and how many tensor-core and
asynchronous-copy instructions its code has. A spill or a missing wgmma (mma on Ampere) is a regression.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from feddra_ds.losses import triton_kernels as kernels
from feddra_ds.losses import triton_launch as tiles

FLOATS = {
    "rx",
    "ry",
    "scale_ptr",
    "bias_ptr",
    "row_out",
    "col_out",
    "diag_out",
    "row",
    "col",
    "row_coef",
    "col_coef",
    "diagonal",
}
FLOATS |= {"gain_ptr", "sum_gs", "sum_g", "out"}
EMBEDDINGS = {"x", "y", "a", "b", "panel"}
UNIT = {"product_kernel": {"a_k", "b_n"}}  # strides that are 1, which Triton specialises on


def compile_kernel(name: str, arch: int, dtype: str, config: tiles.Config, variant: dict[str, Any]) -> Any:
    """The compiled kernel for embeddings of `dtype` (bf16, fp16, fp32) on compute capability `arch` (80, 90)."""
    kernel = getattr(kernels, name)
    constants: dict[str, Any] = {"BM": config.rows, "BN": config.columns, "BK": config.depth, **variant}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in UNIT.get(name, ()):
            signature[argument], constants[argument] = "constexpr", 1
        elif argument in EMBEDDINGS or argument in FLOATS:
            signature[argument] = "*" + (dtype if argument in EMBEDDINGS else "fp32")
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
            if argument != "first_row":
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def describe(compiled: Any) -> dict[str, int]:
    """Registers, spills, shared memory and instruction counts of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [str(tools / "cuobjdump"), "-res-usage", str(file)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        command = [str(tools / "nvdisasm"), str(file)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout))
    return {
        "registers": int(numbers["REG"]),
        "spilled": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": int(compiled.metadata.shared),
        "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA)", sass)),
        "async_copy": len(re.findall(r"\bLDGSTS", sass)),
        "exp": len(re.findall(r"\bMUFU\.EX2", sass)),
    }


def cases(dtype: str) -> list[tuple[str, str, tiles.Config, dict[str, Any]]]:
    """(kernel, variant's name, configuration, constants) of all that a training step may launch."""
    configs = tiles.FLOAT32 if dtype == "fp32" else tiles.WIDE
    precision = {"PRECISION": "ieee"}
    found = []
    for config in configs:
        for label, siglip, fast in (("fast", False, True), ("exact maxima", False, False), ("siglip", True, True)):
            block = {"DIAGONAL": True, "SIGLIP": siglip, "FAST": fast, "EVEN": True, "FULL": True, **precision}
            found.append(("stats_kernel", label, config, block))
            found.append(("panel_kernel", label, config, {**block, "GROUP": tiles.GROUP}))
        found.append(("product_kernel", "", config, {"ADD": True, "GROUP": tiles.GROUP, **precision}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90", help="compute capabilities, comma-separated (80,90)")
    parser.add_argument("--dtypes", default="bf16,fp32", help="of bf16, fp16, fp32 (bf16,fp32)")
    args = parser.parse_args()
    for arch in (int(a) for a in args.arch.split(",")):
        for dtype in args.dtypes.split(","):
            for name, label, config, variant in cases(dtype):
                try:
                    found = describe(compile_kernel(name, arch, dtype, config, variant))
                    text = " ".join(f"{k}={v}" for k, v in found.items())
                except triton.runtime.errors.OutOfResources as error:
                    text = str(error)
                shape = "x".join(str(n) for n in config)
                print(f"sm_{arch} {dtype} {name:14} {label:12} {shape:18} {text}", flush=True)


if __name__ == "__main__":
    main()
