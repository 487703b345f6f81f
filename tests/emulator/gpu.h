// A GPU in plain C++, put in front of the kernels' sources so that g++ compiles them: CUDA's keywords and intrinsics,
// and thread blocks that run on the CPU, one cluster after the other. ptx.h has the instructions.
//
// Threads are fibers. A warp runs until all of its lanes wait for a barrier, then the next warp does, of any block of
// the cluster, so that whoever relies on what another warp has not yet done finds poison. Shared memory starts as NaN,
// and so does the target of a copy until it is waited for. What runs beside the threads happens as late as it may: a
// copy of the copy engine when nobody can go on without it, products of a warpgroup when they are waited for, and until
// then their accumulators are NaN. Every failure (a wild access, undefined behaviour, lanes that part) ends the launch
// with a sentence that names the block and the thread.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
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
  void* work = nullptr;
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

inline std::vector<ThreadBlock> cluster;  // by rank
inline bool all_have_started;             // of its blocks, for all that they know
inline ThreadBlock* here;
inline Fiber* current;
inline Index grid;
inline unsigned shared_bytes;  // of each block
inline std::deque<Transfer> copy_engine;
inline bool phase_has_ended;  // of any mbarrier
inline void (*run_kernel)();
inline jmp_buf scheduler, aborted;
inline char error[512];
inline int spins;

[[noreturn]] inline void fail(const char* format, ...) {
  const int n =
      current ? snprintf(error, sizeof error, "block %u, thread %u: ", current->block->index.x, current->index.x) : 0;
  va_list args;
  va_start(args, format);
  vsnprintf(error + n, sizeof error - n, format, args);
  va_end(args);
  _longjmp(aborted, 1);
}

// Back to the scheduler, until it resumes this fiber.
[[gnu::noinline]] inline void suspend(State state) {
  current->state = state;
  if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  current = &fiber, here = fiber.block;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  current = nullptr;
}

// Makes happen all but the last `pending` groups of this thread's copies.
inline void finish_copies(int pending) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    if (copy.group >= current->open_group - pending) return false;
    memset(copy.target, 0, copy.bytes);
    memcpy(copy.target, copy.source, copy.source_bytes);
    for (int i = 0; i < copy.bytes; i += 4) here->in_flight[(copy.target - here->shared + i) / 4] = false;
    return true;
  });
}

inline void thread_main() {
  run_kernel();
  finish_copies(0);
  if (!current->copies.empty()) fail("ends with a cp.async that was never committed");
  if (!here->warps[current->index.x / kLanes].products.empty()) fail("ends with products that were never waited for");
  --here->running;
  suspend(State::kDone);
}

// Where all lanes of a warp meet: the last to come does work(args of all lanes).
template <class Args>
void meet(Args& args, std::type_identity_t<void (*)(Args* const*)> work) {
  Warp& warp = here->warps[current->index.x / kLanes];
  const unsigned lane = current->index.x % kLanes;
  if (warp.arrived && warp.work != reinterpret_cast<void*>(work))
    fail("the lanes of a warp are at different instructions");
  warp.work = reinterpret_cast<void*>(work);
  warp.args[lane] = &args;
  if (++warp.arrived < kLanes) return suspend(State::kInCollective);
  work(reinterpret_cast<Args* const*>(warp.args));
  warp.arrived = 0;
  Fiber* lanes = current - lane;
  for (unsigned i = 0; i < kLanes; ++i) lanes[i].state = State::kReady;
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
inline char* shared_at(unsigned address, unsigned bytes, const ThreadBlock& block = *here) {
  const unsigned offset = offset_of(address, block);
  if (offset > shared_bytes || offset + bytes > shared_bytes) fail("shared memory ends before byte %u", offset + bytes);
  if (offset % bytes) fail("%u bytes at byte %u of shared memory are not aligned", bytes, offset);
  for (unsigned i = offset; i < offset + bytes; i += 4)
    if (block.in_flight[i / 4]) fail("touches byte %u of shared memory, to which a copy is under way", i);
  return block.shared + offset;
}

// The same for the copy engine and the products of warpgroups, which see what threads wrote only behind a fence.
inline char* shared_at_by_proxy(unsigned address, unsigned bytes) {
  char* p = shared_at(address, bytes);
  const unsigned offset = offset_of(address);
  for (unsigned i = offset; i < offset + bytes; i += 4)
    if (here->unfenced[i / 4]) fail("reads byte %u of shared memory without fence.proxy.async", i);
  return p;
}

inline void wrote_shared(unsigned address, unsigned bytes) {
  for (unsigned i = offset_of(address); i < offset_of(address) + bytes; i += 4) {
    here->unfenced[i / 4] = current->index.x + 1;
    current->unfenced.push_back(i / 4);
  }
}

inline Mbarrier& mbarrier_at(unsigned address, ThreadBlock& block = *here) {
  const auto it = block.mbarriers.find(address);
  if (it == block.mbarriers.end()) fail("no mbarrier was initialised at %u", address);
  return it->second;
}

inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  phase_has_ended = true;
}

