// Interpolation of one grid to another as kernels see it: along each axis a table of which sources an output reads and
// how much of each. Sources of an output are neighbours, so a start and a count say which. The transpose of an
// interpolation is another such table.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace hivilt {

struct AxisTaps {
  int64_t size = 1, sources = 1;   // outputs and sources along the axis
  const int32_t* start = nullptr;  // (size)
  const int32_t* count = nullptr;  // (size); a source of weight 0 is not counted
  const float* weight = nullptr;   // (size, width)
  int64_t width = 1;
};

// Three axes, of which unused ones have size 1.
struct Resize {
  AxisTaps axis[3];

  HIVILT_INLINE int64_t outputs() const { return axis[0].size * axis[1].size * axis[2].size; }
  HIVILT_INLINE int64_t sources() const { return axis[0].sources * axis[1].sources * axis[2].sources; }

  struct Place {
    int64_t z, y, x;
  };
  HIVILT_INLINE Place place_of(int64_t output) const {
    const int64_t rest = output / axis[2].size;
    return {rest / axis[1].size, rest % axis[1].size, output % axis[2].size};
  }
  // To the next output in raster order, without the divisions of place_of.
  HIVILT_INLINE void advance(Place& at) const {
    if (++at.x == axis[2].size) next_line(at);
  }
  // To the first output of the next line.
  HIVILT_INLINE void next_line(Place& at) const {
    at.x = 0;
    if (++at.y < axis[1].size) return;
    at.y = 0;
    ++at.z;
  }

  // visit(source, weight) for everything that an output reads, both counted in raster order.
  template <class Visit>
  HIVILT_INLINE void taps(const Place& at, Visit visit) const {
    for (int64_t i = 0; i < axis[0].count[at.z]; ++i) {
      const float wz = axis[0].weight[at.z * axis[0].width + i];
      const int64_t plane = (axis[0].start[at.z] + i) * axis[1].sources;
      for (int64_t j = 0; j < axis[1].count[at.y]; ++j) {
        const float wy = wz * axis[1].weight[at.y * axis[1].width + j];
        const int64_t row = (plane + axis[1].start[at.y] + j) * axis[2].sources + axis[2].start[at.x];
        for (int64_t k = 0; k < axis[2].count[at.x]; ++k) visit(row + k, wy * axis[2].weight[at.x * axis[2].width + k]);
      }
    }
  }
  template <class Visit>
  HIVILT_INLINE void taps(int64_t output, Visit visit) const {
    taps(place_of(output), visit);
  }
};

}  // namespace hivilt
