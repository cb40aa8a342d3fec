// Positions and weights are those of torch.nn.functional.interpolate, computed in float as it does for all tokens of 32
// bits or fewer; hivilt/reference/scale_fusion.py says the same in Python.
#include "cpu/interpolation.h"

#include <algorithm>
#include <cmath>

#include "check.h"

namespace hivilt {
namespace {

struct Tap {
  int64_t source;
  float weight;
};

// What output o reads along an axis, ascending, without sources of weight 0.
std::vector<Tap> taps_of(int64_t o, int64_t size, int64_t out_size, ResizeMode mode, bool align_corners) {
  if (size == out_size) return {{o, 1.0f}};
  if (mode == ResizeMode::kArea) {
    const int64_t start = o * size / out_size, end = ((o + 1) * size + out_size - 1) / out_size;
    std::vector<Tap> taps;
    for (int64_t i = start; i < end; ++i) taps.push_back({i, 1.0f / static_cast<float>(end - start)});
    return taps;
  }
  const auto at = static_cast<float>(o);
  if (mode == ResizeMode::kNearest) {
    const float ratio = static_cast<float>(static_cast<double>(size) / static_cast<double>(out_size));
    return {{std::min(static_cast<int64_t>(std::floor(at * ratio)), size - 1), 1.0f}};
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
  const float part = std::min(1.0f, std::max(0.0f, x - static_cast<float>(first)));
  if (first + 1 >= size) return {{first, 1.0f}};
  if (part == 0.0f) return {{first, 1.0f}};
  if (part == 1.0f) return {{first + 1, 1.0f}};
  return {{first, 1.0f - part}, {first + 1, part}};
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
  std::vector<std::vector<Tap>> rows(static_cast<size_t>(transposed ? size : out_size));
  for (int64_t o = 0; o < out_size; ++o) {
    const std::vector<Tap> taps = taps_of(o, size, out_size, mode_, align_corners_);
    if (!transposed) {
      rows[static_cast<size_t>(o)] = taps;
    } else {
      // Outputs that read one source are neighbours too: positions never fall.
      for (const Tap& tap : taps) rows[static_cast<size_t>(tap.source)].push_back({o, tap.weight});
    }
  }
  size_t width = 1;
  for (const auto& row : rows) width = std::max(width, row.size());
  slot->weight.assign(rows.size() * width, 0.0f);
  for (size_t r = 0; r < rows.size(); ++r) {
    slot->start.push_back(rows[r].empty() ? 0 : static_cast<int32_t>(rows[r][0].source));
    slot->count.push_back(static_cast<int32_t>(rows[r].size()));
    for (size_t t = 0; t < rows[r].size(); ++t) slot->weight[r * width + t] = rows[r][t].weight;
  }
  seal(*slot, static_cast<int64_t>(rows.size()), transposed ? out_size : size, static_cast<int64_t>(width));
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
