// Building the tables of trie.h: sort the tokens, read the trie off the sorted list, place its states.
#include "trie.h"

#include "common.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace roost {
namespace {

struct Token {
    uint64_t prefix;                         // its first 8 bytes, big-endian: most comparisons end here
    const uint8_t* bytes;
    uint64_t length;
    uint32_t id;
};

bool before(const Token& a, const Token& b) {
    if (a.prefix != b.prefix) return a.prefix < b.prefix;
    const int order = std::memcmp(a.bytes, b.bytes, std::min(a.length, b.length));
    return order ? order < 0 : a.length < b.length;
}

struct Edge {
    uint32_t node;                           // the inner node it leads to, 0 for a leaf
    uint32_t id;                             // the token that ends there, or 0
    uint8_t label;
};

struct Node {
    uint32_t first, count;                   // its edges
};

// The inner nodes of depth >= 2, numbered from 1; `pairs[first | second << 8]` are the edges from the root.
struct Tree {
    std::vector<Node> nodes{{0, 0}};
    std::vector<Edge> edges;
    std::vector<Edge> pairs = std::vector<Edge>(65536);

    explicit Tree(const std::vector<Token>& tokens) {
        struct Task { uint64_t first, last, depth; uint32_t node; };  // sorted tokens with one prefix of `depth` bytes
        std::vector<Task> tasks;
        const auto enter = [&](Edge& edge, uint64_t first, uint64_t last, uint64_t depth) {
            if (tokens[first].length == depth) edge.id = tokens[first++].id;
            if (first == last) return;
            edge.node = static_cast<uint32_t>(nodes.size());
            nodes.push_back({0, 0});
            tasks.push_back({first, last, depth, edge.node});
        };
        const auto group = [&](uint64_t first, uint64_t last, uint64_t depth) {  // the end of the run with one byte
            uint64_t end = first;
            while (end < last && tokens[end].bytes[depth] == tokens[first].bytes[depth]) end++;
            return end;
        };
        for (uint64_t i = 0, end; i < tokens.size(); i = end) {
            end = i + 1;
            if (tokens[i].length == 1) continue;
            while (end < tokens.size() && tokens[end].prefix >> 48 == tokens[i].prefix >> 48) end++;  // the same pair
            enter(pairs[tokens[i].bytes[0] | tokens[i].bytes[1] << 8], i, end, 2);
        }
        while (!tasks.empty()) {
            const Task task = tasks.back();
            tasks.pop_back();
            const auto first_edge = static_cast<uint32_t>(edges.size());
            for (uint64_t i = task.first, end; i < task.last; i = end) {
                end = group(i, task.last, task.depth);
                edges.push_back({0, 0, tokens[i].bytes[task.depth]});
                enter(edges.back(), i, end, task.depth + 1);
            }
            nodes[task.node] = {first_edge, static_cast<uint32_t>(edges.size()) - first_edge};
        }
    }
};

// 256 slots (or bases) as bits. `by(c)` holds b exactly when *this holds b XOR c: c permutes the four words by its high
// two bits and the bits of each by swaps, so all 256 bases of a block are tried at once.
struct Bits {
    std::array<uint64_t, 4> word;

    Bits by(uint8_t c) const {
        static constexpr uint64_t even[6] = {0x5555555555555555, 0x3333333333333333, 0x0f0f0f0f0f0f0f0f,
                                             0x00ff00ff00ff00ff, 0x0000ffff0000ffff, 0x00000000ffffffff};
        Bits result;
        for (int i = 0; i < 4; i++) {
            uint64_t w = word[i ^ (c >> 6)];
            for (int bit = 0; bit < 6; bit++)
                if (c >> bit & 1) w = (w >> (1 << bit) & even[bit]) | (w & even[bit]) << (1 << bit);
            result.word[i] = w;
        }
        return result;
    }
    bool any() const { return word[0] | word[1] | word[2] | word[3]; }
    int first() const {
        for (int i = 0; i < 4; i++)
            if (word[i]) return 64 * i + std::countr_zero(word[i]);
        return -1;
    }
    void clear(int bit) { word[bit >> 6] &= ~(uint64_t{1} << (bit & 63)); }
    friend Bits operator&(const Bits& a, const Bits& b) {
        return {{a.word[0] & b.word[0], a.word[1] & b.word[1], a.word[2] & b.word[2], a.word[3] & b.word[3]}};
    }
};

// Gives every inner node a base. Widest nodes first, each into the first block that takes it; a block that was first in
// line and refused `patience` times is passed over until the single children come, which fill what the others left.
class Placement {
public:
    std::vector<uint32_t> base;

