"""Prints what the GPU kernels become; see hivilt.kernel_report."""

from .report import main

if __name__ == "__main__":
    main()
