// contrastive_loss at the CPU key: tensors in, a ContrastProblem and its tasks out to the kernel table, tensors back.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace hivilt {
namespace {

constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}
int64_t up_to(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

Tensor with_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) > 1 && x.stride(last) != 1 ? torch::stable::contiguous(x) : x;
}

double number_of(const MaybeTensor& x) {
  return x ? static_cast<double>(*static_cast<const float*>(x->data_ptr())) : 1.0;
}

// Memory that its owner writes before it reads.
using Floats = std::unique_ptr<float[]>;
Floats floats(int64_t n) {
  return std::make_unique_for_overwrite<float[]>(static_cast<size_t>(n));
}

// Owns what a ContrastProblem points into.
struct ContrastCall {
  ContrastProblem p;
  Tensor x, y;
  MaybeTensor labels;
  Floats left, right;
  bool alone;

  ContrastCall(const Tensor& x_, const Tensor& y_, const MaybeTensor& scale, double factor, const MaybeTensor& bias,
               double offset, const MaybeTensor& labels_, const std::string& kind)
      : x(with_rows(x_)), y(with_rows(y_)), labels(labels_) {
    const int64_t tile_rows = kernels().fusion.tile_rows, panel = kernels().fusion.panel;
    p.dtype = dtype_of(x);
    p.images = x.size(0);
    p.group = x.size(1);
    p.columns = y.size(0);
    p.width = y.size(1);
    p.siglip = kind == "siglip";
    p.x = static_cast<const char*>(x.data_ptr());
    p.y = static_cast<const char*>(y.data_ptr());
    p.x_stride_b = x.stride(0);
    p.x_stride_r = x.stride(1);
    p.y_stride = y.stride(0);
    p.scale = static_cast<float>(factor * number_of(scale));
    p.bias = static_cast<float>(offset + (bias ? number_of(bias) : 0.0));
    if (labels) {
      labels = torch::stable::contiguous(*labels);
      p.labels = static_cast<const int64_t*>(labels->data_ptr());
      for (int64_t i = 0; i < p.images; ++i) {
        if (p.labels[i] < 0 || p.labels[i] >= p.columns) {
          reject("labels", "values from 0 to " + std::to_string(p.columns - 1), std::to_string(p.labels[i]));
        }
      }
    }
    constexpr int64_t kBlockRows = 48;  // whole tiles of every instruction set
    p.block_images = std::max<int64_t>(1, kBlockRows / p.group);
    p.block_rows = up_to(p.block_images * p.group, tile_rows);
    p.blocks = ceil_div(p.images, p.block_images);
    p.padded_rows = p.blocks * p.block_rows;
    p.padded_columns = up_to(p.columns, panel);
    p.pairs = kernels().contrast.low_precision && p.dtype == DType::kBFloat16;
    p.words = p.pairs ? (p.width + 1) / 2 : p.width;
    p.stride = up_to(p.width, panel);
    constexpr double kWorthThreads = 1 << 17;  // multiplications in the time that waking the other threads takes
    alone = static_cast<double>(p.images * p.group) * static_cast<double>(p.columns * p.width) < kWorthThreads;
    left = floats(p.padded_rows * up_to(p.words, panel));
    right = floats(p.padded_columns * up_to(p.words, 8));
    p.left = left.get();
    p.right = right.get();
    run(kernels().contrast.pack_left, p.blocks, 4);
    run(kernels().contrast.pack_right, p.padded_columns / panel, 2);
  }

  // Tasks of `step` pieces of n.
  void run(const ContrastKernel& kernel, int64_t n, int64_t step) const {
    std::vector<ContrastTask> tasks;
    for (int64_t i = 0; i < n; i += step) tasks.push_back({i, std::min(i + step, n)});
    const auto work = [&](int64_t begin, int64_t end, char* scratch) {
      kernel.run(p, tasks.data() + begin, end - begin, scratch);
    };
    parallel_tasks(static_cast<int64_t>(tasks.size()), kernel.scratch_bytes(p), work, alone);
  }
};

