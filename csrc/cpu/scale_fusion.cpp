// Family B at the CPU key: tensors in, a FusionProblem and its tasks out to the kernel table, tensors back. Arguments
// were checked in Python.
#include "cpu/interpolation.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

namespace hivilt {
namespace {

int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}
int64_t up_to_multiple(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

// Uninitialised floats that nobody outside sees.
struct Floats {
  Tensor memory;
  float* data = nullptr;
  Floats() = default;
  explicit Floats(int64_t count)
      : memory(empty({std::max<int64_t>(1, count)}, aoti_torch_dtype_float32())),
        data(static_cast<float*>(memory.data_ptr())) {}
};

Norm norm_of(const std::string& name) {
  return name == "layer" ? Norm::kLayer : name == "affine" ? Norm::kAffine : Norm::kNone;
}
Activation activation_of(const std::string& name) {
  return name == "gelu"        ? Activation::kGelu
         : name == "gelu_tanh" ? Activation::kGeluTanh
         : name == "relu"      ? Activation::kRelu
         : name == "silu"      ? Activation::kSilu
                               : Activation::kNone;
}

// A multiply-add of a gathered row costs about as much as this many of a matrix product.
constexpr double kGatherCost = 6.0;

// Whether a scale is projected at its own resolution, or brought to the output's first. `taps` is how many tokens an
// interpolated one reads.
bool project_first(const std::string& impl, double cells, double out_cells, double taps, double channels,
                   double width) {
  if (impl != "auto") return impl == "epilogue";
  const double first = cells * channels * width + kGatherCost * out_cells * taps * width;
  const double last = out_cells * channels * width + kGatherCost * out_cells * taps * channels;
  return first <= last;
}

double mean_taps(const Resize& resize) {
  double taps = 1.0;
  for (const AxisTaps& axis : resize.axis) {
    double count = 0.0;
    for (int64_t o = 0; o < axis.size; ++o) count += axis.count[o];
    taps *= count / static_cast<double>(axis.size);
  }
  return taps;
}

// Owns what a FusionProblem points into.
struct FusionCall {
  FusionProblem p;
  std::vector<FusionScale> scales;
  std::vector<Tensor> features;
  Tensor weight;
  Interpolations tables;
  std::vector<Floats> buffers;

  FusionCall(const std::vector<Tensor>& features_, const Tensor& weight_, const MaybeTensor& norm_weight,
             const MaybeTensor& norm_bias, const MaybeTensor& seed, const std::vector<int64_t>& grids,
             const std::vector<int64_t>& out_grid, const std::string& norm, double eps, const std::string& activation,
             double dropout_p, const std::string& mode, bool align_corners, int64_t prefix_tokens,
             const std::string& impl)
      : features(features_), weight(weight_), tables(resize_mode(mode), align_corners) {
    const FusionKernels& table = kernels().fusion;
    if (weight.size(1) > 1 && weight.stride(1) != 1) weight = torch::stable::contiguous(weight);
    p.dtype = dtype_of(weight);
    p.batch = features[0].size(0);
    p.prefix = prefix_tokens;
    p.width = weight.size(0);
    p.stride = up_to_multiple(p.width, table.panel);
    p.weight_stride = weight.stride(0);
    p.norm = norm_of(norm);
    p.activation = activation_of(activation);
    p.eps = static_cast<float>(eps);
    p.norm_weight = norm_weight ? vector(*norm_weight) : nullptr;
    p.norm_bias = norm_bias ? vector(*norm_bias) : nullptr;
    if (seed && dropout_p > 0) set_dropout(*seed, dropout_p);

    const auto rank = static_cast<int64_t>(out_grid.size());
    p.cells = 1;
    for (const int64_t n : out_grid) p.cells *= n;
    scales.resize(features.size());
    int64_t first_channel = 0;
    for (size_t s = 0; s < features.size(); ++s) {
      const int64_t* grid = grids.data() + static_cast<int64_t>(s) * rank;
      FusionScale& scale = scales[s];
      scale.channels = features[s].size(2);
      scale.cells = 1;
      for (int64_t i = 0; i < rank; ++i) scale.cells *= grid[i];
      scale.prefix = features[s].size(1) - scale.cells;
      scale.weight = static_cast<const char*>(weight.data_ptr()) + first_channel * bytes_of(p.dtype);
      first_channel += scale.channels;
      if (std::equal(out_grid.begin(), out_grid.end(), grid)) {
        scale.way = Way::kDirect;
      } else {
        scale.resize = tables.resize(grid, out_grid.data(), rank, false);
        const bool first =
            project_first(impl, static_cast<double>(scale.cells), static_cast<double>(p.cells), mean_taps(scale.resize),
                          static_cast<double>(scale.channels), static_cast<double>(p.width));
        scale.way = first ? Way::kProject : Way::kInterpolate;
      }
      Tensor& x = features[s];
      // Interpolation reads whole rows of neighbours.
      if (scale.way == Way::kInterpolate && x.size(2) > 1 && x.stride(2) != 1) x = torch::stable::contiguous(x);
      scale.data = static_cast<const char*>(x.data_ptr());
      scale.stride_b = x.stride(0);
      scale.stride_n = x.stride(1);
      scale.stride_c = x.size(2) > 1 ? x.stride(2) : 1;
    }
    p.scales = scales.data();
    p.n_scales = static_cast<int64_t>(scales.size());
  }

  float* floats(int64_t count) {
    buffers.emplace_back(count);
    return buffers.back().data;
  }
  // A vector over the output channels as floats, zeros up to whole panels.
  const float* vector(const Tensor& x) {
    Tensor wide = torch::stable::to(x, torch::headeronly::ScalarType::Float);
    wide = torch::stable::contiguous(wide);
    float* to = floats(p.stride);
    std::memset(to, 0, static_cast<size_t>(p.stride) * 4);
    std::memcpy(to, wide.data_ptr(), static_cast<size_t>(p.width) * 4);
    return to;
  }
  void set_dropout(const Tensor& seed, double dropout_p) {
    const auto bits = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
    const auto threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536.0));
    p.dropout.active = true;
    p.dropout.threshold = threshold;
    p.dropout.scale = threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f;
    p.dropout.key_lo = static_cast<uint32_t>(bits);
    p.dropout.key_hi = static_cast<uint32_t>(bits >> 32);
  }

