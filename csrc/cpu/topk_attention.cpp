// Family A at the CPU key: tensors in, a Problem and its tasks out to the kernel table, tensors back. Knows torch only
// through the stable ABI, and nothing of autograd. Arguments were checked in Python; what could still reach memory it
// must not (offsets, list entries) is checked here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace hivilt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Describing the call.

Operand operand(Tensor& x, bool packed) {
  // Kernels read rows of adjacent elements; any other stride is free.
  if (x.size(3) > 1 && x.stride(3) != 1) x = torch::stable::contiguous(x);
  return {static_cast<char*>(x.data_ptr()), packed ? 0 : x.stride(0), x.stride(1), x.stride(2), dtype_of(x)};
}

// (B, H, T, width), stored token by token so that merging the heads afterwards moves nothing.
Tensor token_major(const Tensor& like, int64_t b, int64_t h, int64_t t, int64_t width) {
  const int64_t token = std::max<int64_t>(1, width), tokens = token * std::max<int64_t>(1, h);
  return strided({b, h, t, width}, {tokens * std::max<int64_t>(1, t), token, tokens, 1}, dtype_code(like));
}

std::vector<int64_t> offsets_of(const Tensor& cu_seqlens, const char* name, int64_t total) {
  const Tensor c = torch::stable::contiguous(cu_seqlens);
  std::vector<int64_t> start(static_cast<size_t>(c.numel()));
  for (size_t s = 0; s < start.size(); ++s) {
    start[s] = c.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(c.data_ptr())[s]
                                                  : static_cast<const int64_t*>(c.data_ptr())[s];
    const int64_t floor = s ? start[s - 1] : 0;
    if (start[s] < floor || start[s] > total || (s == 0 && start[s] != 0)) {
      reject(name, "offsets from 0 that never fall and end at or before " + std::to_string(total),
             std::to_string(start[s]) + " at position " + std::to_string(s));
    }
  }
  return start;
}

// Owns what a Problem points into.
struct Call {
  Problem p;
  Tensor query, key, value, select_query, select_key, mask, key_mask, query_mask, out, lse, lists, grad_out, grad_lse;
  std::vector<int64_t> query_start, key_start;
  bool slack = false;  // packed tokens behind the last segment
  bool packed = false;

  Call(const Tensor& query_, const Tensor& key_, int64_t axis, const MaybeTensor& mask_, const MaybeTensor& cu_q,
       const MaybeTensor& cu_k, double scale)
      : query(query_), key(key_) {
    packed = cu_q.has_value();
    p.dtype = dtype_of(query);
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.kv_heads = key.size(1);
    p.n_queries = query.size(2);
    p.n_keys = key.size(2);
    p.d = query.size(3);
    if (packed) {
      query_start = offsets_of(*cu_q, "cu_seqlens_q", p.n_queries);
      key_start = offsets_of(*cu_k, "cu_seqlens_k", p.n_keys);
      p.batch = static_cast<int64_t>(query_start.size()) - 1;
      p.query_start = query_start.data();
      p.key_start = key_start.data();
      slack = query_start.back() < p.n_queries || key_start.back() < p.n_keys;
    }
    p.query = operand(query, packed);
    p.key = operand(key, packed);
    p.axis = axis;
    p.scale = static_cast<float>(scale);
    if (mask_) set_mask(*mask_);
  }

