// The World tokenizer: greedy longest match over a trie (trie.h), a memory of short units, and decoding by copying.
//
// Text is cut at hard boundaries into units of about five bytes; one of up to 15 bytes is looked up in a direct-mapped
// table of keys and ids, the memory, before the trie is asked. Both are exact: neither the memory, nor where a text is
// cut, nor the number of threads can change the ids.
#include "common.h"
#include "pool.h"
#include "trie.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <new>

namespace roost {
namespace {

constexpr int window = 1024;                 // bytes cut at a time: positions and keys stay in the first-level cache
constexpr int64_t stretch = 1 << 15;         // bytes between two looks at the hit rate
constexpr int64_t chunk = 1 << 18;           // bytes of a piece of work for one thread
constexpr uint64_t small = 4096;             // bytes of a text that needs no memory
constexpr int memory_bits = 16;              // 65,536 units, 2 MiB
constexpr int longest_unit = 15;             // bytes of a unit that is remembered: 16 with its length

using Byte = uint8_t;

uint64_t load(const Byte* at) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    return word;
}

struct Key {                                 // the bytes of a unit, zeros, and its length as the last byte: never 0
    uint64_t low, high;

    static Key of(const Byte* unit, int64_t length) {  // reads 16 bytes
        alignas(16) static constexpr Byte ones[32] = {255, 255, 255, 255, 255, 255, 255, 255,
                                                      255, 255, 255, 255, 255, 255, 255, 255};
        const Byte* mask = ones + 16 - length;
        uint64_t high = load(unit + 8) & load(mask + 8);
        if constexpr (std::endian::native == std::endian::little) high |= static_cast<uint64_t>(length) << 56;
        else high |= static_cast<uint64_t>(length);
        return {load(unit) & load(mask), high};
    }
    uint32_t hash() const {
        return static_cast<uint32_t>((low ^ std::rotl(high, 23)) * 0x9e3779b97f4a7c15 >> (64 - memory_bits));
    }
    bool operator==(const Key& other) const { return !((low ^ other.low) | (high ^ other.high)); }  // one branch
};

template <class Id> struct Entry {
    static constexpr int room = 14 / sizeof(Id);
    Key key;
    Id ids[room];
    alignas(2) uint16_t count;

    const void* tail() const { return reinterpret_cast<const Byte*>(this) + 16; }  // the ids and more, 16 bytes
};
static_assert(sizeof(Entry<uint16_t>) == 32 && sizeof(Entry<uint32_t>) == 32);

// Units already seen, of one thread at a time, with ids as wide as the tokenizer's.
struct Memory {
    alignas(64) Byte entries[32 << memory_bits];
    template <class Id> Entry<Id>* table() { return reinterpret_cast<Entry<Id>*>(entries); }
};

struct Tokenizer {
    Trie trie;
    std::atomic<Memory*> idle[16]{};         // memories between two calls, for the next one

    Tokenizer(const Byte* bytes, const uint64_t* starts, uint64_t vocab_size) : trie(bytes, starts, vocab_size) {}
    ~Tokenizer() {
        for (auto& slot : idle) std::free(slot.load());
    }
    Memory* borrow() {                       // null without memory to spare: then there is only the trie
        for (auto& slot : idle)
            if (Memory* memory = slot.exchange(nullptr, std::memory_order_acquire)) return memory;
        void* zeroed = nullptr;
        if (posix_memalign(&zeroed, 64, sizeof(Memory))) return nullptr;
        return static_cast<Memory*>(std::memset(zeroed, 0, sizeof(Memory)));
    }
    void give_back(Memory* memory) {
        for (auto& slot : idle)
            if (Memory* none = nullptr; slot.compare_exchange_strong(none, memory, std::memory_order_release)) return;
        std::free(memory);
    }
    bool wide() const { return trie.vocab_size() > 65536; }  // ids of 32 bits instead of 16, everywhere
};

// The ids of [at, end). An open end means that more text may follow: what it could still change is left alone.
// Returns where it stopped.
template <bool open = false, class Id> const Byte* match(const Trie& trie, const Byte* at, const Byte* end, Id*& out) {
    const TrieState* const root = trie.root.data();
    const TrieState* const slots = trie.slots.data();
    while (end - at >= 2) {
        TrieState best = root[at[0] | at[1] << 8];
        const Byte* best_end = at + best.low();
        const Byte* next = at + 2;
        uint32_t base = best.base();
        while (base && next < end) {
            const TrieState state = slots[base ^ *next];
            if (state.low() != (0x100u | *next)) {
                base = 0;
                break;
            }
            ++next;
            const uint64_t token = -static_cast<uint64_t>(state.id() != 0);  // a mask: no branch to guess
            best.bits ^= (best.bits ^ state.bits) & token;
            best_end += (next - best_end) & static_cast<int64_t>(token);
            base = state.base();
        }
        if (open && base) return at;         // the text ended inside the trie
        *out++ = static_cast<Id>(best.id());
        at = best_end;
    }
    if (at < end && !(open && trie.opens[*at])) *out++ = static_cast<Id>(trie.single[*at++]);
    return at;
}

uint32_t cut_eight(const Trie& trie, const Byte* at) {
    uint32_t mask = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) mask |= static_cast<uint32_t>(trie.may_cut(at + i)) << i;
    return mask;
}

