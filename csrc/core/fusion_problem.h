// What the kernels of scale fusion and of token interpolation are told: plain pointers, sizes and element strides.
// FusionProblem describes a call, FusionTask one slice of its work, FusionKernels is the table that each ISA fills.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/channel_dropout.h"
#include "core/dtype.h"
#include "core/interpolation.h"

namespace hivilt {

enum class Norm : int { kLayer, kAffine, kNone };
enum class Activation : int { kGelu, kGeluTanh, kRelu, kSilu, kNone };

// How a scale enters the sum. kDirect: its grid is the output's. kProject: projected where it is, the results
// interpolated. kInterpolate: interpolated first, then projected.
enum class Way : int { kDirect, kProject, kInterpolate };

struct FusionScale {
  const char* data = nullptr;  // (B, prefix + cells, channels)
  int64_t stride_b = 0, stride_n = 0, stride_c = 1;
  int64_t channels = 0, cells = 0, prefix = 0;  // prefix: 0 or the problem's
  Way way = Way::kDirect;
  Resize resize;      // the scale's grid to the output's
  Resize transposed;  // and back

  const char* weight = nullptr;  // (O, channels): this scale's columns of the weight
  float* panels = nullptr;       // the same packed for rows times weight^T; see FusionKernels::pack
  float* projected = nullptr;    // kProject: (B, prefix + cells, stride)

  float* back_panels = nullptr;  // the weight packed for gradient times weight
  char* grad = nullptr;          // (B, prefix + cells, channels), contiguous, or null
  float* grad_fine = nullptr;    // kInterpolate: (B, tokens, back_stride), the gradient before the transposed resize
  float* grad_weight = nullptr;  // (parts, weight_rows, back_stride), or null
  int64_t parts = 0;

  HIVILT_INLINE int64_t tokens() const { return prefix + cells; }
};

struct FusionProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, prefix = 0, cells = 0, width = 0;  // width: output channels
  int64_t stride = 0;                                   // of rows of `width` floats in buffers of ours: whole panels
  FusionScale* scales = nullptr;
  int64_t n_scales = 0;
  int64_t weight_stride = 0;  // elements between rows of the weight

  // Of `stride` floats, zeros behind `width`; null where absent.
  const float *bias = nullptr, *norm_weight = nullptr, *norm_bias = nullptr;
  Norm norm = Norm::kNone;
  Activation activation = Activation::kNone;
  float eps = 0.0f;
  ChannelDropout dropout;

  char* out = nullptr;     // (B, prefix + cells, width), contiguous
  char* linear = nullptr;  // the same, before norm; null where nobody needs it
  int64_t block = 0;       // rows that are worked on at a time, whole tiles

  const char* grad_out = nullptr;  // (B, prefix + cells, width), last stride 1
  int64_t grad_stride_b = 0, grad_stride_n = 0;
  float* grad_linear = nullptr;   // (B, prefix + cells, stride), or null where no scale is projected
  float* grad_vectors = nullptr;  // (parts, 3, stride): sums for bias, norm_weight and norm_bias

  HIVILT_INLINE int64_t tokens() const { return prefix + cells; }
};

// Rows [begin, end) of image b; of a scale where the kernel works on one. Rows of one task are all prefix tokens or
// none. `part` says which partial sum the rows go to.
struct FusionTask {
  int64_t scale, b, begin, end, part;
};

using FusionWork = void (*)(const FusionProblem&, const FusionTask*, int64_t count, char* scratch);

struct FusionKernel {
  FusionWork run;
  size_t (*scratch_bytes)(const FusionProblem&);
};

// Interpolation by itself: out = base + factor U x, part by part along the tokens.
struct ResizePart {
  Resize resize;
  int64_t first_source = 0, first_output = 0;  // tokens before the part
};

struct ResizeProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, channels = 0, sources = 0, outputs = 0;
  const char* x = nullptr;  // (B, sources, channels), last stride 1
  int64_t stride_b = 0, stride_n = 0;
  const char* base = nullptr;  // (B, outputs, channels), last stride 1, or null
  int64_t base_stride_b = 0, base_stride_n = 0;
  char* out = nullptr;  // (B, outputs, channels), contiguous
  float factor = 1.0f;
  const ResizePart* parts = nullptr;
  double* dots = nullptr;  // one per task: the sum of base * U x over its rows, instead of out
};

constexpr int64_t kResizeRows = 64;  // of a task at most: partial dot products are summed in this order
struct ResizeTask {
  int64_t part, b, begin, end, index;  // outputs of the part
};

struct ResizeKernel {
  void (*run)(const ResizeProblem&, const ResizeTask*, int64_t count, char* scratch);
  size_t (*scratch_bytes)(const ResizeProblem&);
};

struct FusionKernels {
  int64_t tile_rows, panel;     // rows and columns of the register tile
  FusionKernel pack;            // weight -> panels; tasks: panels [begin, end) of a scale
  FusionKernel pack_back;       // weight -> back_panels; the same
  FusionKernel project;         // kProject scales -> projected; tasks: rows of a scale
  FusionKernel forward;         // out, linear; tasks: output rows
  FusionKernel backward_rows;   // grad_linear, grads of scales that are not projected; tasks: output rows
  FusionKernel backward_cells;  // grads of projected scales, transposed resize of grad_fine; tasks: rows of a scale
  ResizeKernel interpolate;
};

}  // namespace hivilt
