// A GPU in plain C++, put in front of the kernels' sources so that g++ compiles them: CUDA's keywords and intrinsics,
// and thread blocks that run on the CPU, one cluster after the other. ptx.h has the instructions. What does not depend
// on a kernel is in a library with which all of them are linked (gpu.cc, ptx.cc): else it took two thirds of the time
// that they take to compile.
//
// Threads are fibers. A warp runs until all of its lanes wait for a barrier, then the next warp does, of any block of
// the cluster, so that whoever relies on what another warp has not yet done finds poison. Shared memory starts as NaN,
// and so does the target of a copy until it is waited for. What runs beside the threads happens as late as it may: a
// copy of the copy engine when nobody can go on without it, products of a warpgroup when they are waited for, and until
// then their accumulators are NaN. On request warpgroups lag behind instead, and copies happen at any time
// (let_warps_lag). Every failure (a wild access, undefined behaviour, lanes that part) ends the launch with a sentence
// that names the block and the thread.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <type_traits>
#include <vector>

#include "tensor_boxes.h"

#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __global__
#define __grid_constant__
#define __shared__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

constexpr unsigned kLanes = 32, kMaxThreads = 1024;  // of a cluster
constexpr size_t kStackBytes = 1 << 18;
constexpr int kPoison = 0xFF;            // NaN in every format
constexpr unsigned kSharedBase = 1024;   // the address of shared memory, which starts with what the system reserves
constexpr unsigned kRankShift = 24;      // and has the block's rank above these bits
constexpr size_t kSharedMargin = 16384;  // poison behind a block's shared memory that must stay so
constexpr size_t kSharedCapacity = (1 << 18) + kSharedMargin;  // from one block of a cluster to the next

struct Index {
  unsigned x, y, z;
};

// A cp.async that has been issued but not waited for.
struct Copy {
  int group;
  char* target;
  const void* source;
  int bytes, source_bytes;
};

enum class State {
  kReady,
  kInCollective,
  kAtBarrier,
  kAtNamedBarrier,
  kAtMbarrier,
  kAtClusterBarrier,
  kSpinning,
  kDone,
};

struct ThreadBlock;

struct Fiber {
  ThreadBlock* block;
  Index index = {};
  State state = State::kReady;
  bool started = false;
  ucontext_t start;
  jmp_buf context;
  std::vector<Copy> copies;
  int open_group = 0;
  unsigned barrier, parity;        // that it waits at
  std::vector<unsigned> unfenced;  // words of shared memory that it wrote since its last fence.proxy.async
};

// Products of a warp's part of a warpgroup, and the accumulators that they write: true values while these are NaN.
struct Product {
  int group;
  std::function<void()> run;
  std::vector<float*> accumulators;
};

struct Warp {
  unsigned arrived = 0;
  void (*work)(void* const*) = nullptr;
  void* args[kLanes];
  std::deque<Product> products;
  int open_group = 0;
  std::map<float*, std::vector<float>> accumulators;
};

struct NamedBarrier {
  unsigned arrived = 0;
};

struct Mbarrier {
  unsigned arrivals = 0, pending = 0;  // of a phase; still awaited in this one
  long bytes = 0;                      // that the copy engine has yet to deliver
  unsigned phase = 0;
};

// One of the blocks of a cluster, which run at the same time.
struct ThreadBlock {
  Index index = {};
  char* shared;
  unsigned running;  // threads that have not ended
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<bool> in_flight;             // by word of shared memory: whether a copy is to write it
  std::vector<unsigned> unfenced;          // by word: 1 + the thread that wrote it without a fence.proxy.async
  std::map<unsigned, Mbarrier> mbarriers;  // by address
  NamedBarrier named_barriers[16];
};

// What a thread has the copy engine do, which speaks in its name.
struct Transfer {
  Fiber* thread;
  std::function<void()> run;
};

extern std::vector<ThreadBlock> cluster;  // by rank
extern bool all_have_started;             // of its blocks, for all that they know
extern ThreadBlock* here;
extern Fiber* current;
extern Index grid;
extern unsigned shared_bytes;  // of each block
extern std::deque<Transfer> copy_engine;

[[noreturn]] void fail(const char* format, ...);

// Back to the scheduler, until it resumes this fiber.
[[gnu::noinline]] void suspend(State state);

// Makes happen all but the last `pending` groups of this thread's copies.
void finish_copies(int pending);

// Where all lanes of a warp meet: the last to come does work(args of all lanes).
void meet(void* args, void (*work)(void* const*));
template <class Args>
void meet(Args& args, std::type_identity_t<void (*)(Args* const*)> work) {
  meet(&args, reinterpret_cast<void (*)(void* const*)>(work));
}

// Each lane's x, in each lane.
template <class T>
struct Exchange {
  T x, all[kLanes];
  explicit Exchange(T value) : x(value) {
    meet(*this, [](Exchange* const* lanes) {
      for (unsigned i = 0; i < kLanes; ++i)
        for (unsigned j = 0; j < kLanes; ++j) lanes[i]->all[j] = lanes[j]->x;
    });
  }
};

// Addresses of shared memory have the block's rank in the cluster in their upper bits, as on the GPU.
inline unsigned first_address(const ThreadBlock& block) {
  return kSharedBase + (unsigned(&block - cluster.data()) << kRankShift);
}
inline unsigned offset_of(unsigned address, const ThreadBlock& block = *here) {
  return address - first_address(block);  // of another block's address: beyond every end
}

// The place in a block's shared memory of `bytes` bytes, which must be aligned to their number.
char* shared_at(unsigned address, unsigned bytes, const ThreadBlock& block = *here);

// The same for the copy engine and the products of warpgroups, which see what threads wrote only behind a fence.
char* shared_at_by_proxy(unsigned address, unsigned bytes);

void wrote_shared(unsigned address, unsigned bytes);

Mbarrier& mbarrier_at(unsigned address, ThreadBlock& block = *here);

void end_phase_if_complete(Mbarrier& barrier);

bool may_pass(const Fiber& fiber);

// Runs all but the last `pending` groups of the warp's products, then gives back the accumulators of which none is
// left.
void finish_products(Warp& warp, int pending);

void check_running(const ThreadBlock& block);

// Runs a kernel; returns what went wrong, or null. The blocks of a cluster have their shared memory side by side, each
// `shared_capacity` bytes of it.
const char* launch(void (*kernel)(), unsigned blocks, unsigned threads, unsigned bytes, char* shared,
                   size_t shared_capacity, unsigned cluster_size);
template <class Problem>
const char* launch(void (*kernel)(Problem), unsigned blocks, unsigned threads, unsigned bytes, char* shared,
                   size_t shared_capacity, const void* problem, unsigned cluster_size = 1) {
  static void (*entry)(Problem);
  static const Problem* argument;
  entry = kernel;
  argument = static_cast<const Problem*>(problem);
  return launch([] { entry(*argument); }, blocks, threads, bytes, shared, shared_capacity, cluster_size);
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::here->index)
#define gridDim (emulator::grid)

inline void __syncthreads() {
  emulator::suspend(emulator::State::kAtBarrier);
}
inline void __threadfence() {}
void __syncwarp();

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulator::Exchange<T>(x).all[lane];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::Exchange<T>(x).all[threadIdx.x % emulator::kLanes ^ mask];
}
unsigned __ballot_sync(unsigned, bool x);
inline bool __any_sync(unsigned mask, bool x) {
  return __ballot_sync(mask, x) != 0;
}
