// What the kernels of the contrastive loss are told: plain pointers, sizes and element strides.
//
// Rows of x stand in blocks of whole images, each padded with zeros to whole register tiles: "padded rows". What tiles
// multiply is packed: `left` and the wide copies in channel panels [channels / panel][rows][panel], `right` in column
// panels [columns / panel][words][panel].
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace hivilt {

struct ContrastProblem {
  DType dtype = DType::kFloat32;
  int64_t images = 0, group = 1, columns = 0, width = 0;  // B, R, N, C
  bool siglip = false, wants_columns = false;
  const char *x = nullptr, *y = nullptr;
  int64_t x_stride_b = 0, x_stride_r = 0, y_stride = 0;
  const int64_t* labels = nullptr;  // (B); null: image i belongs to column i
  float scale = 1.0f, bias = 0.0f;

  int64_t block_images = 1, block_rows = 0, blocks = 0, padded_rows = 0, padded_columns = 0;
  int64_t words = 0;   // of a row in the product of scores: channels, or pairs of bf16
  bool pairs = false;  // the latter
  float *left = nullptr, *right = nullptr;

  // Forward. A part is a range of blocks, worked on in order.
  int64_t parts = 0;
  float* row_top = nullptr;                              // (B): largest logit so far
  double *row_total = nullptr, *target = nullptr;        // (B): sum of exp(logit - top), of siglip the loss; own logit
  float *column_top = nullptr, *column_total = nullptr;  // (parts, padded_columns)

  // Backward: gradient of a pair = row_share exp(s - row lse) + column_share exp(s - column lse) + target_share where
  // it is the image's own. A log-sum-exp is the sum of two floats, high and low.
  const float *row_share = nullptr, *row_high = nullptr, *row_low = nullptr;           // (B)
  const float *column_share = nullptr, *column_high = nullptr, *column_low = nullptr;  // (padded_columns) or null
  const float* target_share = nullptr;                                                 // (B)
  float *x_wide = nullptr, *y_wide = nullptr;  // null: nobody asks for the other side's gradient
  int64_t stride = 0;                          // of rows of channels in buffers of ours: whole panels
  int64_t first = 0, slice = 0;                // columns whose pairs are in memory
  float* slice_grad = nullptr;                 // (padded_rows, slice_stride)
  int64_t slice_stride = 0;
  float* grad_rows = nullptr;                      // (padded_rows, stride), zeroed
  float* grad_columns = nullptr;                   // (slice_stride, stride)
  double *of_scale = nullptr, *of_bias = nullptr;  // (B), zeroed: sums of gradient times dot product, of gradients
  char *grad_x = nullptr, *grad_y = nullptr;       // (B, R, C), (N, C), contiguous
};

// Blocks, panels, parts, or columns of the slice [first, last).
struct ContrastTask {
  int64_t first, last;
};

struct ContrastKernel {
  void (*run)(const ContrastProblem&, const ContrastTask*, int64_t count, char* scratch);
  size_t (*scratch_bytes)(const ContrastProblem&);
};

struct ContrastKernels {
  bool low_precision;            // products of bf16 are worth it here
  ContrastKernel pack_left;      // tasks: blocks
  ContrastKernel pack_right;     // tasks: panels of columns
  ContrastKernel widen_rows;     // x -> x_wide; tasks: blocks
  ContrastKernel widen_columns;  // y -> y_wide; tasks: panels of columns
  ContrastKernel forward;        // tasks: parts
  ContrastKernel pairs;          // slice_grad, and what it adds to grad_rows; tasks: blocks
  ContrastKernel columns;        // grad_y of the slice; tasks: columns of the slice, from whole tiles on
  ContrastKernel finish;         // grad_rows -> grad_x; tasks: blocks
};

}  // namespace hivilt
