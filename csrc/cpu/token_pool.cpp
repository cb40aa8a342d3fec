// token_pool at the CPU key: tensors in, a PoolProblem and its tasks out to the kernel table, tensors back.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace hivilt {
namespace {

constexpr int64_t kMean = 0, kMax = 1, kAttention = 2;

int64_t up_to_multiple(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

std::vector<float> floats_of(const Tensor& x, int64_t padded) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(x, torch::headeronly::ScalarType::Float));
  std::vector<float> values(static_cast<size_t>(padded));
  std::memcpy(values.data(), wide.data_ptr(), static_cast<size_t>(x.numel()) * 4);
  return values;
}

std::vector<double> softmax(const std::vector<float>& logits, size_t n) {
  double top = -std::numeric_limits<double>::infinity(), total = 0.0;
  for (size_t i = 0; i < n; ++i) top = std::max(top, static_cast<double>(logits[i]));
  std::vector<double> shares(n);
  for (size_t i = 0; i < n; ++i) total += shares[i] = std::exp(static_cast<double>(logits[i]) - top);
  for (double& share : shares) share /= total;
  return shares;
}

// Owns what a PoolProblem points into.
struct PoolCall {
  PoolProblem p;
  Tensor x, proj_weight, mask;
  std::vector<float> proj_bias, score_weight, panels, back_panels;
  std::vector<double> shares;
  int64_t place[3] = {-1, -1, -1};  // of each pool among the pools asked for
  std::vector<PoolTask> tasks;
  int64_t n_parts = 0;

