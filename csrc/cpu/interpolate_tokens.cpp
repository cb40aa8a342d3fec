// Token interpolation at the CPU key, and the dot product that is the gradient of its factor.
#include "cpu/interpolation.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

#include <string>
#include <vector>

namespace hivilt {
namespace {

struct ResizeCall {
  ResizeProblem p;
  Tensor x, base;
  Interpolations tables;
  std::vector<ResizePart> parts;
  std::vector<ResizeTask> tasks;

  ResizeCall(const Tensor& x_, double factor, const std::vector<int64_t>& grid, const std::vector<int64_t>& out_grid,
             int64_t rank, const std::string& mode, bool align_corners, bool transposed)
      : x(rows_of(x_)), tables(resize_mode(mode), align_corners) {
    p.dtype = dtype_of(x);
    p.batch = x.size(0);
    p.channels = x.size(2);
    p.factor = static_cast<float>(factor);
    for (size_t i = 0; i < grid.size(); i += static_cast<size_t>(rank)) {
      parts.push_back({tables.resize(grid.data() + i, out_grid.data() + i, rank, transposed), p.sources, p.outputs});
      p.sources += parts.back().resize.sources();
      p.outputs += parts.back().resize.outputs();
    }
    p.parts = parts.data();
    p.x = static_cast<const char*>(x.data_ptr());
    p.stride_b = x.stride(0);
    p.stride_n = x.stride(1);
    cut();
  }

  void set_base(const Tensor& base_) {
    base = rows_of(base_);
    p.base = static_cast<const char*>(base.data_ptr());
    p.base_stride_b = base.stride(0);
    p.base_stride_n = base.stride(1);
  }
  void run() const {
    const ResizeKernel& kernel = kernels().fusion.interpolate;
    const auto work = [&](int64_t begin, int64_t end, char* scratch) {
      kernel.run(p, tasks.data() + begin, end - begin, scratch);
    };
    constexpr int64_t kWorthThreads = 1 << 15;  // elements written in the time that waking the other threads takes
    parallel_tasks(static_cast<int64_t>(tasks.size()), kernel.scratch_bytes(p), work,
                   p.batch * p.outputs * p.channels < kWorthThreads);
  }

 private:
  static Tensor rows_of(const Tensor& x) {
    return x.size(2) > 1 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x;
  }
  void cut() {
    for (int64_t b = 0; b < p.batch; ++b) {
      for (size_t i = 0; i < parts.size(); ++i) {
        const int64_t n = parts[i].resize.outputs();
        for (int64_t o = 0; o < n; o += kResizeRows) {
          const auto index = static_cast<int64_t>(tasks.size());
          tasks.push_back({static_cast<int64_t>(i), b, o, std::min(o + kResizeRows, n), index});
        }
      }
    }
  }
};

float value_of(const MaybeTensor& scale) {
  return scale ? *static_cast<const float*>(scale->data_ptr()) : 1.0f;
}

Tensor interpolate_tokens(Tensor x, MaybeTensor base, MaybeTensor scale, double factor, std::vector<int64_t> grid,
                          std::vector<int64_t> out_grid, int64_t rank, std::string mode, bool align_corners,
                          bool transposed) {
  ResizeCall call(x, factor * static_cast<double>(value_of(scale)), grid, out_grid, rank, mode, align_corners,
                  transposed);
  if (base) call.set_base(*base);
  Tensor out = empty({call.p.batch, call.p.outputs, call.p.channels}, dtype_code(x));
  call.p.out = static_cast<char*>(out.data_ptr());
  call.run();
  return out;
}

Tensor interpolate_tokens_dot(Tensor grad, Tensor x, double factor, std::vector<int64_t> grid,
                              std::vector<int64_t> out_grid, int64_t rank, std::string mode, bool align_corners) {
  ResizeCall call(x, 1.0, grid, out_grid, rank, mode, align_corners, false);
  call.set_base(grad);
  std::vector<double> dots(call.tasks.size());
  call.p.dots = dots.data();
  call.run();
  double total = 0.0;
  for (const double dot : dots) total += dot;
  return scalar(static_cast<float>(factor * total));
}

}  // namespace
}  // namespace hivilt

STABLE_TORCH_LIBRARY_IMPL(hivilt, CPU, m) {
  m.impl("interpolate_tokens_cpu", TORCH_BOX(&hivilt::interpolate_tokens));
  m.impl("interpolate_tokens_dot_cpu", TORCH_BOX(&hivilt::interpolate_tokens_dot));
}
