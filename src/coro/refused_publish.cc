// SPDX-License-Identifier: MIT
// Not part of any program: a test compiles this and expects to be refused, once for each way to
// write a publish step that the driver must not copy or call.
#include <string>

#include "roost/coro/task.h"

namespace roost {

Task<void> refused(std::string name) {
#if ROOST_REFUSED == 0
  co_await suspend([text = name.c_str()](Coroutine&) noexcept { (void)text; });  // this one is fine
#elif ROOST_REFUSED == 1
  co_await suspend([name](Coroutine&) noexcept {});  // a capture with a destructor
#elif ROOST_REFUSED == 2
  co_await suspend([](Coroutine&) {});  // may throw
#endif
}

}  // namespace roost