inline bool may_pass(const Fiber& fiber) {
  return fiber.block->mbarriers[fiber.barrier].phase % 2 != fiber.parity;
}

// Runs all but the last `pending` groups of the warp's products, then gives back the accumulators of which none is
// left.
inline void finish_products(Warp& warp, int pending) {
  while (!warp.products.empty() && warp.products.front().group < warp.open_group - pending) {
    warp.products.front().run();
    warp.products.pop_front();
  }
  std::erase_if(warp.accumulators, [&](const auto& entry) {
    const auto& [d, values] = entry;
    for (const Product& product : warp.products)
      for (const float* other : product.accumulators)
        if (other == d) return false;
    memcpy(d, values.data(), values.size() * sizeof(float));
    return true;
  });
}

inline void check_running(const ThreadBlock& block) {
  if (!block.running) fail("touches the shared memory of a thread block that has ended");
}

inline void start(ThreadBlock& block, unsigned threads) {
  memset(block.shared, kPoison, shared_bytes + kSharedMargin);
  block.in_flight.assign(shared_bytes / 4, false);
  block.unfenced.assign(shared_bytes / 4, 0);
  block.mbarriers.clear();
  for (NamedBarrier& barrier : block.named_barriers) barrier = {};
  block.running = threads;
  block.warps.assign(threads / kLanes, {});
  block.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    static char* stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    Fiber& fiber = block.fibers[i];
    fiber = {&block};
    fiber.index.x = i;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + ((&block - cluster.data()) * threads + i) * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, thread_main, 0);
  }
}

// Whether threads of these blocks wait in this state, and all of the others have ended; those that wait then go on.
inline bool pass_barrier(State state, ThreadBlock* begin, ThreadBlock* end) {
  bool any = false;
  for (ThreadBlock* block = begin; block < end; ++block)
    for (const Fiber& fiber : block->fibers) {
      if (fiber.state != state && fiber.state != State::kDone) return false;
      any = any || fiber.state == state;
    }
  for (ThreadBlock* block = begin; any && block < end; ++block)
    for (Fiber& fiber : block->fibers)
      if (fiber.state == state) fiber.state = State::kReady;
  return any;
}

// The first of the cluster's threads in this state.
inline Fiber* find_fiber(State state) {
  for (ThreadBlock& block : cluster)
    for (Fiber& fiber : block.fibers)
      if (fiber.state == state) return &fiber;
  return nullptr;
}

