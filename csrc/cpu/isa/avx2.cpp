// The kernels compiled for AVX2, FMA and F16C.
#define HIVILT_ISA avx2
#define HIVILT_SIMD_AVX2
#include "cpu/kernels.inc"
