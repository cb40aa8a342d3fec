// The kernels compiled for portable vectors: any x86-64, any other processor.
#define HIVILT_ISA scalar
#include "cpu/kernels.inc"
