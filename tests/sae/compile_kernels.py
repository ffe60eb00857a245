"""Compile every kernel for a GPU that need not be there, and print what of the GPU each takes: one line a kernel.

env -u TRITON_INTERPRET python compile_kernels.py 90 gated

The steps and the update run with a recorder in the place of each kernel, which compiles for the arguments that it is given.
"""

import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gsae.sae import dense_kernels, entry_kernels, kernels, sparse_on_kernels
from gsae.sae.dense_on_kernels import dense_kernel_objective
from gsae.sae.objective import build
from gsae.sae.sparse_on_kernels import propose_from_products, propose_fused, sparse_kernel_objective
from gsae.train import kernels as of_update
from gsae.train.optim import SAEOptimizer

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
TRITON_NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Recorder:
    """In the place of a kernel: compiles it for each set of arguments."""

    def __init__(self, kernel: triton.JITFunction, capability: int) -> None:
        self.kernel, self.capability, self.seen = kernel, capability, set()

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        return self

    def __call__(self, *arguments: object, **constants: int) -> None:
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        names = self.kernel.arg_names
        constants |= {name: False for name in ("WIDENS",) if name in constants}  # as on a GPU
        signature = dict(zip(names, map(type_of, arguments), strict=False)) | dict.fromkeys(constants, "constexpr")
        values = {(names.index(name),): value for name, value in constants.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, value in enumerate(arguments) if isinstance(value, torch.Tensor) or value % 16 == 0
        }
        key = (*signature.items(), *values.items(), *aligned)
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(self.kernel, signature, values, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        ptx = compiled.asm["ptx"]
        products = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)))
        taken = f"{registers_of(ptx, self.capability)} bytes spilled"
        print(f"{self.kernel.fn.__name__}: {' '.join(products)} {compiled.metadata.shared} bytes shared, {taken}")


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def registers_of(ptx: str, capability: int) -> str:
    """Registers and shared memory, and the bytes that did not fit."""
    ptxas = next(path for path in TRITON_NVIDIA.glob("ptxas*") if os.access(path, os.X_OK))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = "sm_90a" if capability == 90 else f"sm_{capability}"
        said = subprocess.run(
            [ptxas, "-v", "--gpu-name", name, file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    registers, spilled = re.search(r"Used (\d+ registers)", said)[1], re.search(r"(\d+) bytes spill stores", said)[1]
    return f"{registers}, {spilled}"


def main(capability: int, objectives: list[str]) -> None:
    for module in (entry_kernels, kernels, dense_kernels, of_update):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                setattr(module, name, Recorder(value, capability))
    sparse_on_kernels.Capacity.holds = lambda *_: True
    x = torch.zeros(16, 4096)
    for objective in objectives:
        sae = build(objective, 4096, 64, seed=0)
        steps = [dense_kernel_objective(objective, factors) for factors in ("float32", "bfloat16")]
        for proposer in (propose_fused, propose_from_products):
            steps += [sparse_kernel_objective(objective, in_bfloat16=each, proposer=proposer) for each in (False, True)]
        for step in steps:
            sae.zero_grad()
            step(sae, x).losses.total(0.1).backward()
        for unit_norm in (True, False):
            optimizer = SAEOptimizer(sae, betas=(0.0, 0.999), eps=1e-8, unit_norm=unit_norm, on_kernels=True)
            optimizer.step(1e-3)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]), sys.argv[2:])
