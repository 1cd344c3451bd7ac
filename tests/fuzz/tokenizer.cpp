// libFuzzer target of the tokenizer: a vocabulary and a text from the same bytes, against the plainest longest match.
//
//     clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Isrc/native
//         tests/fuzz/tokenizer.cpp src/native/{tokenizer,trie,isa,pool}.cpp -pthread -o fuzz-tokenizer
//     ./fuzz-tokenizer -max_total_time=30 -max_len=4096 -len_control=0
#include "common.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

extern "C" {
int roost_tokenizer_new(const uint8_t*, const uint64_t*, uint64_t, void**);
void roost_tokenizer_free(void*);
int roost_tokenizer_encode(void*, const uint8_t*, const uint64_t*, uint64_t, int, int, void*, uint64_t*);
int roost_tokenizer_encode_open(void*, const uint8_t*, uint64_t, void*, uint64_t*, uint64_t*);
int roost_tokenizer_byte_count(void*, const void*, uint64_t, int, uint64_t*);
int roost_tokenizer_decode(void*, const void*, uint64_t, int, uint8_t*, uint64_t);
}

namespace {

using Bytes = std::string;
using Ids = std::vector<uint16_t>;

void require(bool fact, const char* what) {
    if (fact) return;
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

struct Vocabulary {
    std::map<Bytes, uint16_t> ids;
    Bytes bytes;
    std::vector<uint64_t> starts{0, 0};      // id 0 is empty
    size_t longest = 1;

    void add(const Bytes& token) {
        if (token.empty() || !ids.emplace(token, static_cast<uint16_t>(starts.size() - 1)).second) return;
        bytes += token;
        starts.push_back(bytes.size());
        longest = std::max(longest, token.size());
    }
    Ids plain(const Bytes& text) const {
        Ids found;
        for (size_t at = 0; at < text.size();)
            for (size_t n = std::min(longest, text.size() - at);; n--)
                if (const auto token = ids.find(text.substr(at, n)); token != ids.end()) {
                    found.push_back(token->second);
                    at += n;
                    break;
                }
        return found;
    }
};

const uint8_t* pointer(const Bytes& text) { return reinterpret_cast<const uint8_t*>(text.data()); }

// Buffers of exactly the promised size, so that the sanitizer sees a byte too many.
Ids encode(void* handle, const Bytes& text, int threads, bool memory) {
    Ids ids(text.size());
    const uint64_t end = text.size();
    uint64_t count = 0;
    const std::vector<uint8_t> exact(text.begin(), text.end());
    require(!roost_tokenizer_encode(handle, exact.data(), &end, 1, threads, memory, ids.data(), &count), "encode");
    ids.resize(count);
    return ids;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 2) return 0;
    Vocabulary vocabulary;
    for (int byte = 0; byte < 256; byte++) vocabulary.add(Bytes(1, static_cast<char>(byte)));
    size_t at = 2;
    for (int n = data[0] % 32; n > 0 && at < size; n--) {  // tokens: a length, then bytes
        const size_t length = std::min<size_t>(data[at] % 24, size - at - 1);
        vocabulary.add(Bytes(data + at + 1, data + at + 1 + length));
        at += 1 + length;
    }
    Bytes text(data + at, data + size);
    for (int n = data[1] % 8; n > 0 && text.size() < 20'000; n--) text += text;  // long enough for memory and windows

    void* handle = nullptr;
    const uint64_t vocab_size = vocabulary.starts.size() - 1;
    require(!roost_tokenizer_new(pointer(vocabulary.bytes), vocabulary.starts.data(), vocab_size, &handle), "new");
    const Ids wanted = vocabulary.plain(text);
    for (const bool memory : {false, true, true}) require(encode(handle, text, 1, memory) == wanted, "ids");
    require(encode(handle, text, 2, true) == wanted, "ids of two threads");

    Ids streamed;
    Bytes pending;
    for (size_t from = 0, step = 1 + data[1]; from < text.size(); from += step) {
        pending += text.substr(from, step);
        Ids ids(pending.size());
        uint64_t count = 0, used = 0;
        const uint64_t length = pending.size();
        require(!roost_tokenizer_encode_open(handle, pointer(pending), length, ids.data(), &count, &used), "open");
        streamed.insert(streamed.end(), ids.begin(), ids.begin() + static_cast<long>(count));
        pending.erase(0, used);
        require(pending.size() < vocabulary.longest, "held back more than a token");
    }
    for (const uint16_t id : encode(handle, pending, 1, true)) streamed.push_back(id);
    require(streamed == wanted, "ids of the stream");

    uint64_t bytes = 0;
    require(!roost_tokenizer_byte_count(handle, wanted.data(), wanted.size(), 2, &bytes), "count");
    require(bytes == text.size(), "the number of bytes");
    std::vector<uint8_t> decoded(bytes);
    require(!roost_tokenizer_decode(handle, wanted.data(), wanted.size(), 2, decoded.data(), bytes), "decode");
    require(std::equal(decoded.begin(), decoded.end(), pointer(text)), "bytes");

    std::vector<int64_t> any(size / 8);      // hostile ids: an error or bytes, and nothing outside
    if (!any.empty()) std::memcpy(any.data(), data, any.size() * 8);
    for (auto& id : any) if (data[0] & 1) id %= 300;
    if (!roost_tokenizer_byte_count(handle, any.data(), any.size(), -8, &bytes)) {
        std::vector<uint8_t> out(bytes);
        require(!roost_tokenizer_decode(handle, any.data(), any.size(), -8, out.data(), bytes), "decode hostile ids");
    }
    roost_tokenizer_free(handle);
    return 0;
}