  double products() const {
    double total = 0.0;
    for (const FusionScale& scale : scales) {
      total += static_cast<double>(scale.channels) *
               static_cast<double>(scale.way == Way::kProject ? scale.tokens() : p.tokens());
    }
    return total * static_cast<double>(p.batch) * static_cast<double>(p.width);
  }
  void run(const FusionKernel& kernel, const std::vector<FusionTask>& tasks) const {
    constexpr double kWorthThreads = 1 << 17;  // multiplications in the time that waking the other threads takes
    const auto work = [&](int64_t begin, int64_t end, char* scratch) {
      kernel.run(p, tasks.data() + begin, end - begin, scratch);
    };
    parallel_tasks(static_cast<int64_t>(tasks.size()), kernel.scratch_bytes(p), work, products() < kWorthThreads);
  }

  // Rows worked on at a time: whole tiles, in number so that a block of them stays in the second-level cache, and so
  // that `least` tasks come out of all rows. Results do not depend on it.
  void set_block(int64_t least) {
    const int64_t tile = kernels().fusion.tile_rows, most = std::max<int64_t>(2, (64 << 10) / 4 / tile / p.stride * 2);
    const int64_t wanted = ceil_div(p.batch * p.tokens(), tile * least);
    p.block = tile * std::min<int64_t>({most, 8, std::max<int64_t>(1, wanted)});
  }

  void pack(float* FusionScale::* panels, const FusionKernel& kernel) {
    const int64_t panel = kernels().fusion.panel;
    std::vector<FusionTask> tasks;
    for (int64_t s = 0; s < p.n_scales; ++s) {
      FusionScale& scale = scales[static_cast<size_t>(s)];
      const bool back = panels == &FusionScale::back_panels;
      const int64_t columns = back ? scale.channels : p.width, depth = back ? p.width : scale.channels;
      scale.*panels = floats(up_to_multiple(columns, panel) * up_to_multiple(depth, 8));
      for (int64_t i = 0; i < ceil_div(columns, panel); ++i) tasks.push_back({s, 0, i, i + 1, 0});
    }
    run(kernel, tasks);
  }

  // All rows of `prefix` and then `cells` tokens of every image, in blocks.
  void add_blocks(std::vector<FusionTask>& tasks, int64_t scale, int64_t prefix, int64_t cells) const {
    for (int64_t b = 0; b < p.batch; ++b) {
      for (const auto& [first, last] : {std::pair{int64_t{0}, prefix}, std::pair{prefix, prefix + cells}}) {
        for (int64_t n = first; n < last; n += p.block) tasks.push_back({scale, b, n, std::min(n + p.block, last), 0});
      }
    }
  }
};

