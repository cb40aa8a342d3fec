// What the attention kernels are told: plain pointers, sizes and element strides, no torch. One Problem describes a
// call, batched or packed (varlen); Task is one slice of its work; AttentionKernels is the table that each ISA fills.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/inline.h"
#include "core/philox.h"

namespace hivilt {

enum class MaskKind : int { kNone, kBool, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kDenseChunk = 480;  // keys of a block of scores: a multiple of every register tile's sides

// A (B, H, T, width) tensor whose last stride is 1. For packed tensors stride_b is 0 and rows are found by segment.
struct Operand {
  char* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_t = 0;
  DType dtype = DType::kFloat32;

  HIVILT_INLINE int64_t element_bytes() const { return bytes_of(dtype); }
};

struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, n_queries = 0, n_keys = 0, d = 0, e = 0;  // packed: n_* are totals
  Operand query, key, value;
  const int64_t* query_start = nullptr;  // packed: (B + 1) token offsets, otherwise null
  const int64_t* key_start = nullptr;

  bool shared = false;  // selection by (select_query, select_key), one for all heads
  int64_t select_width = 0;
  Operand select_query, select_key;  // of one dtype, which may be another than the rest's

  MaskKind mask_kind = MaskKind::kNone;
  const char* mask = nullptr;
  int64_t mask_stride[4] = {0, 0, 0, 0};  // elements; 0 where broadcast
  const uint8_t* key_mask = nullptr;      // (B, N), contiguous
  const uint8_t* query_mask = nullptr;    // (B, Q), contiguous

  float scale = 1.0f;
  int64_t columns_at_once = 0;  // keys that a dense task packs at a time
  int64_t axis = 0;             // 0: rows of the lists are queries and hold keys; 1: rows are keys and hold queries
  int64_t topk = 0;             // width of a list row
  Dropout dropout;

  int32_t* lists = nullptr;  // (B, list_heads, list rows, topk), ascending, -1 padded
  int64_t list_heads = 0;
  uint8_t* nan_rows = nullptr;  // axis 1 or shared: (B, H, Q), set where some valid score is NaN or +inf

  // The lists by the other side: row c of head-slice s holds entries [offsets[c], offsets[c + 1]) of its slice.
  int32_t* cross_offsets = nullptr;
  int32_t* cross_rows = nullptr;   // the list row that holds c
  int32_t* cross_slots = nullptr;  // and the position in the slice: row * topk + t

  Operand out, grad_out, grad_query, grad_key, grad_value;
  float* lse = nullptr;             // (B, H, Q)
  const float* grad_lse = nullptr;  // (B, H, Q) or null
  float* pair_weights = nullptr;    // (B, H, list rows, topk): what met the value, and the gradient of the score;
  float* pair_scores = nullptr;     //   written by the row pass of backward, read by the others
  double* grad_mask = nullptr;      // shape of the mask
  int64_t mask_size[4] = {1, 1, 1, 1};

  HIVILT_INLINE int64_t queries_of(int64_t b) const {
    return query_start ? query_start[b + 1] - query_start[b] : n_queries;
  }
  HIVILT_INLINE int64_t keys_of(int64_t b) const { return key_start ? key_start[b + 1] - key_start[b] : n_keys; }
  HIVILT_INLINE int64_t rows_of(int64_t b) const { return axis == 0 ? queries_of(b) : keys_of(b); }
  HIVILT_INLINE int64_t columns_of(int64_t b) const { return axis == 0 ? keys_of(b) : queries_of(b); }
  HIVILT_INLINE int64_t kv_head(int64_t h) const { return h / (heads / kv_heads); }
  HIVILT_INLINE int64_t list_head(int64_t h) const { return list_heads == 1 ? 0 : h; }
  HIVILT_INLINE int64_t element_bytes() const { return query.element_bytes(); }
  HIVILT_INLINE DType select_dtype() const { return shared ? select_query.dtype : dtype; }

  HIVILT_INLINE char* query_row(const Operand& x, int64_t b, int64_t h, int64_t i) const {
    return row(x, query_start, b, h, i);
  }
  HIVILT_INLINE char* key_row(const Operand& x, int64_t b, int64_t h, int64_t j) const {
    return row(x, key_start, b, h, j);
  }

