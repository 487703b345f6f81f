#include "gpu.h"

#include <signal.h>
#include <sys/mman.h>

#include <bitset>
#include <cstdarg>
#include <cstdio>
#include <random>

namespace emulator {

std::vector<ThreadBlock> cluster;
bool all_have_started;
ThreadBlock* here;
Fiber* current;
Index grid;
unsigned shared_bytes;
std::deque<Transfer> copy_engine;

static bool phase_has_ended;  // of any mbarrier
static unsigned lag_seed;     // 0: nobody lags behind
static void (*run_kernel)();
static jmp_buf scheduler, aborted;
static char error[512];
static int spins;

void fail(const char* format, ...) {
  const int n =
      current ? snprintf(error, sizeof error, "block %u, thread %u: ", current->block->index.x, current->index.x) : 0;
  va_list args;
  va_start(args, format);
  vsnprintf(error + n, sizeof error - n, format, args);
  va_end(args);
  _longjmp(aborted, 1);
}

void suspend(State state) {
  current->state = state;
  if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

[[gnu::noinline]] static void resume(Fiber& fiber) {
  current = &fiber, here = fiber.block;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  current = nullptr;
}

void finish_copies(int pending) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    if (copy.group >= current->open_group - pending) return false;
    memset(copy.target, 0, copy.bytes);
    memcpy(copy.target, copy.source, copy.source_bytes);
    for (int i = 0; i < copy.bytes; i += 4) here->in_flight[(copy.target - here->shared + i) / 4] = false;
    return true;
  });
}

static void thread_main() {
  run_kernel();
  finish_copies(0);
  if (!current->copies.empty()) fail("ends with a cp.async that was never committed");
  if (!here->warps[current->index.x / kLanes].products.empty()) fail("ends with products that were never waited for");
  --here->running;
  suspend(State::kDone);
}

void meet(void* args, void (*work)(void* const*)) {
  Warp& warp = here->warps[current->index.x / kLanes];
  const unsigned lane = current->index.x % kLanes;
  if (warp.arrived && warp.work != work) fail("the lanes of a warp are at different instructions");
  warp.work = work;
  warp.args[lane] = args;
  if (++warp.arrived < kLanes) return suspend(State::kInCollective);
  work(warp.args);
  warp.arrived = 0;
  Fiber* lanes = current - lane;
  for (unsigned i = 0; i < kLanes; ++i) lanes[i].state = State::kReady;
}

char* shared_at(unsigned address, unsigned bytes, const ThreadBlock& block) {
  const unsigned offset = offset_of(address, block);
  if (offset > shared_bytes || offset + bytes > shared_bytes) fail("shared memory ends before byte %u", offset + bytes);
  if (offset % bytes) fail("%u bytes at byte %u of shared memory are not aligned", bytes, offset);
  for (unsigned i = offset; i < offset + bytes; i += 4)
    if (block.in_flight[i / 4]) fail("touches byte %u of shared memory, to which a copy is under way", i);
  return block.shared + offset;
}

char* shared_at_by_proxy(unsigned address, unsigned bytes) {
  char* p = shared_at(address, bytes);
  const unsigned offset = offset_of(address);
  for (unsigned i = offset; i < offset + bytes; i += 4)
    if (here->unfenced[i / 4]) fail("reads byte %u of shared memory without fence.proxy.async", i);
  return p;
}

void wrote_shared(unsigned address, unsigned bytes) {
  for (unsigned i = offset_of(address); i < offset_of(address) + bytes; i += 4) {
    here->unfenced[i / 4] = current->index.x + 1;
    current->unfenced.push_back(i / 4);
  }
}

Mbarrier& mbarrier_at(unsigned address, ThreadBlock& block) {
  const auto it = block.mbarriers.find(address);
  if (it == block.mbarriers.end()) fail("no mbarrier was initialised at %u", address);
  return it->second;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  phase_has_ended = true;
}

bool may_pass(const Fiber& fiber) {
  return fiber.block->mbarriers[fiber.barrier].phase % 2 != fiber.parity;
}