// The positions i in [1, n) with a boundary before text[i]. Eight are written at a time, needed or not, so that the
// processor has no branch to guess (without bits left it is the bit that keeps the count of zeros defined).
int cut(const Trie& trie, const Byte* text, int n, uint16_t* positions) {
    int found = 0;
    for (int first = 1; first < n; first += 64) {
        uint64_t mask = 0;
        if (n - first >= 64)
            for (int i = 0; i < 64; i += 8) mask |= static_cast<uint64_t>(cut_eight(trie, text + first + i)) << i;
        else
            for (int i = 0; first + i < n; i++) mask |= static_cast<uint64_t>(trie.may_cut(text + first + i)) << i;
        uint16_t* to = positions + found;
        found += std::popcount(mask);
        while (mask)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++, mask &= mask - 1)
                *to++ = static_cast<uint16_t>(first + __builtin_ctzll(mask | uint64_t{1} << 63));
    }
    return found;
}

// The ids of [at, end), where `end` is a boundary with at least 16 more bytes of text and of room for ids behind it.
// Returns whether the memory was worth asking.
template <class Id> bool recall(const Trie& trie, Entry<Id>* memory, const Byte* at, const Byte* end, Id*& out) {
    uint16_t positions[window + 64 + 8];
    Key keys[window + 1];
    uint32_t hashes[window + 1];
    int64_t units = 0, missed = 0;
    for (const Byte *from = at; from < end;) {
        const Byte* const text = from;
        const int n = static_cast<int>(std::min<int64_t>(window, end - from + 1));
        const int found = cut(trie, text, n, positions);
        from = text + n - 1;                 // the pair on the seam belongs to the next window
        const Byte* unit = at;
        for (int i = 0; i < found; i++) {    // all keys first: their entries are then on the way
            const Byte* const stop = text + positions[i];
            keys[i] = Key::of(unit, std::min<int64_t>(stop - unit, longest_unit));
            hashes[i] = keys[i].hash();
            __builtin_prefetch(&memory[hashes[i]]);
            unit = stop;
        }
        for (int i = 0; i < found; i++) {
            const Byte* const stop = text + positions[i];
            Entry<Id>& entry = memory[hashes[i]];
            if (stop - at > longest_unit) {
                match(trie, at, stop, out);
            } else if (entry.key == keys[i]) {
                std::memcpy(out, entry.tail(), 16);
                out += entry.count;
            } else {
                missed++;
                Id* const first = out;
                match(trie, at, stop, out);
                if (out - first <= Entry<Id>::room) {
                    entry.key = keys[i];
                    entry.count = static_cast<uint16_t>(out - first);
                    std::memcpy(entry.ids, first, sizeof entry.ids);  // the count says how many are meant
                }
            }
            at = stop;
        }
        units += found;
    }
    return missed * 4 <= units;
}

const Byte* last_cut(const Trie& trie, const Byte* first, const Byte* last) {  // in (first, last], or null
    for (; last > first; last--)
        if (trie.may_cut(last)) return last;
    return nullptr;
}

const Byte* next_cut(const Trie& trie, const Byte* from, const Byte* end) {  // the first one in [from, end), or end
    while (from < end && !trie.may_cut(from)) from++;
    return from;
}

// The ids of one text. The memory rests for a while after a stretch in which it knew too little.
template <class Id> void encode(const Trie& trie, Memory* memory, const Byte* at, const Byte* end, Id*& out) {
    constexpr int rest = 15;
    for (int resting = 0; memory && end - at > 64;) {
        const Byte* const limit = at + std::min<int64_t>(stretch, end - at - 16);
        const Byte* stop = last_cut(trie, at, limit);
        if (!stop || resting) {
            if (!stop) stop = next_cut(trie, limit, end);
            match(trie, at, stop, out);
            if (resting) resting--;
        } else if (!recall(trie, memory->table<Id>(), at, stop, out)) {
            resting = rest;
        }
        at = stop;
    }
    match(trie, at, end, out);
}

