// What the kernels of bank retrieval are told: plain pointers, sizes and element strides.
//
// The scan multiplies blocks of bank rows with panels of queries and keeps, for every query and every split of the
// bank, the rows that can still be among the topk best. Scanned in low precision a score is known up to a margin:
// `lower` and `upper` enclose the float32 dot product, and a row is dropped only where its upper bound is not above the
// topk-th best lower bound. docs/bank_retrieval.md proves the margin.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace hivilt {

// Rows that one query may keep of one split, by ascending index. Of rows whose score is NaN the first topk, apart.
struct Candidates {
  float *lower, *upper;
  int32_t* index;
  int32_t* nan_index;
  int64_t count, nans;
  float cut;     // topk rows so far have float32 scores of at least this
  int32_t full;  // how often margins were too wide to make room
};

// What the codes of a row mean: |row - step * codes| <= residue, |row| <= norm; offset is -128 times their sum.
struct RowOfBytes {
  float step, norm, residue;
  int32_t offset;
};

struct BankRows {
  const char* data = nullptr;
  int64_t stride = 0;  // elements between rows, whose elements are neighbours
  int64_t width = 0;
  DType dtype = DType::kFloat32;
};

struct BankProblem {
  int64_t batch = 0, bank_size = 0, width = 0, topk = 0;
  int64_t limit = 0;  // rows from this one on are not valid
  BankRows query, keys, values;
  bool own_values = false;  // values are not the keys
  const uint8_t* mask = nullptr;
  int64_t mask_stride = 0;           // between queries; 0 where they share it
  const int64_t* exclude = nullptr;  // (B)
  float scale = 1.0f;
  bool low_precision = false, approximate = false;
  char* shadow = nullptr;          // (M, shadow_bytes) or null: the keys in bytes, scanned in their place
  const int64_t* slots = nullptr;  // whose rows are written to it; null: all

  // Queries [first_query, first_query + group) are worked on; buffers hold them from 0.
  int64_t first_query = 0, group = 0;
  float* wide = nullptr;  // (group, wide_stride) floats
  int64_t wide_stride = 0;
  float* panels = nullptr;                              // float32, panel after panel of [width][panel]
  float *low_panels = nullptr, *byte_panels = nullptr;  // pairs of bf16; four bytes, codes + 128
  float *norm = nullptr, *residue = nullptr;  // (group in whole panels): |q| and |q - bf16(q)|, bounded from above
  float *byte_step = nullptr, *byte_residue = nullptr;
  uint8_t* wild = nullptr;  // (panels): some query is not finite or huge, so low precision proves nothing

  Candidates* candidates = nullptr;  // (splits, group)
  int64_t splits = 0, capacity = 0;

  // Scores of the scan have a margin.
  bool inexact() const { return (low_precision || shadow) && !approximate; }

  char* retrieved = nullptr;                        // (B, E) of query's dtype
  float* scores = nullptr;                          // (B, topk)
  int64_t* indices = nullptr;                       // (B, topk)
  char *key_rows = nullptr, *value_rows = nullptr;  // (B, topk, width) of the bank's dtypes, or null

  // Backward.
  const float* grad_retrieved = nullptr;           // (B, E) or null
  const float* grad_scores = nullptr;              // (B, topk) or null
  float *score_grad = nullptr, *shares = nullptr;  // (B, topk)
  double* of_scale = nullptr;                      // (B)
  char* grad_query = nullptr;
  float *grad_keys = nullptr, *grad_values = nullptr;  // (M, width), (M, E), zeroed, or null
};

// Rows, queries or panels [first, last); of the scan: bank rows of a split, for the group's panels [panel, panels).
struct BankTask {
  int64_t first, last, split, panel, panels;
};

struct BankKernel {
  void (*run)(const BankProblem&, const BankTask*, int64_t count, char* scratch);
  size_t (*scratch_bytes)(const BankProblem&);
};

struct BankKernels {
  bool low_precision;   // the processor has products of bf16, and of bytes
  BankKernel pack;      // queries -> wide, panels, norms; tasks: panels of the group
  BankKernel scan;      // tasks: bank rows of a split for some panels
  BankKernel scan_few;  // the same for a few queries: all of the group
  BankKernel finish;    // merge, score again, sort, weigh; tasks: queries of the group
  BankKernel backward;  // query gradients; tasks: queries
  BankKernel scatter;   // bank gradients; tasks: bank rows
  BankKernel shadow;    // rows in bytes; tasks: places in slots
};

// Words of a row in pairs of bf16, and in bytes.
inline int64_t low_steps(const BankProblem& p) {
  return (p.width + 1) / 2;
}
inline int64_t byte_steps(const BankProblem& p) {
  return (p.width + 15) / 16 * 4;
}
// A row of the shadow: its codes, zeros up to whole vectors, and a RowOfBytes.
inline int64_t shadow_bytes(const BankProblem& p) {
  return 4 * byte_steps(p) + static_cast<int64_t>(sizeof(RowOfBytes));
}

}  // namespace hivilt
