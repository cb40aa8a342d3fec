// Torch's thread pool through the stable ABI, with a guard for forked children, whose pool threads do not exist.
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace hivilt {
namespace {

bool forked = false;

const bool watching_forks = [] {
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  return true;
}();

struct Free {
  void operator()(char* p) const { std::free(p); }
};

void with_scratch(size_t bytes, int64_t begin, int64_t end, const std::function<void(int64_t, int64_t, char*)>& body) {
  // One spare line: masked tails may touch the vector behind the last element.
  const size_t size = (bytes + 63) / 64 * 64 + 64;
  const std::unique_ptr<char, Free> scratch(static_cast<char*>(std::aligned_alloc(64, size)));
  if (!scratch) throw std::bad_alloc();
  body(begin, end, scratch.get());
}

}  // namespace

int64_t thread_count() {
  return forked ? 1 : torch::stable::get_num_threads();
}

void parallel_tasks(int64_t n, size_t scratch_bytes, const std::function<void(int64_t, int64_t, char*)>& body,
                    bool alone) {
  if (n == 0) return;
  if (alone || n == 1 || thread_count() == 1) {
    with_scratch(scratch_bytes, 0, n, body);
    return;
  }
  // An exception must not cross torch's C boundary, where its text is lost: it waits here.
  std::exception_ptr failure;
  std::mutex guard;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    try {
      with_scratch(scratch_bytes, begin, end, body);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace hivilt
