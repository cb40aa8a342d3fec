// Positions and weights are those of torch.nn.functional.interpolate, computed in float as it does for all tokens of 32
// bits or fewer; hivilt/reference/scale_fusion.py says the same in Python.
#include "cpu/interpolation.h"

#include <algorithm>
#include <cmath>

#include "check.h"

namespace hivilt {
namespace {

// visit(source, weight) for what output o reads along an axis, ascending, without sources of weight 0.
template <class Visit>
void taps_of(int64_t o, int64_t size, int64_t out_size, ResizeMode mode, bool align_corners, Visit visit) {
  if (size == out_size) return visit(o, 1.0f);
  if (mode == ResizeMode::kArea) {
    const int64_t start = o * size / out_size, end = ((o + 1) * size + out_size - 1) / out_size;
    for (int64_t i = start; i < end; ++i) visit(i, 1.0f / static_cast<float>(end - start));
    return;
  }
  const auto at = static_cast<float>(o);
  if (mode == ResizeMode::kNearest) {
    const float ratio = static_cast<float>(static_cast<double>(size) / static_cast<double>(out_size));
    return visit(std::min(static_cast<int64_t>(std::floor(at * ratio)), size - 1), 1.0f);
  }
  float x;
  if (align_corners) {
    const double ratio = out_size > 1 ? static_cast<double>(size - 1) / static_cast<double>(out_size - 1) : 0.0;
    x = at * static_cast<float>(ratio);
  } else {
    const auto ratio = static_cast<float>(static_cast<double>(size) / static_cast<double>(out_size));
    x = std::max(0.0f, (at + 0.5f) * ratio - 0.5f);
  }
  const int64_t first = std::min(static_cast<int64_t>(x), size - 1);
  const float part = first + 1 < size ? std::min(1.0f, std::max(0.0f, x - static_cast<float>(first))) : 0.0f;
  if (part < 1.0f) visit(first, 1.0f - part);
  if (part > 0.0f) visit(first + 1, part);
}

}  // namespace

ResizeMode resize_mode(const std::string& name) {
  if (name == "linear") return ResizeMode::kLinear;
  if (name == "nearest") return ResizeMode::kNearest;
  if (name == "area") return ResizeMode::kArea;
  reject("mode", "linear, nearest or area", name);
}

void Interpolations::seal(Table& table, int64_t size, int64_t sources, int64_t width) {
  table.taps = {size, sources, table.start.data(), table.count.data(), table.weight.data(), width};
}

const AxisTaps& Interpolations::axis(int64_t size, int64_t out_size, bool transposed) {
  auto& slot = tables_[{size, out_size, transposed}];
  if (slot) return slot->taps;
  slot = std::make_unique<Table>();
  const auto rows = static_cast<size_t>(transposed ? size : out_size);
  auto &start = slot->start, &count = slot->count;
  start.assign(rows, 0);
  count.assign(rows, 0);
  // visit(row, neighbour, weight). What a row reads are neighbours the other way round too: positions never fall.
  const auto all = [&](auto visit) {
    for (int64_t o = 0; o < out_size; ++o) {
      taps_of(o, size, out_size, mode_, align_corners_, [&](int64_t source, float weight) {
        visit(static_cast<size_t>(transposed ? source : o), transposed ? o : source, weight);
      });
    }
  };
  all([&](size_t row, int64_t neighbour, float) {
    if (count[row]++ == 0) start[row] = static_cast<int32_t>(neighbour);
  });
  const auto width = static_cast<size_t>(std::max(1, rows ? *std::max_element(count.begin(), count.end()) : 0));
  slot->weight.assign(rows * width, 0.0f);
  all([&](size_t row, int64_t neighbour, float weight) {
    slot->weight[row * width + static_cast<size_t>(neighbour - start[row])] = weight;
  });
  seal(*slot, static_cast<int64_t>(rows), transposed ? out_size : size, static_cast<int64_t>(width));
  return slot->taps;
}

Resize Interpolations::resize(const int64_t* grid, const int64_t* out_grid, int64_t rank, bool transposed) {
  Resize resize;
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t j = i - (3 - rank);
    resize.axis[i] = j < 0 ? axis(1, 1, transposed) : axis(grid[j], out_grid[j], transposed);
  }
  return resize;
}

}  // namespace hivilt