std::tuple<Tensor, Tensor, Tensor> contrastive_loss(Tensor x, Tensor y, MaybeTensor scale, double factor,
                                                    MaybeTensor bias, double offset, MaybeTensor labels, bool columns,
                                                    std::string kind) {
  ContrastCall call(x, y, scale, factor, bias, offset, labels, kind);
  ContrastProblem& p = call.p;
  p.wants_columns = columns;
  const int32_t wide = aoti_torch_dtype_float64();
  Tensor row_lse = empty({p.images}, wide), column_lse = empty({columns ? p.columns : 0}, wide);
  Tensor target = empty({p.siglip ? 0 : p.images}, wide);
  // A function of the shapes alone, so that results do not depend on threads.
  constexpr int64_t kMostParts = 64;
  p.parts = std::min(p.blocks, kMostParts);
  const auto images = static_cast<size_t>(p.images);
  std::vector<float> row_top(images, -std::numeric_limits<float>::infinity());
  const auto cells = columns ? static_cast<size_t>(p.parts * p.padded_columns) : 0;
  std::vector<float> column_top(cells, -std::numeric_limits<float>::infinity()), column_total(cells);
  p.row_top = row_top.data();
  p.row_total = static_cast<double*>(row_lse.data_ptr());
  std::fill_n(p.row_total, p.images, 0.0);
  p.target = static_cast<double*>(target.data_ptr());
  p.column_top = column_top.data();
  p.column_total = column_total.data();
  call.run(kernels().contrast.forward, p.parts, 1);
  if (p.siglip) return {row_lse, column_lse, target};
  for (size_t i = 0; i < images; ++i) p.row_total[i] = static_cast<double>(row_top[i]) + std::log(p.row_total[i]);
  auto* lse = static_cast<double*>(column_lse.data_ptr());
  const auto merge = [&](int64_t begin, int64_t end, char*) {
    for (int64_t c = begin; c < end; ++c) {
      double top = kMinusInf, total = 0.0;
      for (auto at = static_cast<size_t>(c); at < cells; at += static_cast<size_t>(p.padded_columns)) {
        top = std::max(top, static_cast<double>(column_top[at]));
      }
      const double base = top == kMinusInf ? 0.0 : top;
      for (auto at = static_cast<size_t>(c); at < cells; at += static_cast<size_t>(p.padded_columns)) {
        const auto mine = static_cast<double>(column_top[at]);
        // A part without a number above -inf has a total of 0, or of NaN.
        const double fade = mine == top || mine == kMinusInf ? 1.0 : std::exp(mine - base);
        total += fade * static_cast<double>(column_total[at]);
      }
      lse[c] = top + std::log(total);
    }
  };
  if (columns) parallel_tasks(p.columns, 0, merge, call.alone);
  return {row_lse, column_lse, target};
}

// A vector of doubles, or zeros, as floats; `low`: what rounding to float loses.
std::vector<float> rounded(const MaybeTensor& x, int64_t n, int64_t padded, bool low = false) {
  std::vector<float> values(static_cast<size_t>(padded));
  if (!x) return values;
  const Tensor flat = torch::stable::contiguous(*x);
  const auto* wide = static_cast<const double*>(flat.data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    const auto high = static_cast<float>(wide[i]);
    values[static_cast<size_t>(i)] = low ? static_cast<float>(wide[i] - static_cast<double>(high)) : high;
  }
  return values;
}

