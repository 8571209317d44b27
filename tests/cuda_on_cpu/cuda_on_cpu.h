// Runs CUDA kernels on the CPU, for tests: what nvcc and csrc/cuda_device.cuh provide, under the same names.
//
// Every CUDA thread is a fibre with a stack of its own; the fibres of several blocks run in turn on one CPU thread and
// give way at barriers, at shuffles and while they wait for a counter. The order in which they run is a choice
// (`Machine::order`), so that a missing barrier shows whichever way round the data flows. Shared memory starts as NaN,
// is exactly as long as asked for, and is NaN again when its block has ended; a copy to it takes place when waited for.
// AddressSanitizer and ThreadSanitizer are told of the fibres; to the latter only a barrier, a counter or a launch
// orders what two of them do.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "se_cuda.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

#define __global__ static
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (cuda_on_cpu::machine().running()->thread)
#define blockIdx (cuda_on_cpu::machine().running()->block->index)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using std::max;
using std::min;

namespace cuda_on_cpu {

// The machine's own bookkeeping is shared by the fibres on purpose.
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))

enum class Order { ascending, descending, block_by_block };

struct Index {
  unsigned x;
};

inline void happens_before(void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(what);
#else
  (void)what;
#endif
}
inline void happens_after(void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(what);
#else
  (void)what;
#endif
}

struct Barrier {
  int expected = 0, arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  float values[2][32];
};

struct Cluster {
  Barrier barrier;
  std::vector<unsigned char*> shared;
};

