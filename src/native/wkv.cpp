// WKV on a CPU: the calls from Python, the split over threads, and the baseline instruction set. See wkv.h.
#include "wkv.h"

#include "common.h"
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>
#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LANES 4
#define EACH_LANE(f) f(0), f(1), f(2), f(3)

namespace roost::wkv {
namespace {
#include "wkv_body.inl"
}
const Kernels baseline = kernels;
}  // namespace roost::wkv

extern "C" {

struct View {                                // (B, T, H, N) with N contiguous; steps in elements
    void* data;
    int64_t row, token, head;
};

struct WkvCall {                             // mirrored by roost/ops/native.py
    View r, k, v, log_w;                     // fp32 or bf16; log_w fp32, static: row and token are 0
    View out;                                // forward: out; backward: its gradient
    const float *u, *state;                  // (H, N), (rows, H, N, N)
    float* saved;                            // null, or (blocks, H, N, N): written forward, read backward
    const int64_t* offsets;                  // null, or rows + 1 bounds of documents in one row of tokens
    int64_t rows, tokens, heads, size;       // rows: documents, with offsets
    int32_t bf16, threads;
    float* after;                            // forward: the new state; backward: its gradient
    View dr, dk, dv, d_log_w;                // backward only, from here; d_log_w static: (H, N)
    float *du, *d_state;
};

}  // extern "C"

