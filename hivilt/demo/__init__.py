"""The main job: photographs and sentences through a plain PyTorch cross-modal model, then with hivilt in its place.

    python -m hivilt.demo [--out DIR] [--quick]

Two pairs are compared, each on the same weights and inputs: torch's dense attention with hivilt's, and top-k attention
as one would write it in PyTorch with hivilt's.  Results must agree with float64 as PyTorch's do, or no speed is shown.
At the end a small model learns to answer questions about rendered shapes, its words keeping four patches each.
"""

try:
    import matplotlib  # noqa: F401
    import PIL  # noqa: F401
    import sklearn  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise ImportError(f"hivilt.demo needs {error.name}: pip install 'hivilt[demo]'") from error

__all__: list[str] = []
