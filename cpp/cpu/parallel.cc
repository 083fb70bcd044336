// parallel_for on the host framework's threads where there are any, else on threads of our own.
//
// torch runs its own operators on an OpenMP pool, whose threads spin for a while after each
// operator, waiting for the next. Threads of ours would have to share the cores with the spinning
// ones, and a decode step goes back and forth between the two every 100 us. So if the process has
// an OpenMP runtime (any: libgomp, and LLVM's and Intel's, answer to GOMP_parallel), its pool runs
// our work too. It is looked up when first needed; nothing is linked.
// A decode step of 30 layers (two bfloat16 matrix products of torch, then attend, on 2 cores) took
// 15 to 19 ms that way and 18 to 22 ms with threads of our own (medians of three runs each).
//
// A child of fork() has none of its parent's threads, though both kinds of pool remember them, and
// would wait for them for ever. So a child starts with a pool of our own without threads; OpenMP's
// is left alone there.
#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "adakv/error.h"
#include "adakv/ops.h"

namespace adakv {
namespace {

std::atomic<int> g_num_threads{1};

/// The items of one parallel_for, and what its threads share.
struct Work {
  int64_t count;
  const std::function<void(int64_t)>& body;
  std::atomic<int64_t> next{0};
  std::mutex mutex{};
  std::exception_ptr error{};

  /// What each thread does.
  void run() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        body(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
      }
    }
  }
};

/// Threads that sleep until there is work. One parallel_for at a time; a second caller waits for
/// its turn.
class ThreadPool {
 public:
  void run(Work& work, int num_threads) {
    const std::lock_guard<std::mutex> turn(turn_);
    try {
      while (static_cast<int>(threads_.size()) < num_threads - 1) {
        threads_.emplace_back([this, id = static_cast<int>(threads_.size())] { serve(id); });
      }
    } catch (const std::system_error&) {  // the system gives no more: those there are do the work
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      num_helpers_ = std::min(num_threads - 1, static_cast<int>(threads_.size()));
      num_running_ = num_helpers_;
      ++generation_;
    }
    wake_.notify_all();
    work.run();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return num_running_ == 0; });
  }

 private:
  void serve(int id) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= num_helpers_) continue;
      Work* work = work_;
      lock.unlock();
      work->run();
      lock.lock();
      if (--num_running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Work* work_ = nullptr;
  int num_helpers_ = 0, num_running_ = 0;
  uint64_t generation_ = 0;
};

using GompParallel = void (*)(void (*body)(void*),
                              void* data,
                              unsigned num_threads,
                              unsigned flags);

/// The threads of this process. Never destroyed: they serve until it ends.
struct Threads {
  GompParallel gomp_parallel;  // of the OpenMP runtime, null: there is none, or it is not for us
  ThreadPool* pool;
};

Threads& threads() {
  static Threads* threads = [] {
    auto* made = new Threads{reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
                             new ThreadPool};
    pthread_atfork(nullptr, nullptr, [] { adakv::threads() = {nullptr, new ThreadPool}; });
    return made;
  }();
  return *threads;
}

void run_on_threads(Work& work, int num_threads) {
  const Threads& own = threads();
  if (own.gomp_parallel != nullptr) {
    own.gomp_parallel([](void* data) { static_cast<Work*>(data)->run(); }, &work,
                      static_cast<unsigned>(num_threads), 0);
  } else {
    own.pool->run(work, num_threads);
  }
}

}  // namespace

void set_num_threads(int num_threads) {
  constexpr int kMostThreads = 4096;
  ADAKV_CHECK(num_threads >= 1 && num_threads <= kMostThreads,
              "set_num_threads: num_threads must lie in 1 .. ", kMostThreads, ", got ",
              num_threads);
  g_num_threads.store(num_threads, std::memory_order_relaxed);
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  Work work{count, body};
  // All threads or none: OpenMP pools start and stop threads when the number changes from call to
  // call.
  const int num_threads = g_num_threads.load(std::memory_order_relaxed);
  if (count <= 1 || num_threads == 1) {
    work.run();
  } else {
    run_on_threads(work, num_threads);
  }
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace adakv