  PoolCall(const Tensor& features, const MaybeTensor& proj_weight_, const MaybeTensor& proj_bias_,
           const MaybeTensor& score_weight_, const Tensor& pool_weights, const MaybeTensor& mask_,
           const std::vector<int64_t>& pools, bool back)
      : x(features) {
    const FusionKernels& tile = kernels().fusion;
    p.dtype = dtype_of(x);
    p.batch = x.size(0);
    p.tokens = x.size(1);
    p.channels = x.size(2);
    p.stride = up_to_multiple(p.channels, tile.panel);
    p.x = static_cast<const char*>(x.data_ptr());
    p.stride_b = x.stride(0);
    p.stride_n = x.stride(1);
    p.stride_c = p.channels > 1 ? x.stride(2) : 1;
    if (mask_) {
      mask = torch::stable::contiguous(*mask_);
      p.mask = static_cast<const uint8_t*>(mask.data_ptr());
    }
    shares = softmax(floats_of(pool_weights, static_cast<int64_t>(pools.size())), pools.size());
    for (size_t i = 0; i < pools.size(); ++i) place[pools[i]] = static_cast<int64_t>(i);
    p.wants_max = place[kMax] >= 0;
    p.wants_attention = place[kAttention] >= 0;
    if (p.wants_attention) {
      proj_weight = *proj_weight_;
      if (p.channels > 1 && proj_weight.stride(1) != 1) proj_weight = torch::stable::contiguous(proj_weight);
      p.hidden = proj_weight.size(0);
      p.hidden_stride = up_to_multiple(p.hidden, tile.panel);
      p.proj_weight = static_cast<const char*>(proj_weight.data_ptr());
      p.proj_stride = proj_weight.stride(0);
      proj_bias = proj_bias_ ? floats_of(*proj_bias_, p.hidden_stride)
                             : std::vector<float>(static_cast<size_t>(p.hidden_stride));
      score_weight = floats_of(*score_weight_, p.hidden_stride);
      p.proj_bias = proj_bias.data();
      p.score_weight = score_weight.data();
      panels.resize(static_cast<size_t>(p.hidden_stride * up_to_multiple(p.channels, 8)));
      p.panels = panels.data();
    }
    p.block = 4 * tile.tile_rows;
    // Parts are a function of shapes alone, so that results do not depend on threads. Forward, where they meet in the
    // result of one image, they do not count the other images either; backward, only gradients of the weights do.
    const int64_t blocks = (p.tokens + p.block - 1) / p.block;
    const int64_t most =
        back ? std::min<int64_t>(blocks, 64 / std::max<int64_t>(1, p.batch)) : std::min<int64_t>((blocks + 1) / 2, 8);
    const int64_t per_image = std::max<int64_t>(1, most);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t part = b * per_image + i * per_image / blocks;
        tasks.push_back({b, i * p.block, std::min((i + 1) * p.block, p.tokens), part});
      }
    }
    n_parts = p.batch * per_image;
  }

  double share(int64_t pool) const { return place[pool] < 0 ? 0.0 : shares[static_cast<size_t>(place[pool])]; }
  int64_t parts_of_image() const { return p.batch ? n_parts / p.batch : 0; }

  void pack(bool back) {
    if (!p.wants_attention) return;
    if (back) {
      back_panels.resize(static_cast<size_t>(p.stride * p.hidden));
      p.back_panels = back_panels.data();
    }
    const PoolKernel& kernel = kernels().pool.pack;
    parallel_tasks(
        1, kernel.scratch_bytes(p), [&](int64_t, int64_t, char* scratch) { kernel.run(p, nullptr, 1, scratch); }, true);
  }
  void run(const PoolKernel& kernel) const {
    constexpr int64_t kWorthThreads = 1 << 15;  // elements read in the time that waking the other threads takes
    std::vector<size_t> first{0};
    for (size_t i = 1; i <= tasks.size(); ++i) {
      if (i == tasks.size() || tasks[i].part != tasks[i - 1].part) first.push_back(i);
    }
    if (tasks.empty()) return;
    const auto work = [&](int64_t begin, int64_t end, char* scratch) {
      const size_t from = first[static_cast<size_t>(begin)], to = first[static_cast<size_t>(end)];
      kernel.run(p, tasks.data() + from, static_cast<int64_t>(to - from), scratch);
    };
    parallel_tasks(static_cast<int64_t>(first.size()) - 1, kernel.scratch_bytes(p), work,
                   p.batch * p.tokens * p.channels < kWorthThreads);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> token_pool(Tensor features, MaybeTensor proj_weight, MaybeTensor proj_bias,
                                                      MaybeTensor score_weight, MaybeTensor score_bias,
                                                      Tensor pool_weights, MaybeTensor mask,
                                                      std::vector<int64_t> pools) {
  PoolCall call(features, proj_weight, proj_bias, score_weight, pool_weights, mask, pools, false);
  PoolProblem& p = call.p;
  // Softmax does not see what is added to every score, and adding it costs digits; only NaN and infinity show.
  if (score_bias) p.score_bias = 0.0f * floats_of(*score_bias, 1)[0];
  const int64_t C = p.channels, n_pools = static_cast<int64_t>(pools.size());
  Tensor out = empty({p.batch, C}, dtype_code(features));
  Tensor pooled = empty({p.batch, n_pools, C}, aoti_torch_dtype_float32());
  Tensor first = p.wants_max ? empty({p.batch, C}, aoti_torch_dtype_int32()) : empty({0}, aoti_torch_dtype_int32());
  Tensor attention = p.wants_attention ? empty({p.batch, p.tokens}, aoti_torch_dtype_float32())
                                       : empty({0}, aoti_torch_dtype_float32());
  p.attention = static_cast<float*>(attention.data_ptr());
  const auto n_parts = static_cast<size_t>(call.n_parts), stride = static_cast<size_t>(p.stride);
  std::vector<float> vectors(3 * n_parts * stride);
  std::vector<int32_t> places(n_parts * stride);
  std::vector<PoolPart> parts(n_parts);
  for (size_t i = 0; i < n_parts; ++i) {
    float* mine = vectors.data() + 3 * i * stride;
    parts[i] = {0,
                -std::numeric_limits<float>::infinity(),
                0.0f,
                mine,
                mine + stride,
                mine + 2 * stride,
                places.data() + i * stride};
  }
  p.parts = parts.data();
  call.pack(false);
  call.run(kernels().pool.pool);

  const int64_t per_image = call.parts_of_image();
  const auto finish = [&](int64_t begin, int64_t end, char*) {
    std::vector<double> total(static_cast<size_t>(C)), weighted(static_cast<size_t>(C)), mixed(static_cast<size_t>(C));
    for (int64_t b = begin; b < end; ++b) {
      const PoolPart* mine = parts.data() + b * per_image;
      int64_t kept = 0;
      double top = -std::numeric_limits<double>::infinity(), weight = 0.0;
      for (int64_t i = 0; i < per_image; ++i) {
        kept += mine[i].kept;
        if (mine[i].kept) top = std::max(top, static_cast<double>(mine[i].top));
      }
      std::fill(total.begin(), total.end(), 0.0);
      std::fill(weighted.begin(), weighted.end(), 0.0);
      auto* rows = static_cast<float*>(pooled.data_ptr()) + b * n_pools * C;
      auto* of_max = p.wants_max ? rows + call.place[kMax] * C : nullptr;
      auto* firsts = static_cast<int32_t*>(first.data_ptr()) + (p.wants_max ? b * C : 0);
      bool some = false;
      for (int64_t i = 0; i < per_image; ++i) {
        const PoolPart& part = mine[i];
        if (!part.kept) continue;
        const double fade = p.wants_attention ? std::exp(static_cast<double>(part.top) - top) : 0.0;
        weight += fade * static_cast<double>(part.total);
        for (int64_t c = 0; c < C; ++c) {
          total[static_cast<size_t>(c)] += static_cast<double>(part.sum[c]);
          if (p.wants_attention) weighted[static_cast<size_t>(c)] += fade * static_cast<double>(part.weighted[c]);
          if (!of_max) continue;
          // The first of equals, and NaN above every number.
          const bool lost = part.maximum[c] != part.maximum[c] && of_max[c] == of_max[c];
          if (!some || part.maximum[c] > of_max[c] || lost) {
            of_max[c] = part.maximum[c];
            firsts[c] = part.first[c];
          }
        }
        some = true;
      }
      if (!kept) {
        std::fill_n(rows, n_pools * C, 0.0f);
        if (of_max) std::fill_n(firsts, C, 0);
        if (p.wants_attention) std::fill_n(p.attention + b * p.tokens, p.tokens, 0.0f);
        std::memset(static_cast<char*>(out.data_ptr()) + b * C * bytes_of(p.dtype), 0,
                    static_cast<size_t>(C * bytes_of(p.dtype)));
        continue;
      }
      for (int64_t c = 0; c < C; ++c) {
        const auto at = static_cast<size_t>(c);
        if (call.place[kMean] >= 0) {
          rows[call.place[kMean] * C + c] = static_cast<float>(total[at] / static_cast<double>(kept));
        }
        if (p.wants_attention) rows[call.place[kAttention] * C + c] = static_cast<float>(weighted[at] / weight);
        double sum = 0.0;
        for (int64_t i = 0; i < n_pools; ++i) {
          sum += call.shares[static_cast<size_t>(i)] * static_cast<double>(rows[i * C + c]);
        }
        mixed[at] = sum;
      }
      if (p.wants_attention) {
        float* shares = p.attention + b * p.tokens;
        for (int64_t n = 0; n < p.tokens; ++n) {
          shares[n] = static_cast<float>(std::exp(static_cast<double>(shares[n]) - top) / weight);
        }
      }
      kernels().pool.store_row(mixed.data(), p.dtype, C,
                               static_cast<char*>(out.data_ptr()) + b * C * bytes_of(p.dtype));
    }
  };
  parallel_tasks(p.batch, 0, finish);
  return {out, pooled, first, attention};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_pool_backward(
    Tensor grad_out, Tensor features, MaybeTensor proj_weight, MaybeTensor proj_bias, MaybeTensor score_weight,
    Tensor pool_weights, MaybeTensor mask, Tensor pooled, Tensor first, Tensor attention, std::vector<int64_t> pools) {
  PoolCall call(features, proj_weight, proj_bias, score_weight, pool_weights, mask, pools, true);
  PoolProblem& p = call.p;
  const int64_t C = p.channels, n_pools = static_cast<int64_t>(pools.size());
  const int32_t dtype = dtype_code(features);
  Tensor grad_x = empty({p.batch, p.tokens, C}, dtype);
  p.grad_x = static_cast<char*>(grad_x.data_ptr());
  const std::vector<float> grad = floats_of(grad_out, p.batch * C);
  pooled = torch::stable::contiguous(pooled);
  const auto* pools_of = static_cast<const float*>(pooled.data_ptr());
  std::vector<float> wide_grad(static_cast<size_t>(p.batch * p.stride)), mean_share;
  std::vector<double> of_shares(static_cast<size_t>(n_pools));
  for (int64_t b = 0; b < p.batch; ++b) {
    std::memcpy(wide_grad.data() + b * p.stride, grad.data() + b * C, static_cast<size_t>(C) * 4);
    int64_t kept = p.tokens;
    if (p.mask) {
      kept = 0;
      for (int64_t n = 0; n < p.tokens; ++n) kept += p.mask[b * p.tokens + n] != 0;
    }
    mean_share.push_back(kept ? static_cast<float>(call.share(kMean) / static_cast<double>(kept)) : 0.0f);
    for (int64_t i = 0; i < n_pools && kept; ++i) {
      for (int64_t c = 0; c < C; ++c) {
        of_shares[static_cast<size_t>(i)] += static_cast<double>(grad[static_cast<size_t>(b * C + c)]) *
                                             static_cast<double>(pools_of[(b * n_pools + i) * C + c]);
      }
    }
  }
  p.grad = wide_grad.data();
  p.mean_share = mean_share.data();
  p.max_share = static_cast<float>(call.share(kMax));
  p.attention_share = static_cast<float>(call.share(kAttention));
  first = torch::stable::contiguous(first);
  attention = torch::stable::contiguous(attention);
  p.first = static_cast<const int32_t*>(first.data_ptr());
  p.attention = static_cast<float*>(attention.data_ptr());

  const int64_t tile_rows = kernels().fusion.tile_rows, K = p.hidden;
  const int64_t weight_size = up_to_multiple(K, tile_rows) * p.stride;
  std::vector<float> grad_weight(static_cast<size_t>(call.n_parts * weight_size));
  std::vector<float> grad_vectors(static_cast<size_t>(call.n_parts * 2 * p.hidden_stride));
  p.grad_weight = grad_weight.data();
  p.grad_vectors = grad_vectors.data();
  // <grad, token> of every token, and their attention-weighted mean: subtracting it makes the scores' gradients add up
  // to 0, which subtracting a rounded pool from every token would not.
  std::vector<float> along(p.wants_attention ? static_cast<size_t>(p.batch * p.tokens) : 0);
  std::vector<double> means(static_cast<size_t>(p.batch));
  p.along = along.data();
  p.means = means.data();
  call.pack(true);
  if (p.wants_attention) {
    call.run(kernels().pool.along);
    for (int64_t b = 0; b < p.batch; ++b) {
      double sum = 0.0, weight = 0.0;
      for (int64_t n = b * p.tokens; n < (b + 1) * p.tokens; ++n) {
        if (p.attention[n] == 0.0f) continue;  // such a token may hold NaN
        sum += static_cast<double>(p.attention[n]) * static_cast<double>(p.along[n]);
        weight += static_cast<double>(p.attention[n]);
      }
      means[static_cast<size_t>(b)] = weight == 0.0 ? 0.0 : sum / weight;
    }
  }
  call.run(kernels().pool.backward);

  // Sums over parts, in order.
  const auto total = [&](const std::vector<float>& parts, int64_t part_size, int64_t at) {
    double sum = 0.0;
    for (int64_t i = 0; i < call.n_parts; ++i)
      sum += static_cast<double>(parts[static_cast<size_t>(i * part_size + at)]);
    return static_cast<float>(sum);
  };
  const auto like = [](const Tensor& x, const Tensor& model) { return torch::stable::to(x, model.scalar_type()); };
  const int32_t wide = aoti_torch_dtype_float32();
  Tensor of_pools = empty({n_pools}, wide);
  double mean = 0.0;
  for (int64_t i = 0; i < n_pools; ++i) mean += call.shares[static_cast<size_t>(i)] * of_shares[static_cast<size_t>(i)];
  for (int64_t i = 0; i < n_pools; ++i) {
    const auto at = static_cast<size_t>(i);
    static_cast<float*>(of_pools.data_ptr())[i] = static_cast<float>(call.shares[at] * (of_shares[at] - mean));
  }
  of_pools = like(of_pools, pool_weights);
  const auto nothing = [&] { return empty({0}, dtype); };
  if (!p.wants_attention) return {grad_x, nothing(), nothing(), nothing(), nothing(), of_pools};
  Tensor of_weight = empty({K, C}, wide), of_bias = empty({K}, wide), of_score = empty({1, K}, wide);
  Tensor of_score_bias = empty({1}, wide);
  auto* weights = static_cast<float*>(of_weight.data_ptr());
  parallel_tasks(K, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t c = 0; c < C; ++c) weights[k * C + c] = total(grad_weight, weight_size, k * p.stride + c);
    }
  });
  for (int64_t k = 0; k < K; ++k) {
    static_cast<float*>(of_bias.data_ptr())[k] = total(grad_vectors, 2 * p.hidden_stride, k);
    static_cast<float*>(of_score.data_ptr())[k] = total(grad_vectors, 2 * p.hidden_stride, p.hidden_stride + k);
  }
  *static_cast<float*>(of_score_bias.data_ptr()) = 0.0f;  // softmax does not see what all scores share
  return {grad_x,
          like(of_weight, features),
          proj_bias ? like(of_bias, features) : nothing(),
          like(of_score, features),
          like(of_score_bias, features),
          of_pools};
}

}  // namespace
}  // namespace hivilt

STABLE_TORCH_LIBRARY_IMPL(hivilt, CPU, m) {
  m.impl("token_pool_cpu", TORCH_BOX(&hivilt::token_pool));
  m.impl("token_pool_backward_cpu", TORCH_BOX(&hivilt::token_pool_backward));
}
