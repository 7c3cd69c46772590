"""Compiles every Triton kernel to machine code of an A100 and an H100; for a process without TRITON_INTERPRET."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.kernels import photometric_gpu, planes_gpu, resample_gpu

SIGNATURES = {
    planes_gpu._convert: "*u8 *i64 *u8",
    resample_gpu._find_taps: "*fp64 *i64 *i1 *i32 *i32 *i32 i32 i32 i1",
    resample_gpu._resize_along_first: "*i64 *i64 *i64 *i1 *i32 *i32 *i32 *i64 *u8 i32 i32",
    resample_gpu._resize_along_second: "*u8 *i64 *i64 *i1 *i32 *i32 *i32 *u8 i32 i32",
    photometric_gpu._sum_grey: "*u8 *i32 *fp32 *i32 i32",
    photometric_gpu._jitter_and_grey: "*u8 *i32 *fp32 *i32 *i1 i32",
    photometric_gpu._blur_rows: "*u8 *i64 *fp32 *fp32 i32 i32",
    photometric_gpu._blur_columns: "*fp32 *i64 *fp32 *u8 i32 i32",
}
# Instructions that the interpreter does not imitate: a product and a sum rounded once, a quotient that is nearly right.
INEXACT = "fma.rn.", "div.full.", "div.approx."


def compile_for(capability: int) -> None:
    for kernel, types in SIGNATURES.items():
        signature = dict(zip(kernel.arg_names, [*types.split(), "constexpr"], strict=True))
        source, target = ASTSource(kernel, signature, {"block": 1024}), GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=resample_gpu.EXACT)
        found = [name for name in INEXACT if name in compiled.asm["ptx"]]
        assert not found, f"{kernel.__name__} for sm_{capability} has {', '.join(found)}"


if __name__ == "__main__":
    compile_for(80)
    compile_for(90)