struct Block {
  Index index;
  int rank = 0, living = 0;
  Cluster* cluster = nullptr;
  std::unique_ptr<unsigned char[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

// No larger than needed: AddressSanitizer clears its shadow of the whole stack at every switch.
constexpr size_t kStack = 64 << 10;

// What a fibre needs of the system; used again in later launches.
struct Place {
  void* stack = nullptr;
  void* watched = nullptr;  // ThreadSanitizer's view of the fibre
};

struct Fibre {
  ucontext_t context;
  Place place;
  Index thread;
  Block* block = nullptr;
  bool done = false;
  int barriers = 0, shuffles = 0;
  struct Copy {
    void* to;
    const void* from;
  };
  std::vector<Copy> copies;
};

class Machine {
 public:
  Order order = Order::ascending;
  se_cuda::Limits limits = {};
  int skipped_barrier = -1;  // which of a thread's barriers, counted from 0, is left out; none where negative
  int most_barriers = 0;     // how many a thread met in the last launch
  int launches = 0;
  int64_t bytes_read = 0, bytes_written = 0;  // of activations in global memory, since they were last set to 0

  UNWATCHED Fibre* running() { return running_; }
  UNWATCHED size_t shared_bytes() const { return shared_bytes_; }

  void run(int64_t blocks, int cluster, int64_t shared, const std::function<void()>& kernel) {
    ++launches;
    most_barriers = 0;
    kernel_ = &kernel;
    const int64_t at_once = cluster > 1 ? 2 * cluster : 8;
    for (int64_t first = 0; first < blocks; first += at_once) {
      run_together(first, std::min(blocks, first + at_once), cluster, shared);
    }
  }

  UNWATCHED void wait(Barrier& barrier, bool counted) {
    Fibre* const me = running_;
    if (counted) {
      const int which = me->barriers++;
      if (which >= most_barriers) {
        most_barriers = which + 1;
      }
      if (which == skipped_barrier) {
        return;
      }
    }
    happens_before(&barrier);
    const int64_t generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      ++barrier.generation;
      progressed();
    } else {
      while (barrier.generation == generation) {
        give_way();
      }
    }
    happens_after(&barrier);
  }

  UNWATCHED void progressed() { ++progress_; }

  // Back to the scheduler, until it is this fibre's turn again.
  UNWATCHED void give_way() { leave(running_, false); }

 private:
  UNWATCHED void run_together(int64_t first, int64_t last, int cluster, int64_t shared) {
    const int threads = se_cuda::kThreads;
    shared_bytes_ = size_t(shared);
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::unique_ptr<Block>> resident;
    std::vector<std::unique_ptr<Fibre>> fibres;
    for (int64_t b = first; b < last; ++b) {
      if ((b - first) % cluster == 0) {
        clusters.push_back(std::make_unique<Cluster>());
        clusters.back()->barrier.expected = cluster * threads;
      }
      auto block = std::make_unique<Block>();
      block->index.x = unsigned(b);
      block->rank = int(b % cluster);
      block->living = threads;
      block->cluster = clusters.back().get();
      block->shared.reset(new unsigned char[size_t(shared)]);
      std::memset(block->shared.get(), 0xff, shared_bytes_);  // NaN in every dtype
      block->cluster->shared.push_back(block->shared.get());
      block->barrier.expected = threads;
      block->warps.resize(threads / 32);
      for (Warp& warp : block->warps) {
        warp.barrier.expected = 32;
      }
      for (int t = 0; t < threads; ++t) {
        fibres.push_back(start(block.get(), unsigned(t)));
      }
      resident.push_back(std::move(block));
    }
    happens_before(&launched_);
    const size_t count = fibres.size();
    const size_t group = order == Order::block_by_block ? size_t(threads) : count;
    for (size_t left = count; left > 0;) {
      const int64_t before = progress_;
      for (size_t from = 0; from < count; from += group) {
        int64_t seen;
        do {  // a block goes on until all its threads wait for another block
          seen = progress_;
          for (size_t i = from; i < from + group; ++i) {
            Fibre& fibre = *fibres[order == Order::descending ? count - 1 - i : i];
            if (!fibre.done) {
              enter(&fibre);
              left -= fibre.done;
            }
          }
        } while (order == Order::block_by_block && progress_ != seen);
      }
      if (progress_ == before) {
        std::fprintf(stderr, "cuda_on_cpu: every thread waits for another\n");
        std::abort();
      }
    }
    happens_after(&ended_);
    for (auto& fibre : fibres) {
      places_.push_back(fibre->place);
    }
  }

  UNWATCHED std::unique_ptr<Fibre> start(Block* block, unsigned thread) {
    auto fibre = std::make_unique<Fibre>();
    fibre->block = block;
    fibre->thread.x = thread;
    if (places_.empty()) {
      places_.push_back(make_place());
    }
    fibre->place = places_.back();
    places_.pop_back();
    getcontext(&fibre->context);
    fibre->context.uc_stack.ss_sp = fibre->place.stack;
    fibre->context.uc_stack.ss_size = kStack;
    fibre->context.uc_link = nullptr;
    makecontext(&fibre->context, &Machine::body, 0);
    return fibre;
  }

  UNWATCHED static Place make_place() {
    Place place;
    place.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place.stack == MAP_FAILED) {
      std::perror("cuda_on_cpu: mmap");
      std::abort();
    }
#if defined(__SANITIZE_THREAD__)
    place.watched = __tsan_create_fiber(0);
#endif
    return place;
  }

  static void body();

  UNWATCHED void enter(Fibre* fibre) {
    running_ = fibre;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibre->place.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
    scheduler_watched_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fibre->place.watched, 1);  // 1: the switch itself orders nothing
#endif
    swapcontext(&scheduler_, &fibre->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    if (fibre->done) {
      ++progress_;
      if (--fibre->block->living == 0) {
        happens_after(&ended_);
        std::memset(fibre->block->shared.get(), 0xff, shared_bytes_);
      }
    }
  }

