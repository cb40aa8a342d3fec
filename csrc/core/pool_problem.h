// What the kernels of token_pool are told: plain pointers, sizes and element strides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace hivilt {

// What is known of a range of tokens, `stride` floats a vector. Every sum is over tokens that take part.
struct PoolPart {
  int64_t kept;                     // tokens
  float top, total;                 // maximum of their scores, sum of exp(score - top)
  float *sum, *maximum, *weighted;  // weighted: sum of exp(score - top) x
  int32_t* first;                   // token of the maximum
};

struct PoolProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, tokens = 0, channels = 0, hidden = 0;
  int64_t stride = 0, hidden_stride = 0;  // rows of channels and of hidden units in buffers of ours: whole panels
  const char* x = nullptr;                // (B, N, C)
  int64_t stride_b = 0, stride_n = 0, stride_c = 1;
  const uint8_t* mask = nullptr;  // (B, N), contiguous
  bool wants_max = false, wants_attention = false;
  int64_t block = 0;  // tokens that are worked on at a time, whole tiles

  const char* proj_weight = nullptr;  // (K, C)
  int64_t proj_stride = 0;
  float* panels = nullptr;                                    // packed for tokens times proj_weight^T
  float* back_panels = nullptr;                               // packed for gradients times proj_weight
  const float *proj_bias = nullptr, *score_weight = nullptr;  // hidden_stride floats, zeros behind `hidden`
  float score_bias = 0.0f;

  float* attention = nullptr;  // (B, N): scores, later probabilities
  PoolPart* parts = nullptr;

  // Backward.
  const float* grad = nullptr;        // (B, stride): of out, zeros behind `channels`
  float* along = nullptr;             // (B, N): <grad, x_n>
  double* means = nullptr;            // (B): its attention-weighted mean over the tokens
  const int32_t* first = nullptr;     // (B, C)
  const float* mean_share = nullptr;  // (B): share of the mean, over the number of tokens
  float max_share = 0.0f, attention_share = 0.0f;
  char* grad_x = nullptr;         // (B, N, C), contiguous
  float* grad_weight = nullptr;   // (parts, hidden rows in whole tiles, stride)
  float* grad_vectors = nullptr;  // (parts, 2, hidden_stride): proj_bias, score_weight
};

// Tokens [begin, end) of image b, the next piece of `part`.
struct PoolTask {
  int64_t b, begin, end, part;
};

struct PoolKernel {
  void (*run)(const PoolProblem&, const PoolTask*, int64_t count, char* scratch);
  size_t (*scratch_bytes)(const PoolProblem&);
};

struct PoolKernels {
  PoolKernel pack;  // proj_weight -> panels and, where wanted, back_panels; one task
  PoolKernel pool;
  PoolKernel along;  // <grad, x_n>, before backward where there is attention
  PoolKernel backward;
  void (*store_row)(const double* row, DType dtype, int64_t n, char* to);  // rounded to the caller's type
};

}  // namespace hivilt
