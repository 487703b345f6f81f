// Runs independent tasks on a thread pool that the caller provides. Nothing here blocks: the caller itself runs on that
// pool, so waiting for the tasks could starve them for ever.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <new>

#include "common/types.h"

namespace flash::cpu {

struct Executor {
  int64 num_threads;
  std::function<void(std::function<void()>)> schedule;  // valid only until the call that received it returns
  // Called exactly once, by whichever thread ends last; the message is null on success.
  std::function<void(const char* error)> done;
};

// Calls `task(i)` for every i in [0, count), and then `executor.done`. `make_worker` builds what one thread needs (its
// scratch memory) and returns `task`. Workers take the next index when free, so uneven tasks balance. With
// `inline_only` all runs on the calling thread: for problems smaller than the cost of waking a thread.
template <class MakeWorker>
void parallel_for(const Executor& executor, int64 count, bool inline_only, MakeWorker make_worker) {
  struct State {
    MakeWorker make_worker;
    std::function<void(const char*)> done;
    int64 count;
    std::atomic<int64> next{0};
    std::atomic<int64> running;
    std::atomic<bool> failed{false};
  };
  const int64 workers = inline_only ? 1 : max_of<int64>(1, min_of(executor.num_threads, count));
  std::shared_ptr<State> state(new State{std::move(make_worker), executor.done, count, {0}, {workers}, {false}});
  auto work = [state] {
    try {
      auto task = state->make_worker();
      for (int64 i; !state->failed && (i = state->next++) < state->count;) task(i);
    } catch (const std::bad_alloc&) {  // of its scratch: tasks throw nothing else
      state->failed = true;
    }
    if (--state->running == 0) state->done(state->failed ? "out of memory for scratch tiles" : nullptr);
  };
  if (workers == 1) return work();
  for (int64 i = 0; i < workers; ++i) {
    try {
      executor.schedule(work);
    } catch (const std::bad_alloc&) {  // earlier workers may be running already: theirs must not be the only end
      work();
    }
  }
}

}  // namespace flash::cpu