std::tuple<Tensor, Tensor> scale_fusion(std::vector<Tensor> features, Tensor weight, MaybeTensor bias,
                                        MaybeTensor norm_weight, MaybeTensor norm_bias, MaybeTensor seed,
                                        std::vector<int64_t> grids, std::vector<int64_t> out_grid, std::string norm,
                                        double eps, std::string activation, double dropout_p, std::string mode,
                                        bool align_corners, int64_t prefix_tokens, std::string impl, bool save) {
  FusionCall call(features, weight, norm_weight, norm_bias, seed, grids, out_grid, norm, eps, activation, dropout_p,
                  mode, align_corners, prefix_tokens, impl);
  FusionProblem& p = call.p;
  const int32_t dtype = dtype_code(weight);
  Tensor out = empty({p.batch, p.tokens(), p.width}, dtype);
  Tensor linear = save ? empty({p.batch, p.tokens(), p.width}, dtype) : empty({0}, dtype);
  p.out = static_cast<char*>(out.data_ptr());
  if (save) p.linear = static_cast<char*>(linear.data_ptr());
  if (bias) p.bias = call.vector(*bias);
  call.set_block(4 * thread_count());
  call.pack(&FusionScale::panels, kernels().fusion.pack);
  std::vector<FusionTask> tasks;
  for (int64_t s = 0; s < p.n_scales; ++s) {
    FusionScale& scale = call.scales[static_cast<size_t>(s)];
    if (scale.way != Way::kProject) continue;
    scale.projected = call.floats(p.batch * scale.tokens() * p.stride);
    call.add_blocks(tasks, s, scale.prefix, scale.cells);
  }
  call.run(kernels().fusion.project, tasks);
  tasks.clear();
  call.add_blocks(tasks, 0, p.prefix, p.cells);
  call.run(kernels().fusion.forward, tasks);
  return {out, linear};
}

// Partial sums of a gradient over rows, kept apart by part and added in order.
struct Parts {
  static constexpr int64_t kBudget = 32 << 20;  // bytes

  // How many parts the rows of a scale are cut into: a function of shapes alone.
  static int64_t count(int64_t blocks, int64_t floats) {
    const int64_t most = std::clamp<int64_t>(kBudget / 4 / std::max<int64_t>(1, floats), 4, 32);
    return std::max<int64_t>(1, std::min(blocks, most));
  }
};

void number_parts(std::vector<FusionTask>& tasks, size_t first, int64_t parts) {
  const auto n = static_cast<int64_t>(tasks.size() - first);
  for (int64_t i = 0; i < n; ++i) tasks[first + static_cast<size_t>(i)].part = i * parts / n;
}

// The tasks of each part, worked through by one thread in order.
void run_parts(const FusionCall& call, const FusionKernel& kernel, const std::vector<FusionTask>& tasks) {
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const bool same = i > 0 && tasks[i].part == tasks[i - 1].part && tasks[i].scale == tasks[i - 1].scale;
    if (same) {
      ++runs.back().second;
    } else {
      runs.emplace_back(static_cast<int64_t>(i), 1);
    }
  }
  const auto work = [&](int64_t begin, int64_t end, char* scratch) {
    for (int64_t r = begin; r < end; ++r) {
      const auto& [first, n] = runs[static_cast<size_t>(r)];
      kernel.run(call.p, tasks.data() + first, n, scratch);
    }
  };
  parallel_tasks(static_cast<int64_t>(runs.size()), kernel.scratch_bytes(call.p), work);
}

