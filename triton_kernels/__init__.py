"""Triton kernels of hivilt, imported as ``hivilt.triton_kernels`` and under no other name.

``<stem>_launch.py`` takes tensors and returns tensors: it decides which kernels run and with which tiles. The kernels
themselves, ``@triton.jit``, stand beside it in files named after what they compute. ``tiles.py`` is the tile algebra
that they share, ``configs.py`` the table of tile sizes, ``launch.py`` the one place that starts a kernel. No
``torch.library`` and no autograd here; nothing in this package is imported before a CUDA tensor (or the interpreter)
asks for it.
"""

if __name__ != "hivilt.triton_kernels":
    # Another project owns the top-level name `triton_kernels`, and serving engines probe for it.
    raise ImportError(
        f"this folder is `hivilt.triton_kernels`; it was imported as `{__name__}`. "
        "Install the package (pip install -e . --no-build-isolation) and import it through hivilt."
    )
