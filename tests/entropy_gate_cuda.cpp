// The CUDA kernels of the entropy gate on the CPU: csrc/cuda/entropy_gate.cpp registers its launching operators for CPU
// tensors here, and launch() runs the blocks one after another.
//
// The threads of a block are fibers. Each runs up to its next barrier or exchange; then comes the next thread's turn,
// in rising and in falling order by turns, so that a value read without a barrier between is not there yet in one of
// the orders. Shared memory has just the bytes of the plan, and NaN in them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/entropy_gate_kernel.h"

#define CUDA CPU  // the dispatch key
#include "cuda/entropy_gate.cpp"
#undef CUDA

namespace csf::entropy_gate::cuda {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned char kGuard = 0xa5;
constexpr size_t kGuardBytes = 64;

enum class Stop { barrier, exchange, end };

struct Fibers {
  ucontext_t scheduler;
  ucontext_t threads[kThreads];
  Stop stops[kThreads];
  double exchanged[kThreads];
  std::unique_ptr<char[]> stacks{new char[kThreads * kStackBytes]};
  int current;
  void (*body)(int thread, const void* call);
  const void* call;
};

Fibers& fibers() {
  static Fibers instance;
  return instance;
}

void stop(Stop reason) {
  Fibers& f = fibers();
  const int thread = f.current;
  f.stops[thread] = reason;
  swapcontext(&f.threads[thread], &f.scheduler);
}

void begin() {
  Fibers& f = fibers();
  const int thread = f.current;
  f.body(thread, f.call);
  f.stops[thread] = Stop::end;
}

class EmulatedBlock {
 public:
  EmulatedBlock(int thread, int64_t index, void* shared) : thread_(thread), index_(index), shared_(shared) {}

  int thread() const { return thread_; }
  int64_t index() const { return index_; }
  void* shared() const { return shared_; }
  void wait() const { stop(Stop::barrier); }

  template <class S>
  S from_lane(S value, int distance) const {
    fibers().exchanged[thread_] = value;
    stop(Stop::exchange);
    const double other = fibers().exchanged[thread_ ^ distance];
    stop(Stop::exchange);
    return static_cast<S>(other);
  }

 private:
  int thread_;
  int64_t index_;
  void* shared_;
};

// Runs the threads of one block to their ends.
void run_block(int64_t index, void (*body)(int, const void*), const void* call) {
  Fibers& f = fibers();
  f.body = body;
  f.call = call;
  for (int thread = 0; thread < kThreads; ++thread) {
    getcontext(&f.threads[thread]);
    f.threads[thread].uc_stack.ss_sp = f.stacks.get() + thread * kStackBytes;
    f.threads[thread].uc_stack.ss_size = kStackBytes;
    f.threads[thread].uc_link = &f.scheduler;
    makecontext(&f.threads[thread], begin, 0);
    f.stops[thread] = Stop::barrier;
  }
  bool running = true;
  for (int64_t turn = index; running; ++turn) {
    for (int k = 0; k < kThreads; ++k) {
      f.current = turn % 2 == 0 ? k : kThreads - 1 - k;
      if (f.stops[f.current] != Stop::end) swapcontext(&f.scheduler, &f.threads[f.current]);
    }
    running = false;
    Stop common = Stop::end;
    for (const Stop reason : f.stops) {
      if (reason == Stop::end) continue;
      if (running && reason != common) throw std::logic_error("threads of a block wait for different things");
      common = reason;
      running = true;
    }
  }
}

template <class Work>
struct Call {
  const Work& work;
  const Plan& plan;
  int64_t index;
  void* shared;
};

template <class Stored, int VECTOR, bool CHANNELS_LAST>
void thread_of(const Forward& work, const Plan& plan, const EmulatedBlock& block) {
  forward_thread<Stored, VECTOR, CHANNELS_LAST>(work, plan, block);
}

template <class Stored, int VECTOR, bool CHANNELS_LAST>
void thread_of(const Backward& work, const Plan& plan, const EmulatedBlock& block) {
  backward_thread<Stored, VECTOR, CHANNELS_LAST>(work, plan, block);
}

template <class Work, class Stored, int VECTOR, bool CHANNELS_LAST>
void body(int thread, const void* argument) {
  const auto& call = *static_cast<const Call<Work>*>(argument);
  thread_of<Stored, VECTOR, CHANNELS_LAST>(call.work, call.plan, EmulatedBlock(thread, call.index, call.shared));
}

template <class Work, class Stored>
auto body_as(const Plan& plan, bool channels_last) {
  constexpr int vector = kVectorBytes / sizeof(Stored);
  if (channels_last) return plan.vector == 1 ? body<Work, Stored, 1, true> : body<Work, Stored, vector, true>;
  return plan.vector == 1 ? body<Work, Stored, 1, false> : body<Work, Stored, vector, false>;
}

template <class Work>
auto body_for(const Work& work, const Plan& plan) {
  switch (work.shape.feature_type) {
    case ScalarType::Double: return body_as<Work, double>(plan, work.shape.channels_last);
    case ScalarType::BFloat16: return body_as<Work, BFloat16>(plan, work.shape.channels_last);
    case ScalarType::Half: return body_as<Work, Half>(plan, work.shape.channels_last);
    default: return body_as<Work, float>(plan, work.shape.channels_last);
  }
}

}  // namespace

// Of the card that is emulated, and of the last launch: the tests set and read them.
extern "C" {
__attribute__((visibility("default"))) int processors = 4;
__attribute__((visibility("default"))) Plan last_plan;
}

template <class Work>
void run(const Work& work) {
  const Plan plan = last_plan = make_plan(work, processors);
  std::vector<unsigned char> memory(plan.shared_bytes + 2 * kGuardBytes);
  unsigned char* shared = memory.data();
  shared += kGuardBytes - reinterpret_cast<uintptr_t>(shared) % kGuardBytes;
  for (int64_t index = 0; index < plan.blocks; ++index) {
    std::fill(memory.begin(), memory.end(), kGuard);
    memset(shared, 0xff, plan.shared_bytes);
    const Call<Work> call{work, plan, index, shared};
    run_block(index, body_for(work, plan), &call);
    const unsigned char* end = shared + plan.shared_bytes;
    for (const unsigned char* byte = memory.data(); byte < memory.data() + memory.size(); ++byte) {
      if ((byte < shared || byte >= end) && *byte != kGuard) throw std::logic_error("written past shared memory");
    }
  }
}

void launch(const Forward& work, int32_t) {
  run(work);
}

void launch(const Backward& work, int32_t) {
  run(work);
}

}  // namespace csf::entropy_gate::cuda
