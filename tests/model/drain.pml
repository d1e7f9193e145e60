/* SPDX-License-Identifier: MIT */
/*
 * Drained sections: between begin and end no request is in flight and none starts.
 *
 * A backend (0) stands above a node (1). Each has one word with the count of requests in flight and
 * the draining bit; admission at the backend is one atomic operation on it. While draining, requests
 * queue at the backend; what an admitted request sends to the node passes always. A drain quiesces
 * the backend before the node, and ends in the opposite order. Two drains from outside overlap, and
 * one comes from inside a request, whose token exempts that request from being waited for.
 *
 * Every atomic{} is one atomic operation, or one critical section of a short lock.
 *
 * Mutants, each to be defined for spin: CHECK_THEN_COUNT, NO_QUEUE_RECHECK, NO_WAIT_RECHECK,
 * CHILD_FIRST, END_FORGETS_QUEUE, FIRST_END_OPENS, NO_TOKEN, SUB_REQUESTS_QUEUE, WAKE_TWICE
 */

#define REQUESTS 2 /* besides the one that drains */
#define DRAINS 3   /* two from outside, and that one */
#define INSIDE 2   /* its number as a drain, and as a request */

byte count[2] = 0;
bool draining[2] = false;
byte nested[2] = 0;

bool queued[REQUESTS + 1] = false; /* in the backend's queue */
bool go[REQUESTS + 1] = false;     /* resumed from it */
byte waits_at[DRAINS] = 0;         /* 1 + the node whose quiet this drain waits for */
byte exempt[DRAINS] = 0;           /* requests in flight that it does not wait for */
byte wakes[DRAINS] = 0;

byte quiet = 0;    /* drains that found the node quiet, and count on it until they end */
byte sections = 0; /* drained sections that are open */
byte finished = 0; /* requests */
byte drained = 0;  /* drains that have ended */

inline complete(n, was) {
  atomic { count[n]--; was = draining[n] };
  if
  :: was ->
    d_step {
      j = 0;
      do
      :: j < DRAINS ->
        if
        :: waits_at[j] == n + 1 && count[n] <= exempt[j] ->
#ifndef WAKE_TWICE
          waits_at[j] = 0;
#endif
          wakes[j]++
        :: else
        fi;
        j++
      :: else -> break
      od;
      j = 0
    }
  :: else
  fi
}

inline quiesce(n, d, own) {
  atomic { nested[n]++; draining[n] = true };
#ifdef NO_WAIT_RECHECK
  parked = count[n] > own;
  atomic {
    if
    :: parked -> exempt[d] = own; waits_at[d] = n + 1
    :: else
    fi
  };
#else
  atomic {
    parked = count[n] > own;
    if
    :: parked -> exempt[d] = own; waits_at[d] = n + 1
    :: else
    fi
  };
#endif
  if
  :: parked -> atomic { wakes[d] > 0 -> wakes[d]-- }
  :: else
  fi;
  assert(wakes[d] == 0)
}

inline unquiesce(n) {
  atomic {
    nested[n]--;
#ifdef FIRST_END_OPENS
    opened = true;
#else
    opened = nested[n] == 0;
#endif
    if
    :: opened -> draining[n] = false
    :: else
    fi
  };
#ifndef END_FORGETS_QUEUE
  if
  :: n == 0 && opened ->
    d_step {
      j = 0;
      do
      :: j <= REQUESTS ->
        if
        :: queued[j] -> queued[j] = false; go[j] = true
        :: else
        fi;
        j++
      :: else -> break
      od;
      j = 0
    }
  :: else
  fi
#endif
}

inline drain_begin(d, own) {
#ifdef CHILD_FIRST
  quiesce(1, d, 0);
  quiet++;
  quiesce(0, d, own);
#else
  quiesce(0, d, own);
  quiesce(1, d, 0);
  quiet++;
#endif
  atomic { sections++; assert(count[0] == own && count[1] == 0) }
}

inline drain_end() {
  sections--;
  quiet--;
  unquiesce(1);
  unquiesce(0);
  drained++
}

/* Whatever an admitted request wants of the node. */
inline sub_request() {
#ifdef SUB_REQUESTS_QUEUE
  atomic { !draining[1] -> count[1]++ };
#else
  count[1]++;
#endif
  complete(1, was)
}

inline admit(r) {
  do
#ifdef CHECK_THEN_COUNT
  :: !draining[0] -> count[0]++; break
#else
  :: atomic { !draining[0] -> count[0]++ }; break
#endif
  :: draining[0] ->
#ifdef NO_QUEUE_RECHECK
    queued[r] = true;
    atomic { go[r] -> go[r] = false }
#else
    if
    :: atomic { draining[0] -> queued[r] = true };
      atomic { go[r] -> go[r] = false }
    :: atomic { !draining[0] -> skip }
    fi
#endif
  od
}

proctype request(byte r) {
  byte j;
  bool was;
  admit(r);
  assert(sections == 0 && quiet == 0);
  sub_request();
  assert(sections == 0 && quiet == 0);
  complete(0, was);
  atomic { finished++; j = 0 }
}

proctype request_that_drains() {
  byte j;
  bool was;
  bool parked;
  bool opened;
  admit(INSIDE);
  assert(sections == 0);
#ifdef NO_TOKEN
  drain_begin(INSIDE, 0);
#else
  drain_begin(INSIDE, 1);
#endif
  sub_request(); /* its own work, in its own section */
  drain_end();
  sub_request();
  complete(0, was);
  finished++
}

proctype drain(byte d) {
  byte j;
  bool parked;
  bool opened;
  drain_begin(d, 0);
  drain_end()
}

init {
  atomic {
    run request(0);
    run request(1);
    run request_that_drains();
    run drain(0);
    run drain(1)
  }
}

ltl drains_end { <> [] (drained == DRAINS && !draining[0] && !draining[1]) }
ltl requests_finish { [] (queued[0] -> <> !queued[0]) && <> (finished == REQUESTS + 1) }
