// Spreads tasks over torch's own threads, each with a private scratch block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace hivilt {

// Threads that parallel_tasks may use: torch's setting, or 1 in a process forked after threads were started.
int64_t thread_count();

// Calls body(begin, end, scratch) on ranges that cover [0, n); `alone`: in this thread only. Throws what a body threw,
// or std::bad_alloc.
void parallel_tasks(int64_t n, size_t scratch_bytes, const std::function<void(int64_t, int64_t, char*)>& body,
                    bool alone = false);

}  // namespace hivilt
