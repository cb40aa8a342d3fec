"""Triton kernels of hivilt, imported as ``hivilt.triton_kernels`` and under no other name.

One file per operator family, named like its file in ``hivilt/ops``: the ``@triton.jit`` kernels and a
``launch_forward`` / ``launch_backward`` that takes tensors and returns tensors. No ``torch.library`` and no autograd
here; nothing in this package is imported before a CUDA tensor asks for it. Tile algebra that several families share
goes into ``tiles.py``. This version holds no kernel: the CPU library and the reference serve every operator.
"""

if __name__ != "hivilt.triton_kernels":
    # Another project owns the top-level name `triton_kernels`, and serving engines probe for it.
    raise ImportError(
        f"this folder is `hivilt.triton_kernels`; it was imported as `{__name__}`. "
        "Install the package (pip install -e . --no-build-isolation) and import it through hivilt."
    )