double sum_of(const double* x, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

// The sum of the shares, NaN where a log-sum-exp is not finite: what a softmax of such logits is.
double sum_of_shares(const std::vector<float>& share, const std::vector<float>& lse, int64_t n) {
  double total = 0.0;
  for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
    total += static_cast<double>(share[i]) * (1.0 + 0.0 * static_cast<double>(lse[i]));
  }
  return total;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_loss_backward(
    Tensor x, Tensor y, MaybeTensor scale, double factor, MaybeTensor bias, double offset, MaybeTensor labels,
    std::string kind, Tensor row_lse, Tensor column_lse, MaybeTensor grad_rows, MaybeTensor grad_columns,
    MaybeTensor grad_target, bool x_grad, bool y_grad) {
  ContrastCall call(x, y, scale, factor, bias, offset, labels, kind);
  ContrastProblem& p = call.p;
  const ContrastKernels& kernel = kernels().contrast;
  const int64_t panel = kernels().fusion.panel, B = p.images, N = p.columns, padded = p.padded_columns;
  const auto row_share = rounded(grad_rows, B, B), target_share = rounded(grad_target, B, B);
  const auto row_high = rounded(row_lse, B, B), row_low = rounded(row_lse, B, B, true);
  const MaybeTensor of_columns = grad_columns ? MaybeTensor(column_lse) : MaybeTensor();
  const auto column_share = rounded(grad_columns, N, padded);
  const auto column_high = rounded(of_columns, N, padded), column_low = rounded(of_columns, N, padded, true);
  p.row_share = row_share.data();
  p.row_high = row_high.data();
  p.row_low = row_low.data();
  p.target_share = target_share.data();
  if (grad_columns) {
    p.column_share = column_share.data();
    p.column_high = column_high.data();
    p.column_low = column_low.data();
  }
  std::vector<double> of_scale(static_cast<size_t>(B)), of_bias(static_cast<size_t>(B));
  p.of_scale = of_scale.data();
  p.of_bias = of_bias.data();

  const int32_t dtype = dtype_code(x), single = aoti_torch_dtype_float32();
  Tensor grad_x = x_grad ? empty({B, p.group, p.width}, dtype) : empty({0}, dtype);
  Tensor grad_y = y_grad ? empty({N, p.width}, dtype) : empty({0}, dtype);
  p.grad_x = static_cast<char*>(grad_x.data_ptr());
  p.grad_y = static_cast<char*>(grad_y.data_ptr());
  // The pairs of a slice take as much memory as x, or a few MiB.
  constexpr int64_t kColumns = 48, kLeastPairs = 1 << 20;  // columns: whole tiles of every instruction set
  const int64_t most = std::max(p.width, kLeastPairs / p.padded_rows);
  const int64_t slice = std::min(up_to(N, kColumns * 2), std::max(kColumns * 2, most / (kColumns * 2) * kColumns * 2));
  p.slice_stride = slice + 16;
  Floats pairs = floats(p.padded_rows * p.slice_stride), x_wide, y_wide, of_slice;
  std::vector<float> of_rows;
  p.slice_grad = pairs.get();
  if (y_grad) {
    of_slice = floats(p.slice_stride * p.stride);
    p.grad_columns = of_slice.get();
    p.x_wide = p.left;
    if (p.pairs) {
      x_wide = floats(p.padded_rows * p.stride);
      p.x_wide = x_wide.get();
      call.run(kernel.widen_rows, p.blocks, 4);
    }
  }
  if (x_grad) {
    y_wide = floats(padded * p.stride);
    p.y_wide = y_wide.get();
    of_rows.resize(static_cast<size_t>(p.padded_rows * p.stride));
    p.grad_rows = of_rows.data();
    call.run(kernel.widen_columns, padded / panel, 2);
  }
  for (p.first = 0; p.first < N; p.first += slice) {
    p.slice = std::min(slice, N - p.first);
    call.run(kernel.pairs, p.blocks, 1);
    if (y_grad) call.run(kernel.columns, up_to(p.slice, kColumns), kColumns);
  }
  if (x_grad) call.run(kernel.finish, p.blocks, 4);
  Tensor grad_scale = empty({0}, single), grad_bias = empty({0}, single);
  if (scale) grad_scale = scalar(static_cast<float>(factor * sum_of(p.of_scale, B)));
  if (bias) {
    double total = sum_of(p.of_bias, B);
    if (!p.siglip) {
      // The shares of a softmax add up to 1 but for rounding errors, which would be all that is left here.
      total = sum_of_shares(row_share, row_high, B) + sum_of_shares(column_share, column_high, N) +
              sum_of_shares(target_share, row_high, B);
    }
    grad_bias = scalar(static_cast<float>(total));
  }
  return {grad_x, grad_y, grad_scale, grad_bias};
}

}  // namespace
}  // namespace hivilt

STABLE_TORCH_LIBRARY_IMPL(hivilt, CPU, m) {
  m.impl("contrastive_loss_cpu", TORCH_BOX(&hivilt::contrastive_loss));
  m.impl("contrastive_loss_backward_cpu", TORCH_BOX(&hivilt::contrastive_loss_backward));
}
