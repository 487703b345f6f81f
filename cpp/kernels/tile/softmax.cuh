// The online softmax over the keys of a warp's rows: a running maximum and sum, in units of log2.
#pragma once

#include "common/types.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/ptx/max3.cuh"
#include "kernels/tile/layout.cuh"

namespace flash {

// Running softmax statistics of a thread's rows.
template <int32 kRows>
struct SoftmaxState {
  float max[kRows];  // of the stored scores
  float sum[kRows];  // of this thread's columns only, until the end
};

__forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The maximum that scores are taken relative to may lag behind the true one by this much, in log2 units: weights stay
// below 2^8, which costs no precision, and o need hardly ever be rescaled.
inline constexpr float kMaxLag = 8.0f;

// The greatest of a thread's scores in row r, unless all are negative: then the least. Floats have the order of
// integers with the same bits, but for negative ones among themselves, and of integers three are compared at a time.
template <int32 kM, int32 kN>
__forceinline__ float max_unless_negative(const Accumulator<kM, kN>& s, int32 r) {
  auto bits = [&](int32 c) { return __builtin_bit_cast(int32, s.x[r / 2][c / 2][r % 2 * 2 + c % 2]); };
  int32 chain[2] = {bits(0), bits(1)};  // each instruction of a single one would wait for the one in front of it
#pragma unroll
  for (int32 c = 2; c < kN / 4; c += 2) chain[c / 2 % 2] = ptx::max3(chain[c / 2 % 2], bits(c), bits(c + 1));
  return __builtin_bit_cast(float, max_of(chain[0], chain[1]));
}

// Of all the quad's scores.
template <int32 kM, int32 kN>
__forceinline__ float row_max(const Accumulator<kM, kN>& s, int32 r) {
  float max = -kInfinity;
#pragma unroll
  for (int32 n = 0; n < kN / 8; ++n) max = fmaxf(max, fmaxf(s.x[r / 2][n][r % 2 * 2], s.x[r / 2][n][r % 2 * 2 + 1]));
  return quad_max(max);
}

// Takes note of the first scores.
template <int32 kM, int32 kN>
__forceinline__ void first_maximum(const Accumulator<kM, kN>& s, SoftmaxState<kM / 8>& state) {
#pragma unroll
  for (int32 r = 0; r < kM / 8; ++r) state.max[r] = row_max(s, r), state.sum[r] = 0.0f;
}

// Takes note of further scores s. Where the maximum has grown by kMaxLag in a row of the warp the result is true, and
// what was computed before must be multiplied by `rescale`. on_maximum() is called in front of a branch that is taken
// when it may have grown, which costs less to know.
template <int32 kM, int32 kN, class OnMaximum>
__forceinline__ bool raise_maximum(const Accumulator<kM, kN>& s, SoftmaxState<kM / 8>& state, float (&rescale)[kM / 8],
                                   float factor, OnMaximum on_maximum) {
  const float lag = kMaxLag / factor;
  bool may_grow = false;
#pragma unroll
  for (int32 r = 0; r < kM / 8; ++r) {
    // Negations are also true for NaN, and the first where negative floats have the wrong order.
    const float limit = state.max[r] + lag;
    may_grow |= !(limit >= 0.0f) | !(max_unless_negative(s, r) <= limit);
  }
  on_maximum();
  if (!__any_sync(~0u, may_grow)) return false;
  bool any_grows = false;
#pragma unroll
  for (int32 r = 0; r < kM / 8; ++r) {
    // Each row decides for itself, lest its neighbours in the warp change how it is rounded.
    const float max = row_max(s, r);
    const bool grows = !(max <= state.max[r] + lag);  // also where a first key is seen
    const float new_max = grows ? fmaxf(state.max[r], max) : state.max[r];
    rescale[r] = grows ? ptx::ex2_approx((state.max[r] - new_max) * factor) : 1.0f;
    state.max[r] = new_max;
    state.sum[r] *= rescale[r];
    any_grows |= grows;
  }
  return __any_sync(~0u, any_grows);
}

// Columns kBegin to kEnd of s become 2^(s - max). kGuard: a row may have seen no key so far.
template <bool kGuard, int32 kBegin, int32 kEnd, int32 kM, int32 kN>
__forceinline__ void weigh(Accumulator<kM, kN>& s, SoftmaxState<kM / 8>& state, float factor) {
#pragma unroll
  for (int32 r = 0; r < kM / 8; ++r) {
    const float base = (kGuard && state.max[r] == -kInfinity ? 0.0f : state.max[r]) * factor;
    float sum = 0.0f;
#pragma unroll
    for (int32 n = kBegin / 8; n < kEnd / 8; ++n)
#pragma unroll
      for (int32 e = 0; e < 2; ++e) {
        float& x = s.x[r / 2][n][r % 2 * 2 + e];
        x = ptx::ex2_approx(x * factor - base);
        sum += x;
      }
    state.sum[r] += sum;
  }
}

// raise_maximum() and weigh() of all columns.
template <bool kGuard, int32 kM, int32 kN>
__forceinline__ bool online_softmax(Accumulator<kM, kN>& s, SoftmaxState<kM / 8>& state, float (&rescale)[kM / 8],
                                    float factor) {
  const bool grows = raise_maximum(s, state, rescale, factor, [] {});
  weigh<kGuard, 0, kN>(s, state, factor);
  return grows;
}

template <int32 kM, int32 kN>
__forceinline__ void scale_rows(Accumulator<kM, kN>& x, const float (&factor)[kM / 8]) {
#pragma unroll
  for (int32 r = 0; r < kM / 8; ++r)
#pragma unroll
    for (int32 n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int32 e = 0; e < 2; ++e) x.x[r / 2][n][r % 2 * 2 + e] *= factor[r];
}

// What is left to do when all keys have been seen: `normalizer`, by which o is to be multiplied, and lse in log2 units,
// both with a sink (log2 units; -inf for none) in the sum. Rows that have seen no key get o = 0 and the sink's lse.
template <int32 kM, int32 kDimV>
__forceinline__ void finish_softmax(const SoftmaxState<kM / 8>& state, Accumulator<kM, kDimV>& o, float factor,
                                    const float (&sinks)[kM / 8], float (&normalizer)[kM / 8], float (&lse)[kM / 8]) {
#pragma unroll
  for (int32 r = 0; r < kM / 8; ++r) {
    const float sink = sinks[r];
    const float own_sum = quad_sum(state.sum[r]), own_max = state.max[r] * factor, max = fmaxf(own_max, sink);
    const bool no_key = own_sum == 0.0f;
    const float rescale = no_key ? 0.0f : ptx::ex2_approx(own_max - max);
    const float sum = own_sum * rescale + (sink == -kInfinity ? 0.0f : ptx::ex2_approx(sink - max));
    normalizer[r] = no_key ? 0.0f : rescale / sum;
    lse[r] = no_key ? sink : max + ptx::lg2_approx(sum);
    if (no_key) {  // o is 0 times V so far, which is NaN where V is
#pragma unroll
      for (int32 n = 0; n < kDimV / 8; ++n) o.x[r / 2][n][r % 2 * 2] = o.x[r / 2][n][r % 2 * 2 + 1] = 0.0f;
    }
  }
}

}  // namespace flash
