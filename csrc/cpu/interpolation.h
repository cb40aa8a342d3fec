// Builds the tables of core/interpolation.h.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "core/interpolation.h"

namespace hivilt {

enum class ResizeMode : int { kLinear, kNearest, kArea };

ResizeMode resize_mode(const std::string& name);

// Owns tables; those of equal axes are made once.
class Interpolations {
 public:
  Interpolations(ResizeMode mode, bool align_corners) : mode_(mode), align_corners_(align_corners) {}
  // U, which reads `grid` and writes `out_grid` (1, 2 or 3 sizes each), or U^T, which reads out_grid and writes grid.
  Resize resize(const int64_t* grid, const int64_t* out_grid, int64_t rank, bool transposed);

 private:
  struct Table {
    std::vector<int32_t> start, count;
    std::vector<float> weight;
    AxisTaps taps;
  };
  const AxisTaps& axis(int64_t size, int64_t out_size, bool transposed);
  static void seal(Table& table, int64_t size, int64_t sources, int64_t width);

  ResizeMode mode_;
  bool align_corners_;
  std::map<std::tuple<int64_t, int64_t, bool>, std::unique_ptr<Table>> tables_;
};

}  // namespace hivilt
