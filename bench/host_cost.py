"""python bench/host_cost.py: what Python spends on a call of topk_attention before its Triton kernels start, without a
GPU: microseconds of this process's CPU time, the least of several rounds.

Everything is real but the compiled kernel, in whose place one stands that does nothing, and the driver, which names an
sm_90.  So Triton's own work for a launch is in it, the launch of CUDA (2 to 5 us) is not; and tensors are on the CPU,
where torch's sort, which backward over lists calls, runs at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import hivilt
from hivilt.ops import _topk_attention_triton as row
from hivilt.triton_kernels import launch

CALLS = {  # what runs -> B, H, Q, N, D and topk
    "fused": ((1, 1, 64, 64, 64), 8),
    "one tile, bitmask": ((1, 1, 64, 256, 64), 16),
    "stream, lists": ((1, 1, 64, 2048, 64), 8),
    "dense": ((1, 1, 64, 256, 64), None),
}


class Driver:
    """A GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Nothing:
    """A compiled kernel that does nothing."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, grid: tuple, stream: int, *args: object) -> None:
        return None

    def run(self, *args: object) -> None:
        pass


def compile_nothing(self, key, signature, device, *rest) -> Nothing:
    self.device_caches[device][0][key] = nothing = Nothing()
    return nothing


def microseconds(call: Callable[[], object], calls: int = 200, rounds: int = 15) -> float:
    times = []
    for _ in range(rounds + 1):  # the first round warms up
        start = time.process_time()
        for _ in range(calls):
            call()
        times.append((time.process_time() - start) / calls * 1e6)
    return min(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    driver.set_active(Driver())
    JITFunction._do_compile = compile_nothing
    row.why_no_device = lambda x: None
    launch.part_of = lambda x: ("sm_90", 132)
    print(f"{'':<20}{'forward':>10}{'and backward':>15}")
    for name, ((B, H, Q, N, D), topk) in CALLS.items():
        x = [torch.randn(B, H, T, D, dtype=torch.bfloat16) for T in (Q, N, N)]
        leaves = [t.clone().requires_grad_() for t in x]
        upstream = torch.randn_like(x[0])

        def forward(inputs=x, topk=topk) -> torch.Tensor:
            return hivilt.ops.topk_attention(*inputs, topk, backend="triton")

        def both(leaves=leaves, upstream=upstream, forward=forward) -> object:
            return torch.autograd.grad(forward(leaves), leaves, upstream)

        print(f"{name:<20}{microseconds(forward):>10.0f}{microseconds(both):>15.0f}", flush=True)


if __name__ == "__main__":
    main()
