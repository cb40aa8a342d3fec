"""What the GPU kernels become: compiles every Triton kernel that ships, in every configuration, without a GPU.

    python -m hivilt.kernel_report [--part sm_90] [--only KERNEL] [--call LABEL] [--json FILE]

``calls.py`` makes the calls, ``specialise.py`` says what Triton would compile for them, ``compiling.py`` compiles it
and reads registers, spills, shared memory and instructions.  No kernel runs and no tensor has memory.
"""

__all__: list[str] = []