struct Work {                                // the documents [first, last), or the piece [begin, end) of one
    uint64_t first, last, begin, end, count = 0;
};

// Whole documents of about a chunk together; a larger document in pieces, cut at boundaries.
std::vector<Work> divide(const Trie& trie, const Byte* text, const uint64_t* ends, uint64_t documents) {
    std::vector<Work> work;
    uint64_t begin = 0;
    for (uint64_t i = 0; i < documents; begin = ends[i++]) {
        if (ends[i] - begin > 2 * chunk) {
            for (uint64_t at = begin; at < ends[i];) {
                const Byte* const want = text + at + std::min<uint64_t>(chunk, ends[i] - at);
                const uint64_t stop = next_cut(trie, want, text + ends[i]) - text;
                work.push_back({i, i, at, stop});
                at = stop;
            }
        } else if (!work.empty() && work.back().last == i && work.back().end - work.back().begin < chunk) {
            work.back().last = i + 1;
            work.back().end = ends[i];
        } else {
            work.push_back({i, i + 1, begin, ends[i]});
        }
    }
    return work;
}

// Document i is text[ends[i - 1] .. ends[i]). There is room for one id per byte, so each piece writes its ids where its
// bytes are; afterwards they are moved together.
template <class Id>
void encode_all(Tokenizer& tokenizer, const Byte* text, const uint64_t* ends, uint64_t documents, int threads,
                bool cache, Id* ids, uint64_t* counts) {
    const Trie& trie = tokenizer.trie;
    for (uint64_t i = 1; i < documents; i++)
        if (ends[i] < ends[i - 1]) throw Error("the ends of the documents must climb");
    const uint64_t size = documents ? ends[documents - 1] : 0;
    std::vector<Work> work;
    if (threads != 1) work = divide(trie, text, ends, documents);
    if (threads == 1 && documents) work.push_back({0, documents, 0, size});
    std::fill_n(counts, documents, 0);
    std::atomic<uint64_t> next{0};
    const int useful = static_cast<int>(std::clamp<uint64_t>(work.size(), 1, std::max(threads, 1)));
    parallel(threads < 1 || threads > max_threads ? threads : useful, [&](const Region&) {
        Memory* const memory = cache && size > small ? tokenizer.borrow() : nullptr;
        for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < work.size();) {
            Work& piece = work[i];
            Id* out = ids + piece.begin;
            const Byte* at = text + piece.begin;
            for (uint64_t document = piece.first; document < piece.last; document++) {
                Id* const first = out;
                encode(trie, memory, at, text + ends[document], out);
                at = text + ends[document];
                counts[document] = static_cast<uint64_t>(out - first);
            }
            if (piece.first == piece.last) encode(trie, memory, at, text + piece.end, out);
            piece.count = static_cast<uint64_t>(out - ids) - piece.begin;
        }
        if (memory) tokenizer.give_back(memory);
    });
    Id* out = ids;
    for (const Work& piece : work) {
        if (out != ids + piece.begin) std::memmove(out, ids + piece.begin, sizeof(Id) * piece.count);
        out += piece.count;
        if (piece.first == piece.last) counts[piece.first] += piece.count;
    }
}

template <class Id>
void encode_open(Tokenizer& tokenizer, const Byte* text, uint64_t size, Id* ids, uint64_t& count, uint64_t& used) {
    const Trie& trie = tokenizer.trie;
    const Byte* const cut = size > 1 ? last_cut(trie, text, text + size - 1) : nullptr;
    const Byte* const safe = cut ? cut : text;   // a continuation changes nothing left of a boundary
    Id* out = ids;
    Memory* const memory = static_cast<uint64_t>(safe - text) > small ? tokenizer.borrow() : nullptr;
    encode(trie, memory, text, safe, out);
    if (memory) tokenizer.give_back(memory);
    used = static_cast<uint64_t>(match<true>(trie, safe, text + size, out) - text);
    count = static_cast<uint64_t>(out - ids);
}

template <class Id> uint64_t byte_count(const Trie& trie, const Id* ids, uint64_t n) {
    const uint64_t* const starts = trie.starts.data();
    const uint64_t vocab = trie.vocab_size();
    uint64_t total = 0;
    for (uint64_t i = 0; i < n; i++) {
        const auto id = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));  // a negative one becomes huge
        if (id >= vocab)
            throw Error("id " + std::to_string(ids[i]) + " at position " + std::to_string(i) + " is not in 0.." +
                        std::to_string(vocab - 1));
        total += starts[id + 1] - starts[id];
    }
    return total;
}

