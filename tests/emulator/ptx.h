// The functions of cpp/kernels/ptx in plain C++.
#pragma once

#include "common/problem.h"
#include "gpu.h"

namespace flash::ptx {

// atomic.cuh: threads run one after the other, and those that look for a turn when no other can go on.

inline void red_add(float* p, float x) {
  *p += x;
}

inline void red_add_x4(float* p, float x, float y, float z, float w) {
  float4& sum = *reinterpret_cast<float4*>(p);  // which checks the alignment
  sum = {sum.x + x, sum.y + y, sum.z + z, sum.w + w};
}

inline int32 ld_acquire(const int32* p) {
  emulator::suspend(emulator::State::kSpinning);
  return *p;
}

inline void red_release_add(int32* p, int32 x) {
  *p += x;
}

inline int32 atom_add(int32* p, int32 x) {
  const int32 before = *p;
  *p += x;
  return before;
}

// compiler.cuh

inline void opaque(uint32&) {}
inline void opaque(float&) {}

inline constexpr bool kAccumulatorsMustBeDefined = false;

inline void compute_now(float x) {
  if (x < 0.0f) emulator::fail("what is never negative is");
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

void cp_async(uint32 shared, const void* global, int32 bytes, int32 source_bytes);

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

// global.cuh

inline void st_global_x4(void* p, const uint32 (&x)[4]) {
  *static_cast<uint4*>(p) = {x[0], x[1], x[2], x[3]};
}

// grid.cuh: kernels run one after the other.

inline void let_next_grid_start() {}
inline void wait_for_last_grid() {}

// ldmatrix.cuh

inline uint32 shared_address(const void* p) {
  return emulator::first_address(*emulator::here) + uint32(static_cast<const char*>(p) - emulator::here->shared);
}

void ldmatrix_x4(uint32 (&r)[4], uint32 address);
void ldmatrix_x4_trans(uint32 (&r)[4], uint32 address);
void stmatrix_x4(uint32 address, const uint32 (&r)[4]);
void st_shared(uint32 address, uint32 value);
void st_shared_x4(uint32 address, uint32 x, uint32 y, uint32 z, uint32 w);

// mma.cuh: fragments as in the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".

struct MmaArgs {
  float* c;
  const uint32* a;
  uint32 b[2];
};
template <DType kDType>
void mma_of_warp(MmaArgs* const* lanes);

template <DType kDType>
void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  MmaArgs args = {c, a, {b0, b1}};
  emulator::meet(args, mma_of_warp<kDType>);
}

// mbarrier.cuh

void mbarrier_init(uint32 barrier, uint32 arrivals);

inline void fence_mbarrier_init() {}

void mbarrier_arrive(uint32 barrier);
void mbarrier_arrive_expect_tx(uint32 barrier, uint32 bytes);
void mbarrier_wait(uint32 barrier, uint32 parity);

// tma.cuh: the driver's stand-in (runtime.cc) has written a TensorBoxes into the map.

void tma_load(uint32 shared, const TensorMap& map, uint32 barrier, int32 c0, int32 c1, int32 c2, int32 c3);

inline void prefetch_tensor_map(const TensorMap&) {}

void fence_proxy_async();

// cluster.cuh: an address in another block's shared memory is out of bounds for what may touch only one's own. What is
// sent there comes as late as the copy engine's copies.

inline char* own_shared(char*) {
  return emulator::here->shared;
}

uint32 peer_shared(uint32 address, uint32 rank);

inline void cluster_sync() {
  emulator::suspend(emulator::State::kAtClusterBarrier);
}

void mbarrier_arrive_peer(uint32 peer_barrier);

// No fence is asked of who reads it, an ordinary load.
void st_async_x4(uint32 peer_address, uint32 x, uint32 y, uint32 z, uint32 w, uint32 peer_barrier);
void copy_to_peer(uint32 peer_address, uint32 source, uint32 bytes, uint32 peer_barrier);

// warpgroup.cuh

template <int32>
void setmaxnreg_dec() {}
template <int32>
void setmaxnreg_inc() {}

void barrier_arrive(int32 id, int32 threads);
void barrier_sync(int32 id, int32 threads);

// wgmma.cuh: each warp does its part, 16 rows. Operands in shared memory as in the PTX ISA, "Matrix descriptor format"
// and "Strides"; those in registers have the fragments of mma_m16n8k16.

struct WgmmaArgs {
  float* d;
  uint32 a[4];
  uint64 a_descriptor, b;
  bool accumulate;
};

// Notes the products of a warp, d with so many n-tiles, for when they are waited for.
template <DType kDType>
void wgmma_of_warp(WgmmaArgs* const* lanes, bool a_in_registers, bool trans_a, bool trans_b, int32 tiles);

template <DType kDType, bool kRegisters, bool kTransA, bool kTransB, int32 kTiles>
void wgmma(WgmmaArgs args) {
  emulator::meet(args,
                 [](WgmmaArgs* const* lanes) { wgmma_of_warp<kDType>(lanes, kRegisters, kTransA, kTransB, kTiles); });
}

template <DType kDType, bool kTransA, bool kTransB, int32 kTiles>
void wgmma_ss(float (&d)[kTiles][4], uint64 a, uint64 b, bool accumulate) {
  wgmma<kDType, false, kTransA, kTransB, kTiles>({d[0], {}, a, b, accumulate});
}

template <DType kDType, bool kTransB, int32 kTiles>
void wgmma_rs(float (&d)[kTiles][4], const uint32 (&a)[4], uint64 b, bool accumulate) {
  wgmma<kDType, true, false, kTransB, kTiles>({d[0], {a[0], a[1], a[2], a[3]}, 0, b, accumulate});
}

inline void wgmma_fence() {}

void wgmma_commit();

template <int32 kPending>
void wgmma_wait() {
  struct Nothing {
  } nothing;
  emulator::meet(nothing, [](Nothing* const*) {
    emulator::finish_products(emulator::here->warps[emulator::current->index.x / 32], kPending);
  });
}

template <int32 kTiles>
void settled(float (&)[kTiles][4]) {}

// warp.cuh

int32 reduce_min(int32 x);

inline int32 max3(int32 a, int32 b, int32 c) {
  return max_of(max_of(a, b), c);
}

int32 reduce_max(int32 x);

}  // namespace flash::ptx
