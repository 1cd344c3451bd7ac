// One small thread pool for the process: a region runs `body(region)` on `threads` threads, the caller being thread 0.
//
// Waiting threads spin for some microseconds, then sleep in the kernel, so a busy neighbour on the same core costs its
// share and no more. One region runs at a time; a second caller (another Python thread) waits its turn. A child after
// fork gets a pool of its own. What a region computes must not depend on the number of threads: every thread of it has
// the same rounding and flushes denormals, whatever the caller's settings are.
#pragma once
#include <atomic>
#include <type_traits>

namespace roost {

constexpr int max_threads = 256;

// A number that threads wait on. Whoever changes it enters the kernel only if somebody sleeps there: with a barrier for
// every stage of every layer, most changes are seen by spinning threads.
class alignas(64) Signal {
public:
    unsigned now() const { return number.load(std::memory_order_acquire); }
    void raise();                            // the next number, visible together with everything written before
    bool await(unsigned seen, int spins);    // until the number is not `seen`; whether spinning was enough
    bool slept_on() const { return sleepers.load(std::memory_order_relaxed) != 0; }

private:
    std::atomic<unsigned> number{0};
    std::atomic<unsigned> sleepers{0};
};

class Barrier {                              // for the threads of one region; every one of them must arrive
public:
    Barrier(int threads, int spins) : threads(threads), spins(spins) {}
    void wait();

private:
    const int threads, spins;
    alignas(64) std::atomic<int> arrived{0};
    Signal opened;
};

struct Region {
    int threads;                             // how many run it
    int thread;                              // which one this is
    Barrier* barrier;
    void wait() const { if (threads > 1) barrier->wait(); }
    // the slice [first, last) of `items` that belongs to this thread, in units of `unit`
    void slice(long items, long unit, long& first, long& last) const {
        const long units = (items + unit - 1) / unit;
        first = units * thread / threads * unit;
        last = units * (thread + 1) / threads * unit;
        if (first > items) first = items;
        if (last > items) last = items;
    }
};

// The body must neither throw (the others would wait for ever at the next barrier) nor start a region of its own.
using Body = void (*)(const Region&, void*);
void run(int threads, Body body, void* context);     // checks `threads`
void check_threads(int threads);                     // throws Error for an impossible number
bool forked();                                       // whether this process is a child that was forked off

template <class F> void parallel(int threads, F&& body) {
    run(threads, [](const Region& region, void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(region); }, &body);
}

}  // namespace roost