  void set_value(const Tensor& value_) {
    value = value_;
    p.e = value.size(3);
    p.value = operand(value, packed);
    // Packed keys and values of a thread, however many there are.
    constexpr int64_t kPackedBytes = 4 << 20;
    const int64_t chunks = kPackedBytes / (4 * kDenseChunk * std::max<int64_t>(1, p.d + p.e));
    p.columns_at_once = std::clamp<int64_t>(chunks * kDenseChunk, kDenseChunk, std::max(kDenseChunk, p.n_keys));
  }
  void set_mask(const Tensor& mask_) {
    mask = mask_;
    p.mask = static_cast<const char*>(mask.data_ptr());
    p.mask_kind = mask.scalar_type() == ScalarType::Bool       ? MaskKind::kBool
                  : mask.scalar_type() == ScalarType::Float    ? MaskKind::kFloat32
                  : mask.scalar_type() == ScalarType::BFloat16 ? MaskKind::kBFloat16
                                                               : MaskKind::kFloat16;
    for (int64_t dim = 0; dim < 4; ++dim) {
      p.mask_size[dim] = mask.size(dim);
      p.mask_stride[dim] = mask.size(dim) == 1 ? 0 : mask.stride(dim);
    }
  }
  void set_token_masks(const MaybeTensor& key_mask_, const MaybeTensor& query_mask_) {
    if (key_mask_) {
      key_mask = torch::stable::contiguous(*key_mask_);
      p.key_mask = static_cast<const uint8_t*>(key_mask.data_ptr());
    }
    if (query_mask_) {
      query_mask = torch::stable::contiguous(*query_mask_);
      p.query_mask = static_cast<const uint8_t*>(query_mask.data_ptr());
    }
  }
  void set_selection_source(const MaybeTensor& select_query_, const MaybeTensor& select_key_) {
    if (!select_query_) return;
    p.shared = true;
    // (B, T, C), or (T, C) when packed: one head.
    select_query = torch::stable::unsqueeze(*select_query_, packed ? 0 : 1);
    select_key = torch::stable::unsqueeze(*select_key_, packed ? 0 : 1);
    if (packed) {
      select_query = torch::stable::unsqueeze(select_query, 0);
      select_key = torch::stable::unsqueeze(select_key, 0);
    }
    p.select_width = select_query.size(3);
    p.select_query = operand(select_query, packed);
    p.select_key = operand(select_key, packed);
  }
  void set_dropout(double dropout_p, const MaybeTensor& seed) {
    if (!(dropout_p > 0) || !seed) return;
    const auto bits = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
    p.dropout.active = true;
    p.dropout.threshold = static_cast<uint64_t>(dropout_p * 4294967296.0);
    p.dropout.scale = dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0.0f;
    p.dropout.key_lo = static_cast<uint32_t>(bits);
    p.dropout.key_hi = static_cast<uint32_t>(bits >> 32);
  }

  int64_t list_rows() const { return p.axis == 0 ? p.n_queries : p.n_keys; }
  Tensor new_lists(int64_t topk) {
    p.topk = topk;
    p.list_heads = p.shared ? 1 : p.heads;
    lists = empty({query.size(0), p.list_heads, list_rows(), topk}, aoti_torch_dtype_int32());
    p.lists = static_cast<int32_t*>(lists.data_ptr());
    check_list_size();
    if (slack) std::memset(p.lists, 0xff, static_cast<size_t>(lists.numel()) * 4);
    return lists;
  }
  void new_out() {
    out = token_major(query, query.size(0), p.heads, p.n_queries, p.e);
    lse = empty({query.size(0), p.heads, p.n_queries}, aoti_torch_dtype_float32());
    p.lse = static_cast<float*>(lse.data_ptr());
    p.out = operand(out, packed);
    if (!slack) return;
    std::memset(out.data_ptr(), 0, static_cast<size_t>(out.numel() * p.element_bytes()));
    std::fill_n(p.lse, lse.numel(), -__builtin_inff());
  }

  // Positions within a head's lists are kept in 32 bits.
  void check_list_size() const {
    if (list_rows() * p.topk > INT32_MAX) {
      reject("topk", "at most 2^31 list entries a head",
             std::to_string(list_rows()) + " rows of " + std::to_string(p.topk));
    }
  }

  // Lists that a caller made: checked, sorted and closed up where they are not, otherwise used as they are.
  void use_lists(const Tensor& indices) {
    lists = torch::stable::contiguous(indices);
    p.topk = lists.size(3);
    p.list_heads = lists.size(1);
    p.lists = static_cast<int32_t*>(lists.data_ptr());
    check_list_size();
    const auto each_slice = [&](auto body) {
      parallel_tasks(p.batch * p.list_heads, 0, [&](int64_t begin, int64_t end, char*) {
        for (int64_t s = begin; s < end; ++s) body(s / p.list_heads, s % p.list_heads);
      });
    };
    std::atomic<bool> tidy{true};
    each_slice([&](int64_t b, int64_t h) {
      if (!check_slice(b, h)) tidy = false;
    });
    if (tidy) return;
    lists = torch::stable::clone(lists);
    p.lists = static_cast<int32_t*>(lists.data_ptr());
    each_slice([&](int64_t b, int64_t h) { tidy_slice(b, h); });
  }

