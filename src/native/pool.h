// One small thread pool for the process: a region runs `body(thread)` on `threads` threads, the caller being thread 0.
//
// Workers spin for a few microseconds, then sleep on a futex, so a busy neighbour on the same core costs its share and no
// more. One region runs at a time; a second caller (another Python thread) waits its turn. The pool is rebuilt in a
// child after fork. What a region computes must not depend on the number of threads.
#pragma once
#include <atomic>

namespace roost {

constexpr int max_threads = 256;

class Barrier {                              // for the threads of one region; every one of them must arrive
public:
    explicit Barrier(int threads) : threads(threads) {}
    void wait();

private:
    const int threads;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned> generation{0};
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

using Body = void (*)(const Region&, void*);
void run(int threads, Body body, void* context);     // throws Error for an impossible number of threads

template <class F> void parallel(int threads, F&& body) {  // the body must not throw
    run(threads, [](const Region& region, void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(region); },
        static_cast<void*>(&body));
}

}  // namespace roost