  UNWATCHED void leave(Fibre* fibre, bool for_good) {
    fibre->done = for_good;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack_, scheduler_stack_bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_watched_, 1);
#endif
    swapcontext(&fibre->context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  const std::function<void()>* kernel_ = nullptr;
  Fibre* running_ = nullptr;
  ucontext_t scheduler_;
  std::vector<Place> places_;
  int64_t progress_ = 0;
  size_t shared_bytes_ = 0;
  void* scheduler_watched_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  char launched_ = 0, ended_ = 0;  // their addresses stand for what comes before a kernel and after it
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

UNWATCHED inline void Machine::body() {
  Machine& self = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_bytes_);
#endif
  happens_after(&self.launched_);
  (*self.kernel_)();
  happens_before(&self.ended_);
  self.leave(self.running_, true);
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  auto& machine = cuda_on_cpu::machine();
  machine.wait(machine.running()->block->barrier, true);
}

namespace device {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline float to_float(float16 value) { return float(value); }

inline void from_float(float value, float& to) { to = value; }
inline void from_float(float value, bfloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  // to nearest, ties to even; a NaN stays one
  to.bits = value != value ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float value, float16& to) { to = float16(value); }
template <class T>
void from_pair(float first, float second, T* to) {
  from_float(first, to[0]);
  from_float(second, to[1]);
}

inline unsigned char* shared_memory() { return cuda_on_cpu::machine().running()->block->shared.get(); }

UNWATCHED inline void count(int64_t& bytes, size_t more) { bytes += int64_t(more); }

inline void copy_async(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) {
    std::fprintf(stderr, "cuda_on_cpu: a copy that is not 16-byte aligned\n");
    std::abort();
  }
  cuda_on_cpu::machine().running()->copies.push_back({shared, global});
  count(cuda_on_cpu::machine().bytes_read, 16);
}
inline void copies_wait() {
  auto& copies = cuda_on_cpu::machine().running()->copies;
  for (const auto& copy : copies) {
    std::memcpy(copy.to, copy.from, 16);
  }
  copies.clear();
}

inline float shuffle_xor(float value, int lanes) {
  auto& machine = cuda_on_cpu::machine();
  auto* me = machine.running();
  auto& warp = me->block->warps[me->thread.x / 32];
  const int turn = me->shuffles++ % 2, lane = int(me->thread.x % 32);
  warp.values[turn][lane] = value;
  machine.wait(warp.barrier, false);
  return warp.values[turn][lane ^ lanes];
}

// Reads and writes of sixteen bytes abort where a GPU would: at an address that does not suit them.
template <class V>
void check_alignment(const V* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0) {
    std::fprintf(stderr, "cuda_on_cpu: an access of %zu bytes that is not aligned\n", sizeof(V));
    std::abort();
  }
}
template <class V>
V load_first(const V* from) {
  check_alignment(from);
  auto& machine = cuda_on_cpu::machine();
  const auto* const shared = machine.running()->block->shared.get();
  const auto* const at = reinterpret_cast<const unsigned char*>(from);
  if (at < shared || at >= shared + machine.shared_bytes()) {
    count(machine.bytes_read, sizeof(V));
  }
  return *from;
}
template <class V>
V load_last(const V* from) {
  return load_first(from);
}
template <class V>
void store_last(V* to, V value) {
  check_alignment(to);
  count(cuda_on_cpu::machine().bytes_written, sizeof(V));
  *to = value;
}

inline float load_fresh(const float* from) { return *from; }

UNWATCHED inline int take_ticket(int* counter) {
  cuda_on_cpu::machine().progressed();
  return (*counter)++;
}
UNWATCHED inline void signal(int* counter) {
  cuda_on_cpu::happens_before(counter);
  cuda_on_cpu::machine().progressed();
  ++*counter;
}
UNWATCHED inline void wait_until_at_least(int* counter, int value) {
  while (*counter < value) {
    cuda_on_cpu::machine().give_way();
  }
  cuda_on_cpu::happens_after(counter);
}

inline int cluster_rank() { return cuda_on_cpu::machine().running()->block->rank; }
inline void cluster_sync() {
  auto& machine = cuda_on_cpu::machine();
  machine.wait(machine.running()->block->cluster->barrier, true);
}
inline const float* cluster_peer(const float* mine, int rank) {
  const auto* block = cuda_on_cpu::machine().running()->block;
  const auto* bytes = reinterpret_cast<const unsigned char*>(mine);
  return reinterpret_cast<const float*>(block->cluster->shared[rank] + (bytes - block->shared.get()));
}

template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, int cluster, int64_t shared, void*, const Args& args) {
  cuda_on_cpu::machine().run(blocks, cluster, shared, [&] { kernel(args); });
}

template <class Args>
int resident_blocks(void (*)(Args), int64_t, int multiprocessors) {
  return 2 * multiprocessors;
}

template <class Args>
bool clusters_fit(void (*)(Args), int, int64_t) {
  return true;
}

template <class F>
se_cuda::Limits limits(F) {
  return cuda_on_cpu::machine().limits;
}

}  // namespace device
