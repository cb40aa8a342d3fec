// The kernels compiled for AVX-512 with the bf16 dot product.
#define HIVILT_ISA avx512_bf16
#define HIVILT_SIMD_AVX512
#define HIVILT_SIMD_BF16_DOT
#include "cpu/kernels.inc"
