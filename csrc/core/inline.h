// Everything that files of different ISAs share must be inlined: the linker keeps one copy of an out-of-line inline
// function, and that copy may hold instructions that the processor lacks.
#pragma once

#define HIVILT_INLINE inline __attribute__((always_inline))