  // Offset of query row 0 of (b, h) in a contiguous (B, H, Q) array.
  HIVILT_INLINE int64_t query_offset(int64_t b, int64_t h) const {
    return query_start ? h * n_queries + query_start[b] : (b * heads + h) * n_queries;
  }
  // Offset of list row 0 of (b, h) among all list rows of an array with `n_heads` heads.
  HIVILT_INLINE int64_t list_offset(int64_t b, int64_t h, int64_t n_heads) const {
    const int64_t total = axis == 0 ? n_queries : n_keys;
    const int64_t* start = axis == 0 ? query_start : key_start;
    return start ? h * total + start[b] : (b * n_heads + h) * total;
  }
  HIVILT_INLINE int32_t* list(int64_t b, int64_t h) const {
    return lists + list_offset(b, list_head(h), list_heads) * topk;
  }
  // Each slice keeps one more offset than it has columns.
  HIVILT_INLINE int32_t* cross_offsets_of(int64_t b, int64_t h) const {
    const int64_t total = axis == 0 ? n_keys : n_queries;
    const int64_t* start = axis == 0 ? key_start : query_start;
    return cross_offsets +
           (start ? list_head(h) * (total + batch) + start[b] + b : (b * list_heads + list_head(h)) * (total + 1));
  }
  HIVILT_INLINE int64_t cross_entry(int64_t b, int64_t h) const {
    return list_offset(b, list_head(h), list_heads) * topk;
  }
  HIVILT_INLINE int64_t pair_offset(int64_t b, int64_t h) const { return list_offset(b, h, heads) * topk; }
  HIVILT_INLINE const char* mask_at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t bytes = mask_kind == MaskKind::kBool ? 1 : mask_kind == MaskKind::kFloat32 ? 4 : 2;
    return mask + (b * mask_stride[0] + h * mask_stride[1] + i * mask_stride[2] + j * mask_stride[3]) * bytes;
  }
  HIVILT_INLINE bool float_mask() const { return mask_kind != MaskKind::kNone && mask_kind != MaskKind::kBool; }

 private:
  HIVILT_INLINE char* row(const Operand& x, const int64_t* start, int64_t b, int64_t h, int64_t t) const {
    const int64_t first = start ? start[b] * x.stride_t : b * x.stride_b;
    return x.data + (first + h * x.stride_h + t * x.stride_t) * x.element_bytes();
  }
};

struct Task {
  int64_t b, h, begin, end;
};

// Every entry works through `count` tasks with a private, 64-byte aligned scratch of scratch_bytes(problem, entry).
using Work = void (*)(const Problem&, const Task*, int64_t count, char* scratch);

struct Kernel {
  Work run;
  size_t (*scratch_bytes)(const Problem&);
};

struct AttentionKernels {
  Kernel topk_forward;            // axis 0: select, softmax, gather; tasks: query rows of (b, h)
  Kernel topk_select;             // lists only; tasks: list rows of (b, list head)
  Kernel shared_nan_rows;         // of a shared selection; tasks: query rows of (b, all heads)
  Kernel cross_lists;             // the lists by the other side; tasks: whole (b, list head)
  Kernel selected_forward;        // lists -> out, lse; tasks: query rows of (b, h)
  Kernel selected_backward;       // axis 0, all gradients but the mask's; tasks: whole (b, kv head)
  Kernel selected_backward_rows;  // or in two steps: grad_query and the pairs; tasks: query rows of (b, h)
  Kernel selected_backward_keys;  //   then grad_key, grad_value; tasks: key rows of (b, kv head)
  Kernel selected_backward_mask;  // grad_mask, from the pairs; tasks: (mask batch, mask head)
  Kernel dense_forward;           // tasks: query rows of (b, h)
  Kernel dense_backward;          // as selected_backward: all at once, or in two steps, and the mask by itself
  Kernel dense_backward_rows;
  Kernel dense_backward_keys;
  Kernel dense_backward_mask;  // grad_mask; tasks: (mask batch, mask head, query rows)
};

}  // namespace hivilt