inline void run_cluster() {
  copy_engine.clear();
  all_have_started = false;
  spins = 0;
  // Blocks and warps take turns in both orders, as a race may show in one only.
  for (unsigned phase = cluster[0].index.x / cluster.size();; ++phase) {
    bool ran = false;
    for (unsigned i = 0; i < cluster.size(); ++i) {
      ThreadBlock& block = cluster[phase / 2 % 2 ? cluster.size() - 1 - i : i];
      for (unsigned j = 0; j < block.warps.size(); ++j) {
        Fiber* lanes = &block.fibers[(phase % 2 ? block.warps.size() - 1 - j : j) * kLanes];
        for (bool again = true; again;) {
          again = false;
          for (unsigned lane = 0; lane < kLanes; ++lane)
            if (lanes[lane].state == State::kReady) resume(lanes[lane]), again = ran = true;
        }
      }
    }
    for (ThreadBlock& block : cluster)
      for (Fiber& fiber : block.fibers)
        if (fiber.state == State::kAtMbarrier && may_pass(fiber)) fiber.state = State::kReady, ran = true;
    if (ran) continue;
    for (ThreadBlock& block : cluster) ran = pass_barrier(State::kAtBarrier, &block, &block + 1) || ran;
    if (pass_barrier(State::kAtClusterBarrier, cluster.data(), cluster.data() + cluster.size()))
      ran = all_have_started = true;
    if (ran) {
      spins = 0;
      continue;
    }
    if (!copy_engine.empty()) {  // nobody can go on without it
      for (phase_has_ended = false; !copy_engine.empty() && !phase_has_ended;) {
        const Transfer transfer = std::move(copy_engine.front());
        copy_engine.pop_front();
        current = transfer.thread, here = current->block;
        transfer.run();
      }
      current = nullptr;
      spins = 0;
      continue;
    }
    if (Fiber* fiber = find_fiber(State::kSpinning)) {
      if (++spins > 1000) current = fiber, fail("waits for a turn that never comes");
      for (; fiber; fiber = find_fiber(State::kSpinning)) fiber->state = State::kReady;
      continue;
    }
    if ((current = find_fiber(State::kInCollective))) fail("waits for lanes that do not come");
    for (const State state : {State::kAtMbarrier, State::kAtNamedBarrier, State::kAtClusterBarrier, State::kAtBarrier})
      if ((current = find_fiber(state))) fail("waits at a barrier for ever");
    break;
  }
  for (const ThreadBlock& block : cluster)
    for (size_t i = 0; i < kSharedMargin; ++i)
      if (block.shared[shared_bytes + i] != char(kPoison))
        fail("block %u writes behind its shared memory", block.index.x);
}

inline void on_signal(int signal, siginfo_t* info, void*) {
  if (signal == SIGILL || signal == SIGTRAP) fail("undefined behaviour");  // UBSan's trap
  fail("access to %p, outside of every buffer", info->si_addr);
}

// Runs a kernel; returns what went wrong, or null. The blocks of a cluster have their shared memory side by side, each
// `shared_capacity` bytes of it.
template <class Problem>
const char* launch(void (*kernel)(Problem), unsigned blocks, unsigned threads, unsigned bytes, char* shared,
                   size_t shared_capacity, const void* problem, unsigned cluster_size = 1) {
  static void (*entry)(Problem);
  static const Problem* argument;
  entry = kernel;
  argument = static_cast<const Problem*>(problem);
  run_kernel = [] { entry(*argument); };
  shared_bytes = bytes;
  constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction ours = {}, theirs[4];
  ours.sa_sigaction = on_signal;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler is left by a jump
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &ours, &theirs[i]);
  const bool failed = _setjmp(aborted);
  if (!failed) {
    if (bytes + kSharedMargin > shared_capacity) fail("asks for too much shared memory");
    if (cluster_size * threads > kMaxThreads) fail("has too many threads");
    if (blocks % cluster_size) fail("%u blocks are not whole clusters of %u", blocks, cluster_size);
    grid = {blocks, 1, 1};
    cluster.resize(cluster_size);
    for (unsigned first = 0; first < blocks; first += cluster_size) {
      for (unsigned rank = 0; rank < cluster_size; ++rank) {
        cluster[rank].index.x = first + rank;
        cluster[rank].shared = shared + rank * shared_capacity;
        start(cluster[rank], threads);
      }
      run_cluster();
    }
  }
  current = nullptr;
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &theirs[i], nullptr);
  return failed ? error : nullptr;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::here->index)
#define gridDim (emulator::grid)

inline void __syncthreads() {
  emulator::suspend(emulator::State::kAtBarrier);
}
inline void __threadfence() {}
inline void __syncwarp() {
  emulator::Exchange<int>(0);
}

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulator::Exchange<T>(x).all[lane];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::Exchange<T>(x).all[threadIdx.x % emulator::kLanes ^ mask];
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const emulator::Exchange<bool> votes(x);
  unsigned result = 0;
  for (unsigned i = 0; i < emulator::kLanes; ++i) result |= unsigned(votes.all[i]) << i;
  return result;
}
inline bool __any_sync(unsigned mask, bool x) {
  return __ballot_sync(mask, x) != 0;
}
