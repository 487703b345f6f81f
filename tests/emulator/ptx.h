// The functions of cpp/kernels/ptx in plain C++.
#pragma once

#include "common/types.h"
#include "gpu.h"

namespace flash::ptx {

// atomic.cuh: blocks run one after the other.

inline void red_add(float* p, float x) {
  *p += x;
}

inline void red_add_x4(float* p, float x, float y, float z, float w) {
  float4& sum = *reinterpret_cast<float4*>(p);  // which checks the alignment
  sum = {sum.x + x, sum.y + y, sum.z + z, sum.w + w};
}

inline int32 ld_acquire(const int32* p) {
  if (++emulator::spins > 1000) emulator::fail("waits for a turn that never comes");
  return *p;
}

inline void red_release_add(int32* p, int32 x) {
  *p += x;
}

// convert.cuh

#ifdef __aarch64__
using Half = __fp16;  // g++ has _Float16 there only from 13 on
#else
using Half = _Float16;
#endif

template <DType kDType>
uint16 round_to(float x) {
  if constexpr (kDType == DType::kF16) {
    return __builtin_bit_cast(uint16, Half(x));
  } else {
    const uint32 bits = __builtin_bit_cast(uint32, x);
    return x != x ? 0x7FFF : uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

template <DType kDType>
uint32 pack(float low, float high) {
  return round_to<kDType>(low) | uint32(round_to<kDType>(high)) << 16;
}

template <DType kDType>
float unpack(uint16 x) {
  if constexpr (kDType == DType::kF16)
    return float(__builtin_bit_cast(Half, x));
  else
    return __builtin_bit_cast(float, uint32(x) << 16);
}

inline float flush(float x) {
  return std::fabs(x) < 0x1p-126f ? 0.0f : x;
}

inline float ex2_approx(float x) {
  return flush(exp2f(flush(x)));
}

inline float lg2_approx(float x) {
  return log2f(flush(x));
}

inline float tanh_approx(float x) {
  return tanhf(x);
}

// cp_async.cuh: a copy takes place when it is waited for, and until then its target holds poison.

inline void cp_async(uint32 shared, const void* global, int32 bytes, int32 source_bytes) {
  emulator::Fiber& thread = *emulator::current;
  char* target = emulator::shared_at(shared, bytes);
  if (source_bytes && reinterpret_cast<uint64>(global) % bytes)
    emulator::fail("cp.async from %p is not aligned", global);
  memset(target, emulator::kPoison, bytes);
  for (int32 i = 0; i < bytes; i += 4) emulator::in_flight[(target - emulator::shared_memory + i) / 4] = true;
  thread.copies.push_back({thread.open_group, target, global, bytes, source_bytes});
}

inline void cp_async_16(uint32 shared, const void* global, int32 source_bytes) {
  cp_async(shared, global, 16, source_bytes);
}

inline void cp_async_4(uint32 shared, const void* global, int32 source_bytes) {
  cp_async(shared, global, 4, source_bytes);
}

inline void cp_async_commit() {
  ++emulator::current->open_group;
}

template <int32 kPending>
void cp_async_wait() {
  emulator::finish_copies(kPending);
}

// ldmatrix.cuh

inline uint32 shared_address(const void* p) {
  return emulator::kSharedBase + uint32(static_cast<const char*>(p) - emulator::shared_memory);
}

template <bool kTrans>
void load_matrices(uint32 (&r)[4], uint32 address) {
  struct Args {
    uint32* r;
    uint32 address;
  } args = {r, address};
  emulator::meet(args, [](Args* const* lanes) {
    for (int32 matrix = 0; matrix < 4; ++matrix) {
      uint16 x[8][8];
      for (int32 row = 0; row < 8; ++row) memcpy(x[row], emulator::shared_at(lanes[8 * matrix + row]->address, 16), 16);
      for (int32 lane = 0; lane < 32; ++lane) {
        const int32 i = lane / 4, j = lane % 4 * 2;
        lanes[lane]->r[matrix] = kTrans ? x[j][i] | uint32(x[j + 1][i]) << 16 : x[i][j] | uint32(x[i][j + 1]) << 16;
      }
    }
  });
}

inline void ldmatrix_x4(uint32 (&r)[4], uint32 address) {
  load_matrices<false>(r, address);
}

inline void ldmatrix_x4_trans(uint32 (&r)[4], uint32 address) {
  load_matrices<true>(r, address);
}

inline void st_shared(uint32 address, uint32 value) {
  memcpy(emulator::shared_at(address, 4), &value, 4);
}

// mma.cuh: fragments as in the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".

template <DType kDType>
void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  struct Args {
    float* c;
    const uint32* a;
    uint32 b[2];
  } args = {c, a, {b0, b1}};
  emulator::meet(args, [](Args* const* lanes) {
    float a[16][16], b[16][8], c[16][8] = {};
    for (int32 lane = 0; lane < 32; ++lane)
      for (int32 e = 0; e < 2; ++e) {
        const int32 group = lane / 4, pair = lane % 4 * 2 + e;
        for (int32 i = 0; i < 4; ++i)
          a[group + i % 2 * 8][pair + i / 2 * 8] = unpack<kDType>(uint16(lanes[lane]->a[i] >> (16 * e)));
        for (int32 i = 0; i < 2; ++i) b[pair + i * 8][group] = unpack<kDType>(uint16(lanes[lane]->b[i] >> (16 * e)));
      }
    for (int32 m = 0; m < 16; ++m)
      for (int32 k = 0; k < 16; ++k)
        for (int32 n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    for (int32 lane = 0; lane < 32; ++lane)
      for (int32 i = 0; i < 4; ++i) lanes[lane]->c[i] += c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

// warp.cuh

inline int32 reduce_min(int32 x) {
  const emulator::Exchange<int32> lanes(x);
  for (const int32 other : lanes.all) x = min_of(x, other);
  return x;
}

inline int32 reduce_max(int32 x) {
  const emulator::Exchange<int32> lanes(x);
  for (const int32 other : lanes.all) x = max_of(x, other);
  return x;
}

}  // namespace flash::ptx