// to[r * to_stride + c] = sum of the parts' [r][c], in order.
void sum_parts(const float* parts, int64_t n_parts, int64_t part_size, int64_t rows, int64_t columns, int64_t stride,
               float* to, int64_t to_stride) {
  parallel_tasks(
      rows, 0,
      [&](int64_t begin, int64_t end, char*) {
        std::vector<double> total(static_cast<size_t>(columns));
        for (int64_t r = begin; r < end; ++r) {
          std::fill(total.begin(), total.end(), 0.0);
          for (int64_t part = 0; part < n_parts; ++part) {
            const float* from = parts + part * part_size + r * stride;
            for (int64_t c = 0; c < columns; ++c) total[static_cast<size_t>(c)] += static_cast<double>(from[c]);
          }
          for (int64_t c = 0; c < columns; ++c)
            to[r * to_stride + c] = static_cast<float>(total[static_cast<size_t>(c)]);
        }
      },
      rows * columns < 4096);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> scale_fusion_backward(
    Tensor grad_out, std::vector<Tensor> features, Tensor weight, MaybeTensor norm_weight, MaybeTensor norm_bias,
    Tensor linear, MaybeTensor seed, std::vector<int64_t> grids, std::vector<int64_t> out_grid, std::string norm,
    double eps, std::string activation, double dropout_p, std::string mode, bool align_corners, int64_t prefix_tokens,
    std::string impl, bool features_grad, bool parameters_grad) {
  FusionCall call(features, weight, norm_weight, norm_bias, seed, grids, out_grid, norm, eps, activation, dropout_p,
                  mode, align_corners, prefix_tokens, impl);
  FusionProblem& p = call.p;
  const FusionKernels& table = kernels().fusion;
  const int32_t dtype = dtype_code(weight);
  if (p.width > 1 && grad_out.stride(2) != 1) grad_out = torch::stable::contiguous(grad_out);
  p.grad_out = static_cast<const char*>(grad_out.data_ptr());
  p.grad_stride_b = grad_out.stride(0);
  p.grad_stride_n = grad_out.stride(1);
  linear = torch::stable::contiguous(linear);
  if (linear.dim() == 3) p.linear = static_cast<char*>(linear.data_ptr());
  // A function of shapes alone, as the parts are.
  call.set_block(16);

  std::vector<FusionTask> rows;
  call.add_blocks(rows, 0, p.prefix, p.cells);
  const auto n_rows = static_cast<int64_t>(rows.size());
  const int64_t weight_rows = up_to_multiple(p.width, table.tile_rows);
  int64_t columns = 0;
  for (const FusionScale& scale : call.scales) columns += up_to_multiple(scale.channels, table.panel);
  const int64_t parts = Parts::count(n_rows, weight_rows * columns);
  number_parts(rows, 0, parts);
  if (features_grad) call.pack(&FusionScale::back_panels, table.pack_back);

  std::vector<Tensor> grads;
  std::vector<FusionTask> cells;
  bool any_projected = false;
  for (size_t s = 0; s < call.scales.size(); ++s) {
    FusionScale& scale = call.scales[s];
    const int64_t stride = up_to_multiple(scale.channels, table.panel);
    grads.push_back(features_grad ? empty({p.batch, scale.tokens(), scale.channels}, dtype) : empty({0}, dtype));
    if (features_grad) scale.grad = static_cast<char*>(grads.back().data_ptr());
    if (scale.way != Way::kDirect) {
      scale.transposed = call.tables.resize(grids.data() + s * out_grid.size(), out_grid.data(),
                                            static_cast<int64_t>(out_grid.size()), true);
    }
    const size_t first = cells.size();
    if (scale.way == Way::kProject || (scale.way == Way::kInterpolate && features_grad)) {
      call.add_blocks(cells, static_cast<int64_t>(s), scale.prefix, scale.cells);
    }
    if (scale.way == Way::kInterpolate && features_grad) {
      scale.grad_fine = call.floats(p.batch * p.tokens() * stride);
    }
    any_projected |= scale.way == Way::kProject;
    scale.parts = parts;
    if (scale.way == Way::kProject) {
      scale.parts = Parts::count(static_cast<int64_t>(cells.size() - first), weight_rows * columns);
    }
    number_parts(cells, first, scale.way == Way::kProject ? scale.parts : static_cast<int64_t>(cells.size() - first));
    if (parameters_grad) {
      const int64_t size = scale.parts * weight_rows * stride;
      scale.grad_weight = call.floats(size);
      std::memset(scale.grad_weight, 0, static_cast<size_t>(size) * 4);
    }
  }
  if (any_projected) p.grad_linear = call.floats(p.batch * p.tokens() * p.stride);
  if (parameters_grad) {
    p.grad_vectors = call.floats(parts * 3 * p.stride);
    std::memset(p.grad_vectors, 0, static_cast<size_t>(parts * 3 * p.stride) * 4);
  }
  run_parts(call, table.backward_rows, rows);
  run_parts(call, table.backward_cells, cells);

  const auto nothing = [&] { return empty({0}, dtype); };
  if (!parameters_grad) return {grads, nothing(), nothing(), nothing(), nothing()};
  const int64_t all_channels = weight.size(1);
  Tensor grad_weight = empty({p.width, all_channels}, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(grad_weight.data_ptr());
  for (const FusionScale& scale : call.scales) {
    const int64_t stride = up_to_multiple(scale.channels, table.panel);
    sum_parts(scale.grad_weight, scale.parts, weight_rows * stride, p.width, scale.channels, stride, to, all_channels);
    to += scale.channels;
  }
  Tensor vectors[3];
  for (int64_t i = 0; i < 3; ++i) {
    vectors[i] = empty({p.width}, aoti_torch_dtype_float32());
    sum_parts(p.grad_vectors + i * p.stride, parts, 3 * p.stride, 1, p.width, 0,
              static_cast<float*>(vectors[i].data_ptr()), 0);
  }
  const auto like = [](const Tensor& x, const Tensor& model) { return torch::stable::to(x, model.scalar_type()); };
  return {grads, like(grad_weight, weight), like(vectors[0], weight),
          norm_weight ? like(vectors[1], *norm_weight) : nothing(),
          norm_bias ? like(vectors[2], *norm_bias) : nothing()};
}

}  // namespace
}  // namespace hivilt

STABLE_TORCH_LIBRARY_IMPL(hivilt, CPU, m) {
  m.impl("scale_fusion_cpu", TORCH_BOX(&hivilt::scale_fusion));
  m.impl("scale_fusion_backward_cpu", TORCH_BOX(&hivilt::scale_fusion_backward));
}