 private:
  // Whether every row ascends with its -1s last, which unsigned order expresses. Values out of range are refused.
  bool check_slice(int64_t b, int64_t h) const {
    const auto columns = static_cast<int32_t>(p.columns_of(b));
    const int32_t* row = p.list(b, h);
    int32_t out_of_range = 0, untidy = 0;
    for (int64_t r = 0; r < p.rows_of(b); ++r, row += p.topk) {
      for (int64_t t = 0; t < p.topk; ++t) out_of_range |= (row[t] < -1) | (row[t] >= columns);
      for (int64_t t = 1; t < p.topk; ++t) {
        untidy |= (row[t] != -1) & (static_cast<uint32_t>(row[t]) <= static_cast<uint32_t>(row[t - 1]));
      }
    }
    if (out_of_range) reject("indices", "values from -1 to " + std::to_string(columns - 1), "one outside");
    return untidy == 0;
  }
  void tidy_slice(int64_t b, int64_t h) {
    int32_t* row = p.list(b, h);
    for (int64_t r = 0; r < p.rows_of(b); ++r, row += p.topk) {
      std::sort(row, row + p.topk,
                [](int32_t x, int32_t y) { return static_cast<uint32_t>(x) < static_cast<uint32_t>(y); });
      for (int64_t t = 1; t < p.topk; ++t) {
        if (row[t] != -1 && row[t] == row[t - 1]) {
          reject("indices", "no value twice in a row", std::to_string(row[t]) + " more than once");
        }
      }
    }
  }
};

// Running it.

// Rows [0, n(b)) of every (b, h), cut so that each thread has a few pieces. Results do not depend on the cut.
template <class Rows>
std::vector<Task> tasks_of(const Problem& p, int64_t heads, Rows rows, int64_t most = INT64_MAX) {
  constexpr int64_t kLeastRows = 48;
  const int64_t slices = std::max<int64_t>(1, p.batch * heads);
  const int64_t cuts = (8 * thread_count() + slices - 1) / slices;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t n = rows(b);
    const int64_t pieces = std::max<int64_t>(1, std::min(cuts, n / kLeastRows));
    const int64_t step = std::min((n + pieces - 1) / pieces, most);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t begin = 0; begin < n; begin += step) tasks.push_back({b, h, begin, std::min(begin + step, n)});
    }
  }
  return tasks;
}

std::vector<Task> slice_tasks(int64_t batch, int64_t heads) {
  std::vector<Task> tasks;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) tasks.push_back({b, h, 0, 1});
  }
  return tasks;
}

void run(const Kernel& kernel, const Problem& p, const std::vector<Task>& tasks) {
  // Waking the other threads takes some microseconds, in which one multiplies this often.
  constexpr int64_t kWorthThreads = 1 << 17;
  const double products = static_cast<double>(p.batch * p.heads) * static_cast<double>(p.n_queries) *
                          static_cast<double>(p.n_keys) * static_cast<double>(p.d + p.e);
  const auto work = [&](int64_t begin, int64_t end, char* scratch) {
    kernel.run(p, tasks.data() + begin, end - begin, scratch);
  };
  parallel_tasks(static_cast<int64_t>(tasks.size()), kernel.scratch_bytes(p), work, products < kWorthThreads);
}

std::vector<Task> query_tasks(const Problem& p) {
  return tasks_of(p, p.heads, [&](int64_t b) { return p.queries_of(b); });
}
std::vector<Task> key_tasks(const Problem& p, int64_t most = INT64_MAX) {
  return tasks_of(p, p.kv_heads, [&](int64_t b) { return p.keys_of(b); }, most);
}
std::vector<Task> list_tasks(const Problem& p) {
  return tasks_of(p, p.list_heads, [&](int64_t b) { return p.rows_of(b); });
}

// The lists by the other side, kept alive by the caller.
struct CrossLists {
  Tensor offsets, rows, slots;
  explicit CrossLists(Call& call) {
    Problem& p = call.p;
    const int64_t columns = p.axis == 0 ? p.n_keys : p.n_queries;
    const int64_t n_offsets = call.packed ? p.list_heads * (columns + p.batch) : p.batch * p.list_heads * (columns + 1);
    offsets = empty({n_offsets}, aoti_torch_dtype_int32());
    rows = empty({call.lists.numel()}, aoti_torch_dtype_int32());
    slots = empty({call.lists.numel()}, aoti_torch_dtype_int32());
    p.cross_offsets = static_cast<int32_t*>(offsets.data_ptr());
    p.cross_rows = static_cast<int32_t*>(rows.data_ptr());
    p.cross_slots = static_cast<int32_t*>(slots.data_ptr());
    run(kernels().attention.cross_lists, p, slice_tasks(p.batch, p.list_heads));
  }
};