    explicit Placement(const Tree& tree) : base(tree.nodes.size()) {
        std::vector<uint32_t> order(tree.nodes.size() - 1);
        for (uint32_t i = 0; i < order.size(); i++) order[i] = i + 1;
        std::stable_sort(order.begin(), order.end(),
                         [&](uint32_t a, uint32_t b) { return tree.nodes[a].count > tree.nodes[b].count; });
        for (const uint32_t node : order)
            base[node] = place(&tree.edges[tree.nodes[node].first], tree.nodes[node].count);
    }
    uint64_t size() const { return 256 * blocks.size(); }

private:
    struct Block {
        Bits free{{~0ull, ~0ull, ~0ull, ~0ull}}, bases{{~0ull, ~0ull, ~0ull, ~0ull}};
        uint32_t left = 256;                 // free slots
        int refused = 0;
    };
    static constexpr int patience = 16;
    std::vector<Block> blocks;
    uint64_t start = 0;                      // every block before it is passed over
    uint32_t width = 0;                      // children of the nodes being placed

    uint32_t place(const Edge* edges, uint32_t count) {
        if (count == 1 && width != 1) start = 0;
        width = count;
        for (uint64_t at = start;; at++) {
            if (at == blocks.size()) {
                if (256 * at + 255 > max_base) throw Error("the vocabulary is too large");
                blocks.emplace_back();
                if (at == 0) blocks[0].bases.clear(0);  // base 0 is a leaf
            }
            Block& block = blocks[at];
            if (block.left >= count) {
                Bits fits = block.bases;
                for (uint32_t i = 0; i < count && fits.any(); i++) fits = fits & block.free.by(edges[i].label);
                if (const int found = fits.first(); found >= 0) {
                    block.bases.clear(found);
                    for (uint32_t i = 0; i < count; i++) block.free.clear(found ^ edges[i].label);
                    block.left -= count;
                    return static_cast<uint32_t>(256 * at + found);
                }
            }
            if (at == start && (block.left < count || (count > 1 && ++block.refused >= patience))) start++;
        }
    }
};

std::vector<Token> sorted_tokens(const Trie& trie) {
    std::vector<Token> tokens;
    for (uint64_t id = 0; id < trie.vocab_size(); id++) {
        const uint8_t* bytes = &trie.bytes[trie.starts[id]];
        const uint64_t length = trie.starts[id + 1] - trie.starts[id];
        if (!length) continue;
        if (!id || id > max_id) throw Error("id " + std::to_string(id) + " is not in 1.." + std::to_string(max_id));
        uint64_t prefix = 0;
        for (uint64_t i = 0; i < 8; i++) prefix = prefix << 8 | (i < length ? bytes[i] : 0);
        tokens.push_back({prefix, bytes, length, static_cast<uint32_t>(id)});
    }
    std::sort(tokens.begin(), tokens.end(), before);
    for (uint64_t i = 1; i < tokens.size(); i++)
        if (!before(tokens[i - 1], tokens[i])) 
            throw Error("ids " + std::to_string(tokens[i - 1].id) + " and " + std::to_string(tokens[i].id) +
                        " are one token");
    return tokens;
}

}  // namespace

Trie::Trie(const uint8_t* data, const uint64_t* offsets, uint64_t vocab_size)
    : root(65536), single{}, opens{}, starts(offsets, offsets + vocab_size + 1) {
    for (uint64_t id = 0; id < vocab_size; id++)
        if (starts[id] > starts[id + 1] || starts[0]) throw Error("token offsets must climb from 0");
    bytes.assign(data, data + starts.back());
    bytes.resize(bytes.size() + 16);         // decoding copies 16 bytes at a time
    std::memset(hard, 0xff, sizeof hard);
    const std::vector<Token> tokens = sorted_tokens(*this);
    for (const Token& token : tokens) {
        if (token.length == 1) single[token.bytes[0]] = token.id;
        else opens[token.bytes[0]] = true;
        for (uint64_t i = 1; i < token.length; i++) {
            const uint32_t pair = token.bytes[i - 1] | token.bytes[i] << 8;
            hard[pair >> 5] &= ~(1u << (pair & 31));
        }
    }
    for (int byte = 0; byte < 256; byte++)
        if (!single[byte]) throw Error("no token for the single byte " + std::to_string(byte));

    const Tree tree(tokens);
    const Placement placement(tree);
    for (int pair = 0; pair < 65536; pair++) {
        const Edge& edge = tree.pairs[pair];
        root[pair] = {placement.base[edge.node], edge.id ? edge.id : single[pair & 255], edge.id ? 2u : 1u};
    }
    slots.resize(std::max<uint64_t>(placement.size(), 256));
    for (uint32_t node = 1; node < tree.nodes.size(); node++)
        for (uint32_t i = 0; i < tree.nodes[node].count; i++) {
            const Edge& edge = tree.edges[tree.nodes[node].first + i];
            slots[placement.base[node] ^ edge.label] = {placement.base[edge.node], edge.id, 0x100u | edge.label};
        }
}

}  // namespace roost
