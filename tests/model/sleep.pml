/* SPDX-License-Identifier: MIT */
/*
 * How the consumer of an inbox sleeps, is woken and goes (include/roost/aio/inbox.h and
 * AioContext), with the eventfd, other descriptors that end its wait, a count of the eventfd that is
 * read late, and signals that are still owed when the context closes.
 *
 * What Relacy checks of the same hand-shake is the source and its memory orders; this adds the
 * liveness, and the kernel's side. Every atomic{} is one atomic operation, or one system call.
 *
 * Mutants, each to be defined for spin: BLIND_SLEEP, NO_SIGNAL, NOT_COUNTED, GO_EARLY, LOSE_LIST
 */

#define PRODUCERS 2
#define EACH 1
#define OTHER_WAKES 2

mtype = { is_empty, is_sleeping, is_closed, is_list };

mtype head = is_empty;
byte queued = 0;          /* length of the list */
byte eventfd = 0;
bool eventfd_open = true;
bool other_ready = false; /* another descriptor or a timer */
bool stop = false;
bool gone = false;        /* the context is closed */

byte pushed = 0;
byte refused = 0;
byte received = 0;
byte owed = 0;
byte signals = 0;

inline push(seen, was_refused) {
  was_refused = false;
  seen = head;
  do
  :: seen == is_closed -> was_refused = true; break
  :: else ->
    if
    :: atomic { head == seen -> head = is_list; queued++ }
       if
#ifndef NO_SIGNAL
       :: seen == is_sleeping -> atomic { assert(eventfd_open); eventfd++ }
#endif
       :: else
       fi;
       break
    :: atomic { head != seen -> seen = head }
    fi
  od
}

active [PRODUCERS] proctype producer() {
  byte i = 0;
  bool no;
  mtype seen;
  do
  :: i < EACH ->
    push(seen, no);
    atomic {
      if
      :: no -> refused++
      :: else -> pushed++
      fi
    };
    i++
  :: else -> break
  od
}

/* The stop of a context is an entry as well, so that a sleeping one hears of it. */
active proctype stopper() {
  bool no;
  mtype seen;
  stop = true;
  push(seen, no);
  atomic {
    if
    :: no -> refused++
    :: else -> pushed++
    fi
  }
}

active proctype other() {
  byte i = 0;
  do
  :: i < OTHER_WAKES -> other_ready = true; i++
  :: break
  od
}

active proctype consumer() {
  do
  :: head == is_list ->
    atomic { received = received + queued; queued = 0; head = is_empty }
  :: else ->
    if
    :: stop -> break
    :: else
    fi;
    if
#ifdef BLIND_SLEEP
    :: head = is_sleeping;
#else
    :: atomic { head == is_empty -> head = is_sleeping };
#endif
      (eventfd > 0 || other_ready);
      atomic {
        if
#ifdef LOSE_LIST
        :: true -> head = is_empty
#else
        :: head == is_sleeping -> head = is_empty
#endif
#ifdef NOT_COUNTED
        :: else
#else
        :: else -> owed++
#endif
        fi
      };
      other_ready = false;
      if
      :: atomic { eventfd > 0 -> signals = signals + eventfd; eventfd = 0 }
      :: skip  /* the read is under way, and its result comes in a later iteration */
      fi
    :: atomic { head != is_empty -> skip }
    fi
  od;
  atomic { received = received + queued; queued = 0; head = is_closed };
#ifndef GO_EARLY
  do
  :: signals < owed -> atomic { eventfd > 0 -> signals = signals + eventfd; eventfd = 0 }
  :: else -> break
  od;
#endif
  eventfd_open = false;
  assert(signals <= owed);
  gone = true
}

/* When all is over, everything pushed was received. (The counts of the producers come later.) */
active proctype judge() {
  (gone && pushed + refused == PRODUCERS * EACH + 1);
  assert(received == pushed);
  assert(signals == owed && eventfd == 0)
}

ltl served { [] ((head == is_list) -> <> (head != is_list)) }
ltl goes { [] (stop -> <> gone) }