void attend_to_lists(Call& call) {
  std::optional<CrossLists> cross;
  if (call.p.axis == 1) cross.emplace(call);
  run(kernels().attention.selected_forward, call.p, query_tasks(call.p));
}

std::tuple<Tensor, Tensor, Tensor> topk_attention(Tensor query, Tensor key, Tensor value, int64_t topk, int64_t axis,
                                                  MaybeTensor attn_mask, MaybeTensor key_mask, MaybeTensor query_mask,
                                                  MaybeTensor select_query, MaybeTensor select_key,
                                                  MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, MaybeTensor seed,
                                                  double scale, double dropout_p) {
  Call call(query, key, axis, attn_mask, cu_seqlens_q, cu_seqlens_k, scale);
  Problem& p = call.p;
  call.set_value(value);
  call.set_token_masks(key_mask, query_mask);
  call.set_dropout(dropout_p, seed);
  call.new_out();
  if (topk < 0) {
    p.axis = 0;
    run(kernels().attention.dense_forward, p, query_tasks(p));
    return {call.out, call.lse, empty({0}, aoti_torch_dtype_int32())};
  }
  call.set_selection_source(select_query, select_key);
  const Tensor lists = call.new_lists(topk);
  if (axis == 0 && !p.shared) {
    run(kernels().attention.topk_forward, p, query_tasks(p));
    return {call.out, call.lse, lists};
  }
  std::vector<uint8_t> nan_rows(static_cast<size_t>(call.lse.numel()));
  p.nan_rows = nan_rows.data();
  if (p.shared) {
    run(kernels().attention.shared_nan_rows, p, tasks_of(p, 1, [&](int64_t b) { return p.queries_of(b); }));
  }
  run(kernels().attention.topk_select, p, list_tasks(p));
  attend_to_lists(call);
  return {call.out, call.lse, lists};
}

Tensor topk_select(Tensor query, Tensor key, int64_t topk, int64_t axis, MaybeTensor attn_mask, MaybeTensor key_mask,
                   MaybeTensor query_mask, MaybeTensor select_query, MaybeTensor select_key, MaybeTensor cu_seqlens_q,
                   MaybeTensor cu_seqlens_k, double scale) {
  Call call(query, key, axis, attn_mask, cu_seqlens_q, cu_seqlens_k, scale);
  call.set_token_masks(key_mask, query_mask);
  call.set_selection_source(select_query, select_key);
  Tensor lists = call.new_lists(topk);
  run(kernels().attention.topk_select, call.p, list_tasks(call.p));
  return lists;
}

