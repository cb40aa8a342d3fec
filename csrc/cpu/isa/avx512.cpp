// The kernels compiled for AVX-512 F, BW, DQ and VL.
#define HIVILT_ISA avx512
#define HIVILT_SIMD_AVX512
#include "cpu/kernels.inc"
