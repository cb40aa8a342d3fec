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
  float top = 0.0f;       // the best kept score, where any is kept and the row is not poisoned
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
    candidate_stride_ = round_up(kept + chunk_, kLanes) + 2 * kLanes;
    candidates_ = arena.take<float>((kLanes + 1) * candidate_stride_);
    candidate_index_ = arena.take<int32_t>((kLanes + 1) * candidate_stride_);
    elements_ = arena.take<float>(candidate_stride_ * kLanes);
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
        bool clean;
        if (mask.kind == MaskKind::kNone) {
          clean = !mask_nan(load(unfinite_ + r * kLanes)) || inspect(r, width);
        } else {
          masker_.apply(mask, rows[r], columns.index + first, width, scores_ + r * stride_);
          clean = inspect(r, width);
        }
        if (clean) continue;
        const float* row = scores_ + r * stride_;
        for (int64_t c = 0; c < width; ++c) {
          if (row[c] != row[c] || row[c] == kInf) poison(rows[r], columns.index[first + c]);
        }
        state[r].poisoned = true;
      }
      for (int64_t r = 0; r < n; r += kLanes) keep_best(r, smaller<int64_t>(n - r, kLanes), first, width);
    }
  }

 private:
  // Scores of a tile, row by row: scaled, stored, checked for being finite and taken into the group maxima.
  template <bool kClean, bool kGroups>
  HIVILT_INLINE void keep_tile(int64_t tile, int64_t panel, int64_t slot, Vec factor,
                               const Vec (&acc)[kTileRows][kTileVecs]) {
    const Vec zero = splat(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = tile * kTileRows + r;
      float* out = scores_ + row * stride_ + panel * kPanel;
      float* best = group_best_ + row * groups_ + slot * kPanel;
      Vec odd = kClean ? load(unfinite_ + row * kLanes) : zero;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) {
        const Vec s = mul(acc[r][v], factor);
        store(out + v * kLanes, s);
        if (kGroups) store(best + v * kLanes, max(s, load(best + v * kLanes)));
        if (kClean) odd = fma(s, zero, odd);  // 0 * x is NaN exactly when x is not finite
      }
      if (kClean) store(unfinite_ + row * kLanes, odd);
    }
  }

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
        tile_scores<kPairs>(panels.steps, left_ + t * kTileRows * panels.row_words, panels.row_words, panel, acc);
        // Columns past the end hold zeros, not scores.
        if (kClean && slots && (p + 1) * kPanel <= width) {
          keep_tile<kClean, true>(t, p, slot, factor, acc);
        } else {
          keep_tile<kClean, false>(t, p, slot, factor, acc);
        }
      }
      if (slots && ++slot == slots) slot = 0;
    }
    // Columns past the end are absent.
    for (int64_t row = 0; row < tiles * kTileRows; ++row) {
      for (int64_t c = width; c < n_panels * kPanel; ++c) scores_[row * stride_ + c] = -kInf;
    }
  }

  // Whether the scores of a row that are present are all finite. Rebuilds the group maxima.
  bool inspect(int64_t r, int64_t width) {
    float* row = scores_ + r * stride_;
    float* best = group_best_ + r * groups_;
    const Vec absent = splat(-kInf);
    for (int64_t i = 0; i < groups_; i += kLanes) store(best + i, absent);
    uint32_t odd = 0;
    int64_t slot = 0;
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec x = load(row + c);
      odd |= mask_nan(sub(x, x)) & ~mask_ge(absent, x);
      if (groups_) {
        store(best + slot, max(x, load(best + slot)));
        slot = slot + kLanes == groups_ ? 0 : slot + kLanes;
      }
    }
    return odd == 0;
  }

  // Rows [r, r + n) of the block, n <= kLanes, take what they keep of a chunk.
  void keep_best(int64_t r, int64_t n, int64_t first, int64_t width) {
    const auto k = static_cast<int32_t>(topk_);
    const int64_t vecs = (width + kLanes - 1) / kLanes;
    const auto lane_row = [&](int64_t l) { return r + smaller(l, n - 1); };
    if (first == 0 && !groups_) {
      brackets_.load_rows(elements_, round_up(width, 8), [&](int64_t l) { return scores_ + lane_row(l) * stride_; });
      brackets_.search(k, 0);
      for (int64_t l = 0; l < n; ++l) {
        RowState& s = state[r + l];
        s.top = brackets_.top(l);
        const float* row = scores_ + (r + l) * stride_;
        float* value = values + (r + l) * list_stride;
        int32_t* index = indices + (r + l) * list_stride;
        if (s.poisoned) {
          keep_slowly(r + l, first, width);
        } else if (brackets_.lane(l).count_low <= k) {
          s.kept = take_above(row, vecs, larger(brackets_.lane(l).low, kLowest), 0, value, index);
        } else {
          s.kept = take_best(row, nullptr, vecs, k, brackets_.lane(l), value, index);
        }
      }
      return;
    }
    // At least k group maxima reach the k-th largest of them, so at least k scores do.
    float threshold[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) threshold[l] = kLowest;
    if (groups_) {
      brackets_.load_rows(elements_, groups_, [&](int64_t l) { return group_best_ + lane_row(l) * groups_; });
      brackets_.search(k, k / 8);
      for (int64_t l = 0; l < n; ++l) {
        if (brackets_.lane(l).count_low >= k) threshold[l] = larger(brackets_.lane(l).low, kLowest);
      }
    }
    // Candidates: what was kept so far, and of this chunk what can still enter.
    int32_t count[kLanes], most = 0;
    for (int64_t l = 0; l < n; ++l) {
      RowState& s = state[r + l];
      float* candidate = candidates_ + l * candidate_stride_;
      int32_t* candidate_index = candidate_index_ + l * candidate_stride_;
      const float* value = values + (r + l) * list_stride;
      if (s.poisoned) {
        keep_slowly(r + l, first, width);
        count[l] = 0;
        continue;
      }
      if (s.kept == k) {
        // The list is full: a later column must beat its lowest, ties lose.
        float lowest = value[0];
        for (int32_t t = 1; t < k; ++t) lowest = smaller(lowest, value[t]);
        threshold[l] = larger(threshold[l], from_ordered_bits(ordered_bits(lowest) + 1));
      }
      std::memcpy(candidate, value, static_cast<size_t>(s.kept) * 4);
      std::memcpy(candidate_index, indices + (r + l) * list_stride, static_cast<size_t>(s.kept) * 4);
      count[l] = s.kept + take_above(scores_ + (r + l) * stride_, vecs, threshold[l], static_cast<int32_t>(first),
                                     candidate + s.kept, candidate_index + s.kept);
      most = larger(most, count[l]);
    }
    const int64_t padded = round_up(most, larger(8, kLanes));
    for (int64_t l = 0; l < n; ++l) {
      float* candidate = candidates_ + l * candidate_stride_;
      for (int64_t c = count[l]; c < padded; c += kLanes) store(candidate + c, splat(-kInf));
    }
    brackets_.load_rows(elements_, padded,
                        [&](int64_t l) { return candidates_ + smaller(l, n - 1) * candidate_stride_; });
    brackets_.search(k, 0);
    for (int64_t l = 0; l < n; ++l) {
      RowState& s = state[r + l];
      if (s.poisoned) continue;
      s.top = brackets_.top(l);
      const float* candidate = candidates_ + l * candidate_stride_;
      const int32_t* candidate_index = candidate_index_ + l * candidate_stride_;
      float* value = values + (r + l) * list_stride;
      int32_t* index = indices + (r + l) * list_stride;
      if (count[l] <= k) {
        std::memcpy(value, candidate, static_cast<size_t>(count[l]) * 4);
        std::memcpy(index, candidate_index, static_cast<size_t>(count[l]) * 4);
        s.kept = count[l];
      } else {
        s.kept =
            take_best(candidate, candidate_index, (count[l] + kLanes - 1) / kLanes, k, brackets_.lane(l), value, index);
      }
    }
  }

  void keep_slowly(int64_t r, int64_t first, int64_t width) {
    RowState& s = state[r];
    float* value = values + r * list_stride;
    int32_t* index = indices + r * list_stride;
    // The first candidate arrays may be in use by an earlier row of the batch: the last ones are kept for this.
    float* candidate = candidates_ + kLanes * candidate_stride_;
    int32_t* candidate_index = candidate_index_ + kLanes * candidate_stride_;
    std::memcpy(candidate, value, static_cast<size_t>(s.kept) * 4);
    std::memcpy(candidate_index, index, static_cast<size_t>(s.kept) * 4);
    std::memcpy(candidate + s.kept, scores_ + r * stride_, static_cast<size_t>(width) * 4);
    for (int64_t c = 0; c < width; ++c) candidate_index[s.kept + c] = static_cast<int32_t>(first + c);
    s.kept = take_best_slowly(candidate, s.kept + width, static_cast<int32_t>(topk_), 0, value, index);
    for (int32_t t = 0; t < s.kept; ++t) index[t] = candidate_index[index[t]];
  }

  int64_t topk_, chunk_ = 0, stride_ = 0, groups_ = 0, candidate_stride_ = 0;
  RowBrackets brackets_;
  float* elements_ = nullptr;
  float* left_ = nullptr;
  float* scores_ = nullptr;
  float* group_best_ = nullptr;
  float* unfinite_ = nullptr;
  float* candidates_ = nullptr;
  int32_t* candidate_index_ = nullptr;
  Masker masker_;
};

}  // namespace hivilt::HIVILT_ISA
