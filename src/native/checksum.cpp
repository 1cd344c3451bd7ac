// A 64-bit checksum against damage on disk and in transfer (not against malice), as fast as the page cache can be read.
//
// hash(bytes): the bytes, padded with zeros to a multiple of 64, are little-endian 64-bit words. Lanes start at
// lane_j = (j + 1) P, j = 0..3. Of every eight words lane j takes a = word 2j and b = word 2j + 1:
// lane = fold((lane ^ a) (b ^ (j + 1) P)), where fold is the high half of the 128-bit product xor the low half. At the end
// h = length, and for every lane h = fold((h ^ lane) P). Products (j + 1) P modulo 2^64; P = 0x9e3779b97f4a7c15.
// checksum(bytes): hash of the hashes of its blocks of 1 MiB, each eight little-endian bytes, so that threads can share it.
//
// Files are read with pread, not through a mapping: pages of a mapping would count as this process's memory.
#include "common.h"
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <unistd.h>
#include <vector>

namespace roost {
namespace {

static_assert(std::endian::native == std::endian::little);
constexpr uint64_t P = 0x9e3779b97f4a7c15;
constexpr long block = 1 << 20, piece = 1 << 17;

uint64_t fold(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product >> 64) ^ static_cast<uint64_t>(product);
}

struct Hash {
    uint64_t lane[4] = {P, 2 * P, 3 * P, 4 * P};
    long length = 0;

    void step(const uint8_t* data) {
        uint64_t word[8];
        std::memcpy(word, data, 64);
        for (uint64_t j = 0; j < 4; j++) lane[j] = fold(lane[j] ^ word[2 * j], word[2 * j + 1] ^ (j + 1) * P);
    }
    void add(const uint8_t* data, long n) {           // n is a multiple of 64, but for the last call
        length += n;
        for (; n >= 64; n -= 64, data += 64) step(data);
        if (n > 0) {
            uint8_t last[64] = {};
            std::memcpy(last, data, n);
            step(last);
        }
    }
    uint64_t value() const {
        uint64_t h = static_cast<uint64_t>(length);
        for (const uint64_t l : lane) h = fold(h ^ l, P);
        return h;
    }
};

uint64_t hash(const void* data, long n) {
    Hash h;
    h.add(static_cast<const uint8_t*>(data), n);
    return h.value();
}

bool read_exactly(int fd, uint8_t* to, long n, long offset) {
    while (n > 0) {
        const long got = pread(fd, to, n, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        to += got, offset += got, n -= got;
    }
    return true;
}

bool hash_block(int fd, long offset, long n, uint8_t* buffer, uint64_t& out) {
    Hash h;
    for (long at = 0; at < n; at += piece) {
        const long size = std::min(piece, n - at);
        if (!read_exactly(fd, buffer, size, offset + at)) return false;
        h.add(buffer, size);
    }
    out = h.value();
    return true;
}

}  // namespace
}  // namespace roost

// The checksum of n bytes in memory.
ROOST_API int roost_checksum(const void* data, long n, uint64_t* out) {
    return roost::guarded([&] {
        std::vector<uint64_t> hashes;
        for (long at = 0; at < n; at += roost::block)
            hashes.push_back(roost::hash(static_cast<const uint8_t*>(data) + at, std::min(roost::block, n - at)));
        *out = roost::hash(hashes.data(), 8 * static_cast<long>(hashes.size()));
    });
}

// The checksums of `count` ranges (offset, size) of an open file; -1 when one cannot be read to its end.
ROOST_API int roost_checksum_file(int fd, const long* offset, const long* size, int count, uint64_t* out, int threads) {
    return roost::guarded([&] {
        struct Block { long offset, size; };
        std::vector<Block> blocks;
        for (int i = 0; i < count; i++)
            for (long at = 0; at < size[i]; at += roost::block)
                blocks.push_back({offset[i] + at, std::min(roost::block, size[i] - at)});
        std::vector<uint64_t> hashes(blocks.size());
        std::vector<uint8_t> buffers(roost::piece * std::clamp(threads, 1, roost::max_threads));
        std::atomic<size_t> next{0};
        std::atomic<bool> whole{true};
        roost::parallel(threads, [&](const roost::Region& region) {
            for (size_t i; (i = next++) < blocks.size() && whole;)
                if (!roost::hash_block(fd, blocks[i].offset, blocks[i].size, &buffers[roost::piece * region.thread], hashes[i]))
                    whole = false;
        });
        if (!whole) throw roost::Error("the file cannot be read to its end");
        for (long i = 0, first = 0; i < count; i++) {
            const long n = (size[i] + roost::block - 1) / roost::block;
            out[i] = roost::hash(hashes.data() + first, 8 * n);
            first += n;
        }
    });
}
