// A GPU in plain C++, put in front of the kernels' sources so that g++ compiles them: CUDA's keywords and intrinsics,
// and thread blocks that run one after the other on the CPU. ptx.h has the instructions.
//
// Threads are fibers. A warp runs until all of its lanes wait for a barrier, then the next warp does, so that whoever
// relies on what another warp has not yet done finds poison. Shared memory starts as NaN, and so does the target of a
// cp.async until it is waited for. Every failure (a wild access, undefined behaviour, lanes that part) ends the launch
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
#include <type_traits>
#include <vector>

#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
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

constexpr unsigned kLanes = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 1 << 18;
constexpr int kPoison = 0xFF;            // NaN in every format
constexpr unsigned kSharedBase = 1024;   // the address of shared memory, which starts with what the system reserves
constexpr size_t kSharedMargin = 16384;  // poison behind a block's shared memory that must stay so

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

enum class State { kReady, kInCollective, kAtBarrier, kDone };

struct Fiber {
  Index index = {};
  State state = State::kReady;
  bool started = false;
  ucontext_t start;
  jmp_buf context;
  std::vector<Copy> copies;
  int open_group = 0;
};

struct Warp {
  unsigned arrived = 0;
  void* work = nullptr;
  void* args[kLanes];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Fiber* current;
inline Index block;
inline char* shared_memory;
inline unsigned shared_bytes;
inline std::vector<bool> in_flight;  // by word of shared memory: whether a cp.async is to write it
inline void (*run_kernel)();
inline jmp_buf scheduler, aborted;
inline char error[512];
inline int spins;

[[noreturn]] inline void fail(const char* format, ...) {
  const int n = current ? snprintf(error, sizeof error, "block %u, thread %u: ", block.x, current->index.x) : 0;
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
  current = &fiber;
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
    for (int i = 0; i < copy.bytes; i += 4) in_flight[(copy.target - shared_memory + i) / 4] = false;
    return true;
  });
}

inline void thread_main() {
  run_kernel();
  finish_copies(0);
  if (!current->copies.empty()) fail("ends with a cp.async that was never committed");
  suspend(State::kDone);
}

// Where all lanes of a warp meet: the last to come does work(args of all lanes).
template <class Args>
void meet(Args& args, std::type_identity_t<void (*)(Args* const*)> work) {
  Warp& warp = warps[current->index.x / kLanes];
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

// The place in shared memory of `bytes` bytes, which must be aligned to their number.
inline char* shared_at(unsigned address, unsigned bytes) {
  const unsigned offset = address - kSharedBase;
  if (address < kSharedBase || offset + bytes > shared_bytes) fail("shared memory ends before byte %u", offset + bytes);
  if (offset % bytes) fail("%u bytes at byte %u of shared memory are not aligned", bytes, offset);
  for (unsigned i = offset; i < offset + bytes; i += 4)
    if (in_flight[i / 4]) fail("touches byte %u of shared memory, to which a cp.async is under way", i);
  return shared_memory + offset;
}

inline void run_block() {
  memset(shared_memory, kPoison, shared_bytes + kSharedMargin);
  in_flight.assign(shared_bytes / 4, false);
  spins = 0;
  warps.assign(fibers.size() / kLanes, {});
  for (unsigned i = 0; i < fibers.size(); ++i) {
    static char* stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    Fiber& fiber = fibers[i];
    fiber = {};
    fiber.index.x = i;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + i * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, thread_main, 0);
  }
  // Warps take turns in both orders, as a race may show in one only.
  for (unsigned phase = block.x;; ++phase) {
    bool ran = false;
    for (unsigned i = 0; i < warps.size(); ++i) {
      Fiber* lanes = &fibers[(phase % 2 ? warps.size() - 1 - i : i) * kLanes];
      for (bool again = true; again;) {
        again = false;
        for (unsigned lane = 0; lane < kLanes; ++lane)
          if (lanes[lane].state == State::kReady) resume(lanes[lane]), again = ran = true;
      }
    }
    if (ran) continue;
    bool done = true;
    for (Fiber& fiber : fibers) {
      if (fiber.state == State::kInCollective) current = &fiber, fail("waits for lanes that do not come");
      if (fiber.state == State::kAtBarrier) fiber.state = State::kReady, done = false;
    }
    if (done) break;
  }
  for (size_t i = 0; i < kSharedMargin; ++i)
    if (shared_memory[shared_bytes + i] != char(kPoison)) fail("block %u writes behind its shared memory", block.x);
}

inline void on_signal(int signal, siginfo_t* info, void*) {
  if (signal == SIGILL || signal == SIGTRAP) fail("undefined behaviour");  // UBSan's trap
  fail("access to %p, outside of every buffer", info->si_addr);
}

// Runs a kernel; returns what went wrong, or null.
template <class Problem>
const char* launch(void (*kernel)(Problem), unsigned blocks, unsigned threads, unsigned bytes, char* shared,
                   size_t shared_capacity, const void* problem) {
  static void (*entry)(Problem);
  static const Problem* argument;
  entry = kernel;
  argument = static_cast<const Problem*>(problem);
  run_kernel = [] { entry(*argument); };
  shared_memory = shared;
  shared_bytes = bytes;
  fibers.resize(threads);
  constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction ours = {}, theirs[4];
  ours.sa_sigaction = on_signal;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler is left by a jump
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &ours, &theirs[i]);
  const bool failed = _setjmp(aborted);
  if (!failed) {
    if (bytes + kSharedMargin > shared_capacity) fail("asks for too much shared memory");
    for (block = {}; block.x < blocks; ++block.x) run_block();
  }
  current = nullptr;
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &theirs[i], nullptr);
  return failed ? error : nullptr;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block)

inline void __syncthreads() {
  emulator::suspend(emulator::State::kAtBarrier);
}
inline void __threadfence() {}

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
