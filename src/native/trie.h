// A vocabulary prepared for greedy longest match: a two-byte root over an XOR double array, and the pairs of bytes that
// no token joins ("hard" pairs: text may be cut there without changing its ids).
//
// A state's child on byte c lies in slot (base XOR c) of `slots`. No two states share a base, so a slot that carries
// the label c can only be the child of the state that asks: no parent is stored. Base 0 is a leaf.
#pragma once
#include <cstdint>
#include <vector>

namespace roost {

// One state in 64 bits: base 31 | id 24 (0: not a token) | 9. The low 9 bits are 0x100 + label in `slots` (an empty
// slot then matches no byte, not even 0), and in `root` the bytes that the best token so far has, 1 or 2.
struct TrieState {
    uint64_t bits = 0;
    TrieState() = default;
    TrieState(uint64_t base, uint64_t id, uint64_t low) : bits(base << 33 | id << 9 | low) {}
    uint32_t base() const { return static_cast<uint32_t>(bits >> 33); }
    uint32_t id() const { return static_cast<uint32_t>(bits >> 9) & 0xffffff; }
    uint32_t low() const { return static_cast<uint32_t>(bits) & 0x1ff; }
};
constexpr uint64_t max_base = (uint64_t{1} << 31) - 1;
constexpr uint32_t max_id = (1u << 24) - 1;

struct Trie {
    std::vector<TrieState> root;             // 65,536, indexed by first byte | second << 8
    std::vector<TrieState> slots;            // states of depth >= 3
    uint32_t single[256];                    // the id of each byte
    bool opens[256];                         // whether a longer token starts with this byte
    uint32_t hard[2048];                     // bit left | right << 8: no token joins these two bytes
    std::vector<uint8_t> bytes;              // of all tokens in the order of ids, then 16 zeros
    std::vector<uint64_t> starts;            // vocab_size + 1 offsets into bytes; equal ones where no token is

    // Token i is bytes[starts[i] .. starts[i + 1]). Throws Error unless every single byte is a token.
    Trie(const uint8_t* bytes, const uint64_t* starts, uint64_t vocab_size);

    uint64_t vocab_size() const { return starts.size() - 1; }
    bool may_cut(const uint8_t* at) const {  // between at[-1] and at[0], two bytes of one text
        const uint32_t pair = at[-1] | at[0] << 8;
        return hard[pair >> 5] >> (pair & 31) & 1;
    }
};

}  // namespace roost
