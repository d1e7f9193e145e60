// SPDX-License-Identifier: MIT
// Not part of any program: a test compiles this and expects to be refused, once for each way to
// have a coroutine function called elsewhere, where its task would never begin.
#include <stop_token>

#include "roost/aio/aio_context.h"
#include "roost/aio/thread_pool.h"
#include "roost/coro/task.h"

namespace roost {

Task<int> two() { co_return 2; }

Task<void> refused(AioContext& context, ThreadPool& pool, std::stop_token stop) {
  const auto function = [] { return 2; };  // this one is fine
  const auto coroutine = [] { return two(); };
#if ROOST_REFUSED == 0
  (void)context.run(function);
  (void)co_await pool.run(function, stop);
#elif ROOST_REFUSED == 1
  (void)context.run(coroutine);
#elif ROOST_REFUSED == 2
  (void)co_await pool.run(coroutine);
#elif ROOST_REFUSED == 3
  (void)co_await pool.run(coroutine, stop);
#endif
}

}  // namespace roost
