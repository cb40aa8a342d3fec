// Scores of a block of rows against all columns, and the k best columns of each row, chunk by chunk: the block of
// scores lives in scratch (rows x kChunk floats), never more. Rows are queries and columns keys, or the reverse
// (axis 1), or rows and columns of a separate similarity.
#pragma once

#include "core/score_mask.h"
#include "core/tile.h"
#include "core/topk_row.h"

namespace hivilt::HIVILT_ISA {

constexpr int64_t kChunk = 4096;         // columns scored at once
constexpr int64_t kBlockFloats = 65536;  // scores held at once, about half of a second-level cache
constexpr int64_t kMostRows = 48;

struct RowState {
  int32_t kept = 0;
  bool poisoned = false;  // a valid score is NaN or +inf
};

class RowSelector {
 public:
  RowSelector(Arena& arena, int64_t most_columns, int64_t width, int64_t topk, DType dtype)
      : columns(arena, most_columns), panels(arena, most_columns, width, dtype), topk_(topk) {
    chunk_ = smaller(round_up(larger<int64_t>(most_columns, 1), kPanel), kChunk);
    stride_ = chunk_ + kLanes;  // one line more than a power of two: rows of a tile fall in different cache sets
    block_rows = smaller(kMostRows, larger<int64_t>(kBlockFloats / stride_, 1));
    block_rows = larger<int64_t>(block_rows / kTileRows, 1) * kTileRows;
    left_ = arena.take<float>(block_rows * panels.row_words);
    scores_ = arena.take<float>(block_rows * stride_);
    // Enough groups that the k-th largest group maximum lets few more than k through; a row this short needs none.
    groups_ = round_up(3 * topk, kPanel);
    if (chunk_ < 2 * groups_ || chunk_ < 12 * kLanes) groups_ = 0;
    group_best_ = arena.take<float>(block_rows * groups_);
    unfinite_ = arena.take<float>(block_rows * kLanes);
    const int64_t kept = round_up(smaller(topk, most_columns) + kLanes, kLanes);
    list_stride = kept;
    values = arena.take<float>(block_rows * kept);
    indices = arena.take<int32_t>(block_rows * kept);
    candidates_ = arena.take<float>(kept + chunk_ + 2 * kLanes);
    candidate_index_ = arena.take<int32_t>(kept + chunk_ + 2 * kLanes);
    state = arena.take<RowState>(block_rows);
    masker_ = Masker(arena, chunk_);
  }

  Tokens columns;  // fill both before the first block
  Panels panels;
  int64_t block_rows = 0, list_stride = 0;
  float* values = nullptr;     // [block_rows][list_stride]: kept scores, by column
  int32_t* indices = nullptr;  // their positions among `columns`
  RowState* state = nullptr;

  // Rows rows[0..n), n <= block_rows; source(row) is the address of a row's elements.
  // poison(row, column) is called for valid scores that are NaN or +inf.
  template <class Source, class Poison>
  void select(const int32_t* rows, int64_t n, DType dtype, float scale, const ScoreMask& mask, Source source,
              Poison poison) {
    const int64_t tiles = (n + kTileRows - 1) / kTileRows;
    for (int64_t r = 0; r < tiles * kTileRows; ++r) {
      // Rows that only fill up the last tile repeat its last real row.
      panels.load_row(source(rows[smaller(r, n - 1)]), dtype, left_ + r * panels.row_words);
    }
    for (int64_t r = 0; r < n; ++r) state[r] = {};
    for (int64_t first = 0; first < columns.count; first += kChunk) {
      const int64_t width = smaller(columns.count - first, kChunk);
      if (mask.kind == MaskKind::kNone) {
        if (panels.pairs) {
          score<true, true>(tiles, first, width, scale);
        } else {
          score<false, true>(tiles, first, width, scale);
        }
      } else if (panels.pairs) {
        score<true, false>(tiles, first, width, scale);
      } else {
        score<false, false>(tiles, first, width, scale);
      }
      for (int64_t r = 0; r < n; ++r) {
        int32_t present = static_cast<int32_t>(width);
        bool clean;
        if (mask.kind == MaskKind::kNone) {
          clean = !mask_nan(load(unfinite_ + r * kLanes));
          if (!clean) present = inspect(r, width, &clean);
        } else {
          masker_.apply(mask, rows[r], columns.index + first, width, scores_ + r * stride_);
          present = inspect(r, width, &clean);
        }
        if (!clean) {
          const float* row = scores_ + r * stride_;
          for (int64_t c = 0; c < width; ++c) {
            if (row[c] != row[c] || row[c] == kInf) poison(rows[r], columns.index[first + c]);
          }
          state[r].poisoned = true;
        }
        keep_best(r, first, width, present);
      }
    }
  }