void finish_products(Warp& warp, int pending) {
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

void check_running(const ThreadBlock& block) {
  if (!block.running) fail("touches the shared memory of a thread block that has ended");
}

static void start(ThreadBlock& block, unsigned threads) {
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
static bool pass_barrier(State state, ThreadBlock* begin, ThreadBlock* end) {
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
static Fiber* find_fiber(State state) {
  for (ThreadBlock& block : cluster)
    for (Fiber& fiber : block.fibers)
      if (fiber.state == state) return &fiber;
  return nullptr;
}

static void run_transfer() {
  const Transfer transfer = std::move(copy_engine.front());
  copy_engine.pop_front();
  current = transfer.thread, here = current->block;
  transfer.run();
  current = nullptr;
}

// Who lags behind, for a while each: about half of the warpgroups.
class Lag {
 public:
  Lag() : dice_(1 + 1000 * lag_seed + cluster[0].index.x) {}
  void draw() {
    if (lag_seed && dice_() % 100 == 0) lags_ = dice_();
  }
  bool lags(const ThreadBlock& block, unsigned warp) {
    return lags_[((&block - cluster.data()) * block.warps.size() + warp) / 4 % lags_.size()] && dice_() % 64;
  }
  bool delivers_early() { return lag_seed && !copy_engine.empty() && dice_() % 2; }

 private:
  std::minstd_rand dice_;
  std::bitset<16> lags_;
};

static void run_cluster() {
  copy_engine.clear();
  all_have_started = false;
  spins = 0;
  Lag lag;
  // Blocks and warps take turns in both orders, as a race may show in one only.
  for (unsigned phase = cluster[0].index.x / cluster.size();; ++phase) {
    bool ran = false;
    lag.draw();
    for (unsigned i = 0; i < cluster.size(); ++i) {
      ThreadBlock& block = cluster[phase / 2 % 2 ? cluster.size() - 1 - i : i];
      for (unsigned j = 0; j < block.warps.size(); ++j) {
        const unsigned warp = phase % 2 ? block.warps.size() - 1 - j : j;
        Fiber* lanes = &block.fibers[warp * kLanes];
        const bool lags = lag.lags(block, warp);
        for (unsigned lane = 0; lags && lane < kLanes; ++lane) ran = ran || lanes[lane].state == State::kReady;
        for (bool again = !lags; again;) {
          again = false;
          for (unsigned lane = 0; lane < kLanes; ++lane)
            if (lanes[lane].state == State::kReady) resume(lanes[lane]), again = ran = true;
        }
      }
    }
    for (ThreadBlock& block : cluster)
      for (Fiber& fiber : block.fibers)
        if (fiber.state == State::kAtMbarrier && may_pass(fiber)) fiber.state = State::kReady, ran = true;
    if (lag.delivers_early()) run_transfer(), ran = true;
    if (ran) continue;
    for (ThreadBlock& block : cluster) ran = pass_barrier(State::kAtBarrier, &block, &block + 1) || ran;
    if (pass_barrier(State::kAtClusterBarrier, cluster.data(), cluster.data() + cluster.size()))
      ran = all_have_started = true;
    if (ran) {
      spins = 0;
      continue;
    }
    if (!copy_engine.empty()) {  // nobody can go on without it
      for (phase_has_ended = false; !copy_engine.empty() && !phase_has_ended;) run_transfer();
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

static void on_signal(int signal, siginfo_t* info, void*) {
  if (signal == SIGILL || signal == SIGTRAP) fail("undefined behaviour");  // UBSan's trap
  fail("access to %p, outside of every buffer", info->si_addr);
}

const char* launch(void (*kernel)(), unsigned blocks, unsigned threads, unsigned bytes, char* shared,
                   size_t shared_capacity, unsigned cluster_size) {
  run_kernel = kernel;
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

// From now on warpgroups lag behind at random, as this seed has it, and copies may arrive before anyone waits for them.
extern "C" void let_warps_lag(unsigned seed) {
  emulator::lag_seed = seed;
}

void __syncwarp() {
  emulator::Exchange<int>(0);
}

unsigned __ballot_sync(unsigned, bool x) {
  const emulator::Exchange<bool> votes(x);
  unsigned result = 0;
  for (unsigned i = 0; i < emulator::kLanes; ++i) result |= unsigned(votes.all[i]) << i;
  return result;
}