// Copies 16 bytes per token, whatever its length, but for long ones and where the output ends. Each id is checked
// again: another thread may have changed it since it was counted.
template <class Id> void decode(const Trie& trie, const Id* ids, uint64_t n, Byte* out, uint64_t size) {
    const uint64_t* const starts = trie.starts.data();
    const uint64_t vocab = trie.vocab_size();
    Byte* const end = out + size;
    for (uint64_t i = 0; i < n; i++) {
        const auto id = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
        const uint64_t length = id < vocab ? starts[id + 1] - starts[id] : size + 1;
        const auto room = static_cast<uint64_t>(end - out);
        if (length > room) throw Error("the ids changed while they were decoded");
        const Byte* const token = &trie.bytes[starts[id]];
        if (length <= 16 && room >= 16) std::memcpy(out, token, 16);
        else if (length) std::memcpy(out, token, length);   // nothing at all may have no place: out is null then
        out += length;
    }
    if (out != end) throw Error("the ids changed while they were decoded");
}

// Calls `body` with ids of the type that `kind` names: bytes of an id, negative when it is signed.
template <class F> void with_ids(const void* ids, int kind, F&& body) {
    if (kind == 2) return body(static_cast<const uint16_t*>(ids));
    if (kind == 4) return body(static_cast<const uint32_t*>(ids));
    if (kind == -4) return body(static_cast<const int32_t*>(ids));
    if (kind == -8) return body(static_cast<const int64_t*>(ids));
    throw Error("ids must have 2 or 4 bytes, or signed 4 or 8");
}

template <class F> void with_width(const Tokenizer& tokenizer, void* ids, F&& body) {
    if (tokenizer.wide()) body(static_cast<uint32_t*>(ids));
    else body(static_cast<uint16_t*>(ids));
}

Tokenizer& of(void* handle) { return *static_cast<Tokenizer*>(handle); }

}  // namespace
}  // namespace roost

using namespace roost;

// Token i of the vocabulary is bytes[starts[i] .. starts[i + 1]); starts has vocab_size + 1 offsets.
ROOST_API int roost_tokenizer_new(const uint8_t* bytes, const uint64_t* starts, uint64_t vocab_size, void** handle) {
    return guarded([&] { *handle = new Tokenizer(bytes, starts, vocab_size); });
}

ROOST_API void roost_tokenizer_free(void* handle) { delete static_cast<Tokenizer*>(handle); }

// The resident bytes of the tables, without those of one memory per thread.
ROOST_API uint64_t roost_tokenizer_table_bytes(void* handle) {
    const Trie& trie = of(handle).trie;
    return sizeof trie + 8 * (trie.root.size() + trie.slots.size() + trie.starts.size()) + trie.bytes.size();
}

// Ids are uint32 when vocab_size is larger than 65,536 and uint16 otherwise. Document i is text[ends[i - 1] .. ends[i])
// and has counts[i] ids; `ids` has room for one per byte of text.
ROOST_API int roost_tokenizer_encode(void* handle, const uint8_t* text, const uint64_t* ends, uint64_t documents,
                                     int threads, int cache, void* ids, uint64_t* counts) {
    return guarded([&] {
        with_width(of(handle), ids, [&](auto* typed) {
            encode_all(of(handle), text, ends, documents, threads, cache != 0, typed, counts);
        });
    });
}

// As above for the beginning of one text: the ids that no continuation can change, and how many bytes they are.
ROOST_API int roost_tokenizer_encode_open(void* handle, const uint8_t* text, uint64_t size, void* ids, uint64_t* count,
                                          uint64_t* used) {
    return guarded([&] {
        with_width(of(handle), ids, [&](auto* typed) { encode_open(of(handle), text, size, typed, *count, *used); });
    });
}

// How many bytes the ids stand for. kind: bytes of an id, negative when it is signed.
ROOST_API int roost_tokenizer_byte_count(void* handle, const void* ids, uint64_t n, int kind, uint64_t* size) {
    return guarded([&] { with_ids(ids, kind, [&](auto* typed) { *size = byte_count(of(handle).trie, typed, n); }); });
}

// Writes the bytes of the ids; `size` is what roost_tokenizer_byte_count said.
ROOST_API int roost_tokenizer_decode(void* handle, const void* ids, uint64_t n, int kind, uint8_t* out, uint64_t size) {
    return guarded([&] { with_ids(ids, kind, [&](auto* typed) { decode(of(handle).trie, typed, n, out, size); }); });
}