namespace roost::wkv {
namespace {

const Kernels& chosen() {
#if defined(__x86_64__)
    if (isa() >= Isa::avx512) return avx512;
    if (isa() == Isa::avx2) return avx2;
#endif
    return baseline;
}

int index_of(int64_t size) {
    const auto found = std::find(std::begin(head_sizes), std::end(head_sizes), size);
    if (found == std::end(head_sizes)) throw Error("no kernel for heads of " + std::to_string(size) + " channels");
    return static_cast<int>(found - std::begin(head_sizes));
}

struct Row {
    int64_t batch, first, tokens, saved;     // saved: the index of its first saved state
};

std::vector<Row> rows_of(const WkvCall& c) {
    std::vector<Row> rows;
    int64_t saved = 0;
    for (int64_t i = 0; i < c.rows; i++) {
        const int64_t first = c.offsets ? c.offsets[i] : 0, end = c.offsets ? c.offsets[i + 1] : c.tokens;
        rows.push_back({c.offsets ? 0 : i, first, end - first, saved});
        saved += std::max<int64_t>(0, (end - first - 1) / block_tokens);
    }
    return rows;
}

char* at_token(const View& x, const Row& row, int64_t head, int64_t bytes) {
    if (!x.data) return nullptr;             // no tokens at all
    return static_cast<char*>(x.data) + (row.batch * x.row + row.first * x.token + head * x.head) * bytes;
}

Head head_of(const WkvCall& c, const Row& row, int64_t index, int64_t head) {
    const int64_t bytes = c.bf16 ? 2 : 4, area = c.size * c.size;
    return {at_token(c.r, row, head, bytes), at_token(c.k, row, head, bytes), at_token(c.v, row, head, bytes),
            reinterpret_cast<float*>(at_token(c.log_w, row, head, 4)), c.u + head * c.size,
            c.state + (index * c.heads + head) * area, c.r.token, c.k.token, c.v.token, c.log_w.token, row.tokens, c.bf16 != 0};
}

float* saved_of(const WkvCall& c, const Row& row, int64_t head) {
    return c.saved ? c.saved + (row.saved * c.heads + head) * c.size * c.size : nullptr;
}

// torch's own threads, where torch runs on libgomp: for some milliseconds after each of its operations they spin, and a
// second pool would compete with them for the cores. What GCC calls for `#pragma omp parallel`; null: our own pool. In the
// child of a fork libgomp waits for ever for threads that only the parent has, so there it is ours too.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Team team() {
#if defined(__linux__)
    static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return forked() ? nullptr : found;
#else
    return nullptr;
#endif
}

constexpr int64_t worth_a_thread = 64;       // tokens x heads of 64 channels: about ten microseconds

// body(task, scratch) for every task, each by one thread, whichever is free
template <class F> void each_task(const WkvCall& c, int64_t tasks, int64_t tokens, size_t bytes, F&& body) {
    const int64_t work = tokens * c.heads * c.size * c.size / 4096;
    const int threads = static_cast<int>(std::clamp<int64_t>(std::min(tasks, work / worth_a_thread), 1, std::max(c.threads, 1)));
    struct Free {
        void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    const std::unique_ptr<void, Free> scratch(::operator new(bytes * threads, std::align_val_t{64}));
    std::atomic<int64_t> next{0};
    std::atomic<int> arrived{0};
    const auto share = [&] {
        void* mine = static_cast<char*>(scratch.get()) + bytes * arrived.fetch_add(1, std::memory_order_relaxed);
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task, mine);
    };
    if (threads > 1 && team()) {
        auto member = [&] {
            FlushDenormals flush;
            share();
        };
        team()([](void* f) { (*static_cast<decltype(member)*>(f))(); }, &member, threads, 0);
    } else {
        parallel(threads, [&](const Region&) { share(); });
    }
}

int64_t all_tokens(const WkvCall& c) { return c.offsets ? c.tokens : c.rows * c.tokens; }

// sum[h][n] = the parts of every row, in the order of rows
void add_rows(const std::vector<float>& parts, int64_t rows, int64_t width, float* sum) {
    for (int64_t i = 0; i < width; i++) {
        double total = 0;
        for (int64_t row = 0; row < rows; row++) total += parts[row * width + i];
        sum[i] = static_cast<float>(total);
    }
}

void run_forward(const WkvCall& c) {
    const int which = index_of(c.size);
    const Kernels& kernel = chosen();
    const std::vector<Row> rows = rows_of(c);
    const int64_t heads = c.rows * c.heads, area = c.size * c.size;
    const int64_t parts = heads < c.threads ? c.size / 32 : 1;   // too few heads: their value columns are independent
    each_task(c, heads * parts, all_tokens(c), kernel.forward_bytes[which], [&](int64_t task, void* scratch) {
        const int64_t part = task % parts, head = task / parts % c.heads, index = task / parts / c.heads;
        const Row& row = rows[index];
        Forward f{head_of(c, row, index, head),
                  c.after + (index * c.heads + head) * area,
                  saved_of(c, row, head),
                  at_token(c.out, row, head, c.bf16 ? 2 : 4),
                  c.heads * area,
                  c.out.token,
                  static_cast<int>(c.size / parts * part),
                  static_cast<int>(c.size / parts * (part + 1))};
        kernel.forward[which](f, scratch);
    });
}

void run_backward(const WkvCall& c) {
    const int which = index_of(c.size);
    const Kernels& kernel = chosen();
    const std::vector<Row> rows = rows_of(c);
    const int64_t width = c.heads * c.size, area = c.size * c.size, bytes = c.bf16 ? 2 : 4;
    const bool fixed = c.log_w.token == 0;
    std::vector<float> du(c.rows * width), dw(fixed ? c.rows * width : 0);
    each_task(c, c.rows * c.heads, all_tokens(c), kernel.backward_bytes[which], [&](int64_t task, void* scratch) {
        const int64_t head = task % c.heads, index = task / c.heads;
        const Row& row = rows[index];
        const int64_t own = task * c.size;
        Backward b{head_of(c, row, index, head),
                   saved_of(c, row, head),
                   c.after + task * area,
                   at_token(c.out, row, head, bytes),
                   at_token(c.dr, row, head, bytes),
                   at_token(c.dk, row, head, bytes),
                   at_token(c.dv, row, head, bytes),
                   fixed ? dw.data() + own : reinterpret_cast<float*>(at_token(c.d_log_w, row, head, 4)),
                   du.data() + own,
                   c.d_state + task * area,
                   c.heads * area,
                   c.out.token,
                   c.dr.token};
        kernel.backward[which](b, scratch);
    });
    add_rows(du, c.rows, width, c.du);
    if (fixed) add_rows(dw, c.rows, width, static_cast<float*>(c.d_log_w.data));
}

}  // namespace
}  // namespace roost::wkv

ROOST_API int roost_wkv_forward(const WkvCall* call) {
    return roost::guarded([&] { roost::wkv::run_forward(*call); });
}

ROOST_API int roost_wkv_backward(const WkvCall* call) {
    return roost::guarded([&] { roost::wkv::run_backward(*call); });
}
