// SPDX-License-Identifier: MIT
#include "model/checker.h"

namespace roost::model {

namespace {

constexpr unsigned kMaxSteps = 2000;  // of an execution; more are a livelock

}  // namespace

// What Relacy takes for the test.
class SuiteHolder {
 public:
  static inline Cases::Make make = nullptr;

  SuiteHolder() : suite_(make(memory_)) {}
  ~SuiteHolder() { suite_->~SuiteBase(); }
  SuiteHolder(const SuiteHolder&) = delete;
  SuiteHolder& operator=(const SuiteHolder&) = delete;

  void before() { suite_->before(); }
  void thread(unsigned index) { suite_->thread(index); }
  void after() { suite_->after(); }
  void invariant() {}

 private:
  alignas(std::max_align_t) unsigned char memory_[Cases::kMaxSuiteSize];
  SuiteBase* const suite_;
};

namespace {

template <rl::thread_id_t threads>
class Test : public SuiteHolder {
 public:
  static constexpr rl::thread_id_t dynamic_thread_count = 0;
  using params = typename rl::test_suite<Test, threads>::params;
};

template <rl::thread_id_t threads>
rl::test_result_e run_test(rl::test_params& params, rl::ostringstream& state, bool again) {
  switch (params.search_type) {
    case rl::sched_full:
      return rl::run_test<Test<threads>, rl::full_search_scheduler<threads>>(params, state, again);
    case rl::sched_bound:
      return rl::run_test<Test<threads>, rl::context_bound_scheduler<threads>>(params, state,
                                                                               again);
    default:
      return rl::run_test<Test<threads>, rl::random_scheduler<threads>>(params, state, again);
  }
}

rl::test_result_e run_test(unsigned threads, rl::test_params& params, rl::ostringstream& state,
                           bool again) {
  switch (threads) {
    case 2:
      return run_test<2>(params, state, again);
    case 3:
      return run_test<3>(params, state, again);
    case 4:
      return run_test<4>(params, state, again);
    default:
      std::fprintf(stderr, "no tests with %u threads are compiled\n", threads);
      std::abort();
  }
}

}  // namespace

Cases::Cases(int argc, char** argv) : wanted_(argv + 1, argv + argc) {
  if (!wanted_.empty() && std::string_view(wanted_.front()) == "--brief") {
    brief_ = true;
    wanted_.erase(wanted_.begin());
  }
}

void Cases::run(const char* name, Search search, unsigned threads, Make make,
                const std::vector<Path*>& paths) {
  bool wanted = wanted_.empty();
  for (const char* other : wanted_) wanted |= std::string_view(name) == other;
  if (!wanted || result_ != 0) return;
  ++cases_run_;

  rl::test_params params;
  params.search_type = search.kind;
  params.iteration_count = search.amount;
  params.context_bound = static_cast<unsigned>(search.amount);
  params.execution_depth_limit = kMaxSteps;
  std::ostringstream progress;  // of no interest
  params.progress_stream = &progress;
  SuiteHolder::make = make;

  for (Path* path : paths) path->taken = 0;
  rl::ostringstream state;
  const auto result = run_test(threads, params, state, false);
  const auto executions = static_cast<unsigned long long>(params.stop_iteration);
  if (result != rl::test_result_success) {
    std::printf("%s: failed in execution %llu: %s\n", name, executions,
                rl::test_result_str(result));
    std::fflush(stdout);
    result_ = 1;
    if (brief_) return;
    // Once more, this time with a record of the steps, which is printed.
    params.initial_state = state.str();
    params.collect_history = true;
    run_test(threads, params, state, true);
    std::fflush(stdout);
    return;
  }
  std::printf("%s: %u threads, ", name, threads);
  switch (search.kind) {
    case rl::sched_full:
      std::printf("exhaustive: %llu executions\n", executions);
      break;
    case rl::sched_bound:
      std::printf("all with %u preemptions: %llu executions\n", params.context_bound, executions);
      break;
    default:
      std::printf("%llu executions at random\n", executions);
      break;
  }
  for (const Path* path : paths) {
    std::printf("%12llu times: %s\n", static_cast<unsigned long long>(path->taken), path->what);
    if (path->taken == 0) result_ = 2;
  }
  std::fflush(stdout);
}

int Cases::result() const {
  if (result_ == 2) std::printf("a path was never taken\n");
  if (cases_run_ == 0) std::printf("there is no such case\n");
  return cases_run_ == 0 ? 2 : result_;
}

}  // namespace roost::model
