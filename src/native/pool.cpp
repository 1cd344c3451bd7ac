// The thread pool: see pool.h.
#include "pool.h"

#include "common.h"

#include <memory>
#include <mutex>
#include <new>
#include <pthread.h>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace roost {
namespace {

constexpr int spins = 2000;                  // about 20 microseconds; then the core is given back

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

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

unsigned await_change(std::atomic<unsigned>& word, unsigned seen) {
    for (int i = 0; i < spins; i++) {
        const unsigned now = word.load(std::memory_order_acquire);
        if (now != seen) return now;
        pause();
    }
    unsigned now;
    while ((now = word.load(std::memory_order_acquire)) == seen) sleep_while(word, seen);
    return now;
}

struct Pool {
    std::mutex turn;                         // one region at a time
    std::vector<std::thread> workers;        // thread i + 1 is workers[i]
    alignas(64) std::atomic<unsigned> start{0};
    alignas(64) std::atomic<unsigned> done{0};
    std::atomic<int> pending{0};
    int threads = 1;
    Body body = nullptr;
    void* context = nullptr;
    Barrier* barrier = nullptr;

    void work(int index, unsigned seen) {
        for (;;) {
            seen = await_change(start, seen);
            if (index >= threads) continue;  // `threads` is stable until every participant of this region is done
            FlushDenormals flush;
            body({threads, index, barrier}, context);
            if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                done.fetch_add(1, std::memory_order_release);
                wake_all(done);
            }
        }
    }
};

Pool* pool = new Pool;                       // never destroyed: its workers sleep until the process ends

void grow(int threads) {
    while (static_cast<int>(pool->workers.size()) < threads - 1) {
        const int index = static_cast<int>(pool->workers.size()) + 1;
        const unsigned seen = pool->start.load();
        try {
            pool->workers.emplace_back([p = pool, index, seen] { p->work(index, seen); });
        } catch (const std::system_error&) {
            throw Error("the system refuses to start " + std::to_string(threads) + " threads");
        }
    }
}

const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // workers do not survive a fork

}  // namespace

void Barrier::wait() {
    const unsigned seen = generation.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
        arrived.store(0, std::memory_order_relaxed);
        generation.fetch_add(1, std::memory_order_release);
        wake_all(generation);
    } else {
        await_change(generation, seen);
    }
}

void run(int threads, Body body, void* context) {
    (void)at_fork;
    if (threads < 1 || threads > max_threads)
        throw Error("threads is " + std::to_string(threads) + "; it must be 1 to " + std::to_string(max_threads));
    if (threads == 1) {
        FlushDenormals flush;
        return body({1, 0, nullptr}, context);
    }
    std::lock_guard turn(pool->turn);
    grow(threads);
    Barrier barrier(threads);
    pool->threads = threads;
    pool->body = body;
    pool->context = context;
    pool->barrier = &barrier;
    pool->pending.store(threads, std::memory_order_relaxed);
    const unsigned seen = pool->done.load(std::memory_order_acquire);
    pool->start.fetch_add(1, std::memory_order_release);
    wake_all(pool->start);
    {
        FlushDenormals flush;
        body({threads, 0, &barrier}, context);
    }
    if (pool->pending.fetch_sub(1, std::memory_order_acq_rel) == 1)
        pool->done.fetch_add(1, std::memory_order_release);
    else
        await_change(pool->done, seen);
}

}  // namespace roost
