// Family C at the CPU key: tensors in, a BankProblem and its tasks out to the kernel table, tensors back.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace hivilt {
namespace {

int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}

BankRows rows_of(Tensor& x) {
  if (x.size(1) > 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
  return {static_cast<const char*>(x.data_ptr()), x.stride(0), x.size(1), dtype_of(x)};
}

float value_of(const MaybeTensor& scale) {
  return scale ? *static_cast<const float*>(scale->data_ptr()) : 1.0f;
}

Tensor zeros(int64_t rows, int64_t columns) {
  Tensor x = empty({rows, columns}, aoti_torch_dtype_float32());
  std::memset(x.data_ptr(), 0, static_cast<size_t>(rows * columns) * 4);
  return x;
}

void run(const BankProblem& p, const BankKernel& kernel, const std::vector<BankTask>& tasks, bool alone = false) {
  const auto work = [&](int64_t begin, int64_t end, char* scratch) {
    kernel.run(p, tasks.data() + begin, end - begin, scratch);
  };
  parallel_tasks(static_cast<int64_t>(tasks.size()), kernel.scratch_bytes(p), work, alone);
}

std::vector<BankTask> cut(int64_t n, int64_t step) {
  std::vector<BankTask> tasks;
  for (int64_t i = 0; i < n; i += step) tasks.push_back({i, std::min(i + step, n), 0, 0, 0});
  return tasks;
}

// Buffers for one group of queries after the other.
struct Workspace {
  static constexpr int64_t kBudget = 16 << 20;  // bytes of candidates
  static constexpr int64_t kMostQueries = 512;  // their panels share the second-level cache with a block of the bank
  static constexpr int64_t kLeastRows = 1024;   // of a split

  // Without contents: clearing them would take longer than what small calls do with them.
  std::unique_ptr<float[]> wide, panels, low_panels, byte_panels, norms, bounds;
  std::unique_ptr<int32_t[]> indices;
  std::unique_ptr<uint8_t[]> wild;
  std::vector<Candidates> candidates;
  int64_t room, nan_room, group, query_parts;  // room: capacity in whole vectors, and one to write behind the last

  explicit Workspace(BankProblem& p) {
    const int64_t panel = kernels().fusion.panel;
    // Threads share the queries; where there are fewer panels than threads, the bank too, although every split of it
    // begins without a cut.
    const int64_t threads = thread_count();
    query_parts = std::clamp<int64_t>(ceil_div(std::min(kMostQueries, p.batch), panel), 1, threads);
    p.splits = std::clamp<int64_t>(p.limit / kLeastRows, 1, std::max<int64_t>(1, threads / query_parts));
    p.capacity = std::min((p.shadow ? 8 : 2) * p.topk + 128, p.limit + 1);
    nan_room = std::min(p.topk, p.bank_size);
    room = ceil_div(p.capacity, 16) * 16 + 16;
    const int64_t bytes = p.splits * (12 * room + 4 * nan_room);
    group = std::clamp<int64_t>(kBudget / bytes, 1, std::min(kMostQueries, std::max<int64_t>(1, p.batch)));
    const int64_t padded = ceil_div(group, panel) * panel, depth = ceil_div(p.width, 16) * 16;
    p.wide_stride = depth;
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    const auto floats = [&](int64_t n) { return std::make_unique_for_overwrite<float[]>(size(n)); };
    wide = floats(group * depth);
    panels = floats(padded * depth);
    if (p.low_precision) low_panels = floats(padded * depth);
    if (p.shadow) byte_panels = floats(padded * depth);
    norms = floats(4 * padded);
    wild = std::make_unique_for_overwrite<uint8_t[]>(size(padded / panel));
    bounds = floats(2 * p.splits * group * room);
    indices = std::make_unique_for_overwrite<int32_t[]>(size(p.splits * group * (room + nan_room)));
    candidates.resize(size(p.splits * group));
    p.wide = wide.get();
    p.panels = panels.get();
    p.low_panels = low_panels.get();
    p.norm = norms.get();
    p.residue = norms.get() + padded;
    p.byte_step = norms.get() + 2 * padded;
    p.byte_residue = norms.get() + 3 * padded;
    p.byte_panels = byte_panels.get();
    p.wild = wild.get();
    p.candidates = candidates.data();
  }
  std::vector<BankTask> scans(const BankProblem& p) const {
    const int64_t panels = ceil_div(p.group, kernels().fusion.panel), rows = ceil_div(p.limit, p.splits);
    std::vector<BankTask> tasks;
    for (int64_t part = 0; part < query_parts; ++part) {
      for (int64_t s = 0; s < p.splits; ++s) {
        tasks.push_back({std::min(s * rows, p.limit), std::min((s + 1) * rows, p.limit), s, part * panels / query_parts,
                         (part + 1) * panels / query_parts});
      }
    }
    return tasks;
  }
  void clear() {
    for (size_t i = 0; i < candidates.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      float* lower = bounds.get() + 2 * at * room;
      int32_t* index = indices.get() + at * (room + nan_room);
      candidates[i] = {lower, lower + room, index, index + room, 0, 0, -std::numeric_limits<float>::infinity(), 0};
    }
  }
};

// Up to this many queries are read for, not multiplied for; half a panel is multiplied in half the time.
constexpr int64_t kFewQueries = 8, kHalfPanel = 16;

// In which form the bank is scanned. Where these bounds lie was measured.
void choose_precision(BankProblem& p, const MaybeTensor& shadow) {
  const int64_t rows = p.limit / p.topk;  // for each that is kept: what passes low precision is scored again
  // Bytes let several times as many rows pass as bf16 does, the more the wider they are.
  const bool bytes = p.batch <= kHalfPanel ? rows >= 64 : rows >= 512 && p.width <= 256;
  constexpr int64_t kWidest = 1 << 16;  // sums of products stay int32
  if (shadow && bytes && !p.approximate && p.width <= kWidest) {
    p.shadow = static_cast<char*>(shadow->data_ptr());
    return;
  }
  // Converting a row to bf16 has to be paid for by queries.
  if (p.batch <= kFewQueries) return;
  const bool pays = p.batch > kHalfPanel || p.width >= 128;
  p.low_precision = p.approximate || p.batch >= 4 * kernels().fusion.panel || (pays && rows >= 256);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bank_retrieval(Tensor query, Tensor keys, MaybeTensor values,
                                                                  int64_t topk, MaybeTensor scale, double factor,
                                                                  MaybeTensor count, MaybeTensor mask,
                                                                  MaybeTensor exclude, MaybeTensor shadow,
                                                                  std::string precision, bool save) {
  BankProblem p;
  p.batch = query.size(0);
  p.bank_size = keys.size(0);
  p.width = query.size(1);
  p.topk = topk;
  p.query = rows_of(query);
  p.keys = rows_of(keys);
  p.own_values = values.has_value();
  p.values = values ? rows_of(*values) : p.keys;
  p.scale = static_cast<float>(factor * static_cast<double>(value_of(scale)));
  p.limit = p.bank_size;
  if (count) p.limit = std::clamp<int64_t>(*static_cast<const int64_t*>(count->data_ptr()), 0, p.bank_size);
  if (mask) {
    mask = torch::stable::contiguous(*mask);
    p.mask = static_cast<const uint8_t*>(mask->data_ptr());
    p.mask_stride = mask->dim() == 2 ? p.bank_size : 0;
  }
  if (exclude) {
    exclude = torch::stable::contiguous(*exclude);
    p.exclude = static_cast<const int64_t*>(exclude->data_ptr());
  }
  p.approximate = precision == "bf16";
  if (kernels().bank.low_precision && precision != "fp32") choose_precision(p, shadow);

  const int64_t E = p.values.width;
  Tensor retrieved = empty({p.batch, E}, dtype_code(query));
  Tensor scores = empty({p.batch, topk}, aoti_torch_dtype_float32());
  Tensor indices = empty({p.batch, topk}, aoti_torch_dtype_int64());
  const int32_t key_type = dtype_code(keys), value_type = values ? dtype_code(*values) : key_type;
  Tensor key_rows = save ? empty({p.batch, topk, p.width}, key_type) : empty({0}, key_type);
  Tensor value_rows = save && values ? empty({p.batch, topk, E}, value_type) : empty({0}, value_type);
  p.retrieved = static_cast<char*>(retrieved.data_ptr());
  p.scores = static_cast<float*>(scores.data_ptr());
  p.indices = static_cast<int64_t*>(indices.data_ptr());
  if (p.bank_size == 0) {
    std::memset(p.retrieved, 0, static_cast<size_t>(retrieved.numel() * bytes_of(p.query.dtype)));
    std::fill_n(p.scores, scores.numel(), -std::numeric_limits<float>::infinity());
    std::fill_n(p.indices, indices.numel(), int64_t{-1});
    if (save) {
      std::memset(key_rows.data_ptr(), 0, static_cast<size_t>(key_rows.numel() * bytes_of(p.keys.dtype)));
      std::memset(value_rows.data_ptr(), 0, static_cast<size_t>(value_rows.numel() * bytes_of(p.values.dtype)));
    }
    return {retrieved, scores, indices, key_rows, value_rows};
  }
  if (save) {
    p.key_rows = static_cast<char*>(key_rows.data_ptr());
    if (values) p.value_rows = static_cast<char*>(value_rows.data_ptr());
  }
  const bool few = p.batch <= kFewQueries && !p.shadow;
  Workspace workspace(p);
  constexpr double kWorthThreads = 1 << 17;  // multiplications in the time that waking the other threads takes
  const bool alone = static_cast<double>(p.batch * p.limit) * static_cast<double>(p.width) < kWorthThreads;
  const int64_t panel = kernels().fusion.panel;
  for (p.first_query = 0; p.first_query < p.batch; p.first_query += workspace.group) {
    p.group = std::min(workspace.group, p.batch - p.first_query);
    workspace.clear();
    run(p, kernels().bank.pack, cut(ceil_div(p.group, panel), 1), alone);
    run(p, few ? kernels().bank.scan_few : kernels().bank.scan, workspace.scans(p), alone);
    run(p, kernels().bank.finish, cut(p.group, 8), alone);
  }
  return {retrieved, scores, indices, key_rows, value_rows};
}

void bank_shadow(Tensor keys, Tensor shadow, MaybeTensor slots) {
  BankProblem p;
  p.bank_size = keys.size(0);
  p.width = keys.size(1);
  p.keys = rows_of(keys);
  p.shadow = static_cast<char*>(shadow.data_ptr());
  int64_t n = p.bank_size;
  if (slots) {
    slots = torch::stable::contiguous(*slots);
    p.slots = static_cast<const int64_t*>(slots->data_ptr());
    n = slots->numel();
  }
  constexpr int64_t kWorthThreads = 1 << 16;
  run(p, kernels().bank.shadow, cut(n, 64), n * p.width < kWorthThreads);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bank_retrieval_backward(Tensor query, MaybeTensor grad_retrieved,
                                                                   MaybeTensor grad_scores, Tensor key_rows,
                                                                   MaybeTensor value_rows, Tensor scores,
                                                                   Tensor indices, MaybeTensor scale, double factor,
                                                                   int64_t bank_size, bool rows_grad) {
  BankProblem p;
  p.batch = query.size(0);
  p.bank_size = bank_size;
  p.width = query.size(1);
  p.topk = indices.size(1);
  p.query = rows_of(query);
  p.own_values = value_rows.has_value();
  key_rows = torch::stable::contiguous(key_rows);
  p.keys = {static_cast<const char*>(key_rows.data_ptr()), p.width, p.width, dtype_of(key_rows)};
  p.values = p.keys;
  if (value_rows) {
    value_rows = torch::stable::contiguous(*value_rows);
    const int64_t E = value_rows->size(2);
    p.values = {static_cast<const char*>(value_rows->data_ptr()), E, E, dtype_of(*value_rows)};
  }
  p.scale = static_cast<float>(factor * static_cast<double>(value_of(scale)));
  scores = torch::stable::contiguous(scores);
  indices = torch::stable::contiguous(indices);
  p.scores = static_cast<float*>(scores.data_ptr());
  p.indices = static_cast<int64_t*>(indices.data_ptr());
  const auto floats = torch::headeronly::ScalarType::Float;
  if (grad_retrieved) {
    grad_retrieved = torch::stable::contiguous(torch::stable::to(*grad_retrieved, floats));
    p.grad_retrieved = static_cast<const float*>(grad_retrieved->data_ptr());
  }
  if (grad_scores) {
    grad_scores = torch::stable::contiguous(torch::stable::to(*grad_scores, floats));
    p.grad_scores = static_cast<const float*>(grad_scores->data_ptr());
  }
  Tensor grad_query = empty({p.batch, p.width}, dtype_code(query));
  p.grad_query = static_cast<char*>(grad_query.data_ptr());
  const auto pairs = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(2 * p.batch * p.topk));
  std::vector<double> of_scale(static_cast<size_t>(p.batch));
  p.score_grad = pairs.get();
  p.shares = pairs.get() + p.batch * p.topk;
  p.of_scale = of_scale.data();
  constexpr int64_t kWorthThreads = 1 << 16;
  const bool alone = p.batch * p.topk * (p.width + p.values.width) < kWorthThreads;
  run(p, kernels().bank.backward, cut(p.batch, 4), alone);

  const auto like = [](const Tensor& x, const Tensor& model) { return torch::stable::to(x, model.scalar_type()); };
  const int32_t dtype = dtype_code(key_rows), wide = aoti_torch_dtype_float32();
  Tensor grad_keys = empty({0}, dtype), grad_values = empty({0}, dtype), grad_scale = empty({0}, wide);
  if (rows_grad) {
    Tensor keys = zeros(bank_size, p.width), values = value_rows ? zeros(bank_size, p.values.width) : empty({0}, wide);
    p.grad_keys = static_cast<float*>(keys.data_ptr());
    p.grad_values = static_cast<float*>(values.data_ptr());
    if (bank_size) run(p, kernels().bank.scatter, cut(bank_size, ceil_div(bank_size, 4 * thread_count())), alone);
    grad_keys = like(keys, key_rows);
    if (value_rows) grad_values = like(values, *value_rows);
  }
  if (scale) {
    double total = 0.0;
    for (const double x : of_scale) total += x;
    grad_scale = scalar(static_cast<float>(factor * total));
  }
  return {grad_query, grad_keys, grad_values, grad_scale};
}

}  // namespace
}  // namespace hivilt

STABLE_TORCH_LIBRARY_IMPL(hivilt, CPU, m) {
  m.impl("bank_retrieval_cpu", TORCH_BOX(&hivilt::bank_retrieval));
  m.impl("bank_shadow_cpu", TORCH_BOX(&hivilt::bank_shadow));
  m.impl("bank_retrieval_backward_cpu", TORCH_BOX(&hivilt::bank_retrieval_backward));
}