 private:
  template <bool kPairs, bool kClean>
  void score(int64_t tiles, int64_t first, int64_t width, float scale) {
    const int64_t n_panels = (width + kPanel - 1) / kPanel, slots = groups_ / kPanel;
    const Vec factor = splat(scale), zero = splat(0.0f);
    if (kClean) {
      for (int64_t i = 0; i < tiles * kTileRows * kLanes; i += kLanes) store(unfinite_ + i, zero);
      for (int64_t i = 0; i < tiles * kTileRows * groups_; i += kLanes) store(group_best_ + i, splat(-kInf));
    }
    int64_t slot = 0;
    for (int64_t p = 0; p < n_panels; ++p) {
      const float* panel = panels.panel(first / kPanel + p);
      for (int64_t t = 0; t < tiles; ++t) {
        Vec acc[kTileRows][kTileVecs];
        tile_zero(acc);
        tile_product<kPairs>(panels.steps, left_ + t * kTileRows * panels.row_words, panels.row_words, 1, panel, kPanel,
                             acc);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          const int64_t row = t * kTileRows + r;
          float* out = scores_ + row * stride_ + p * kPanel;
          Vec odd = kClean ? load(unfinite_ + row * kLanes) : zero;
#pragma GCC unroll 4
          for (int v = 0; v < kTileVecs; ++v) {
            const Vec s = mul(acc[r][v], factor);
            store(out + v * kLanes, s);
            if (kClean) odd = fma(s, zero, odd);  // 0 * x is NaN exactly when x is not finite
          }
          if (kClean) store(unfinite_ + row * kLanes, odd);
        }
        if (kClean && slots) {
          if ((p + 1) * kPanel > width) continue;  // columns past the end hold zeros, not scores
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) {
            const float* s = scores_ + (t * kTileRows + r) * stride_ + p * kPanel;
            float* best = group_best_ + (t * kTileRows + r) * groups_ + slot * kPanel;
#pragma GCC unroll 4
            for (int v = 0; v < kTileVecs; ++v)
              store(best + v * kLanes, max(load(s + v * kLanes), load(best + v * kLanes)));
          }
        }
      }
      if (slots && ++slot == slots) slot = 0;
    }
    // Columns past the end are absent.
    for (int64_t row = 0; row < tiles * kTileRows; ++row) {
      for (int64_t c = width; c < n_panels * kPanel; ++c) scores_[row * stride_ + c] = -kInf;
    }
  }

  // Which scores of a row are present, and whether those are all finite. Rebuilds the group maxima.
  int32_t inspect(int64_t r, int64_t width, bool* clean) {
    float* row = scores_ + r * stride_;
    float* best = group_best_ + r * groups_;
    const Vec absent = splat(-kInf);
    for (int64_t i = 0; i < groups_; i += kLanes) store(best + i, absent);
    int32_t present = 0;
    uint32_t odd = 0;
    int64_t slot = 0;
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec x = load(row + c);
      const uint32_t missing = mask_ge(absent, x);
      odd |= mask_nan(sub(x, x)) & ~missing;
      present += kLanes - popcount(missing);
      if (groups_) {
        store(best + slot, max(x, load(best + slot)));
        slot = slot + kLanes == groups_ ? 0 : slot + kLanes;
      }
    }
    *clean = odd == 0;
    return present;
  }

  void keep_best(int64_t r, int64_t first, int64_t width, int32_t present) {
    RowState& s = state[r];
    float* value = values + r * list_stride;
    int32_t* index = indices + r * list_stride;
    const float* row = scores_ + r * stride_;
    const int64_t vecs = (width + kLanes - 1) / kLanes;
    const auto k = static_cast<int32_t>(topk_);
    if (s.poisoned) {
      std::memcpy(candidates_, value, static_cast<size_t>(s.kept) * 4);
      std::memcpy(candidate_index_, index, static_cast<size_t>(s.kept) * 4);
      std::memcpy(candidates_ + s.kept, row, static_cast<size_t>(width) * 4);
      for (int64_t c = 0; c < width; ++c) candidate_index_[s.kept + c] = static_cast<int32_t>(first + c);
      const int32_t n = take_best_slowly(candidates_, s.kept + width, k, 0, value, index);
      for (int32_t t = 0; t < n; ++t) index[t] = candidate_index_[index[t]];
      s.kept = n;
      return;
    }
    if (present == 0) return;
    if (first == 0 && present <= k) {
      s.kept = take_above(row, vecs, kLowest, 0, value, index);
      return;
    }
    if (first == 0 && !groups_) {
      Bracket b = extremes(row, vecs, present);
      narrow_bracket(row, vecs, k, 0, b);
      s.kept = take_best(row, nullptr, vecs, k, b, value, index);
      return;
    }
    // Candidates: what was kept so far, and of this chunk what can still enter. At least k group maxima reach the
    // k-th largest of them, so at least k scores do.
    float threshold = kLowest;
    if (groups_ && present > k) {
      const float* best = group_best_ + r * groups_;
      const int64_t group_vecs = groups_ / kLanes;
      int32_t filled = 0;
      for (int64_t v = 0; v < group_vecs; ++v) filled += popcount(mask_gt(load(best + v * kLanes), splat(-kInf)));
      if (filled > k) {
        Bracket b = extremes(best, group_vecs, filled);
        narrow_bracket(best, group_vecs, k, k / 8, b);
        threshold = b.low;
      }
    }
    if (s.kept == k) {
      // The list is full: a later column must beat its lowest, ties lose.
      float lowest = value[0];
      for (int32_t t = 1; t < k; ++t) lowest = smaller(lowest, value[t]);
      threshold = larger(threshold, from_ordered_bits(ordered_bits(lowest) + 1));
    }
    std::memcpy(candidates_, value, static_cast<size_t>(s.kept) * 4);
    std::memcpy(candidate_index_, index, static_cast<size_t>(s.kept) * 4);
    const int32_t n = s.kept + take_above(row, vecs, threshold, static_cast<int32_t>(first), candidates_ + s.kept,
                                          candidate_index_ + s.kept);
    store(candidates_ + n, splat(-kInf));
    const int64_t candidate_vecs = (n + kLanes - 1) / kLanes;
    if (n <= k) {
      std::memcpy(value, candidates_, static_cast<size_t>(n) * 4);
      std::memcpy(index, candidate_index_, static_cast<size_t>(n) * 4);
      s.kept = n;
      return;
    }
    Bracket b = extremes(candidates_, candidate_vecs, n);
    narrow_bracket(candidates_, candidate_vecs, k, 0, b);
    s.kept = take_best(candidates_, candidate_index_, candidate_vecs, k, b, value, index);
  }

  int64_t topk_, chunk_ = 0, stride_ = 0, groups_ = 0;
  float* left_ = nullptr;
  float* scores_ = nullptr;
  float* group_best_ = nullptr;
  float* unfinite_ = nullptr;
  float* candidates_ = nullptr;
  int32_t* candidate_index_ = nullptr;
  Masker masker_;
};

}  // namespace hivilt::HIVILT_ISA
