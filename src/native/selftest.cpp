// What the tests of the pool call: a computation in which a lost wake-up, a missed stage or a stale value changes a sum.
#include "common.h"
#include "pool.h"

#include <vector>

// In each of `rounds` stages every cell becomes 5 times itself plus 2 times its neighbour, modulo 2^64; a thread has one.
// `cells` (threads,) holds the start and the result. `modes` (threads,) gets 1 where a thread flushes denormals and
// rounds to nearest.
ROOST_API int roost_selftest_pool(int threads, long rounds, uint64_t* cells, int32_t* modes) {
    return roost::guarded([&] {
        const std::vector<uint64_t> empty(roost::max_threads);
        std::vector<uint64_t> stages[2] = {empty, empty};
        roost::parallel(threads, [&](const roost::Region& region) {
            const int i = region.thread, next = (i + 1) % threads;
            volatile float tiny = 1e-30f, small = 1e-10f, one = 1.0f, most_of_ulp = 0.75f * 0x1p-23f;
            modes[i] = tiny * small == 0.0f && one + most_of_ulp > 1.0f && -one - most_of_ulp < -1.0f;
            stages[0][i] = cells[i];
            region.wait();
            for (long round = 0; round < rounds; round++) {
                const auto& before = stages[round % 2];
                stages[(round + 1) % 2][i] = 5 * before[i] + 2 * before[next];
                region.wait();
            }
            cells[i] = stages[rounds % 2][i];
        });
    });
}

// Reads `bytes` bytes as fast as plain loads go, each thread its own part in `streams` streams: for measurements.
ROOST_API int roost_selftest_read(const uint64_t* data, long bytes, int threads, int streams) {
    return roost::guarded([&] {
        if (streams < 1 || streams > 64 || bytes < 0) throw roost::Error("impossible number of streams or bytes");
        roost::parallel(threads, [&](const roost::Region& region) {
            long first, last;
            region.slice(bytes / 8, 8 * streams, first, last);
            const long length = (last - first) / streams / 8 * 8;
            uint64_t sums[8] = {};
            for (long i = 0; i < length; i += 8)
                for (int s = 0; s < streams; s++)
                    for (int j = 0; j < 8; j++) sums[j] += data[first + s * length + i + j];
            for (uint64_t& sum : sums) asm volatile("" : "+r"(sum));  // the reads are the purpose
        });
    });
}
