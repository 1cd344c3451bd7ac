// The thread pool: see pool.h.
#include "pool.h"

#include "common.h"

#include <algorithm>
#include <csignal>
#include <mutex>
#include <pthread.h>
#include <system_error>
#include <thread>
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace roost {
namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");        // some 10 ns; `yield` does nothing on most cores
#endif
}

// Sleep if `word` is still `value`; may return early.
void sleep_while(std::atomic<unsigned>& word, unsigned value) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    word.wait(value);
#endif
}

void wake_all(std::atomic<unsigned>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, max_threads, nullptr, nullptr, 0);
#else
    word.notify_all();
#endif
}

// The kernel likes to wake a thread on the core of the one who wakes it. There it waits out a time slice, milliseconds,
// while another core is idle. So a sleeping worker is forbidden that core; once awake it may use all of its cores again.
class Elsewhere {
public:
#if defined(__linux__)
    void born() { thread.store(static_cast<pid_t>(syscall(SYS_gettid))); }
    void send() {                            // by the caller, before it wakes the worker
        const pid_t worker = thread.load();
        const int here = sched_getcpu();
        if (!worker || here < 0 || here >= CPU_SETSIZE || sched_getaffinity(worker, sizeof all, &all)) return;
        cpu_set_t others = all;
        CPU_CLR(here, &others);
        away = !sched_setaffinity(worker, sizeof others, &others);   // fails when there is no other core
    }
    void arrive() {                          // by the worker, when it is awake
        if (away) sched_setaffinity(0, sizeof all, &all);
        away = false;
    }

private:
    std::atomic<pid_t> thread{0};
    cpu_set_t all;
    bool away = false;
#else
    void born() {}
    void send() {}
    void arrive() {}
#endif
};

// Threads that are born in this scope get no signals: an interrupt must end the read or sleep of Python's main thread.
struct NoSignals {
    sigset_t before;
    NoSignals() {
        sigset_t all;
        sigfillset(&all);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) sigdelset(&all, fault);
        pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
};

// Each worker has a start signal of its own, so a region neither wakes nor misleads those that it leaves out: what they
// would read of it may already belong to the next one.
struct Pool {
    std::mutex turn;                         // one region at a time, and who may write what follows
    int size = 1;                            // threads there are, the caller included
    int threads = 1, spins = 0;              // the region: stable until each of its threads has taken its last look
    Body body = nullptr;
    void* context = nullptr;
    Barrier* barrier = nullptr;
    alignas(64) std::atomic<int> pending{0};
    Signal finished;
    Signal start[max_threads];
    Elsewhere elsewhere[max_threads];

    void work(int index) {
        int patience = 0;
        elsewhere[index].born();
        for (unsigned seen = 0;; seen++) {   // takes part in each region that it is called to: it cannot miss a number
            start[index].await(seen, patience);
            patience = spins;
            elsewhere[index].arrive();
            {
                FlushDenormals flush;
                body({threads, index, barrier}, context);
            }
            leave();
        }
    }

    bool leave() {                           // whether this thread is the last one of the region
        const bool last = pending.fetch_sub(1, std::memory_order_acq_rel) == 1;
        if (last) finished.raise();
        return last;
    }

    void grow(int wanted);
};

void Pool::grow(int wanted) {
    const NoSignals guard;
    try {
        for (; size < wanted; size++) std::thread([this, index = size] { work(index); }).detach();
    } catch (const std::system_error&) {
        throw Error("the system gives only " + std::to_string(size) + " of " + std::to_string(wanted) + " threads");
    }
}

Pool* pool = new Pool;                       // never destroyed: its workers sleep until the process ends
const int cores = static_cast<int>(std::thread::hardware_concurrency());

bool is_child = false;

// Workers do not survive a fork, and another thread of the parent may have held `turn`.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
    pool = new Pool;
    is_child = true;
});

}  // namespace

bool forked() { return is_child; }

// The order of the two numbers decides (hence sequential consistency): either the sleeper sees the new number, or the
// other side sees the sleeper.
void Signal::raise() {
    number.fetch_add(1);
    if (sleepers.load()) wake_all(number);
}

bool Signal::await(unsigned seen, int spins) {
    for (int i = 0; i < spins; i++) {
        if (now() != seen) return true;
        pause();
    }
    sleepers.fetch_add(1);
    while (number.load() == seen) sleep_while(number, seen);
    sleepers.fetch_sub(1);
    return false;
}

// A spin in vain means that another program has the core of a thread that is awaited. Then the next waits sleep at once:
// a thread that spins uses up its share of a core and is late itself. After them a spin tells whether it is still so.
void Barrier::wait() {
    constexpr int most = 100;
    thread_local int trust = most;           // spins that went well, up to `most`; below 0, waits to sleep through
    const unsigned seen = opened.now();
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
        arrived.store(0, std::memory_order_relaxed);
        opened.raise();
    } else if (trust < 0) {
        opened.await(seen, 0);
        trust++;
    } else {
        trust = opened.await(seen, spins) ? std::min(trust + 1, most) : trust - most;
    }
}

void check_threads(int threads) {
    if (threads < 1 || threads > max_threads)
        throw Error("threads is " + std::to_string(threads) + "; it must be 1 to " + std::to_string(max_threads));
}

void run(int threads, Body body, void* context) {
    check_threads(threads);
    if (threads == 1) {
        FlushDenormals flush;
        return body({1, 0, nullptr}, context);
    }
    const int spins = threads > cores ? 0 : 2000;  // some 50 microseconds, more than waking a thread takes
    Barrier barrier(threads, spins);
    std::lock_guard turn(pool->turn);
    pool->grow(threads);
    pool->threads = threads;
    pool->spins = spins;
    pool->body = body;
    pool->context = context;
    pool->barrier = &barrier;
    pool->pending.store(threads, std::memory_order_relaxed);
    const unsigned seen = pool->finished.now();
    for (int i = 1; i < threads; i++) {
        if (pool->start[i].slept_on()) pool->elsewhere[i].send();
        pool->start[i].raise();
    }
    {
        FlushDenormals flush;
        body({threads, 0, &barrier}, context);
    }
    if (!pool->leave()) pool->finished.await(seen, spins);
}

}  // namespace roost