std::tuple<Tensor, Tensor> selected_attention(Tensor query, Tensor key, Tensor value, Tensor indices, int64_t axis,
                                              MaybeTensor attn_mask, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                                              MaybeTensor seed, double scale, double dropout_p) {
  Call call(query, key, axis, attn_mask, cu_seqlens_q, cu_seqlens_k, scale);
  call.set_value(value);
  call.use_lists(indices);
  call.set_dropout(dropout_p, seed);
  call.new_out();
  attend_to_lists(call);
  return {call.out, call.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_attention_backward(Tensor grad_out, MaybeTensor grad_lse, Tensor query,
                                                                   Tensor key, Tensor value, Tensor out, Tensor lse,
                                                                   Tensor indices, int64_t axis, MaybeTensor attn_mask,
                                                                   MaybeTensor key_mask, MaybeTensor query_mask,
                                                                   MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                                                                   MaybeTensor seed, double scale, double dropout_p,
                                                                   bool key_grad, bool bias_grad) {
  Call call(query, key, axis, attn_mask, cu_seqlens_q, cu_seqlens_k, scale);
  Problem& p = call.p;
  call.set_value(value);
  call.set_dropout(dropout_p, seed);
  call.out = out;
  call.grad_out = grad_out;
  p.out = operand(call.out, call.packed);
  p.grad_out = operand(call.grad_out, call.packed);
  call.lse = torch::stable::contiguous(lse);
  p.lse = static_cast<float*>(call.lse.data_ptr());
  if (grad_lse) {
    call.grad_lse = torch::stable::contiguous(*grad_lse);
    p.grad_lse = static_cast<const float*>(call.grad_lse.data_ptr());
  }
  Tensor grad_query = token_major(query, query.size(0), p.heads, p.n_queries, p.d);
  Tensor grad_key = empty({0}, dtype_code(query)), grad_value = empty({0}, dtype_code(query));
  p.grad_query = operand(grad_query, call.packed);
  if (key_grad) {
    grad_key = token_major(query, query.size(0), p.kv_heads, p.n_keys, p.d);
    grad_value = token_major(query, query.size(0), p.kv_heads, p.n_keys, p.e);
    p.grad_key = operand(grad_key, call.packed);
    p.grad_value = operand(grad_value, call.packed);
  }
  if (call.slack) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value}) {
      std::memset(grad->data_ptr(), 0, static_cast<size_t>(grad->numel() * p.element_bytes()));
    }
  }
  Tensor grad_mask = empty({0}, dtype_code(query));
  if (bias_grad) {
    grad_mask = torch::stable::new_zeros(query, {p.mask_size[0], p.mask_size[1], p.mask_size[2], p.mask_size[3]},
                                         ScalarType::Double);
    p.grad_mask = static_cast<double*>(grad_mask.data_ptr());
  }
  // One pass over a head computes each pair once; two passes find work for more threads than there are heads.
  const int64_t slices = p.batch * p.kv_heads;
  const bool whole_heads = slices % thread_count() == 0 || slices >= 4 * thread_count();
  if (indices.dim() == 1) {
    p.axis = 0;
    call.set_token_masks(key_mask, query_mask);
    if (key_grad && whole_heads && p.n_keys <= p.columns_at_once) {
      run(kernels().attention.dense_backward, p, slice_tasks(p.batch, p.kv_heads));
    } else {
      run(kernels().attention.dense_backward_rows, p, query_tasks(p));
      if (key_grad) run(kernels().attention.dense_backward_keys, p, key_tasks(p, p.columns_at_once));
    }
    if (bias_grad) {
      std::vector<Task> tasks;
      // Rows share nothing unless the mask is broadcast over them.
      const int64_t step = p.mask_size[2] == 1 ? p.n_queries : 96;
      for (const Task& slice : slice_tasks(p.mask_size[0], p.mask_size[1])) {
        for (int64_t begin = 0; begin < p.n_queries; begin += step) {
          tasks.push_back({slice.b, slice.h, begin, std::min(begin + step, p.n_queries)});
        }
      }
      run(kernels().attention.dense_backward_mask, p, tasks);
    }
  } else {
    call.use_lists(indices);
    std::optional<CrossLists> cross;
    if (axis == 1) cross.emplace(call);
    if (axis == 0 && key_grad && !bias_grad && whole_heads) {
      run(kernels().attention.selected_backward, p, slice_tasks(p.batch, p.kv_heads));
    } else {
      const int64_t per_head = call.list_rows() * p.topk;
      const Tensor pairs = empty({2, query.size(0) * p.heads * per_head}, aoti_torch_dtype_float32());
      p.pair_weights = static_cast<float*>(pairs.data_ptr());
      p.pair_scores = p.pair_weights + pairs.size(1);
      run(kernels().attention.selected_backward_rows, p, query_tasks(p));
      if (key_grad) run(kernels().attention.selected_backward_keys, p, key_tasks(p));
      if (bias_grad) run(kernels().attention.selected_backward_mask, p, slice_tasks(p.mask_size[0], p.mask_size[1]));
    }
  }
  if (bias_grad) {
    grad_mask = torch::stable::to(grad_mask, call.mask.scalar_type());
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace
}  // namespace hivilt

STABLE_TORCH_LIBRARY_IMPL(hivilt, CPU, m) {
  m.impl("topk_attention_cpu", TORCH_BOX(&hivilt::topk_attention));
  m.impl("topk_select_cpu", TORCH_BOX(&hivilt::topk_select));
  m.impl("selected_attention_cpu", TORCH_BOX(&hivilt::selected_attention));
  m.impl("topk_attention_backward_cpu", TORCH_BOX(&hivilt::topk_attention_backward));
}
